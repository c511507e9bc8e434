"""GARCH(1,1) against the package `arch` and simulation; causal; falls back where it cannot be fitted."""

import logging

import numpy as np
import pandas as pd
import pytest
from arch import arch_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from spaceexploreai.evaluation.baselines import add_baselines, quantile_columns
from spaceexploreai.evaluation.garch import Garch, fit_garch, forecast_garch

TRUE = Garch(omega=2e-6, alpha=0.1, beta=0.88)
LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]
HORIZONS = [1, 5]
DATES = pd.bdate_range("2010-01-01", periods=1500)
END = DATES[1199]


def simulate(count: int, seed: int, model: Garch = TRUE) -> np.ndarray:
    """Log-returns of the model."""
    generator, variance, returns = np.random.default_rng(seed), model.omega / (1 - model.alpha - model.beta), []
    for shock in generator.normal(size=count):
        returns.append(np.sqrt(variance) * shock)
        variance = model.omega + model.alpha * returns[-1] ** 2 + model.beta * variance
    return np.array(returns)


def make_prices(tickers=("AAA", "BBB", "CCC")) -> pd.DataFrame:
    closes = {
        name: 50 * np.exp(np.append(0, simulate(len(DATES) - 1, seed)).cumsum()) for seed, name in enumerate(tickers)
    }
    frames = [
        pd.DataFrame({"ticker": name, "date": DATES, **dict.fromkeys(["open", "high", "low", "close"], close)})
        for name, close in closes.items()
    ]
    return pd.concat(frames, ignore_index=True).assign(volume=1.0)


def make_forecasts(tickers=("AAA", "BBB", "CCC"), cutoffs=DATES[1200:1480:7]) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([tickers, cutoffs, HORIZONS], names=["ticker", "cutoff", "horizon"])
    return index.to_frame(index=False).assign(**dict.fromkeys(quantile_columns(LEVELS), 0.0))


PRICES, FORECASTS = make_prices(), make_forecasts()


def garch(prices: pd.DataFrame, forecasts: pd.DataFrame = FORECASTS) -> pd.DataFrame:
    ewma = add_baselines(forecasts, prices).filter(regex="^ewma_")
    return forecast_garch(forecasts, prices, END, ewma)


TABLE = garch(PRICES)


def test_parameters_are_found():
    model = fit_garch(simulate(8000, seed=5))
    assert model.alpha == pytest.approx(TRUE.alpha, abs=0.03)
    assert model.beta == pytest.approx(TRUE.beta, abs=0.04)
    assert model.omega / (1 - model.alpha - model.beta) == pytest.approx(1e-4, rel=0.3)


@pytest.mark.parametrize("horizon", [1, 4, 10])
def test_variances_are_those_of_the_package(horizon):
    """But for what stands before the first return, which is forgotten within months."""
    returns = simulate(1000, seed=1)
    fixed = arch_model(100 * returns, mean="Zero", rescale=False).fix([TRUE.omega * 1e4, TRUE.alpha, TRUE.beta])
    ahead = fixed.forecast(horizon=horizon, start=600, reindex=False).variance.to_numpy().sum(axis=1) / 1e4
    np.testing.assert_allclose(TRUE.ahead(TRUE.variances(returns), horizon)[600:], ahead, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0.01, 0.3), share=st.floats(0.1, 0.99), horizon=st.integers(1, 60))
def test_variance_ahead_is_its_closed_form(alpha, share, horizon):
    """Returns to the long run by the persistence of each day."""
    model = Garch(1e-6, alpha, share * (0.999 - alpha))
    persistence = model.alpha + model.beta
    long_run = model.omega / (1 - persistence)
    now = np.array([0.3, 1.0, 5.0]) * long_run
    expected = horizon * long_run + (now - long_run) * (1 - persistence**horizon) / (1 - persistence)
    np.testing.assert_allclose(model.ahead(now, horizon), expected, rtol=1e-9)


def test_forecast_is_the_pool_of_standardised_returns_in_todays_volatility():
    """A twin of one row: filter, standardise, stretch."""
    row = FORECASTS[(FORECASTS["ticker"] == "BBB") & (FORECASTS["horizon"] == 5)].index[3]
    pool, scales = [], {}
    for ticker, bars in PRICES.groupby("ticker"):
        log_close = np.log(bars["close"].to_numpy())
        model = fit_garch(np.diff(log_close[:1200]))
        scales[ticker] = np.sqrt(model.ahead(model.variances(np.diff(log_close)), 5))
        for t in range(1, 1195):  # the target of the last of them is the end of the training
            pool.append((log_close[t + 5] - log_close[t]) / scales[ticker][t - 1])
    scale = scales["BBB"][DATES.get_loc(FORECASTS.loc[row, "cutoff"]) - 1]
    expected = [np.mean(pool) * scale, *np.quantile(pool, LEVELS) * scale, np.mean(np.array(pool) > 0)]
    np.testing.assert_allclose(TABLE.loc[row].astype(float), expected, rtol=1e-9)


