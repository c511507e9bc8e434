"""Standard errors and tests against statsmodels, SciPy and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, t
from sklearn.metrics import matthews_corrcoef
from statsmodels.api import OLS
from statsmodels.stats.proportion import proportion_confint

from spaceexploreai.evaluation import inference


def moving_sums(series: int, dates: int, horizon: int, seed: int) -> np.ndarray:
    """(series, dates) sums of `horizon` neighbouring shocks: forecasts that overlap."""
    noise = np.random.default_rng(seed).normal(size=(series, dates + horizon - 1))
    return np.lib.stride_tricks.sliding_window_view(noise, horizon, axis=1).sum(axis=-1)


@pytest.mark.parametrize(
    ("count", "horizon", "lags"), [(100, 1, 13), (500, 10, 30), (100, 40, 39), (9, 1, 4), (1, 5, 0)]
)
def test_lags_are_those_of_the_rule(count, horizon, lags):
    """1.3·sqrt(500) is 29.07, and overlapping forecasts are within it or it gives way."""
    assert inference.bandwidth(count, horizon) == lags


@settings(max_examples=20, deadline=None)
@given(count=st.integers(5, 150), horizon=st.integers(1, 30), seed=st.integers(0, 1000))
def test_standard_error_is_newey_and_wests(count, horizon, seed):
    values = np.random.default_rng(seed).normal(size=count).cumsum()
    options = {"maxlags": inference.bandwidth(count, horizon)}
    expected = OLS(values, np.ones(count)).fit(cov_type="HAC", cov_kwds=options).bse[0]
    assert inference.standard_error(values, horizon) == pytest.approx(expected)


def test_standard_error_of_overlapping_forecasts():
    sums = moving_sums(200, 1000, 10, seed=0)
    errors = [inference.standard_error(one, 10) for one in sums]
    assert np.median(errors) == pytest.approx(sums.mean(axis=1).std(), rel=0.2)


@pytest.mark.parametrize(("dates", "horizon"), [(60, 1), (250, 1), (250, 5), (500, 10)])
def test_intervals_with_the_critical_value_hold_what_they_say(dates, horizon):
    """1.96 would reject the truth too often: as lags grow with dates, t statistics have fat tails."""
    sums = moving_sums(1500, dates, horizon, seed=1)
    values = np.array([one.mean() / inference.standard_error(one, horizon) for one in sums])
    critical = inference.critical_value(dates, horizon)
    assert np.mean(np.abs(values) > critical) == pytest.approx(0.05, abs=0.025)
    assert np.mean(np.abs(values) > 1.96) > np.mean(np.abs(values) > critical)
    assert inference.critical_value(10**9) == pytest.approx(1.96, abs=1e-3)


def clustered(generator, dates=400, most=30):
    """Rows of tickers that share a market: values and codes of their dates."""
    codes = np.repeat(np.arange(dates), generator.integers(3, most, size=dates))
    return codes, generator.normal(size=dates)[codes] + generator.normal(size=len(codes))


def test_error_of_a_mean_is_that_of_regression_with_the_rows_of_a_date_summed():
    """Driscoll & Kraay, 1998: statsmodels' `hac-groupsum`."""
    codes, values = clustered(np.random.default_rng(0))
    options = {"time": codes, "maxlags": inference.bandwidth(400), "use_correction": False}
    expected = OLS(values, np.ones(len(values))).fit(cov_type="hac-groupsum", cov_kwds=options)
    mean, error = inference.mean_with_error(values, codes)
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(expected.bse[0])
    assert error > 3 * values.std() / len(values) ** 0.5  # which takes rows for observations


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_rows_of_a_table_may_be_in_any_order(seed):
    generator = np.random.default_rng(seed)
    codes, values = clustered(generator, dates=30)
    mixed = generator.permutation(len(codes))
    expected = inference.mean_with_error(values, codes, 3)
    days = np.datetime64("2020-01-01") + 7 * codes
    assert inference.mean_with_error(values[mixed], inference.date_codes(days[mixed]), 3) == pytest.approx(expected)


