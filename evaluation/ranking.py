"""Does a forecast order the tickers of a date: information coefficients, decile spread and turnover.

Each has one number for every cutoff with at least `MIN_TICKERS` rows where neither side is constant.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

MIN_TICKERS = 10  # a cross-section smaller than this has no meaningful rank correlation
DECILE = 0.1

# Shapes: N rows, D cutoffs that count, M rows of these. y and mean are log-returns.


class Places(NamedTuple):
    """(M,) rows of the same cross-section with less, and with no more, than each has."""

    less: np.ndarray
    upto: np.ndarray


def places_within(values: np.ndarray, codes: np.ndarray) -> Places:
    """Of (M,) values in cross-sections numbered by `codes`."""
    order = np.lexsort([values, codes])
    values, codes = values[order], codes[order]
    first = np.append(True, (codes[1:] != codes[:-1]) | (values[1:] != values[:-1]))
    starts = np.flatnonzero(first[: len(values)])
    ties = np.diff(np.append(starts, len(values)))
    less = np.repeat(starts - np.searchsorted(codes, codes[starts]), ties)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return Places(less[back], (less + np.repeat(ties, ties))[back])


class CrossSections(NamedTuple):
    """The rows of those cutoffs that count."""

    rows: np.ndarray  # (M,) their indices
    codes: np.ndarray  # (M,) which of the D cutoffs
    cutoffs: np.ndarray  # (D,) ascending

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(D,) of (M,) values."""
        return np.bincount(self.codes, weights=values, minlength=len(self.cutoffs))

    def by_date(self, values: np.ndarray) -> pd.Series:
        return pd.Series(values, self.cutoffs)


def cross_sections(y: np.ndarray, mean: np.ndarray, cutoff: np.ndarray) -> CrossSections:
    """Of (N,) arrays, the last of them the key of the cross-section that a row belongs to."""
    cutoffs, codes = np.unique(cutoff, return_inverse=True)
    counts = np.bincount(codes)
    counted = counts >= MIN_TICKERS
    for side in (y, mean) if counted.any() else ():
        less, upto = places_within(side, codes)
        varied = np.zeros(len(cutoffs), dtype=bool)
        varied[codes[upto - less < counts[codes]]] = True
        counted = counted & varied
    rows = np.flatnonzero(counted[codes])
    return CrossSections(rows, (np.cumsum(counted) - 1)[codes[rows]], cutoffs[counted])


def rank_ic(y: np.ndarray, mean: np.ndarray, cutoff: np.ndarray) -> float:
    """Rank information coefficient: Spearman correlation of mean and y across tickers, averaged over cutoffs.

    Args:
        y, mean: (N,) floats.
        cutoff: (N,) keys of the cross-section a row belongs to.

    Returns:
        The average over cutoffs with at least `MIN_TICKERS` rows where neither side is constant; NaN without any.
    """
    return float(ic_by_date(y, mean, cutoff).mean())


def ic_by_date(y: np.ndarray, mean: np.ndarray, cutoff: np.ndarray, ranks: bool = True) -> pd.Series:
    """Spearman or, without ranks, Pearson correlation at each cutoff that has one."""
    own = cross_sections(y, mean, cutoff)
    sides = []
    for side in (y[own.rows], mean[own.rows]):
        side = sum(places_within(side, own.codes)) / 2 if ranks else side
        sides.append(side - (own.sums(side) / np.bincount(own.codes))[own.codes])
    y, mean = sides
    return own.by_date(own.sums(y * mean) / np.sqrt(own.sums(y**2) * own.sums(mean**2)))


def decile_spread_by_date(y: np.ndarray, mean: np.ndarray, cutoff: np.ndarray) -> pd.Series:
    """Mean outcome of the tenth with the highest forecasts less that of the tenth with the lowest, at each cutoff."""
    own = cross_sections(y, mean, cutoff)
    return own.by_date(own.sums(decile_weights(mean[own.rows], own.codes) * y[own.rows]))


def turnover(mean: np.ndarray, cutoff: np.ndarray, ticker: np.ndarray) -> float:
    """Share of the portfolio of `decile_spread_by_date` that is replaced from one cutoff to the next, on average: 0 if
    it stays as it is, 1 if all of it is new; NaN with fewer than two cutoffs."""
    own = cross_sections(np.arange(len(mean)), mean, cutoff)
    held = {"date": own.codes, "ticker": ticker[own.rows], "weight": decile_weights(mean[own.rows], own.codes)}
    held = pd.DataFrame(held)
    held = held[held["weight"] != 0]
    sold = held.assign(date=held["date"] + 1, weight=-held["weight"])
    traded = pd.concat([held, sold]).groupby(["date", "ticker"])["weight"].sum().abs().groupby("date").sum()
    return float(traded.iloc[1:-1].mean() / 4)  # without building it up and down; long and short are 1 each


def decile_weights(mean: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(M,) weights within each cross-section, 1 in sum for the highest tenth and -1 for the lowest.

    Rows with equal forecasts share what is left of a tenth for them, and a tenth of 15 rows is one and a half: the
    order of the table decides nothing.
    """
    (less, upto), size = places_within(mean, codes), np.bincount(codes)[codes]
    ties = upto - less
    lowest = (DECILE * size - less).clip(0, ties)
    highest = (upto - (1 - DECILE) * size).clip(0, ties)
    return (highest - lowest) / ties / (DECILE * size)
