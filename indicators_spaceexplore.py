# Copyright 2026 The SpaceExploreAI contributors. Licensed under the MIT License.
"""The indicator registry: every column the network may see, each causal and without a unit.

A column is a function of one ticker's bars, a frame with `date, open, high, low, close, volume`, oldest first, and
gives one number per bar that knows that bar and those before it. Prices are divided by prices and returns by the
volatility of their own day, so that a column means the same for every ticker and decade.

    @indicator("momentum", windows=(5, 20))
    def median_return(bars, window):
        return np.log(bars["close"]).diff().rolling(window).median() / ewma_volatility(bars["close"])

registers `median_return_5` and `median_return_20`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import pandas_ta_classic as ta


class Indicator(NamedTuple):
    name: str
    group: str
    compute: Callable[[pd.DataFrame], pd.Series]


INDICATORS: dict[str, Indicator] = {}


def indicator(group: str, windows: tuple[int, ...] = ()):
    """Registers a function of one ticker's bars as a column, or as one column per window.

    Args:
        group: feature group, for selection and documentation.
        windows: values for the function's `window` argument; the column is then called `<function>_<window>`.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: Callable) -> Callable:
        name = function.__name__
        variants = {f"{name}_{window}": partial(function, window=window) for window in windows} or {name: function}
        for column, compute in variants.items():
            if column in INDICATORS:
                raise ValueError(f"indicator {column!r} is registered already")
            INDICATORS[column] = Indicator(column, group, compute)
        return function

    return register


def compute_indicators(bars: pd.DataFrame, names: list[str]) -> np.ndarray:
    """Computes registered columns for one ticker.

    Args:
        bars: (T,) rows of `date, open, high, low, close, volume`, oldest first.
        names: registered column names.

    Returns:
        (T, F) float64 in the order of `names`; NaN where a column is not defined (warm-up, 0/0).

    Raises:
        ValueError: a name that is not registered.
    """
    unknown = [name for name in names if name not in INDICATORS]
    if unknown:
        raise ValueError(f"unknown indicator {unknown[0]!r}; registered are {', '.join(INDICATORS)}")
    bars = bars.reset_index(drop=True)
    # Divisions by zero are undefined values here, and undefined values are NaN.
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = [np.asarray(INDICATORS[name].compute(bars), dtype=np.float64) for name in names]
    values = np.stack(columns, axis=1)
    return np.where(np.isfinite(values), values, np.nan)


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
    return np.sqrt(squared.ewm(alpha=alpha, min_periods=min_periods).mean()).clip(lower=1e-4)


def _library(result: pd.Series | pd.DataFrame | None, bars: pd.DataFrame, column: str | None = None) -> pd.Series:
    # pandas-ta-classic answers None when the history is shorter than its window.
    if result is None:
        return pd.Series(np.nan, index=bars.index)
    return result if column is None else result[column]


# pandas-ta-classic takes TA-Lib's values when that is installed; they differ during warm-up, so a model would see
# other inputs on another machine. Hence talib=False wherever the library has the choice.


def _where_moving(column: pd.Series, bars: pd.DataFrame, window: int) -> pd.Series:
    # Of a price that stood still for a whole window the library gives rounding errors over rounding errors.
    still = bars["high"].rolling(window).max() == bars["low"].rolling(window).min()
    return column.mask(still)


# --- price: the shape of the day's bar ---


@indicator("price")
def gap(bars):
    return np.log(bars["open"] / bars["close"].shift()) / ewma_volatility(bars["close"])


@indicator("price")
def body(bars):
    return np.log(bars["close"] / bars["open"]) / ewma_volatility(bars["close"])


@indicator("price")
def true_range(bars):
    previous = bars["close"].shift()
    high, low = np.maximum(bars["high"], previous), np.minimum(bars["low"], previous)
    return np.log(high / low) / ewma_volatility(bars["close"])


@indicator("price")
def close_location(bars):
    """Chaikin's close location value: -1 at the low, +1 at the high."""
    return (2 * bars["close"] - bars["high"] - bars["low"]) / (bars["high"] - bars["low"])


@indicator("price")
def upper_shadow(bars):
    return np.log(bars["high"] / np.maximum(bars["open"], bars["close"])) / ewma_volatility(bars["close"])


@indicator("price")
def lower_shadow(bars):
    return np.log(np.minimum(bars["open"], bars["close"]) / bars["low"]) / ewma_volatility(bars["close"])


# --- return: the past, in units of the volatility known today ---