def test_error_of_a_skill_is_that_of_resampled_dates():
    generator = np.random.default_rng(0)
    codes, _ = clustered(generator)
    wild = generator.gamma(4, size=400)[codes]  # calm and wild days
    reference = wild * generator.gamma(9, size=len(codes)) / 9
    loss = reference * (0.9 + 0.1 * generator.normal(size=400)[codes])
    value, error = inference.skill_with_error(loss, reference, codes)
    assert value == pytest.approx(1 - loss.mean() / reference.mean())
    sums = np.stack([inference.sums_by_date(one, codes) for one in (loss, reference)])
    draws = [1 - np.divide(*sums[:, generator.integers(0, 400, size=400)].sum(axis=1)) for _ in range(2000)]
    assert error == pytest.approx(np.std(draws), rel=0.25)
    assert inference.skill_with_error(reference, reference, codes) == (0, 0)
    assert all(map(math.isnan, inference.skill_with_error(loss, 0 * loss, codes)))


def test_t_of_what_has_no_error_is_undefined():
    assert inference.t_value(3.0, 1.5) == 2
    for error in (0.0, math.nan):
        assert math.isnan(inference.t_value(1.0, error))


# --- Diebold & Mariano ---


def dm_twin(loss: list[float], other: list[float], horizon: int) -> float:
    """The formulas of the two papers, term by term, of one forecast a date."""
    d = [b - a for a, b in zip(loss, other, strict=True)]
    n = len(d)
    mean = sum(d) / n
    total = 0.0
    for k in range(-(horizon - 1), horizon):
        total += sum((d[i] - mean) * (d[i - abs(k)] - mean) for i in range(abs(k), n)) / n
    statistic = mean / math.sqrt(total / n)
    return statistic * math.sqrt((n + 1 - 2 * horizon + horizon * (horizon - 1) / n) / n)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), horizon=st.integers(1, 4))
def test_diebold_mariano_is_that_of_its_formulas(seed, horizon):
    generator = np.random.default_rng(seed)
    loss, other = generator.gamma(2, size=(2, 60)) + moving_sums(1, 60, 4, seed)
    value, p = inference.diebold_mariano(loss, other, np.arange(60), horizon)
    difference = other - loss
    long_run = sum(inference.autocovariances(difference, horizon - 1)) * 2
    if long_run > 0.5 * difference.var():  # else Bartlett weights take over
        assert value == pytest.approx(dm_twin(loss.tolist(), other.tolist(), horizon))
        assert p == pytest.approx(2 * t.sf(abs(value), 59), abs=1e-4)


def test_diebold_mariano_adds_up_the_tickers_of_a_date():
    generator = np.random.default_rng(3)
    codes, loss = clustered(generator, dates=50)
    other = loss + 0.1 + generator.normal(size=len(codes))
    sums = [inference.sums_by_date(one, codes) for one in (loss, other)]
    assert inference.diebold_mariano(loss, other, codes)[0] == pytest.approx(dm_twin(*map(list, sums), 1))
    assert inference.diebold_mariano(loss, other, codes)[0] > 0  # the first is the better one


@pytest.mark.parametrize(("dates", "horizon"), [(60, 1), (250, 1), (250, 5), (500, 10)])
def test_equal_forecasts_are_told_apart_as_often_as_stated(dates, horizon):
    """Tickers share a market, targets overlap; two forecasts err by independent amounts of the same size."""
    rejected, count, codes = 0, 500, np.repeat(np.arange(dates), 5)
    generator = np.random.default_rng(dates + horizon)
    y = np.repeat(moving_sums(count, dates, horizon, seed=2), 5, axis=1)
    for outcome in y:
        errors = generator.normal(size=(2, dates * 5)) * 0.5
        one, other = ((outcome + 0.3 * generator.normal(size=len(codes)) - error) ** 2 for error in errors)
        rejected += inference.diebold_mariano(one, other, codes, horizon)[1] < 0.05
    assert rejected / count == pytest.approx(0.05, abs=0.04)  # four standard errors


def test_a_better_forecast_is_found():
    generator = np.random.default_rng(0)
    y = generator.normal(size=500)
    good, bad = (y - 0.5 * y + 0.1 * generator.normal(size=500)) ** 2, y**2
    value, p = inference.diebold_mariano(good, bad, np.arange(500), 5)
    assert value > 5
    assert p < 1e-6


