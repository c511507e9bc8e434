"""Every metric against a scalar twin in plain Python and, where one exists, a foreign implementation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import norm
from sklearn.metrics import mean_absolute_error, mean_pinball_loss, mean_squared_error, root_mean_squared_error

from spaceexploreai.evaluation import metrics

LEVELS = np.arange(1, 20) / 20
RNG = np.random.default_rng(7)
Y = RNG.normal(scale=0.02, size=300)
Y[::50] = 0.0
MEAN = 0.2 * Y + RNG.normal(scale=0.01, size=300)
QUANTILES = MEAN[:, None] + 0.02 * norm.ppf(LEVELS)

returns = arrays(float, st.integers(1, 20), elements=st.floats(-0.5, 0.5, allow_subnormal=False))


def test_mse_rmse_mae():
    total_square = total_abs = 0.0
    for y, mean in zip(Y, MEAN, strict=True):
        total_square += (y - mean) ** 2
        total_abs += abs(y - mean)
    assert metrics.mse(Y, MEAN) == pytest.approx(total_square / len(Y)) == mean_squared_error(Y, MEAN)
    assert metrics.rmse(Y, MEAN) == pytest.approx(math.sqrt(total_square / len(Y)))
    assert metrics.rmse(Y, MEAN) == pytest.approx(root_mean_squared_error(Y, MEAN))
    assert metrics.mae(Y, MEAN) == pytest.approx(total_abs / len(Y)) == mean_absolute_error(Y, MEAN)


def test_direction_accuracy():
    hits = total = 0
    for y, mean in zip(Y, MEAN, strict=True):
        hits += y * mean > 0
        total += y != 0
    assert total < len(Y)
    assert metrics.direction_accuracy(Y, MEAN) == pytest.approx(hits / total)


def test_direction_accuracy_of_no_direction_is_undefined():
    assert math.isnan(metrics.direction_accuracy(Y, np.zeros_like(Y)))
    assert math.isnan(metrics.direction_accuracy(np.zeros(3), np.ones(3)))
    # A single zero among the means is a miss, not a way to drop the row.
    assert metrics.direction_accuracy(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == 0.5


def test_direction_base_rate():
    up = down = 0
    for y in Y:
        up += y > 0
        down += y < 0
    assert metrics.direction_base_rate(Y) == pytest.approx(max(up, down) / (up + down))
    assert metrics.direction_base_rate(np.array([-1.0, -2.0, 3.0, 0.0])) == pytest.approx(2 / 3)
    assert math.isnan(metrics.direction_base_rate(np.zeros(3)))


def test_pinball():
    total = 0.0
    for y, row in zip(Y, QUANTILES, strict=True):
        for level, quantile in zip(LEVELS, row, strict=True):
            total += level * (y - quantile) if y >= quantile else (1 - level) * (quantile - y)
    assert metrics.pinball(Y, QUANTILES, LEVELS) == pytest.approx(total / QUANTILES.size)
    by_level = [mean_pinball_loss(Y, q, alpha=a) for a, q in zip(LEVELS, QUANTILES.T, strict=True)]
    assert metrics.pinball(Y, QUANTILES, LEVELS) == pytest.approx(np.mean(by_level))


def test_crps_approaches_the_closed_form_of_the_gaussian():
    """Gneiting & Raftery, 2007, equation 21."""
    levels = (np.arange(2000) + 0.5) / 2000
    z = (Y - MEAN) / 0.02
    exact = 0.02 * np.mean(z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    quantiles = MEAN[:, None] + 0.02 * norm.ppf(levels)
    assert metrics.crps(Y, quantiles, levels) == pytest.approx(exact, rel=1e-3)


@given(y=returns, seed=st.integers(0, 1000))
def test_crps_of_a_point_mass_is_its_absolute_error(y, seed):
    point = np.random.default_rng(seed).normal(size=len(y))
    quantiles = np.repeat(point[:, None], len(LEVELS), axis=1)
    assert metrics.crps(y, quantiles, LEVELS) == pytest.approx(metrics.mae(y, point))


@given(y=returns)
def test_crps_is_zero_only_for_the_outcome_itself(y):
    quantiles = np.repeat(y[:, None], len(LEVELS), axis=1)
    assert metrics.crps(y, quantiles, LEVELS) == 0
    assert metrics.crps(y, quantiles + 0.01, LEVELS) > 0


def test_crps_skill():
    assert metrics.crps_skill(0.9, 1.0) == pytest.approx(0.1)
    assert metrics.crps_skill(1.5, 1.0) == pytest.approx(-0.5)
    assert math.isnan(metrics.crps_skill(0.0, 0.0))


def test_coverage():
    lower, upper = QUANTILES[:, 0].copy(), QUANTILES[:, -1]
    lower[3] = Y[3]  # the border counts as inside
    inside = 0
    for y, low, high in zip(Y, lower, upper, strict=True):
        inside += low <= y <= high
    assert 0 < inside < len(Y)
    assert metrics.coverage(Y, lower, upper) == inside / len(Y)


def test_coverage_of_the_true_quantiles_is_their_level():
    scale = np.random.default_rng(1).uniform(0.01, 0.05, size=20_000)
    y = np.random.default_rng(2).normal(scale=scale)
    # Four standard errors: sqrt(0.9 * 0.1 / 20000) = 0.0021.
    assert metrics.coverage(y, *(scale * norm.ppf([[0.05], [0.95]]))) == pytest.approx(0.9, abs=0.0085)


def test_mase_divides_by_the_naive_error_of_each_ticker():
    naive = np.where(np.arange(len(Y)) % 2, 0.01, 0.03)
    naive[::25] = 0.0  # never moved
    total = count = 0
    for y, mean, error in zip(Y, MEAN, naive, strict=True):
        if error:
            total += abs(y - mean) / error
            count += 1
    assert metrics.mase(Y, MEAN, naive) == pytest.approx(total / count)
    assert math.isnan(metrics.mase(Y, MEAN, np.zeros(len(Y))))


def test_interval_score():
    """Gneiting & Raftery, 2007, equation 43."""
    lower, upper = QUANTILES[:, 1], QUANTILES[:, -2]
    expected = []
    for y, low, high in zip(Y, lower, upper, strict=True):
        penalty = 2 / 0.2 * ((low - y) * (y < low) + (y - high) * (y > high))
        expected.append(high - low + penalty)
    np.testing.assert_allclose(metrics.interval_score(Y, lower, upper, 0.8), expected)


def test_weighted_interval_score():
    """Bracher et al., 2021, equation 1, with weights alpha/2."""
    total = 0.0
    for y, row in zip(Y, QUANTILES, strict=True):
        one = 0.5 * abs(y - row[9])
        for k in range(9):
            alpha, low, high = 2 * LEVELS[k], row[k], row[-1 - k]
            one += alpha / 2 * (high - low + 2 / alpha * max(low - y, 0) + 2 / alpha * max(y - high, 0))
        total += one / 9.5
    assert metrics.weighted_interval_score(Y, QUANTILES, LEVELS) == pytest.approx(total / len(Y))
    assert metrics.weighted_interval_score(Y, QUANTILES, LEVELS) == pytest.approx(metrics.crps(Y, QUANTILES, LEVELS))


def test_weighted_interval_score_takes_intervals_alone():
    some = [0, 5, 9, 18]  # 0.05, 0.3, 0.5, 0.95: one is without its partner
    alone = metrics.weighted_interval_score(Y, QUANTILES[:, [0, 9, 18]], LEVELS[[0, 9, 18]])
    assert metrics.weighted_interval_score(Y, QUANTILES[:, some], LEVELS[some]) == alone
    assert math.isnan(metrics.weighted_interval_score(Y, QUANTILES[:, [0, 18]], LEVELS[[0, 18]]))


def test_pit_histogram():
    table = metrics.pit_histogram(Y, QUANTILES, LEVELS)
    counts = [0.0] * 20
    for y, row in zip(Y, QUANTILES, strict=True):
        counts[sum(quantile < y for quantile in row)] += 1
    np.testing.assert_allclose(table["share"], np.array(counts) / len(Y))
    np.testing.assert_allclose(table["expected"], 0.05)
    np.testing.assert_allclose(table["lower"][1:], LEVELS)


def test_pit_of_the_true_quantiles_is_flat():
    scale = np.random.default_rng(1).uniform(0.01, 0.05, size=50_000)
    y = np.random.default_rng(2).normal(scale=scale)
    levels = np.array([0.1, 0.5, 0.7])
    table = metrics.pit_histogram(y, scale[:, None] * norm.ppf(levels), levels)
    np.testing.assert_allclose(table["expected"], [0.1, 0.4, 0.2, 0.3])
    np.testing.assert_allclose(table["share"], table["expected"], atol=0.01)


def test_an_outcome_on_a_border_counts_half_on_both_sides():
    """As of a price that did not move, of which the median of `zero` is exactly right."""
    table = metrics.pit_histogram(np.zeros(8), np.tile([-1.0, 0.0, 1.0], (8, 1)), np.array([0.1, 0.5, 0.9]))
    assert table["share"].tolist() == [0, 0.5, 0.5, 0]
