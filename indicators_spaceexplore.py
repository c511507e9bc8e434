# Copyright 2026 The SpaceExploreAI contributors. Licensed under the MIT License.
"""The indicators: every column the network may see, each causal and without a unit.

A column is a function of one ticker's `Bars` (arrays `open, high, low, close, volume, date`, oldest first) and gives
one number per bar that knows that bar and those before it. Prices are divided by prices and returns by the volatility
of their own day, so that a column means the same for every ticker and decade:

    @indicator("momentum", windows=(5, 20))
    def mean_return(bars, window):
        '''Mean daily return of the window.'''
        return rolling_mean(daily_return(bars), window) / volatility(bars)

registers `mean_return_5` and `mean_return_20`. pandas and pandas-ta-classic work as well, on `bars.frame`. A model's
own columns are written at the end of this file, which travels with its checkpoint; the command
`python scripts/indicators.py --check FILE` tries a draft in another file. Columns of all tickers together are
registered by `panel_indicator`, as in "relation" below.

The groups from "price" to "volume" are in `indicators_bars_spaceexplore.py`; here are those that build on them.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .indicators_bars_spaceexplore import (
    bollinger_position,
    close_to_sma,
    directional_movement_14,
    macd_histogram,
    psar_distance,
    realized_volatility,
    relative_strength,
    relative_volume,
    scaled_return,
    supertrend,
)
from .indicators_base_spaceexplore import (
    INDICATORS,
    MIN_TICKERS,
    Bars,
    Indicator,
    Panel,
    bars_since,
    compute_indicators,
    compute_panel,
    cross_mean,
    cross_rank,
    daily_return,
    direction,
    ewma_volatility,
    highest,
    indicator,
    lag,
    last_known,
    log_close,
    log_volume_change,
    lowest,
    mean_close,
    panel_indicator,
    position,
    price_range,
    rolling,
    rolling_correlation,
    rolling_covariance,
    rolling_mean,
    rolling_slope,
    rolling_std,
    rolling_sum,
    scaled_log,
    shared,
    squared_return,
    volatility,
    where_moving,
)

__all__ = [
    "FEATURE_PRESETS",
    "INDICATORS",
    "MIN_TICKERS",
    "Bars",
    "Indicator",
    "Panel",
    "compute_indicators",
    "compute_panel",
    "cross_mean",
    "cross_rank",
    "daily_return",
    "ewma_volatility",
    "highest",
    "indicator",
    "lag",
    "lowest",
    "panel_indicator",
    "rolling_mean",
    "rolling_sum",
    "scaled_log",
    "select_features",
    "shared",
    "volatility",
]

# --- fibonacci: retracements of the range of 100 days ---

FIBONACCI_RATIOS = (0.236, 0.382, 0.5, 0.618, 0.786)


def _retracement(bars: Bars, ratio: float) -> np.ndarray:
    return highest(bars, 100) - ratio * (highest(bars, 100) - lowest(bars, 100))


@indicator("fibonacci")
def fibonacci_position(bars):
    """Close within the range of 100 days: -1 at its low, +1 at its high."""
    return position(bars.close, lowest(bars, 100), highest(bars, 100))


@indicator("fibonacci", windows=(236, 382, 500, 618, 786))
def fibonacci_level(bars, permille):
    """Close over the level that retraces so many thousandths of the range, from its high."""
    return scaled_log(bars, bars.close / _retracement(bars, permille / 1000), 100)


@indicator("fibonacci")
def fibonacci_nearest(bars):
    """Close over the nearest of the levels, the low and the high among them."""
    levels = np.stack([_retracement(bars, ratio) for ratio in (0, *FIBONACCI_RATIOS, 1)])
    nearest = np.abs(levels - bars.close).argmin(axis=0)
    return scaled_log(bars, bars.close / levels[nearest, np.arange(len(bars.close))], 5)


@indicator("fibonacci")
def fibonacci_swing(bars):
    """Part of the range retraced since its newer end: up to 1 from a newer low, down to -1 from a newer high."""
    fallen = bars_since(np.argmin, bars.low, 100) < bars_since(np.argmax, bars.high, 100)
    back = np.where(fallen, bars.close - lowest(bars, 100), bars.close - highest(bars, 100))
    return back / (highest(bars, 100) - lowest(bars, 100))


# --- time: the bar's own date ---
# All tickers share a date, so that a network learns by heart what happened then. By default it is given the weekday
# alone, which names no date and does matter: the next close is one day away or three.


def _days(bars: Bars) -> np.ndarray:
    return bars.date.astype("datetime64[D]")


def _month(bars: Bars) -> tuple[np.ndarray, np.ndarray]:
    """Days since the first of the month, and days that it has."""
    month = bars.date.astype("datetime64[M]")
    first, following = month.astype("datetime64[D]"), (month + 1).astype("datetime64[D]")
    return (_days(bars) - first).astype(int), (following - first).astype(int)


PHASES = {  # how far each cycle has gone, from 0 to below 1
    "day_of_week": lambda bars: (_days(bars).astype(int) + 3) % 7 / 7,
    "day_of_month": lambda bars: np.divide(*_month(bars)),
    "week_of_year": lambda bars: (_days(bars) - bars.date.astype("datetime64[Y]")).astype(int) // 7 / 53,
    "month": lambda bars: bars.date.astype("datetime64[M]").astype(int) % 12 / 12,
    "quarter": lambda bars: bars.date.astype("datetime64[M]").astype(int) % 12 // 3 / 4,
}


def _wave(wave: Callable, cycle: str) -> Callable:
    def column(bars):
        return wave(2 * np.pi * PHASES[cycle](bars))

    column.__name__ = f"{cycle}_{wave.__name__}"
    column.__doc__ = f"{wave.__name__.capitalize()}e of the {cycle.replace('_', ' ')}.".replace("Cose", "Cosine")
    return column


for _cycle in PHASES:
    indicator("time")(_wave(np.sin, _cycle))
    indicator("time")(_wave(np.cos, _cycle))


@indicator("time")
def days_to_month_end(bars):
    """Calendar days that the month still has, from about 1 (the first) to -1 (the last)."""
    day, days = _month(bars)
    return (days - 1 - day) / 15 - 1


@indicator("time")
def days_since_last_bar(bars):
    """Logarithm of the calendar days since the bar before."""
    days = _days(bars).astype(np.float64)
    return np.log(days - lag(days, 1))


def _rises(counter: np.ndarray) -> np.ndarray:
    counter = counter.astype(np.float64)
    return np.where(np.isnan(lag(counter, 1)), np.nan, counter > lag(counter, 1))


@indicator("time")
def first_bar_of_week(bars):
    """1 on the first bar of a week, else 0."""
    return _rises((_days(bars).astype(int) + 3) // 7)  # weeks since Monday, 29 December 1969


@indicator("time")
def first_bar_of_month(bars):
    """1 on the first bar of a month, else 0."""
    return _rises(bars.date.astype("datetime64[M]"))


# --- market_regime: what kind of market it is, not where it goes ---


@indicator("market_regime", windows=(20, 50, 100))
def trend_fit(bars, window):
    """Correlation of the log-closes with time: ±1 on a straight line."""
    time_deviation = ((window**2 - 1) / 12) ** 0.5
    fit = rolling_slope(log_close(bars), window) * time_deviation / rolling_std(log_close(bars), window)
    return where_moving(bars, fit, window)


@indicator("market_regime", windows=(10, 20))
def efficiency_ratio(bars, window):
    """Kaufman's: the way from the first to the last close over the way that was gone."""
    steps = np.abs(bars.close - lag(bars.close, 1))
    return np.abs(bars.close - lag(bars.close, window)) / rolling_sum(steps, window)


