"""Classes of a forecast table against scikit-learn and SciPy."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.metrics import accuracy_score, log_loss
from sklearn.metrics import confusion_matrix as confusion_of_sklearn

from spaceexploreai.evaluation import classes
from spaceexploreai.evaluation.baselines import BASELINES, LEVELS, quantile_columns
from spaceexploreai.evaluation.inference import date_codes, diebold_mariano, skill_with_error

BAND = 0.01


def make_table(dates=30, tickers=6, seed=0) -> pd.DataFrame:
    """A head that knows a little of two horizons, beside baselines of true width."""
    generator = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product([pd.bdate_range("2024-01-01", periods=dates), range(tickers), [1, 5]])
    table = index.to_frame(index=False, name=["cutoff", "ticker", "horizon"])
    scale = 0.02 * np.sqrt(table["horizon"].to_numpy())
    table["y"], table["band"] = scale * generator.normal(size=len(table)), BAND * np.sqrt(table["horizon"])
    known = 0.3 * table["y"] + scale * generator.normal(size=len(table))
    logits = np.stack([-known / scale, np.zeros(len(table)), known / scale], axis=1)
    table[["p_down", "p_flat", "p_up"]] = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for name in BASELINES:
        spread = scale * norm.ppf(LEVELS)[:, None] * (1.3 if name == "zero" else 1)
        table[quantile_columns(LEVELS, f"{name}_")] = spread.T
    return table


def test_classes_are_split_at_the_band():
    y, band = np.array([-0.011, -0.01, 0.0, 0.01, 0.011]), np.full(5, BAND)
    assert classes.classes(y, band).tolist() == [0, 1, 1, 1, 2]


def test_probabilities_are_those_of_the_distribution():
    levels, mean = np.arange(1, 200) / 200, np.array([0.0, 0.005, -0.02])
    quantiles, band = mean[:, None] + 0.02 * norm.ppf(levels), np.array([0.01, 0.02, 0.005])
    found = classes.class_probabilities(quantiles, levels, band)
    below, above = norm.cdf(-band, mean, 0.02), norm.sf(band, mean, 0.02)
    np.testing.assert_allclose(found, np.stack([below, 1 - below - above, above], axis=1), atol=2e-3)
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_log_loss_and_confusion_matrix():
    table = make_table()
    true, probabilities = classes.forecast_classes(table)
    assert classes.log_losses(true, probabilities).mean() == pytest.approx(log_loss(true, probabilities))
    expected = confusion_of_sklearn(true, probabilities.argmax(axis=1))
    found = classes.confusion_matrix(true, probabilities)
    np.testing.assert_array_equal(found, expected)
    assert found.loc["up", "down"] == np.sum((true == 2) & (probabilities.argmax(axis=1) == 0)) > 0
    assert found.index.name == "true"


def test_what_was_held_impossible_costs_much_and_not_all():
    assert classes.log_losses(np.array([0]), np.array([[0.0, 0.5, 0.5]]))[0] == pytest.approx(math.log(1e6))


def test_a_regression_is_read_from_its_quantiles():
    table = make_table().drop(columns=["p_down", "p_flat", "p_up"])
    table[quantile_columns(LEVELS)] = table[quantile_columns(LEVELS, "zero_")].to_numpy()
    for one, other in zip(*(classes.forecast_classes(table, name) for name in ("model", "zero")), strict=True):
        np.testing.assert_array_equal(one, other)
    scores = classes.score_classes(table).set_index(["horizon", "metric"])
    assert scores.loc[(1, "log_loss"), "model"] == scores.loc[(1, "log_loss"), "zero"]


def test_scores_stand_beside_the_baselines():
    table = make_table()
    table.loc[table["cutoff"] == table["cutoff"].max(), "y"] = np.nan
    scores = classes.score_classes(table)
    assert list(scores.columns) == ["horizon", "metric", "model", *BASELINES]
    rows = table[(table["horizon"] == 5) & table["y"].notna()]
    (true, model), (_, zero), (_, ewma) = (classes.forecast_classes(rows, name) for name in ("model", "zero", "ewma"))
    losses = [-np.log(probabilities[range(len(true)), true]) for probabilities in (model, zero, ewma)]
    dates = date_codes(rows["cutoff"].to_numpy())
    skill, error = skill_with_error(losses[1], losses[2], dates, 5)
    t, p = diebold_mariano(losses[0], losses[1], dates, 5)
    expected = {
        "n": 29 * 6,
        "dates": 29,
        "accuracy": accuracy_score(true, zero.argmax(axis=1)),
        "base_rate": pd.Series(true).value_counts(normalize=True).max(),
        "log_loss": log_loss(true, zero),
        "log_loss_skill": skill,
        "log_loss_skill_se": error,
        "dm_log_loss_t": t,
        "dm_log_loss_p": p,
    }
    assert scores[scores["horizon"] == 5].set_index("metric")["zero"].to_dict() == pytest.approx(expected)
    assert math.isnan(scores.set_index(["horizon", "metric"]).loc[(5, "dm_log_loss_t"), "model"])


@pytest.mark.parametrize("column", ["band", "y"])
def test_a_missing_column_is_named(column):
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        classes.score_classes(make_table().drop(columns=column))


def test_no_outcome_is_refused():
    with pytest.raises(ValueError, match="nothing to score: none of the 24 forecasts"):
        classes.score_classes(make_table(dates=2).assign(y=np.nan))
