"""Datasets: stored windows equal those cut in memory, pairs know the training range alone, and strangers can read."""

import os
import re
import subprocess
import sys
from itertools import chain, pairwise
from multiprocessing.reduction import ForkingPickler

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from conftest import make_market
from hypothesis import given, settings
from hypothesis import strategies as st

from spaceexploreai.data import stocks
from spaceexploreai.data.prices import read_prices, write_table
from spaceexploreai.data.stocks import (
    BlockBootstrap,
    SeriesStore,
    Stocks,
    open_windows,
    preference_pairs,
    stream_windows,
)
from spaceexploreai.data.windows import chronological_split, supervised_windows
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries, SpaceExploreFeatureExtractor
from spaceexploreai.scripts import build_dataset
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer

HORIZONS = (1, 2, 6)
CONTEXT, STRIDE, MARGIN = 16, 5, 0.4
FEATURES = ["gap", "body", "rsi_14", "atr_14", "relative_volume_5"]
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing is read from or left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def prices(tmp_path_factory):
    """Tickers delisted in the training range, listed late, halted for weeks, and too short to know a volatility."""
    table = make_market(tickers=5, days=400)
    days = table["date"].unique()
    position = table["date"].map({day: which for which, day in enumerate(days)})
    gone = (table["ticker"] == "T0") & (position >= 300)
    late = (table["ticker"] == "T1") & (position < 170)
    halted = (table["ticker"] == "T2") & position.between(100, 130)
    short = (table["ticker"] == "T3") & (position < 385)
    path = tmp_path_factory.mktemp("prices") / "prices.parquet"
    write_table(table[~(gone | late | halted | short)], path)
    return path


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    """An extractor that was not fitted yet."""
    folder = tmp_path_factory.mktemp("columns")
    extractor = SpaceExploreFeatureExtractor(feature_names=FEATURES, context_length=CONTEXT)
    extractor.to_json_file(folder / "preprocessor_config.json")
    return folder


def make(name: str, prices, columns, **options) -> Stocks:
    options = {"stride": STRIDE, "margin": MARGIN, **options}
    given = {key: value for key, value in options.items() if key in stocks.READS[name] or key == "cache_dir"}
    builder = Stocks(config_name=name, prices=str(prices), extractor=str(columns), horizons=HORIZONS, **given)
    builder.download_and_prepare()
    return builder


def cut_in_memory(prices, columns, target: str = "log_return", train_start: str | None = None):
    """Extractor and windows of each split as training without a dataset makes them."""
    table = read_prices(prices)
    extractor = SpaceExploreFeatureExtractor.from_pretrained(columns)
    split = chronological_split(table["date"], HORIZONS[-1], train_start=train_start)
    features = extractor.compute_features(table)
    extractor.fit(features[features["date"].between(*split.train)])
    series = extractor.encode(table, features)
    windows = {
        name: supervised_windows(series, list(HORIZONS), within, CONTEXT, STRIDE, name != "train", target)
        for name, within in split._asdict().items()
    }
    return extractor, split, windows


def assert_same_examples(found, expected) -> None:
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        for name in other:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


# --- windows ---


@pytest.mark.parametrize(
    ("target", "start"), [("log_return", None), ("volatility", None), ("log_return", "2005-06-01")]
)
def test_stored_windows_equal_those_cut_in_memory(prices, columns, target, start):
    extractor, split, expected = cut_in_memory(prices, columns, target, start)
    builder = make("sft", prices, columns, target=target, train_start=start)
    assert builder.extractor.to_dict() == extractor.to_dict()
    assert stocks.date_ranges(builder.metadata) == split
    for name, dataset in builder.as_dataset().items():
        windows = open_windows(builder.series, dataset)
        assert_same_examples(windows, expected[name])
        targets = expected[name].scaled_targets(list(HORIZONS))
        np.testing.assert_array_equal(windows.scaled_targets(list(HORIZONS)), targets)


