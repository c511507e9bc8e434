"""Exports beside the table they are made of, prices of the extractor, and twins of how libraries read them."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import make_market
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.prices import write_table
from spaceexploreai.evaluation.backtest import Costs, backtest
from spaceexploreai.evaluation.exports import fev_task, price_forecasts, qlib_signal
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.scripts import export_forecasts

STEPS, LEVELS = 3, [0.05, 0.5, 0.95]
CONFIG = SpaceExploreConfig(horizons=[1, 2, STEPS], quantile_levels=LEVELS)
EXTRACTOR = SpaceExploreFeatureExtractor(context_length=8)
PRICES = make_market(days=60)
SESSIONS = PRICES["date"].unique()
FORECASTS = ["mean", *map(str, LEVELS)]
CLOSES = PRICES.pivot(index="date", columns="ticker", values="close")


def make_forecasts(prices: pd.DataFrame = PRICES, cutoffs: slice = slice(30, None), seed: int = 0) -> pd.DataFrame:
    """A forecast table as a model makes it, of the bars on some sessions."""
    origins = prices[prices["date"].isin(SESSIONS[cutoffs])].rename(columns={"date": "cutoff"})
    generator = np.random.default_rng(seed)
    quantiles = np.sort(generator.normal(0, 0.03, (len(origins), STEPS, len(LEVELS))))
    table = EXTRACTOR.forecast_table(
        origins.reset_index(drop=True), generator.normal(0, 0.01, quantiles.shape[:2]), quantiles, CONFIG
    )
    return table.sample(frac=1, random_state=seed)


def without_bar(session: int, ticker: str = "T1") -> pd.DataFrame:
    gone = (PRICES["date"] == SESSIONS[session]) & (PRICES["ticker"] == ticker)
    return PRICES[~gone].reset_index(drop=True)


TABLE = make_forecasts()


# --- qlib ---


@pytest.mark.parametrize("signal", ["mean", "p_up"])
def test_score_is_the_signal_at_its_cutoff(signal):
    found = qlib_signal(TABLE, 2, signal)
    assert list(found.columns) == ["datetime", "instrument", "score"]
    expected = {(row.cutoff, row.ticker): row[signal] for _, row in TABLE.iterrows() if row.horizon == 2}
    assert dict(zip(zip(found["datetime"], found["instrument"], strict=True), found["score"], strict=True)) == expected
    assert found.set_index(["datetime", "instrument"]).index.is_monotonic_increasing


def test_qlib_buys_on_a_day_what_the_backtest_buys():
    """qlib decides by the scores of the session before the one it trades on."""
    signal = qlib_signal(TABLE, 1).set_index(["datetime", "instrument"])
    orders = backtest(TABLE, PRICES, 1, side="long", top_k=1, costs=Costs(0, 0, 0))["strategy"].orders
    bought = orders[orders["shares"] > 0].set_index("date")["ticker"]
    assert len(bought) > 10
    for day, ticker in bought.items():
        before = SESSIONS[list(SESSIONS).index(day) - 1]
        assert signal.loc[before, "score"].idxmax() == ticker


# --- prices ---


def test_prices_are_those_of_the_extractor():
    generator = np.random.default_rng(1)
    quantiles = np.sort(generator.normal(0, 0.03, (3, 5, STEPS, len(LEVELS))))
    outputs = SimpleNamespace(mean=generator.normal(0, 0.01, quantiles.shape[:3]), quantiles=quantiles)
    returns, expected = (
        EXTRACTOR.decode(outputs, PRICES, CONFIG, SESSIONS[40], unit) for unit in ("log_return", "price")
    )
    found = price_forecasts(returns, PRICES, STEPS)
    assert list(found["item_id"]) == ["T0", "T1", "T2"]
    assert found["cutoff"].eq(SESSIONS[40]).all()
    for name, column in zip(["date", *FORECASTS], ["date", "mean", "q0.05", "q0.5", "q0.95"], strict=True):
        found_one, expected_one = np.concatenate(found[name].to_list()), expected[column].to_numpy()
        if name == "date":
            assert_array_equal(found_one, expected_one)
        else:
            assert_allclose(found_one, expected_one, rtol=1e-12)


def test_target_is_the_close_of_the_day_or_unknown():
    prices = without_bar(50)
    found = price_forecasts(make_forecasts(prices), prices, STEPS)
    close = {(row.ticker, row.date): row.close for row in prices.itertuples()}
    for row in found.itertuples():
        expected = [close.get((row.item_id, pd.Timestamp(day)), np.nan) for day in row.date]
        assert_array_equal(row.target, expected)
    assert np.isnan(np.concatenate(found["target"].to_list())).sum() == 3 * STEPS * (STEPS + 1) / 2 + STEPS


@given(st.integers(0, 2**16), st.integers(30, 58), st.integers(1, STEPS))
@settings(max_examples=10, deadline=None)
def test_later_prices_change_no_forecast(seed, session, horizon):
    later = PRICES["date"] > SESSIONS[session]
    factor = np.where(later, np.random.default_rng(seed).uniform(0.5, 2, len(PRICES)), 1.0)
    tables = (
        price_forecasts(TABLE, prices, horizon) for prices in (PRICES, PRICES.assign(close=PRICES["close"] * factor))
    )
    known, changed = (table[table["cutoff"] <= SESSIONS[session]] for table in tables)
    forecasts = ["item_id", "cutoff", "date", *FORECASTS]
    pd.testing.assert_frame_equal(known[forecasts], changed[forecasts], check_exact=True)
    assert not np.array_equal(known["target"].iloc[-1], changed["target"].iloc[-1])


@pytest.mark.parametrize("wrong", [0, 4, 10])
def test_a_step_without_a_forecast_is_refused(wrong):
    with pytest.raises(ValueError, match=f"no horizon {4 if wrong == 10 else wrong}; it has 1, 2, 3"):
        price_forecasts(TABLE, PRICES, wrong)


def test_a_gap_between_the_horizons_is_refused():
    gap = TABLE[TABLE["horizon"] != 2]
    with pytest.raises(ValueError, match="no horizon 2; it has 1, 3, and every one from 1 to 3"):
        price_forecasts(gap, PRICES, STEPS)
    assert len(price_forecasts(gap, PRICES, 1)) == len(TABLE) / STEPS


@pytest.mark.parametrize("spoil", ["first", "last", "twice", "for another"])
def test_a_window_without_each_step_once_is_refused(spoil):
    one = (TABLE["ticker"] == "T1") & (TABLE["cutoff"] == SESSIONS[35])
    place = TABLE.index[one & (TABLE["horizon"] == {"first": 1, "last": STEPS}.get(spoil, 2))][0]
    table = pd.concat([TABLE, TABLE.loc[[place]]]) if spoil == "twice" else TABLE.drop(place)
    if spoil == "for another":
        table = pd.concat([table, TABLE.loc[[place]].assign(horizon=STEPS)])
    with pytest.raises(ValueError, match=f"T1 does not have each step .* at cutoff {SESSIONS[35]:%Y-%m-%d}"):
        price_forecasts(table, PRICES, STEPS)


def test_what_cannot_be_a_price_is_refused():
    with pytest.raises(ValueError, match=f"T1 has no bar in the price table at cutoff {SESSIONS[33]:%Y-%m-%d}"):
        price_forecasts(TABLE, without_bar(33), STEPS)
    row = TABLE.index[TABLE["horizon"] == 2][0]
    missing = TABLE.copy()
    missing.loc[row, "q0.5"] = np.nan
    sentence = (
        f"{TABLE.loc[row, 'ticker']} has a forecast that is not finite at cutoff {TABLE.loc[row, 'cutoff']:%Y-%m-%d}"
    )
    with pytest.raises(ValueError, match=sentence):
        price_forecasts(missing, PRICES, STEPS)
    classes = TABLE.drop(columns=["q0.05", "q0.5", "q0.95"])
    with pytest.raises(ValueError, match="no quantile column"):
        price_forecasts(classes, PRICES, STEPS)


# --- fev ---


def outcomes_of(dataset: pd.DataFrame, task: dict, window: int) -> np.ndarray:
    """(N, H) what fev scores a window by: of each series, in the order of ids, what follows the cutoff."""
    cutoff = task["initial_cutoff"] + window * task["window_step_size"]
    return np.stack([row[cutoff : cutoff + task["horizon"]] for row in dataset.sort_values("id")["target"]])


@pytest.mark.parametrize(("stride", "prices"), [(1, PRICES), (4, without_bar(33))])
def test_windows_of_fev_are_the_cutoffs(stride, prices):
    chosen = slice(31, None, stride)
    closes = prices.pivot(index="date", columns="ticker", values="close")
    table = price_forecasts(make_forecasts(prices, chosen), prices, STEPS)
    dataset, predictions, task = fev_task(table, prices)
    assert predictions["cutoff"].is_monotonic_increasing
    windows = list(predictions.groupby("cutoff"))
    assert [cutoff for cutoff, _ in windows] == list(SESSIONS[chosen][: task["num_windows"]])
    assert task["num_windows"] == sum(SESSIONS[-STEPS] > day for day in SESSIONS[chosen])
    assert task["quantile_levels"] == LEVELS
    for which, (cutoff, rows) in enumerate(windows):
        assert list(rows["id"]) == list(dataset["id"]) == ["T0", "T1", "T2"]
        place = list(SESSIONS).index(cutoff)
        expected = closes.iloc[place + 1 : place + 1 + STEPS].T
        assert_array_equal(outcomes_of(dataset, task, which), expected)
        own = table[table["cutoff"] == cutoff].set_index("item_id")
        for name in FORECASTS:
            found = rows.set_index("id")["predictions" if name == "mean" else name]
            assert_array_equal(np.stack(found), np.stack(own[name]))


def test_dataset_of_fev_is_regular_and_has_every_close():
    prices = without_bar(40)
    table = price_forecasts(make_forecasts(prices, slice(50, None)), prices, STEPS)
    dataset, _, _ = fev_task(table, prices)
    alone, _, _ = fev_task(table[table["item_id"] == "T1"], prices)
    expected = CLOSES.copy()
    expected.loc[SESSIONS[40], "T1"] = np.nan
    assert_array_equal(np.stack(dataset["target"]), expected.T)
    assert_array_equal(np.stack(alone["target"]), expected[["T1"]].T)
    for numbers in dataset["timestamp"]:
        assert set(np.diff(numbers)) == {np.timedelta64(1, "D")}


def test_fev_refuses_a_ticker_that_is_not_always_forecast():
    young = PRICES[(PRICES["ticker"] != "T2") | (PRICES["date"] > SESSIONS[45])].reset_index(drop=True)
    table = price_forecasts(make_forecasts(young), young, STEPS)
    with pytest.raises(ValueError, match=f"T2 has no forecast at cutoff {SESSIONS[30]:%Y-%m-%d}, as 1 of 3 tickers"):
        fev_task(table, young)
    fev_task(table[table["item_id"] != "T2"], young)


def test_fev_refuses_uneven_cutoffs():
    uneven = TABLE[TABLE["cutoff"].isin(SESSIONS[[30, 31, 35]])]
    with pytest.raises(ValueError, match="cutoffs are 1 to 4 sessions apart"):
        fev_task(price_forecasts(uneven, PRICES, STEPS), PRICES)


def test_fev_refuses_prices_with_other_sessions():
    fewer = PRICES[PRICES["date"] != SESSIONS[42]].reset_index(drop=True)
    table = price_forecasts(TABLE[TABLE["cutoff"] != SESSIONS[42]], fewer, STEPS)
    there, here = SESSIONS[[42, 43]]
    sentence = (
        f"T0: session 3 after {SESSIONS[39]:%Y-%m-%d} is {there:%Y-%m-%d} in .* and {here:%Y-%m-%d} in the prices"
    )
    with pytest.raises(ValueError, match=sentence):
        fev_task(table, fewer)


def test_fev_needs_outcomes():
    newest = TABLE[TABLE["cutoff"] > SESSIONS[-STEPS - 1]]
    with pytest.raises(ValueError, match="nothing can be scored"):
        fev_task(price_forecasts(newest, PRICES, STEPS), PRICES)


# --- the command line ---


@pytest.fixture
def files(tmp_path) -> list[str]:
    for name, table in (("prices.parquet", PRICES), ("forecasts.csv", TABLE)):
        write_table(table, tmp_path / name)
    return ["--forecasts", str(tmp_path / "forecasts.csv"), "--prices", str(tmp_path / "prices.parquet")]


@pytest.mark.parametrize("name", ["signal.parquet", "signal.csv"])
def test_signal_loads_as_documented(tmp_path, files, name):
    output = tmp_path / name
    export_forecasts.main([*files, "--format", "qlib", "--horizon", "3", "--signal", "p_up", "--output", str(output)])
    read = pd.read_parquet(output) if name.endswith(".parquet") else pd.read_csv(output, parse_dates=["datetime"])
    expected = qlib_signal(TABLE, 3, "p_up")
    pd.testing.assert_frame_equal(read, expected, check_dtype=False)
    signal = read.set_index(["datetime", "instrument"])
    assert list(signal.columns) == ["score"]
    assert signal.index.is_unique


def test_gluonts_file_holds_arrays_for_its_forecasts(tmp_path, files):
    output = tmp_path / "new" / "gluonts.parquet"
    export_forecasts.main([*files, "--format", "gluonts", "--horizon", "2", "--output", str(output)])
    read, expected = pd.read_parquet(output), price_forecasts(TABLE, PRICES, 2)
    assert list(read.columns) == ["item_id", "cutoff", "date", "target", *FORECASTS]
    assert_array_equal(read[["item_id", "cutoff"]], expected[["item_id", "cutoff"]])
    for name in ("date", "target", *FORECASTS):
        assert_allclose(*(np.stack(one[name]).astype(float) for one in (read, expected)), rtol=1e-12)


def test_fev_folder_holds_a_task(tmp_path, files):
    folder = tmp_path / "fev"
    export_forecasts.main([*files, "--format", "fev", "--horizon", "3", "--tickers", "T2,T0", "--output", str(folder)])
    task = json.loads((folder / "task.json").read_text())
    dataset, predictions = (pd.read_parquet(folder / f"{name}.parquet") for name in ("dataset", "predictions"))
    assert set(task) == {"horizon", "num_windows", "initial_cutoff", "window_step_size", "quantile_levels"}
    assert list(dataset["id"]) == ["T0", "T2"]
    assert len(predictions) == 2 * task["num_windows"]
    assert list(predictions.columns) == ["id", "cutoff", "predictions", *map(str, task["quantile_levels"])]
    assert_array_equal(outcomes_of(dataset, task, 0), CLOSES[["T0", "T2"]].iloc[31 : 31 + STEPS].T)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--format", "qlib", "--horizon", "5", "--output", "a.parquet"], "no horizon 5; it has 1, 2, 3"),
        (["--format", "qlib", "--horizon", "1", "--output", "a.pkl"], "must end in .parquet or .csv"),
        (["--format", "qlib", "--horizon", "1", "--signal", "y", "--output", "a.csv"], "signal must be one of"),
        (["--format", "gluonts", "--horizon", "5", "--output", "a.parquet"], "no horizon 4"),
        (["--format", "gluonts", "--horizon", "2", "--output", "a.csv"], "must end in .parquet"),
        (["--format", "fev", "--horizon", "0", "--output", "a"], "no horizon 0"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, files, options, sentence):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        export_forecasts.main([*files, *options])
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert sentence in line
    assert not list(folder.iterdir())
