"""The door in and out of the network: the price table, normalised causal features, dated forecasts in prices."""

import json
import os
from bisect import bisect_right
from types import SimpleNamespace

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler

from spaceexploreai import feature_extraction_spaceexplore
from spaceexploreai.feature_extraction_spaceexplore import (
    PRICE_COLUMNS,
    TABLE_COLUMNS,
    VOLATILITY_BARS,
    EncodedSeries,
    SpaceExploreFeatureExtractor,
    cumulative_probability,
    following_sessions,
    quantile_columns,
    sessions_of_years,
    validate_prices,
    with_missing_sessions,
)
from spaceexploreai.indicators_spaceexplore import (
    FEATURE_PRESETS,
    MIN_TICKERS,
    compute_indicators,
    compute_panel,
    ewma_volatility,
)

# One of each kind: the bar alone, a long window, recursive averages, a volume.
FEATURES = ["gap", "scaled_return_60", "adx_14", "rsi_14", "bollinger_position_20", "relative_volume_20"]
CONTEXT = 30
# Histories are made from a seed; smaller seeds make no simpler ones.
NO_SHRINKING = {"deadline": None, "phases": [Phase.explicit, Phase.reuse, Phase.generate]}


def make_prices(start: str = "2020-01-01", **rows: int) -> pd.DataFrame:
    """A table with a random walk per ticker, all beginning on the same day."""
    tables = []
    for seed, (ticker, n) in enumerate(rows.items()):
        rng = np.random.default_rng([seed, *start.encode()])
        close = rng.uniform(5, 500) * np.exp(np.cumsum(0.02 * rng.standard_t(4, n)))
        table = pd.DataFrame({"ticker": ticker, "date": pd.bdate_range(start, periods=n)})
        table["open"] = close * np.exp(rng.normal(0, 0.01, n))
        table["high"] = np.maximum(table["open"], close) * 1.01
        table["low"] = np.minimum(table["open"], close) * 0.99
        table["close"] = close
        tables.append(table.assign(volume=rng.integers(1, 10**7, n).astype(float)))
    return pd.concat(tables, ignore_index=True)


def make_extractor(**options) -> SpaceExploreFeatureExtractor:
    extractor = SpaceExploreFeatureExtractor(**{"feature_names": FEATURES, "context_length": CONTEXT} | options)
    return extractor.fit(extractor.compute_features(make_prices("2010-01-01", AAA=200, BBB=200)))


PRICES = make_prices(AAA=100, BBB=120)
EXTRACTOR = make_extractor()


# --- the price table ---


def small_table() -> pd.DataFrame:
    dates = pd.to_datetime(["2020-01-02", "2020-01-03", "2020-01-02"])
    bars = {"open": [10, 11, 5], "high": [12, 13, 6], "low": [9, 10, 4], "close": [11, 12, 5], "volume": [100, 200, 0]}
    return pd.DataFrame({"ticker": ["AAA", "AAA", "BBB"], "date": dates, **bars})


# What is changed in the small table, and what the message must name.
MALFORMED = {
    "missing price": ({"open": [10, np.nan, 5]}, "AAA 2020-01-03: open nan "),
    "infinite price": ({"high": [12, np.inf, 6]}, "AAA 2020-01-03: high inf "),
    "text price": ({"low": ["9", "ten", "4"]}, "AAA 2020-01-03: low ten "),
    "missing volume": ({"volume": pd.array([1, None, 1], dtype="Int64")}, "AAA 2020-01-03: volume <NA> "),
    "infinite volume": ({"volume": [1, 1, -np.inf]}, "BBB 2020-01-02: volume -inf "),
    "zero price": ({"low": [9, 10, 0]}, "BBB 2020-01-02: low 0 is not a positive price"),
    "negative price": ({"close": [11, -12.5, 5]}, "AAA 2020-01-03: close -12.5 is not a positive price"),
    "negative volume": ({"volume": [1, -3, 1]}, "AAA 2020-01-03: volume -3 is negative"),
    "high below low": ({"high": [8, 13, 6]}, "AAA 2020-01-02: high 8 is below the low of 9"),
    "close above high": ({"close": [11, 14, 5]}, "AAA 2020-01-03: close 14 is above the high of 13"),
    "close below low": ({"close": [11, 12, 3.5]}, "BBB 2020-01-02: close 3.5 is below the low of 4"),
    "open above high": ({"open": [13, 11, 5]}, "AAA 2020-01-02: open 13 is above the high of 12"),
    "open below low": ({"open": [8, 11, 5]}, "AAA 2020-01-02: open 8 is below the low of 9"),
    "a cent above the high": (
        {"close": [11, 1234.568, 5], "high": [12, 1234.567, 6]},
        "AAA 2020-01-03: close 1234.568 is above the high of 1234.567",
    ),
    "duplicate": ({"date": ["2020-01-03"] * 3}, "AAA 2020-01-03: date 2020-01-03 appears twice"),
    "duplicate within the day": (
        {"date": ["2020-01-03 09:30", "2020-01-03 16:00", "2020-01-02 16:00"]},
        "AAA 2020-01-03: date 2020-01-03 appears twice",
    ),
    "newest first": (
        {"date": ["2020-01-03", "2020-01-02", "2020-01-02"]},
        "AAA 2020-01-02: date 2020-01-02 comes after a later date",
    ),
    "word for a date": ({"date": ["2020-01-02", "2020-01-03", "today?"]}, "BBB: 'today?' is not a date"),
    "no date": ({"date": [pd.NaT, pd.Timestamp("2020-01-03"), pd.NaT]}, "AAA: 'NaT' is not a date"),
    "day of a spreadsheet": ({"date": [43832, 43833, 43832]}, "AAA: '43832' is not a date"),
    "seconds since 1970": ({"date": [1577923200, 1578009600, 1577923200]}, "AAA: '1577923200' is not a date"),
    "far year": ({"date": ["2020-01-02", "9999-12-31", "2020-01-02"]}, "AAA: '9999-12-31' is not a date"),
    "month first": ({"date": ["01/02/2020", "01/03/2020", "01/02/2020"]}, "AAA: '01/02/2020' is not a date"),
    "today": ({"date": ["2020-01-02", "today", "2020-01-02"]}, "AAA: 'today' is not a date"),
    "year alone": ({"date": [2020, 2021, 2020]}, "AAA: '2020' is not a date"),
    "blank ticker": ({"ticker": ["AAA", "AAA", "  "]}, "row 2 of the price table has no ticker"),
    "no ticker": ({"ticker": ["AAA", "AAA", None]}, "row 2 of the price table has no ticker"),
    "empty ticker": ({"ticker": ["", "AAA", "BBB"]}, "row 0 of the price table has no ticker"),
}


