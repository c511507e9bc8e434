"""Scores of sampled paths: beside closed forms, and with errors that know that one date is one example."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, spearmanr

from spaceexploreai.evaluation.paths import (
    LIKELIHOOD,
    Outcomes,
    clustered_mean,
    compare,
    coverage_ensemble,
    crps_ensemble,
    format_comparison,
    score_samples,
)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_the_crps_is_its_definition_over_all_pairs(seed, count):
    generator = np.random.default_rng(seed)
    y, samples = generator.normal(size=3), generator.normal(size=(3, count)).round(1)  # with ties
    for truth, own, found in zip(y, samples, crps_ensemble(y, samples), strict=True):
        pairs = [abs(a - b) for i, a in enumerate(own) for j, b in enumerate(own) if i != j]
        assert found == pytest.approx(np.abs(own - truth).mean() - np.mean(pairs) / 2, abs=1e-12)


@pytest.mark.parametrize("y", [-2.0, 0.0, 0.7])
def test_the_crps_of_normal_samples_is_that_of_the_normal_distribution(y):
    """Gneiting & Raftery, 2007, equation 21; also on average over few samples."""
    expected = y * (2 * norm.cdf(y) - 1) + 2 * norm.pdf(y) - 1 / np.sqrt(np.pi)
    samples = np.random.default_rng(0).normal(size=(1, 200_000))
    assert crps_ensemble(np.array([y]), samples)[0] == pytest.approx(expected, abs=5e-3)
    assert crps_ensemble(np.full(50_000, y), samples.reshape(50_000, 4)).mean() == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("count", [5, 33, 64])
def test_samples_of_the_law_cover_what_they_should(count):
    generator = np.random.default_rng(count)
    y, samples = generator.standard_t(4, size=20_000), generator.standard_t(4, size=(20_000, count))
    assert coverage_ensemble(y, samples).mean() == pytest.approx(0.9, abs=0.008)
    assert coverage_ensemble(y, samples, 0.8).mean() == pytest.approx(0.8, abs=0.01)


def test_errors_of_independent_dates_are_the_usual_ones():
    values = np.random.default_rng(0).normal(size=50)
    mean, error = clustered_mean(values, np.arange(50))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / 50**0.5)


def test_more_tickers_that_move_alike_are_not_more_examples():
    values, dates = np.random.default_rng(0).normal(size=30), np.arange(30)
    alone = clustered_mean(values, dates)
    assert clustered_mean(np.tile(values, 7), np.tile(dates, 7)) == pytest.approx(alone)
    with_gaps = np.append(values, [np.nan, np.nan])
    assert clustered_mean(with_gaps, np.append(dates, [3, 99])) == pytest.approx(alone)


def test_the_error_is_the_spread_of_the_mean():
    """Of simulated dates, unlike in number of tickers and with a shock of their own."""
    generator = np.random.default_rng(1)
    dates = np.repeat(np.arange(60), generator.integers(1, 9, 60))
    found = np.array(
        [
            clustered_mean(generator.normal(size=60)[dates] + generator.normal(size=len(dates)), dates)
            for _ in range(400)
        ]
    )
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.1)


def test_one_date_has_no_error_and_nothing_no_mean():
    mean, error = clustered_mean(np.array([1.0, 3.0]), np.array([5, 5]))
    assert mean == 2.0
    assert np.isnan(error)
    assert np.isnan(clustered_mean(np.array([np.nan]), np.array([5]))).all()


@pytest.fixture(scope="module")
def scored():
    """Twelve tickers on five dates; a forecaster that knows the coming move, and one that does not."""
    generator = np.random.default_rng(0)
    dates = np.repeat(np.arange("2020-01-01", "2020-01-06", dtype="datetime64[D]"), 12)
    scale = generator.uniform(0.01, 0.03, 60)
    realised = generator.normal(size=(60, 4)) * scale[:, None]
    noise = generator.normal(size=(60, 30, 4)) * scale[:, None, None]
    outcomes = Outcomes(dates, scale, realised)
    knowing = 0.5 * realised[:, None] + noise * 0.8
    tables = {
        "blind": score_samples(outcomes, noise, np.full(60, -2.0), [1, 4]),
        "knowing": score_samples(outcomes, knowing, np.full(60, -1.5), [1, 4]),
    }
    return outcomes, {"blind": noise, "knowing": knowing}, tables


def test_scores_are_of_cumulative_returns_in_units_of_volatility(scored):
    outcomes, samples, tables = scored
    rows = tables["knowing"].iloc[:60]
    for row in range(60):
        y = outcomes.realised[row].sum() / outcomes.scale[row] / 2
        x = samples["knowing"][row].sum(axis=1) / outcomes.scale[row] / 2
        assert rows["CRPS, 4 d"][row] == pytest.approx(crps_ensemble(np.array([y]), x[None])[0])
        assert rows["direction, 4 d"][row] == ((x.mean() > 0) == (y > 0))
        # Of 30 samples, 0.05 times 31 ranks are outside on each side: one of them, and 0.55 of the next.
        expected = {0: 0.0, 1: 0.45}.get(min((x < y).sum(), (x > y).sum()), 1.0)
        assert rows["coverage of 90%, 4 d"][row] == pytest.approx(expected)


def test_the_rank_correlation_is_that_of_each_date(scored):
    outcomes, samples, tables = scored
    by_date = tables["knowing"].iloc[60:].set_index("date")["RankIC, 1 d"]
    for date, found in by_date.items():
        day = outcomes.date == np.datetime64(date)
        unit = outcomes.scale[day]
        mean = samples["knowing"][day, :, 0].mean(axis=1) / unit
        assert found == pytest.approx(spearmanr(mean, outcomes.realised[day, 0] / unit).statistic)


def test_what_knows_more_is_better_within_its_error(scored):
    table = compare(scored[2]).set_index(["metric", "model"])
    for metric, sign in (("CRPS, 1 d", -1), ("CRPS, 4 d", -1), ("RankIC, 4 d", 1), ("direction, 4 d", 1)):
        better = table.loc[(metric, "knowing")]
        assert sign * better["difference"] > 2 * better["difference_error"] > 0
        difference = table.loc[(metric, "knowing"), "mean"] - table.loc[(metric, "blind"), "mean"]
        assert better["difference"] == pytest.approx(difference)
        assert table.loc[(metric, "blind"), "difference"] == 0
    assert table.loc[(LIKELIHOOD, "knowing"), "difference"] == pytest.approx(0.5)


def test_the_table_for_people_leaves_out_what_is_undefined(scored):
    tables = {name: table.copy() for name, table in scored[2].items()}
    for table in tables.values():
        table["RankIC, 1 d"] = np.nan
    text = format_comparison(compare(tables))
    assert "RankIC, 4 d" in text
    assert "RankIC, 1 d" not in text
    assert "nan" not in text
    assert "| metric | blind | knowing |" in text
    assert f"{tables['blind']['CRPS, 1 d'].mean():.3f} ±" in text
    assert isinstance(compare(tables), pd.DataFrame)
