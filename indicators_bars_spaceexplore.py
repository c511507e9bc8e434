# Copyright 2026 The SpaceExploreAI contributors. Licensed under the MIT License.
"""The indicators that one ticker's bars give by themselves: price, return, lag, trend, momentum, volatility, volume.

Where TA-Lib or pandas-ta-classic define an indicator, the column is theirs, in units of the close and of the
volatility. It is computed by numpy, which is twenty times as fast; what a model seldom takes is left to the library.
"""

import numpy as np
import pandas as pd
import pandas_ta_classic as ta

from .indicators_base_spaceexplore import (
    Bars,
    average_range,
    bars_since,
    daily_return,
    ema,
    exponential,
    highest,
    indicator,
    lag,
    log_close,
    log_volume_change,
    lowest,
    mean_close,
    position,
    price_range,
    rolling,
    rolling_covariance,
    rolling_mean,
    rolling_slope,
    rolling_std,
    rolling_sum,
    scaled_log,
    scaled_price,
    shared,
    sliding,
    squared_return,
    typical_price,
    volatility,
    where_moving,
    wilder,
)

# --- price: the shape of the day's bar, and its place among the last ones ---


@indicator("price")
def gap(bars):
    """Open over the previous close."""
    return scaled_log(bars, bars.open / lag(bars.close, 1))


@indicator("price")
def body(bars):
    """Close over open."""
    return scaled_log(bars, bars.close / bars.open)


@indicator("price")
def true_range(bars):
    """High over low, the previous close included."""
    previous = lag(bars.close, 1)
    return scaled_log(bars, np.maximum(bars.high, previous) / np.minimum(bars.low, previous))


@indicator("price")
def close_location(bars):
    """Chaikin's close location value: -1 at the low, +1 at the high."""
    return position(bars.close, bars.low, bars.high)


@indicator("price")
def upper_shadow(bars):
    """High over the body."""
    return scaled_log(bars, bars.high / np.maximum(bars.open, bars.close))


@indicator("price")
def lower_shadow(bars):
    """Body over the low."""
    return scaled_log(bars, np.minimum(bars.open, bars.close) / bars.low)


@indicator("price")
def day_range(bars):
    """High over low."""
    return scaled_log(bars, bars.high / bars.low)


@indicator("price")
def body_ratio(bars):
    """Close minus open as a part of the day's range (balance of power)."""
    return (bars.close - bars.open) / (bars.high - bars.low)


@indicator("price")
def upper_shadow_ratio(bars):
    """Upper shadow as a part of the day's range."""
    return (bars.high - np.maximum(bars.open, bars.close)) / (bars.high - bars.low)


@indicator("price")
def lower_shadow_ratio(bars):
    """Lower shadow as a part of the day's range."""
    return (np.minimum(bars.open, bars.close) - bars.low) / (bars.high - bars.low)


@indicator("price", windows=(5, 10, 60))
def range_position(bars, window):
    """Close within the range of the window: -1 at its low, +1 at its high."""
    return position(bars.close, lowest(bars, window), highest(bars, window))


@indicator("price", windows=(5, 10, 20, 60, 250))
def high_distance(bars, window):
    """Close under the high of the window."""
    return scaled_log(bars, bars.close / highest(bars, window), window)


@indicator("price", windows=(5, 10, 20, 60, 250))
def low_distance(bars, window):
    """Close over the low of the window."""
    return scaled_log(bars, bars.close / lowest(bars, window), window)


# --- return: the past, in units of the volatility known today ---


@indicator("return", windows=(1, 2, 3, 5, 10, 20, 60, 120, 250))
def scaled_return(bars, window):
    """Log-return over the window."""
    return scaled_log(bars, bars.close / lag(bars.close, window), window)


@indicator("return", windows=(5, 20))
def overnight_return(bars, window):
    """Log-return from closes to opens, summed over the window."""
    overnight = np.log(bars.open / lag(bars.close, 1))
    return rolling_sum(overnight, window) / (volatility(bars) * window**0.5)


@indicator("return", windows=(5, 20))
def intraday_return(bars, window):
    """Log-return from opens to closes, summed over the window."""
    return rolling_sum(np.log(bars.close / bars.open), window) / (volatility(bars) * window**0.5)


# --- lag: single earlier bars, for models that do not see a sequence ---


@indicator("lag", windows=(1, 2, 3, 5, 10))
def return_lag(bars, days):
    """Daily return of an earlier day."""
    return lag(daily_return(bars), days) / volatility(bars)