def refused(prices: pd.DataFrame, named: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - what the message names is compared below
        validate_prices(prices)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("change", "named"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_table_is_refused(change, named):
    validate_prices(small_table())
    refused(small_table().assign(**change), named)


def test_the_offending_row_is_named_in_any_order():
    refused(small_table().assign(close=[11, 14, 5]).iloc[[2, 0, 1]], "AAA 2020-01-03: close 14 ")


def test_table_without_a_column_is_refused():
    refused(small_table().drop(columns="close"), "no column 'close'; it has ticker, date, open, high, low, volume")
    refused(small_table().set_index("date"), "no column 'date'")
    refused(small_table().iloc[:0], "the price table is empty")


def test_table_with_a_column_twice_is_refused():
    refused(pd.concat([small_table(), small_table()[["close"]]], axis=1), "'close'")


def assert_canonical(table: pd.DataFrame) -> None:
    assert list(table.columns) == TABLE_COLUMNS == ["ticker", "date", "open", "high", "low", "close", "volume"]
    assert pd.api.types.is_string_dtype(table["ticker"])
    assert table.dtypes.iloc[1:].astype(str).tolist() == ["datetime64[ns]"] + ["float64"] * 5
    pd.testing.assert_index_equal(table.index, pd.RangeIndex(len(table)), exact=True)
    assert table["ticker"].is_monotonic_increasing
    assert all(dates.is_monotonic_increasing and dates.is_unique for _, dates in table.groupby("ticker")["date"])


CANONICAL = validate_prices(small_table())

SAME_TABLE = {
    "interleaved": small_table().iloc[[0, 2, 1]],
    "tickers backwards": small_table().iloc[[2, 0, 1]],
    "other columns": small_table()[TABLE_COLUMNS[::-1]].assign(adj_close=1.0, sector="x"),
    "text": small_table().astype(str),
    "summer and winter time": small_table().assign(
        date=["2020-01-02 00:00:00-05:00", "2020-01-03 00:00:00-04:00", "2020-01-02 00:00:00-05:00"]
    ),
    "compact dates": small_table().assign(date=[20200102, 20200103, 20200102]),
    "categorical": small_table().astype({"ticker": pd.CategoricalDtype(["BBB", "AAA"])}),
    "time zone": small_table().assign(date=small_table()["date"].dt.tz_localize("America/New_York")),
    "time of day": small_table().assign(date=small_table()["date"] + pd.Timedelta(hours=16)),
    "date objects": small_table().assign(date=small_table()["date"].dt.date),
    "seconds": small_table().astype({"date": "datetime64[s]"}),
    "small numbers": small_table().astype({"close": "float32", "volume": "uint8"}),
    "index of another table": small_table().set_index(pd.Index([7, 7, 7])),
}


@pytest.mark.parametrize("name", SAME_TABLE)
def test_table_becomes_canonical(name):
    prices = SAME_TABLE[name]
    before = prices.copy(deep=True)
    table = validate_prices(prices)
    assert_canonical(table)
    pd.testing.assert_frame_equal(table, CANONICAL)
    pd.testing.assert_frame_equal(prices, before)


def test_canonical_values():
    assert_canonical(CANONICAL)
    expected = small_table()
    numbers = [*PRICE_COLUMNS, "volume"]
    np.testing.assert_array_equal(CANONICAL[numbers], expected[numbers])
    assert CANONICAL["ticker"].tolist() == expected["ticker"].tolist()
    assert CANONICAL["date"].tolist() == expected["date"].tolist()


def test_canonical_table_is_a_fixed_point():
    pd.testing.assert_frame_equal(validate_prices(PRICES), validate_prices(validate_prices(PRICES)))
    table = validate_prices(PRICES)
    table["close"] = 0.0
    assert (PRICES["close"] > 0).all()


# --- normalisation ---

SCALERS = {
    "robust": RobustScaler(unit_variance=True),
    "standard": StandardScaler(),
    "minmax": MinMaxScaler(feature_range=(-1, 1)),
}


def random_features(rng: np.random.Generator) -> pd.DataFrame:
    """Columns of the table `PRICES` with other values: skewed, tiny, huge, a tenth undefined."""
    values = rng.lognormal(size=(len(PRICES), len(FEATURES))) * 10.0 ** np.arange(-3, 3) + rng.normal(size=6)
    values[rng.random(values.shape) < 0.1] = np.nan
    return PRICES[["ticker", "date"]].join(pd.DataFrame(values, columns=FEATURES))


def encoded_values(extractor: SpaceExploreFeatureExtractor, features: pd.DataFrame) -> np.ndarray:
    return np.concatenate([series.values for series in extractor.encode(PRICES, features)])


def with_volatility(prices: pd.DataFrame) -> np.ndarray:
    """Rows of the table that `encode` keeps."""
    return (prices.groupby("ticker").cumcount() >= VOLATILITY_BARS).to_numpy()


@pytest.mark.parametrize("normalization", SCALERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_normalisation_equals_scikit_learn(normalization, seed):
    features = random_features(np.random.default_rng(seed))
    train = features["date"] <= "2020-03-31"
    extractor = SpaceExploreFeatureExtractor(FEATURES, normalization, clip=1e9)
    assert extractor.fit(features[train]) is extractor
    scaler = SCALERS[normalization].fit(features.loc[train, FEATURES].to_numpy())
    expected = scaler.transform(features[FEATURES].to_numpy())[with_volatility(PRICES)]
    values = encoded_values(extractor, features)
    assert 100 < np.isfinite(values).sum() < values.size
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalization", SCALERS)
def test_statistics_are_those_of_the_given_rows(normalization):
    features = random_features(np.random.default_rng(0))
    train = features["date"] <= "2020-03-31"
    others = features.copy()
    others.loc[~train, FEATURES] *= 1e6
    fitted = [SpaceExploreFeatureExtractor(FEATURES, normalization).fit(table[train]) for table in (features, others)]
    assert fitted[0].to_dict() == fitted[1].to_dict()
    assert SpaceExploreFeatureExtractor(FEATURES, normalization).fit(others).center != fitted[0].center
    backwards = SpaceExploreFeatureExtractor(FEATURES, normalization).fit(features[features.columns[::-1]][train])
    assert backwards.center == fitted[0].center


@pytest.mark.parametrize("normalization", SCALERS)
@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0, 1e6 / 3])
def test_column_without_spread_is_only_centred(normalization, constant):
    features = random_features(np.random.default_rng(0))
    features["rsi_14"] = features["rsi_14"] * 0 + constant
    extractor = SpaceExploreFeatureExtractor(FEATURES, normalization).fit(features)
    values = encoded_values(extractor, features)[:, FEATURES.index("rsi_14")]
    assert 100 < np.isfinite(values).sum() < len(values)
    np.testing.assert_allclose(values[np.isfinite(values)], 0, atol=1e-6)
    assert extractor.spread[FEATURES.index("rsi_14")] == 1.0


def test_column_mostly_of_one_value_is_only_centred():
    features = random_features(np.random.default_rng(0))
    features["gap"] = 2.0 * (np.arange(len(features)) % 8 == 0)
    extractor = SpaceExploreFeatureExtractor(FEATURES).fit(features)
    assert (extractor.center[0], extractor.spread[0]) == (0.0, 1.0)
    assert set(encoded_values(extractor, features)[:, 0]) == {0.0, 2.0}


def test_values_are_clipped():
    features = random_features(np.random.default_rng(0))
    extractor = SpaceExploreFeatureExtractor(FEATURES, "standard", clip=0.5).fit(features)
    loose = SpaceExploreFeatureExtractor(FEATURES, "standard", clip=1e9).fit(features)
    values, expected = encoded_values(extractor, features), encoded_values(loose, features)
    assert np.nanmin(values) == -0.5
    assert np.nanmax(values) == 0.5
    np.testing.assert_array_equal(values, np.clip(expected, -0.5, 0.5))


def test_column_without_a_value_is_refused():
    features = random_features(np.random.default_rng(0)).assign(rsi_14=np.nan)
    with pytest.raises(ValueError, match="'rsi_14' has no value in the training split"):
        SpaceExploreFeatureExtractor(FEATURES).fit(features)
    with pytest.raises(ValueError, match="'gap' has no value in the training split"):
        SpaceExploreFeatureExtractor(FEATURES).fit(features.iloc[:0])


def test_options_are_checked():
    with pytest.raises(ValueError, match="robust, standard, minmax, got 'quantile'"):
        SpaceExploreFeatureExtractor(normalization="quantile")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SpaceExploreFeatureExtractor(context_length=0)
    assert SpaceExploreFeatureExtractor().feature_names == list(FEATURE_PRESETS["default"])


# --- saving ---


def test_saved_extractor_is_loaded_with_the_same_values(tmp_path):
    options = {"normalization": "standard", "clip": 3.5, "calendar": "XLON"}
    extractor = make_extractor(**options)
    extractor.save_pretrained(tmp_path)
    loaded = SpaceExploreFeatureExtractor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in options} == options
    assert (loaded.feature_names, loaded.context_length) == (FEATURES, CONTEXT)
    assert (loaded.center, loaded.spread) == (extractor.center, extractor.spread)
    for one, other in zip(loaded.encode(PRICES), extractor.encode(PRICES), strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_saved_extractor_is_json_and_its_code(tmp_path):
    EXTRACTOR.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {
        "AutoFeatureExtractor": "feature_extraction_spaceexplore.SpaceExploreFeatureExtractor"
    }
    assert saved["feature_names"] == FEATURES
    assert saved["center"] == EXTRACTOR.center
    assert sorted(name for name in os.listdir(tmp_path) if not name.startswith("_")) == [
        "feature_extraction_spaceexplore.py",
        "indicators_bars_spaceexplore.py",
        "indicators_base_spaceexplore.py",
        "indicators_spaceexplore.py",
        "preprocessor_config.json",
    ]


# --- encoding ---


def test_encode_before_fit_is_refused():
    with pytest.raises(ValueError, match="call fit on the training split first"):
        SpaceExploreFeatureExtractor(FEATURES).encode(PRICES)


def test_features_are_the_indicators():
    features = EXTRACTOR.compute_features(PRICES)
    assert list(features.columns) == ["ticker", "date", *FEATURES]
    pd.testing.assert_frame_equal(features[["ticker", "date"]], validate_prices(PRICES)[["ticker", "date"]])
    for ticker, bars in PRICES.groupby("ticker"):
        values = features.loc[features["ticker"] == ticker, FEATURES]
        assert (values.dtypes == "float32").all()
        np.testing.assert_array_equal(values, compute_indicators(bars, FEATURES).astype(np.float32))


def test_encoded_series():
    series = EXTRACTOR.encode(PRICES)
    assert [one.ticker for one in series] == ["AAA", "BBB"]
    for one in series:
        bars = PRICES[PRICES["ticker"] == one.ticker].reset_index(drop=True)
        known = slice(VOLATILITY_BARS, None)
        assert one.values.shape == (len(bars) - VOLATILITY_BARS, len(FEATURES))
        assert [one.values.dtype, one.scale.dtype, one.close.dtype] == [np.float32, np.float32, np.float64]
        assert one.dates.dtype == "datetime64[ns]"
        np.testing.assert_array_equal(one.dates, bars["date"][known])
        np.testing.assert_array_equal(one.close, bars["close"][known])
        np.testing.assert_allclose(one.scale, ewma_volatility(bars["close"])[known], rtol=1e-6)
        expected = (compute_indicators(bars, FEATURES) - EXTRACTOR.center) / EXTRACTOR.spread
        np.testing.assert_allclose(one.values, expected[known].clip(-5, 5), rtol=1e-5, atol=1e-6)
        assert np.isnan(one.values[: 60 - VOLATILITY_BARS, FEATURES.index("scaled_return_60")]).all()
        assert np.isfinite(one.values[60 - VOLATILITY_BARS :]).all()


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(VOLATILITY_BARS + 1, 98), max_size=40))
def test_sessions_without_a_bar_are_masked_steps(lost):
    """Against a plain loop. The steps of the bars are those of a ticker that has no other sessions."""
    prices = make_prices(start="2021-07-07", AAA=100)  # no holiday to the end of August
    prices = prices[
        prices["date"].isin(sessions_of_years("XNYS", prices["date"].min(), prices["date"].max()))
    ].reset_index(drop=True)
    lost = {day for day in lost if day < len(prices) - 1}
    halted = prices.drop(index=list(lost)).reset_index(drop=True)
    (series,), features = EXTRACTOR.encode(halted), EXTRACTOR.compute_features(halted)
    assert list(series.dates) == list(prices["date"][series.dates[0] <= prices["date"]].to_numpy())
    bar = {date: row for row, date in enumerate(halted["date"].to_numpy())}
    scale = ewma_volatility(halted["close"]).to_numpy(np.float32)
    newest = None
    for step, date in enumerate(series.dates):
        assert series.traded[step] == (date in bar)
        newest = bar.get(date, newest)
        assert series.scale[step] == scale[newest]
        if date in bar:
            assert series.close[step] == halted["close"][newest]
            expected = (features.loc[newest, FEATURES].to_numpy(float) - EXTRACTOR.center) / EXTRACTOR.spread
            np.testing.assert_allclose(series.values[step], expected.clip(-5, 5), rtol=1e-5, atol=1e-6)
        else:
            assert np.isnan(series.values[step]).all()


