"""Figures of an equity curve against empyrical, SciPy, the papers' examples and simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import linregress, norm

from spaceexploreai.evaluation.performance import (
    FIGURES,
    best_by_chance,
    beta_alpha,
    deflated_sharpe,
    drawdown,
    format_tear_sheet,
    performance,
    probabilistic_sharpe,
    sharpe_with_error,
    tear_sheet,
)

TIME = np.arange(1, 301)
RETURNS = 0.01 * np.sin(1.7 * TIME) + 0.004 * np.cos(0.31 * TIME**2 % 7) + 0.0007
MARKET = 0.008 * np.sin(1.7 * TIME + 0.4) + 0.0002 + 0.002 * np.cos(2.9 * TIME)


def ledger(returns: np.ndarray, cost: float = 0.0, borrow: float = 0.0, turnover: float = 0.0) -> pd.DataFrame:
    equity = np.append(1.0, np.cumprod(1 + returns))
    index = pd.bdate_range("2020-01-01", periods=len(equity))
    return pd.DataFrame({"equity": equity, "cost": cost, "borrow": borrow, "turnover": turnover}, index=index)


def test_figures_are_those_of_empyrical():
    """empyrical-reloaded 0.7.1: cum_returns_final, annual_return, annual_volatility and so on of the same returns."""
    expected = {
        "total_return": 0.49292942322264266,
        "cagr": 0.4002094132789378,
        "volatility": 0.12032340468789454,
        "sharpe": 2.859406002970138,
        "max_drawdown": -0.024459235593349223,
        "calmar": 16.362302564670493,
        "beta": 1.0870864550275907,
    }
    figures = performance(ledger(RETURNS), ledger(MARKET))
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_probabilistic_sharpe_is_that_of_quantstats():
    """quantstats 0.0.86, whose skewness and kurtosis are corrected for the size of the sample."""
    assert performance(ledger(RETURNS), ledger(MARKET))["probabilistic_sharpe"] == pytest.approx(0.9990047, abs=1e-5)


@pytest.mark.parametrize(
    ("trials", "skewness", "kurtosis", "expected"), [(100, -3, 10, 0.9004), (46, -3, 10, 0.9505), (88, 0, 3, 0.9505)]
)
def test_deflated_sharpe_is_that_of_the_paper(trials, skewness, kurtosis, expected):
    """Bailey & López de Prado, 2014, "A numerical example": 2.5 a year of 250 days, five years, variance a half."""
    best = best_by_chance(trials, 0.5 / 250)
    assert probabilistic_sharpe(2.5 / math.sqrt(250), best, 1250, skewness, kurtosis) == pytest.approx(
        expected, abs=5e-5
    )


def test_best_of_hundred_by_chance_is_that_of_the_paper():
    assert best_by_chance(100, 0.5 / 250) == pytest.approx(0.1132, abs=5e-5)


def test_best_by_chance_is_the_mean_of_the_highest():
    draws = np.random.default_rng(0).normal(0, 0.3, (4000, 50)).max(axis=1)
    assert best_by_chance(50, 0.09) == pytest.approx(draws.mean(), abs=4 * draws.std() / math.sqrt(4000) + 0.003)


def test_deflated_sharpe_is_right_as_often_as_it_says():
    """The best of ten strategies without skill: its deflated ratio is above a half about every second time."""
    generator = np.random.default_rng(1)
    found = []
    for _ in range(300):
        trials = generator.normal(0, 0.01, (10, 250))
        found.append(deflated_sharpe(trials[(trials.mean(axis=1) / trials.std(axis=1)).argmax()], 10))
    probabilities = np.array(found)[:, 1]
    assert 0.35 < np.mean(probabilities > 0.5) < 0.6
    assert np.mean(probabilities > 0.95) < 0.03
    assert found[0][0] == pytest.approx(best_by_chance(10, 1 / 249) * math.sqrt(252))


@given(trials=st.integers(1, 10**6))
@settings(max_examples=25, deadline=None)
def test_more_trials_deflate_more(trials):
    fewer, more = deflated_sharpe(RETURNS, trials), deflated_sharpe(RETURNS, trials + max(1, trials // 3))
    assert fewer[0] < more[0]
    assert fewer[1] > more[1]


def autoregressive(generator: np.random.Generator, coefficient: float, count: int) -> np.ndarray:
    shocks = generator.normal(0.0005, 0.01, count)
    for day in range(1, count):
        shocks[day] += coefficient * shocks[day - 1]
    return shocks


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_sharpe_ratios_scatter_as_their_error_says(coefficient):
    generator = np.random.default_rng(2)
    found = np.array([sharpe_with_error(autoregressive(generator, coefficient, 750)) for _ in range(400)])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.12)
    if coefficient == 0:  # Lo's formula for independent normal returns
        daily = found[:, 0].mean() / math.sqrt(252)
        assert found[:, 1].mean() == pytest.approx(math.sqrt((1 + daily**2 / 2) / 750 * 252), rel=0.06)


def test_beta_and_alpha_are_those_of_a_regression():
    beta, alpha, _ = beta_alpha(RETURNS, MARKET)
    line = linregress(MARKET, RETURNS)
    assert beta == pytest.approx(line.slope, rel=1e-10)
    assert alpha == pytest.approx(line.intercept * 252, rel=1e-10)


def test_alpha_t_is_a_t_statistic():
    generator = np.random.default_rng(3)
    found = []
    for _ in range(400):
        market = generator.normal(0.0005, 0.01, 750)
        found.append(beta_alpha(0.7 * market + generator.normal(0, 0.01, 750), market)[2])
    assert np.mean(found) == pytest.approx(0, abs=0.2)
    assert np.std(found) == pytest.approx(1, abs=0.15)


def test_the_market_has_no_alpha_to_itself():
    beta, alpha, t = beta_alpha(MARKET, MARKET)
    assert beta == pytest.approx(1)
    assert alpha == pytest.approx(0, abs=1e-15)
    assert math.isnan(t)


@given(equity=st.lists(st.floats(0.1, 10), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_drawdown_is_from_the_highest_so_far(equity):
    expected = [value / max(equity[: place + 1]) - 1 for place, value in enumerate(equity)]
    assert drawdown(pd.Series(equity)).tolist() == pytest.approx(expected)


def test_costs_and_turnover_are_a_year():
    daily = ledger(np.zeros(504), cost=0.001, borrow=0.0005, turnover=0.01)
    figures = performance(daily, daily)
    assert figures["cost_drag"] == pytest.approx(0.0015 * 252)
    assert figures["turnover"] == pytest.approx(0.01 * 505 / 2)


@pytest.mark.parametrize("returns", [np.zeros(20), np.array([0.01])])
def test_what_is_undefined_is_nan(returns):
    figures = performance(ledger(returns), ledger(returns))
    undefined = {name for name, value in figures.items() if math.isnan(value)}
    expected = {"sharpe", "sharpe_se", "probabilistic_sharpe", "deflated_sharpe", "calmar", "beta", "alpha", "alpha_t"}
    assert undefined == expected | ({"hit_rate"} if not returns.any() else {"volatility"})


def test_gains_are_counted_among_days_that_moved():
    assert performance(ledger(np.array([0.01, 0.0, -0.01, 0.02])), ledger(MARKET[:4]))["hit_rate"] == pytest.approx(
        2 / 3
    )


def test_tear_sheet_deflates_the_strategy_alone():
    dailies = {"strategy": ledger(RETURNS), "equal_weight": ledger(MARKET)}
    sheet = tear_sheet(dailies, 50)
    assert list(sheet.index) == list(FIGURES)
    assert sheet.loc["deflated_sharpe", "strategy"] == pytest.approx(deflated_sharpe(RETURNS, 50)[1])
    assert math.isnan(sheet.loc["deflated_sharpe", "equal_weight"])
    assert sheet.loc["beta"].tolist() == pytest.approx([beta_alpha(RETURNS, MARKET)[0], 1])
    lines = format_tear_sheet(sheet).splitlines()
    assert lines[0].split() == ["strategy", "equal", "weight"]
    assert lines[1].split() == ["total", "return", "+49.3%", f"{np.prod(1 + MARKET) - 1:+.1%}"]
    assert "nan" not in format_tear_sheet(sheet)


def test_trials_are_counted_from_one():
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        deflated_sharpe(RETURNS, 0)
    best, probability = deflated_sharpe(RETURNS, 1)
    assert best == 0
    skewness, kurtosis = (np.mean(((RETURNS - RETURNS.mean()) / RETURNS.std()) ** power) for power in (3, 4))
    daily = RETURNS.mean() / RETURNS.std(ddof=1)
    error = math.sqrt((1 - skewness * daily + (kurtosis - 1) / 4 * daily**2) / 299)
    assert probability == pytest.approx(norm.cdf(daily / error))