@indicator("lag", windows=(1, 2, 3, 5, 10))
def high_lag(bars, days):
    """High of an earlier day over today's close."""
    return scaled_log(bars, lag(bars.high, days) / bars.close, days)


@indicator("lag", windows=(1, 2, 3, 5, 10))
def low_lag(bars, days):
    """Low of an earlier day over today's close."""
    return scaled_log(bars, lag(bars.low, days) / bars.close, days)


@indicator("lag", windows=(1, 2, 3, 5, 10))
def volume_lag(bars, days):
    """Volume of an earlier day over its mean of the last 20."""
    return np.log((lag(bars.volume, days) + 1) / (rolling_mean(bars.volume, 20) + 1))


# --- trend ---


@indicator("trend", windows=(5, 10, 20, 50, 200))
def close_to_sma(bars, window):
    """Close over its simple average."""
    return scaled_log(bars, bars.close / mean_close(bars, window), window)


@indicator("trend", windows=(5, 10, 20, 50, 200))
def close_to_ema(bars, window):
    """Close over its exponential average."""
    return scaled_log(bars, bars.close / ema(bars.close, window), window)


def _weighted_average(values: np.ndarray, window: int) -> np.ndarray:
    # The newest value has the weight `window`, the oldest one: the mean of all means that end today.
    weights = np.arange(window, 0, -1)
    average = np.full_like(values, np.nan)
    if len(values) >= window:
        average[window - 1 :] = np.convolve(values, weights / weights.sum(), mode="valid")
    return average


@indicator("trend")
def close_to_hma_20(bars):
    """Close over Hull's average."""
    raw = 2 * _weighted_average(bars.close, 10) - _weighted_average(bars.close, 20)
    return scaled_log(bars, bars.close / _weighted_average(raw, 4), 4)


@indicator("trend")
def close_to_kama_10(bars):
    """Close over Kaufman's adaptive average."""
    average = _library(ta.kama(bars.frame["close"], length=10, talib=False), bars, 30)
    return scaled_log(bars, bars.close / average, 10)


def _library(result: pd.Series | None, bars: Bars, shortest: int) -> np.ndarray:
    # pandas-ta-classic answers None to a history shorter than `shortest`: of these days a longer one must not know
    # more. It takes TA-Lib's values when that is installed; they differ during warm-up, so a model would see other
    # inputs on another machine: hence talib=False.
    known = np.arange(len(bars.close)) >= shortest - 1
    return np.where(known, np.nan if result is None else result, np.nan)


@shared
def macd(bars: Bars) -> tuple[np.ndarray, np.ndarray]:
    line = ema(bars.close, 12) - ema(bars.close, 26)
    return line, ema(line, 9)


@indicator("trend")
def macd_line(bars):
    """MACD(12, 26): difference of two exponential averages."""
    return scaled_price(bars, macd(bars)[0], 26)


@indicator("trend")
def macd_signal(bars):
    """Exponential average (9) of MACD(12, 26)."""
    return scaled_price(bars, macd(bars)[1], 26)


@indicator("trend")
def macd_histogram(bars):
    """MACD(12, 26) minus its signal (9)."""
    line, signal = macd(bars)
    return scaled_price(bars, line - signal)


@shared
def directional_indicators(bars: Bars) -> tuple[np.ndarray, np.ndarray]:
    """Wilder's +DI and -DI over 14 days, as parts of one."""
    up, down = bars.high - lag(bars.high, 1), lag(bars.low, 1) - bars.low
    moves = np.where((up > down) & (up > 0), up, 0.0), np.where((down > up) & (down > 0), down, 0.0)
    ranges = _wilder_sum(price_range(bars), 14)
    return tuple(_wilder_sum(move, 14) / ranges for move in moves)


def _wilder_sum(values: np.ndarray, window: int) -> np.ndarray:
    # As TA-Lib: begun by the first bar that follows one, with a value less than the window and no answer yet.
    started = np.full_like(values, np.nan)
    if len(values) >= window:
        started[window - 1] = values[1:window].sum() / window
        started[window:] = values[window:]
    averages = exponential(started, 1 / window)
    averages[:window] = np.nan
    return averages


@indicator("trend")
def adx_14(bars):
    """Wilder's average directional index."""
    plus, minus = directional_indicators(bars)
    return 2 * wilder(np.abs(plus - minus) / (plus + minus), 14) - 1


