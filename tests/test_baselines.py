"""The naive forecasts against closed forms, SciPy and plain loops; causal, in the caller's row order."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from spaceexploreai.evaluation.baselines import BASELINES, add_baselines, quantile_columns, quantile_levels
from spaceexploreai.indicators_spaceexplore import ewma_volatility

LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]
HORIZONS = [1, 2, 5]
DATES = pd.bdate_range("2020-01-01", periods=150)
TRAIN_CUTOFF = DATES[99]


def make_prices(closes: dict[str, np.ndarray]) -> pd.DataFrame:
    frames = [
        pd.DataFrame(
            {
                "ticker": ticker,
                "date": DATES[: len(close)],
                **dict.fromkeys(["open", "high", "low", "close"], close),
                "volume": 1.0,
            }
        )
        for ticker, close in closes.items()
    ]
    return pd.concat(frames, ignore_index=True)


def walk(seed: int, drift: float = 0.0) -> np.ndarray:
    returns = np.random.default_rng(seed).standard_t(5, size=len(DATES)) * 0.02 + drift
    return 50 * np.exp(np.cumsum(returns))


def make_forecasts(tickers: list[str], cutoffs) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([tickers, cutoffs, HORIZONS], names=["ticker", "cutoff", "horizon"])
    table = index.to_frame(index=False)
    table["date"] = table["cutoff"] + pd.to_timedelta(table["horizon"], unit="D")
    return table.assign(mean=0.001, **dict.fromkeys(quantile_columns(LEVELS), 0.0), p_up=0.5)


PRICES = make_prices({"AAA": walk(1, 0.001), "BBB": walk(2, -0.002), "CCC": walk(3)})
FORECASTS = make_forecasts(["AAA", "BBB", "CCC"], DATES[110:140])
TABLE = add_baselines(FORECASTS, PRICES, TRAIN_CUTOFF)


def log_returns_until(ticker: str, cutoff: pd.Timestamp) -> np.ndarray:
    closes = [row.close for row in PRICES.itertuples() if row.ticker == ticker and row.date <= cutoff]
    return np.array([np.log(after / before) for before, after in pairwise(closes)])


def naive_columns(name: str) -> list[str]:
    return [f"{name}_mean", *quantile_columns(LEVELS, f"{name}_"), f"{name}_p_up"]


def test_columns_and_row_order_are_the_callers():
    shuffled = FORECASTS.sample(frac=1, random_state=0)
    table = add_baselines(shuffled, PRICES, TRAIN_CUTOFF)
    expected = [*FORECASTS.columns, *(column for name in BASELINES for column in naive_columns(name))]
    assert list(table.columns) == expected
    pd.testing.assert_frame_equal(table[list(FORECASTS.columns)], shuffled)
    pd.testing.assert_frame_equal(table.sort_index(), TABLE)


def test_adding_twice_changes_nothing():
    pd.testing.assert_frame_equal(add_baselines(TABLE, PRICES, TRAIN_CUTOFF), TABLE)


@pytest.mark.parametrize("row", [0, 137, len(FORECASTS) - 1])
def test_zero_is_the_naive_method(row):
    values = TABLE.iloc[row]
    returns = log_returns_until(values.ticker, values.cutoff)
    sd = np.sqrt(np.mean(returns**2) * values.horizon)
    expected = [0.0, *norm.ppf(LEVELS, scale=sd), 0.5]
    np.testing.assert_allclose(values[naive_columns("zero")].astype(float), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("row", [0, 137, len(FORECASTS) - 1])
def test_drift_is_the_random_walk_with_drift(row):
    values = TABLE.iloc[row]
    returns = log_returns_until(values.ticker, values.cutoff)
    mean = returns.mean() * values.horizon
    sd = returns.std(ddof=1) * np.sqrt(values.horizon * (1 + values.horizon / len(returns)))
    expected = [mean, *norm.ppf(LEVELS, mean, sd), norm.sf(0, mean, sd)]
    np.testing.assert_allclose(values[naive_columns("drift")].astype(float), expected, rtol=1e-9)


def standardised_pool(horizon: int, train_cutoff: pd.Timestamp) -> list[float]:
    """The scalar twin: every pair of every ticker, one by one."""
    pool = []
    for _, bars in PRICES.groupby("ticker"):
        close, volatility = bars["close"].to_list(), ewma_volatility(bars["close"]).to_list()
        for t in range(len(bars) - horizon):
            if np.isfinite(volatility[t]) and bars["date"].iloc[t + horizon] <= train_cutoff:
                pool.append(np.log(close[t + horizon] / close[t]) / (volatility[t] * np.sqrt(horizon)))
    return pool


@pytest.mark.parametrize("row", [0, 137, len(FORECASTS) - 1])
def test_ewma_scales_the_pooled_empirical_distribution(row):
    values = TABLE.iloc[row]
    bars = PRICES[(PRICES.ticker == values.ticker) & (PRICES.date <= values.cutoff)]
    scale = ewma_volatility(bars["close"]).iloc[-1] * np.sqrt(values.horizon)
    pool = np.array(standardised_pool(values.horizon, TRAIN_CUTOFF))
    expected = [pool.mean() * scale, *np.quantile(pool, LEVELS) * scale, (pool > 0).mean()]
    np.testing.assert_allclose(values[naive_columns("ewma")].astype(float), expected, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(ticker=st.sampled_from(["AAA", "BBB", "CCC"]), t=st.integers(101, 149), factor=st.floats(0.2, 5.0))
def test_a_bar_changes_no_baseline_at_an_earlier_cutoff(ticker, t, factor):
    changed = PRICES.copy()
    bar = (changed["ticker"] == ticker) & (changed["date"] == DATES[t])
    changed.loc[bar, "close"] *= factor
    table = add_baselines(FORECASTS, changed, TRAIN_CUTOFF)
    earlier = (FORECASTS["cutoff"] < DATES[t]) | (FORECASTS["ticker"] != ticker)
    pd.testing.assert_frame_equal(table[earlier], TABLE[earlier], check_exact=True)


def test_the_pool_ends_with_the_target_not_the_origin():
    """A close after train_cutoff is the target of origins before it: it must not enter."""
    changed = PRICES.copy()
    changed.loc[changed["date"] == DATES[100], "close"] *= 3
    changed.loc[changed["date"] > DATES[100], "close"] *= 0.1
    early = make_forecasts(["AAA"], DATES[60:100])
    pd.testing.assert_frame_equal(
        add_baselines(early, changed, TRAIN_CUTOFF), add_baselines(early, PRICES, TRAIN_CUTOFF), check_exact=True
    )
    at_target = PRICES.copy()
    at_target.loc[(at_target["ticker"] == "BBB") & (at_target["date"] == TRAIN_CUTOFF), "close"] *= 3
    table = add_baselines(early, at_target, TRAIN_CUTOFF)
    assert not np.array_equal(table["ewma_mean"], add_baselines(early, PRICES, TRAIN_CUTOFF)["ewma_mean"])


def test_a_price_that_never_moves_is_as_likely_up_as_down():
    prices = make_prices({"AAA": walk(1), "BBB": walk(2), "FLAT": np.full(len(DATES), 7.0)})
    table = add_baselines(make_forecasts(["FLAT"], DATES[120:122]), prices, TRAIN_CUTOFF)
    assert (table[["zero_p_up", "drift_p_up"]] == 0.5).all(axis=None)
    assert (table[[*quantile_columns(LEVELS, "zero_"), *quantile_columns(LEVELS, "drift_")]] == 0).all(axis=None)


def test_quantile_levels_come_from_the_models_columns_alone():
    table = pd.DataFrame(columns=["q0.95", "q0.05", "ewma_q0.2", "quantity", "q0.5", "q5", "q1.5"])
    assert quantile_levels(table) == [0.05, 0.5, 0.95]
    assert quantile_columns(np.arange(1, 20) / 20)[1:3] == ["q0.1", "q0.15"]


def test_no_quantile_column_is_refused():
    with pytest.raises(ValueError, match=r"no quantile column like 'q0\.5' among \['mean'\]"):
        quantile_levels(pd.DataFrame(columns=["mean"]))


def test_a_cutoff_without_a_bar_is_refused():
    saturday = make_forecasts(["BBB"], [DATES[120], pd.Timestamp("2020-06-20")])
    with pytest.raises(ValueError, match="BBB has no bar in the price table on its cutoff 2020-06-20"):
        add_baselines(saturday, PRICES, TRAIN_CUTOFF)


def test_an_unknown_ticker_is_refused():
    with pytest.raises(ValueError, match="ZZZ has no bar"):
        add_baselines(make_forecasts(["ZZZ"], [DATES[120]]), PRICES, TRAIN_CUTOFF)


def test_too_short_a_history_is_refused():
    with pytest.raises(ValueError, match=f"AAA has only 5 daily returns up to its cutoff {DATES[5]:%Y-%m-%d}"):
        add_baselines(make_forecasts(["AAA"], [DATES[5]]), PRICES, TRAIN_CUTOFF)


def test_too_few_training_pairs_are_refused():
    # Volatility is known from bar 20, so bars 20 to 52 are origins of one-day pairs: 33 for each of three tickers.
    message = (
        f"at least 100 training pairs at horizon 1, got 99 with their target up to train_cutoff {DATES[53]:%Y-%m-%d}"
    )
    with pytest.raises(ValueError, match=message):
        add_baselines(FORECASTS, PRICES, DATES[53])
    one_day = FORECASTS[FORECASTS["horizon"] == 1]
    assert len(add_baselines(one_day, PRICES, DATES[54])) == len(one_day)


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="no column 'cutoff'"):
        add_baselines(FORECASTS.drop(columns="cutoff"), PRICES, TRAIN_CUTOFF)
