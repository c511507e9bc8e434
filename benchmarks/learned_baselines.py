"""What a network adds to ridge regression and boosted trees: the same features, fitted to and scored on the same days.

    python benchmarks/learned_baselines.py --dataset DIR [--model CHECKPOINT] [--split validation|test]

DIR is a folder of `scripts/build_dataset.py` with windows, CHECKPOINT a regression that was trained on it. All are
scored on every step of the split that has a label, each once, as in training. Skill is over `ewma`: quantiles of the
training targets times scale·sqrt(horizon). Errors behind ± are those of sums over days, after Newey & West (1987) with
1.3·sqrt(days) lags (Lazarus, Lewis, Stock & Watson, 2018), which is longer than any target here overlaps the next.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from scipy.stats import norm
from torch.utils.data import DataLoader

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.stocks import SeriesStore, StockData, StoredWindows, open_stocks, rows_of
from spaceexploreai.data.windows import IGNORE_INDEX
from spaceexploreai.evaluation.inference import ratio_with_error, standard_error
from spaceexploreai.evaluation.learned import LEARNED, evenly_spaced
from spaceexploreai.evaluation.metrics import coverage, crps, mse
from spaceexploreai.evaluation.ranking import rank_ic
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.scripts.forecasters import load_checkpoint
from spaceexploreai.train.arguments import bare_parser, command
from spaceexploreai.train.sft import check_statistics

# Shapes: N steps, F features, H horizons, Q quantile levels, D days

SPLITS = ("validation", "test")
DASH = "\N{EN DASH}"
Forecast = tuple[np.ndarray, np.ndarray]  # (N, H) means and (N, H, Q) quantiles, log-returns


# --- steps ---


class Steps(NamedTuple):
    """Steps of many series, one after the other."""

    days: np.ndarray  # (N,) datetime64[ns]
    features: np.ndarray  # (N, F) float32
    scale: np.ndarray  # (N,) float32
    rms: np.ndarray  # (N,) root mean square of the daily log-returns so far
    returns: np.ndarray  # (N, H) log-returns to each horizon, NaN where not known


def open_split(folder: str, split: str, series: SeriesStore) -> StoredWindows:
    files = sorted(Path(folder, "sft").glob(f"{split}-*.parquet"))
    return StoredWindows(series, np.concatenate([rows_of(pq.read_table(path)) for path in files]))


def training_places(windows: StoredWindows) -> np.ndarray:
    """(N, 2) series and step of all that is known at every horizon, each once, as of `scaled_targets`."""
    places = []
    for which, rows in pd.DataFrame(windows.rows).groupby(0):
        first = int(rows[3].min())
        _, labels = windows.series.labelled_steps(which, first, int(rows[2].max()) + 1)
        steps = first + np.flatnonzero((labels != IGNORE_INDEX).all(axis=1))
        places.append(np.stack([np.full_like(steps, which), steps], axis=1))
    return np.concatenate(places)


def scored_places(windows: StoredWindows) -> np.ndarray:
    """(N, 2) series and step of what each window is scored on."""
    return np.concatenate(
        [
            np.stack([np.full(last + 1 - first, which), np.arange(first, last + 1)], axis=1)
            for which, _, last, first in windows.rows.tolist()
        ]
    )


def read_steps(series: SeriesStore, places: np.ndarray) -> Steps:
    """Steps of the (N, 2) places, whose series must ascend."""
    parts = []
    for which in np.unique(places[:, 0]).tolist():
        history, labels = series.labelled_steps(which, 0, None)
        columns = (history.dates, history.values, history.scale, rms_so_far(history), labels)
        steps = places[slice(*np.searchsorted(places[:, 0], [which, which + 1])), 1]
        parts.append([column[steps] for column in columns])
    *columns, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Steps(*columns, np.where(labels == IGNORE_INDEX, np.nan, labels.astype(np.float64)))


def rms_so_far(history: EncodedSeries) -> np.ndarray:
    """(T,) as of `evaluation.baselines`, of the stored bars; the volatility at the first stands for those before."""
    squares = np.append(history.scale[0] ** 2, np.diff(np.log(history.close[history.traded])) ** 2)
    rms = np.sqrt(squares.cumsum() / np.arange(1, len(squares) + 1))
    return rms[history.traded.cumsum() - 1]


# --- forecasts ---


def naive_forecasts(steps: Steps, targets: np.ndarray, horizons: list[int], levels: np.ndarray) -> dict[str, Callable]:
    """`zero` and `ewma` as of `evaluation.baselines`, the latter with all training targets (N, H) as its pool."""

    def zero() -> Forecast:
        unit = steps.rms[:, None] * np.sqrt(horizons)
        return np.zeros_like(unit), unit[..., None] * norm.ppf(levels)

    def ewma() -> Forecast:
        unit = steps.scale[:, None] * np.sqrt(np.float32(horizons))
        return unit * targets.mean(axis=0), unit[..., None] * np.quantile(targets, levels, axis=0).T

    return {"zero": zero, "ewma": ewma}


def learned_forecasts(
    data: StockData, steps: Steps, levels: np.ndarray, num_threads: int
) -> dict[str, Callable[[], Forecast]]:
    places = training_places(data.train)
    train = read_steps(data.train.series, places[evenly_spaced(len(places))])
    targets = train.returns / (train.scale[:, None] * np.sqrt(data.horizons))
    options = {"lightgbm": {"num_threads": num_threads}}

    def learned(name: str) -> Forecast:
        fitted = LEARNED[name](train.days, train.features, targets, data.horizons, **options.get(name, {}))
        return fitted.forecast(steps.features, steps.scale, levels)

    return {name: partial(learned, name) for name in LEARNED}


def open_model(args: Namespace, data: StockData, first: pd.Timestamp) -> SpaceExploreForRegression:
    """The checkpoint, which must know the same columns, horizons and days."""
    model, _ = load_checkpoint(args.model)
    check_statistics(data.extractor, args.model, args.dataset)
    if (list(model.config.horizons), model.config.target) != (data.horizons, data.target):
        raise ValueError(
            f"{args.model} predicts {model.config.target} {list(model.config.horizons)} steps ahead, "
            f"{args.dataset} has {data.target} {data.horizons} steps ahead"
        )
    if model.config.train_cutoff and pd.Timestamp(model.config.train_cutoff) >= first:
        raise ValueError(
            f"{args.model} was trained to {model.config.train_cutoff}, {args.split} begins {first.date()}"
        )
    return model


@torch.inference_mode()
def network_forecast(model: SpaceExploreForRegression, windows: StoredWindows, context_length: int) -> Forecast:
    """Of the steps of `scored_places`."""
    loader = DataLoader(windows, batch_size=128, collate_fn=partial(collate_windows, length=context_length))
    counts = iter((windows.rows[:, 2] + 1 - windows.rows[:, 3]).tolist())  # scored steps, at the end of each window
    means, quantiles = [], []
    for batch in loader:
        del batch["labels"]
        outputs = model(**batch)
        for mean, quantile in zip(outputs.mean.numpy(), outputs.quantiles.numpy(), strict=True):
            count = next(counts)
            means.append(mean[-count:])
            quantiles.append(quantile[-count:])
    return np.concatenate(means), np.concatenate(quantiles)


# --- scores ---


def score_days(forecast: Forecast, steps: Steps, column: int, levels: np.ndarray) -> pd.DataFrame:
    """Per day with a known return at one horizon: number of tickers, and the mean of each metric over them."""
    known = np.flatnonzero(np.isfinite(steps.returns[:, column]))
    known = known[np.argsort(steps.days[known], kind="stable")]
    days, starts = np.unique(steps.days[known], return_index=True)
    rows = []
    for own in np.split(known, starts[1:]):
        y, mean, quantiles = steps.returns[own, column], forecast[0][own, column], forecast[1][own, column]
        rows.append(
            {
                "tickers": len(own),
                "crps": crps(y, quantiles, levels),
                "mse": mse(y, mean),
                "coverage": coverage(y, quantiles[:, 0], quantiles[:, -1]),
                "rank_ic": rank_ic(y, mean, steps.days[own]),
            }
        )
    return pd.DataFrame(rows, index=days)


def lead(better: pd.DataFrame, worse: pd.DataFrame, reference: pd.DataFrame) -> tuple[float, float]:
    """Difference of two CRPS skills over a reference, and its standard error, from the scores of each day.

    All returns of one day are one observation: they share what happened to the market.
    """
    sums = [(days["crps"] * days["tickers"]).to_numpy() for days in (better, worse, reference)]
    return ratio_with_error(sums[1] - sums[0], sums[2])


def rank_ic_with_t(days: pd.DataFrame) -> tuple[float, float]:
    """Mean over days and its t statistic; NaN where no day has a ranking."""
    values = days["rank_ic"].dropna().to_numpy()
    return (values.mean(), values.mean() / standard_error(values)) if len(values) > 1 else (math.nan, math.nan)


def format_horizon(scores: dict[str, pd.DataFrame], horizon: int, levels: np.ndarray) -> str:
    """Markdown table of one horizon: a row for each forecaster, in the order given."""
    first = next(iter(scores.values()))
    model = scores.get("model")
    heads = ["forecast", "CRPS (1e-4)", "skill over ewma (%)", "MSE (1e-4)"]
    heads += [f"coverage of {levels[-1] - levels[0]:.0%} (%)", "rank IC (t)"]
    heads += ["model's lead (points of skill)"] if model is not None else []
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, days in scores.items():
        means = {metric: np.average(days[metric], weights=days["tickers"]) for metric in ("crps", "mse", "coverage")}
        ic, t = rank_ic_with_t(days)
        cells = [
            name,
            f"{1e4 * means['crps']:.2f}",
            points(*lead(days, scores["ewma"], scores["ewma"])),
            f"{1e4 * means['mse']:.3f}",
            f"{1e2 * means['coverage']:.1f}",
            DASH if math.isnan(ic) else f"{ic:+.3f} ({t:+.1f})",
        ]
        cells += [points(*lead(model, days, scores["ewma"]))] if model is not None else []
        lines.append(f"| {' | '.join(cells)} |")
    title = f"{horizon} day{'s' if horizon > 1 else ''} ahead, {first['tickers'].sum():,} steps of {len(first):,} days"
    return "\n".join([title, "", *lines])


def points(value: float, error: float) -> str:
    return f"{100 * value:+.2f} ± {100 * error:.2f}" if error else DASH


# --- the command ---


def open_levels(model: SpaceExploreForRegression | None) -> np.ndarray:
    return np.array((SpaceExploreConfig() if model is None else model.config).quantile_levels)


def forecasters(
    args: Namespace, data: StockData, windows: StoredWindows, steps: Steps, model: SpaceExploreForRegression | None
) -> dict[str, Callable[[], Forecast]]:
    """In the order of the table."""
    levels = open_levels(model)
    found = naive_forecasts(steps, data.train.scaled_targets(data.horizons), data.horizons, levels)
    found |= learned_forecasts(data, steps, levels, args.num_threads)
    if model is not None:
        found["model"] = partial(network_forecast, model, windows, data.extractor.context_length)
    return found


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="folder of scripts/build_dataset.py")
    parser.add_argument("--model", help="checkpoint folder or Hub repository of a regression")
    parser.add_argument("--split", default=SPLITS[0], choices=SPLITS, help="default: %(default)s")
    parser.add_argument("--num-threads", type=int, default=1, help="of LightGBM and of the network; default: 1")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.num_threads)

    data = open_stocks(args.dataset)
    if data.target != "log_return":
        raise ValueError(f"baselines forecast log_return, {args.dataset} has the target {data.target}")
    within = getattr(data.split, args.split)
    model = open_model(args, data, within.start) if args.model else None
    levels = open_levels(model)
    windows = open_split(args.dataset, args.split, data.train.series)
    steps = read_steps(windows.series, scored_places(windows))
    print(f"fitted to {data.split.train.end.date()}, {args.split} {within.start.date()} to {within.end.date()}\n")
    scores = {}
    for name, make in forecasters(args, data, windows, steps, model).items():
        start, forecast = time.perf_counter(), make()
        scores[name] = [score_days(forecast, steps, column, levels) for column in range(len(data.horizons))]
        print(f"- {name}: {time.perf_counter() - start:.0f} s", flush=True)
    for column, horizon in enumerate(data.horizons):
        print("\n" + format_horizon({name: days[column] for name, days in scores.items()}, horizon, levels))


if __name__ == "__main__":
    main()