@indicator("trend")
def directional_movement_14(bars):
    """Wilder's +DI minus -DI."""
    plus, minus = directional_indicators(bars)
    return plus - minus


@indicator("trend")
def aroon_25(bars):
    """Aroon oscillator: how much newer the high of 25 days is than their low."""
    return (bars_since(np.argmin, bars.low, 26) - bars_since(np.argmax, bars.high, 26)) / 25


@shared
def parabolic_stop(bars: Bars) -> np.ndarray:
    """Wilder's parabolic stop-and-reverse with TA-Lib's start: acceleration 0.02 per new extreme, at most 0.2."""
    upright = bars.low.tolist(), bars.high.tolist()
    inverted = (-bars.high).tolist(), (-bars.low).tolist()  # where a fall is a rise
    low, high = upright
    sign = -1 if len(low) > 1 and low[0] - low[1] > max(high[1] - high[0], 0) else 1
    low, high = upright if sign > 0 else inverted
    stop, extreme, acceleration, stops = low[0], high[:2][-1], 0.02, [np.nan]
    for day in range(1, len(low)):
        stop += acceleration * (extreme - stop)
        # Never within the range of the two days before. Not by min(), whose calls take longer than all the rest.
        if low[day - 1] < stop:
            stop = low[day - 1]
        if day > 1 and low[day - 2] < stop:
            stop = low[day - 2]
        if high[day] > extreme:
            extreme, acceleration = high[day], min(acceleration + 0.02, 0.2)
        if low[day] < stop:
            sign, (low, high) = -sign, inverted if sign > 0 else upright
            stop, extreme, acceleration = -extreme, high[day], 0.02
        stops.append(sign * stop)
    return np.array(stops)


@indicator("trend")
def psar_distance(bars):
    """Close over Wilder's parabolic stop-and-reverse."""
    return scaled_log(bars, bars.close / parabolic_stop(bars), 10)


@shared
def supertrend(bars: Bars) -> tuple[np.ndarray, np.ndarray]:
    """The trailing stop at three average ranges (10) from the middle of the bars, and the side of it: +1 below."""
    middle, reach = (bars.high + bars.low) / 2, 3 * average_range(bars, 10)
    uppers, lowers, closes = (middle + reach).tolist(), (middle - reach).tolist(), bars.close.tolist()
    stops, sides, upper, lower, side = [], [], np.nan, np.nan, 1.0
    for close, new_upper, new_lower in zip(closes, uppers, lowers, strict=True):
        if close > upper:
            side, upper, lower = 1.0, new_upper, new_lower
        elif close < lower:
            side, upper, lower = -1.0, new_upper, new_lower
        else:  # within the band, whose stop only tightens
            lower = lower if side > 0 and new_lower < lower else new_lower
            upper = upper if side < 0 and new_upper > upper else new_upper
        stops.append(lower if side > 0 else upper)
        sides.append(side)
    stops = np.array(stops)
    return stops, np.where(np.isnan(stops), np.nan, sides)


@indicator("trend")
def supertrend_distance(bars):
    """Close over the Supertrend (10, 3)."""
    return scaled_log(bars, bars.close / supertrend(bars)[0], 10)


def middle_of_range(bars: Bars, window: int) -> np.ndarray:
    return (highest(bars, window) + lowest(bars, window)) / 2


@shared
def ichimoku_spans(bars: Bars) -> tuple[np.ndarray, np.ndarray]:
    """The edges of the cloud as drawn at today's bar, which were known 26 bars ago."""
    first = (middle_of_range(bars, 9) + middle_of_range(bars, 26)) / 2
    return lag(first, 26), lag(middle_of_range(bars, 52), 26)


@indicator("trend")
def ichimoku_conversion(bars):
    """Close over Ichimoku's conversion line (9)."""
    return scaled_log(bars, bars.close / middle_of_range(bars, 9), 9)


@indicator("trend")
def ichimoku_base(bars):
    """Close over Ichimoku's base line (26)."""
    return scaled_log(bars, bars.close / middle_of_range(bars, 26), 26)


@indicator("trend")
def ichimoku_cloud(bars):
    """Close over Ichimoku's cloud (9, 26, 52): above its top or below its bottom, zero within."""
    first, second = ichimoku_spans(bars)
    edge = np.clip(bars.close, np.minimum(first, second), np.maximum(first, second))
    return scaled_log(bars, bars.close / edge, 52)


