"""Scores a checkpoint beside baselines, on dates that it never saw.

    python scripts/evaluate.py --model DIR [--prices FILE_OR_DIR] [--tickers AAPL,MSFT] [--start DATE] [--end DATE]
        [--baselines all] [--by year regime ticker] [--device cuda] --output forecasts.parquet

The model may be a regression, a classification, or a causal language model, of which --num-samples paths are drawn
from every day. Forecasts from every trading day between --start and --end, and writes the forecast table and, beside
it, metrics.json and metrics_by_*.json. By default it starts after the last date that any choice of the training was
made on. Before it scores, it makes some forecasts again from prices with another future, and stops if one changes.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.cleaning import load_prices
from spaceexploreai.data.prices import check_suffix, write_atomically, write_table
from spaceexploreai.data.windows import IGNORE_INDEX, DateRange, make_labels
from spaceexploreai.evaluation.baselines import Training, add_baselines
from spaceexploreai.evaluation.classes import score_classes
from spaceexploreai.evaluation.leaks import check_leaks
from spaceexploreai.evaluation.metrics import add_outcomes, format_scores, score, score_by
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor, parse_date
from spaceexploreai.scripts.forecasters import Forecaster, forecast_between, load_forecaster
from spaceexploreai.train.arguments import command, make_parser
from spaceexploreai.train.sampling import ModelPaths

GROUPS = ("year", "regime", "ticker")
# What the leak check forecasts again, six times.
CHECKED_TICKERS, CHECKED_DAYS = 3, 60


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
    model: Forecaster,
    extractor: SpaceExploreFeatureExtractor,
    prices: pd.DataFrame,
    within: DateRange,
    baselines: str = "fast",
) -> pd.DataFrame:
    """Forecast table of every ticker and trading day of the range, with outcomes, where known, and baselines."""
    series = extractor.encode(prices)
    table = forecast_between(model, extractor, series, within)
    training = training_of(model.config, extractor, prices, series) if baselines == "all" else None
    return add_baselines(add_outcomes(table, prices), prices, baselines, training)


def training_of(
    config: SpaceExploreConfig, extractor: SpaceExploreFeatureExtractor, prices: pd.DataFrame, series: list
) -> Training:
    """What baselines are fitted to: the dates that the model was trained on."""
    if config.train_cutoff is None:
        raise ValueError("baselines 'all' are fitted to the dates of the training, and this model has no train_cutoff")
    within = DateRange(prices["date"].min(), pd.Timestamp(config.train_cutoff))
    labels = [make_labels(one, list(config.horizons), within) for one in series]
    labels = [np.where(one == IGNORE_INDEX, np.nan, one) for one in labels]
    return Training(within.end, series, labels, list(config.horizons), extractor.context_length)


def refuse_leaks(
    model: Forecaster, extractor: SpaceExploreFeatureExtractor, prices: pd.DataFrame, within: DateRange
) -> None:
    """Of a few tickers, whose forecasts at the beginning of the range are made again (see `check_leaks`).

    Paths are drawn at random, and fewer or other forecasts would draw others: of them the inputs are made again.
    """
    few = prices[prices["ticker"].isin(prices["ticker"].unique()[:CHECKED_TICKERS])].reset_index(drop=True)
    first = DateRange(within.start, min(within.end, within.start + pd.Timedelta(days=CHECKED_DAYS)))
    known = few["date"][few["date"].between(*first)]
    if known.empty or known.min() == few["date"].max():
        return  # nothing lies ahead of these forecasts
    if isinstance(model, ModelPaths):
        check_leaks(extractor.compute_features, few[few["date"] <= first.end].reset_index(drop=True))
    else:
        check_leaks(lambda prices: forecast_range(model, extractor, prices, first), few)


def write_metrics(scores: pd.DataFrame, path: str | Path) -> None:
    """Writes the scores as JSON: {horizon: {metric: {model: …, zero: …, …}}}, undefined as null."""
    write_json(report_of(scores), path)


def report_of(scores: pd.DataFrame) -> dict:
    columns = [column for column in scores.columns if column not in ("horizon", "metric")]
    report = {}
    for row in scores.to_dict("records"):
        values = {column: None if pd.isna(row[column]) else float(row[column]) for column in columns}
        report.setdefault(str(row["horizon"]), {})[row["metric"]] = values
    return report


def write_json(content: dict, path: str | Path) -> None:
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(content, indent=2) + "\n"))


def write_groups(groups: pd.DataFrame, by: str, path: str | Path) -> None:
    """Writes the scores of each year, regime or ticker as JSON: {group: {horizon: …}}, see `write_metrics`."""
    groups = groups.groupby(by, observed=True)
    write_json({str(group): report_of(rows.drop(columns=by)) for group, rows in groups}, path)


def describe_range(within: DateRange, forecasts: pd.DataFrame, config: SpaceExploreConfig) -> str:
    said = f"cutoffs {within.start.date()} to {within.end.date()}, {forecasts['ticker'].nunique()} tickers"
    first = within.start.date().isoformat()
    if (config.train_cutoff or "") >= first:
        return f"{said}\n\nIN SAMPLE: the model was trained to {config.train_cutoff}; this is no evaluation.\n"
    if (config.selection_cutoff or "") >= first:
        return f"{said}\n\nNOT UNSEEN: the model was chosen by dates to {config.selection_cutoff}, which flatter it.\n"
    return said


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub repository")
    parser.add_argument("--start", help="first cutoff (YYYY-MM-DD); default: after everything the training saw")
    parser.add_argument("--end", help="last cutoff (YYYY-MM-DD); default: the newest bar")
    parser.add_argument("--allow-in-sample", action="store_true", help="score dates the model was trained on")
    parser.add_argument(
        "--baselines", choices=("fast", "all"), default="fast", help="all: the fitted ones too, which take minutes"
    )
    parser.add_argument("--by", nargs="*", choices=GROUPS, default=[], help="score each of these by itself too")
    parser.add_argument(
        "--num-samples", type=int, default=64, help="paths of a causal language model; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of those paths; default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda, mps …; default: an accelerator if there is one")
    parser.add_argument("--output", required=True, help="forecast table to write, .parquet or .csv")
    args = parser.parse_args(argv)

    check_suffix(args.output, ".parquet", ".csv")
    model, extractor = load_forecaster(args.model, args.num_samples, args.seed, args.device)
    prices = load_prices(args.prices, args.tickers, extractor.calendar, args.strict, args.fill)
    within = scored_range(model.config, prices, args.start, args.end, args.allow_in_sample)
    refuse_leaks(model, extractor, prices, within)
    forecasts = forecast_range(model, extractor, prices, within, args.baselines)
    score_table = score_classes if "band" in forecasts else score
    scores = score_table(forecasts)
    if args.allow_in_sample and model.config.train_cutoff is not None:
        forecasts["in_sample"] = forecasts["cutoff"] <= pd.Timestamp(model.config.train_cutoff)
    write_table(forecasts, args.output)
    names = ["metrics.json", *(f"metrics_by_{by}.json" for by in args.by)]
    paths = [Path(args.output).with_name(name) for name in names]
    write_metrics(scores, paths[0])
    for by, path in zip(args.by, paths[1:], strict=True):
        write_groups(score_by(forecasts, by, score_table), by, path)
    print(describe_range(within, forecasts, model.config))
    print(format_scores(scores))
    print(f"wrote {args.output}, {', '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