def test_a_bar_outside_of_the_sessions_is_a_step():
    """Of another exchange, or of a calendar that does not know better."""
    prices = make_prices(AAA=100)
    assert not prices["date"].isin(sessions_of_years("XNYS", prices["date"].min(), prices["date"].max())).all()
    (series,) = EXTRACTOR.encode(prices)
    assert series.traded.all()
    assert len(series.dates) == 100 - VOLATILITY_BARS


@pytest.mark.parametrize("close", [3.0, 1e-3, 1e5])
def test_scale_is_finite_and_positive_from_the_first_step(close):
    prices = make_prices(AAA=60)
    prices.loc[30:, PRICE_COLUMNS] = close
    halted = prices.assign(**dict.fromkeys(PRICE_COLUMNS, close))
    for table in (prices, halted):
        (series,) = EXTRACTOR.encode(table)
        assert len(series.scale) == 60 - VOLATILITY_BARS
        assert np.isfinite(series.scale).all()
        assert (series.scale > 0).all()


def test_tickers_without_a_known_volatility_are_left_out():
    prices = make_prices(AAA=5, BBB=VOLATILITY_BARS, CCC=VOLATILITY_BARS + 1, DDD=50)
    series = EXTRACTOR.encode(prices)
    assert [(one.ticker, len(one.dates)) for one in series] == [("CCC", 1), ("DDD", 50 - VOLATILITY_BARS)]
    alone = EXTRACTOR.encode(prices[prices["ticker"] == "DDD"])[0]
    np.testing.assert_array_equal(series[1].values, alone.values)
    assert EXTRACTOR.encode(prices[prices["ticker"] == "AAA"]) == []


