# Copyright 2026 The SpaceExploreAI contributors. Licensed under the MIT License.
"""What indicators are made of: one ticker's bars, windows over them, the panel of all tickers, and the registry.

Everything here is causal to the last bit: a value is computed from its own and earlier rows by operations whose order
does not depend on how many rows follow.
"""

import math
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import partial, wraps
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view

# On dates of fewer tickers none has a place among the others.
MIN_TICKERS = 10


# --- the registry ---


class Indicator(NamedTuple):
    name: str
    group: str
    compute: Callable
    panel: bool = False  # a function of all tickers together
    summary: str = ""


INDICATORS: dict[str, Indicator] = {}


def indicator(group: str, windows: tuple[int, ...] = (), panel: bool = False):
    """Registers a function of one ticker's `Bars` as a column, or as one column per window.

    Args:
        group: feature group, for selection and documentation.
        windows: values for the function's second argument; the column is then called `<function>_<window>`.
        panel: the function takes the `Panel` of all tickers and gives a (D, N) matrix.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: Callable) -> Callable:
        name, summary = function.__name__, (function.__doc__ or "").strip().partition("\n")[0]
        variants = {f"{name}_{window}": _at(function, window) for window in windows} or {name: function}
        for column, compute in variants.items():
            if column in INDICATORS:
                raise ValueError(f"indicator {column!r} is registered already")
            INDICATORS[column] = Indicator(column, group, compute, panel, summary)
        return function

    return register


panel_indicator = partial(indicator, panel=True)


def _at(function: Callable, window: int) -> Callable:
    return lambda bars: function(bars, window)


def shared(function: Callable) -> Callable:
    """A function of the bars, or of the panel, that several columns need: computed once for each of its arguments."""

    @wraps(function)
    def remembered(bars, *arguments):
        key = (function, *arguments)
        if key not in bars.memory:
            bars.memory[key] = function(bars, *arguments)
            for array in bars.memory[key] if isinstance(bars.memory[key], tuple) else [bars.memory[key]]:
                array.setflags(write=False)  # a column that worked in place would change the others
        return bars.memory[key]

    return remembered


# --- one ticker ---


class Bars:
    """One ticker's daily bars, oldest first.

    Attributes:
        date: (T,) datetime64[ns].
        open, high, low, close, volume: (T,) float64.
        frame: the same as a DataFrame, for pandas and pandas-ta-classic.
        memory: results of the `shared` functions.
    """

    def __init__(self, frame: pd.DataFrame):
        self.frame = frame.reset_index(drop=True)
        self.date = self.frame["date"].to_numpy("datetime64[ns]")
        numbers = (self.frame[name].to_numpy(np.float64) for name in ("open", "high", "low", "close", "volume"))
        self.open, self.high, self.low, self.close, self.volume = numbers
        self.memory = {}


def compute_indicators(bars: pd.DataFrame, names: list[str]) -> np.ndarray:
    """Computes registered columns for one ticker.

    Args:
        bars: (T,) rows of `date, open, high, low, close, volume`, oldest first.
        names: registered column names.

    Returns:
        (T, F) float64 in the order of `names`; NaN where a column is not defined (warm-up, 0/0, and columns of the
        panel, which one ticker does not make).

    Raises:
        ValueError: a name that is not registered.
    """
    check_names(names)
    ticker = Bars(bars)
    values = np.full((len(names), len(bars)), np.nan)
    # Divisions by zero are undefined values here, and undefined values are NaN.
    with np.errstate(divide="ignore", invalid="ignore"):
        for column, name in enumerate(names):
            if not INDICATORS[name].panel:
                values[column] = _column(name, ticker, (len(bars),))
    values[~np.isfinite(values)] = np.nan
    return values.T


def check_names(names: list[str]) -> None:
    unknown = [name for name in names if name not in INDICATORS]
    if unknown:
        nearest = ", ".join(get_close_matches(unknown[0], INDICATORS, cutoff=0.0))
        raise ValueError(f"unknown indicator {unknown[0]!r}; the nearest of {len(INDICATORS)} are {nearest}")


def _column(name: str, given, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(INDICATORS[name].compute(given), dtype=np.float64)
    if values.shape != shape:
        raise ValueError(f"indicator {name!r} gave an array of shape {values.shape} where {shape} was due")
    return values


# --- all tickers ---


class Panel:
    """The bars of all tickers: matrices are (D, N), dates by tickers, NaN where a ticker has no bar.

    Attributes:
        row, column: (bars of the table,) where each bar stands in a matrix.
        shape: (D, N).
        memory: results of the `shared` functions.
    """

    def __init__(self, table: pd.DataFrame):
        dates, self.row = np.unique(table["date"].to_numpy(), return_inverse=True)
        self.column = table["ticker"].ne(table["ticker"].shift()).cumsum().to_numpy() - 1
        self.shape = (len(dates), self.column[-1] + 1)
        self.memory = {}
        self._table = table

    def each(self, function: Callable[[Bars, np.ndarray], np.ndarray]) -> np.ndarray:
        """(D, N) values of a function of one ticker's bars and of the rows at which they stand in the matrix."""
        matrix = np.full(self.shape, np.nan)
        for column, (_, bars) in enumerate(self._table.groupby("ticker", sort=False)):
            rows = self.row[bars.index]
            matrix[rows, column] = function(Bars(bars), rows)
        return matrix