def test_a_halt_and_short_contexts_are_among_the_windows(prices, columns):
    """So that the equality above is one of more than plain windows."""
    _, _, windows = cut_in_memory(prices, columns)
    assert any(not example["attention_mask"].all() for example in windows["train"])
    assert {len(example["scale"]) for example in windows["train"]} > {CONTEXT}
    assert {series.ticker for series in windows["train"].series} == {"T0", "T1", "T2", "T4"}


def test_no_label_reaches_into_another_split(prices, columns):
    builder = make("sft", prices, columns)
    ranges = builder.metadata["splits"]
    dates = [pd.Series(row["dates"]).astype(str) for row in builder.series]
    for name, dataset in builder.as_dataset().items():
        rows = dataset.to_pandas()
        labelled = rows[rows["supervised"] <= rows["last"]]
        for series, _, last, supervised in labelled.to_numpy():
            assert ranges[name][0] <= dates[series][supervised]
            assert dates[series][last + HORIZONS[-1]] <= ranges[name][1]


def test_windows_are_views_of_the_mapped_file(prices, columns):
    builder = make("sft", prices, columns)
    allocated = pa.total_allocated_bytes()
    windows = open_windows(builder.series, builder.as_dataset("train"))
    (batch,) = builder.series.data.to_batches()
    for name in ("values", "scale"):
        numbers = batch[name].values.flatten() if name == "values" else batch[name].values
        buffer = numbers.buffers()[1]
        for example in (windows[0], windows[50]):
            start = example["past_values" if name == "values" else name].ctypes.data
            assert buffer.address <= start < buffer.address + buffer.size
    # The index alone was read; Arrow counts no mapped memory.
    assert pa.total_allocated_bytes() - allocated < 10_000


def test_some_windows_in_any_order(prices, columns):
    builder = make("sft", prices, columns)
    train = builder.as_dataset("train")
    every = open_windows(builder.series, train)
    assert_same_examples(open_windows(builder.series, train.select([60, 7, 7])), [every[60], every[7], every[7]])
    for part in (builder.series.select([0, 2]), builder.series.select(range(1, 3)), builder.series.shuffle(seed=2)):
        with pytest.raises(ValueError, match="windows need the whole series dataset"):
            open_windows(part, train)


def test_statistics_of_a_large_market_are_those_of_some_tickers(prices, columns, tmp_path, monkeypatch):
    monkeypatch.setattr(stocks, "FIT_TICKERS", 2)
    builder = make("series", prices, columns, cache_dir=tmp_path)
    table = read_prices(prices)
    extractor = SpaceExploreFeatureExtractor.from_pretrained(columns)
    features = extractor.compute_features(table)
    seen = (features["date"] <= builder.metadata["splits"]["train"][1]) & features["ticker"].isin(["T0", "T4"])
    assert builder.extractor.to_dict() == extractor.fit(features[seen]).to_dict()


def test_a_pickled_dataset_holds_no_values(prices, columns):
    builder = make("sft", prices, columns)
    windows = open_windows(builder.series, builder.as_dataset("validation"))
    pickled = bytes(ForkingPickler.dumps(windows))
    assert len(pickled) < sum(one.values.nbytes for one in windows.series) / 3
    assert_same_examples(ForkingPickler.loads(pickled), windows)


def test_a_few_windows_need_no_more_than_their_series(prices, columns):
    """A store is as good over a part of the table, whose first row is not that of the file."""
    builder = make("series", prices, columns)
    whole, part = SeriesStore(builder.series.data), SeriesStore(builder.series.data.slice(1, 2))
    assert [one.ticker for one in part] == ["T1", "T2"]
    np.testing.assert_array_equal(part[1].values, whole[2].values)
    np.testing.assert_array_equal(part.steps(1, 3, 9).dates, whole[2].dates[3:9])


# --- the cache ---


def refuse(*args, **kwargs):
    raise AssertionError("computed again")


def test_nothing_is_computed_twice(prices, columns, monkeypatch):
    make("sft", prices, columns)
    monkeypatch.setattr(SpaceExploreFeatureExtractor, "compute_features", refuse)
    monkeypatch.setattr(SpaceExploreFeatureExtractor, "encode", refuse)
    assert len(make("sft", prices, columns).as_dataset("train"))
    assert len(make("sft", prices, columns, stride=STRIDE - 1).as_dataset("train"))
    with pytest.raises(datasets.exceptions.DatasetGenerationError):  # of the AssertionError
        make("sft", prices, columns, test_fraction=0.2)