def assert_same_series(one, other) -> None:
    assert [series.ticker for series in one] == [series.ticker for series in other]
    for left, right in zip(one, other, strict=True):
        for field in ("dates", "close", "values", "scale"):
            np.testing.assert_array_equal(getattr(left, field), getattr(right, field), err_msg=field)


def test_computed_features_are_taken_as_they_are():
    features = EXTRACTOR.compute_features(PRICES)
    assert_same_series(EXTRACTOR.encode(PRICES, features), EXTRACTOR.encode(PRICES))
    marked = EXTRACTOR.encode(PRICES, features.assign(gap=100.0))
    assert all((series.values[:, 0] == 5.0).all() for series in marked)


def test_order_of_the_table_does_not_matter():
    shuffled = PRICES.sort_values(["date", "ticker"], ascending=[True, False])
    assert_same_series(EXTRACTOR.encode(shuffled, EXTRACTOR.compute_features(shuffled)), EXTRACTOR.encode(PRICES))


# --- causality ---


def times(prices: pd.DataFrame, factor: float, columns: list[str] = PRICE_COLUMNS) -> pd.DataFrame:
    return prices.assign(**{column: prices[column] * factor for column in columns})


# Each takes the bars after a day and gives other ones.
CHANGES = {
    "crash": lambda future: times(future, 1e-5),
    "surge": lambda future: times(future, 1e5),
    "turnover": lambda future: times(future, 1e9, ["volume"]),
    "halt": lambda future: future.assign(**dict.fromkeys(PRICE_COLUMNS, 7.0), volume=0.0),
    "one ticker": lambda future: pd.concat(
        [times(bars, 3.0) if ticker == "AAA" else bars for ticker, bars in future.groupby("ticker")]
    ),
    "another history": lambda future: future.assign(
        **make_prices("1999-01-01", AAA=len(future))[[*PRICE_COLUMNS, "volume"]].set_index(future.index)
    ),
    "other days": lambda future: future.assign(date=future["date"] + pd.Timedelta(days=400)),
    "end of the data": lambda future: future.iloc[:0],
}


