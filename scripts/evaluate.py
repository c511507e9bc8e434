"""Scores a checkpoint beside naive baselines, on dates that it never saw.

    python scripts/evaluate.py --model DIR [--prices FILE_OR_DIR] [--tickers AAPL,MSFT] [--start DATE] [--end DATE]
        --output forecasts.parquet

Forecasts from every trading day between --start and --end, writes the forecast table and, beside it, metrics.json. By
default it starts after the last date that any choice of the training was made on.
"""

import json
from pathlib import Path

import pandas as pd

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.cleaning import load_prices
from spaceexploreai.data.prices import check_suffix, write_atomically, write_table
from spaceexploreai.data.windows import DateRange, forecast_windows
from spaceexploreai.evaluation.baselines import add_baselines
from spaceexploreai.evaluation.metrics import add_outcomes, format_scores, score
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor, parse_date
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.scripts.forecast import load_checkpoint, predict
from spaceexploreai.train.arguments import command, make_parser


def scored_range(
    config: SpaceExploreConfig, prices: pd.DataFrame, start: str | None, end: str | None, allow_in_sample: bool = False
) -> DateRange:
    """Cutoffs to forecast from. Refuses those at or before the last date the weights were fitted to."""
    first, last = prices["date"].min(), prices["date"].max()
    unseen = max((date for date in (config.train_cutoff, config.selection_cutoff) if date), default=None)
    if start is None and unseen is not None:
        start = pd.Timestamp(unseen) + pd.Timedelta(days=1)
    within = DateRange(first if start is None else parse_date(start), last if end is None else parse_date(end))
    if within.start > within.end:
        raise ValueError(f"nothing to evaluate: {within.start.date()} is after {within.end.date()}")
    seen = config.train_cutoff is not None and within.start <= pd.Timestamp(config.train_cutoff)
    if seen and not allow_in_sample:
        raise ValueError(
            f"{within.start.date()} is not after {config.train_cutoff}, the last date the model was trained on; "
            "scores there mean nothing (--allow-in-sample overrides)"
        )
    return within


def forecast_range(
    model: SpaceExploreForRegression,
    extractor: SpaceExploreFeatureExtractor,
    prices: pd.DataFrame,
    within: DateRange,
) -> pd.DataFrame:
    """Forecast table of every ticker and trading day of the range, the newest included, with outcomes and naive
    columns."""
    windows, origins = forecast_windows(extractor.encode(prices), extractor.context_length, within)
    table = extractor.forecast_table(origins, *predict(model, windows), model.config)
    return add_baselines(add_outcomes(table, prices), prices)


def write_metrics(scores: pd.DataFrame, path: str | Path) -> None:
    """Writes the scores as JSON: {horizon: {metric: {model: …, zero: …, drift: …, ewma: …}}}, undefined as null."""
    columns = [column for column in scores.columns if column not in ("horizon", "metric")]
    report = {}
    for row in scores.to_dict("records"):
        values = {column: None if pd.isna(row[column]) else float(row[column]) for column in columns}
        report.setdefault(str(row["horizon"]), {})[row["metric"]] = values
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(report, indent=2) + "\n"))


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub repository")
    parser.add_argument("--start", help="first cutoff (YYYY-MM-DD); default: after everything the training saw")
    parser.add_argument("--end", help="last cutoff (YYYY-MM-DD); default: the newest bar")
    parser.add_argument("--allow-in-sample", action="store_true", help="score dates the model was trained on")
    parser.add_argument("--output", required=True, help="forecast table to write, .parquet or .csv")
    args = parser.parse_args(argv)

    check_suffix(args.output, ".parquet", ".csv")
    model, extractor = load_checkpoint(args.model)
    prices = load_prices(args.prices, args.tickers, extractor.calendar, args.strict, args.fill)
    within = scored_range(model.config, prices, args.start, args.end, args.allow_in_sample)
    forecasts = forecast_range(model, extractor, prices, within)
    scores = score(forecasts)
    write_table(forecasts, args.output)
    metrics_path = Path(args.output).with_name("metrics.json")
    write_metrics(scores, metrics_path)
    print(f"cutoffs {within.start.date()} to {within.end.date()}, {forecasts['ticker'].nunique()} tickers")
    print(format_scores(scores))
    print(f"wrote {args.output} and {metrics_path}")


if __name__ == "__main__":
    main()