def test_the_key_changes_with_prices_code_and_columns(prices, columns, tmp_path, monkeypatch):
    copy, other = tmp_path / "elsewhere" / prices.name, tmp_path / "other" / prices.name
    for path in (copy, other):
        path.parent.mkdir()
    copy.write_bytes(prices.read_bytes())
    other.write_bytes(prices.read_bytes()[:-1] + b"?")
    key = stocks.fingerprint(str(prices))
    assert stocks.fingerprint(str(copy)) == key
    code = tmp_path / "code.py"
    code.write_text("x = 1\n")
    sources = stocks.source_files()
    monkeypatch.setattr(stocks, "source_files", lambda: [*sources, code])
    keys = [key, stocks.fingerprint(str(prices)), stocks.fingerprint(str(prices), str(columns))]
    code.write_text("x = 2\n")
    keys += [stocks.fingerprint(str(prices)), stocks.fingerprint(str(other)), stocks.fingerprint(None)]
    assert len(set(keys)) == 6


def test_the_key_covers_the_code_that_makes_a_dataset():
    names = {path.name for path in stocks.source_files()}
    assert {"stocks.py", "windows.py", "prices.py"} <= names
    assert {f"{name}_spaceexplore.py" for name in ("feature_extraction", "indicators", "tokenization")} <= names