def change_after(prices: pd.DataFrame, date: pd.Timestamp, change: str) -> pd.DataFrame:
    past, future = prices[prices["date"] <= date], prices[prices["date"] > date]
    return pd.concat([past, CHANGES[change](future)])


def assert_causal(extractor, prices: pd.DataFrame, date: pd.Timestamp, change: str) -> None:
    changed = change_after(prices, date, change)
    for one, other in zip(extractor.encode(prices), extractor.encode(changed), strict=True):
        past, same = one.dates <= date, other.dates <= date
        assert past.any()
        np.testing.assert_array_equal(one.dates[past], other.dates[same])
        np.testing.assert_array_equal(one.values[past], other.values[same], err_msg="values")
        np.testing.assert_array_equal(one.scale[past], other.scale[same], err_msg="scale")
    batch, same = (extractor(table, as_of=date, return_tensors="np") for table in (prices, changed))
    for name in extractor.model_input_names:
        np.testing.assert_array_equal(batch[name], same[name], err_msg=name)


@settings(**NO_SHRINKING, max_examples=12)
@given(st.integers(CONTEXT + VOLATILITY_BARS, 99), st.sampled_from(sorted(CHANGES)))
def test_features_and_scale_are_causal(bars, change):
    assert_causal(EXTRACTOR, PRICES, PRICES["date"].iloc[bars - 1], change)


class SeesTheLastClose(SpaceExploreFeatureExtractor):
    def compute_features(self, prices):
        features = super().compute_features(prices)
        return features.assign(gap=features["gap"] + 1e-3 * prices["close"].iloc[-1])


class SeesTheNextDay(SpaceExploreFeatureExtractor):
    def encode(self, prices, features=None):
        return [one._replace(scale=np.roll(one.scale, -1)) for one in super().encode(prices, features)]


@pytest.mark.parametrize(("extractor", "seen"), [(SeesTheLastClose, "values"), (SeesTheNextDay, "scale")])
def test_checker_catches_a_planted_look_ahead(extractor, seen):
    planted = extractor.from_dict(EXTRACTOR.to_dict())
    with pytest.raises(AssertionError, match=seen):
        assert_causal(planted, PRICES, PRICES["date"].iloc[80], "surge")


# --- columns of all tickers together ---

TICKERS = ["AAA", "BBB", *(f"T{number}" for number in range(MIN_TICKERS))]
PANEL_FEATURES = ["return_rank_5", "gap", "market_residual_1"]
PANEL_PRICES = make_prices(**dict.fromkeys(TICKERS, 120))
PANEL_EXTRACTOR = SpaceExploreFeatureExtractor(PANEL_FEATURES, context_length=CONTEXT)
PANEL_EXTRACTOR.fit(PANEL_EXTRACTOR.compute_features(make_prices("2010-01-01", **dict.fromkeys(TICKERS, 120))))


def test_features_of_the_panel_are_the_indicators():
    features = PANEL_EXTRACTOR.compute_features(PANEL_PRICES.sample(frac=1, random_state=0).sort_values("date"))
    panel = dict(compute_panel(validate_prices(PANEL_PRICES), PANEL_FEATURES))
    assert sorted(panel) == ["market_residual_1", "return_rank_5"]
    for name, values in panel.items():
        assert np.isfinite(values).sum() > 500
        np.testing.assert_array_equal(features[name], values.astype(np.float32))


@settings(**NO_SHRINKING, max_examples=8)
@given(st.integers(CONTEXT + VOLATILITY_BARS, 119), st.sampled_from(sorted(CHANGES)))
def test_features_of_the_panel_are_causal(bars, change):
    assert_causal(PANEL_EXTRACTOR, PANEL_PRICES, PANEL_PRICES["date"].iloc[bars - 1], change)


def test_a_ticker_alone_has_no_place_among_others():
    prices = PANEL_PRICES[PANEL_PRICES["ticker"] == "BBB"]
    values = PANEL_EXTRACTOR(prices)["past_values"]
    assert values.isnan().all(dim=1).tolist() == [[True, False, True]]
    together = PANEL_EXTRACTOR(PANEL_PRICES)["past_values"][TICKERS.index("BBB")]
    torch.testing.assert_close(values[0, :, 1], together[:, 1], rtol=0, atol=0)
    assert together[-20:].isfinite().all()
    with pytest.raises(ValueError, match="'return_rank_5' has no value in the training split"):
        SpaceExploreFeatureExtractor(PANEL_FEATURES).fit(PANEL_EXTRACTOR.compute_features(prices))


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_changes(change):
    date = PRICES["date"].iloc[80]
    changed = change_after(PRICES, date, change)
    validate_prices(changed)
    assert not changed.reset_index(drop=True).equals(PRICES)