@indicator("trend")
def ichimoku_cloud_width(bars):
    """Ichimoku's leading span A over span B, as drawn at today's bar."""
    first, second = ichimoku_spans(bars)
    return scaled_log(bars, first / second, 52)


@indicator("trend")
def vortex_14(bars):
    """Vortex VI+ minus VI-."""
    up, down = np.abs(bars.high - lag(bars.low, 1)), np.abs(bars.low - lag(bars.high, 1))
    return (rolling_sum(up, 14) - rolling_sum(down, 14)) / rolling_sum(price_range(bars), 14)


@indicator("trend", windows=(20, 50, 100))
def trend_slope(bars, window):
    """Slope of the least-squares line through the log-closes."""
    return rolling_slope(log_close(bars), window) * window**0.5 / volatility(bars)


# --- momentum ---


@shared
def relative_strength(bars: Bars, window: int) -> np.ndarray:
    """Wilder's RSI, from 0 to 1."""
    change = bars.close - lag(bars.close, 1)
    gain, loss = wilder(np.maximum(change, 0), window), wilder(np.maximum(-change, 0), window)
    return gain / (gain + loss)


@indicator("momentum", windows=(7, 14, 21))
def rsi(bars, window):
    """Wilder's relative strength index."""
    return 2 * relative_strength(bars, window) - 1


@shared
def stochastic(bars: Bars) -> np.ndarray:
    """Lane's slow %K (14, 3), from -1 to 1."""
    return rolling_mean(position(bars.close, lowest(bars, 14), highest(bars, 14)), 3)


@indicator("momentum")
def stochastic_k(bars):
    """Stochastic %K (14, 3)."""
    return stochastic(bars)


@indicator("momentum")
def stochastic_d(bars):
    """Stochastic %D: mean of three %K (14, 3)."""
    return rolling_mean(stochastic(bars), 3)


@indicator("momentum")
def stochastic_rsi_14(bars):
    """RSI (14) within its range of 14 days, mean of three."""
    strength = relative_strength(bars, 14)
    low, high = rolling(np.minimum, strength, 14), rolling(np.maximum, strength, 14)
    return rolling_mean(position(strength, low, high), 3)


@indicator("momentum")
def cci_20(bars):
    """Lambert's commodity channel index."""
    mean = rolling_mean(typical_price(bars), 20)
    deviation = np.abs(sliding(typical_price(bars), 20) - mean[:, None]).mean(axis=1)
    moving = highest(bars, 20) > lowest(bars, 20)
    return np.where(moving, (typical_price(bars) - mean) / (1.5 * deviation), np.nan)


@indicator("momentum")
def williams_r_14(bars):
    """Williams' %R."""
    return position(bars.close, lowest(bars, 14), highest(bars, 14))


@indicator("momentum", windows=(10, 20, 50))
def roc(bars, window):
    """Rate of change: simple return over the window."""
    return (bars.close / lag(bars.close, window) - 1) / (volatility(bars) * window**0.5)


@indicator("momentum")
def trix_15(bars):
    """TRIX: daily change of a triple exponential average."""
    average = ema(ema(ema(bars.close, 15), 15), 15)
    return (average / lag(average, 1) - 1) / volatility(bars)


@indicator("momentum")
def tsi(bars):
    """Blau's true strength index (25, 13)."""
    change = bars.close - lag(bars.close, 1)
    return ema(ema(change, 25), 13) / ema(ema(np.abs(change), 25), 13)


@indicator("momentum")
def ultimate_oscillator(bars):
    """Williams' ultimate oscillator (7, 14, 28)."""
    pressure = bars.close - np.minimum(bars.low, lag(bars.close, 1))
    shares = [rolling_sum(pressure, n) / rolling_sum(price_range(bars), n) for n in (7, 14, 28)]
    return 2 * (4 * shares[0] + 2 * shares[1] + shares[2]) / 7 - 1


@indicator("momentum")
def awesome_oscillator(bars):
    """Bill Williams' oscillator: averages (5, 34) of the middle of the bars."""
    middle = (bars.high + bars.low) / 2
    return scaled_price(bars, rolling_mean(middle, 5) - rolling_mean(middle, 34), 34)


@indicator("momentum")
def kst(bars):
    """Pring's know sure thing: weighted averages of four rates of change."""
    total = ta.kst(bars.frame["close"])
    line = _library(None if total is None else total.iloc[:, 0], bars, 30)
    return line / 1e5 / (volatility(bars) * 20**0.5)


