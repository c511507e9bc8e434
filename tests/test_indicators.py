"""The indicators: causal, without a unit, and equal to TA-Lib or a plain loop, every column of the registry."""

import math
import sys
from operator import mul
from statistics import fmean

import numpy as np
import pandas as pd
import pandas_ta_classic
import pytest
import talib
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from spaceexploreai import indicators_spaceexplore
from spaceexploreai.data.prices import read_sample
from spaceexploreai.indicators_spaceexplore import (
    INDICATORS,
    Indicator,
    compute_indicators,
    ewma_volatility,
    indicator,
)

NAMES = list(INDICATORS)
PRICES = ["open", "high", "low", "close"]
WARM_UP = 61  # bars: the longest window, of 60 returns
DATES = pd.bdate_range("2020-01-01", periods=200)
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
        rows=st.integers(90, len(DATES)),
        seed=st.integers(0, 10**6),
        flat=st.sampled_from([0, 0.1]),
        unsold=st.sampled_from([0, 0.2]),
        halt=st.sampled_from(halts),
        volatility=st.sampled_from([0.003, 0.02, 0.1]),
    )


@pytest.fixture(scope="module")
def sample():
    return {ticker: bars.reset_index(drop=True) for ticker, bars in read_sample().groupby("ticker")}


# --- the sample of bars is worth testing with ---


def test_random_bars_are_bars():
    bars = make_bars(200, 3, flat=0.1, unsold=0.2, halt=30)
    assert (bars[["open", "close"]].min(axis=1) >= bars["low"]).all()
    assert (bars[["open", "close"]].max(axis=1) <= bars["high"]).all()
    assert (bars[PRICES] > 0).all(axis=None)
    assert (bars["volume"] == 0).sum() > 50
    assert (bars["high"] == bars["low"]).sum() > 40
    assert (bars["close"].diff() == 0).sum() >= 29


# --- causality ---


def times(bars: pd.DataFrame, factor: float | np.ndarray, columns: list[str] = PRICES) -> pd.DataFrame:
    return bars.assign(**{column: bars[column] * factor for column in columns})


def only(change, rows):
    """The change at some of the future rows, such as the first or the last."""

    def partial_change(future):
        changed = future.copy()
        changed.iloc[rows] = change(future).iloc[rows]
        return changed

    return partial_change


# Each takes the bars after a day and gives other ones, by much: a leak in the last bit of a column counts.
CHANGES = {
    "crash": lambda future: times(future, 1e-6),
    "surge": lambda future: times(future, 1e6),
    "surge on the next bar": only(lambda future: times(future, 1e6), slice(0, 1)),
    "surge on the last bar": only(lambda future: times(future, 1e6), slice(-1, None)),
    "halt": lambda future: future.assign(**dict.fromkeys(PRICES, future["open"].iloc[0]), volume=0.0),
    "turnover": lambda future: times(future, 1e9, ["volume"]),
    "another history": lambda future: make_bars(len(future), 7).assign(date=future["date"].array),
}


def assert_causal(names: list[str], bars: pd.DataFrame, row: int, change) -> None:
    """What comes after a row, or that anything does, leaves each column as it is up to that row."""
    past, future = bars.iloc[: row + 1], bars.iloc[row + 1 :]
    known = compute_indicators(bars, names)[: row + 1]
    changed = compute_indicators(pd.concat([past, change(future)]), names)[: row + 1]
    truncated = compute_indicators(past, names)
    for column, name in enumerate(names):
        message = f"{name} up to row {row} knows what comes after it"
        np.testing.assert_array_equal(changed[:, column], known[:, column], err_msg=message)
        np.testing.assert_allclose(truncated[:, column], known[:, column], 1e-9, 1e-9, err_msg=message)


