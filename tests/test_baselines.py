"""The naive forecasts against closed forms, SciPy and plain loops; causal, in the caller's row order."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from spaceexploreai.evaluation import baselines
from spaceexploreai.evaluation.baselines import (
    BASELINES,
    MIN_POOL,
    Training,
    add_baselines,
    quantile_columns,
    quantile_levels,
)
from spaceexploreai.indicators_spaceexplore import ewma_volatility

LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]
HORIZONS = [1, 2, 5]
DATES = pd.bdate_range("2020-01-01", periods=150)


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
FIRST_CUTOFF = DATES[110]
TABLE = add_baselines(FORECASTS, PRICES)


def log_returns_until(ticker: str, cutoff: pd.Timestamp) -> np.ndarray:
    closes = [row.close for row in PRICES.itertuples() if row.ticker == ticker and row.date <= cutoff]
    return np.array([np.log(after / before) for before, after in pairwise(closes)])


def naive_columns(name: str) -> list[str]:
    return [f"{name}_mean", *quantile_columns(LEVELS, f"{name}_"), f"{name}_p_up"]


def test_columns_and_row_order_are_the_callers():
    shuffled = FORECASTS.sample(frac=1, random_state=0)
    table = add_baselines(shuffled, PRICES)
    naive = [column for name in BASELINES for column in naive_columns(name)]
    expected = [*FORECASTS.columns, "naive_error", *naive]
    assert list(table.columns) == expected
    pd.testing.assert_frame_equal(table[list(FORECASTS.columns)], shuffled)
    pd.testing.assert_frame_equal(table.sort_index(), TABLE)


def test_adding_twice_changes_nothing():
    pd.testing.assert_frame_equal(add_baselines(TABLE, PRICES), TABLE)


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


@pytest.mark.parametrize("row", [0, 137, len(FORECASTS) - 1])
def test_last_is_the_same_move_again(row):
    values = TABLE.iloc[row]
    returns = log_returns_until(values.ticker, values.cutoff)
    mean, sd = returns[-values.horizon :].sum(), np.sqrt(2 * values.horizon * np.mean(returns**2))
    expected = [mean, *norm.ppf(LEVELS, mean, sd), norm.sf(0, mean, sd)]
    np.testing.assert_allclose(values[naive_columns("last")].astype(float), expected, rtol=1e-8, atol=1e-12)


def test_last_of_too_few_returns_is_their_mean():
    table = make_forecasts(["AAA"], [DATES[21]]).assign(horizon=[1, 2, 40])
    returns = log_returns_until("AAA", DATES[21])
    expected = [returns[-1], returns[-2:].sum(), 40 * returns.mean()]
    np.testing.assert_allclose(add_baselines(table, PRICES)["last_mean"], expected, rtol=1e-8)


def test_last_expects_the_error_that_it_has():
    """Of a random walk it is sqrt(2) times that of zero: its interval covers as many outcomes."""
    closes = {f"T{which:02}": walk(which) for which in range(60)}
    prices = make_prices(closes)
    table = add_baselines(make_forecasts(list(closes), DATES[100:140:10]), prices)
    for horizon, rows in table.groupby("horizon"):
        y = [
            np.log(closes[row.ticker][at + horizon] / closes[row.ticker][at])
            for row in rows.itertuples()
            for at in [DATES.get_loc(row.cutoff)]
        ]
        inside = (y >= rows["last_q0.05"]) & (y <= rows["last_q0.95"])
        assert inside.mean() == pytest.approx(0.9, abs=0.06)


def test_naive_error_is_the_mean_size_of_the_returns_so_far():
    for row in (0, 137, len(FORECASTS) - 1):
        returns = log_returns_until(TABLE.iloc[row]["ticker"], TABLE.iloc[row]["cutoff"])
        assert TABLE.iloc[row]["naive_error"] == pytest.approx(np.abs(returns).mean())


def standardised_pool(horizon: int, first_cutoff: pd.Timestamp) -> list[float]:
    """The scalar twin: every pair of every ticker, one by one."""
    pool = []
    for _, bars in PRICES.groupby("ticker"):
        close, volatility = bars["close"].to_list(), ewma_volatility(bars["close"]).to_list()
        for t in range(len(bars) - horizon):
            if np.isfinite(volatility[t]) and bars["date"].iloc[t + horizon] <= first_cutoff:
                pool.append(np.log(close[t + horizon] / close[t]) / (volatility[t] * np.sqrt(horizon)))
    return pool


@pytest.mark.parametrize("row", [0, 137, len(FORECASTS) - 1])
def test_ewma_scales_the_pooled_empirical_distribution(row):
    values = TABLE.iloc[row]
    bars = PRICES[(PRICES.ticker == values.ticker) & (PRICES.date <= values.cutoff)]
    scale = ewma_volatility(bars["close"]).iloc[-1] * np.sqrt(values.horizon)
    pool = np.array(standardised_pool(values.horizon, FIRST_CUTOFF))
    expected = [pool.mean() * scale, *np.quantile(pool, LEVELS) * scale, (pool > 0).mean()]
    np.testing.assert_allclose(values[naive_columns("ewma")].astype(float), expected, rtol=1e-9)


def test_the_pool_is_that_of_the_first_cutoff_for_every_row():
    """Whichever ticker has it, and wherever it stands in the table."""
    late = FORECASTS[FORECASTS["cutoff"] >= DATES[120]]
    alone = add_baselines(late, PRICES)
    not_pooled = [column for name in ("zero", "drift", "last") for column in naive_columns(name)]
    pd.testing.assert_frame_equal(alone[not_pooled], TABLE.loc[late.index, not_pooled], check_exact=True)
    assert (alone["ewma_mean"] != TABLE.loc[late.index, "ewma_mean"]).all()
    first = (FORECASTS["ticker"] == "CCC") & (FORECASTS["cutoff"] == FIRST_CUTOFF)
    together = add_baselines(pd.concat([late, FORECASTS[first]]), PRICES)
    pd.testing.assert_frame_equal(together.loc[late.index], TABLE.loc[late.index], check_exact=True)


@settings(max_examples=25, deadline=None)
@given(ticker=st.sampled_from(["AAA", "BBB", "CCC"]), t=st.integers(111, 149), factor=st.floats(0.2, 5.0))
def test_a_bar_changes_no_baseline_at_an_earlier_cutoff(ticker, t, factor):
    changed = PRICES.copy()
    bar = (changed["ticker"] == ticker) & (changed["date"] == DATES[t])
    changed.loc[bar, "close"] *= factor
    table = add_baselines(FORECASTS, changed)
    earlier = (FORECASTS["cutoff"] < DATES[t]) | (FORECASTS["ticker"] != ticker)
    pd.testing.assert_frame_equal(table[earlier], TABLE[earlier], check_exact=True)


def test_bars_after_a_cutoff_are_not_needed():
    known = PRICES[PRICES["date"] <= FIRST_CUTOFF].reset_index(drop=True)
    at_first = FORECASTS["cutoff"] == FIRST_CUTOFF
    pd.testing.assert_frame_equal(add_baselines(FORECASTS[at_first], known), TABLE[at_first], check_exact=True)


def test_the_pool_ends_with_the_target_not_the_origin():
    """A close after the first cutoff is the target of origins before it: it must not enter."""
    others = PRICES["ticker"] != "AAA"
    early = make_forecasts(["AAA"], DATES[60:100])
    before = add_baselines(early, PRICES)
    changed = PRICES.copy()
    changed.loc[others & (changed["date"] == DATES[61]), "close"] *= 3
    changed.loc[others & (changed["date"] > DATES[61]), "close"] *= 0.1
    pd.testing.assert_frame_equal(add_baselines(early, changed), before, check_exact=True)
    at_target = PRICES.copy()
    at_target.loc[(at_target["ticker"] == "BBB") & (at_target["date"] == DATES[60]), "close"] *= 3
    assert (add_baselines(early, at_target)["ewma_mean"] != before["ewma_mean"]).all()


def test_a_price_that_never_moves_is_as_likely_up_as_down():
    prices = make_prices({"AAA": walk(1), "BBB": walk(2), "FLAT": np.full(len(DATES), 7.0)})
    table = add_baselines(make_forecasts(["FLAT"], DATES[120:122]), prices)
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
        add_baselines(saturday, PRICES)


def test_an_unknown_ticker_is_refused():
    with pytest.raises(ValueError, match="ZZZ has no bar"):
        add_baselines(make_forecasts(["ZZZ"], [DATES[120]]), PRICES)


def test_too_short_a_history_is_refused():
    with pytest.raises(ValueError, match=f"AAA has only 5 daily returns up to its cutoff {DATES[5]:%Y-%m-%d}"):
        add_baselines(make_forecasts(["AAA"], [DATES[5]]), PRICES)


def assert_unit_normal(rows: pd.DataFrame, prices: pd.DataFrame) -> None:
    for values in rows.itertuples():
        bars = prices[(prices["ticker"] == values.ticker) & (prices["date"] <= values.cutoff)]
        scale = ewma_volatility(bars["close"]).iloc[-1] * np.sqrt(values.horizon)
        quantiles = rows.loc[values.Index, quantile_columns(LEVELS, "ewma_")].astype(float)
        # The grid of 1000 points ends at 3.3 standard deviations; at 5 % it is 0.005 of one off.
        np.testing.assert_allclose(quantiles / scale, norm.ppf(LEVELS), atol=6e-3)
        assert values.ewma_mean == pytest.approx(0.0, abs=1e-12)
        assert values.ewma_p_up == 0.5


@pytest.mark.parametrize("bar", [20, 30, 53])
def test_a_short_history_falls_back_to_the_normal_distribution(bar):
    # Volatility is known from bar 20: at bar 53, bars 20 to 52 of three tickers are 99 origins of one-day pairs.
    assert len(standardised_pool(1, DATES[bar])) < MIN_POOL
    table = add_baselines(make_forecasts(["AAA", "BBB", "CCC"], DATES[bar : bar + 3]), PRICES)
    assert_unit_normal(table, PRICES)


def test_a_pool_of_the_minimum_is_empirical_horizon_by_horizon():
    prices = PRICES[PRICES["ticker"] == "AAA"].reset_index(drop=True)
    # Bar 20 to bar 119 are the 100 origins of one-day pairs known at bar 120; two days have one fewer.
    table = add_baselines(make_forecasts(["AAA"], [DATES[120]]), prices).set_index("horizon", drop=False)
    assert_unit_normal(table.loc[[2, 5]], prices)
    scale = ewma_volatility(prices["close"][:121]).iloc[-1]
    close, volatility = np.log(prices["close"][:121].to_numpy()), ewma_volatility(prices["close"]).to_numpy()
    pool = np.diff(close)[20:] / volatility[20:120]
    assert len(pool) == MIN_POOL == 100
    expected = [pool.mean() * scale, *np.quantile(pool, LEVELS) * scale, (pool > 0).mean()]
    np.testing.assert_allclose(table.loc[1, naive_columns("ewma")].astype(float), expected, rtol=1e-9)


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="no column 'cutoff'"):
        add_baselines(FORECASTS.drop(columns="cutoff"), PRICES)


def test_an_unknown_set_of_baselines_is_refused():
    with pytest.raises(ValueError, match="baselines must be ewma, fast or all, got 'some'"):
        add_baselines(FORECASTS, PRICES, "some")


def test_all_need_a_training():
    with pytest.raises(ValueError, match="need the histories and labels of a training range"):
        add_baselines(FORECASTS, PRICES, "all")


@pytest.mark.parametrize("missing", ["arch", "lightgbm", "sklearn"])
def test_a_missing_package_is_named_with_its_extra(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    training = Training(DATES[100], [], [], HORIZONS, 8)
    with pytest.raises(ValueError, match=rf"the package {missing}: pip install 'spaceexploreai\[baselines\]'"):
        add_baselines(FORECASTS, PRICES, "all", training)


def test_ewma_alone_is_the_ewma_of_all_four():
    columns = [*FORECASTS, "naive_error", *naive_columns("ewma")]
    pd.testing.assert_frame_equal(add_baselines(FORECASTS, PRICES, "ewma"), TABLE[columns])


def test_fast_needs_none_of_the_packages():
    """In a process of its own, since this one has imported them."""
    blocked = "import sys; sys.modules |= dict.fromkeys(['arch', 'lightgbm', 'sklearn', 'scipy'], None)\n"
    code = f"{blocked}from spaceexploreai.evaluation import baselines, metrics, classes, leaks, learned"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_class_forecasts_get_the_usual_levels():
    table = FORECASTS[["ticker", "cutoff", "horizon"]].assign(p_down=0.2, p_flat=0.5, p_up=0.3)
    table = add_baselines(table, PRICES)
    assert quantile_columns(baselines.LEVELS, "ewma_") == [c for c in table if c.startswith("ewma_q")]
    assert len(baselines.LEVELS) == 19
    shared = quantile_columns(LEVELS, "ewma_")
    pd.testing.assert_frame_equal(table[shared], TABLE[shared])


def test_baselines_of_a_table_are_those_that_always_stand_there_and_others_that_do():
    assert baselines.baselines_of(TABLE) == list(BASELINES)
    assert baselines.baselines_of(TABLE.assign(dlinear_mean=0.0, garch_mean=0.0)) == [*BASELINES, "garch", "dlinear"]
