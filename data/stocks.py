"""Datasets of stocks: every history stored once, windows and preference pairs as indices into it.

    builder = Stocks(config_name="sft", prices="prices.parquet")
    builder.download_and_prepare(num_proc=8)
    windows = open_windows(builder.series, builder.as_dataset("train"))

Four configurations follow from each other, each cached under a key of its options, the code and the raw data:
`indicators` (bars and their columns before normalisation, internal), `series` (one row per ticker, what the network
sees), `sft` (windows) and `dpo` (preference pairs). `scripts/build_dataset.py` publishes the last three as a folder.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import (
    ArrowBasedBuilder,
    BuilderConfig,
    Dataset,
    DatasetInfo,
    Features,
    IterableDataset,
    List,
    SplitGenerator,
    Value,
)
from datasets.builder import Key
from datasets.exceptions import DatasetGenerationError
from datasets.table import Table as ArrowTable
from torch.utils.data import Dataset as TorchDataset
from transformers.utils import FEATURE_EXTRACTOR_NAME, cached_file

from spaceexploreai.data.cleaning import CleaningReport, read_clean
from spaceexploreai.data.preferences import choose_pairs
from spaceexploreai.data.prices import SAMPLE_PATH, parse_tickers
from spaceexploreai.data.windows import (
    IGNORE_INDEX,
    TARGETS,
    DateRange,
    Split,
    WindowDataset,
    chronological_split,
    make_labels,
    supervised_windows,
)
from spaceexploreai.feature_extraction_spaceexplore import (
    PRICE_COLUMNS,
    VOLATILITY_BARS,
    EncodedSeries,
    SpaceExploreFeatureExtractor,
)
from spaceexploreai.indicators_spaceexplore import INDICATORS, select_features
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer

# With 20 years of 64 features, 20 MB: what a stream holds at a time.
TICKERS_PER_BATCH = 16
INDEX_ROWS_PER_BATCH = 100_000
# Statistics are those of as many tickers, evenly spaced: the features of a whole large market do not fit in memory.
FIT_TICKERS = 1000
# Not `train`: a history reaches over all splits, and `all` is reserved.
HISTORY = "history"
METADATA_NAME = "stocks.json"
BLOCK_LENGTH = 5  # days that a resampled path takes over in a row: a week
# K sampled paths of log-returns, (N, K, H), for each history, which ends with the forecast origin.
SamplePaths = Callable[[list[EncodedSeries], int], np.ndarray]


# --- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class StocksConfig(BuilderConfig):
    """What a dataset is made of. Options that a configuration does not read must not be given to it.

    Args:
        prices: price table or folder (see `read_prices`); the embedded sample by default.
        tickers: comma-separated; all by default.
        strict, fill: of `cleaning.clean`.
        extractor: folder or Hub repository with a `preprocessor_config.json` whose columns, context_length, calendar
            and, if it has any, statistics to keep, such as the checkpoint the dataset is for; by default a new
            extractor is fitted.
        feature_groups: comma-separated, see `select_features`, of a new extractor.
        normalization, context_length, calendar: of a new extractor.
        horizons: bars ahead; the longest is the purge between splits and the length of preference paths.
        validation_fraction, test_fraction: of the dates.
        train_start: first date (YYYY-MM-DD) that is trained on, and that statistics are taken of; what is before it is
            context. All by default.
        target: what the labels are, of `TARGETS`.
        stride: steps between windows (`sft`).
        pair_tickers: comma-separated tickers to make pairs of (`dpo`); all by default.
        margin: least distance of a pair's cumulative returns, in units of scale·sqrt(H) (`dpo`).
        seed: of the sampled paths (`dpo`).
    """

    prices: str | None = None
    tickers: str | None = None
    strict: bool = False
    fill: bool = False
    extractor: str | None = None
    feature_groups: str = "default"
    calendar: str = "XNYS"
    normalization: str = "robust"
    context_length: int = 64
    horizons: tuple[int, ...] = (1, 2, 5, 10)
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    train_start: str | None = None
    target: str = "log_return"
    stride: int = 16
    pair_tickers: str | None = None
    margin: float = 0.5
    seed: int = 0

    def make_extractor(self) -> SpaceExploreFeatureExtractor:
        if self.extractor is not None:
            return SpaceExploreFeatureExtractor.from_pretrained(self.extractor)
        return SpaceExploreFeatureExtractor(
            feature_names=select_features(self.feature_groups.split(",")),
            normalization=self.normalization,
            context_length=self.context_length,
            calendar=self.calendar,
        )

    def check(self) -> None:
        if list(self.horizons) != sorted(set(self.horizons)) or not self.horizons or self.horizons[0] < 1:
            raise ValueError(f"horizons must increase from at least 1, got {list(self.horizons)}")
        for name in ("context_length", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be within (0, 1), got {getattr(self, name)}")
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {self.target!r}")
        if not self.margin >= 0:
            raise ValueError(f"margin must be at least 0, got {self.margin}")


READS = {"indicators": ("prices", "tickers", "strict", "fill", "extractor", "feature_groups", "calendar")}
READS["series"] = (
    *READS["indicators"],
    *("normalization", "context_length", "horizons", "target"),
    *("validation_fraction", "test_fraction", "train_start"),
)
READS["sft"] = (*READS["series"], "stride")
READS["dpo"] = (*READS["series"], "pair_tickers", "margin", "seed")


# --- the cache key ---------------------------------------------------------------------------------------------------


def source_files() -> list[Path]:
    """Code that a dataset is made by."""
    data = Path(__file__).parent
    hub = (data.parent.glob(f"{name}*.py") for name in ("feature_extraction", "indicators", "tokenization"))
    return sorted([*data.glob("*.py"), *chain(*hub)])


def fingerprint(prices: str | None, extractor: str | None = None) -> str:
    """Changes with the code, with the library of indicators and with every byte of the raw data; not with their place.

    Raises:
        OSError: no such file or folder.
    """
    digest = hashlib.sha256(version("pandas-ta-classic").encode())
    raw = SAMPLE_PATH if prices is None else Path(prices)
    if not raw.exists():
        raise FileNotFoundError(f"no such file or directory: {raw}")
    roots = [*source_files(), *(sorted(raw.rglob("*.csv")) if raw.is_dir() else [raw])]
    roots += [] if extractor is None else [extractor_file(extractor)]
    for path in roots:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def extractor_file(extractor: str) -> Path:
    try:
        return Path(cached_file(extractor, FEATURE_EXTRACTOR_NAME))
    except OSError as error:
        raise OSError(f"cannot read the extractor of {extractor}: {error}") from error


# --- the builder -----------------------------------------------------------------------------------------------------


def rows_per_batch(name: str) -> int:
    """Rows of a record batch and of a parquet row group; too few make a file slow to open."""
    return TICKERS_PER_BATCH if name in ("indicators", "series") else INDEX_ROWS_PER_BATCH


class Stocks(ArrowBasedBuilder):
    """Builds one configuration and, before it, those that it is made from."""

    BUILDER_CONFIG_CLASS = StocksConfig
    BUILDER_CONFIGS = tuple(StocksConfig(name=name) for name in ("sft", "dpo", "series", "indicators"))
    DEFAULT_CONFIG_NAME = "sft"

    def __init__(self, *args, hash: str | None = None, **kwargs):
        if kwargs.get("horizons") is not None:
            kwargs["horizons"] = tuple(kwargs["horizons"])
        # What is given in vain must not make another key.
        kwargs = {name: value for name, value in kwargs.items() if value != getattr(StocksConfig, name, ...)}
        hash = hash or fingerprint(kwargs.get("prices"), kwargs.get("extractor"))
        super().__init__(*args, hash=hash, **kwargs)
        self.config.check()
        self.beside = {}  # JSON files of a stage
        self._writer_batch_size = rows_per_batch(self.config.name)

    def _info(self) -> DatasetInfo:
        num_features = len(self.config.make_extractor().feature_names)
        columns = STAGES[self.config.name].columns(num_features, len(self.config.horizons))
        return DatasetInfo(features=columns)

    def earlier(self, name: str) -> "Stocks":
        """The builder of a configuration that this one is made from."""
        options = {key: value for key, value in self.config_kwargs.items() if key in READS[name]}
        return Stocks(cache_dir=self._cache_dir_root, config_name=name, hash=self.hash, **options)

    @cached_property
    def series(self) -> Dataset:
        """The histories that windows and pairs are cut from, memory-mapped."""
        return self._prepared("series")

    def _prepared(self, name: str) -> Dataset:
        builder = self if self.config.name == name else self.earlier(name)
        builder.download_and_prepare()
        return builder.as_dataset(HISTORY)

    @property
    def metadata(self) -> dict:
        """Horizons, target, the dates of each split and the report of cleaning; known once the series are prepared."""
        return self._metadata("series")

    def _metadata(self, name: str) -> dict:
        return json.loads(Path(self._folder(name), METADATA_NAME).read_text(encoding="utf-8"))

    @property
    def extractor(self) -> SpaceExploreFeatureExtractor:
        """The extractor with the statistics that the series were normalised by."""
        return SpaceExploreFeatureExtractor.from_pretrained(self._folder("series"))

    def _folder(self, name: str) -> str:
        return (self if self.config.name == name else self.earlier(name)).cache_dir

    def download_and_prepare(self, *args, num_proc: int | None = None, **kwargs) -> None:
        """As the base class; the configurations before this one are made by as many processes."""
        for name in PRECEDING[self.config.name]:
            self.earlier(name).download_and_prepare(num_proc=num_proc)
        try:
            super().download_and_prepare(*args, num_proc=num_proc, **kwargs)
        except DatasetGenerationError as error:
            # A user's mistake is under the library's sentence that something went wrong.
            raise error.__cause__ if isinstance(error.__cause__, ValueError) else error from None

    def _download_and_prepare(self, *args, **kwargs) -> None:
        super()._download_and_prepare(*args, **kwargs)
        empty = [name for name, split in self.info.splits.items() if not split.num_examples]
        if empty:
            raise ValueError(f"the {empty[0]} split of {self.config.name} is empty: too few dates or tickers")
        for name, content in self.beside.items():
            Path(self._output_dir, name).write_text(json.dumps(content, indent=2) + "\n")

    def _split_generators(self, dl_manager) -> list[SplitGenerator]:
        splits = STAGES[self.config.name].splits(self)
        return [SplitGenerator(name=name, gen_kwargs=arguments) for name, arguments in splits.items()]

    def _generate_tables(self, groups: list, **shared) -> Iterator[tuple[Key, pa.Table]]:
        for shard, group in enumerate(groups):
            columns = STAGES[self.config.name].rows(self.config, group, **shared)
            table = pa.table(columns, schema=self.info.features.arrow_schema)
            if len(table):
                yield Key(shard, 0), table


def describe(config: StocksConfig, split: Split) -> dict:
    dates = {name: [day.date().isoformat() for day in within] for name, within in split._asdict().items()}
    return {"horizons": list(config.horizons), "target": config.target, "splits": dates}


def date_ranges(metadata: dict) -> Split:
    return Split(*(DateRange(*map(pd.Timestamp, metadata["splits"][name])) for name in Split._fields))


def groups_of(items: Sequence) -> list:
    return [items[start : start + TICKERS_PER_BATCH] for start in range(0, len(items), TICKERS_PER_BATCH)]


def nested(arrays: list[np.ndarray]) -> pa.ListArray:
    """One list per array, of numbers or, for (T, F), of rows of fixed length."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    flat = np.concatenate(arrays)
    values = pa.array(flat.reshape(-1))
    if flat.ndim == 2:
        values = pa.FixedSizeListArray.from_arrays(values, flat.shape[1])
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def days_of(dates: np.ndarray) -> np.ndarray:
    return dates.astype("datetime64[D]")


