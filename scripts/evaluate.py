"""Scores a checkpoint beside baselines, on dates that it never saw.

    python scripts/evaluate.py --model DIR [--prices FILE_OR_DIR] [--tickers AAPL,MSFT] [--start DATE] [--end DATE]
        [--baselines all] [--by year regime ticker] [--walk-forward SESSIONS] [--device cuda] --output FILE

The model may be a regression, a classification, or a causal language model, of which --num-samples paths are drawn
from every day. Forecasts from every trading day between --start and --end, and writes the forecast table and, beside
it, metrics.json, metrics_by_*.json, and a report for people, report.html and report.md. By default it starts after the
last date that any choice of the training was made on. Before it scores, it makes some forecasts again from prices with
another future, and stops if one changes.
"""

import argparse
import json
from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path

import numpy as np
import pandas as pd

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.cleaning import load_prices
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.files import check_suffix, write_atomically
from spaceexploreai.data.prices import write_table
from spaceexploreai.data.windows import IGNORE_INDEX, DateRange, forecast_windows, make_labels
from spaceexploreai.evaluation.baselines import Training, add_baselines
from spaceexploreai.evaluation.internals import expert_load, words_of
from spaceexploreai.evaluation.leaks import check_leaks
from spaceexploreai.evaluation.report import Report, example_of, pictures_of, report_files
from spaceexploreai.evaluation.scores import add_outcomes, format_scores, score_by, score_table
from spaceexploreai.evaluation.walk_forward import cut_blocks
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries, SpaceExploreFeatureExtractor, parse_date
from spaceexploreai.indicators_spaceexplore import INDICATORS
from spaceexploreai.scripts.forecasters import Forecaster, forecast_between, load_forecaster
from spaceexploreai.train.arguments import command, make_parser
from spaceexploreai.train.memory import keep_freed_memory
from spaceexploreai.train.sampling import ModelPaths

GROUPS = ("year", "regime", "ticker")
# What the leak check forecasts again, six times. Columns of the panel are nothing for fewer than ten tickers.
CHECKED_TICKERS, CHECKED_PANEL, CHECKED_DAYS = 3, 12, 60
SHOWN_TICKERS = 20
NOTICES = {
    "undated": "UNDATED: the model does not say to which date it was trained; this may be no evaluation.",
    "in_sample": "IN SAMPLE: the model was trained to {day}; this is no evaluation.",
    "chosen": "NOT UNSEEN: the model was chosen by dates to {day}, which flatter it.",
}
ROUTED_WINDOWS = 256  # that the load of the experts is shown of


def scored_range(
    config: SpaceExploreConfig, prices: pd.DataFrame, start: str | None, end: str | None, allow_in_sample: bool = False
) -> DateRange:
    """Cutoffs to forecast from. Refuses those at or before the last date the weights were fitted to, and all of a
    model that does not say which that is."""
    first, last = prices["date"].min(), prices["date"].max()
    unseen = max((date for date in (config.train_cutoff, config.selection_cutoff) if date), default=None)
    if start is None and unseen is not None:
        start = pd.Timestamp(unseen) + pd.Timedelta(days=1)
    within = DateRange(first if start is None else parse_date(start), last if end is None else parse_date(end))
    if within.start > within.end:
        raise ValueError(f"nothing to evaluate: {within.start.date()} is after {within.end.date()}")
    if allow_in_sample:
        return within
    if config.train_cutoff is None:
        raise ValueError(
            "the model does not say to which date it was trained (train_cutoff in its config.json), so that any score "
            "may be of days it has seen (--allow-in-sample overrides)"
        )
    if within.start <= pd.Timestamp(config.train_cutoff):
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
    stride: int | None = None,
    series: list[EncodedSeries] | None = None,
    blocks: Sequence[DateRange] = (),
) -> pd.DataFrame:
    """Forecast table of every ticker and trading day of the range, with outcomes, where known, and baselines.

    Args:
        baselines: "fast" or "all", see `add_baselines`.
        stride: days forecast from one window, see `forecast_between`.
        series: the prices encoded, if they are already.
        blocks: of the range, each with baselines that know what came before it; their number is the column `fold`.
    """
    series = extractor.encode(prices) if series is None else series
    table = add_outcomes(forecast_between(model, extractor, series, within, stride), prices)
    if blocks:
        table["fold"] = np.searchsorted([block.start for block in blocks], table["cutoff"], side="right")
    training = training_of(model.config, extractor, prices, series) if baselines == "all" else None
    return add_baselines(table, prices, baselines, training)


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
    model: Forecaster, extractor: SpaceExploreFeatureExtractor, prices: pd.DataFrame, origins: pd.DataFrame
) -> None:
    """Of a few tickers, whose first forecasts are made again (see `check_leaks`).

    Of sampled paths the inputs are made again: rounding, which a batch decides, may move a draw into the next bin.

    Args:
        origins: `ticker, cutoff` of all that is to be forecast from.
    """
    start = origins["cutoff"].min()
    first = DateRange(start, min(origins["cutoff"].max(), start + pd.Timedelta(days=CHECKED_DAYS)))
    count = CHECKED_PANEL if any(INDICATORS[name].panel for name in extractor.feature_names) else CHECKED_TICKERS
    names = origins.loc[origins["cutoff"] <= first.end, "ticker"].unique()[:count]
    few = prices[prices["ticker"].isin(names)].reset_index(drop=True)
    if few["date"].max() == start:
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


def notice_of(config: SpaceExploreConfig, day: str) -> tuple[str, str] | None:
    """What the training did with a day (a key of `NOTICES`), and to which date it did so."""
    if config.train_cutoff is None:
        return "undated", ""
    for key, last in (("in_sample", config.train_cutoff), ("chosen", config.selection_cutoff)):
        if (last or "") >= day:
            return key, last
    return None