# --- contexts ---


def test_context_is_the_newest_part_of_the_series():
    batch = EXTRACTOR(PRICES)
    assert batch["past_values"].shape == (2, CONTEXT, len(FEATURES))
    assert batch["scale"].shape == batch["attention_mask"].shape == (2, CONTEXT)
    assert sorted(batch) == sorted(EXTRACTOR.model_input_names)
    assert [batch[name].dtype for name in EXTRACTOR.model_input_names] == [torch.float32, torch.int64, torch.float32]
    assert (batch["attention_mask"] == 1).all()
    halted = EXTRACTOR(PRICES.drop(index=98))  # of AAA, the last day but one
    assert halted["attention_mask"].tolist() == [[*[1] * (CONTEXT - 2), 0, 1], [1] * CONTEXT]
    assert torch.isnan(halted["past_values"][0, -2]).all()
    for row, series in enumerate(EXTRACTOR.encode(PRICES)):
        np.testing.assert_array_equal(batch["past_values"][row], series.values[-CONTEXT:])
        np.testing.assert_array_equal(batch["scale"][row], series.scale[-CONTEXT:])


def test_context_as_arrays():
    batch = EXTRACTOR(PRICES, return_tensors="np")
    assert all(isinstance(batch[name], np.ndarray) for name in EXTRACTOR.model_input_names)
    np.testing.assert_array_equal(batch["past_values"], EXTRACTOR(PRICES)["past_values"])


def test_as_of_is_the_end_of_the_data():
    friday = pd.Timestamp("2020-04-24")
    expected = EXTRACTOR(PRICES[PRICES["date"] <= friday])
    zoned, number = pd.Timestamp("2020-04-24 16:00", tz="America/New_York"), 20200424
    for as_of in (
        friday,
        str(friday.date()),
        "2020/04/24",
        friday + pd.Timedelta(days=2),
        friday.date(),
        zoned,
        number,
    ):
        batch = EXTRACTOR(PRICES, as_of=as_of)
        for name in EXTRACTOR.model_input_names:
            np.testing.assert_array_equal(batch[name], expected[name])
    assert not torch.equal(EXTRACTOR(PRICES)["scale"], expected["scale"])


def test_history_may_be_just_long_enough():
    assert EXTRACTOR.min_history == CONTEXT + VOLATILITY_BARS == 50
    assert EXTRACTOR(make_prices(AAA=50))["past_values"].shape == (1, CONTEXT, len(FEATURES))
    with pytest.raises(ValueError, match=r"^BBB has 49 bars; a forecast needs 50 \(30 of context and 20 ") as error:
        EXTRACTOR(make_prices(AAA=50, BBB=49))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("as_of", "message"),
    [
        ("2019-12-31", "AAA has 0 bars up to 2019-12-31; a forecast needs 50 "),
        ("2020-01-03", "AAA has 3 bars up to 2020-01-03; a forecast needs 50 "),
        ("2020-13-01", "'2020-13-01' is not a date"),
        ("03/04/2020", "'03/04/2020' is not a date"),  # of March or of April
    ],
)
def test_as_of_without_enough_history_is_refused(as_of, message):
    with pytest.raises(ValueError, match=message):
        EXTRACTOR(PRICES, as_of=as_of)


def test_ticker_that_starts_later_is_named():
    late = make_prices("2021-01-01", LATE=100)
    with pytest.raises(ValueError, match="LATE has 0 bars up to 2020-12-31"):
        EXTRACTOR(pd.concat([PRICES, late]), as_of="2020-12-31")


@settings(**NO_SHRINKING, max_examples=6)
@given(st.floats(1e-3, 1e3))
def test_currency_does_not_matter(factor):
    one, other = EXTRACTOR(PRICES), EXTRACTOR(times(PRICES, factor))
    for name in EXTRACTOR.model_input_names:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-4)


# --- sessions ---

SESSIONS = {
    "plain week": ("XNYS", "2024-01-08", 1, "2024-01-09"),
    "weekend": ("XNYS", "2024-01-12", 1, "2024-01-16"),  # and Martin Luther King's day
    "from a Sunday": ("XNYS", "2024-01-07", 1, "2024-01-08"),
    "11 September": ("XNYS", "2001-09-10", 1, "2001-09-17"),
    "11 September, a week ahead": ("XNYS", "2001-09-10", 5, "2001-09-21"),
    "Good Friday": ("XNYS", "2024-03-28", 1, "2024-04-01"),
    "Thanksgiving": ("XNYS", "2023-11-22", 1, "2023-11-24"),
    "half day after Thanksgiving": ("XNYS", "2023-11-22", 2, "2023-11-27"),
    "year end": ("XNYS", "2022-12-30", 1, "2023-01-03"),
    "New Year on a Saturday": ("XNYS", "2021-12-31", 1, "2022-01-03"),
    "Christmas": ("XNYS", "2023-12-15", 10, "2024-01-02"),
    "a year": ("XNYS", "2022-12-30", 250, "2023-12-29"),
    "hurricane Sandy": ("XNYS", "2012-10-26", 1, "2012-10-31"),
    "day of mourning": ("XNYS", "2025-01-08", 1, "2025-01-10"),
    "far ahead": ("XNYS", "2040-12-31", 1, "2041-01-02"),
    "Easter in London": ("XLON", "2024-03-28", 1, "2024-04-02"),
    "New Year in Tokyo": ("XTKS", "2024-12-30", 1, "2025-01-06"),
}


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1998, 2012), st.integers(0, 8)), min_size=1, max_size=3))
def test_sessions_do_not_depend_on_what_was_asked_before(spans):
    for first, years in spans:
        found = sessions_of_years("XNYS", pd.Timestamp(first, 5, 9), pd.Timestamp(first + years, 8, 1))
        calendar = exchange_calendars.get_calendar("XNYS", start=f"{first}-01-01", end=f"{first + years}-12-31")
        np.testing.assert_array_equal(found, calendar.sessions.to_numpy("datetime64[ns]"))