# --- indicators: bars and their columns ------------------------------------------------------------------------------


def indicator_columns(num_features: int, num_horizons: int) -> Features:
    bars = {name: List(Value("float64")) for name in (*PRICE_COLUMNS, "volume")}
    # Column by column, as statistics are taken: one of all tickers fits in memory, the table may not.
    indicators = {str(number): List(Value("float32")) for number in range(num_features)}
    return Features({"ticker": Value("string"), "dates": List(Value("date32")), **bars, **indicators})


def indicator_splits(builder: Stocks) -> dict[str, dict]:
    config = builder.config
    calendar = config.make_extractor().calendar
    prices, report = read_clean(config.prices, config.tickers, calendar, config.strict, config.fill)
    builder.beside[METADATA_NAME] = {"cleaning": report.to_dict()}
    # Columns of the panel need all tickers at once; then neither memory nor processes can be saved.
    names = builder.config.make_extractor().feature_names
    together = any(INDICATORS[name].panel for name in names if name in INDICATORS)
    starts = [0] if together else first_rows(prices)[::TICKERS_PER_BATCH]
    return {HISTORY: {"groups": [prices[start:stop] for start, stop in pairwise([*starts, len(prices)])]}}


def first_rows(prices: pd.DataFrame) -> np.ndarray:
    """Where each ticker begins."""
    return np.flatnonzero(prices["ticker"] != prices["ticker"].shift())


