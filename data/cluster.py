"""The published dataset, built by the workers of a Dask cluster, none of which ever holds the market.

    with connect("tcp://scheduler:8786") as client:
        build_folder(client, StocksConfig(prices="prices"), ("sft", "dpo"), folder, tickers_per_file=64)

Dask and not Ray Data: what is shared out are plain functions of a few tickers, which Dask's futures take as they are,
and it weighs 3 MB where Ray weighs 80. Tickers pass through in shards, three times: their dates make the calendar and
the split, columns of some of them make the statistics, and then the worker that has a shard reads, cleans, encodes,
cuts and writes it. Prices and folder must be where all machines see them, under one name.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from transformers.utils import FEATURE_EXTRACTOR_NAME

from spaceexploreai.data import prices, stocks
from spaceexploreai.data.cleaning import KINDS, CleaningReport, Finding, clean
from spaceexploreai.data.files import write_atomically
from spaceexploreai.data.stocks import HISTORY, METADATA_NAME, STAGES, StocksConfig
from spaceexploreai.data.windows import DateRange
from spaceexploreai.feature_extraction_spaceexplore import (
    VOLATILITY_BARS,
    EncodedSeries,
    SpaceExploreFeatureExtractor,
    with_missing_sessions,
)
from spaceexploreai.indicators_spaceexplore import INDICATORS

try:  # the extra [cluster]
    from dask.distributed import Client, LocalCluster, as_completed, wait
except ImportError:
    Client = None

WAITING = 2  # tasks that the cluster has for each of its threads; the others can still be called off
PATIENCE = 60  # seconds for the first worker of a cluster to come
EXAMPLES = 5  # of a kind of finding, as `clean` keeps


# --- the cluster -----------------------------------------------------------------------------------------------------


@contextmanager
def connect(cluster: str) -> Iterator["Client"]:
    """A client of the scheduler at an address, or of processes of this machine: `local`, or as many as `local:4`."""
    if Client is None:
        raise ValueError(f"cluster {cluster!r} needs Dask: pip install 'spaceexploreai[cluster]'")
    kind, _, workers = cluster.partition(":")
    if kind != "local":
        with Client(cluster) as client:
            client.wait_for_workers(1, timeout=PATIENCE)
            yield client
    elif workers and not (workers.isdecimal() and int(workers)):
        raise ValueError(f"cluster must be local, local:N or the address of a scheduler, got {cluster!r}")
    else:
        processes = {
            "n_workers": int(workers) if workers else None,
            "threads_per_worker": 1,
            "dashboard_address": ":0",
        }
        with LocalCluster(**processes, env={"HF_HUB_DISABLE_PROGRESS_BARS": "1"}) as local, Client(local) as client:
            yield client


def run(client: "Client", task: Callable, jobs: Sequence[tuple[Sequence[str], tuple]]) -> list:
    """Results of a task, in the order of its jobs.

    A failure calls off what the cluster has not got yet and is raised when all else has ended: a task that were still
    running would write into a folder that is about to be removed.

    Args:
        jobs: the tickers that each is about, and its arguments.
    """
    results, places, queue, done = [None] * len(jobs), {}, iter(enumerate(jobs)), as_completed()

    def hand_out() -> None:
        vacant = WAITING * sum(client.nthreads().values()) - len(places)
        for place, (tickers, arguments) in islice(queue, max(vacant, 1)):
            # Of a worker that dies the key is the last word.
            future = client.submit(task, *arguments, key=f"{task.__name__} of {span(tickers)}, {uuid4()}")
            places[future] = place
            done.add(future)

    hand_out()
    for future in done:
        if future.status != "finished":
            wait(list(places))
        results[places.pop(future)] = future.result()
        hand_out()
    return results


def span(tickers: Sequence[str]) -> str:
    return tickers[0] if len(tickers) == 1 else f"{tickers[0]} to {tickers[-1]}"


@contextmanager
def about(tickers: Sequence[str]) -> Iterator[None]:
    """Puts the tickers of a task before what is wrong with them."""
    try:
        yield
    except (ValueError, OSError) as error:
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"{span(tickers)}: {error}") from error


# --- the market ------------------------------------------------------------------------------------------------------


def names_of_tickers(config: StocksConfig) -> dict[str, list[str]]:
    """Each ticker, in order, with the ways in which the prices write it: cleaning takes spaces off."""
    path = prices_path(config)
    found = prices.list_tickers(path) if config.tickers is None else prices.parse_tickers(config.tickers)
    names = {}
    for name in found:
        if not (name or "").strip():
            raise ValueError(f"{path} has rows without a ticker, which no worker would read")
        names.setdefault(name.strip(), []).append(name)
    return dict(sorted(names.items()))


def prices_path(config: StocksConfig) -> Path:
    return Path(prices.SAMPLE_PATH if config.prices is None else config.prices)


def read(config: StocksConfig, names: list[str]) -> tuple[pd.DataFrame, CleaningReport]:
    bars = prices.read_raw(prices_path(config), names)
    return clean(bars, config.make_extractor().calendar, config.strict, config.fill)


class Survey(NamedTuple):
    """What the first pass brings back of some tickers."""

    bars: dict[str, int]  # of each ticker
    dates: np.ndarray  # of the bars, each once
    steps: np.ndarray  # of the steps of all series, each once
    last: pd.DataFrame  # the last bar of each ticker
    report: CleaningReport


def survey(config: StocksConfig, names: list[str]) -> Survey:
    with about(names):
        table, report = read(config, names)
        tickers = table.groupby("ticker", sort=False)
        steps = [steps_of(bars, report.calendar) for _, bars in tickers if len(bars) > VOLATILITY_BARS]
        steps = np.unique(np.concatenate([np.zeros(0, "datetime64[ns]"), *steps]))
        return Survey(tickers.size().to_dict(), table["date"].unique(), steps, tickers.tail(1), report)


def steps_of(bars: pd.DataFrame, calendar: str) -> np.ndarray:
    known = bars[VOLATILITY_BARS:]
    nothing = np.zeros((len(known), 0), dtype=np.float32)
    series = EncodedSeries("", known["date"].to_numpy(), known["close"].to_numpy(), nothing, nothing)
    return with_missing_sessions(series, calendar).dates


def merge_reports(surveys: list[Survey]) -> CleaningReport:
    """What `clean` says of all tickers at once."""
    reports = [one.report for one in surveys]
    sums = {name: sum(getattr(one, name) for one in reports) for name in ("rows_in", "rows_out", "tickers")}
    dates = {"start": min(one.start for one in reports), "end": max(one.end for one in reports)}
    # Where the whole table ends decides who ended before.
    _, ends = clean(pd.concat([one.last for one in surveys]), reports[0].calendar)
    findings = [one for report in reports for one in report.findings if one.kind != "delisted"]
    findings += [one for one in ends.findings if one.kind == "delisted"]
    return CleaningReport(reports[0].calendar, **sums, **dates, findings=merge_findings(findings))


def merge_findings(findings: list[Finding]) -> list[Finding]:
    merged = {}
    for one in sorted(findings, key=lambda one: list(KINDS).index(one.kind)):
        same = merged.setdefault((one.kind, one.action), Finding(one.kind, one.action, 0, []))
        same.count += one.count
        same.examples = [*same.examples, *one.examples][:EXAMPLES]
    return list(merged.values())


# --- statistics ------------------------------------------------------------------------------------------------------


def fit(
    client: "Client", config: StocksConfig, names: list[list[str]], train: DateRange
) -> SpaceExploreFeatureExtractor:
    """The statistics that one process takes of the same tickers. Columns stay with the workers; each is fitted by one.

    Args:
        names: of every ticker with a bar.
        train: dates of training.
    """
    extractor = config.make_extractor()
    if extractor.center is None:
        rows = np.unique(np.linspace(0, len(names) - 1, stocks.FIT_TICKERS).round().astype(int))
        groups = [list(chain(*(names[row] for row in group))) for group in stocks.groups_of(rows)]
        parts = client.map(training_columns, groups, config=config, train=train, pure=False)
        columns = [client.map(itemgetter(name), parts) for name in extractor.feature_names]
        fitted = client.map(fit_column, extractor.feature_names, columns, normalization=extractor.normalization)
        extractor.center, extractor.spread = map(list, zip(*client.gather(fitted), strict=True))
        extractor.fitted_until = f"{train.end:%Y-%m-%d}"
    return extractor


def training_columns(names: list[str], config: StocksConfig, train: DateRange) -> dict[str, np.ndarray]:
    with about(names):
        features = config.make_extractor().compute_features(read(config, names)[0])
        return {name: column.to_numpy() for name, column in features[features["date"].between(*train)].items()}


def fit_column(name: str, parts: list[np.ndarray], normalization: str) -> tuple[float, float]:
    extractor = SpaceExploreFeatureExtractor(feature_names=[name], normalization=normalization)
    extractor.fit_columns([np.concatenate(parts)])
    return extractor.center[0], extractor.spread[0]


# --- shards ----------------------------------------------------------------------------------------------------------


class Market(NamedTuple):
    """What the stages after `series` read of a builder."""

    config: StocksConfig
    extractor: SpaceExploreFeatureExtractor
    metadata: dict
    series: Dataset  # ticker and dates alone


class Shard(NamedTuple):
    """The tickers of one file of each split."""

    number: int
    count: int  # of shards
    first: int  # number of its first series
    names: list[str]
    splits: dict[tuple[str, str], dict]  # by stage and split: arguments of the stage's rows


def list_series(surveys: list[Survey]) -> Dataset:
    """Tickers with enough bars and the dates of their steps, which stand with the first ticker of a survey."""
    tickers, dates = [], []
    for one in surveys:
        long = [ticker for ticker, count in one.bars.items() if count > VOLATILITY_BARS]
        tickers += long
        dates += [one.steps, *[one.steps[:0]] * len(long)][: len(long)]
    if not tickers:
        raise ValueError(f"no ticker has more than {VOLATILITY_BARS} bars, which its volatility needs to be known")
    days = stocks.nested([stocks.days_of(one) for one in dates])
    return Dataset(pa.table({"ticker": pa.array(tickers, pa.string()), "dates": days}))


def make_shards(market: Market, stages: Sequence[str], names: dict[str, list[str]], size: int) -> list[Shard]:
    tickers = market.series["ticker"][:]
    splits = {(stage, split): one for stage in stages for split, one in STAGES[stage].splits(market).items()}
    shards = []
    for first in range(0, len(tickers), size):
        part = range(first, min(first + size, len(tickers)))
        own = list(chain(*(names[tickers[index]] for index in part)))
        arguments = {key: cut(one, part) for key, one in splits.items()}
        shards.append(Shard(len(shards), -(-len(tickers) // size), first, own, arguments))
    return shards


def cut(arguments: dict, part: range) -> dict:
    """Arguments of a stage's rows for a part of the series, numbered from zero."""
    group = [index - part.start for index in chain(*arguments["groups"]) if index in part]
    return {"group": group, **{name: value for name, value in arguments.items() if name not in ("groups", "series")}}


