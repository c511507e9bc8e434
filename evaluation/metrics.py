"""Point, interval and distribution metrics of forecasts, from arrays."""

import numpy as np
import pandas as pd

# Shapes: N rows with known outcome, Q quantile levels. y, mean and quantiles are log-returns.


def mse(y: np.ndarray, mean: np.ndarray) -> float:
    """Mean squared error of (N,) means, in squared log-return."""
    return float(np.mean((y - mean) ** 2))


def rmse(y: np.ndarray, mean: np.ndarray) -> float:
    """Root mean squared error of (N,) means."""
    return float(np.sqrt(mse(y, mean)))


def mae(y: np.ndarray, mean: np.ndarray) -> float:
    """Mean absolute error of (N,) means."""
    return float(np.mean(np.abs(y - mean)))


def mase(y: np.ndarray, mean: np.ndarray, naive: np.ndarray) -> float:
    """Mean absolute scaled error: of (N,) means over (N,) errors of the naive forecast of one day in the past of each
    ticker (Hyndman & Koehler, 2006). Tickers that never moved are left out; NaN if that leaves none."""
    moved = naive > 0
    return float(np.mean(np.abs(y - mean)[moved] / naive[moved])) if moved.any() else float("nan")


def direction_accuracy(y: np.ndarray, mean: np.ndarray) -> float:
    """Share of the rows with y ≠ 0 where mean has the sign of y; NaN where there are none or every mean is 0."""
    moved = y != 0
    if not np.any(mean[moved]):
        return float("nan")
    return float(np.mean(np.sign(mean[moved]) == np.sign(y[moved])))


def direction_base_rate(y: np.ndarray) -> float:
    """Share of the more frequent sign among y ≠ 0: what always saying the same direction, the right one, would get."""
    moved = y != 0
    if not np.any(moved):
        return float("nan")
    up = np.mean(y[moved] > 0)
    return float(max(up, 1 - up))


def pinball(y: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> float:
    """Mean pinball loss of (N, Q) quantiles at (Q,) levels, over rows and levels. Koenker & Bassett, 1978."""
    return float(np.mean(pinball_of_rows(y, quantiles, levels)))


def pinball_of_rows(y: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """(N,) pinball losses, each the mean over the levels."""
    error = y[:, None] - quantiles
    return np.maximum(levels * error, (levels - 1) * error).mean(axis=1)


def crps(y: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> float:
    """Continuous ranked probability score from (N, Q) quantiles: twice the mean pinball loss over the levels.

    Gneiting & Ranjan, 2011, with equal weights; GluonTS' mean weighted quantile loss before its division by sum |y|.
    It leaves out the tails beyond the outermost levels, so compare it only at equal levels.
    """
    return 2 * pinball(y, quantiles, levels)


def crps_skill(crps_forecast: float, crps_reference: float) -> float:
    """Share of the reference's CRPS that the forecast saves, negative if it is worse; NaN if the reference is 0."""
    return 1 - crps_forecast / crps_reference if crps_reference else float("nan")


def coverage(y: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """Share of rows with lower ≤ y ≤ upper, all (N,)."""
    return float(np.mean((lower <= y) & (y <= upper)))


def interval_score(y: np.ndarray, lower: np.ndarray, upper: np.ndarray, share: float) -> np.ndarray:
    """(N,) scores of central intervals of `share`: width, and 2/(1 - share) times what y is outside of them. Winkler,
    1972; Gneiting & Raftery, 2007."""
    return upper - lower + 2 / (1 - share) * (np.maximum(lower - y, 0) + np.maximum(y - upper, 0))


def weighted_interval_score(y: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> float:
    """Bracher, Ray, Gneiting & Reich, 2021, of the median and every central interval among the levels.

    If all levels are in one of them, as 0.05, 0.1 … 0.95 are, this is `crps`. NaN without a median or an interval.
    """
    column = {round(level, 9): quantiles[:, place] for place, level in enumerate(levels)}
    lows = [level for level in column if level < 0.5 and round(1 - level, 9) in column]
    if 0.5 not in column or not lows:
        return float("nan")
    total = 0.5 * np.abs(y - column[0.5])
    for low in lows:
        total = total + low * interval_score(y, column[low], column[round(1 - low, 9)], 1 - 2 * low)
    return float(np.mean(total) / (len(lows) + 0.5))


def pit_histogram(y: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> pd.DataFrame:
    """Where outcomes fall among the (N, Q) quantiles: the probability integral transform in bins between the levels.

    An outcome on a border, as of a price that did not move, counts half for each side.

    Returns:
        Table `lower, upper, expected, share`, one row for each of the Q + 1 bins; of a calibrated forecast both shares
        are equal.
    """
    below, upto = (np.sum(side, axis=1) for side in (quantiles < y[:, None], quantiles <= y[:, None]))
    counts = sum(np.bincount(place, minlength=len(levels) + 1) for place in (below, upto)) / 2
    edges = np.array([0.0, *levels, 1.0])
    return pd.DataFrame(
        {"lower": edges[:-1], "upper": edges[1:], "expected": np.diff(edges), "share": counts / len(y)}
    )