@indicator("return", windows=(1, 2, 3, 5, 10, 20, 60))
def scaled_return(bars, window):
    return np.log(bars["close"] / bars["close"].shift(window)) / (ewma_volatility(bars["close"]) * window**0.5)


# --- trend ---


@indicator("trend", windows=(10, 20, 50))
def close_to_sma(bars, window):
    average = bars["close"].rolling(window).mean()
    return np.log(bars["close"] / average) / (ewma_volatility(bars["close"]) * window**0.5)


@indicator("trend")
def macd_histogram(bars):
    histogram = _library(ta.macd(bars["close"], talib=False), bars, "MACDh_12_26_9")
    return histogram / (bars["close"] * ewma_volatility(bars["close"]))


def _adx(bars: pd.DataFrame, column: str) -> pd.Series:
    return _library(ta.adx(bars["high"], bars["low"], bars["close"], length=14, talib=False), bars, column)


@indicator("trend")
def adx_14(bars):
    return _adx(bars, "ADX_14") / 50 - 1


@indicator("trend")
def directional_movement_14(bars):
    return (_adx(bars, "DMP_14") - _adx(bars, "DMN_14")) / 100


@indicator("trend")
def aroon_25(bars):
    return _library(ta.aroon(bars["high"], bars["low"], length=25, talib=False), bars, "AROONOSC_25") / 100


# --- momentum ---


@indicator("momentum", windows=(7, 14, 21))
def rsi(bars, window):
    return _library(ta.rsi(bars["close"], length=window, talib=False), bars) / 50 - 1


def _stochastic(bars: pd.DataFrame, column: str) -> pd.Series:
    column = _library(ta.stoch(bars["high"], bars["low"], bars["close"], talib=False), bars, column)
    return _where_moving(column, bars, 14)


@indicator("momentum")
def stochastic_k(bars):
    return _stochastic(bars, "STOCHk_14_3_3") / 50 - 1


@indicator("momentum")
def stochastic_d(bars):
    return _stochastic(bars, "STOCHd_14_3_3") / 50 - 1


@indicator("momentum")
def cci_20(bars):
    cci = _library(ta.cci(bars["high"], bars["low"], bars["close"], length=20, talib=False), bars)
    return _where_moving(cci, bars, 20) / 100


@indicator("momentum")
def williams_r_14(bars):
    return _library(ta.willr(bars["high"], bars["low"], bars["close"], length=14, talib=False), bars) / 50 + 1


# --- volatility: other estimates against the one that scales everything ---


@indicator("volatility", windows=(5, 20, 60))
def realized_volatility(bars, window):
    realized = (np.log(bars["close"]).diff() ** 2).rolling(window).mean() ** 0.5
    return np.log(realized / ewma_volatility(bars["close"]))


@indicator("volatility")
def atr_14(bars):
    atr = _library(ta.atr(bars["high"], bars["low"], bars["close"], length=14, talib=False), bars)
    return np.log(atr / (bars["close"] * ewma_volatility(bars["close"])))


@indicator("volatility", windows=(10, 20))
def parkinson_volatility(bars, window):
    """Parkinson (1980), The Extreme Value Method for Estimating the Variance of the Rate of Return."""
    variance = (np.log(bars["high"] / bars["low"]) ** 2).rolling(window).mean() / (4 * np.log(2))
    return np.log(variance**0.5 / ewma_volatility(bars["close"]))


def _bollinger(bars: pd.DataFrame, column: str) -> pd.Series:
    return _where_moving(_library(ta.bbands(bars["close"], length=20, std=2.0, talib=False), bars, column), bars, 20)


@indicator("volatility")
def bollinger_position_20(bars):
    return 2 * _bollinger(bars, "BBP_20_2.0") - 1


@indicator("volatility")
def bollinger_width_20(bars):
    return np.log(_bollinger(bars, "BBB_20_2.0") / 100 / ewma_volatility(bars["close"]))


# --- volume ---


@indicator("volume", windows=(5, 20, 60))
def relative_volume(bars, window):
    # +1 share: a day without trading is a number, and the unit of real volumes is far above it.
    return np.log((bars["volume"] + 1) / (bars["volume"].rolling(window).mean() + 1))


@indicator("volume")
def volume_change(bars):
    return np.log(bars["volume"] + 1).diff()


@indicator("volume")
def mfi_14(bars):
    inputs = (bars["high"], bars["low"], bars["close"], bars["volume"])
    return _library(ta.mfi(*inputs, length=14, talib=False), bars) / 50 - 1


@indicator("volume")
def cmf_20(bars):
    return _library(ta.cmf(bars["high"], bars["low"], bars["close"], bars["volume"], length=20), bars)