@indicator("momentum", windows=(10, 20))
def up_share(bars, window):
    """Share of rising closes (psychological line), from -1 to 1."""
    rise = np.where(np.isnan(daily_return(bars)), np.nan, bars.close > lag(bars.close, 1))
    return 2 * rolling_mean(rise, window) - 1


# --- volatility: other estimates against the one that scales everything ---


def relative_volatility(bars: Bars, variance: np.ndarray) -> np.ndarray:
    return np.log(np.sqrt(variance) / volatility(bars))


@indicator("volatility", windows=(5, 20, 60))
def realized_volatility(bars, window):
    """Root mean square of daily returns."""
    return relative_volatility(bars, rolling_mean(squared_return(bars), window))


@indicator("volatility", windows=(5, 10, 14, 21))
def atr(bars, window):
    """Wilder's average true range."""
    return np.log(scaled_price(bars, average_range(bars, window)))


@indicator("volatility", windows=(10, 20))
def parkinson_volatility(bars, window):
    """Parkinson (1980), The Extreme Value Method for Estimating the Variance of the Rate of Return."""
    squares = np.log(bars.high / bars.low) ** 2
    return relative_volatility(bars, rolling_mean(squares, window) / (4 * np.log(2)))


@indicator("volatility", windows=(10, 20))
def garman_klass_volatility(bars, window):
    """Garman and Klass (1980), On the Estimation of Security Price Volatilities from Historical Data."""
    range_, move = np.log(bars.high / bars.low), np.log(bars.close / bars.open)
    return relative_volatility(bars, rolling_mean(range_**2 / 2 - (2 * np.log(2) - 1) * move**2, window))


def _rogers_satchell(bars: Bars, window: int) -> np.ndarray:
    up = np.log(bars.high / bars.close) * np.log(bars.high / bars.open)
    return rolling_mean(up + np.log(bars.low / bars.close) * np.log(bars.low / bars.open), window)


@indicator("volatility")
def rogers_satchell_volatility_20(bars):
    """Rogers and Satchell (1991), Estimating Variance from High, Low and Closing Prices."""
    return relative_volatility(bars, _rogers_satchell(bars, 20))


@indicator("volatility")
def yang_zhang_volatility_20(bars):
    """Yang and Zhang (2000), Drift-Independent Volatility Estimation."""
    overnight, daytime = np.log(bars.open / lag(bars.close, 1)), np.log(bars.close / bars.open)
    share = 0.34 / (1.34 + 21 / 19)
    jumps, moves = (rolling_covariance(x, x, 20) * 20 / 19 for x in (overnight, daytime))
    return relative_volatility(bars, jumps + share * moves + (1 - share) * _rogers_satchell(bars, 20))


@shared
def close_deviation(bars: Bars, window: int) -> np.ndarray:
    return where_moving(bars, rolling_std(bars.close, window), window)


@indicator("volatility", windows=(20, 50))
def bollinger_position(bars, window):
    """Close within Bollinger's bands of two standard deviations: -1 at the lower, +1 at the upper."""
    return (bars.close - mean_close(bars, window)) / (2 * close_deviation(bars, window))


@indicator("volatility", windows=(20, 50))
def bollinger_width(bars, window):
    """Width of Bollinger's bands of two standard deviations."""
    width = 4 * close_deviation(bars, window) / mean_close(bars, window)
    return np.log(width / volatility(bars))


@indicator("volatility")
def keltner_position_20(bars):
    """Close within Keltner's channel of two average ranges: -1 at the lower edge, +1 at the upper."""
    return (bars.close - ema(bars.close, 20)) / (2 * ema(price_range(bars), 20))


@indicator("volatility")
def keltner_width_20(bars):
    """Width of Keltner's channel of two average ranges."""
    return np.log(4 * ema(price_range(bars), 20) / (ema(bars.close, 20) * volatility(bars)))


@indicator("volatility", windows=(20, 55))
def donchian_position(bars, window):
    """Close within Donchian's price channel: -1 at its low, +1 at its high."""
    return position(bars.close, lowest(bars, window), highest(bars, window))


@indicator("volatility", windows=(20, 55))
def donchian_width(bars, window):
    """Width of Donchian's price channel."""
    return np.log(np.log(highest(bars, window) / lowest(bars, window)) / (volatility(bars) * window**0.5))


@indicator("volatility")
def ulcer_index_14(bars):
    """Martin's ulcer index: root mean square of the falls from the highest close."""
    top = rolling(np.maximum, bars.close, 14)
    return np.sqrt(rolling_mean((bars.close / top - 1) ** 2, 14)) / (volatility(bars) * 14**0.5)