def test_tickers_of_many_listing_years_share_a_calendar(monkeypatch):
    """One takes a quarter of a second to make, as long as the columns of twenty tickers."""
    made, make = [], exchange_calendars.get_calendar
    monkeypatch.setattr(feature_extraction_spaceexplore, "_CALENDARS", {})

    def count(*args, **kwargs):
        made.append(args)
        return make(*args, **kwargs)

    monkeypatch.setattr(exchange_calendars, "get_calendar", count)
    for year in (*range(1990, 2020), *range(1990, 2020)):
        dates = pd.bdate_range(f"{year}-03-01", "2020-03-02").to_numpy("datetime64[ns]")
        nothing = np.zeros((len(dates), 0), np.float32)
        with_missing_sessions(EncodedSeries("AAA", dates, np.ones(len(dates)), nothing, nothing), "XNYS")
    assert len(made) == 1


@pytest.mark.parametrize(("calendar", "cutoff", "horizon", "date"), SESSIONS.values(), ids=SESSIONS)
def test_horizons_count_sessions_of_the_exchange(calendar, cutoff, horizon, date):
    cutoffs = pd.Series(pd.to_datetime([cutoff]))
    sessions = following_sessions(calendar, cutoffs, [horizon])
    assert sessions.dtype == "datetime64[ns]"
    assert sessions.astype("datetime64[D]").astype(str).tolist() == [[date]]


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=6),
    st.lists(st.integers(1, 120), min_size=1, max_size=4, unique=True).map(sorted),
)
def test_sessions_of_many_cutoffs(days, horizons):
    cutoffs = pd.Series(pd.Timestamp("2012-02-01") + pd.to_timedelta(days, unit="D"))
    table = following_sessions("XNYS", cutoffs, horizons)
    assert table.shape == (len(days), len(horizons))
    calendar = exchange_calendars.get_calendar("XNYS")
    for row, cutoff in enumerate(cutoffs):
        following = calendar.date_to_session(cutoff + pd.Timedelta(days=1), direction="next")
        expected = [calendar.session_offset(following, horizon - 1) for horizon in horizons]
        np.testing.assert_array_equal(table[row], np.array(expected, dtype="datetime64[ns]"))


def test_unknown_calendar_is_refused():
    with pytest.raises(ValueError, match="'XNOPE' is not known") as error:
        following_sessions("XNOPE", pd.Series(pd.to_datetime(["2024-01-08"])), [1])
    assert "\n" not in str(error.value)


def test_missing_calendar_package_is_named(monkeypatch):
    monkeypatch.setattr(feature_extraction_spaceexplore, "exchange_calendars", None)
    with pytest.raises(ImportError, match="pip install exchange_calendars"):
        following_sessions("XNYS", pd.Series(pd.to_datetime(["1995-01-03"])), [1])


# --- forecasts ---

LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]
CONFIG = SimpleNamespace(horizons=[1, 2, 5], quantile_levels=LEVELS, target="log_return")
COLUMNS = ["ticker", "cutoff", "date", "horizon", "mean", "q0.05", "q0.25", "q0.5", "q0.75", "q0.95", "p_up"]


def make_outputs(tickers: int = 2, steps: int = 4) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    mean = 0.02 * torch.randn(tickers, steps, len(CONFIG.horizons), generator=generator)
    width = 0.01 + 0.02 * torch.rand(tickers, steps, len(CONFIG.horizons), 1, generator=generator)
    return SimpleNamespace(mean=mean, quantiles=mean[..., None] + width * torch.tensor([-2.0, -1, 0, 1, 3]))


