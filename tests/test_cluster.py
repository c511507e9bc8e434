"""A cluster writes the very folder that one process writes, and no more of it where something fails."""

import json
import os
import time
from pathlib import Path

import dask
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_market
from dask import distributed
from hypothesis import given, settings
from hypothesis import strategies as st

from spaceexploreai.data import cluster, stocks
from spaceexploreai.data.cleaning import clean
from spaceexploreai.data.files import whole_folder
from spaceexploreai.data.prices import write_table
from spaceexploreai.data.stocks import StocksConfig
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.scripts import build_dataset

FEATURES = ["gap", "body", "rsi_14", "atr_14", "relative_volume_5"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing is read from or left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def address():
    """Of a scheduler with two worker processes."""
    with cluster.connect("local:2") as client:
        yield client.scheduler.address


@pytest.fixture
def threads():
    """A cluster of one thread pool in this process, which tasks of this file can reach."""
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        yield client


@pytest.fixture(scope="module")
def market() -> pd.DataFrame:
    """Tickers delisted, listed late, halted, too short, without a usable bar, and with defects to clean."""
    table = make_market(tickers=9, days=400)
    days = table["date"].unique()
    ticker, position = table["ticker"], table["date"].map({day: which for which, day in enumerate(days)})
    gone = ticker.isin(["T0", "T1"]) & (position >= 300)
    late = (ticker == "T5") & (position < 170)
    halted = (ticker == "T2") & position.between(100, 130)
    short = (ticker == "T3") & (position < 385)
    table = table[~(gone | late | halted | short)].reset_index(drop=True)
    table.loc[table["ticker"] == "T7", "close"] = np.nan
    table.loc[table.index[30::97], "volume"] = np.nan
    return pd.concat([table, table[40::211]]).sort_values(["ticker", "date"], ignore_index=True)


@pytest.fixture(scope="module", params=["parquet", "yahoo"])
def prices(request, market, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "yahoo":
        for name, bars in market.groupby("ticker"):
            write_table(bars.drop(columns="ticker"), folder / name / f"{name}_yahoo_20200101.csv")
        return folder
    spaced = market["ticker"].mask((market["ticker"] == "T4") & (market.index % 2 == 0), " T4")
    write_table(market.assign(ticker=spaced), folder / "prices.parquet")
    return folder / "prices.parquet"


@pytest.fixture(scope="module")
def columns(tmp_path_factory) -> Path:
    """An extractor that was not fitted yet."""
    folder = tmp_path_factory.mktemp("columns")
    extractor = SpaceExploreFeatureExtractor(feature_names=FEATURES, context_length=16)
    extractor.to_json_file(folder / "preprocessor_config.json")
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(build_dataset, "TICKERS_PER_FILE", 3)
    monkeypatch.setattr(stocks, "FIT_TICKERS", 4)


def build(prices, columns, target: Path, *options: str) -> Path:
    data = ["--prices", str(prices), "--extractor", str(columns), "--output-dir", str(target)]
    build_dataset.main([*data, "--horizons", "1,2,6", "--stride", "5", "--margin", "0.4", *options])
    return target


def assert_same_folders(found: Path, expected: Path) -> None:
    files = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
    assert {path.relative_to(found) for path in found.rglob("*") if path.is_file()} == files
    for file in files:
        if file.suffix == ".parquet":
            one, other = pq.read_table(found / file), pq.read_table(expected / file)
            assert one.schema.equals(other.schema, check_metadata=True)
            # Not equals, to which a NaN is another than itself.
            pd.testing.assert_frame_equal(one.to_pandas(), other.to_pandas(), check_exact=True)
        elif file.name == stocks.METADATA_NAME:
            one, other = (json.loads((folder / file).read_text()) for folder in (found, expected))
            assert without_examples(one) == without_examples(other)
        else:
            assert (found / file).read_text() == (expected / file).read_text()


def without_examples(metadata: dict) -> dict:
    """A report of parts has other examples where the whole has the largest."""
    return {**metadata, "cleaning": {**metadata["cleaning"], "findings": kinds_of(metadata["cleaning"])}}


def kinds_of(report: dict) -> list[tuple]:
    return [(one["kind"], one["action"], one["count"], len(one["examples"])) for one in report["findings"]]


# --- equality ---


@pytest.mark.parametrize("options", [(), ("--config", "dpo", "--universe", "{universe}", "--target", "volatility")])
def test_the_folder_is_that_of_one_process(prices, columns, address, small_shards, tmp_path, options):
    (tmp_path / "universe.txt").write_text("T0\nT8\nT9\n")
    options = [option.format(universe=tmp_path / "universe.txt") for option in options]
    one = build(prices, columns, tmp_path / "one", *options)
    many = build(prices, columns, tmp_path / "many", "--cluster", address, *options)
    assert_same_folders(many, one)
    series = pq.read_table(one / "series")
    assert series["ticker"].to_pylist() == ["T0", "T1", "T2", "T4", "T5", "T6", "T8"]
    assert len(list((one / "series").iterdir())) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one", "universe.txt"]


def test_new_columns_of_some_tickers_with_bars_invented(market, threads, small_shards, tmp_path, monkeypatch):
    """And of more than one batch in a shard."""
    monkeypatch.setattr(stocks, "TICKERS_PER_BATCH", 2)
    write_table(market, tmp_path / "prices.parquet")
    options = ["--prices", str(tmp_path / "prices.parquet"), "--tickers", "T8,T2,T5,T0", "--fill", "--config", "sft"]
    options += ["--feature-groups", "volume", "--normalization", "standard", "--context-length", "20"]
    options += ["--train-start", "2005-05-02"]
    build_dataset.main([*options, "--output-dir", str(tmp_path / "one")])
    build_dataset.main([*options, "--output-dir", str(tmp_path / "many"), "--cluster", threads.scheduler.address])
    assert_same_folders(tmp_path / "many", tmp_path / "one")


def test_statistics_are_kept(market, columns, address, tmp_path):
    write_table(market, tmp_path / "prices.parquet")
    count = len(FEATURES)
    extractor = SpaceExploreFeatureExtractor(FEATURES, context_length=16, center=[0.5] * count, spread=[2.0] * count)
    extractor.to_json_file(tmp_path / "preprocessor_config.json")
    folder = build(tmp_path / "prices.parquet", tmp_path, tmp_path / "many", "--cluster", address)
    assert SpaceExploreFeatureExtractor.from_pretrained(folder).to_dict() == extractor.to_dict()


def refuse(*args, **kwargs):
    raise AssertionError("done by the process that hands out the work")


def test_the_workers_do_the_work(market, columns, address, tmp_path, monkeypatch):
    write_table(market, tmp_path / "prices.parquet")
    monkeypatch.setattr(cluster.prices, "read_raw", refuse)
    monkeypatch.setattr(stocks, "supervised_windows", refuse)
    for name in ("compute_features", "fit", "encode"):
        monkeypatch.setattr(SpaceExploreFeatureExtractor, name, refuse)
    assert build(tmp_path / "prices.parquet", columns, tmp_path / "many", "--cluster", address).is_dir()


def test_reports_of_parts_are_the_report_of_the_whole(market, tmp_path):
    write_table(market, tmp_path / "prices.parquet")
    config, tickers = StocksConfig(prices=str(tmp_path / "prices.parquet")), sorted(set(market["ticker"]))
    (_, whole), (_, every) = (clean(market, examples=examples) for examples in (5, 10**6))
    assert {"delisted", "lost_ticker", "missing_session"} <= {one.kind for one in whole.findings}

    @settings(max_examples=8, deadline=None)
    @given(st.sets(st.sampled_from(range(1, 7)), max_size=4).map(sorted))
    def check(cuts):
        parts = [tickers[start:stop] for start, stop in zip([0, *cuts], [*cuts, None], strict=True)]
        merged = cluster.merge_reports([cluster.survey(config, part) for part in parts])
        assert without_examples({"cleaning": merged.to_dict()}) == without_examples({"cleaning": whole.to_dict()})
        for one, other in zip(merged.findings, every.findings, strict=True):
            assert all(example in other.examples for example in one.examples)

    check()


# --- failure ---


def test_a_file_without_rows_is_read(tmp_path):
    """Of tickers none of which is in the universe of the pairs, for instance."""
    table = pa.table({"ticker": ["AAA", "BBB"], "margin": [0.5, 0.6]})
    for number, rows in enumerate((0, 2, 0)):
        cluster.write_file(table[:rows], tmp_path / "dpo", "train", number, 3)
    files = sorted(map(str, (tmp_path / "dpo").iterdir()))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "cache")
    assert dataset.to_dict() == table.to_pydict()


def test_results_come_in_the_order_of_the_jobs(threads):
    def task(number):
        time.sleep(0.02 * (number % 3 == 0))
        return number

    assert cluster.run(threads, task, [([str(number)], (number,)) for number in range(20)]) == list(range(20))


def test_a_failure_waits_for_what_runs_and_calls_off_the_rest(threads, tmp_path):
    def task(number):
        # Files, since a worker gets its own copy of all that is defined in here.
        (tmp_path / f"{number}.begun").touch()
        if number == 2:
            raise ValueError("two")
        time.sleep(0.3)
        (tmp_path / f"{number}.ended").touch()

    with pytest.raises(ValueError, match="two"):
        cluster.run(threads, task, [([str(number)], (number,)) for number in range(30)])
    begun, ended = ({path.stem for path in tmp_path.glob(pattern)} for pattern in ("*.begun", "*.ended"))
    assert "2" in begun
    assert ended == begun - {"2"}
    assert len(begun) <= 2 * cluster.WAITING * 2
    time.sleep(0.5)
    assert len(list(tmp_path.glob("*.begun"))) == len(begun)


def test_a_dead_worker_names_its_tickers():
    with (
        distributed.LocalCluster(1, threads_per_worker=1, dashboard_address=":0") as local,
        distributed.Client(local) as client,
    ):
        local.scheduler.allowed_failures = 0
        with pytest.raises(distributed.KilledWorker, match="_exit of AAA to CCC"):
            cluster.run(client, os._exit, [(["AAA", "BBB", "CCC"], (1,))])


@pytest.fixture
def yahoo(market, tmp_path) -> Path:
    for name, bars in market.groupby("ticker"):
        write_table(bars.drop(columns="ticker"), tmp_path / "yahoo" / name / f"{name}_yahoo_20200101.csv")
    return tmp_path / "yahoo"


def test_a_file_that_cannot_be_read_is_named_and_the_former_folder_stays(yahoo, columns, address, tmp_path, capsys):
    folder = build(yahoo, columns, tmp_path / "out", "--cluster", address)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (yahoo / "T5" / "T5_yahoo_20200102.csv").write_text("Date,Open,High,Low,Close\n2005-01-03,1,1,1,1\n")
    with pytest.raises(SystemExit):
        build(yahoo, columns, folder, "--cluster", address)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: T0 to T8: ")
    assert error.endswith("has no column 'volume'; it has Date, Open, High, Low, Close")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "yahoo"]


