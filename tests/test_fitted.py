"""Learned baselines in the forecast table: what they are fitted to, where they stand, what they do not know."""

import numpy as np
import pandas as pd
import pytest
from conftest import make_market

from spaceexploreai.data.windows import IGNORE_INDEX, DateRange, make_labels
from spaceexploreai.evaluation import fitted, neural
from spaceexploreai.evaluation.baselines import (
    BASELINES,
    FITTED,
    Training,
    add_baselines,
    baselines_of,
    quantile_columns,
)
from spaceexploreai.evaluation.leaks import check_leaks
from spaceexploreai.evaluation.learned import LEARNED
from spaceexploreai.evaluation.scores import add_outcomes, score
from spaceexploreai.feature_extraction_spaceexplore import (
    SpaceExploreFeatureExtractor,
    cumulative_probability,
    following_sessions,
)

HORIZONS, LEVELS, CONTEXT = [1, 3], [0.05, 0.25, 0.5, 0.75, 0.95], 8
FEATURES = ["scaled_return_1", "scaled_return_5", "realized_volatility_5", "gap"]
# Yesterday's return comes back with a fifth of its size.
PRICES = make_market(tickers=12, days=420, momentum=0.2)
END = PRICES["date"].unique()[329]


def make_training(prices: pd.DataFrame, end: pd.Timestamp = END) -> Training:
    extractor = SpaceExploreFeatureExtractor(FEATURES, context_length=CONTEXT)
    features = extractor.compute_features(prices)
    extractor.fit(features[features["date"] <= end])
    series = extractor.encode(prices, features)
    within = DateRange(prices["date"].min(), end)
    labels = [make_labels(one, HORIZONS, within) for one in series]
    return Training(end, series, [np.where(one == IGNORE_INDEX, np.nan, one) for one in labels], HORIZONS, CONTEXT)


def make_forecasts(prices: pd.DataFrame) -> pd.DataFrame:
    """A forecast from every bar after the training, as of a model that knows nothing."""
    rows = prices.loc[prices["date"] > END, ["ticker", "date"]].rename(columns={"date": "cutoff"})
    table = rows.loc[rows.index.repeat(len(HORIZONS))].reset_index(drop=True)
    table["horizon"] = np.tile(HORIZONS, len(rows))
    table["date"] = following_sessions("XNYS", rows["cutoff"], HORIZONS).reshape(-1)
    return add_outcomes(table.assign(mean=0.0, **dict.fromkeys(quantile_columns(LEVELS), 0.0), p_up=0.5), prices)


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neural, "MAX_EPOCHS", 2)
        patch.setattr(neural, "MAX_WINDOWS", 1500)
        yield


@pytest.fixture(scope="module")
def training():
    return make_training(PRICES)


FORECASTS = make_forecasts(PRICES)


@pytest.fixture(scope="module")
def table(training):
    return add_baselines(FORECASTS, PRICES, "all", training)


def test_all_stand_beside_each_other_and_are_scored(table):
    assert baselines_of(table) == [*BASELINES, *FITTED]
    scores = score(table)
    assert list(scores.columns) == ["horizon", "metric", "model", *BASELINES, *FITTED]
    crps = scores[scores["metric"] == "crps_skill"][list(FITTED)]
    assert np.isfinite(crps).all(axis=None)
    assert (crps.abs() < 0.2).all(axis=None)


def test_quantiles_ascend_and_say_how_likely_up_is(table):
    for name in FITTED:
        quantiles = table[quantile_columns(LEVELS, f"{name}_")].to_numpy()
        assert (np.diff(quantiles, axis=1) >= 0).all()
        if name != "garch":  # which knows the share of its pool
            p_up = 1 - cumulative_probability(quantiles, LEVELS, 0.0)
            np.testing.assert_allclose(table[f"{name}_p_up"], p_up)