def indicator_rows(config: StocksConfig, bars: pd.DataFrame) -> dict:
    extractor = config.make_extractor()
    features, starts = extractor.compute_features(bars), first_rows(bars)[1:]
    columns = {"dates": days_of(bars["date"].to_numpy())}
    columns |= {name: bars[name].to_numpy() for name in (*PRICE_COLUMNS, "volume")}
    columns |= {str(number): features[name].to_numpy() for number, name in enumerate(extractor.feature_names)}
    lists = {name: nested(np.split(column, starts)) for name, column in columns.items()}
    return {"ticker": bars["ticker"].unique(), **lists}


def to_frames(indicators: Dataset, rows: Sequence[int], names: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Price table and features of some tickers, as `compute_features` takes and gives them."""
    table = pa.concat_tables([indicators.data.fast_slice(row, 1) for row in rows]).combine_chunks()
    lengths = pc.list_value_length(table["dates"]).to_numpy()
    prices = pd.DataFrame({"ticker": np.repeat(np.array(table["ticker"].to_pylist(), dtype=object), lengths)})
    prices["date"] = to_dates(flat(table["dates"]))
    for name in (*PRICE_COLUMNS, "volume"):
        prices[name] = flat(table[name])
    return prices, pd.DataFrame({name: flat(table[str(number)]) for number, name in enumerate(names)})


def flat(column: pa.ChunkedArray | pa.ListArray) -> np.ndarray:
    """All values of a column of lists, one after the other: (N,) or, for lists of rows, (N, F); dates as days since
    1970. Of a `ListArray` a view."""
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = lists.flatten()
    if pa.types.is_fixed_size_list(values.type):
        return values.flatten().to_numpy(zero_copy_only=True).reshape(-1, values.type.list_size)
    return (values.view(pa.int32()) if pa.types.is_date(values.type) else values).to_numpy(zero_copy_only=True)


def to_dates(days: np.ndarray) -> np.ndarray:
    return days.astype("datetime64[D]").astype("datetime64[ns]")


# --- series: what the network sees -----------------------------------------------------------------------------------


def series_columns(num_features: int, num_horizons: int) -> Features:
    values, labels = (List(List(Value("float32"), length=length)) for length in (num_features, num_horizons))
    return Features(
        {
            "series": Value("int32"),
            "ticker": Value("string"),
            "dates": List(Value("date32")),
            "close": List(Value("float64")),
            "scale": List(Value("float32")),
            "values": values,
            "labels": labels,
        }
    )


def series_splits(builder: Stocks) -> dict[str, dict]:
    config, indicators = builder.config, builder._prepared("indicators")
    split = split_of(config, calendar_of(indicators))
    extractor = fitted_extractor(config, indicators, split.train)
    # Not save_pretrained, which adds code.
    builder.beside[FEATURE_EXTRACTOR_NAME] = extractor.to_dict()
    builder.beside[METADATA_NAME] = {**describe(config, split), **builder._metadata("indicators")}
    long = pc.list_value_length(indicators.data["dates"]).to_numpy() > VOLATILITY_BARS
    rows = list(enumerate(np.flatnonzero(long).tolist()))
    if not rows:
        raise ValueError(f"no ticker has more than {VOLATILITY_BARS} bars, which its volatility needs to be known")
    return {HISTORY: {"groups": groups_of(rows), "indicators": indicators, "extractor": extractor}}


def split_of(config: StocksConfig, calendar: pd.Series) -> Split:
    return chronological_split(
        calendar, config.horizons[-1], config.validation_fraction, config.test_fraction, config.train_start
    )


def calendar_of(histories: Dataset) -> pd.Series:
    """All dates of all tickers, each once."""
    days = [np.unique(flat(chunk)) for chunk in histories.data["dates"].chunks]
    return pd.Series(to_dates(np.unique(np.concatenate(days))))


def fitted_extractor(config: StocksConfig, indicators: Dataset, train: DateRange) -> SpaceExploreFeatureExtractor:
    extractor = config.make_extractor()
    if extractor.center is not None:
        return extractor
    rows = np.unique(np.linspace(0, len(indicators) - 1, FIT_TICKERS).round().astype(int))
    dates = to_dates(flat(indicators.data["dates"].take(rows)))
    seen = (dates >= train.start.to_datetime64()) & (dates <= train.end.to_datetime64())
    numbers = range(len(extractor.feature_names))
    return extractor.fit_columns((flat(indicators.data[str(one)].take(rows))[seen] for one in numbers), train.end)


def series_rows(
    config: StocksConfig, group: list[tuple[int, int]], indicators: Dataset, extractor: SpaceExploreFeatureExtractor
) -> dict:
    prices, features = to_frames(indicators, [row for _, row in group], extractor.feature_names)
    series = extractor.encode(prices, features)
    # Of all steps, whatever the split: windows say from which step on they have labels.
    ever = DateRange(prices["date"].min(), prices["date"].max())
    return {
        "series": [index for index, _ in group],
        "ticker": [one.ticker for one in series],
        "dates": nested([days_of(one.dates) for one in series]),
        "close": nested([one.close for one in series]),
        "scale": nested([one.scale for one in series]),
        "values": nested([one.values for one in series]),
        "labels": nested([make_labels(one, list(config.horizons), ever, config.target) for one in series]),
    }


VIEWS = ("dates", "close", "scale", "values", "labels")


class SeriesStore(Sequence):
    """The histories of a `series` dataset as views of its memory-mapped file.

    A process that gets it pickled maps the file again: workers share one copy.

    Args:
        table: `dataset.data`; indices are its rows.
    """

    def __init__(self, table: pa.Table | ArrowTable):
        self.table = table
        # Of the chunks of the file, since a view cannot reach over two of them.
        self._chunks, self._tickers, places = [], [], []
        for which, batch in enumerate(table.to_batches()):
            self._chunks.append({name: flat(batch[name]) for name in VIEWS})
            self._tickers += batch["ticker"].to_pylist()
            ends = batch["dates"].value_lengths().to_numpy().cumsum()
            places.append(np.stack([np.full(len(batch), which), np.append(0, ends[:-1]), ends], axis=1))
        self._places = np.concatenate(places).tolist() if places else []

    def __reduce__(self):
        return SeriesStore, (self.table,)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> EncodedSeries:
        return self.steps(index, 0, None)

    @property
    def tickers(self) -> list[str]:
        return self._tickers

    def steps(self, index: int, first: int, stop: int | None) -> EncodedSeries:
        """Steps `first` to `stop` of a history. All arrays but `dates` are views of the file, and read-only."""
        return self.labelled_steps(index, first, stop)[0]

    def labelled_steps(self, index: int, first: int, stop: int | None) -> tuple[EncodedSeries, np.ndarray]:
        """Steps of a history and their (T, H) labels."""
        chunk, start, end = self._places[index]
        end = end if stop is None else start + stop
        days, close, scale, values, labels = (self._chunks[chunk][name][start + first : end] for name in VIEWS)
        return EncodedSeries(self._tickers[index], to_dates(days), close, values, scale), labels


# --- sft: windows ----------------------------------------------------------------------------------------------------


WINDOW = ("series", "first", "last", "supervised")


def window_columns(num_features: int, num_horizons: int) -> Features:
    return Features({name: Value("int32") for name in WINDOW})


def window_splits(builder: Stocks) -> dict[str, dict]:
    series, split = builder.series, date_ranges(builder.metadata)
    context_length = builder.extractor.context_length
    if builder.config.stride > context_length:
        raise ValueError(f"a stride of {builder.config.stride} is longer than the context_length of {context_length}")
    shared = {"series": series, "context_length": context_length}
    groups = groups_of(range(len(series)))
    return {
        name: {"groups": groups, "within": within, "score_once": name != "train", **shared}
        for name, within in split._asdict().items()
    }


def window_rows(
    config: StocksConfig, group: range, series: Dataset, within: DateRange, context_length: int, score_once: bool
) -> dict:
    """Windows as steps of a series: `first` to `last`, of which those from `supervised` on have labels."""
    rows = []
    for index, one in zip(group, SeriesStore(series.data.slice(group[0], len(group))), strict=True):
        if not is_supervised(one, config.horizons, within, config.target):
            continue
        windows = supervised_windows(
            [one], list(config.horizons), within, context_length, config.stride, score_once, config.target
        )
        last = windows.ends[:, 1]
        known = np.flatnonzero((windows.labels[0] != IGNORE_INDEX).any(axis=1))
        first = np.maximum(last + 1 - context_length, 0)
        counted = np.maximum(last + 1 - windows.supervised_steps, first)
        # In a halt, none of the steps that count may have a label.
        supervised = np.minimum(np.append(known, len(one.close))[np.searchsorted(known, counted)], last + 1)
        rows.append(np.stack([np.full_like(last, index), first, last, supervised]))
    columns = np.concatenate([np.zeros((len(WINDOW), 0)), *rows], axis=1).astype(np.int32)
    return dict(zip(WINDOW, columns, strict=True))


def is_supervised(
    one: EncodedSeries, horizons: Sequence[int], within: DateRange, target: str = StocksConfig.target
) -> bool:
    return bool((make_labels(one, list(horizons), within, target) != IGNORE_INDEX).any())


class StoredWindows(TorchDataset):
    """The windows of an `sft` split: what `supervised_windows` gives, read from the file.

    Args:
        series: histories.
        rows: (N, 4) integers `series, first, last, supervised`.
    """

    def __init__(self, series: SeriesStore, rows: np.ndarray):
        self.series = series
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which, first, last, supervised = self.rows[index].tolist()
        return self._cut(which, first, last + 1, supervised)[0]

    def scaled_targets(self, horizons: list[int]) -> np.ndarray:
        """As of `WindowDataset`, of all steps between a series' first and last label in this split."""
        targets = []
        for which in np.unique(self.rows[:, 0]).tolist():
            rows = self.rows[self.rows[:, 0] == which]
            first, stop = int(rows[:, 3].min()), int(rows[:, 2].max()) + 1
            targets.append(self._cut(which, first, stop, first).scaled_targets(horizons))
        return np.concatenate(targets)

    def _cut(self, which: int, first: int, stop: int, supervised: int) -> WindowDataset:
        """One window alone, with labels from the step `supervised` on: a split has them without a gap."""
        history, labels = self.series.labelled_steps(which, first, stop)
        if supervised > first:
            labels = labels.copy()
            labels[: supervised - first] = IGNORE_INDEX
        return WindowDataset([history], [(0, stop - 1 - first)], stop - first, [labels])


class PathWindows(TorchDataset):
    """Windows of an `sft` split as a causal language model reads them: a context, and the days that followed.

    Where `StoredWindows` has a window with labels, this has its last `path_length` labelled days as a path, behind a
    whole context of its own; an example is `past_values` (T, F), `attention_mask` (T,), `scale` (T,), `next_returns`
    (T,) as labels of the context's steps, and `path` (L,), the daily log-returns from its last step on, which end
    before the first that is not known.

    Args:
        windows: whose labels hold the log-return of one day.
        horizons: of the labels.
        context_length: steps T.
        path_length: days L at most.

    Raises:
        ValueError: 1 is not among the horizons.
    """

    def __init__(self, windows: StoredWindows, horizons: list[int], context_length: int, path_length: int):
        if 1 not in horizons:
            raise ValueError(f"a path of daily returns needs the horizon 1, got {list(horizons)}")
        self.windows = windows
        self.series = windows.series
        self.one_day = list(horizons).index(1)
        self.context_length = context_length
        self.path_length = path_length
        every = (self._cut(*row) for row in windows.rows.tolist())
        self.rows = windows.rows[[len(one["path"]) > 0 for one in every]]  # without those that begin in a halt

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._cut(*self.rows[index].tolist())

    def _cut(self, which: int, _: int, last: int, supervised: int) -> dict[str, np.ndarray]:
        origin = last + 1 - min(self.path_length, last + 1 - supervised)
        first = max(origin + 1 - self.context_length, 0)
        history, labels = self.series.labelled_steps(which, first, last + 1)
        returns, steps = labels[:, self.one_day], origin + 1 - first
        path = returns[steps - 1 :]
        known = np.cumprod(path != IGNORE_INDEX).sum()
        next_returns = np.where(np.arange(first, origin + 1) >= supervised, returns[:steps], IGNORE_INDEX)
        return {
            "past_values": history.values[:steps],
            "attention_mask": history.traded[:steps],
            "scale": history.scale[:steps],
            "next_returns": next_returns,
            "path": path[:known],
        }


class ReturnsWindows(TorchDataset):
    """Windows of an `sft` split as the time-to-text extractor reads them.

    An example is `past_values` (T, F), `attention_mask` (T,) and `returns` (T,), the log-return to each step from the
    one before it, in units of the volatility known there, NaN where one of the two is masked. Every step is of the
    split itself, since every step is scored: no window reaches back into the split before.

    Args:
        windows: whose labels say where the split begins.
    """

    def __init__(self, windows: StoredWindows):
        self.windows = windows
        self.series = windows.series
        self.rows = windows.rows.copy()
        begins = np.full(len(self.series), np.iinfo(self.rows.dtype).max)
        np.minimum.at(begins, self.rows[:, 0], self.rows[:, 3])
        self.rows[:, 1] = np.maximum(self.rows[:, 1], begins[self.rows[:, 0]])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which, first, last, _ = self.rows[index].tolist()
        return self.cut(which, first, last + 1)

    def cut(self, which: int, first: int, stop: int) -> dict[str, np.ndarray]:
        """Steps `first` to `stop` of a history."""
        known = self.series.steps(which, max(first - 1, 0), stop)  # with the step that the first return is from
        returns = np.append(np.nan, np.diff(np.log(known.close)) / known.scale[:-1])
        own = slice(len(returns) - (stop - first), None)
        return {"past_values": known.values[own], "attention_mask": known.traded[own], "returns": returns[own]}


def open_windows(series: Dataset, windows: Dataset) -> StoredWindows:
    """Joins the `series` dataset and a split of the `sft` dataset, as built or as `load_dataset` reads them.

    Args:
        series: whole; windows name its rows.
        windows: all or some, in any order.

    Raises:
        ValueError: a part of the series.
    """
    if not np.array_equal(np.asarray(series["series"][:]), np.arange(len(series.data))):
        raise ValueError(f"windows need the whole series dataset in its own order, got {len(series)} rows of it")
    return StoredWindows(SeriesStore(series.data), rows_of(windows.with_format("arrow")[:]))


def rows_of(windows: pa.Table) -> np.ndarray:
    return np.stack([windows[name].to_numpy() for name in WINDOW], axis=1)


class StockData(NamedTuple):
    """A dataset to train from."""

    extractor: SpaceExploreFeatureExtractor
    horizons: list[int]
    target: str
    split: Split
    cleaning: CleaningReport
    fingerprint: str
    train: StoredWindows
    validation: StoredWindows


def build_stocks(**options) -> StockData:
    """Builds, or finds in the cache, what `StocksConfig` describes."""
    builder = Stocks(config_name="sft", **options)
    builder.download_and_prepare()
    metadata = {**builder.metadata, "fingerprint": builder.hash}
    return _stock_data(builder.extractor, metadata, builder.series, builder.as_dataset())


def open_extractor(folder: str, name: str = "sft") -> SpaceExploreFeatureExtractor:
    """The extractor of a folder that `scripts/build_dataset.py` wrote.

    Raises:
        ValueError: it is no such folder, or has no windows or pairs.
    """
    if not Path(folder, METADATA_NAME).is_file() or not Path(folder, name).is_dir():
        content = {"sft": "windows", "dpo": "preference pairs"}[name]
        raise ValueError(f"{folder} is no dataset of scripts/build_dataset.py with {content} (--config {name})")
    return SpaceExploreFeatureExtractor.from_pretrained(folder)


def open_stocks(folder: str) -> StockData:
    """Opens a folder that `scripts/build_dataset.py` wrote; raises as `open_extractor`."""
    extractor = open_extractor(folder)
    metadata = json.loads(Path(folder, METADATA_NAME).read_text(encoding="utf-8"))
    windows = {name: _read_shards(folder, "sft", name) for name in ("train", "validation")}
    return _stock_data(extractor, metadata, _read_shards(folder, "series", HISTORY), windows)


def _read_shards(folder: str, name: str, split: str) -> Dataset:
    return Dataset.from_parquet([str(path) for path in sorted(Path(folder, name).glob(f"{split}-*"))], split=split)


def _stock_data(
    extractor: SpaceExploreFeatureExtractor, metadata: dict, series: Dataset, windows: dict[str, Dataset]
) -> StockData:
    return StockData(
        extractor,
        metadata["horizons"],
        metadata["target"],
        date_ranges(metadata),
        CleaningReport.from_dict(metadata["cleaning"]),
        metadata["fingerprint"],
        *(open_windows(series, windows[name]) for name in ("train", "validation")),
    )


class PairData(NamedTuple):
    """Preference pairs to align a model with, and the histories that their contexts are cut from."""

    extractor: SpaceExploreFeatureExtractor
    horizons: list[int]
    split: Split
    cleaning: CleaningReport
    fingerprint: str
    series: SeriesStore
    pairs: dict[str, Dataset]


def build_pairs(**options) -> PairData:
    """As `build_stocks`, the configuration `dpo`."""
    builder = Stocks(config_name="dpo", **{key: value for key, value in options.items() if key in READS["dpo"]})
    builder.download_and_prepare()
    metadata = {**builder.metadata, "fingerprint": builder.hash}
    return _pair_data(builder.extractor, metadata, builder.series, builder.as_dataset())


def open_pairs(folder: str) -> PairData:
    """Opens a folder that `scripts/build_preferences.py` or `scripts/build_dataset.py` wrote; raises as
    `open_extractor`."""
    extractor = open_extractor(folder, "dpo")
    metadata = json.loads(Path(folder, METADATA_NAME).read_text(encoding="utf-8"))
    pairs = {name: _read_shards(folder, "dpo", name) for name in Split._fields}
    return _pair_data(extractor, metadata, _read_shards(folder, "series", HISTORY), pairs)


def _pair_data(
    extractor: SpaceExploreFeatureExtractor, metadata: dict, series: Dataset, pairs: dict[str, Dataset]
) -> PairData:
    return PairData(
        extractor,
        metadata["horizons"],
        date_ranges(metadata),
        CleaningReport.from_dict(metadata["cleaning"]),
        metadata["fingerprint"],
        SeriesStore(series.data),
        dict(pairs),
    )


# --- streaming -------------------------------------------------------------------------------------------------------


def stream_windows(folder: str, split: str) -> IterableDataset:
    """The windows of a published folder, in order, holding one row group of series at a time.

    Shards are files: workers and nodes share them out. `shuffle(buffer_size=...)` mixes windows of neighbouring
    tickers alone and is not resumed exactly; where the disk allows, `open_windows` is the better choice.

    Args:
        folder: a folder that `scripts/build_dataset.py` wrote, or an fsspec address of one.
        split: "train", "validation" or "test".
    """
    fs, path = fsspec.url_to_fs(folder)
    series = sorted(fs.glob(f"{path}/series/*.parquet"))
    windows = sorted(fs.glob(f"{path}/sft/{split}-*.parquet"))
    if not windows or len(series) != len(windows):
        raise ValueError(f"{folder} has {len(windows)} files of {split} windows for {len(series)} files of series")
    files = {
        "series": [fs.unstrip_protocol(name) for name in series],
        "windows": [fs.unstrip_protocol(name) for name in windows],
    }
    return IterableDataset.from_generator(stream_files, gen_kwargs=files)


def stream_files(series: list[str], windows: list[str]) -> Iterator[dict[str, np.ndarray]]:
    for series_file, windows_file in zip(series, windows, strict=True):
        with fsspec.open(windows_file) as file:
            rows = rows_of(pq.read_table(file))
        with fsspec.open(series_file) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=TICKERS_PER_BATCH):
                yield from windows_of_batch(batch, rows)