def notices_of(within: DateRange, config: SpaceExploreConfig) -> list[str]:
    """What must be known before any number is read."""
    found = notice_of(config, within.start.date().isoformat())
    return [] if found is None else [NOTICES[found[0]].format(day=found[1])]


def facts_of(
    name: str, source: str | None, config: SpaceExploreConfig, within: DateRange, forecasts: pd.DataFrame
) -> dict[str, str]:
    """What was evaluated: the checkpoint of a name, on prices of a source."""
    tickers = forecasts["ticker"].unique()
    more = ", …" if len(tickers) > SHOWN_TICKERS else ""
    return {
        "checkpoint": f"{name}, trained to {config.train_cutoff}, chosen by dates to {config.selection_cutoff}",
        "dates": f"cutoffs {within.start.date()} to {within.end.date()}",
        "tickers": f"{len(tickers)}: {', '.join(tickers[:SHOWN_TICKERS])}{more}",
        "data": source or "the embedded sample",
    }


def inside_of(
    model: Forecaster,
    extractor: SpaceExploreFeatureExtractor,
    series: list[EncodedSeries],
    within: DateRange,
    forecasts: pd.DataFrame,
) -> dict:
    """Words and the load of the experts, of networks that have them, for `pictures_of`."""
    if isinstance(model, ModelPaths):
        return {}
    row, context = example_of(forecasts).iloc[0], extractor.context_length
    (one,) = (one for one in series if one.ticker == row["ticker"])
    windows = forecast_windows(series, context, within, context)
    some = np.unique(np.linspace(0, len(windows) - 1, ROUTED_WINDOWS).round().astype(int))
    batch = {name: tensor.to(model.device) for name, tensor in collate_windows([windows[i] for i in some]).items()}
    return {"words": words_of(model, one, row["cutoff"], context), "load": expert_load(model, batch)}


def write_report(report: Report, folder: Path) -> None:
    """Writes report.html, report.md with its pictures, and for programs what they are of: report.json."""
    for name, content in report_files(report).items():
        write_atomically(folder / name, methodcaller("write_bytes", content))
    write_json({"title": report.title, "facts": report.facts, "notices": report.notices}, folder / "report.json")


def write_evaluation(output: Path, forecasts: pd.DataFrame, report: Report) -> list[Path]:
    """Writes the forecast table, its scores and the report beside it; returns what to look at."""
    paths = [output, output.with_name("metrics.json")]
    write_table(forecasts, output)
    write_metrics(report.scores, paths[-1])
    for by, groups in report.groups.items():
        paths.append(output.with_name(f"metrics_by_{by}.json"))
        write_groups(groups, by, paths[-1])
    write_report(report, output.parent)
    return [*paths, output.with_name("report.html")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub repository")
    parser.add_argument("--start", help="first cutoff (YYYY-MM-DD); default: after everything the training saw")
    parser.add_argument("--end", help="last cutoff (YYYY-MM-DD); default: the newest bar")
    parser.add_argument("--allow-in-sample", action="store_true", help="score dates the model was trained on")
    parser.add_argument(
        "--baselines", choices=("fast", "all"), default="fast", help="all: the fitted ones too, which take minutes"
    )
    parser.add_argument(
        "--walk-forward",
        type=int,
        metavar="SESSIONS",
        help="by blocks, beside naive baselines that know what came before each; scripts/walk_forward.py trains anew",
    )
    parser.add_argument("--by", nargs="*", choices=GROUPS, default=[], help="score each of these by itself too")
    parser.add_argument(
        "--stride", type=int, help="days forecast from one window; 1 is slow and exact; default: a quarter of it"
    )
    parser.add_argument(
        "--num-samples", type=int, default=64, help="paths of a causal language model; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of those paths; default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda, mps …; default: an accelerator if there is one")
    parser.add_argument("--output", type=Path, required=True, help="forecast table to write, .parquet or .csv")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check_suffix(args.output, ".parquet", ".csv")
    keep_freed_memory()
    model, extractor = load_forecaster(args.model, args.num_samples, args.seed, args.device)
    prices = load_prices(args.prices, args.tickers, extractor.calendar, args.strict, args.fill)
    within = scored_range(model.config, prices, args.start, args.end, args.allow_in_sample)
    series = extractor.encode(prices)
    origins = forecast_windows(series, extractor.context_length, within).origins
    blocks, by_names = [], args.by
    if args.walk_forward is not None:
        spans = cut_blocks(origins["cutoff"], model.config.horizons[-1], args.walk_forward)
        blocks, by_names = [DateRange(*span) for span in spans], [*by_names, "fold"]
    refuse_leaks(model, extractor, prices, origins)
    forecasts = forecast_range(model, extractor, prices, within, args.baselines, args.stride, series, blocks)
    scores, groups = score_table(forecasts), {by: score_by(forecasts, by) for by in by_names}
    if args.allow_in_sample and model.config.train_cutoff is not None:
        forecasts["in_sample"] = forecasts["cutoff"] <= pd.Timestamp(model.config.train_cutoff)
    facts = facts_of(args.model, args.prices, model.config, within, forecasts)
    notices = notices_of(within, model.config)
    pictures = pictures_of(forecasts, prices, **inside_of(model, extractor, series, within, forecasts))
    report = Report(f"Forecasts of {Path(args.model).resolve().name}", facts, scores, notices, pictures, groups)

    paths = write_evaluation(args.output, forecasts, report)
    print(*(f"{name}: {value}" for name, value in facts.items()), *notices, format_scores(scores), sep="\n")
    print(f"wrote {', '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