def write_shard(config: StocksConfig, extractor: SpaceExploreFeatureExtractor, shard: Shard, folder: Path) -> dict:
    """Writes one file of each split; counts their rows."""
    with about(shard.names):
        tables = {("series", HISTORY): encode(config, extractor, shard)}
        series = Dataset(tables["series", HISTORY])
        for (stage, split), arguments in shard.splits.items():
            rows = STAGES[stage].rows(config, series=series, **arguments) if arguments["group"] else {"series": []}
            rows["series"] = np.asarray(rows["series"], np.int32) + np.int32(shard.first)
            tables[stage, split] = table_of(stage, rows, config, extractor)
        for (stage, split), table in tables.items():
            write_file(table, folder / stage, split, shard.number, shard.count)
        return {key: len(table) for key, table in tables.items()}


def encode(config: StocksConfig, extractor: SpaceExploreFeatureExtractor, shard: Shard) -> pa.Table:
    bars = [one for _, one in read(config, shard.names)[0].groupby("ticker", sort=False)]
    tables, first = [], shard.first
    for group in stocks.groups_of(bars):
        rows = STAGES["indicators"].rows(config, pd.concat(group, ignore_index=True))
        indicators = Dataset(table_of("indicators", rows, config, extractor))
        numbers = [(first + row, row) for row in range(len(group))]
        rows = STAGES["series"].rows(config, numbers, indicators, extractor)
        tables.append(table_of("series", rows, config, extractor))
        first += len(group)
    return pa.concat_tables(tables)