def windows_of_batch(batch: pa.RecordBatch, rows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    indices = batch["series"].to_numpy()
    store = SeriesStore(pa.Table.from_batches([batch]))
    mine = rows[np.isin(rows[:, 0], indices)]
    local = np.column_stack([np.searchsorted(indices, mine[:, 0]), mine[:, 1:]])
    windows = StoredWindows(store, local)
    yield from (windows[index] for index in range(len(windows)))


# --- dpo: preference pairs -------------------------------------------------------------------------------------------


def pair_columns(num_features: int, num_horizons: int) -> Features:
    texts = {name: Value("string") for name in ("prompt", "chosen", "rejected", "ticker")}
    steps = {name: Value("int32") for name in ("series", "first", "last")}
    return Features({**texts, "date": Value("date32"), **steps, "scale": Value("float32"), "margin": Value("float32")})


def pair_splits(builder: Stocks) -> dict[str, dict]:
    """The training range of `sft`, cut again: no pair knows a date that the reference model was not trained on."""
    series, config, context_length = builder.series, builder.config, builder.extractor.context_length
    if config.horizons[-1] > context_length:
        raise ValueError(f"horizon {config.horizons[-1]} is longer than the context_length of {context_length}")
    wanted = None if config.pair_tickers is None else set(parse_tickers(config.pair_tickers))
    members = [index for index, ticker in enumerate(series["ticker"]) if wanted is None or ticker in wanted]
    if not members:
        raise ValueError(f"none of the {len(wanted)} pair_tickers is among the {len(series)} tickers of the prices")
    train = date_ranges(builder.metadata).train
    calendar = calendar_of(series)
    split = chronological_split(
        calendar[calendar.between(*train)], config.horizons[-1], config.validation_fraction, config.test_fraction
    )
    shared = {"groups": groups_of(members), "series": series, "context_length": context_length}
    return {name: {"within": within, **shared} for name, within in split._asdict().items()}


def pair_rows(
    config: StocksConfig,
    group: list[int],
    series: Dataset,
    within: DateRange,
    context_length: int,
    sample_paths: SamplePaths | None = None,
    chosen: str = "realised",
) -> dict:
    store = SeriesStore(series.data.slice(group[0], group[-1] + 1 - group[0]))
    sample_paths, tokenizer, rows = sample_paths or BlockBootstrap(config.seed), SpaceExploreTokenizer(), []
    for index in group:
        one = store[index - group[0]]
        paths = non_overlapping_paths(one, config.horizons[-1], within, context_length)
        pairs = preference_pairs(one, *paths, sample_paths, tokenizer, context_length, config.margin, chosen)
        rows += [{"series": index, **pair} for pair in pairs]
    return {name: [row[name] for row in rows] for name in pair_columns(0, 0)}


def sampled_pairs(builder: Stocks, sample_paths: SamplePaths, chosen: str = "realised") -> dict[str, Dataset]:
    """The splits of the `dpo` configuration with paths of a model (see `choose_pairs`). They are not cached."""
    datasets = {}
    for split, arguments in pair_splits(builder).items():
        groups = arguments.pop("groups")
        parts = [
            pair_rows(builder.config, group, **arguments, sample_paths=sample_paths, chosen=chosen) for group in groups
        ]
        tables = [pa.table(rows, schema=builder.info.features.arrow_schema) for rows in parts]
        datasets[split] = Dataset(pa.concat_tables(tables))
        if not len(datasets[split]):
            raise ValueError(f"the {split} split of dpo is empty: too few dates or tickers")
    return datasets


def non_overlapping_paths(
    one: EncodedSeries, length: int, within: DateRange, context_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Forecast origins with a whole context of bars behind them, (N,), and the (N, length) log-returns that followed;
    path and origin lie within the range, no day of a path is masked and none is in two paths."""
    days = list(range(1, length + 1))
    if not is_supervised(one, days, within):
        return np.zeros(0, dtype=np.int64), np.zeros((0, length), dtype=np.float32)
    windows = supervised_windows([one], days, within, context_length, stride=length)
    labels, origins = windows.labels[0], windows.ends[:, 1]
    whole = (labels[origins] != IGNORE_INDEX).all(axis=1) & (one.traded.cumsum()[origins] >= context_length)
    return origins[whole], np.diff(labels[origins[whole]], axis=1, prepend=np.float32(0))


def preference_pairs(
    one: EncodedSeries,
    origins: np.ndarray,
    realised: np.ndarray,
    sample_paths: SamplePaths,
    tokenizer: SpaceExploreTokenizer,
    context_length: int,
    margin: float,
    chosen: str = "realised",
) -> Iterator[dict]:
    """A pair of each origin (see `choose_pairs`) whose cumulative returns are at least `margin` apart.

    A pair that is too close is dropped, not sampled again: that would choose among samples.

    Args:
        one: a history.
        origins: (N,) its steps to forecast from.
        realised: (N, H) log-returns after each.
        sample_paths: of a model (`train.sampling.ModelPaths`), or `BlockBootstrap`; it gets each history up to and
            including its origin.
        chosen: the realised path or the best sample.
    """
    if not len(origins):
        return
    histories = [EncodedSeries(one.ticker, *(column[: end + 1] for column in one[1:])) for end in origins]
    sampled = np.asarray(sample_paths(histories, realised.shape[1]))
    pairs = choose_pairs(sampled, realised, one.scale[origins], chosen)
    for end, *pair, distance in zip(origins.tolist(), *pairs, strict=True):
        preferred, rejected = (tokenizer.to_text(path, one.scale[end]) for path in pair)
        if distance >= margin and preferred != rejected:
            yield {
                "prompt": tokenizer.prompt(int(one.traded[end + 1 - context_length : end + 1].sum())),
                "chosen": preferred,
                "rejected": rejected,
                "ticker": one.ticker,
                "date": one.dates[end].astype("datetime64[D]").astype(object),
                "first": end + 1 - context_length,
                "last": end,
                "scale": one.scale[end],
                "margin": distance,
            }


class BlockBootstrap(NamedTuple):
    """A path without a model: what the same ticker did on earlier days, weeks drawn at random, in today's volatility.

    Log-returns over the volatility known the day before are resampled in blocks of `BLOCK_LENGTH` days and multiplied
    by the volatility at the origin. The marginal distribution and the order within a week are real, what the
    context says about the coming days is lost: a pair differs in just that, not in one path being smooth or wild.
    """

    seed: int

    def __call__(self, histories: list[EncodedSeries], length: int) -> np.ndarray:
        return np.stack([self._path(one, length) for one in histories])[:, None]

    def _path(self, one: EncodedSeries, length: int) -> np.ndarray:
        # By ticker and origin, so that groups and processes change nothing.
        generator = np.random.default_rng([self.seed, *one.ticker.encode(), len(one.close)])
        close, scale = one.close[one.traded], one.scale[one.traded]
        residuals = np.diff(np.log(close)) / scale[:-1]
        block = min(BLOCK_LENGTH, len(residuals))
        starts = generator.integers(0, len(residuals) - block + 1, size=-(-length // block))
        return residuals[(starts[:, None] + np.arange(block)).reshape(-1)[:length]] * one.scale[-1]


class Stage(NamedTuple):
    """A configuration: its columns, the arguments of each split, the rows of one group of tickers."""

    columns: Callable[[int, int], Features]
    splits: Callable[[Stocks], dict[str, dict]]
    rows: Callable[..., dict]


STAGES = {
    "indicators": Stage(indicator_columns, indicator_splits, indicator_rows),
    "series": Stage(series_columns, series_splits, series_rows),
    "sft": Stage(window_columns, window_splits, window_rows),
    "dpo": Stage(pair_columns, pair_splits, pair_rows),
}
PRECEDING = {
    "indicators": (),
    "series": ("indicators",),
    "sft": ("indicators", "series"),
    "dpo": ("indicators", "series"),
}