def test_the_key_of_a_folder_covers_every_file(tmp_path):
    for name in ("AAA", "BBB"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_yahoo_20200101.csv").write_text("Date\n")
    key = stocks.fingerprint(str(tmp_path))
    (tmp_path / "BBB" / "BBB_yahoo_20200101.csv").write_text("Date,Close\n")
    assert stocks.fingerprint(str(tmp_path)) != key


def test_processes_and_groups_change_nothing(prices, columns, tmp_path, monkeypatch):
    _, _, expected = cut_in_memory(prices, columns)
    monkeypatch.setattr(stocks, "TICKERS_PER_BATCH", 1)
    one = {name: make(name, prices, columns, cache_dir=tmp_path / "one") for name in ("sft", "dpo")}
    for name, builder in one.items():
        two = Stocks(config_name=name, cache_dir=tmp_path / "two", **builder.config_kwargs)
        two.download_and_prepare(num_proc=2)
        assert two.series.to_dict()["ticker"] == builder.series.to_dict()["ticker"] == ["T0", "T1", "T2", "T4"]
        for split in SPLITS:
            assert two.as_dataset(split).to_dict() == builder.as_dataset(split).to_dict()
            if name == "sft":
                assert_same_examples(open_windows(two.series, two.as_dataset(split)), expected[split])


def test_columns_of_the_panel_see_all_tickers(tmp_path, monkeypatch):
    """Whatever the groups, ranks are among all tickers of the market."""
    name = "return_rank_5"
    write_table(make_market(tickers=12, days=120), tmp_path / "prices.parquet")
    extractor = SpaceExploreFeatureExtractor(feature_names=["gap", name], context_length=CONTEXT)
    extractor.to_json_file(tmp_path / "preprocessor_config.json")
    monkeypatch.setattr(stocks, "TICKERS_PER_BATCH", 5)
    builder = make("indicators", tmp_path / "prices.parquet", tmp_path)
    found = builder.as_dataset("history").to_pandas()
    expected = extractor.compute_features(read_prices(tmp_path / "prices.parquet"))
    for number, column in enumerate(extractor.feature_names):
        np.testing.assert_array_equal(np.concatenate(found[str(number)]), expected[column])


# --- leakage ---


def test_later_prices_change_nothing_that_training_sees(prices, columns, tmp_path):
    table = read_prices(prices)
    builder = make("sft", prices, columns)
    later = table["date"] > pd.Timestamp(builder.metadata["splits"]["train"][1])
    changed = table.copy()
    changed.loc[later, ["open", "high", "low", "close"]] *= 1.7
    changed.loc[later, "volume"] *= 3
    write_table(changed, tmp_path / "changed.parquet")
    other = make("sft", tmp_path / "changed.parquet", columns)
    assert other.extractor.to_dict() == builder.extractor.to_dict()
    windows = [open_windows(one.series, one.as_dataset("train")) for one in (builder, other)]
    assert_same_examples(*windows)
    pairs = [make("dpo", path, columns).as_dataset() for path in (prices, tmp_path / "changed.parquet")]
    for split in SPLITS:
        assert pairs[0][split].to_dict() == pairs[1][split].to_dict()


# --- preference pairs ---


def test_chosen_is_the_realised_path_and_lies_in_the_training_range(prices, columns):
    builder = make("dpo", prices, columns)
    train_end = builder.metadata["splits"]["train"][1]
    table = read_prices(prices)
    tokenizer, length = SpaceExploreTokenizer(), HORIZONS[-1]
    origins = []
    for row in [row for split in SPLITS for row in builder.as_dataset(split)]:
        bars = table[table["ticker"] == row["ticker"]].reset_index(drop=True)
        day = bars.index[bars["date"] == pd.Timestamp(row["date"])][0]
        path = np.log(bars["close"]).diff()[day + 1 : day + 1 + length]
        assert day + 1 >= stocks.VOLATILITY_BARS + CONTEXT
        assert str(bars["date"][day + length].date()) <= train_end
        chosen, rejected = (tokenizer(row[name])["input_ids"] for name in ("chosen", "rejected"))
        assert chosen[-1] == rejected[-1] == tokenizer.eos_token_id
        decoded = tokenizer.decode_returns(np.array(chosen[:-1]), row["scale"])
        # Within the width of a bin: bins are at most 6.5 % of the return wide, or 0.015 volatilities.
        np.testing.assert_allclose(decoded, path, rtol=0.04, atol=0.01 * row["scale"])
        close = builder.series[row["series"]]["close"][row["first"] : row["last"] + 1]
        placeholders = [tokenizer.ts_token_id] * int(np.isfinite(close).sum())
        assert tokenizer(row["prompt"])["input_ids"] == [*placeholders, tokenizer.bos_token_id]
        assert row["last"] + 1 - row["first"] == CONTEXT
        origins.append((row["ticker"], row["series"], row["last"], row["date"]))
    assert len(origins) > 60
    for ticker, series, last, date in origins:
        assert builder.series[series]["ticker"] == ticker
        assert builder.series[series]["dates"][last] == date
    frame = pd.DataFrame(origins, columns=["ticker", "series", "last", "date"]).sort_values(["series", "last"])
    assert (frame.groupby("series")["last"].diff().dropna() >= length).all()


def test_splits_of_pairs_are_apart(prices, columns):
    """Targets of one split end before the origins of the next."""
    builder = make("dpo", prices, columns)
    series = builder.series
    bounds = []
    for split in SPLITS:
        rows = builder.as_dataset(split)
        ends = [series[row["series"]]["dates"][row["last"] + HORIZONS[-1]] for row in rows]
        bounds += [min(rows["date"]), max(ends)]
    assert bounds == sorted(bounds)


def test_margin_is_the_distance_of_the_ends(prices, columns):
    builder = make("dpo", prices, columns)
    tokenizer = SpaceExploreTokenizer()
    for row in builder.as_dataset("train"):
        ids = [np.array(tokenizer(row[name])["input_ids"][:-1]) for name in ("chosen", "rejected")]
        chosen, rejected = (tokenizer.decode_returns(path).sum() for path in ids)
        assert row["margin"] >= MARGIN
        assert abs(chosen - rejected) / HORIZONS[-1] ** 0.5 == pytest.approx(row["margin"], abs=0.35)
    loose = make("dpo", prices, columns, margin=0.0)
    kept = [row for row in loose.as_dataset("train") if row["margin"] >= MARGIN]
    assert kept == list(builder.as_dataset("train"))
    assert len(loose.as_dataset("train")) > len(kept)


def test_pairs_of_some_tickers_are_those_of_all(prices, columns):
    some = make("dpo", prices, columns, pair_tickers="T4,T0,NOT.HERE").as_dataset("train")
    every = make("dpo", prices, columns).as_dataset("train")
    assert set(some["ticker"]) == {"T0", "T4"}
    assert list(some) == [row for row in every if row["ticker"] in ("T0", "T4")]


def test_the_seed_changes_what_is_rejected_alone(prices, columns):
    pairs = [make("dpo", prices, columns, seed=seed, margin=0.0).as_dataset("train") for seed in (0, 1)]
    assert pairs[0]["chosen"][:] == pairs[1]["chosen"][:]
    assert sum(one != other for one, other in zip(*(each["rejected"] for each in pairs), strict=True)) > 50


def make_history(steps: int, masked: list[int] = (), seed: int = 0) -> EncodedSeries:
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.02, steps)))
    close[list(masked)] = np.nan
    dates = pd.bdate_range("2020-01-01", periods=steps).to_numpy("datetime64[ns]")
    values = rng.normal(size=(steps, 3)).astype(np.float32)
    return EncodedSeries("AAA", dates, close, values, rng.uniform(0.01, 0.03, steps).astype(np.float32))