@indicator("market_regime")
def choppiness_14(bars):
    """Dreiss' choppiness index: true ranges that fit into the range of 14 days."""
    ranges = rolling_sum(price_range(bars), 14) / (highest(bars, 14) - lowest(bars, 14))
    return 2 * np.log(ranges) / np.log(14) - 1


@indicator("market_regime", windows=(60, 250))
def volatility_level(bars, window):
    """Volatility over its mean."""
    return np.log(volatility(bars) / rolling_mean(volatility(bars), window))


@indicator("market_regime")
def volatility_ratio(bars):
    """Root mean square of returns of 5 days over that of 21."""
    return realized_volatility(bars, 5) - realized_volatility(bars, 21)


def _moments(bars: Bars, window: int, highest_order: int) -> list[np.ndarray]:
    """Means of the powers of daily returns, from the first to the third or fourth."""
    returns, squares = daily_return(bars), squared_return(bars)
    powers = (returns, squares, squares * returns, squares * squares)
    return [rolling_mean(power, window) for power in powers[:highest_order]]


@indicator("market_regime", windows=(10, 20, 60))
def return_skew(bars, window):
    """Skewness of daily returns."""
    first, second, third = _moments(bars, window, 3)
    variance, third = second - first**2, third - 3 * first * second + 2 * first**3
    return third / variance**1.5 * (window * (window - 1)) ** 0.5 / (window - 2)