def test_a_variance_below_zero_gives_way_to_bartletts():
    """Neighbours that alternate: with equal weights the estimate is negative."""
    difference = np.tile([1.0, -1.0], 20) + np.linspace(0, 0.1, 40)
    covariances = inference.autocovariances(difference, 1)
    assert covariances[0] + 2 * covariances[1] < 0 < covariances[0] + covariances[1]
    value, _ = inference.diebold_mariano(np.zeros(40), difference, np.arange(40), 2)
    expected = difference.mean() / math.sqrt((covariances[0] + covariances[1]) / 40) * math.sqrt((37 + 2 / 40) / 40)
    assert value == pytest.approx(expected)


def test_diebold_mariano_without_a_difference_or_dates_is_undefined():
    loss = np.random.default_rng(0).normal(size=30)
    for one, other, horizon in ((loss, loss, 1), (loss[:5], loss[5:10], 5), (loss[:1], loss[1:2], 1)):
        assert all(map(math.isnan, inference.diebold_mariano(one, other, np.arange(len(one)), horizon)))


@settings(max_examples=25, deadline=None)
@given(value=st.floats(-8, 8), freedom=st.integers(5, 2000))
def test_p_values_are_those_of_students_t(value, freedom):
    assert inference.two_sided(value, freedom) == pytest.approx(2 * t.sf(abs(value), freedom), abs=1e-3)


# --- directions ---


@settings(max_examples=25, deadline=None)
@given(hits=st.integers(0, 60), count=st.integers(1, 60))
def test_wilson_interval(hits, count):
    hits = min(hits, count)
    found = inference.wilson_interval(hits / count, count, 1.96)
    assert found == pytest.approx(binomtest(hits, count).proportion_ci(0.95, method="wilson"), abs=1e-4)
    assert found == pytest.approx(proportion_confint(hits, count, method="wilson"), abs=1e-4)


def test_the_interval_of_a_direction_holds_what_it_says():
    """Of 1,000 series of 60 days of 20 tickers each, right or wrong together: with 1.96 standard errors it would be
    90 %."""
    held, dates = 0, np.repeat(np.arange(60), 20)
    for seed in range(1000):
        generator = np.random.default_rng(seed)
        chance = np.repeat(0.52 + 0.3 * generator.choice([-1, 1], size=60), 20)
        share, error = inference.mean_with_error((generator.random(1200) < chance).astype(float), dates)
        count = inference.effective_count(share, error, 1200)
        low, high = inference.wilson_interval(share, count, inference.critical_value(60))
        held += low <= 0.52 <= high
    assert held / 1000 == pytest.approx(0.95, abs=0.02)


def test_rows_of_one_date_count_once():
    """Forty copies of each of 500 coins are worth 500 rows."""
    coins = np.random.default_rng(0).integers(0, 2, size=500).astype(float)
    share, error = inference.mean_with_error(np.repeat(coins, 40), np.repeat(np.arange(500), 40))
    assert inference.effective_count(share, error, 20_000) == pytest.approx(500, rel=0.5)
    assert math.isnan(inference.effective_count(1.0, 0.0, 10))


def test_always_saying_up_is_no_knowledge_of_direction():
    generator = np.random.default_rng(0)
    codes, y = clustered(generator)
    y = y + 0.5  # mostly up
    assert math.isnan(inference.direction_t(y, np.ones(len(y)), codes))
    chance = [inference.direction_t(y, generator.normal(size=len(y)) + 0.5, codes) for _ in range(100)]
    assert np.mean(np.abs(chance) > 2.2) < 0.15
    known = inference.direction_t(y, y + 3 * generator.normal(size=len(y)), codes)
    assert known > 5
    assert inference.direction_t(y, -y, codes) < -5


def test_direction_t_has_the_sign_of_the_correlation_of_signs():
    generator = np.random.default_rng(1)
    for _ in range(10):
        y, mean = generator.normal(size=(2, 300))
        value = inference.direction_t(y, mean, np.arange(300))
        assert np.sign(value) == np.sign(matthews_corrcoef(y > 0, mean > 0))