def test_decoded_log_returns():
    outputs = make_outputs()
    table = EXTRACTOR.decode(outputs, PRICES, CONFIG, unit="log_return")
    assert list(table.columns) == COLUMNS
    assert table["ticker"].tolist() == ["AAA"] * 3 + ["BBB"] * 3
    assert table["horizon"].tolist() == [1, 2, 5] * 2
    newest = PRICES.groupby("ticker")["date"].max()
    assert table["cutoff"].tolist() == newest.repeat(3).tolist()
    sessions = following_sessions("XNYS", newest.reset_index(drop=True), [1, 2, 5])
    np.testing.assert_array_equal(table["date"], sessions.reshape(-1))
    np.testing.assert_allclose(table["mean"], outputs.mean[:, -1].reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(table[quantile_columns(LEVELS)], outputs.quantiles[:, -1].reshape(6, 5), rtol=1e-6)
    expected = [1 - np.interp(0, row, LEVELS) for row in outputs.quantiles[:, -1].reshape(6, 5).double().numpy()]
    np.testing.assert_allclose(table["p_up"], expected, rtol=1e-9)
    assert table.dtypes[["cutoff", "date"]].astype(str).tolist() == ["datetime64[ns]"] * 2
    pd.testing.assert_index_equal(table.index, pd.RangeIndex(6), exact=True)


def test_decoded_prices_are_those_of_the_log_returns():
    outputs = make_outputs()
    returns = EXTRACTOR.decode(outputs, PRICES, CONFIG, unit="log_return")
    table = EXTRACTOR.decode(outputs, PRICES, CONFIG)
    close = np.repeat([PRICES[PRICES["ticker"] == ticker]["close"].iloc[-1] for ticker in ("AAA", "BBB")], 3)
    numbers = ["mean", *quantile_columns(LEVELS)]
    np.testing.assert_allclose(np.log(table[numbers].div(close, axis=0)), returns[numbers], rtol=1e-9, atol=1e-12)
    pd.testing.assert_frame_equal(table.drop(columns=numbers), returns.drop(columns=numbers))
    assert (np.diff(table[quantile_columns(LEVELS)], axis=1) > 0).all()


def test_forecast_is_in_the_currency_of_the_prices():
    one, other = (EXTRACTOR.decode(make_outputs(), prices, CONFIG) for prices in (PRICES, times(PRICES, 7.0)))
    numbers = ["mean", *quantile_columns(LEVELS)]
    np.testing.assert_allclose(other[numbers], 7.0 * one[numbers], rtol=1e-12)
    pd.testing.assert_frame_equal(other.drop(columns=numbers), one.drop(columns=numbers))


def test_forecast_as_of_an_earlier_day():
    as_of = PRICES["date"].iloc[70]
    table = EXTRACTOR.decode(make_outputs(), PRICES, CONFIG, as_of=as_of)
    pd.testing.assert_frame_equal(table, EXTRACTOR.decode(make_outputs(), PRICES[PRICES["date"] <= as_of], CONFIG))
    assert (table["cutoff"] == as_of).all()
    pd.testing.assert_frame_equal(table, EXTRACTOR.decode(make_outputs(), PRICES, CONFIG, as_of=str(as_of.date())))


@pytest.mark.parametrize("convert", [torch.Tensor.bfloat16, torch.Tensor.requires_grad_, torch.Tensor.numpy])
def test_outputs_may_come_in_any_form(convert):
    outputs = make_outputs()
    expected = EXTRACTOR.decode(outputs, PRICES, CONFIG, unit="log_return")
    converted = SimpleNamespace(mean=convert(outputs.mean.clone()), quantiles=convert(outputs.quantiles.clone()))
    table = EXTRACTOR.decode(converted, PRICES, CONFIG, unit="log_return")
    numbers = ["mean", *quantile_columns(LEVELS)]
    np.testing.assert_allclose(table[numbers], expected[numbers], rtol=0.01)


def test_a_network_of_another_target_forecasts_no_prices():
    config = SimpleNamespace(horizons=[1, 2, 5], quantile_levels=LEVELS, target="volatility")
    with pytest.raises(ValueError, match="needs a network of log-returns, this one predicts 'volatility'"):
        EXTRACTOR.decode(make_outputs(), PRICES, config)


def test_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="'price' or 'log_return', got 'dollar'"):
        EXTRACTOR.decode(make_outputs(), PRICES, CONFIG, unit="dollar")


def test_forecast_dates_are_of_the_calendar_of_the_extractor():
    origins = pd.DataFrame({"ticker": ["VOD", "BP"], "cutoff": pd.to_datetime(["2024-03-28", "2023-12-22"])})
    newest = [outputs[:, -1] for outputs in vars(make_outputs()).values()]
    extractors = [SpaceExploreFeatureExtractor(FEATURES, calendar=calendar) for calendar in ("XLON", "XNYS")]
    tables = [extractor.forecast_table(origins, *newest, CONFIG) for extractor in extractors]
    assert [list(table.columns) for table in tables] == [COLUMNS] * 2
    london, new_york = (table["date"].dt.strftime("%m-%d").tolist() for table in tables)
    assert london == ["04-02", "04-03", "04-08", "12-27", "12-28", "01-03"]
    assert new_york == ["04-01", "04-02", "04-05", "12-26", "12-27", "01-02"]
    assert tables[0]["ticker"].tolist() == ["VOD"] * 3 + ["BP"] * 3


@pytest.mark.parametrize(
    ("quantiles", "probability"),
    [
        ([-0.03, -0.02, 0.0, 0.01, 0.02], 0.5),
        ([-0.03, -0.01, 0.01, 0.02, 0.03], 0.375),  # half way between the levels 0.25 and 0.5
        ([-0.01, 0.03, 0.04, 0.05, 0.06], 0.1),  # a quarter of the way from 0.05 to 0.25
        ([0.01, 0.02, 0.03, 0.04, 0.05], 0.05),
        ([-0.05, -0.04, -0.03, -0.02, -0.01], 0.95),
    ],
)
def test_probability_of_a_rise(quantiles, probability):
    assert cumulative_probability(np.array([quantiles]), LEVELS, 0.0) == pytest.approx([probability])
    origins = pd.DataFrame({"ticker": ["AAA"], "cutoff": pd.to_datetime(["2024-01-08"])})
    quantiles = torch.tensor(quantiles).expand(1, 3, 5)
    table = EXTRACTOR.forecast_table(origins, torch.zeros(1, 3), quantiles, CONFIG)
    np.testing.assert_allclose(table["p_up"], 1 - probability, rtol=1e-6)


def interpolated(value: float, quantiles: list[float], levels: list[float]) -> float:
    if value < quantiles[0]:
        return levels[0]
    if value >= quantiles[-1]:
        return levels[-1]
    i = bisect_right(quantiles, value)
    share = (value - quantiles[i - 1]) / (quantiles[i] - quantiles[i - 1])
    return levels[i - 1] + share * (levels[i] - levels[i - 1])


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=5, max_size=5).map(sorted), st.floats(-1.5, 1.5))
def test_probability_equals_a_plain_loop(quantiles, value):
    probability = cumulative_probability(np.array([quantiles, quantiles]), LEVELS, value)
    np.testing.assert_allclose(probability, [interpolated(value, quantiles, LEVELS)] * 2, rtol=1e-9)
    assert ((probability >= 0.05) & (probability <= 0.95)).all()


def test_quantile_columns_are_named_by_their_levels():
    levels = [0.05, 0.1, 0.15, 0.5, 0.975]
    assert quantile_columns(levels) == ["q0.05", "q0.1", "q0.15", "q0.5", "q0.975"]