def test_quantiles_hold_what_they_say():
    table = garch(PRICES, make_forecasts(cutoffs=DATES[1200:1490]))
    closes = PRICES.pivot(index="date", columns="ticker", values="close")
    rows = make_forecasts(cutoffs=DATES[1200:1490])
    y = np.array(
        [
            np.log(closes[ticker].iloc[at + horizon] / closes[ticker].iloc[at])
            for ticker, at, horizon in zip(
                rows["ticker"], DATES.get_indexer(rows["cutoff"]), rows["horizon"], strict=True
            )
        ]
    )
    one = (rows["horizon"] == 1).to_numpy()
    assert np.mean((y > table["q0.05"]) & (y < table["q0.95"])) == pytest.approx(0.9, abs=0.04)
    width = (table["q0.95"] - table["q0.05"])[one]
    assert np.corrcoef(width, np.abs(y[one]))[0, 1] > 0.1
    assert np.median(width) == pytest.approx(2 * norm.ppf(0.95) * 0.01, rel=0.4)


@settings(max_examples=8, deadline=None)
@given(ticker=st.sampled_from(["AAA", "BBB", "CCC"]), t=st.integers(1200, 1480), factor=st.floats(0.3, 3.0))
def test_a_bar_after_the_training_changes_no_forecast_before_it(ticker, t, factor):
    changed = PRICES.copy()
    changed.loc[(changed["ticker"] == ticker) & (changed["date"] == DATES[t]), "close"] *= factor
    earlier = (FORECASTS["cutoff"] < DATES[t]) | (FORECASTS["ticker"] != ticker)
    table = garch(changed)
    pd.testing.assert_frame_equal(table[earlier], TABLE[earlier], check_exact=True)
    if (~earlier).any():
        assert (table[~earlier] != TABLE[~earlier]).any(axis=None)


def test_parameters_and_pool_know_the_training_alone():
    """Had they seen the wild days after it, calm cutoffs before these would be wider."""
    torn = PRICES.copy()
    torn.loc[torn["date"] > DATES[1450], "close"] *= np.exp(np.random.default_rng(0).normal(size=3 * 49))
    before = FORECASTS["cutoff"] <= DATES[1450]
    pd.testing.assert_frame_equal(garch(torn)[before], TABLE[before], check_exact=True)


def late(prices: pd.DataFrame) -> pd.DataFrame:
    """BBB is listed 200 bars before the end of the training, CCC hardly moves."""
    prices = prices[(prices["ticker"] != "BBB") | (prices["date"] > DATES[999])].reset_index(drop=True)
    frozen = prices["ticker"].eq("CCC") & ~prices["date"].isin(DATES[::5])
    prices.loc[frozen, "close"] = np.nan
    return prices.assign(close=prices["close"].ffill())


def test_a_ticker_that_cannot_be_fitted_is_forecast_by_ewma_and_counted(caplog):
    prices = late(PRICES)
    with caplog.at_level(logging.WARNING):
        table = garch(prices)
    assert caplog.messages == ["garch: 2 of 3 tickers are forecast by ewma: BBB, CCC"]
    ewma = add_baselines(FORECASTS, prices).filter(regex="^ewma_")
    ewma.columns = table.columns
    fitted = FORECASTS["ticker"] == "AAA"
    pd.testing.assert_frame_equal(table[~fitted], ewma[~fitted])
    assert (table[fitted]["q0.05"] != ewma[fitted]["q0.05"]).all()


def test_an_optimiser_that_does_not_converge_falls_back(monkeypatch):
    assert fit_garch(simulate(500, seed=0)) is not None
    monkeypatch.setattr("arch.univariate.base.ARCHModelResult.convergence_flag", 4)
    assert fit_garch(simulate(500, seed=0)) is None


def test_returns_too_few_for_a_pool_leave_ewma():
    """Of 20 days ahead, a training of 260 bars has too few; of one it has enough."""
    prices = PRICES[(PRICES["ticker"] == "AAA") & (PRICES["date"] > DATES[930])].reset_index(drop=True)
    forecasts = make_forecasts(["AAA"]).replace({"horizon": {5: 180}})
    table, ewma = garch(prices, forecasts), add_baselines(forecasts, prices)
    same = table["q0.95"] == ewma["ewma_q0.95"]
    pd.testing.assert_series_equal(same, forecasts["horizon"] == 180, check_names=False)