@settings(**NO_SHRINKING, max_examples=12)
@given(histories(), st.integers(1, 80), st.sampled_from(sorted(CHANGES)))
def test_every_column_is_causal(bars, bars_after, change):
    assert_causal(NAMES, bars, len(bars) - 1 - bars_after, CHANGES[change])


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_changes(change):
    future = make_bars(150, 1).iloc[100:]
    changed = CHANGES[change](future)
    assert changed.columns.equals(future.columns)
    assert changed["date"].tolist() == future["date"].tolist()
    assert (changed.to_numpy() != future.to_numpy()).any()


PLANTED = {
    "next close": lambda bars: bars["close"].shift(-1) / bars["close"],
    "centred mean": lambda bars: bars["close"] / bars["close"].rolling(5, center=True).mean(),
    "filled from behind": lambda bars: bars["close"].rolling(20).mean().bfill(),
    "score over the whole history": lambda bars: (bars["close"] - bars["close"].mean()) / bars["close"].std(),
    "last bit": lambda bars: bars["close"] / bars["close"].iloc[0] + 2e-16 * bars["volume"].iloc[-1],
    "backwards": lambda bars: bars["close"][::-1].ewm(span=5).mean()[::-1],
    "length of the history": lambda bars: pd.Series(np.arange(len(bars)) / len(bars)),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_checker_catches_a_planted_look_ahead(monkeypatch, planted):
    monkeypatch.setitem(INDICATORS, planted, Indicator(planted, "test", PLANTED[planted]))
    change = CHANGES["turnover" if planted == "last bit" else "surge"]
    with pytest.raises(AssertionError, match=f"{planted} up to row 10 "):
        assert_causal(["gap", planted], make_bars(150, 1), 10, change)


# --- no unit, no gaps ---


def assert_same_columns(values: np.ndarray, expected: np.ndarray) -> None:
    for column, name in enumerate(NAMES):
        np.testing.assert_allclose(values[:, column], expected[:, column], 1e-6, 1e-6, err_msg=name)


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


# Zero divided by zero in a window without movement; a value there would be rounding, or an accident of the library.
UNDEFINED_WITHOUT_MOVEMENT = [
    "close_location",
    "stochastic_k",
    "stochastic_d",
    "cci_20",
    "williams_r_14",
    "realized_volatility_20",
    "parkinson_volatility_20",
    "bollinger_position_20",
    "bollinger_width_20",
    "mfi_14",
    "cmf_20",
]


@pytest.mark.parametrize("name", UNDEFINED_WITHOUT_MOVEMENT)
def test_a_halted_price_has_no_position_in_its_range(name):
    for close in [0.1, 0.7, 3.3, 17.77, 123.45]:
        bars = make_bars(80, 1)
        bars.loc[40:, PRICES] = close
        bars.loc[40:, "volume"] = 0.0
        halted = compute_indicators(bars, [name])[40 + 20 :, 0]
        np.testing.assert_array_equal(halted, np.nan, err_msg=f"at {close}")


@pytest.mark.parametrize("rows", [1, 2, 5, 14, 20])
def test_short_history_is_undefined_and_no_error(rows):
    values = compute_indicators(make_bars(rows, 1), NAMES)
    assert values.shape == (rows, len(NAMES))
    assert np.isnan(values[:, NAMES.index("scaled_return_60")]).all()
    assert rows >= 14 or np.isnan(values[:, [NAMES.index(name) for name in TALIB]]).all()


# --- values: TA-Lib ---


def relative(atr_like):
    """A price distance in units of the close and of the daily volatility, as the registry gives it."""
    return lambda bars: atr_like(bars) / (bars["close"] * ewma_volatility(bars["close"])).to_numpy()


def high_low_close(bars: pd.DataFrame) -> tuple:
    return bars["high"], bars["low"], bars["close"]


def talib_rsi(window: int):
    return lambda bars: talib.RSI(bars["close"], window) / 50 - 1


def talib_stochastic(line: int):
    def compute(bars):
        lines = talib.STOCH(*high_low_close(bars), fastk_period=14, slowk_period=3, slowd_period=3)
        return lines[line] / 50 - 1

    return compute


def talib_directional_movement(bars):
    return (talib.PLUS_DI(*high_low_close(bars), 14) - talib.MINUS_DI(*high_low_close(bars), 14)) / 100


def talib_bollinger_position(bars):
    upper, middle, _ = talib.BBANDS(bars["close"], 20, 2.0, 2.0)
    return (bars["close"] - middle) / (upper - middle)


def talib_bollinger_width(bars):
    upper, middle, lower = talib.BBANDS(bars["close"], 20, 2.0, 2.0)
    return np.log((upper - lower) / middle / ewma_volatility(bars["close"]))


TALIB = {
    "macd_histogram": relative(lambda bars: talib.MACD(bars["close"], 12, 26, 9)[2]),
    "adx_14": lambda bars: talib.ADX(*high_low_close(bars), 14) / 50 - 1,
    "directional_movement_14": talib_directional_movement,
    "aroon_25": lambda bars: talib.AROONOSC(bars["high"], bars["low"], 25) / 100,
    "rsi_7": talib_rsi(7),
    "rsi_14": talib_rsi(14),
    "rsi_21": talib_rsi(21),
    "stochastic_k": talib_stochastic(0),
    "stochastic_d": talib_stochastic(1),
    "cci_20": lambda bars: talib.CCI(*high_low_close(bars), 20) / 100,
    "williams_r_14": lambda bars: talib.WILLR(*high_low_close(bars), 14) / 50 + 1,
    "atr_14": lambda bars: np.log(relative(lambda bars: talib.ATR(*high_low_close(bars), 14))(bars)),
    "bollinger_position_20": talib_bollinger_position,
    "bollinger_width_20": talib_bollinger_width,
    "mfi_14": lambda bars: talib.MFI(*high_low_close(bars), bars["volume"], 14) / 50 - 1,
}


@pytest.mark.parametrize("name", TALIB)
def test_column_equals_talib(sample, name):
    for ticker in ("MSFT", "IBM"):
        # Prices in cents tie, and rounding then decides between up and down; nothing ties after this.
        bars = sample[ticker]
        bars = times(bars, np.random.default_rng(1).uniform(0.99999, 1.00001, len(bars)))
        values = compute_indicators(bars, [name])[:, 0]
        # Recursive averages forget how they were started: (13/14)^250 is 1e-8.
        np.testing.assert_allclose(values[250:], TALIB[name](bars)[250:], rtol=1e-6, atol=1e-6)


def test_installing_talib_changes_nothing(sample, monkeypatch):
    bars = sample["FB"]
    assert sys.modules["pandas_ta_classic.momentum.rsi"].Imports is pandas_ta_classic.Imports
    monkeypatch.setitem(pandas_ta_classic.Imports, "talib", False)
    without = compute_indicators(bars, NAMES)
    monkeypatch.setitem(pandas_ta_classic.Imports, "talib", True)
    np.testing.assert_array_equal(compute_indicators(bars, NAMES), without)
    assert not np.array_equal(pandas_ta_classic.adx(*high_low_close(bars), talib=True), without)
    monkeypatch.setitem(sys.modules, "talib", None)
    with pytest.raises(ImportError):
        pandas_ta_classic.rsi(bars["close"], talib=True)
    np.testing.assert_array_equal(compute_indicators(bars, NAMES), without)


# --- values: plain loops ---


def volatility_loop(close: list[float], row: int, alpha: float = 0.06, min_periods: int = 20) -> float:
    if row < min_periods:
        return math.nan
    squares = [math.log(close[i] / close[i - 1]) ** 2 for i in range(row, 0, -1)]
    weights = [(1 - alpha) ** age for age in range(row)]
    return max(math.sqrt(sum(map(mul, weights, squares)) / sum(weights)), 1e-4)


@settings(**NO_SHRINKING, max_examples=20)
@given(histories(), st.floats(0.01, 0.5), st.integers(1, 60))
def test_volatility_equals_its_closed_form(bars, alpha, min_periods):
    values = ewma_volatility(bars["close"], alpha, min_periods)
    close = bars["close"].tolist()
    expected = [volatility_loop(close, row, alpha, min_periods) for row in range(len(close))]
    np.testing.assert_allclose(values, expected, rtol=1e-9)


def test_volatility_of_a_constant_price_is_not_zero():
    assert ewma_volatility(pd.Series([7.0] * 40)).iloc[-1] == 1e-4


def test_volatility_defaults_to_riskmetrics(sample):
    close = sample["FB"]["close"]
    expected = [volatility_loop(close.tolist(), row) for row in range(len(close))]
    np.testing.assert_allclose(ewma_volatility(close), expected, rtol=1e-9)


# Each takes the bars up to a day, that day last, and its volatility.


def true_range_loop(bars, volatility):
    previous, today = bars[-2].close, bars[-1]
    return math.log(max(today.high, previous) / min(today.low, previous)) / volatility


def close_location_loop(bars, _):
    bar = bars[-1]
    return ((bar.close - bar.low) - (bar.high - bar.close)) / (bar.high - bar.low)


def upper_shadow_loop(bars, volatility):
    return math.log(bars[-1].high / max(bars[-1].open, bars[-1].close)) / volatility


def lower_shadow_loop(bars, volatility):
    return math.log(min(bars[-1].open, bars[-1].close) / bars[-1].low) / volatility


def scaled_return_loop(window):
    return lambda bars, volatility: (
        math.log(bars[-1].close / bars[-1 - window].close) / (volatility * math.sqrt(window))
    )


def close_to_sma_loop(window):
    return lambda bars, volatility: (
        math.log(bars[-1].close / fmean(bar.close for bar in bars[-window:])) / (volatility * math.sqrt(window))
    )


def realized_volatility_loop(window):
    def compute(bars, volatility):
        returns = [math.log(bars[-k].close / bars[-k - 1].close) for k in range(1, window + 1)]
        return math.log(math.sqrt(fmean(x * x for x in returns)) / volatility)

    return compute


def parkinson_loop(window):
    def compute(bars, volatility):
        squares = [math.log(bar.high / bar.low) ** 2 for bar in bars[-window:]]
        return math.log(math.sqrt(fmean(squares) / (4 * math.log(2))) / volatility)

    return compute


def relative_volume_loop(window):
    return lambda bars, _: math.log((bars[-1].volume + 1) / (fmean(bar.volume for bar in bars[-window:]) + 1))


def cmf_loop(bars, _):
    """Chaikin's money flow; a bar without range adds no flow."""
    flows = [close_location_loop([bar], 0) * bar.volume for bar in bars[-20:] if bar.high > bar.low]
    return sum(flows) / sum(bar.volume for bar in bars[-20:])


# name: (bars that must precede the day, function)
LOOPS = {
    "gap": (1, lambda bars, volatility: math.log(bars[-1].open / bars[-2].close) / volatility),
    "body": (0, lambda bars, volatility: math.log(bars[-1].close / bars[-1].open) / volatility),
    "true_range": (1, true_range_loop),
    "close_location": (0, close_location_loop),
    "upper_shadow": (0, upper_shadow_loop),
    "lower_shadow": (0, lower_shadow_loop),
    **{f"scaled_return_{n}": (n, scaled_return_loop(n)) for n in (1, 2, 3, 5, 10, 20, 60)},
    **{f"close_to_sma_{n}": (n - 1, close_to_sma_loop(n)) for n in (10, 20, 50)},
    **{f"realized_volatility_{n}": (n, realized_volatility_loop(n)) for n in (5, 20, 60)},
    **{f"parkinson_volatility_{n}": (n - 1, parkinson_loop(n)) for n in (10, 20)},
    **{f"relative_volume_{n}": (n - 1, relative_volume_loop(n)) for n in (5, 20, 60)},
    "volume_change": (1, lambda bars, _: math.log((bars[-1].volume + 1) / (bars[-2].volume + 1))),
    "cmf_20": (19, cmf_loop),
}


def loop_values(name: str, bars: pd.DataFrame) -> list[float]:
    history, compute = LOOPS[name]
    rows, close = list(bars.itertuples()), bars["close"].tolist()
    values = []
    for row in range(len(rows)):
        try:
            defined = row >= history
            values.append(compute(rows[: row + 1], volatility_loop(close, row)) if defined else math.nan)
        except (ZeroDivisionError, ValueError):  # 0/0, or the logarithm of zero
            values.append(math.nan)
    return values


@pytest.mark.parametrize("name", LOOPS)
def test_column_equals_its_plain_loop(name):
    for bars in [make_bars(130, 5, flat=0.2, unsold=0.2), make_bars(130, 6, unsold=0.1, halt=30)]:
        values = compute_indicators(bars, [name])[:, 0]
        np.testing.assert_allclose(values, loop_values(name, bars), rtol=1e-9, atol=1e-9)


def test_every_column_has_a_reference():
    assert sorted([*TALIB, *LOOPS]) == sorted(INDICATORS)


# --- the registry ---


def test_there_are_enough_columns():
    assert len(INDICATORS) >= 20
    assert all(indicator.name == name for name, indicator in INDICATORS.items())
    assert {indicator.group for indicator in INDICATORS.values()} == {
        "price",
        "return",
        "trend",
        "momentum",
        "volatility",
        "volume",
    }


def test_registration(monkeypatch):
    registry = dict(INDICATORS)
    monkeypatch.setattr(indicators_spaceexplore, "INDICATORS", registry)  # a name that stayed would enter other tests

    @indicator("test")
    def planted(bars):
        return bars["close"] / bars["open"]

    @indicator("test", windows=(3, 5))
    def planted_ratio(bars, window):
        return bars["close"] / bars["close"].shift(window)

    assert registry.keys() - INDICATORS.keys() == {"planted", "planted_ratio_3", "planted_ratio_5"}
    bars = make_bars(20, 1)
    expected = np.stack([planted(bars), planted_ratio(bars, 3), planted_ratio(bars, 5)], axis=1)
    names = ["planted", "planted_ratio_3", "planted_ratio_5"]
    np.testing.assert_array_equal(compute_indicators(bars, names), expected)


def test_columns_come_in_the_order_asked_for():
    bars = make_bars(100, 1)
    values = compute_indicators(bars, ["rsi_14", "gap"])
    np.testing.assert_array_equal(values, compute_indicators(bars, NAMES)[:, [NAMES.index("rsi_14"), 0]])
    assert NAMES[0] == "gap"


def test_rows_may_have_any_index():
    bars = make_bars(100, 1)
    moved = bars.set_index(np.arange(100)[::-1] + 500)
    np.testing.assert_array_equal(compute_indicators(moved, NAMES), compute_indicators(bars, NAMES))


def test_undefined_values_are_nan_and_never_infinite(monkeypatch):
    monkeypatch.setitem(INDICATORS, "planted", Indicator("planted", "test", lambda bars: 1 / bars["volume"]))
    bars = make_bars(10, 1).assign(volume=[0.0] * 5 + [2.0] * 5)
    np.testing.assert_array_equal(compute_indicators(bars, ["planted"])[:, 0], [np.nan] * 5 + [0.5] * 5)


def test_taken_name_is_refused():
    before = dict(INDICATORS)
    with pytest.raises(ValueError, match="'gap' is registered already"):

        @indicator("test")
        def gap(bars):
            return bars["close"]

    with pytest.raises(ValueError, match="'rsi_14' is registered already"):

        @indicator("test", windows=(14,))
        def rsi(bars, window):
            return bars["close"]

    assert before == INDICATORS


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown indicator 'rsi_15'; registered are gap, body, ") as error:
        compute_indicators(make_bars(10, 1), ["gap", "rsi_15"])
    assert "\n" not in str(error.value)