def test_a_shard_that_cannot_be_written_leaves_nothing(yahoo, columns, threads, small_shards, tmp_path, monkeypatch):
    """In the last pass, when files of other shards are there already."""
    write, written = cluster.write_file, []

    def fail(table, folder, split, number, count):
        if (folder.name, number) == ("dpo", 1):
            raise OSError("disk full")
        write(table, folder, split, number, count)
        written.extend(path.name for path in folder.iterdir())

    monkeypatch.setattr(cluster, "write_file", fail)
    config = StocksConfig(prices=str(yahoo), extractor=str(columns))
    with (
        pytest.raises(OSError, match=r"^T4 to T6: disk full"),
        whole_folder(tmp_path / "out") as folder,
    ):
        cluster.build_folder(threads, config, ("dpo",), folder, tickers_per_file=3)
    assert "history-00000-of-00003.parquet" in written
    assert [path.name for path in tmp_path.iterdir()] == ["yahoo"]


def test_what_a_dead_worker_left_half_written_is_removed(yahoo, columns, threads, tmp_path):
    half = tmp_path / "out" / "series" / ".0123.history-00000-of-00001.parquet"
    half.parent.mkdir(parents=True)
    half.touch()
    config = StocksConfig(prices=str(yahoo), extractor=str(columns), context_length=16)
    cluster.build_folder(threads, config, ("sft",), tmp_path / "out", tickers_per_file=64)
    assert [path.name for path in half.parent.iterdir()] == ["history-00000-of-00001.parquet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--feature-groups", "price,relation"], "column 'return_rank_1' compares tickers with each other"),
        (["--strict"], "T0 to T8: T7 2005-01-03: close nan"),
        (["--tickers", "T9"], "T9: unknown ticker 'T9'"),
        (["--stride", "65"], "a stride of 65 is longer than the context_length of 64"),
        (["--horizons", "1,60"], "the validation range has 40 of 400 trading days; a horizon of 60 days"),
        (["--margin", "50", "--config", "dpo"], "the train split of dpo is empty"),
        (["--tickers", "T3", "--validation-fraction", "0.3", "--test-fraction", "0.3", "--horizons", "1"], "20 bars"),
        (["--prices", "nowhere.parquet"], "no such file or directory: nowhere.parquet"),
        (["--num-proc", "2"], "--num-proc: not allowed with argument --cluster"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(yahoo, address, tmp_path, capsys, options, message):
    target = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_:
        build_dataset.main(["--prices", str(yahoo), "--output-dir", str(target), "--cluster", address, *options])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit_.value.code == 2
    assert len(error) == 1
    assert message in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["yahoo"]


def test_rows_without_a_ticker_are_refused(market, tmp_path):
    for name in (None, "", " "):
        table = market.assign(ticker=market["ticker"].where(market.index != 7, name))
        write_table(table, tmp_path / "prices.parquet")
        with pytest.raises(ValueError, match="has rows without a ticker"):
            cluster.names_of_tickers(StocksConfig(prices=str(tmp_path / "prices.parquet")))


@pytest.mark.parametrize("address", ["local:0", "local:two", "local:-1"])
def test_an_impossible_number_of_workers_is_named(address):
    with pytest.raises(ValueError, match=f"got '{address}'"), cluster.connect(address):
        pass


def test_a_cluster_needs_dask(monkeypatch):
    monkeypatch.setattr(cluster, "Client", None)
    with pytest.raises(ValueError, match=r"spaceexploreai\[cluster\]"), cluster.connect("local"):
        pass


def test_nobody_at_the_address():
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(OSError, match=r"tcp://127\.0\.0\.1:9"),
        cluster.connect("tcp://127.0.0.1:9"),
    ):
        pass
