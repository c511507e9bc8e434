"""Forecasts that are sampled paths: their scores by origin, and models beside each other with error bars."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from spaceexploreai.evaluation.ranking import ic_by_date

LEVEL = 0.9
LIKELIHOOD = "path log-likelihood, nats a day"
# Shapes: N origins, K samples of each, H days. Paths are daily log-returns.


class Outcomes(NamedTuple):
    """What followed each origin: (N,) its date, (N,) the daily volatility known there, (N, H) the realised path."""

    date: np.ndarray
    scale: np.ndarray
    realised: np.ndarray


def score_samples(
    outcomes: Outcomes, samples: np.ndarray, log_likelihood: np.ndarray, horizons: list[int]
) -> pd.DataFrame:
    """Scores of a forecaster, one row for each origin and, at the end, for each date.

    Cumulative returns are in units of scale·sqrt(horizon); their point forecast is the mean of the samples. A rank
    correlation is that of a date, so that its mean over the rows is the RankIC.

    Args:
        samples: (N, K, H).
        log_likelihood: (N,) of the realised path.
        horizons: days, at most H.
    """
    columns, dates = {"date": outcomes.date, LIKELIHOOD: log_likelihood}, np.unique(outcomes.date)
    by_date = {"date": dates}
    for horizon in horizons:
        unit = outcomes.scale * np.sqrt(horizon)
        y = outcomes.realised[:, :horizon].sum(axis=1) / unit
        x = samples[..., :horizon].sum(axis=2) / unit[:, None]
        mean = x.mean(axis=1)
        columns[f"CRPS, {horizon} d"] = crps_ensemble(y, x)
        columns[f"coverage of {LEVEL:.0%}, {horizon} d"] = coverage_ensemble(y, x)
        columns[f"direction, {horizon} d"] = np.where(y != 0, np.sign(mean) == np.sign(y), np.nan)
        by_date[f"RankIC, {horizon} d"] = ic_by_date(y, mean, outcomes.date).reindex(dates).to_numpy()
    return pd.concat([pd.DataFrame(columns), pd.DataFrame(by_date)], ignore_index=True)


def crps_ensemble(y: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """(N,) continuous ranked probability scores of (N, K) samples, K of at least 2: E|X - y| - E|X - X'| / 2.

    The fair form, whose expectation does not depend on K (Ferro, 2014): X and X' are never the same sample.
    """
    count = samples.shape[1]
    ranks = 2 * np.arange(count) - (count - 1)
    half_spread = (np.sort(samples, axis=1) * ranks).sum(axis=1) / (count * (count - 1))
    return np.abs(samples - y[:, None]).mean(axis=1) - half_spread


def coverage_ensemble(y: np.ndarray, samples: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """(N,) whether y lies in the central interval of (N, K) samples, 0 to 1.

    If they are of y's law, its rank is each of the K + 1 with the same probability. A rank counts by the share of it
    that is within the interval, so that the expectation is `level` for every K; quantiles of few samples are too near
    or too far.
    """
    ranks = samples.shape[1] + 1
    rank = (samples < y[:, None]).sum(axis=1)
    lower, upper = ranks * (1 - level) / 2, ranks * (1 + level) / 2
    return (np.minimum(rank + 1, upper) - np.maximum(rank, lower)).clip(min=0)


def clustered_mean(values: np.ndarray, date: np.ndarray) -> tuple[float, float]:
    """The mean of (N,) values without the NaN, and its standard error clustered by date: tickers of one share a market
    (Liang & Zeger, 1986). Paths do not overlap, so that dates may count as independent. NaN for a single date."""
    known = np.isfinite(values)
    if not known.any():
        return float("nan"), float("nan")
    mean = values[known].mean()
    _, code = np.unique(date[known], return_inverse=True)
    sums = np.bincount(code, weights=values[known] - mean)
    if len(sums) == 1:
        return float(mean), float("nan")
    return float(mean), float(np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / known.sum())


def compare(scores: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Tidy table `metric, model, mean, error, difference, difference_error`: the means over origins, what they differ
    by from those of the first model on the same origins, and standard errors clustered by date."""
    first, rows = next(iter(scores.values())), []
    for metric in first.columns.drop("date"):
        for model, table in scores.items():
            own = clustered_mean(table[metric].to_numpy(), table["date"].to_numpy())
            paired = clustered_mean((table[metric] - first[metric]).to_numpy(), first["date"].to_numpy())
            rows.append([metric, model, *own, *paired])
    names = ["metric", "model", "mean", "error", "difference", "difference_error"]
    table = pd.DataFrame(rows, columns=names)
    kinds = table["metric"].str.split(",").str[0]
    order = {kind: place for place, kind in enumerate(kinds.unique())}
    return table.sort_values(by="metric", key=lambda _: kinds.map(order), kind="stable", ignore_index=True)


def format_comparison(table: pd.DataFrame) -> str:
    """Two Markdown tables: the means, and the paired differences from the first model. What is undefined, as the rank
    correlation of a few tickers, is left out."""
    table = table[np.isfinite(table["mean"])]
    models = list(table["model"].unique())
    return "\n\n".join(
        [
            _markdown(table, models, "mean", "error", ".3f"),
            f"Less the same origin's score of {models[0]}:",
            _markdown(table, models[1:], "difference", "difference_error", "+.4f"),
        ]
    )


def _markdown(table: pd.DataFrame, models: list[str], value: str, error: str, spec: str) -> str:
    lines = [f"| metric | {' | '.join(models)} |", f"|---|{'---:|' * len(models)}"]
    for metric, rows in table.groupby("metric", sort=False):
        by_model = rows.set_index("model")
        cells = [_cell(by_model.at[name, value], by_model.at[name, error], spec) for name in models]
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float, error: float, spec: str) -> str:
    if np.isnan(value):
        return "\N{EN DASH}"
    return f"{value:{spec}}" + ("" if np.isnan(error) else f" ± {error:{spec.removeprefix('+')}}")