@settings(max_examples=15, deadline=None)
@given(st.integers(20, 60), st.integers(1, 12), st.integers(0, 1000))
def test_resampled_paths_are_weeks_of_earlier_days_in_todays_volatility(steps, length, seed):
    history = make_history(steps, masked=[7, 8])
    path = BlockBootstrap(seed)([history], length)[0, 0]
    traded = [step for step in range(steps) if step not in (7, 8)]
    seen = [
        np.log(history.close[after] / history.close[before]) / history.scale[before]
        for before, after in pairwise(traded)
    ]
    for start in range(0, length, stocks.BLOCK_LENGTH):
        block = path[start : start + stocks.BLOCK_LENGTH] / history.scale[-1]
        runs = [seen[first : first + len(block)] for first in range(len(seen) - len(block) + 1)]
        assert any(np.allclose(block, run) for run in runs)


def test_resampling_does_not_depend_on_the_company():
    histories = [make_history(30), make_history(40)]
    together = BlockBootstrap(3)(histories, 7)
    np.testing.assert_array_equal(together[1], BlockBootstrap(3)(histories[1:], 7)[0])
    assert not np.array_equal(together[0], together[1])


def test_a_model_sees_the_past_once_and_close_samples_are_dropped():
    one, origins = make_history(60), np.array([20, 30, 40])
    realised = np.diff(np.log(one.close))[origins[:, None] + np.arange(6)]
    asked = []

    def sample_paths(histories, length):
        asked.append([len(history.close) for history in histories])
        assert all(len(column) == len(history.close) for history in histories for column in history[1:])
        unit = one.scale[origins] * np.sqrt(length) / length
        return (realised + (np.array([0.3, -0.7, 0.9]) * unit)[:, None])[:, None]

    pairs = list(preference_pairs(one, origins, realised, sample_paths, SpaceExploreTokenizer(), 16, 0.5))
    assert asked == [[21, 31, 41]]
    assert [pair["last"] for pair in pairs] == [30, 40]
    assert [pair["margin"] for pair in pairs] == pytest.approx([0.7, 0.9])


# --- the published folder ---


@pytest.fixture(scope="module")
def folder(prices, columns, tmp_path_factory):
    """Three tickers a file, two a row group, so that there is more than one of each."""
    target = tmp_path_factory.mktemp("published") / "Stocks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_dataset, "TICKERS_PER_FILE", 3)
        patch.setattr(stocks, "TICKERS_PER_BATCH", 2)
        build_dataset.main(command_line(prices, columns, target))
    return target


def command_line(prices, columns, target, *options: str) -> list[str]:
    horizons = ",".join(map(str, HORIZONS))
    data = ["--prices", str(prices), "--extractor", str(columns), "--output-dir", str(target)]
    return [*data, "--horizons", horizons, "--stride", str(STRIDE), "--margin", str(MARGIN), *options]