@indicator("market_regime", windows=(10, 20, 60))
def return_kurtosis(bars, window):
    """Excess kurtosis of daily returns, its logarithm on either side of zero."""
    first, second, third, fourth = _moments(bars, window, 4)
    variance, fourth = second - first**2, fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    excess = (window + 1) * fourth / variance**2 - 3 * (window - 1)
    excess = excess * (window - 1) / ((window - 2) * (window - 3))
    return np.sign(excess) * np.log1p(np.abs(excess))


@indicator("market_regime", windows=(20, 60))
def autocorrelation(bars, window):
    """Correlation of daily returns with those of the day before."""
    return rolling_correlation(daily_return(bars), lag(daily_return(bars), 1), window)


@indicator("market_regime")
def variance_ratio_60(bars):
    """Lo and MacKinlay's (1988): squared returns of five days over five times those of one."""
    weekly = (log_close(bars) - lag(log_close(bars), 5)) ** 2
    return np.log(rolling_mean(weekly, 60) / (5 * rolling_mean(squared_return(bars), 60)))


@indicator("market_regime", windows=(5, 20, 60))
def price_volume_correlation(bars, window):
    """Correlation of daily returns with changes of volume."""
    return rolling_correlation(daily_return(bars), log_volume_change(bars), window)


# --- signals: what simple strategies hold, from -1 (sold) to 1 (bought) ---