def table_of(stage: str, rows: dict, config: StocksConfig, extractor: SpaceExploreFeatureExtractor) -> pa.Table:
    features = STAGES[stage].columns(len(extractor.feature_names), len(config.horizons))
    return pa.table({name: rows.get(name, []) for name in features}, schema=features.arrow_schema)


def write_file(table: pa.Table, folder: Path, split: str, number: int, count: int) -> None:
    """Writes one of the files of a split, which may have no row."""

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
            if len(table):  # a group of no rows is what `datasets` cannot read
                writer.write_table(table, row_group_size=stocks.rows_per_batch(folder.name))

    write_atomically(folder / f"{split}-{number:05d}-of-{count:05d}.parquet", write)


# --- the folder ------------------------------------------------------------------------------------------------------


def build_folder(
    client: "Client", config: StocksConfig, stages: Sequence[str], folder: Path, tickers_per_file: int
) -> None:
    """Writes all of a published dataset but its card.

    Args:
        config: with the options of all stages.
        stages: after `series`: "sft", "dpo" or both.
        folder: where the workers see it too.

    Raises:
        ValueError: as the builders do, and for a column that compares tickers.
    """
    config.check()
    refuse_panel(config.make_extractor().feature_names)
    names = names_of_tickers(config)
    surveys = survey_market(client, config, list(names.values()), tickers_per_file)
    calendar = pd.Series(np.unique(np.concatenate([one.dates for one in surveys])))
    split = stocks.split_of(config, calendar)
    metadata = {**stocks.describe(config, split), "cleaning": merge_reports(surveys).to_dict()}
    market = Market(config, config.make_extractor(), metadata, list_series(surveys))
    shards = make_shards(market, stages, names, tickers_per_file)
    extractor = fit(client, config, [names[ticker] for one in surveys for ticker in one.bars], split.train)
    jobs = [(shard.names, (config, extractor, shard, folder.absolute())) for shard in shards]
    check_filled(run(client, write_shard, jobs))
    for part in folder.glob("*/.*"):  # of a worker that died over it
        part.unlink()
    (folder / METADATA_NAME).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    extractor.to_json_file(folder / FEATURE_EXTRACTOR_NAME)


def refuse_panel(names: list[str]) -> None:
    for name in names:
        if name in INDICATORS and INDICATORS[name].panel:
            raise ValueError(f"column {name!r} compares tickers with each other, and no worker has them all")


def survey_market(client: "Client", config: StocksConfig, names: list[list[str]], size: int) -> list[Survey]:
    # Of like size: a few that are left over might not have a usable bar among them.
    parts = [
        list(chain(*(names[row] for row in part)))
        for part in np.array_split(range(len(names)), -(-len(names) // size))
    ]
    return run(client, survey, [(part, (config, part)) for part in parts])


def check_filled(counts: list[dict]) -> None:
    for stage, split in counts[0]:
        if not sum(one[stage, split] for one in counts):
            raise ValueError(f"the {split} split of {stage} is empty: too few dates or tickers")