def compute_panel(table: pd.DataFrame, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Computes those of the columns that need all tickers together.

    Args:
        table: the price table, sorted by (ticker, date), with a RangeIndex (see `validate_prices`).
        names: registered column names; those of one ticker's bars are passed over.

    Yields:
        Each name with its values, (bars of the table,) float64; NaN on dates of fewer than `MIN_TICKERS` tickers.
    """
    names = [name for name in names if INDICATORS[name].panel]
    panel = Panel(table) if names else None
    for name in names:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = _column(name, panel, panel.shape)[panel.row, panel.column]
        yield name, np.where(np.isfinite(values), values, np.nan)


def cross_mean(matrix: np.ndarray) -> np.ndarray:
    """(D,) mean over the tickers of each date, exactly rounded: neither the order of the tickers nor one that is
    listed later changes its last bit."""
    known = np.isfinite(matrix)
    counts = known.sum(axis=1)
    sums = np.array([math.fsum(values[mask].tolist()) for values, mask in zip(matrix, known, strict=True)])
    return np.where(counts >= MIN_TICKERS, sums / np.maximum(counts, 1), np.nan)


def cross_rank(matrix: np.ndarray) -> np.ndarray:
    """(D, N) place among the tickers of each date, from just above -1 (lowest) to just below 1; ties share theirs."""
    ranks = pd.DataFrame(matrix).rank(axis=1).to_numpy()
    counts = np.isfinite(ranks).sum(axis=1, keepdims=True)
    return np.where(counts >= MIN_TICKERS, (2 * ranks - 1) / np.maximum(counts, 1) - 1, np.nan)


# --- windows: over (T,) arrays, NaN until the window is full ---


def lag(values: np.ndarray, rows: int) -> np.ndarray:
    """The values of some rows earlier."""
    earlier = np.empty_like(values)
    earlier[:rows] = np.nan
    earlier[rows:] = values[: max(len(values) - rows, 0)]
    return earlier


def rolling(combine: np.ufunc, values: np.ndarray, window: int) -> np.ndarray:
    """`combine` (np.add, np.maximum, np.minimum) over each row and the `window - 1` rows before it.

    A window is put together from windows of 1, 2, 4, … rows. Unlike a running sum, whose rounding errors come from all
    rows before, it depends on its own rows alone: a price that stands still has moved by exactly zero.
    """
    result, covered = None, 0
    block, size = values, 1
    while size <= window:
        if window & size:
            result = block if result is None else combine(result, lag(block, covered))
            covered += size
        block = combine(block, lag(block, size))
        size *= 2
    return result


def rolling_sum(values: np.ndarray, window: int) -> np.ndarray:
    return rolling(np.add, values, window)


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    return rolling(np.add, values, window) / window


def sliding(values: np.ndarray, window: int) -> np.ndarray:
    """(T, window) each row with those before it, oldest first, as a view; NaN before the first row."""
    return sliding_window_view(np.concatenate([np.full(window - 1, np.nan), values]), window)


def rolling_std(values: np.ndarray, window: int) -> np.ndarray:
    """Standard deviation, of the population; in two passes, since prices vary by little around much."""
    deviations = sliding(values, window) - rolling_mean(values, window)[:, None]
    return np.sqrt((deviations**2).sum(axis=1) / window)


def rolling_slope(values: np.ndarray, window: int) -> np.ndarray:
    """Slope of the least-squares line through each window, per row."""
    time = np.arange(window) - (window - 1) / 2
    slope = np.full_like(values, np.nan)
    if len(values) >= window:
        slope[window - 1 :] = np.convolve(values, time[::-1] / (time**2).sum(), mode="valid")
    return slope


def rolling_covariance(one: np.ndarray, other: np.ndarray, window: int) -> np.ndarray:
    """Covariance, of the population, of values that vary around zero, as returns do."""
    return rolling_mean(one * other, window) - rolling_mean(one, window) * rolling_mean(other, window)


def rolling_correlation(one: np.ndarray, other: np.ndarray, window: int) -> np.ndarray:
    """Pearson's correlation of values that vary around zero, as returns do."""
    variances = rolling_covariance(one, one, window) * rolling_covariance(other, other, window)
    return rolling_covariance(one, other, window) / np.sqrt(variances)


def bars_since(extreme: Callable, values: np.ndarray, window: int) -> np.ndarray:
    """Rows since the newest extreme (np.argmax, np.argmin) of each window."""
    since = extreme(sliding(values, window)[:, ::-1], axis=1).astype(np.float64)
    since[: window - 1] = np.nan
    return since


def exponential(values: np.ndarray, alpha: float) -> np.ndarray:
    """Exponential average from the first known value on; `alpha` is the weight of the newest."""
    return pd.Series(values).ewm(alpha=alpha, adjust=False).mean().to_numpy(copy=True)


def from_simple_mean(values: np.ndarray, window: int, alpha: float) -> np.ndarray:
    """Exponential average that begins, as TA-Lib's do, with the simple mean of the first `window` known values."""
    started = np.full_like(values, np.nan)
    known = np.isfinite(values)
    first = int(known.argmax()) + window - 1
    if known.any() and first < len(values):
        started[first] = values[first + 1 - window : first + 1].mean()
        started[first + 1 :] = values[first + 1 :]
    return exponential(started, alpha)


def ema(values: np.ndarray, window: int) -> np.ndarray:
    return from_simple_mean(values, window, 2 / (window + 1))


def wilder(values: np.ndarray, window: int) -> np.ndarray:
    """Wilder's (1978) smoothing."""
    return from_simple_mean(values, window, 1 / window)


def direction(values: np.ndarray) -> np.ndarray:
    """The sign of numbers of the size of one; a rounding error is no direction."""
    return np.where(np.abs(values) < 1e-9, 0.0, np.sign(values))


def last_known(values: np.ndarray) -> np.ndarray:
    """Each NaN replaced by the newest value before it."""
    return pd.Series(values).ffill().to_numpy()


# --- what many columns share ---


def ewma_volatility(close: pd.Series, alpha: float = 0.06, min_periods: int = 20) -> pd.Series:
    """Daily volatility known at the close: square root of the exponentially weighted mean of squared log-returns.

    RiskMetrics (J.P. Morgan, 1996) with decay `1 - alpha`, weights normalised over the available history.

    Args:
        close: (T,) positive closes of one ticker, oldest first.
        alpha: weight of the newest squared return.
        min_periods: returns needed before the estimate is given; NaN before.

    Returns:
        (T,) volatility in units of daily log-return, never below 1e-4 (a halted price has no volatility to divide by).
    """
    squared = np.log(close).diff() ** 2
    return np.maximum(np.sqrt(squared.ewm(alpha=alpha, min_periods=min_periods).mean()), 1e-4)


@shared
def volatility(bars: Bars) -> np.ndarray:
    return ewma_volatility(pd.Series(bars.close)).to_numpy(copy=True)


@shared
def log_close(bars: Bars) -> np.ndarray:
    return np.log(bars.close)


@shared
def daily_return(bars: Bars) -> np.ndarray:
    return log_close(bars) - lag(log_close(bars), 1)


@shared
def squared_return(bars: Bars) -> np.ndarray:
    return daily_return(bars) ** 2


@shared
def highest(bars: Bars, window: int) -> np.ndarray:
    return rolling(np.maximum, bars.high, window)


@shared
def lowest(bars: Bars, window: int) -> np.ndarray:
    return rolling(np.minimum, bars.low, window)


@shared
def price_range(bars: Bars) -> np.ndarray:
    """Wilder's true range, in the currency of the prices."""
    previous = lag(bars.close, 1)
    return np.maximum(bars.high, previous) - np.minimum(bars.low, previous)


@shared
def average_range(bars: Bars, window: int) -> np.ndarray:
    return wilder(price_range(bars), window)


@shared
def typical_price(bars: Bars) -> np.ndarray:
    return (bars.high + bars.low + bars.close) / 3


@shared
def mean_close(bars: Bars, window: int) -> np.ndarray:
    return rolling_mean(bars.close, window)


@shared
def log_volume_change(bars: Bars) -> np.ndarray:
    # +1 share: a day without trading is a number, and the unit of real volumes is far above it.
    return np.log(bars.volume + 1) - lag(np.log(bars.volume + 1), 1)


def scaled_log(bars: Bars, ratio: np.ndarray, window: float = 1) -> np.ndarray:
    """The logarithm of a ratio of prices in units of the volatility of `window` days, as known today."""
    return np.log(ratio) / (volatility(bars) * window**0.5)


def scaled_price(bars: Bars, difference: np.ndarray, window: float = 1) -> np.ndarray:
    """A difference of prices in units of the close and of the volatility of `window` days, as known today."""
    return difference / (bars.close * volatility(bars) * window**0.5)


def position(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where values lie from low (-1) to high (+1)."""
    return (2 * values - low - high) / (high - low)


def where_moving(bars: Bars, column: np.ndarray, window: int) -> np.ndarray:
    """Undefined where the close stood still for a whole window: rounding errors over rounding errors."""
    still = rolling(np.maximum, bars.close, window) == rolling(np.minimum, bars.close, window)
    return np.where(still, np.nan, column)