STRANGER = """
import sys
sys.modules["spaceexploreai"] = None  # any import of it raises ImportError
folder, output, code = sys.argv[1:]
names = {"folder": folder}
exec(code, names)
from datasets import load_dataset
assert load_dataset(folder).num_rows == load_dataset(folder, "sft").num_rows
pairs = load_dataset(folder, "dpo")
names["np"].savez(
    output,
    **{name: names[name] for name in ("past_values", "attention_mask", "scale", "labels")},
    rows=[load_dataset(folder, "sft")[name].num_rows for name in ("train", "validation", "test")],
    chosen=pairs["train"]["chosen"][:],
    fixed=names["series"].features["values"].feature.length,
)
"""


def test_a_stranger_reads_it_as_the_card_says(folder, prices, columns, tmp_path):
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[1]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(folder), str(tmp_path / "read.npz"), code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "read.npz")
    _, _, expected = cut_in_memory(prices, columns)
    assert_same_examples([{name: found[name] for name in expected["train"][0]}], [expected["train"][0]])
    assert found["rows"].tolist() == [len(expected[split]) for split in SPLITS]
    assert found["fixed"] == len(FEATURES)
    assert found["chosen"].tolist() == make("dpo", prices, columns).as_dataset("train")["chosen"][:]


def test_the_card_names_the_files_and_the_statistics_lie_beside(folder, prices, columns):
    card = (folder / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(card.split("---\n")[1])
    for config in metadata["configs"]:
        for files in config["data_files"]:
            assert len(list(folder.glob(files["path"]))) == 2
    assert [config["config_name"] for config in metadata["configs"] if config.get("default")] == ["sft"]
    rows = {split: len(windows) for split, windows in cut_in_memory(prices, columns)[2].items()}
    for split, count in rows.items():
        assert re.search(rf"\| sft \| {split} \| {count} \| 20\d\d-", card)
    for word in ("Survivorship", "beta", "worst", "permit no redistribution", "{"):
        assert (word in card) == (word != "{")
    extractor = SpaceExploreFeatureExtractor.from_pretrained(folder)
    assert extractor.to_dict() == cut_in_memory(prices, columns)[0].to_dict()
    assert not list(folder.rglob("*.py"))


def test_a_published_folder_opens_as_the_windows_it_was_made_from(folder, prices, columns):
    read = {name: datasets.load_dataset(str(folder), name) for name in ("series", "sft")}
    _, _, expected = cut_in_memory(prices, columns)
    for split in SPLITS:
        found = open_windows(read["series"]["history"], read["sft"][split])
        assert_same_examples(found, expected[split])


@pytest.mark.parametrize("split", SPLITS)
def test_a_stream_gives_the_same_windows(folder, prices, columns, split):
    _, _, expected = cut_in_memory(prices, columns)
    stream = stream_windows(str(folder), split)
    assert_same_examples(stream, expected[split])
    assert stream.num_shards == 2
    shards = [list(stream.shard(num_shards=2, index=index)) for index in range(2)]
    assert all(shards)
    assert_same_examples(chain(*shards), expected[split])


def test_a_stream_goes_on_where_it_was(folder):
    stream = stream_windows(str(folder), "train")
    every, seen = list(stream), []
    for example in stream:
        seen.append(example)
        if len(seen) == 40:
            break
    again = stream_windows(str(folder), "train")
    again.load_state_dict(stream.state_dict())
    assert_same_examples([*seen, *again], every)


def test_a_stream_needs_a_published_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="has 0 files of train windows for 0 files of series"):
        stream_windows(str(tmp_path), "train")
    with pytest.raises(ValueError, match="has 0 files of tset windows for 2 files of series"):
        stream_windows(str(folder), "tset")


def test_the_builder_streams_without_preparing(prices, columns):
    builder = make("sft", prices, columns)
    for split in SPLITS:
        assert list(builder.as_streaming_dataset(split)) == list(builder.as_dataset(split))


def test_one_configuration_alone(prices, columns, tmp_path):
    target = tmp_path / "new" / "out"
    build_dataset.main(command_line(prices, columns, target, "--config", "dpo"))
    files = {path.name for path in target.iterdir()}
    assert files == {"README.md", "dpo", "series", "preprocessor_config.json", "stocks.json"}
    pairs = datasets.load_dataset(str(target))["train"]
    assert pairs.column_names[:3] == ["prompt", "chosen", "rejected"]