def _beyond(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Reversal: 1 below the low, -1 above the high, else 0."""
    held = np.where(values < low, 1.0, np.where(values > high, -1.0, 0.0))
    return np.where(np.isnan(values), np.nan, held)


@indicator("signals")
def rsi_reversal(bars):
    """Reversal: bought at an RSI (14) under 30, sold at one over 70."""
    return _beyond(relative_strength(bars, 14), 0.3, 0.7)


@indicator("signals")
def bollinger_reversal(bars):
    """Reversal: bought under Bollinger's lower band (20), sold over the upper."""
    return _beyond(bollinger_position(bars, 20), -1, 1)


@indicator("signals")
def connors_reversal(bars):
    """Reversal along the trend: an RSI (2) under 10 or over 90, on the side of the average of 200 days."""
    held, trend = _beyond(relative_strength(bars, 2), 0.1, 0.9), direction(close_to_sma(bars, 200))
    return np.where(np.isnan(trend), np.nan, held * (held == trend))


@indicator("signals")
def engulfing(bars):
    """Reversal: a body around the opposite body of the day before, 1 if it rises."""
    open_, close = lag(bars.open, 1), lag(bars.close, 1)
    rises = (close < open_) & (bars.close >= open_) & (bars.open <= close)
    falls = (close >= open_) & (bars.close <= open_) & (bars.open >= close) & (bars.close < bars.open)
    same = (bars.close == open_) & (bars.open == close)
    return np.where(np.isnan(close), np.nan, (rises.astype(float) - falls) * ~same)


@indicator("signals", windows=(20, 55))
def channel_breakout(bars, window):
    """Trend-following: the side to which the close last left the price channel of the days before."""
    top, bottom = lag(highest(bars, window), 1), lag(lowest(bars, window), 1)
    return last_known(np.where(bars.close > top, 1.0, np.where(bars.close < bottom, -1.0, np.nan)))


@indicator("signals")
def golden_cross(bars):
    """Trend-following: the side of the average of 50 days from that of 200."""
    return direction(scaled_log(bars, mean_close(bars, 50) / mean_close(bars, 200)))


@indicator("signals", windows=(20, 50))
def price_crossover(bars, window):
    """Trend-following: 1 on the day on which the close rises over its average, -1 when it falls under it."""
    side = direction(close_to_sma(bars, window))
    return (side - lag(side, 1)) / 2


@indicator("signals")
def macd_cross(bars):
    """Trend-following: the side of the MACD from its signal."""
    return direction(macd_histogram(bars))


@indicator("signals")
def psar_direction(bars):
    """Trend-following: the side of the close from the parabolic stop."""
    return direction(psar_distance(bars))


@indicator("signals")
def supertrend_direction(bars):
    """Trend-following: the side of the Supertrend (10, 3)."""
    return supertrend(bars)[1]


@indicator("signals")
def trend_score(bars):
    """Trend-following: mean vote of two averages, MACD, RSI and directional movement."""
    averages = scaled_log(bars, mean_close(bars, 20) / mean_close(bars, 50))
    strength = relative_strength(bars, 14) - 0.5
    votes = (close_to_sma(bars, 20), averages, macd_histogram(bars), strength, directional_movement_14(bars))
    return sum(map(direction, votes)) / len(votes)


@indicator("signals", windows=(60, 120, 250))
def time_series_momentum(bars, window):
    """Momentum: the sign of the return of the window (Moskowitz, Ooi and Pedersen, 2012)."""
    return direction(scaled_return(bars, window))


@indicator("signals")
def momentum_12_1(bars):
    """Momentum: the return of a year without its last month (Jegadeesh and Titman, 1993), at most one volatility."""
    skipped = scaled_log(bars, lag(bars.close, 20) / lag(bars.close, 250), 230)
    return np.clip(skipped, -1, 1)


@indicator("signals")
def streak(bars):
    """Days in a row on which the close rose, or, below zero, fell."""
    side = np.sign(bars.close - lag(bars.close, 1))
    day = np.arange(len(side))
    begun = np.maximum.accumulate(np.where(side == lag(side, 1), 0, day))
    return side * (day - begun + 1)


# --- relation: one ticker among all, on dates of MIN_TICKERS or more; undefined for a ticker alone ---


@shared
def market_return(panel: Panel) -> np.ndarray:
    """(D,) mean of the tickers' daily log-returns."""
    return cross_mean(panel.each(lambda bars, rows: daily_return(bars)))


@shared
def market_exposure(panel: Panel) -> np.ndarray:
    """(D, N) beta: slope of a ticker's daily returns on the market's, of 60 days."""

    def slope(bars: Bars, rows: np.ndarray) -> np.ndarray:
        market = market_return(panel)[rows]
        return rolling_covariance(daily_return(bars), market, 60) / rolling_covariance(market, market, 60)

    return panel.each(slope)


@panel_indicator("relation", windows=(1, 5, 20, 60))
def return_rank(panel, window):
    """Place of the return of the window, in its own volatility, among all tickers."""
    return cross_rank(panel.each(lambda bars, rows: scaled_return(bars, window)))


@panel_indicator("relation")
def volatility_rank(panel):
    """Place of the volatility among all tickers."""
    return cross_rank(panel.each(lambda bars, rows: volatility(bars)))


@panel_indicator("relation")
def volume_rank(panel):
    """Place of the volume over its mean of 20 days among all tickers."""
    return cross_rank(panel.each(lambda bars, rows: relative_volume(bars, 20)))


@panel_indicator("relation", windows=(1, 5, 20))
def relative_return(panel, window):
    """Return of the window, in its own volatility, minus the mean of all tickers."""
    returns = panel.each(lambda bars, rows: scaled_return(bars, window))
    return returns - cross_mean(returns)[:, None]


@panel_indicator("relation")
def market_beta_60(panel):
    """Slope of daily returns on the mean of all tickers."""
    return market_exposure(panel)


@panel_indicator("relation")
def market_correlation_60(panel):
    """Correlation of daily returns with the mean of all tickers."""
    return panel.each(lambda bars, rows: rolling_correlation(daily_return(bars), market_return(panel)[rows], 60))


@panel_indicator("relation", windows=(1, 5, 20))
def market_residual(panel, window):
    """Return of the window minus beta times that of all tickers."""

    def scaled_market(bars: Bars, rows: np.ndarray) -> np.ndarray:
        return rolling_sum(market_return(panel)[rows], window) / (volatility(bars) * window**0.5)

    returns = panel.each(lambda bars, rows: scaled_return(bars, window))
    return returns - market_exposure(panel) * panel.each(scaled_market)


# --- season: what comes back with the quarter and the year ---
# Companies report a quarter's earnings about when they did the last time, and prices and volumes move as on few other
# days (Beaver, 1968, The Information Content of Annual Earnings Announcements). It takes no calendar of announcements:
# the bars of twelve quarters tell where in the quarter they fall, for each ticker by itself.

QUARTER = 62.9  # sessions


@shared
def _activity(bars: Bars) -> np.ndarray:
    """The day's move in units of the volatility before it, at most 6, times the root of its volume where that is over
    its mean; smoothed over the sessions before and after, so that a row has that of the row before."""
    move = np.minimum(np.abs(daily_return(bars)) / lag(volatility(bars), 1), 6)
    activity = move * np.exp(np.maximum(relative_volume(bars, 20), 0) / 2)
    return (activity + 2 * lag(activity, 1) + lag(activity, 2)) / 4


def _season(bars: Bars, quarters: tuple[int, ...], window: int) -> np.ndarray:
    """Logarithm of the mean, over past quarters, of the most activity where the next `window` sessions would be."""
    peak = rolling(np.maximum, _activity(bars), window)
    past = np.stack([lag(peak, round(QUARTER * quarter) - window - 1) for quarter in quarters])
    known = np.isfinite(past)
    return np.log(np.where(known, past, 0).sum(axis=0) / known.sum(axis=0))


@indicator("season", windows=(1, 5))
def quarter_season(bars, window):
    """Moves and volumes of the coming sessions' counterparts in the last twelve quarters."""
    return _season(bars, tuple(range(1, 13)), window)


@indicator("season", windows=(1, 5))
def year_season(bars, window):
    """Moves and volumes of the coming sessions' counterparts in the last three years."""
    return _season(bars, (4, 8, 12), window)


# --- selection ---

# Frozen: a network trained on them expects these columns in this order. Chosen on 30 tickers so that no two of them
# rank days alike (Spearman's correlation over 0.96). Not in it: single lags, which a network that sees 64 days has;
# the calendar but for the weekday; the panel, so that a ticker is forecast alone as it is among others.
FEATURE_PRESETS = {
    "default": (
        *("gap", "body", "true_range", "close_location", "upper_shadow", "lower_shadow"),
        *("high_distance_60", "low_distance_60", "high_distance_250"),
        *("scaled_return_1", "scaled_return_3", "scaled_return_5", "scaled_return_10", "scaled_return_20"),
        *("scaled_return_60", "scaled_return_120", "scaled_return_250", "overnight_return_20"),
        *("close_to_sma_10", "close_to_sma_50", "close_to_sma_200", "macd_histogram", "adx_14"),
        *("aroon_25", "psar_distance", "supertrend_distance", "ichimoku_cloud", "vortex_14"),
        *("rsi_7", "rsi_14", "stochastic_k", "williams_r_14", "trix_15", "ultimate_oscillator"),
        *("realized_volatility_5", "realized_volatility_20", "realized_volatility_60", "atr_14"),
        *("parkinson_volatility_20", "bollinger_position_20", "bollinger_width_20", "donchian_width_20"),
        *("downside_share_20", "overnight_share_20"),
        *("relative_volume_5", "relative_volume_20", "relative_volume_60", "volume_change"),
        *("mfi_14", "cmf_20", "obv_20", "force_index_13"),
        *("fibonacci_position", "fibonacci_nearest"),
        *("day_of_week_sin", "day_of_week_cos"),
        *("volatility_level_250", "return_skew_60", "price_volume_correlation_20", "channel_breakout_55"),
        *("quarter_season_1", "quarter_season_5", "year_season_1", "year_season_5"),
    ),
}


def select_features(groups: Sequence[str]) -> list[str]:
    """Names of the columns of feature groups, each once.

    Args:
        groups: names of groups ("price", "trend", …), of presets ("default"), or "all".

    Raises:
        ValueError: a group that no column is in, or none at all.
    """
    members = {"all": list(INDICATORS), **FEATURE_PRESETS}
    for column in INDICATORS.values():
        members.setdefault(column.group, []).append(column.name)
    unknown = [group for group in groups if group not in members]
    if unknown or not groups:
        raise ValueError(f"unknown feature group {unknown[0] if unknown else ''!r}; there are {', '.join(members)}")
    return list(dict.fromkeys(name for group in groups for name in members[group]))
