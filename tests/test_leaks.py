"""The leak check: silent about what is causal, loud about every planted way of knowing the future."""

import numpy as np
import pandas as pd
import pytest
from conftest import make_market

from spaceexploreai.data.windows import DateRange
from spaceexploreai.evaluation.baselines import add_baselines, quantile_columns
from spaceexploreai.evaluation.leaks import check_leaks
from spaceexploreai.evaluation.scores import add_outcomes
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.scripts.evaluate import forecast_range
from spaceexploreai.scripts.forecasters import load_checkpoint

LEVELS = [0.05, 0.5, 0.95]
PRICES = make_market(tickers=3, days=300)


def momentum(prices: pd.DataFrame) -> pd.DataFrame:
    """Forecasts from every bar after the sixtieth, of one day and of five."""
    log_close = np.log(prices["close"])
    moved = log_close.groupby(prices["ticker"]).diff(5)
    rows = prices.assign(mean=0.1 * moved)[prices.groupby("ticker").cumcount() > 60]
    table = pd.concat([rows.assign(horizon=horizon) for horizon in (1, 5)])[["ticker", "date", "horizon", "mean"]]
    table = table.rename(columns={"date": "cutoff"}).reset_index(drop=True)
    for level, column in zip(LEVELS, quantile_columns(LEVELS), strict=True):
        table[column] = table["mean"] + 0.02 * (level - 0.5)
    table["date"] = table["cutoff"] + pd.offsets.BDay(5)
    return add_baselines(add_outcomes(table, prices), prices)


def test_causal_forecasts_pass_and_are_counted():
    table = momentum(PRICES)
    dates = np.sort(table["cutoff"].unique())[:-1]
    rows = [(table["cutoff"] <= date).sum() for date in dates[[0, 118, 237]]]
    assert len(dates) == 238
    assert check_leaks(momentum, PRICES) == 2 * sum(rows)
    assert check_leaks(momentum, PRICES, table, dates=1) == 2 * rows[0]


def test_features_of_the_extractor_pass():
    extractor = SpaceExploreFeatureExtractor()
    assert check_leaks(extractor.compute_features, PRICES, dates=2) > 0


def tomorrow(prices, name):
    return prices.groupby("ticker")[name].transform(lambda column: column.iloc[::-1].shift(1).iloc[::-1])


PLANTED = {
    "tomorrow's close": lambda prices: np.log(tomorrow(prices, "close") / prices["close"]).fillna(0),
    "tomorrow's volume": lambda prices: np.sign(tomorrow(prices, "volume") - prices["volume"]),
    "a mean of all time": lambda prices: prices["close"] / prices.groupby("ticker")["close"].transform("mean"),
    "a rank of all time": lambda prices: prices.groupby("ticker")["close"].rank(pct=True),
    "the last day": lambda prices: prices.groupby("ticker")["close"].transform("last") / prices["close"],
    "a centred average": lambda prices: (
        prices.groupby("ticker")["close"].transform(lambda close: close.rolling(5, center=True, min_periods=1).mean())
        / prices["close"]
    ),
}


@pytest.mark.parametrize("name", list(PLANTED))
def test_a_feature_with_the_future_in_it_is_named(name):
    def features(prices):
        extractor = SpaceExploreFeatureExtractor(["gap", "scaled_return_5"])
        return extractor.compute_features(prices).assign(planted=PLANTED[name](prices))

    with pytest.raises(ValueError, match=r"^leak: planted of T\d at \d{4}-\d\d-\d\d is .* after \d{4}-\d\d-\d\d$"):
        check_leaks(features, PRICES)


@pytest.mark.parametrize("column", ["mean", "q0.5", "ewma_q0.05"])
def test_a_forecast_that_knows_a_thousandth_of_the_future_is_named(column):
    def forecast(prices):
        table = momentum(prices)
        return table.assign(**{column: table[column] + 0.001 * table["y"].fillna(0)})

    with pytest.raises(ValueError, match=rf"^leak: {column} of T\d at 20\d\d-\d\d-\d\d, horizon \d is "):
        check_leaks(forecast, PRICES)


def test_the_table_that_was_scored_is_the_one_that_is_checked():
    """As of a data set that was made with all of the prices, while the code is causal."""
    table = momentum(PRICES)
    table["mean"] += 0.1 * table["y"].fillna(0)
    with pytest.raises(ValueError, match="leak: mean of T0 at"):
        check_leaks(momentum, PRICES, table)


def test_rows_that_are_chosen_by_their_future_are_named():
    """Survivors: only tickers that are worth more in the end."""

    def survivors(prices):
        table = momentum(prices)
        ends = prices.groupby("ticker")["close"].agg(["first", "last"])
        return table[table["ticker"].isin(ends.index[ends["last"] > ends["first"]])]

    with pytest.raises(ValueError, match=r"^leak: T\d at 20\d\d-\d\d-\d\d, horizon 1 comes or goes with"):
        check_leaks(survivors, PRICES, dates=5)


def test_outcomes_alone_may_change():
    assert check_leaks(lambda prices: momentum(prices)[["ticker", "cutoff", "date", "horizon", "y"]], PRICES) > 0


def test_nothing_to_check_is_refused():
    newest = PRICES["date"].max()
    with pytest.raises(ValueError, match="no cutoff of the table has a future in the prices that could leak"):
        check_leaks(lambda prices: momentum(prices)[momentum(prices)["cutoff"] == newest], PRICES)


def test_a_checkpoint_passes_with_its_whole_path(checkpoint):
    model, extractor = load_checkpoint(str(checkpoint))
    within = DateRange(PRICES["date"].iloc[250], PRICES["date"].iloc[299])
    assert check_leaks(lambda prices: forecast_range(model, extractor, prices, within), PRICES, dates=2) > 0
