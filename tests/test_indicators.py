"""The indicators: causal, without a unit, and equal to TA-Lib, pandas-ta-classic or a plain loop, every column."""

import calendar
import hashlib
import math
import re
import sys
import textwrap
from operator import mul
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
import pandas_ta_classic as ta
import pytest
import scipy.stats
import talib
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from spaceexploreai import indicators_spaceexplore
from spaceexploreai.data.prices import read_sample
from spaceexploreai.indicators_base_spaceexplore import cross_mean, cross_rank, rolling, shared
from spaceexploreai.indicators_spaceexplore import (
    FEATURE_PRESETS,
    INDICATORS,
    MIN_TICKERS,
    Bars,
    Indicator,
    Panel,
    compute_indicators,
    compute_panel,
    ewma_volatility,
    indicator,
    panel_indicator,
    select_features,
)
from spaceexploreai.scripts import indicators as command

PANEL = [name for name, column in INDICATORS.items() if column.panel]
NAMES = [name for name in INDICATORS if name not in PANEL]
PRICES = ["open", "high", "low", "close"]
WARM_UP = 280  # bars: the activity of a year before, in units of the volatility of 20 returns
DATES = pd.bdate_range("2020-01-01", periods=400)
# Histories are made from a seed; smaller seeds make no simpler ones.
NO_SHRINKING = {"deadline": None, "phases": [Phase.explicit, Phase.reuse, Phase.generate]}


def make_bars(
    rows: int, seed: int, flat: float = 0.0, unsold: float = 0.0, halt: int = 0, volatility: float = 0.02
) -> pd.DataFrame:
    """A random walk; `flat` and `unsold` are shares of bars without range and without volume, `halt` bars of both."""
    rng = np.random.default_rng(seed)
    close = rng.uniform(0.5, 500) * np.exp(np.cumsum(volatility * rng.standard_t(4, rows)))
    bars = pd.DataFrame({"date": DATES[:rows], "open": close * np.exp(rng.normal(0, volatility / 2, rows))})
    bars["high"] = np.maximum(bars["open"], close) * np.exp(np.abs(rng.normal(0, volatility / 2, rows)))
    bars["low"] = np.minimum(bars["open"], close) * np.exp(-np.abs(rng.normal(0, volatility / 2, rows)))
    bars["close"] = close
    bars["volume"] = rng.integers(1, 10**8, rows).astype(float)
    bars.loc[rng.random(rows) < unsold, "volume"] = 0.0
    first = int(rng.integers(0, rows - halt))
    bars.loc[first : first + halt - 1, "volume"] = 0.0
    bars.loc[first : first + halt - 1, "close"] = bars["close"][first]
    still = (rng.random(rows) < flat) | ((bars.index >= first) & (bars.index < first + halt))
    bars.loc[still, PRICES] = bars.loc[still, ["close"] * 4].to_numpy()
    return bars


def histories(halts: tuple[int, ...] = (0, 30)) -> st.SearchStrategy[pd.DataFrame]:
    return st.builds(
        make_bars,
        rows=st.integers(270, len(DATES)),
        seed=st.integers(0, 10**6),
        flat=st.sampled_from([0, 0.1]),
        unsold=st.sampled_from([0, 0.2]),
        halt=st.sampled_from(halts),
        volatility=st.sampled_from([0.003, 0.02, 0.1]),
    )


def times(bars: pd.DataFrame, factor: float | np.ndarray, columns: list[str] = PRICES) -> pd.DataFrame:
    return bars.assign(**{column: bars[column] * factor for column in columns})


def make_market(tickers: int = MIN_TICKERS + 2, rows: int = 120) -> pd.DataFrame:
    """A price table with a common factor; each ticker is listed two days after the one before."""
    market = np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.01, rows)))
    bars = [times(make_bars(rows, seed), market ** (1 + seed / 10)) for seed in range(tickers)]
    listed = [one.iloc[2 * seed :].assign(ticker=f"T{seed:02}") for seed, one in enumerate(bars)]
    return pd.concat(listed, ignore_index=True)


@pytest.fixture(scope="module")
def sample():
    return {ticker: bars.reset_index(drop=True) for ticker, bars in read_sample().groupby("ticker")}


def column_of(bars: pd.DataFrame, name: str) -> np.ndarray:
    return compute_indicators(bars, [name])[:, 0]


# --- the sample of bars is worth testing with ---


def assert_bars(bars: pd.DataFrame) -> None:
    assert (bars[["open", "close"]].min(axis=1) >= bars["low"]).all()
    assert (bars[["open", "close"]].max(axis=1) <= bars["high"]).all()
    assert (bars[PRICES] > 0).all(axis=None)


def test_random_bars_are_bars():
    bars = make_bars(200, 3, flat=0.1, unsold=0.2, halt=30)
    assert_bars(bars)
    assert (bars["volume"] == 0).sum() > 50
    assert (bars["high"] == bars["low"]).sum() > 40
    assert (bars["close"].diff() == 0).sum() >= 29
    market = command.random_market(3, 0)
    assert_bars(market)
    assert (market["high"] == market["low"]).groupby(market["ticker"]).sum().min() > 30


# --- causality ---


@settings(**NO_SHRINKING, max_examples=20)
@given(st.sampled_from(sorted(command.CHANGES)), st.integers(0, 10**6))
def test_every_column_is_causal(change, seed):
    command.check_change(NAMES, change, seed)


@settings(**NO_SHRINKING, max_examples=11)
@given(st.sampled_from(sorted(command.CHANGES)), st.integers(0, 10**6))
def test_every_column_of_the_panel_is_causal(change, seed):
    command.check_change(PANEL, change, seed)


@pytest.mark.parametrize("change", command.CHANGES)
def test_changes_are_changes(change):
    market = command.random_market(2, 0)
    future = market[market["date"] > market["date"].iloc[200]].reset_index(drop=True)
    changed = command.CHANGES[change](future).reset_index(drop=True)
    assert list(changed.columns) == list(future.columns)
    assert not changed.equals(future)
    assert_bars(changed)


def planted_column(function) -> dict[str, Indicator]:
    return {"planted": Indicator("planted", "test", lambda bars: function(bars.frame))}


def planted_panel(function) -> dict[str, Indicator]:
    return {"planted": Indicator("planted", "test", lambda panel: function(closes_of(panel)), panel=True)}


def closes_of(panel: Panel) -> np.ndarray:
    return panel.each(lambda bars, rows: bars.close)