def test_a_universe_from_a_file_and_the_sample(tmp_path, columns, capsys):
    (tmp_path / "mine.txt").write_text("IBM  # and\nTSLA\n")
    options = ["--universe", str(tmp_path / "mine.txt"), "--extractor", str(columns), "--tickers", "AAPL,IBM"]
    build_dataset.main([*options, "--output-dir", str(tmp_path / "out")])
    pairs = datasets.load_dataset(str(tmp_path / "out"), "dpo")
    assert set(pairs["train"]["ticker"]) == {"IBM"}
    assert "public domain" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"dpo  train  {pairs['train'].num_rows}" in capsys.readouterr().out


def test_a_dataset_built_anew_is_loaded_anew(prices, columns, tmp_path):
    """Although `load_dataset` caches a folder by its name."""
    lengths = []
    for folder, stride in (("one", 8), ("other", 4), ("one", 2)):
        target = tmp_path / folder / "stocks"
        build_dataset.main(command_line(prices, columns, target, "--config", "sft", "--stride", str(stride)))
        lengths.append(len(datasets.load_dataset(str(target), "sft", split="train")))
        assert len(stocks.open_stocks(str(target)).train) == lengths[-1]
    assert lengths == sorted(set(lengths))


def test_a_failure_leaves_the_former_folder(prices, columns, tmp_path, monkeypatch, capsys):
    target = tmp_path / "out"
    build_dataset.main(command_line(prices, columns, target, "--config", "sft"))
    before = {path.relative_to(target): path.read_bytes() for path in target.rglob("*") if path.is_file()}

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(build_dataset, "write_card", fail)
        with pytest.raises(SystemExit):
            build_dataset.main(command_line(prices, columns, target, "--config", "all"))
    assert capsys.readouterr().err.splitlines()[-1] == "error: disk full"
    assert {path.relative_to(target): path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [target]
    build_dataset.main(command_line(prices, columns, target, "--config", "dpo"))
    assert sorted(path.name for path in target.iterdir() if path.is_dir()) == ["dpo", "series"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prices", "nowhere.parquet"], "no such file or directory: nowhere.parquet"),
        (["--horizons", "1,x"], "horizons must be integers separated by commas, got '1,x'"),
        (["--horizons", "5,1"], "horizons must increase from at least 1, got [5, 1]"),
        (["--horizons", "1,60"], "the validation range has 40 of 400 trading days; a horizon of 60 days"),
        (["--stride", "17"], "a stride of 17 is longer than the context_length of 16"),
        (["--margin", "-1"], "margin must be at least 0, got -1.0"),
        (["--margin", "50", "--config", "dpo"], "the train split of dpo is empty"),
        (["--target", "price"], "target must be one of log_return"),
        (["--tickers", "T9"], "unknown ticker 'T9'"),
        (["--tickers", "T3"], "the validation range has 2 of 15 trading days"),
        (["--universe", "nasdaq1000"], "unknown universe 'nasdaq1000'"),
        (["--universe", "dow30"], "is among the 4 tickers of the prices"),
        (["--normalization", "x", "--extractor", "nowhere"], "nowhere"),
        (["--test-fraction", "1.5"], "test_fraction must be within (0, 1), got 1.5"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(prices, columns, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        build_dataset.main(command_line(prices, columns, tmp_path / "out", *options))
    error = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert len([line for line in error if line.startswith("error: ")]) == 1
    assert message in error[-1]
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_dataset_is_not_replaced(prices, columns, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(SystemExit):
            build_dataset.main(command_line(prices, columns, target))
        assert "exists and is no dataset of this command" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_columns_are_named(prices, tmp_path, capsys):
    extractor = SpaceExploreFeatureExtractor(feature_names=["gap", "no_such_column"])
    extractor.to_json_file(tmp_path / "preprocessor_config.json")
    with pytest.raises(SystemExit):
        build_dataset.main(command_line(prices, tmp_path, tmp_path / "out"))
    assert "error: unknown indicator 'no_such_column'" in capsys.readouterr().err.splitlines()[-1]