def test_ridge_finds_the_planted_momentum(table):
    """Of the return of one day 0.2 comes back on the next, and next to nothing after that."""
    moved = PRICES.assign(move=np.log(PRICES["close"]).groupby(PRICES["ticker"]).diff())
    known = table.merge(moved, left_on=["ticker", "cutoff"], right_on=["ticker", "date"])
    one = known[known["horizon"] == 1]
    assert np.polyfit(one["move"], one["ridge_mean"], 1)[0] == pytest.approx(0.2, abs=0.05)
    skill = score(table).set_index(["horizon", "metric"]).loc[1]
    assert skill.loc["mse_skill", "ridge"] == pytest.approx(0.04, abs=0.02)
    assert skill.loc["rank_ic_t", "ridge"] > 3
    assert abs(skill.loc["rank_ic_t", "drift"]) < 3


def test_a_forecast_is_that_of_the_row_it_stands_in(table, training):
    """The twin: places found one by one, in a table whose order and index are the caller's."""
    days, features, targets = [], [], []
    for one, labels in zip(training.series, training.labels, strict=True):
        for step in range(len(one.dates)):
            if np.isfinite(labels[step]).all():
                days.append(one.dates[step])
                features.append(one.values[step])
                targets.append(labels[step] / (one.scale[step] * np.sqrt(HORIZONS)))
    ridge = LEARNED["ridge"](np.array(days), np.array(features), np.array(targets), HORIZONS)
    mixed = FORECASTS.sample(frac=1, random_state=0)
    mixed.index = mixed.index % 7
    found = add_baselines(mixed, PRICES, "all", training)
    assert found.index.equals(mixed.index)
    pd.testing.assert_frame_equal(found[list(mixed.columns)], mixed)
    series = {one.ticker: one for one in training.series}
    for place in (0, 500, len(mixed) - 1):
        row = found.iloc[place]
        one = series[row["ticker"]]
        step = list(one.dates).index(row["cutoff"])
        mean, quantiles = ridge.forecast(one.values[[step]], one.scale[[step]], LEVELS)
        column = HORIZONS.index(row["horizon"])
        assert row["ridge_mean"] == pytest.approx(mean[0, column], rel=1e-4, abs=1e-7)
        np.testing.assert_allclose(
            row[quantile_columns(LEVELS, "ridge_")].astype(float), quantiles[0, column], rtol=1e-4, atol=1e-7
        )
    pd.testing.assert_frame_equal(
        found.reset_index(drop=True),
        table.loc[list(FORECASTS.sample(frac=1, random_state=0).index)].reset_index(drop=True),
        rtol=1e-6,
    )


def test_nothing_after_a_cutoff_changes_what_stands_there():
    """The leak check over fits and forecasts of all: prices to come change neither."""

    def make(prices):
        return add_baselines(make_forecasts(prices), prices, "all", make_training(prices))

    assert check_leaks(make, PRICES, dates=2) > 0


def test_what_the_training_says_later_is_a_leak():
    """Fitted to the whole history, the same code is caught."""

    def make(prices):
        return add_baselines(make_forecasts(prices), prices, "all", make_training(prices, prices["date"].max()))

    with pytest.raises(ValueError, match=r"leak: (garch|ridge)"):
        check_leaks(make, PRICES, dates=1)


@pytest.mark.parametrize("name", [*LEARNED, *neural.NEURAL])
def test_mistakes_are_refused(training, name):
    rows = FORECASTS[:4]
    with pytest.raises(ValueError, match=r"horizon 5 is not one of the training, which has \[1, 3\]"):
        fitted.forecast_learned(rows.assign(horizon=5), training, [name])
    with pytest.raises(ValueError, match="histories have no step of ZZZ on 20"):
        fitted.forecast_learned(rows.assign(ticker="ZZZ"), training, [name])
    saturday = rows.assign(cutoff=pd.Timestamp("2006-06-17"))
    with pytest.raises(ValueError, match="histories have no step of T0 on 2006-06-17"):
        fitted.forecast_learned(saturday, training, [name])