PLANTED = {
    "next close": planted_column(lambda bars: bars["close"].shift(-1) / bars["close"]),
    "centred mean": planted_column(lambda bars: bars["close"] / bars["close"].rolling(5, center=True).mean()),
    "filled from behind": planted_column(lambda bars: bars["close"].rolling(20).mean().bfill()),
    "score over the whole history": planted_column(lambda bars: bars["close"] - bars["close"].mean()),
    "last bit": planted_column(lambda bars: bars["close"] / bars["close"].iloc[0] + 2e-16 * bars["volume"].iloc[-1]),
    "backwards": planted_column(lambda bars: bars["close"][::-1].ewm(span=5).mean()[::-1]),
    "length of the history": planted_column(lambda bars: pd.Series(np.arange(len(bars)) / len(bars))),
    "date of the next bar": planted_column(lambda bars: (bars["date"].shift(-1) - bars["date"]).dt.days),
    "next close of all": planted_panel(lambda close: np.roll(close, -1, axis=0) / close),
    "end of another ticker": planted_panel(lambda close: close + np.nan_to_num(close[-1, :1])),
    "number of tickers": planted_panel(lambda close: close / close.shape[1]),
    "sum in the order of the tickers": planted_panel(lambda close: close / np.nansum(close, axis=1, keepdims=True)),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_checker_catches_a_planted_look_ahead(monkeypatch, planted):
    monkeypatch.setitem(INDICATORS, "planted", PLANTED[planted]["planted"])
    with pytest.raises(ValueError, match=r"^planted until 20\d\d-\d\d-\d\d knows what comes after it: "):
        command.check_causality(["gap", "planted"])


def test_checker_refuses_what_it_could_not_try(monkeypatch):
    monkeypatch.setitem(INDICATORS, "planted", Indicator("planted", "test", lambda bars: bars.close * np.nan))
    with pytest.raises(ValueError, match="planted has no value in 330 days: nothing was tried"):
        command.check_causality(["planted"])


# --- no unit, no gaps ---


def assert_same_columns(values: np.ndarray, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    for column, name in enumerate(NAMES):
        np.testing.assert_allclose(values[:, column], expected[:, column], tolerance, tolerance, err_msg=name)


# Powers of two scale without rounding, so that 0/0 stays 0/0 and ties stay ties in halted and flat bars.
@settings(**NO_SHRINKING, max_examples=6)
@given(histories(), st.integers(-10, 10))
def test_every_column_is_free_of_the_price_level(bars, exponent):
    scaled = times(bars, 2.0**exponent)
    assert_same_columns(compute_indicators(scaled, NAMES), compute_indicators(bars, NAMES))


@settings(**NO_SHRINKING, max_examples=6)
@given(histories(halts=(0,)), st.floats(1e-3, 1e3))
def test_every_column_is_free_of_the_currency(bars, factor):
    assert_same_columns(compute_indicators(times(bars, factor), NAMES), compute_indicators(bars, NAMES))


@settings(**NO_SHRINKING, max_examples=6)
@given(histories(), st.integers(1, 6))
def test_every_column_is_free_of_the_unit_of_shares(bars, exponent):
    # In lots of a million shares the one that is added to volumes is nothing.
    lots = bars.assign(volume=bars["volume"].where(bars["volume"] > 0, 1.0) * 2.0**30)
    more = times(lots, 2.0**exponent, ["volume"])
    assert_same_columns(compute_indicators(more, NAMES), compute_indicators(lots, NAMES))


def test_every_column_of_the_panel_is_free_of_the_currency():
    command.check_units(PANEL)


@pytest.mark.parametrize("ticker", ["AAPL", "FB", "GOOG", "IBM", "MSFT"])
def test_sample_has_every_value_after_warm_up(sample, ticker):
    values = compute_indicators(sample[ticker], NAMES)
    assert values.shape == (len(sample[ticker]), len(NAMES))
    assert values.dtype == np.float64
    assert {name: int(n) for name, n in zip(NAMES, np.isnan(values[WARM_UP:]).sum(axis=0), strict=True) if n} == {}
    assert_same_columns(compute_indicators(times(sample[ticker], 2.0**-7), NAMES), values)


def test_columns_are_of_the_size_of_one(sample):
    values = compute_indicators(sample["IBM"], NAMES)[WARM_UP:]
    spread = dict(zip(NAMES, values.std(axis=0), strict=True))
    assert {name: size for name, size in spread.items() if not 0.05 < size < 3} == {}


def test_no_column_is_known_before_its_window_is_full():
    known = np.isfinite(compute_indicators(make_bars(300, 1), NAMES)).argmax(axis=0)
    windows = {name: int(re.search(r"_(\d+)$", name)[1]) for name in NAMES if re.search(r"_\d+$", name)}
    windows = {name: window for name, window in windows.items() if not name.startswith("fibonacci_level")}
    early = {name for name, window in windows.items() if known[NAMES.index(name)] < window - 1}
    assert early == set()
    assert len(windows) > 100


# Zero divided by zero in a window without movement; a value there would be rounding, or an accident of the library.
UNDEFINED_WITHOUT_MOVEMENT = [
    "close_location",
    "body_ratio",
    "stochastic_k",
    "stochastic_d",
    "cci_20",
    "williams_r_14",
    "realized_volatility_20",
    "parkinson_volatility_20",
    "garman_klass_volatility_20",
    "yang_zhang_volatility_20",
    "bollinger_position_20",
    "bollinger_width_20",
    "donchian_width_20",
    "downside_share_20",
    "mfi_14",
    "cmf_20",
    "obv_20",
    "close_to_vwma_20",
    "ultimate_oscillator",
    "vortex_14",
    "trend_fit_20",
    "efficiency_ratio_20",
    "choppiness_14",
    "return_skew_20",
    "return_kurtosis_20",
    "autocorrelation_20",
    "price_volume_correlation_20",
]


@pytest.mark.parametrize("name", UNDEFINED_WITHOUT_MOVEMENT)
def test_a_halted_price_has_no_position_in_its_range(name):
    for close in [0.1, 0.7, 3.3, 17.77, 42.1, 123.45, 467.54]:
        bars = make_bars(90, 1)
        bars.loc[40:, PRICES] = close
        bars.loc[40:, "volume"] = 0.0
        np.testing.assert_array_equal(column_of(bars, name)[40 + 29 :], np.nan, err_msg=f"at {close}")


@pytest.mark.parametrize("rows", [1, 2, 5, 14, 20])
def test_short_history_is_undefined_and_no_error(rows):
    values = compute_indicators(make_bars(rows, 1), [*NAMES, *PANEL])
    assert values.shape == (rows, len(INDICATORS))
    assert np.isnan(values[:, NAMES.index("scaled_return_60")]).all()
    assert np.isnan(values[:, len(NAMES) :]).all()


@pytest.mark.parametrize("rows", [5, 12, 23, 29, 45, 64, 120, 230])
def test_short_history_knows_what_a_longer_one_knows_of_it(rows):
    bars = make_bars(300, 2, flat=0.1)
    known = compute_indicators(bars, NAMES)[:rows]
    assert_same_columns(compute_indicators(bars[:rows], NAMES), known, tolerance=1e-9)


# --- values: TA-Lib ---


def relative(atr_like, window: int = 1):
    """A price distance in units of the close and of the volatility of some days, as the registry gives it."""
    return lambda bars: atr_like(bars) / (bars["close"] * ewma_volatility(bars["close"]) * window**0.5).to_numpy()


def over(level, window: int = 1):
    """The logarithm of close over a level in units of the volatility of some days, as the registry gives it."""
    return lambda bars: (
        np.log(bars["close"] / np.asarray(level(bars))) / (ewma_volatility(bars["close"]) * window**0.5)
    ).to_numpy()


def high_low_close(bars: pd.DataFrame) -> tuple:
    return bars["high"], bars["low"], bars["close"]


def log_returns(bars: pd.DataFrame) -> pd.Series:
    return np.log(bars["close"]).diff().fillna(0.0)


def talib_rsi(window: int):
    return lambda bars: talib.RSI(bars["close"], window) / 50 - 1


def talib_stochastic(line: int):
    def compute(bars):
        lines = talib.STOCH(*high_low_close(bars), fastk_period=14, slowk_period=3, slowd_period=3)
        return lines[line] / 50 - 1

    return compute


def talib_directional_movement(bars):
    return (talib.PLUS_DI(*high_low_close(bars), 14) - talib.MINUS_DI(*high_low_close(bars), 14)) / 100


def talib_bollinger_position(window: int):
    def compute(bars):
        upper, middle, _ = talib.BBANDS(bars["close"], window, 2.0, 2.0)
        return (bars["close"] - middle) / (upper - middle)

    return compute


def talib_bollinger_width(window: int):
    def compute(bars):
        upper, middle, lower = talib.BBANDS(bars["close"], window, 2.0, 2.0)
        return np.log((upper - lower) / middle / ewma_volatility(bars["close"]))

    return compute


def talib_williams(window: int):
    return lambda bars: talib.WILLR(*high_low_close(bars), window) / 50 + 1


def talib_obv(window: int):
    def compute(bars):
        line = pd.Series(talib.OBV(bars["close"], bars["volume"]))
        return line.diff(window) / bars["volume"].rolling(window).sum()

    return compute


def talib_slope(window: int):
    return lambda bars: (
        talib.LINEARREG_SLOPE(np.log(bars["close"]), window) * window**0.5 / ewma_volatility(bars["close"])
    )


def talib_fit(window: int):
    return lambda bars: talib.CORREL(np.log(bars["close"]), np.arange(len(bars), dtype=float), window)


def talib_kst(bars):
    terms = ((1, 10, 10), (2, 15, 10), (3, 20, 10), (4, 30, 15))
    line = sum(weight * talib.SMA(talib.ROC(bars["close"], roc), sma) for weight, roc, sma in terms)
    return line / 1000 / ewma_volatility(bars["close"]) / 20**0.5


def outside(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.array([(value < low) - (value > high) if value == value else math.nan for value in values], dtype=float)


def talib_bollinger_reversal(bars):
    upper, _, lower = talib.BBANDS(bars["close"], 20, 2.0, 2.0)
    return 1.0 * (bars["close"] < lower) - (bars["close"] > upper)


def talib_connors(bars):
    strength, average = talib.RSI(bars["close"], 2), talib.SMA(bars["close"], 200)
    return 1.0 * ((strength < 10) & (bars["close"] > average)) - ((strength > 90) & (bars["close"] < average))


def talib_breakout(window: int):
    def compute(bars):
        top, bottom, held = talib.MAX(bars["high"], window), talib.MIN(bars["low"], window), [math.nan]
        for day in range(1, len(bars)):
            close = bars["close"][day]
            held.append(1.0 if close > top[day - 1] else -1.0 if close < bottom[day - 1] else held[-1])
        return np.array(held)

    return compute


def talib_trend_score(bars):
    close, short, long = bars["close"], talib.SMA(bars["close"], 20), talib.SMA(bars["close"], 50)
    movement = talib_directional_movement(bars)
    votes = [close - short, short - long, talib.MACD(close, 12, 26, 9)[2], talib.RSI(close, 14) - 50, movement]
    return np.mean(np.sign(votes), axis=0)


TALIB = {
    "body_ratio": lambda bars: talib.BOP(bars["open"], *high_low_close(bars)),
    **{f"range_position_{n}": talib_williams(n) for n in (5, 10, 60)},
    **{f"high_distance_{n}": over(lambda bars, n=n: talib.MAX(bars["high"], n), n) for n in (5, 10, 20, 60, 250)},
    **{f"low_distance_{n}": over(lambda bars, n=n: talib.MIN(bars["low"], n), n) for n in (5, 10, 20, 60, 250)},
    **{f"close_to_ema_{n}": over(lambda bars, n=n: talib.EMA(bars["close"], n), n) for n in (5, 10, 20, 50, 200)},
    "close_to_kama_10": over(lambda bars: talib.KAMA(bars["close"], 10), 10),
    "macd_line": relative(lambda bars: talib.MACD(bars["close"], 12, 26, 9)[0], 26),
    "macd_signal": relative(lambda bars: talib.MACD(bars["close"], 12, 26, 9)[1], 26),
    "macd_histogram": relative(lambda bars: talib.MACD(bars["close"], 12, 26, 9)[2]),
    "adx_14": lambda bars: talib.ADX(*high_low_close(bars), 14) / 50 - 1,
    "directional_movement_14": talib_directional_movement,
    "aroon_25": lambda bars: talib.AROONOSC(bars["high"], bars["low"], 25) / 100,
    "psar_distance": over(lambda bars: talib.SAR(bars["high"], bars["low"], 0.02, 0.2), 10),
    "ichimoku_conversion": over(lambda bars: talib.MIDPRICE(bars["high"], bars["low"], 9), 9),
    "ichimoku_base": over(lambda bars: talib.MIDPRICE(bars["high"], bars["low"], 26), 26),
    **{f"trend_slope_{n}": talib_slope(n) for n in (20, 50, 100)},
    **{f"rsi_{n}": talib_rsi(n) for n in (7, 14, 21)},
    "stochastic_k": talib_stochastic(0),
    "stochastic_d": talib_stochastic(1),
    "cci_20": lambda bars: talib.CCI(*high_low_close(bars), 20) / 100,
    "williams_r_14": talib_williams(14),
    **{
        f"roc_{n}": lambda bars, n=n: talib.ROC(bars["close"], n) / 100 / ewma_volatility(bars["close"]) / n**0.5
        for n in (10, 20, 50)
    },
    "trix_15": lambda bars: talib.TRIX(bars["close"], 15) / 100 / ewma_volatility(bars["close"]),
    "ultimate_oscillator": lambda bars: talib.ULTOSC(*high_low_close(bars), 7, 14, 28) / 50 - 1,
    "kst": talib_kst,
    **{
        f"atr_{n}": lambda bars, n=n: np.log(relative(lambda bars: talib.ATR(*high_low_close(bars), n))(bars))
        for n in (5, 10, 14, 21)
    },
    **{f"bollinger_position_{n}": talib_bollinger_position(n) for n in (20, 50)},
    **{f"bollinger_width_{n}": talib_bollinger_width(n) for n in (20, 50)},
    **{f"donchian_position_{n}": talib_williams(n) for n in (20, 55)},
    "mfi_14": lambda bars: talib.MFI(*high_low_close(bars), bars["volume"], 14) / 50 - 1,
    "chaikin_oscillator": lambda bars: (
        talib.ADOSC(*high_low_close(bars), bars["volume"], 3, 10) / bars["volume"].rolling(20).mean()
    ),
    **{f"obv_{n}": talib_obv(n) for n in (20, 60)},
    "fibonacci_position": talib_williams(100),
    **{f"trend_fit_{n}": talib_fit(n) for n in (20, 50, 100)},
    **{
        f"autocorrelation_{n}": lambda bars, n=n: talib.CORREL(
            log_returns(bars), log_returns(bars).shift(fill_value=0.0), n
        )
        for n in (20, 60)
    },
    **{
        f"price_volume_correlation_{n}": lambda bars, n=n: talib.CORREL(
            log_returns(bars), np.log(bars["volume"] + 1).diff().fillna(0.0), n
        )
        for n in (5, 20, 60)
    },
    "rsi_reversal": lambda bars: outside(talib.RSI(bars["close"], 14), 30, 70),
    "bollinger_reversal": talib_bollinger_reversal,
    "connors_reversal": talib_connors,
    "engulfing": lambda bars: np.sign(talib.CDLENGULFING(*(bars[name] for name in PRICES))),
    **{f"channel_breakout_{n}": talib_breakout(n) for n in (20, 55)},
    "golden_cross": lambda bars: np.sign(talib.SMA(bars["close"], 50) - talib.SMA(bars["close"], 200)),
    **{
        f"price_crossover_{n}": lambda bars, n=n: np.sign(bars["close"] - talib.SMA(bars["close"], n)).diff() / 2
        for n in (20, 50)
    },
    "macd_cross": lambda bars: np.sign(talib.MACD(bars["close"], 12, 26, 9)[2]),
    "psar_direction": lambda bars: np.sign(bars["close"] - talib.SAR(bars["high"], bars["low"], 0.02, 0.2)),
    "trend_score": talib_trend_score,
    **{f"time_series_momentum_{n}": lambda bars, n=n: np.sign(talib.MOM(bars["close"], n)) for n in (60, 120, 250)},
}


def untied(bars: pd.DataFrame) -> pd.DataFrame:
    """Prices in cents tie, and rounding then decides between up and down; nothing ties after this."""
    return times(bars, np.random.default_rng(1).uniform(0.99999, 1.00001, len(bars)))


@pytest.mark.parametrize("name", TALIB)
def test_column_equals_talib(sample, name):
    for ticker in ("MSFT", "IBM"):
        bars = untied(sample[ticker])
        # Recursive averages forget how they were started: (13/14)^250 is 1e-8.
        np.testing.assert_allclose(column_of(bars, name)[250:], TALIB[name](bars)[250:], rtol=1e-6, atol=1e-6)


# --- values: pandas-ta-classic ---


def library_vortex(bars):
    lines = ta.vortex(*high_low_close(bars), length=14)
    return lines["VTXP_14"] - lines["VTXM_14"]


def library_ichimoku(bars):
    return ta.ichimoku(*high_low_close(bars), as_dataframe=True, lookahead=False)


def library_cloud(bars):
    lines = library_ichimoku(bars)[["ISA_9", "ISB_26"]]
    return np.clip(bars["close"].to_numpy(), lines.min(axis=1, skipna=False), lines.max(axis=1, skipna=False))


def library_cloud_width(bars):
    lines = library_ichimoku(bars)
    return np.log(lines["ISA_9"] / lines["ISB_26"]) / ewma_volatility(bars["close"]) / 52**0.5


def library_keltner_position(bars):
    _, middle, upper = ta.kc(*high_low_close(bars), length=20, scalar=2).to_numpy().T
    return (bars["close"] - middle) / (upper - middle)


def library_keltner_width(bars):
    lower, middle, upper = ta.kc(*high_low_close(bars), length=20, scalar=2).to_numpy().T
    return np.log((upper - lower) / middle / ewma_volatility(bars["close"]))


def library_donchian_width(window: int):
    def compute(bars):
        lower, _, upper = ta.donchian(bars["high"], bars["low"], window, window).to_numpy().T
        return np.log(np.log(upper / lower) / ewma_volatility(bars["close"]) / window**0.5)

    return compute


def library_kurtosis(window: int):
    def compute(bars):
        excess = ta.kurtosis(np.log(bars["close"]).diff(), length=window)
        return np.sign(excess) * np.log1p(excess.abs())

    return compute


def library_pvt(bars):
    line = ta.pvt(bars["close"], bars["volume"]).fillna(0.0)
    change = line.diff(20) / 100 / bars["volume"].rolling(20).sum()
    return change.where(np.arange(len(bars)) > 19) * 20**0.5 / ewma_volatility(bars["close"])


LIBRARY = {
    "close_to_hma_20": over(lambda bars: ta.hma(bars["close"], length=20), 4),
    "supertrend_distance": over(
        lambda bars: ta.supertrend(*high_low_close(bars), length=10, multiplier=3.0).iloc[:, 0].where(lambda x: x > 0),
        10,
    ),
    "ichimoku_cloud": over(library_cloud, 52),
    "ichimoku_cloud_width": library_cloud_width,
    "vortex_14": library_vortex,
    "tsi": lambda bars: ta.tsi(bars["close"], fast=13, slow=25).iloc[:, 0] / 100,
    "stochastic_rsi_14": lambda bars: ta.stochrsi(bars["close"], length=14, rsi_length=14, k=3).iloc[:, 0] / 50 - 1,
    "awesome_oscillator": relative(lambda bars: ta.ao(bars["high"], bars["low"], fast=5, slow=34), 34),
    "keltner_position_20": library_keltner_position,
    "keltner_width_20": library_keltner_width,
    **{f"donchian_width_{n}": library_donchian_width(n) for n in (20, 55)},
    "ulcer_index_14": lambda bars: ta.ui(bars["close"], length=14) / 100 / ewma_volatility(bars["close"]) / 14**0.5,
    "price_volume_trend_20": library_pvt,
    **{
        f"close_to_vwma_{n}": over(lambda bars, n=n: ta.vwma(bars["close"], bars["volume"], length=n), n)
        for n in (20, 50)
    },
    "force_index_13": relative(
        lambda bars: ta.efi(bars["close"], bars["volume"], length=13) / bars["volume"].rolling(20).mean()
    ),
    **{f"efficiency_ratio_{n}": lambda bars, n=n: ta.er(bars["close"], length=n) for n in (10, 20)},
    "choppiness_14": lambda bars: ta.chop(*high_low_close(bars), length=14) / 50 - 1,
    **{f"return_skew_{n}": lambda bars, n=n: ta.skew(np.log(bars["close"]).diff(), length=n) for n in (10, 20, 60)},
    **{f"return_kurtosis_{n}": library_kurtosis(n) for n in (10, 20, 60)},
    "supertrend_direction": lambda bars: (
        ta.supertrend(*high_low_close(bars), length=10, multiplier=3.0).iloc[:, 1].where(bars.index >= 10)
    ),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_column_equals_the_library(sample, name):
    for ticker in ("MSFT", "FB"):
        bars = sample[ticker]
        np.testing.assert_allclose(column_of(bars, name), LIBRARY[name](bars), rtol=1e-8, atol=1e-8)


def test_engulfing_needs_more_than_equal_bodies():
    bars = make_bars(400, 1)
    bars[["open", "close"]] = np.random.default_rng(0).integers(10, 14, (400, 2)).astype(float)
    bars["high"], bars["low"] = bars[["open", "close"]].max(axis=1) + 1, bars[["open", "close"]].min(axis=1) - 1
    expected = np.sign(talib.CDLENGULFING(*(bars[name] for name in PRICES)))
    repeated = (bars["open"] == bars["close"].shift()) & (bars["close"] == bars["open"].shift())
    assert min(np.sum(expected == 1), np.sum(expected == -1), np.sum(repeated)) > 10
    np.testing.assert_array_equal(column_of(bars, "engulfing")[2:], expected[2:])


# Recursive averages, of which TA-Lib sees only what is left of their beginning.
BEGINNINGS = {
    "rsi_14": lambda bars: ta.rsi(bars["close"], length=14) / 50 - 1,
    "adx_14": lambda bars: ta.adx(*high_low_close(bars), length=14)["ADX_14"] / 50 - 1,
    "directional_movement_14": lambda bars: (
        ta.adx(*high_low_close(bars), length=14)[["DMP_14", "DMN_14"]] @ np.array([0.01, -0.01])
    ),
    "macd_line": relative(lambda bars: ta.macd(bars["close"]).iloc[:, 0], 26),
    "macd_signal": relative(lambda bars: ta.macd(bars["close"]).iloc[:, 2], 26),
    "macd_histogram": relative(lambda bars: ta.macd(bars["close"]).iloc[:, 1]),
    "atr_14": lambda bars: np.log(relative(lambda bars: ta.atr(*high_low_close(bars), length=14))(bars)),
    "close_to_ema_50": over(lambda bars: ta.ema(bars["close"], length=50), 50),
    "trix_15": lambda bars: ta.trix(bars["close"], length=15).iloc[:, 0] / 100 / ewma_volatility(bars["close"]),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_column_begins_as_the_library(sample, name):
    expected = np.asarray(BEGINNINGS[name](sample["MSFT"]))
    assert 10 < np.isfinite(expected).argmax() < 60
    np.testing.assert_allclose(column_of(sample["MSFT"], name), expected, rtol=1e-8, atol=1e-8)


def test_aroon_counts_from_the_newest_of_equal_extremes():
    bars = make_bars(200, 1)
    bars[PRICES] = bars[PRICES].round(-1) + 10
    assert bars["high"].rolling(26).apply(lambda window: (window == window.max()).sum() > 1).sum() > 50
    np.testing.assert_allclose(
        column_of(bars, "aroon_25"), ta.aroon(bars["high"], bars["low"], length=25)["AROONOSC_25"] / 100, atol=1e-12
    )


def test_installing_talib_changes_nothing(sample, monkeypatch):
    bars = sample["FB"]
    assert sys.modules["pandas_ta_classic.overlap.kama"].Imports is ta.Imports
    monkeypatch.setitem(ta.Imports, "talib", False)
    without = compute_indicators(bars, NAMES)
    monkeypatch.setitem(ta.Imports, "talib", True)
    np.testing.assert_array_equal(compute_indicators(bars, NAMES), without)
    monkeypatch.setitem(sys.modules, "talib", None)
    with pytest.raises(ImportError):
        ta.kama(bars["close"], talib=True)
    np.testing.assert_array_equal(compute_indicators(bars, NAMES), without)


# --- values: plain loops ---


def volatility_loop(close: list[float], row: int, alpha: float = 0.06, min_periods: int = 20) -> float:
    if row < min_periods:
        return math.nan
    squares = [math.log(close[i] / close[i - 1]) ** 2 for i in range(row, 0, -1)]
    weights = [(1 - alpha) ** age for age in range(row)]
    return max(math.sqrt(sum(map(mul, weights, squares)) / sum(weights)), 1e-4)


@settings(**NO_SHRINKING, max_examples=10)
@given(histories(), st.floats(0.01, 0.5), st.integers(1, 60))
def test_volatility_equals_its_closed_form(bars, alpha, min_periods):
    close = bars["close"][:200]
    values = ewma_volatility(close, alpha, min_periods)
    expected = [volatility_loop(close.tolist(), row, alpha, min_periods) for row in range(len(close))]
    np.testing.assert_allclose(values, expected, rtol=1e-9)


def test_volatility_of_a_constant_price_is_not_zero():
    assert ewma_volatility(pd.Series([7.0] * 40)).iloc[-1] == 1e-4


def test_volatility_defaults_to_riskmetrics(sample):
    close = sample["FB"]["close"]
    expected = [volatility_loop(close.tolist(), row) for row in range(len(close))]
    np.testing.assert_allclose(ewma_volatility(close), expected, rtol=1e-9)


# Each takes the bars up to a day, that day last, and their volatilities.


def log_ratio(one, other, window: int = 1):
    return lambda bars, sigma: math.log(one(bars) / other(bars)) / (sigma[-1] * math.sqrt(window))


def close(bars):
    return bars[-1].close


def body_top(bars):
    return max(bars[-1].open, bars[-1].close)


def body_bottom(bars):
    return min(bars[-1].open, bars[-1].close)


def day_range(bars):
    return bars[-1].high - bars[-1].low


def overnight(bars, day: int) -> float:
    return math.log(bars[-day].open / bars[-day - 1].close)


def intraday(bars, day: int) -> float:
    return math.log(bars[-day].close / bars[-day].open)


def daily(bars, day: int) -> float:
    return math.log(bars[-day].close / bars[-day - 1].close)


def summed(part, window: int):
    return lambda bars, sigma: sum(part(bars, day) for day in range(1, window + 1)) / (sigma[-1] * math.sqrt(window))


def close_location(bars, _=None):
    bar = bars[-1]
    return ((bar.close - bar.low) - (bar.high - bar.close)) / (bar.high - bar.low)


def volume_ratio(one, other):
    return lambda bars, _: math.log((one(bars) + 1) / (other(bars) + 1))


def mean_volume(window: int):
    return lambda bars: fmean(bar.volume for bar in bars[-window:])


def volume_of(day: int):
    return lambda bars: bars[-1 - day].volume


def up_share(window: int):
    return lambda bars, _: 2 * fmean(bars[-k].close > bars[-k - 1].close for k in range(1, window + 1)) - 1


def estimate(variance, window: int):
    """The logarithm of a volatility over that of the day, from the mean of daily variances."""
    return lambda bars, sigma: math.log(
        math.sqrt(fmean(variance(bars, day) for day in range(1, window + 1))) / sigma[-1]
    )


def parkinson(bars, day):
    return math.log(bars[-day].high / bars[-day].low) ** 2 / (4 * math.log(2))


def garman_klass(bars, day):
    range_, move = math.log(bars[-day].high / bars[-day].low), math.log(bars[-day].close / bars[-day].open)
    return 0.5 * range_**2 - (2 * math.log(2) - 1) * move**2


def rogers_satchell(bars, day):
    bar = bars[-day]
    up, down, move = (math.log(price / bar.open) for price in (bar.high, bar.low, bar.close))
    return up * (up - move) + down * (down - move)


def yang_zhang(bars, sigma):
    nights, days = ([part(bars, day) for day in range(1, 21)] for part in (overnight, intraday))
    share = 0.34 / (1.34 + 21 / 19)
    variance = np.var(nights, ddof=1) + share * np.var(days, ddof=1)
    variance += (1 - share) * fmean(rogers_satchell(bars, day) for day in range(1, 21))
    return math.log(math.sqrt(variance) / sigma[-1])


def downside_share(window: int):
    def compute(bars, _):
        returns = [daily(bars, day) for day in range(1, window + 1)]
        return 2 * sum(x * x for x in returns if x < 0) / sum(x * x for x in returns) - 1

    return compute


def overnight_share(bars, _):
    nights, days = (sum(part(bars, day) ** 2 for day in range(1, 21)) for part in (overnight, intraday))
    return 2 * nights / (nights + days) - 1


def cmf(bars, _):
    """Chaikin's money flow; a bar without range adds no flow."""
    flows = [close_location([bar]) * bar.volume for bar in bars[-20:] if bar.high > bar.low]
    return sum(flows) / sum(bar.volume for bar in bars[-20:])


def illiquidity(bars, _):
    price_moves = [abs(daily(bars, day)) / (bars[-day].close * (bars[-day].volume + 1)) for day in range(1, 121)]
    return math.log(fmean(price_moves[:20]) / fmean(price_moves))


def retracement(permille: int):
    def level(bars):
        high, low = max(bar.high for bar in bars[-100:]), min(bar.low for bar in bars[-100:])
        return high - permille / 1000 * (high - low)

    return level


def fibonacci_nearest(bars, sigma):
    levels = [retracement(permille)(bars) for permille in (0, 236, 382, 500, 618, 786, 1000)]
    nearest = min(levels, key=lambda level: abs(level - bars[-1].close))
    return math.log(bars[-1].close / nearest) / (sigma[-1] * math.sqrt(5))


def fibonacci_swing(bars, _):
    window = bars[-100:]
    top, bottom = max(bar.high for bar in window), min(bar.low for bar in window)
    newest = next(bar for bar in reversed(window) if bar.high == top or bar.low == bottom)
    end = bottom if newest.low == bottom and newest.high < top else top
    return (bars[-1].close - end) / (top - bottom)


def variance_ratio(bars, _):
    weekly = [math.log(bars[-day].close / bars[-day - 5].close) ** 2 for day in range(1, 61)]
    return math.log(fmean(weekly) / (5 * fmean(daily(bars, day) ** 2 for day in range(1, 61))))


def volatility_ratio(bars, _):
    squares = [daily(bars, day) ** 2 for day in range(1, 22)]
    return math.log(fmean(squares[:5]) / fmean(squares)) / 2


def skipping_momentum(bars, sigma):
    return max(-1, min(1, math.log(bars[-21].close / bars[-251].close) / (sigma[-1] * math.sqrt(230))))


def streak(bars, _):
    sides = [(bars[k].close > bars[k - 1].close) - (bars[k].close < bars[k - 1].close) for k in range(1, len(bars))]
    length = next((age for age, side in enumerate(reversed(sides)) if side != sides[-1]), len(sides))
    return sides[-1] * length


def activity(bars, sigma, row: int) -> float:
    """Of one session, before it is smoothed."""
    if row < 20:
        return math.nan
    move = abs(math.log(bars[row].close / bars[row - 1].close)) / sigma[row - 1]
    volume = (bars[row].volume + 1) / (fmean(bar.volume for bar in bars[row - 19 : row + 1]) + 1)
    return min(move, 6) * math.sqrt(max(volume, 1))


def season(quarters, window: int):
    def counterparts(bars, sigma, quarter: int) -> list[float]:
        rows = [len(bars) - 1 + ahead - round(62.9 * quarter) for ahead in range(1, window + 1)]
        days = [[activity(bars, sigma, row + near) for near in (-1, 0, 0, 1)] for row in rows]
        return [fmean(four) for four in days]

    def loop(bars, sigma):
        past = [counterparts(bars, sigma, quarter) for quarter in quarters]
        return math.log(fmean(max(peaks) for peaks in past if not any(map(math.isnan, peaks))))

    return loop


def cycle(wave, phase):
    return lambda bars, _: wave(2 * math.pi * phase(bars[-1].date))


def wave_pair(name: str, phase):
    return {f"{name}_sin": (0, cycle(math.sin, phase)), f"{name}_cos": (0, cycle(math.cos, phase))}


def month_days(date) -> int:
    return calendar.monthrange(date.year, date.month)[1]


def week_begins(bars, _):
    return float(bars[-1].date.isocalendar()[:2] != bars[-2].date.isocalendar()[:2])


CALENDAR = {
    **wave_pair("day_of_week", lambda date: date.weekday() / 7),
    **wave_pair("day_of_month", lambda date: (date.day - 1) / month_days(date)),
    **wave_pair("week_of_year", lambda date: (date.timetuple().tm_yday - 1) // 7 / 53),
    **wave_pair("month", lambda date: (date.month - 1) / 12),
    **wave_pair("quarter", lambda date: (date.month - 1) // 3 / 4),
    "days_to_month_end": (0, lambda bars, _: (month_days(bars[-1].date) - bars[-1].date.day) / 15 - 1),
    "days_since_last_bar": (1, lambda bars, _: math.log((bars[-1].date - bars[-2].date).days)),
    "first_bar_of_week": (1, week_begins),
    "first_bar_of_month": (1, lambda bars, _: float(bars[-1].date.month != bars[-2].date.month)),
}

# name: (bars that must precede the day, function)
LOOPS = {
    "gap": (1, log_ratio(lambda bars: bars[-1].open, lambda bars: bars[-2].close)),
    "body": (0, log_ratio(close, lambda bars: bars[-1].open)),
    "true_range": (
        1,
        log_ratio(lambda bars: max(bars[-1].high, bars[-2].close), lambda bars: min(bars[-1].low, bars[-2].close)),
    ),
    "close_location": (0, close_location),
    "upper_shadow": (0, log_ratio(lambda bars: bars[-1].high, body_top)),
    "lower_shadow": (0, log_ratio(body_bottom, lambda bars: bars[-1].low)),
    "day_range": (0, log_ratio(lambda bars: bars[-1].high, lambda bars: bars[-1].low)),
    "upper_shadow_ratio": (0, lambda bars, _: (bars[-1].high - body_top(bars)) / day_range(bars)),
    "lower_shadow_ratio": (0, lambda bars, _: (body_bottom(bars) - bars[-1].low) / day_range(bars)),
    **{
        f"scaled_return_{n}": (n, log_ratio(close, lambda bars, n=n: bars[-1 - n].close, n))
        for n in (1, 2, 3, 5, 10, 20, 60, 120, 250)
    },
    **{f"overnight_return_{n}": (n, summed(overnight, n)) for n in (5, 20)},
    **{f"intraday_return_{n}": (n - 1, summed(intraday, n)) for n in (5, 20)},
    **{f"return_lag_{n}": (n + 1, lambda bars, sigma, n=n: daily(bars, n + 1) / sigma[-1]) for n in (1, 2, 3, 5, 10)},
    **{f"high_lag_{n}": (n, log_ratio(lambda bars, n=n: bars[-1 - n].high, close, n)) for n in (1, 2, 3, 5, 10)},
    **{f"low_lag_{n}": (n, log_ratio(lambda bars, n=n: bars[-1 - n].low, close, n)) for n in (1, 2, 3, 5, 10)},
    **{f"volume_lag_{n}": (19, volume_ratio(volume_of(n), mean_volume(20))) for n in (1, 2, 3, 5, 10)},
    **{
        f"close_to_sma_{n}": (n - 1, log_ratio(close, lambda bars, n=n: fmean(bar.close for bar in bars[-n:]), n))
        for n in (5, 10, 20, 50, 200)
    },
    **{f"up_share_{n}": (n, up_share(n)) for n in (10, 20)},
    **{f"realized_volatility_{n}": (n, estimate(lambda bars, day: daily(bars, day) ** 2, n)) for n in (5, 20, 60)},
    **{f"parkinson_volatility_{n}": (n - 1, estimate(parkinson, n)) for n in (10, 20)},
    **{f"garman_klass_volatility_{n}": (n - 1, estimate(garman_klass, n)) for n in (10, 20)},
    "rogers_satchell_volatility_20": (19, estimate(rogers_satchell, 20)),
    "yang_zhang_volatility_20": (20, yang_zhang),
    **{f"downside_share_{n}": (n, downside_share(n)) for n in (20, 60)},
    "overnight_share_20": (20, overnight_share),
    **{f"volatility_change_{n}": (n, lambda _, sigma, n=n: math.log(sigma[-1] / sigma[-1 - n])) for n in (5, 20)},
    **{f"relative_volume_{n}": (n - 1, volume_ratio(volume_of(0), mean_volume(n))) for n in (5, 20, 60)},
    "volume_change": (1, volume_ratio(volume_of(0), volume_of(1))),
    **{f"volume_growth_{n}": (n, volume_ratio(volume_of(0), volume_of(n))) for n in (5, 10, 21)},
    "cmf_20": (19, cmf),
    "volume_dispersion_20": (
        20,
        lambda bars, _: np.std([math.log((bars[-k].volume + 1) / (bars[-k - 1].volume + 1)) for k in range(1, 21)]),
    ),
    "illiquidity": (120, illiquidity),
    **{f"fibonacci_level_{n}": (99, log_ratio(close, retracement(n), 100)) for n in (236, 382, 500, 618, 786)},
    "fibonacci_nearest": (99, fibonacci_nearest),
    "fibonacci_swing": (99, fibonacci_swing),
    **{
        f"volatility_level_{n}": (n + 19, lambda _, sigma, n=n: math.log(sigma[-1] / fmean(sigma[-n:])))
        for n in (60, 250)
    },
    "volatility_ratio": (21, volatility_ratio),
    "variance_ratio_60": (64, variance_ratio),
    "momentum_12_1": (250, skipping_momentum),
    "streak": (1, streak),
    **{f"quarter_season_{n}": (62, season(range(1, 13), n)) for n in (1, 5)},
    **{f"year_season_{n}": (251, season((4, 8, 12), n)) for n in (1, 5)},
    **CALENDAR,
}


class History:
    """Bars as a loop takes them, with the volatility of each."""

    def __init__(self, bars: pd.DataFrame):
        self.frame, self.rows, closes = bars, list(bars.itertuples()), bars["close"].tolist()
        self.volatilities = [volatility_loop(closes, row) for row in range(len(closes))]

    def loop(self, name: str) -> list[float]:
        history, compute = LOOPS[name]
        return [self._value(compute, row) if row >= history else math.nan for row in range(len(self.rows))]

    def _value(self, compute, row: int) -> float:
        try:
            return compute(self.rows[: row + 1], self.volatilities[: row + 1])
        except (ZeroDivisionError, ValueError):  # 0/0, or the logarithm of zero
            return math.nan


@pytest.fixture(scope="module")
def irregular() -> list[History]:
    """One without a third of its days, one that was halted for a month."""
    kept = np.random.default_rng(0).random(280) < 0.7
    holidays = make_bars(280, 5, flat=0.2, unsold=0.2)[kept].reset_index(drop=True)
    return [History(holidays), History(make_bars(280, 6, unsold=0.1, halt=30))]


@pytest.mark.parametrize("name", LOOPS)
def test_column_equals_its_plain_loop(irregular, name):
    for history in irregular:
        np.testing.assert_allclose(column_of(history.frame, name), history.loop(name), rtol=1e-9, atol=1e-9)


# --- values: the panel ---


class Market:
    """The price table as the loops over tickers take it: bars by ticker, all loops in Python."""

    def __init__(self, table: pd.DataFrame):
        self.table = table
        self.histories = {ticker: History(bars.reset_index(drop=True)) for ticker, bars in table.groupby("ticker")}
        self.day = {
            (ticker, bar.date): number
            for ticker, history in self.histories.items()
            for number, bar in enumerate(history.rows)
        }

    def scaled_return(self, ticker: str, number: int, window: int) -> float:
        rows, sigma = self.histories[ticker].rows, self.histories[ticker].volatilities
        if number < window:
            return math.nan
        return math.log(rows[number].close / rows[number - window].close) / (sigma[number] * math.sqrt(window))

    def of_all(self, function, date) -> dict[str, float]:
        """A function of (ticker, number of the bar) for all tickers that have a value on a date."""
        values = {
            ticker: function(ticker, self.day[ticker, date]) for ticker in self.histories if (ticker, date) in self.day
        }
        return {ticker: value for ticker, value in values.items() if not math.isnan(value)}

    def mean(self, function, date) -> float:
        values = self.of_all(function, date).values()
        return fmean(values) if len(values) >= MIN_TICKERS else math.nan

    def rank(self, function, ticker: str, number: int) -> float:
        values = self.of_all(function, self.histories[ticker].rows[number].date)
        if ticker not in values or len(values) < MIN_TICKERS:
            return math.nan
        place = scipy.stats.rankdata(list(values.values()))[list(values).index(ticker)]
        return (2 * place - 1) / len(values) - 1

    def daily(self, ticker: str, number: int) -> float:
        return daily(self.histories[ticker].rows[: number + 1], 1) if number else math.nan

    def returns(self, ticker: str, number: int, window: int) -> tuple[list[float], list[float]]:
        """Daily returns of the window, and the market's of the same days."""
        if number < window:
            return [math.nan] * window, [math.nan] * window
        numbers = range(number - window + 1, number + 1)
        dates = [self.histories[ticker].rows[one].date for one in numbers]
        return [self.daily(ticker, one) for one in numbers], [self.mean(self.daily, date) for date in dates]


def return_rank(window: int):
    return lambda market, *day: market.rank(lambda *other: market.scaled_return(*other, window), *day)


def relative_return(window: int):
    def compute(market, ticker, number):
        date = market.histories[ticker].rows[number].date
        mean = market.mean(lambda *other: market.scaled_return(*other, window), date)
        return market.scaled_return(ticker, number, window) - mean

    return compute


def volume_over_mean(market, ticker, number):
    rows = market.histories[ticker].rows[: number + 1]
    return volume_ratio(volume_of(0), mean_volume(20))(rows, None) if len(rows) >= 20 else math.nan


def beta(market, ticker, number):
    own, others = market.returns(ticker, number, 60)
    return math.nan if math.isnan(sum(own) + sum(others)) else scipy.stats.linregress(others, own).slope


def market_residual(window: int):
    def compute(market, ticker, number):
        own, others = market.returns(ticker, number, window)
        sigma = market.histories[ticker].volatilities[number]
        return (sum(own) - beta(market, ticker, number) * sum(others)) / (sigma * math.sqrt(window))

    return compute


PANEL_LOOPS = {
    **{f"return_rank_{n}": return_rank(n) for n in (1, 5, 20, 60)},
    "volatility_rank": lambda market, *day: market.rank(
        lambda ticker, number: market.histories[ticker].volatilities[number], *day
    ),
    "volume_rank": lambda market, *day: market.rank(lambda *other: volume_over_mean(market, *other), *day),
    **{f"relative_return_{n}": relative_return(n) for n in (1, 5, 20)},
    "market_beta_60": beta,
    "market_correlation_60": lambda market, *day: np.corrcoef(market.returns(*day, 60))[0, 1],
    **{f"market_residual_{n}": market_residual(n) for n in (1, 5, 20)},
}


@pytest.fixture(scope="module")
def market() -> Market:
    return Market(make_market())


@pytest.mark.parametrize("name", PANEL_LOOPS)
def test_column_of_the_panel_equals_its_plain_loop(market, name):
    values = dict(compute_panel(market.table, [name]))[name]
    days = [*range(0, len(values), 7), *range(len(values) - 3, len(values))]
    expected = [
        PANEL_LOOPS[name](market, bar.ticker, market.day[bar.ticker, bar.date])
        for bar in market.table.iloc[days].itertuples()
    ]
    assert np.isfinite(expected).sum() > 50
    np.testing.assert_allclose(values[days], expected, rtol=1e-9, atol=1e-9)


def test_columns_of_the_panel_are_of_the_size_of_one():
    table = command.random_market(MIN_TICKERS + 2, 1)
    spread = {name: np.nanstd(values) for name, values in compute_panel(table, PANEL)}
    assert {name: size for name, size in spread.items() if not 0.05 < size < 3} == {}


def test_tickers_may_have_any_names():
    table = make_market()
    renamed = table.assign(ticker=table["ticker"].map(lambda ticker: f"{99 - int(ticker[1:])}"))
    order = renamed.sort_values(["ticker", "date"]).index
    for (name, values), (_, other) in zip(
        compute_panel(table, PANEL), compute_panel(renamed.loc[order].reset_index(drop=True), PANEL), strict=True
    ):
        np.testing.assert_array_equal(values[order], other, err_msg=name)


def test_a_panel_needs_enough_tickers():
    table = make_market()
    few = table[table["ticker"] < f"T{MIN_TICKERS - 1:02}"]
    enough = table[table["ticker"] <= f"T{MIN_TICKERS - 1:02}"]
    for name, values in compute_panel(few, PANEL):
        assert np.isnan(values).all(), name
    for name, values in compute_panel(enough, PANEL):
        assert np.isfinite(values).any(), name
        first = enough["date"][np.isfinite(values)].min()
        assert (enough["date"] == first).sum() == MIN_TICKERS
    assert list(compute_panel(table, NAMES)) == []


def test_mean_of_the_tickers_is_exact():
    matrix = np.random.default_rng(0).normal(0, 1e8, (50, 40)) ** 3
    matrix[:, 30:] = np.nan
    matrix[3, 4:] = np.inf
    means = cross_mean(matrix)
    np.testing.assert_array_equal(means, cross_mean(matrix[:, ::-1]))
    np.testing.assert_array_equal(means, cross_mean(matrix[:, :30]))
    np.testing.assert_array_equal(np.isnan(means), np.arange(50) == 3)
    assert means[0] == math.fsum(matrix[0, :30]) / 30


def test_rank_of_the_tickers_shares_ties():
    matrix = np.random.default_rng(0).integers(0, 6, (30, 14)).astype(float)
    matrix[:, 12] = np.nan
    matrix[5, :4] = np.nan
    ranks = cross_rank(matrix)
    for values, rank in zip(matrix, ranks, strict=True):
        known = np.isfinite(values)
        np.testing.assert_array_equal(np.isnan(rank), ~known | (known.sum() < MIN_TICKERS))
        expected = (2 * scipy.stats.rankdata(values[known]) - 1) / known.sum() - 1
        np.testing.assert_allclose(rank[known], expected if known.sum() >= MIN_TICKERS else np.nan)
    assert np.isnan(ranks[5]).all()


def test_every_column_has_a_reference():
    assert sorted([*TALIB, *LIBRARY, *LOOPS, *PANEL_LOOPS]) == sorted(INDICATORS)


# --- windows ---


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=70),
    st.integers(1, 75),
    st.sampled_from([(np.add, "sum"), (np.maximum, "max"), (np.minimum, "min")]),
)
def test_rolling_equals_pandas(values, window, operation):
    expected = getattr(pd.Series(values).rolling(window), operation[1])()
    np.testing.assert_allclose(rolling(operation[0], np.array(values), window), expected, rtol=1e-9, atol=1e-4)


def test_a_window_forgets_what_left_it():
    values = np.array([1e16, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    assert rolling(np.add, values, 3)[3:].tolist() == [4.0, 3.0, 0.0, 0.0]


# --- the registry ---

GROUPS = [
    "price",
    "return",
    "lag",
    "trend",
    "momentum",
    "volatility",
    "volume",
    "fibonacci",
    "time",
    "market_regime",
    "signals",
    "relation",
    "season",
]


def test_there_are_enough_columns():
    assert len(INDICATORS) >= 60
    assert all(column.name == name for name, column in INDICATORS.items())
    assert list(dict.fromkeys(column.group for column in INDICATORS.values())) == GROUPS
    assert {column.group for column in INDICATORS.values() if column.panel} == {"relation"}
    assert [name for name, column in INDICATORS.items() if not column.summary.endswith(".")] == []


@pytest.fixture
def registry(monkeypatch):
    """What a test registers leaves with it: a name that stayed would enter other tests."""
    before = dict(INDICATORS)
    yield INDICATORS
    INDICATORS.clear()
    INDICATORS.update(before)


def test_registration(registry):
    before = set(registry)

    @indicator("test")
    def planted(bars):
        return bars.close / bars.open

    @indicator("test", windows=(3, 5))
    def planted_ratio(bars, window):
        """The ratio.

        More of it.
        """
        return bars.frame["close"] / bars.frame["close"].shift(window)

    names = ["planted", "planted_ratio_3", "planted_ratio_5"]
    assert [name for name in registry if name not in before] == names
    assert [registry[name].summary for name in names] == ["", "The ratio.", "The ratio."]
    bars = make_bars(20, 1)
    expected = np.stack([planted(Bars(bars)), planted_ratio(Bars(bars), 3), planted_ratio(Bars(bars), 5)], axis=1)
    np.testing.assert_array_equal(compute_indicators(bars, names), expected)


def test_registration_of_a_panel(registry):
    @panel_indicator("test", windows=(2, 3))
    def planted(panel, days):
        return panel.each(lambda bars, rows: bars.close * days + 1e6 * rows)

    market = make_market(3, 30)
    dates = sorted(market["date"].unique())
    for days, (name, values) in zip((2, 3), compute_panel(market, ["planted_2", "planted_3"]), strict=True):
        assert name == f"planted_{days}"
        expected = [days * bar.close + 1e6 * dates.index(bar.date) for bar in market.itertuples()]
        np.testing.assert_allclose(values, expected)


def test_columns_come_in_the_order_asked_for():
    bars = make_bars(100, 1)
    values = compute_indicators(bars, ["rsi_14", "return_rank_5", "gap"])
    expected = compute_indicators(bars, NAMES)
    np.testing.assert_array_equal(values[:, [0, 2]], expected[:, [NAMES.index("rsi_14"), 0]])
    assert NAMES[0] == "gap"


def test_a_column_is_the_same_alone_and_among_others():
    bars = make_bars(280, 4, flat=0.1, unsold=0.1)
    together = compute_indicators(bars, NAMES)
    for column, name in enumerate(NAMES):
        np.testing.assert_array_equal(column_of(bars, name), together[:, column], err_msg=name)


def test_shared_results_are_computed_once_and_cannot_be_written():
    computed = []

    @shared
    def doubled(bars, factor):
        computed.append(factor)
        return factor * bars.close, bars.open + 0

    bars = Bars(make_bars(20, 1))
    for factor in (2, 3, 2):
        np.testing.assert_array_equal(doubled(bars, factor)[0], factor * bars.close)
    assert computed == [2, 3]
    with pytest.raises(ValueError, match="read-only"):
        doubled(bars, 2)[1][0] = 7.0
    doubled(Bars(make_bars(20, 1)), 2)
    assert computed == [2, 3, 2]


def test_rows_may_have_any_index():
    bars = make_bars(100, 1)
    moved = bars.set_index(np.arange(100)[::-1] + 500)
    np.testing.assert_array_equal(compute_indicators(moved, NAMES), compute_indicators(bars, NAMES))


def test_undefined_values_are_nan_and_never_infinite(monkeypatch):
    monkeypatch.setitem(INDICATORS, "planted", Indicator("planted", "test", lambda bars: 1 / bars.volume))
    bars = make_bars(10, 1).assign(volume=[0.0] * 5 + [2.0] * 5)
    np.testing.assert_array_equal(column_of(bars, "planted"), [np.nan] * 5 + [0.5] * 5)


@pytest.mark.parametrize("values", [1.0, np.ones(9), np.ones((10, 1))], ids=["number", "short", "matrix"])
def test_column_of_another_length_is_refused(monkeypatch, values):
    monkeypatch.setitem(INDICATORS, "planted", Indicator("planted", "test", lambda bars: values))
    with pytest.raises(ValueError, match=r"'planted' gave an array of shape \(.*\) where \(10,\) was due"):
        compute_indicators(make_bars(10, 1), ["planted"])


def test_taken_name_is_refused():
    before = dict(INDICATORS)
    with pytest.raises(ValueError, match="'gap' is registered already"):

        @indicator("test")
        def gap(bars):
            return bars.close

    with pytest.raises(ValueError, match="'rsi_14' is registered already"):

        @indicator("test", windows=(14,))
        def rsi(bars, window):
            return bars.close

    assert before == INDICATORS


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"unknown indicator 'rsi_15'; the nearest of \d+ are rsi_21,") as error:
        compute_indicators(make_bars(10, 1), ["gap", "rsi_15"])
    assert "\n" not in str(error.value)


# --- selection ---

DEFAULT = FEATURE_PRESETS["default"]


def test_default_preset_is_frozen():
    """Checkpoints of the recipes expect these columns in this order."""
    assert len(DEFAULT) == len(set(DEFAULT)) == 64
    assert (
        hashlib.sha256(" ".join(DEFAULT).encode()).hexdigest()
        == "de6ee3c4997262217679cfcfb7c61e6bc05f92db7106e11b82d0102adbb0389b"
    )


# Of the checkpoints of version 0.1, which name their columns.
EARLIER = """
gap body true_range close_location upper_shadow lower_shadow scaled_return_1 scaled_return_2 scaled_return_3
scaled_return_5 scaled_return_10 scaled_return_20 scaled_return_60 close_to_sma_10 close_to_sma_20
close_to_sma_50 macd_histogram adx_14 directional_movement_14 aroon_25 rsi_7 rsi_14 rsi_21 stochastic_k
stochastic_d cci_20 williams_r_14 realized_volatility_5 realized_volatility_20 realized_volatility_60 atr_14
parkinson_volatility_10 parkinson_volatility_20 bollinger_position_20 bollinger_width_20 relative_volume_5
relative_volume_20 relative_volume_60 volume_change mfi_14 cmf_20
"""


def test_columns_of_earlier_checkpoints_are_registered():
    assert len(EARLIER.split()) == 41
    assert set(EARLIER.split()) <= set(NAMES)


def test_default_preset_holds_registered_columns_of_one_ticker():
    assert set(DEFAULT) <= set(NAMES)
    assert {INDICATORS[name].group for name in DEFAULT} == set(GROUPS) - {"lag", "relation"}
    assert [name for name in DEFAULT if INDICATORS[name].group == "time"] == ["day_of_week_sin", "day_of_week_cos"]


def test_no_two_columns_of_the_default_preset_say_the_same(sample):
    values = compute_indicators(sample["IBM"], list(DEFAULT))[WARM_UP:]
    alike = np.abs(scipy.stats.spearmanr(values).statistic) > 0.97
    assert [(DEFAULT[i], DEFAULT[j]) for i, j in np.argwhere(np.triu(alike, 1))] == []


def test_features_are_selected_by_group():
    assert select_features(["lag"]) == [name for name, column in INDICATORS.items() if column.group == "lag"]
    assert select_features(["default"]) == list(DEFAULT)
    assert select_features(["all"]) == list(INDICATORS)
    assert select_features(["relation", "time"])[: len(PANEL)] == PANEL
    mixed = select_features(["default", "time", "default"])
    assert mixed[:64] == list(DEFAULT)
    assert len(mixed) == len(set(mixed)) == 64 + len(select_features(["time"])) - 2


@pytest.mark.parametrize(("groups", "named"), [(["price", "prise"], "'prise'"), ([], "''"), (["gap"], "'gap'")])
def test_unknown_group_is_refused(groups, named):
    with pytest.raises(ValueError, match=f"unknown feature group {named}; there are all, default, price, ") as error:
        select_features(groups)
    assert "\n" not in str(error.value)


# --- one's own indicator, and the documentation ---

ROOT = Path(indicators_spaceexplore.__file__).parent


def test_example_works_as_it_stands(registry):
    _, _, example = indicators_spaceexplore.__doc__.partition("decade:\n")
    code = textwrap.dedent(example.partition("registers `mean_return_5`")[0])
    assert len(code.strip().splitlines()) <= 10
    exec(code, vars(indicators_spaceexplore).copy())
    bars = make_bars(60, 1)
    own = column_of(bars, "mean_return_20") * ewma_volatility(bars["close"])
    np.testing.assert_allclose(own, np.log(bars["close"]).diff().rolling(20).mean(), rtol=1e-9, atol=1e-12)
    command.check_causality(["mean_return_5", "mean_return_20"], seeds=1)


def test_example_of_the_page_works_as_it_stands(registry, tmp_path):
    page = (ROOT / "docs" / "indicators.md").read_text(encoding="utf-8")
    (tmp_path / "own.py").write_text(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1])
    assert command.check_file(str(tmp_path / "own.py")) == ["mean_return_5", "mean_return_20"]


DRAFT = """
from spaceexploreai.indicators_spaceexplore import indicator

@indicator("momentum", windows=(5, 20))
def draft(bars, window):
    return {formula}
"""


def write_draft(folder: Path, formula: str) -> str:
    (folder / "draft.py").write_text(DRAFT.format(formula=formula))
    return str(folder / "draft.py")


def test_command_tries_a_draft(registry, tmp_path, capsys):
    command.main(["--check", write_draft(tmp_path, "bars.frame['close'].pct_change(window)")])
    assert capsys.readouterr().out.splitlines() == [
        f"draft_{window} (momentum): causal, free of the currency" for window in (5, 20)
    ]


@pytest.mark.parametrize(
    ("formula", "complaint"),
    [
        ("bars.frame['close'].pct_change(-window)", r"draft_5 until .* knows what comes after it: \w"),
        ("bars.close - bars.open", "draft_5 depends on the currency: another one gives other values"),
        ("bars.close[1:]", r"'draft_5' gave an array of shape \(329,\) where \(330,\) was due"),
    ],
)
def test_command_refuses_a_draft(registry, tmp_path, capsys, formula, complaint):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--check", write_draft(tmp_path, formula)])
    assert stopped.value.code == 2
    assert re.fullmatch(f"error: .*{complaint}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give one of --check and --write"),
        (["--check", "a.py", "--write", "b.md"], "give one of --check and --write"),
        (["--check", "absent.py"], "absent.py is no Python file"),
        (["--check", "empty.py"], "empty.py registers no indicator"),
        (["--write", "empty.py"], "empty.py has no line '<!-- What follows "),
    ],
)
def test_command_refuses_a_mistake(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    Path("empty.py").touch()
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {complaint}")


def test_documentation_is_up_to_date(tmp_path):
    page = (ROOT / "docs" / "indicators.md").read_text(encoding="utf-8")
    (tmp_path / "page.md").write_text(page.partition(command.MARKER)[0] + command.MARKER + "old", encoding="utf-8")
    command.main(["--write", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page, (
        "python scripts/indicators.py --write docs/indicators.md"
    )
    table = page.partition(command.MARKER)[2]
    assert re.findall(r"`(\w+)`", table) == list(INDICATORS)
    assert sorted(re.findall(r"\*\*`(\w+)`\*\*", table)) == sorted(DEFAULT)


def test_columns_of_the_original_are_covered():
    page = (ROOT / "docs" / "indicators.md").read_text(encoding="utf-8")
    _, _, section = page.partition("## The columns of the original")
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section.partition(command.MARKER)[0], flags=re.MULTILINE)
    named = [name for _, ours in rows for name in re.findall(r"`(\w+)`", ours)]
    assert len(rows) > 30
    assert [name for name in named if name not in INDICATORS] == []