@indicator("volatility", windows=(20, 60))
def downside_share(bars, window):
    """Part of falling days in the sum of squared returns, from -1 to 1."""
    falls = np.where(daily_return(bars) > 0, 0.0, squared_return(bars))
    return 2 * rolling_sum(falls, window) / rolling_sum(squared_return(bars), window) - 1


@indicator("volatility")
def overnight_share_20(bars):
    """Part of the nights in the squared returns of nights and days, from -1 to 1."""
    nights = rolling_sum(np.log(bars.open / lag(bars.close, 1)) ** 2, 20)
    days = rolling_sum(np.log(bars.close / bars.open) ** 2, 20)
    return (nights - days) / (nights + days)


@indicator("volatility", windows=(5, 20))
def volatility_change(bars, window):
    """Volatility over that of some days earlier."""
    return np.log(volatility(bars) / lag(volatility(bars), window))


# --- volume ---


@indicator("volume", windows=(5, 20, 60))
def relative_volume(bars, window):
    """Volume over its mean."""
    return np.log((bars.volume + 1) / (rolling_mean(bars.volume, window) + 1))


@indicator("volume")
def volume_change(bars):
    """Volume over that of the day before."""
    return log_volume_change(bars)


@indicator("volume", windows=(5, 10, 21))
def volume_growth(bars, window):
    """Volume over that of some days earlier."""
    return np.log((bars.volume + 1) / (lag(bars.volume, window) + 1))


@indicator("volume")
def mfi_14(bars):
    """Money flow index: RSI of typical prices, weighted by traded value."""
    flow, change = typical_price(bars) * bars.volume, typical_price(bars) - lag(typical_price(bars), 1)
    up, down = (rolling_sum(np.where(moved, flow, 0.0), 14) for moved in (change > 0, change < 0))
    return (up - down) / (up + down)


@shared
def money_flow_volume(bars: Bars) -> np.ndarray:
    """Chaikin's: volume times the close location value, none from a bar without range."""
    location = position(bars.close, bars.low, bars.high)
    return np.where(bars.high > bars.low, location, 0.0) * bars.volume


@indicator("volume")
def cmf_20(bars):
    """Chaikin's money flow: change of the accumulation/distribution line per volume."""
    return rolling_sum(money_flow_volume(bars), 20) / rolling_sum(bars.volume, 20)


@indicator("volume")
def chaikin_oscillator(bars):
    """Chaikin's oscillator: averages (3, 10) of the accumulation/distribution line, per mean volume."""
    line = money_flow_volume(bars).cumsum()
    return (exponential(line, 2 / 4) - exponential(line, 2 / 11)) / rolling_mean(bars.volume, 20)


@indicator("volume", windows=(20, 60))
def obv(bars, window):
    """On-balance volume: its change over the window, per volume."""
    signed = np.sign(bars.close - lag(bars.close, 1)) * bars.volume
    return rolling_sum(signed, window) / rolling_sum(bars.volume, window)


@indicator("volume")
def price_volume_trend_20(bars):
    """Price-volume trend: its change over 20 days, per volume."""
    traded = (bars.close / lag(bars.close, 1) - 1) * bars.volume
    return rolling_sum(traded, 20) / rolling_sum(bars.volume, 20) * 20**0.5 / volatility(bars)


@indicator("volume", windows=(20, 50))
def close_to_vwma(bars, window):
    """Close over its average weighted by volume."""
    average = rolling_sum(bars.close * bars.volume, window) / rolling_sum(bars.volume, window)
    return scaled_log(bars, bars.close / average, window)


@indicator("volume")
def force_index_13(bars):
    """Elder's force index per mean volume."""
    force = ema((bars.close - lag(bars.close, 1)) * bars.volume, 13)
    return scaled_price(bars, force / rolling_mean(bars.volume, 20))


@indicator("volume")
def volume_dispersion_20(bars):
    """Standard deviation of daily changes of volume."""
    change = log_volume_change(bars)
    return np.sqrt(rolling_covariance(change, change, 20))


@indicator("volume")
def illiquidity(bars):
    """Amihud's (2002) return per traded value, mean of 20 days over that of 120."""
    moved = np.abs(daily_return(bars)) / (bars.close * (bars.volume + 1))
    return np.log(rolling_mean(moved, 20) / rolling_mean(moved, 120))
