"""What `serve.py` has behind its door: what may be asked and is answered, models and prices, and the one worker that
runs requests through the network together."""

import asyncio
import datetime
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from spaceexploreai.evaluation.baselines import LEVELS, add_baselines
from spaceexploreai.evaluation.classes import class_probabilities
from spaceexploreai.feature_extraction_spaceexplore import quantile_columns
from spaceexploreai.indicators_spaceexplore import INDICATORS
from spaceexploreai.pipeline_spaceexplore import (
    CLASSIFICATION,
    HEADS,
    ONE_SERIES,
    UNITS,
    Forecast,
    SpaceExplorePipeline,
)
from spaceexploreai.train.arguments import TASK_NAMES

DISCLAIMER = "A statistical forecast for research; no investment advice."
MODEL_NAME = r"[A-Za-z0-9_.-]{1,64}"
MAX_TICKERS = 32
MAX_SAMPLES = 1000  # of all tickers of a request
PATHS_AT_A_TIME = 4096  # that a language model continues together, whatever is asked for
REMEMBERED = 1000  # contexts of stored tickers that are kept
FIRST_DAY = datetime.date(1970, 1, 1)


# --- what is asked ---------------------------------------------------------------------------------------------------


def _known_day(day: datetime.date) -> datetime.date:
    if not FIRST_DAY <= day <= datetime.date.today() + datetime.timedelta(days=1):  # it may be tomorrow elsewhere
        raise ValueError(f"{day} is not a day from {FIRST_DAY} to today")
    return day


def _each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a ticker is named twice")
    return names


def _four_decimals(level: float) -> float:
    if round(level, 4) != level:
        raise ValueError("a level has at most four decimals")
    return level


def _leave_out_defaults(schema: dict[str, Any]) -> None:
    """What may be left out has no value then: it cannot be null."""
    for field in schema["properties"].values():
        if "default" in field and field["default"] is None:
            del field["default"]


Day = Annotated[datetime.date, AfterValidator(_known_day)]
Ticker = Annotated[str, Field(pattern=r"^[A-Za-z0-9^][A-Za-z0-9.^=_-]{0,31}$")]
# Beyond these bounds no exchange has a price, and a forecast no number.
Price = Annotated[float, Field(ge=1e-6, le=1e9, allow_inf_nan=False)]
Volume = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Level = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), AfterValidator(_four_decimals)]
Tickers = Annotated[list[Ticker], FailFast(), Field(min_length=1, max_length=MAX_TICKERS), AfterValidator(_each_once)]
Prices = Annotated[list[Price], Field(min_length=1), FailFast()]


class Strict(BaseModel):
    """Numbers are no text, text is no number, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_leave_out_defaults)


class Bars(Strict):
    """Daily bars of one series, oldest first, adjusted for splits and dividends: lists of one length."""

    ticker: Ticker = ONE_SERIES
    date: Annotated[list[Day], Field(min_length=1), FailFast()]
    open: Prices
    high: Prices
    low: Prices
    close: Prices
    volume: Annotated[list[Volume], Field(min_length=1), FailFast()]

    @model_validator(mode="after")
    def check_lengths(self):
        for name in ("open", "high", "low", "close", "volume"):
            if len(getattr(self, name)) != len(self.date):
                raise ValueError(f"date has {len(self.date)} entries and {name} {len(getattr(self, name))}")
        return self

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.model_dump()).astype({"date": "datetime64[ns]"})


def _one_source(schema: dict[str, Any]) -> None:
    _leave_out_defaults(schema)
    schema["oneOf"] = [{"required": ["tickers"]}, {"required": ["bars"]}]


class ForecastRequest(Strict):
    """Either `tickers`, of the prices that the server has, or `bars`."""

    model_config = ConfigDict(json_schema_extra=_one_source)

    model: str = Field(None, pattern=rf"^{MODEL_NAME}$", description="one of /v1/models; the first by default")
    tickers: Tickers = Field(None, json_schema_extra={"uniqueItems": True})
    bars: Bars = None
    as_of: Day = Field(None, description="newest date to use")
    unit: Literal["price", "log_return"] = Field(None, description="price by default")
    prediction_length: int = Field(
        None, ge=1, le=1000, description="every trading day up to this one, not the model's horizons"
    )
    quantile_levels: Annotated[list[Level], FailFast()] = Field(
        None, min_length=1, max_length=99, description="increasing, in place of the model's"
    )
    num_samples: int = Field(
        None, ge=1, le=MAX_SAMPLES, description=f"paths of each ticker; {MAX_SAMPLES} of all tickers together"
    )
    seed: int = Field(None, ge=0, lt=2**32, description="of the paths; 0 by default")
    baselines: bool = Field(True, description="the EWMA-volatility baseline beside the model")

    @model_validator(mode="after")
    def check_sizes(self):
        if (self.tickers is None) == (self.bars is None):
            raise ValueError("give one of tickers and bars")
        samples = (self.num_samples or 0) * len(self.tickers or [None])
        if samples > MAX_SAMPLES:
            raise ValueError(f"num_samples of all tickers may be {MAX_SAMPLES} together, not {samples}")
        return self


class Query(NamedTuple):
    """A request; one for stored tickers can be looked up."""

    model: str
    tickers: tuple[str, ...]
    bars: pd.DataFrame | None
    options: tuple[tuple[str, Any], ...]  # of the pipeline
    baselines: bool

    @property
    def together(self) -> tuple:
        """What requests share that run together."""
        return self.model, tuple(one for one in self.options if one[0] not in ("as_of", "seed"))


# --- what is answered ------------------------------------------------------------------------------------------------

One = TypeVar("One")
Maybe = One | SkipJsonSchema[None]  # left out of the answer where there is none


class Distribution(BaseModel):
    """A number for each horizon: `mean, quantiles, p_up`; of a classification `p_down, p_flat, p_up`."""

    mean: Maybe[list[float]] = None
    quantiles: Maybe[dict[str, list[float]]] = Field(None, description="by level")
    p_down: Maybe[list[float]] = None
    p_flat: Maybe[list[float]] = None
    p_up: list[float]


class Paths(BaseModel):
    dates: list[datetime.date]
    closes: list[list[float]] = Field(description="of each path")


class TickerForecast(BaseModel):
    ticker: str
    cutoff: datetime.date = Field(description="day of the newest bar used")
    close: float = Field(description="of that day")
    dates: list[datetime.date]
    horizons: list[int] = Field(description="trading days after the cutoff")
    band: Maybe[list[float]] = Field(None, description="of a classification: a log-return within ± band is flat")
    forecast: Distribution
    ewma: Maybe[Distribution] = Field(None, description="the naive forecast to compare with")
    paths: Maybe[Paths] = None


class ForecastResponse(BaseModel):
    model: str
    train_cutoff: Maybe[str] = Field(None, description="last date trained on: what was forecast before it was seen")
    unit: str = Field(description="of means and quantiles; paths are prices")
    forecasts: list[TickerForecast]
    disclaimer: str = DISCLAIMER


class ModelInfo(BaseModel):
    name: str
    head: str
    horizons: list[int]
    quantile_levels: list[float]
    min_history: int = Field(description="bars that a forecast needs")
    calendar: str
    train_cutoff: Maybe[str] = Field(None, description="last date trained on")
    selection_cutoff: Maybe[str] = Field(None, description="last date that served to choose among models")


Columns = dict[str, np.ndarray]  # of a forecast table, of one ticker


# --- models and prices -----------------------------------------------------------------------------------------------


class UnknownNameError(LookupError):
    """There is no such model or ticker here; `field` is where it was named."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class QueryError(ValueError):
    """What is asked cannot be forecast."""


class Prepared(NamedTuple):
    """A ticker of a query as the network reads it."""

    chunk: dict  # as `SpaceExplorePipeline.preprocess` gives it
    naive: Columns | None  # the EWMA baseline's `mean, q…, p_up` in log-returns


class ForecastService:
    """Answers queries; for one thread at a time.

    Args:
        pipes: pipelines by the names that they are asked for; the first is the default.
        prices: validated price table.
        batch_size: tickers that go through the network together.
    """

    def __init__(self, pipes: dict[str, SpaceExplorePipeline], prices: pd.DataFrame, batch_size: int = 32):
        self.pipes, self.batch_size = pipes, batch_size
        self.stored = dict(list(prices.groupby("ticker")))
        self.start, self.end = (f"{day:%Y-%m-%d}" for day in (prices["date"].min(), prices["date"].max()))
        self.prepare_stored = lru_cache(REMEMBERED)(self._prepare)

    def models(self) -> list[ModelInfo]:
        heads = dict(zip(HEADS, TASK_NAMES, strict=True))
        return [
            ModelInfo(
                name=name,
                head=heads[pipe.head],
                horizons=pipe.model.config.horizons,
                quantile_levels=pipe.model.config.quantile_levels,
                min_history=pipe.feature_extractor.min_history,
                calendar=pipe.feature_extractor.calendar,
                train_cutoff=pipe.model.config.train_cutoff,
                selection_cutoff=pipe.model.config.selection_cutoff,
            )
            for name, pipe in self.pipes.items()
        ]

    def query(self, request: ForecastRequest) -> Query:
        """Looks up the names of a request."""
        model = next(iter(self.pipes)) if request.model is None else request.model
        if model not in self.pipes:
            raise UnknownNameError("model", f"there is no model {model!r}; /v1/models lists them")
        for ticker in request.tickers or ():
            if ticker not in self.stored:
                raise UnknownNameError("tickers", f"there are no prices of {ticker!r}; /v1/models lists the tickers")
        given = request.model_dump(exclude_unset=True, exclude={"model", "tickers", "bars", "baselines"})
        options = tuple((name, tuple(one) if isinstance(one, list) else one) for name, one in sorted(given.items()))
        bars = None if request.bars is None else request.bars.table()
        return Query(model, tuple(request.tickers or ()), bars, options, request.baselines)

    def answer(self, queries: Sequence[Query]) -> list[bytes | Exception]:
        """The JSON of each answer, or what went wrong with it. No query changes the answer to another."""
        answers: dict[int, bytes | Exception] = {}
        groups = defaultdict(list)
        for place, query in enumerate(queries):
            try:
                prepared = self.prepare(query)
                groups[query.together].append((place, query, prepared))
            except Exception as error:
                answers[place] = error
        for group in groups.values():
            places, *asked = zip(*group, strict=True)
            answers |= zip(places, self.answer_together(list(zip(*asked, strict=True))), strict=True)
        return [answers[place] for place in range(len(queries))]

    def prepare(self, query: Query) -> list[Prepared]:
        features = self.pipes[query.model].feature_extractor.feature_names
        try:
            if query.bars is not None or any(INDICATORS[name].panel for name in features):
                return self._prepare(query)
            # By itself a ticker can be remembered for whoever asks, beside whatever else.
            alone = [query._replace(tickers=(ticker,)) for ticker in query.tickers]
            return [one for ticker in alone for one in self.prepare_stored(ticker)]
        except ValueError as error:  # the sentence of the pipeline
            raise QueryError(str(error)) from error

    def _prepare(self, query: Query) -> list[Prepared]:
        pipe, options = self.pipes[query.model], dict(query.options)
        prices = pd.concat([self.stored[one] for one in query.tickers]) if query.bars is None else query.bars
        chunks = {chunk["origin"]["ticker"]: chunk for chunk in pipe.preprocess(prices, **options)}
        return [
            Prepared(chunk, naive_forecast(pipe, chunk, prices, options) if query.baselines else None)
            for chunk in (chunks[ticker] for ticker in query.tickers or chunks)
        ]

    def answer_together(self, group: list[tuple[Query, list[Prepared]]]) -> list[bytes | Exception]:
        try:
            return self.run(group)
        except Exception as error:
            return [error] if len(group) == 1 else [self.answer_together([one])[0] for one in group]

    def run(self, group: list[tuple[Query, list[Prepared]]]) -> list[bytes]:
        model, options = group[0][0].together
        pipe, options = self.pipes[model], dict(options)
        tickers = [one for _, prepared in group for one in prepared]
        size = min(self.batch_size, max(1, PATHS_AT_A_TIME // options.get("num_samples", 1)))
        answer = pipe.postprocess(run_network(pipe, [one.chunk for one in tickers], size), **options)
        table, paths = answer if isinstance(answer, Forecast) else (answer, None)
        unit = options.get("unit", UNITS[0])
        parts = zip(tickers, split(table, len(tickers)), split(paths, len(tickers)), strict=True)
        forecasts = iter([ticker_forecast(*part, unit) for part in parts])
        return [self.write(model, unit, list(islice(forecasts, len(prepared)))) for _, prepared in group]

    def write(self, model: str, unit: str, forecasts: list[TickerForecast]) -> bytes:
        cutoff = self.pipes[model].model.config.train_cutoff
        response = ForecastResponse(model=model, train_cutoff=cutoff, unit=unit, forecasts=forecasts)
        return response.model_dump_json(exclude_none=True).encode()


def run_network(pipe: SpaceExplorePipeline, chunks: list[dict], size: int) -> list[dict]:
    """Outputs of each chunk, `size` of which go through the network together."""
    found = []
    for start in range(0, len(chunks), size):
        part = chunks[start : start + size]
        names = [name for name, value in part[0].items() if isinstance(value, torch.Tensor)]
        outputs = pipe.forward({name: torch.cat([chunk[name] for chunk in part]) for name in names})
        for row, chunk in enumerate(part):
            found.append({name: value[row : row + 1] for name, value in outputs.items()} | {"origin": chunk["origin"]})
    return found


def naive_forecast(pipe: SpaceExplorePipeline, chunk: dict, prices: pd.DataFrame, options: dict[str, Any]) -> Columns:
    """The baseline of one ticker, fitted to its own history. It is known before the network has run."""
    levels = options.get("quantile_levels", pipe.model.config.quantile_levels)
    levels = LEVELS if pipe.head == CLASSIFICATION else levels
    asked = pd.DataFrame({"horizon": pipe.days(options.get("prediction_length"))})
    asked[["ticker", "cutoff"]] = chunk["origin"]["ticker"], chunk["origin"]["cutoff"]
    asked[quantile_columns(list(levels))] = 0.0  # names the levels
    own = prices[prices["ticker"] == chunk["origin"]["ticker"]]
    naive = add_baselines(asked, own, "ewma").filter(regex="^ewma_")
    return {name.removeprefix("ewma_"): naive[name].to_numpy() for name in naive}


def split(table: pd.DataFrame | None, parts: int) -> list[Columns | None]:
    """The columns of each of so many parts of equal length."""
    if table is None:
        return [None] * parts
    columns = {name: np.split(table[name].to_numpy(), parts) for name in table}
    return [{name: pieces[part] for name, pieces in columns.items()} for part in range(parts)]


def ticker_forecast(prepared: Prepared, table: Columns, paths: Columns | None, unit: str) -> TickerForecast:
    origin, naive = prepared.chunk["origin"], prepared.naive
    if "band" in table and naive is not None:
        naive = naive_classes(naive, table["band"])
    elif unit == "price" and naive is not None:
        naive = {name: one if name == "p_up" else origin["close"] * np.exp(one) for name, one in naive.items()}
    check_finite(origin, table, naive, paths)
    return TickerForecast(
        ticker=origin["ticker"],
        cutoff=origin["cutoff"].date(),
        close=origin["close"],
        dates=days_of(table["date"]),
        horizons=table["horizon"].tolist(),
        band=table["band"].tolist() if "band" in table else None,
        forecast=distribution(table),
        ewma=naive and distribution(naive),
        paths=paths and paths_of(paths),
    )


def check_finite(origin: dict[str, Any], *tables: Columns | None) -> None:
    for table in tables:
        for column in (table or {}).values():
            if column.dtype.kind == "f" and not np.isfinite(column).all():
                raise QueryError(f"{origin['ticker']} {origin['cutoff']:%Y-%m-%d}: the forecast is beyond all numbers")


def naive_classes(naive: Columns, band: np.ndarray) -> Columns:
    quantiles = np.stack([naive[name] for name in quantile_columns(LEVELS)], axis=1)
    chances = class_probabilities(quantiles, np.array(LEVELS), band)
    return dict(zip(("p_down", "p_flat", "p_up"), chances.T, strict=True))


def distribution(columns: Columns) -> Distribution:
    own = {name: columns[name].tolist() for name in Distribution.model_fields if name in columns}
    quantiles = {name[1:]: columns[name].tolist() for name in columns if name.startswith("q0.")}
    return Distribution(**own, quantiles=quantiles or None)


def paths_of(columns: Columns) -> Paths:
    samples = columns["sample"][-1] + 1
    return Paths(
        dates=days_of(columns["date"][: len(columns["date"]) // samples]),
        closes=columns["close"].reshape(samples, -1).tolist(),
    )


def days_of(dates: np.ndarray) -> list[datetime.date]:
    return dates.astype("datetime64[D]").tolist()


# --- the worker ------------------------------------------------------------------------------------------------------


class Batcher:
    """Lets queries that arrive within `max_wait` seconds be answered together, by one thread.

    Args:
        answer: as `ForecastService.answer`.
        max_batch: queries at a time.
        capacity: queries that may wait.
        observe: is told the size of every batch.
    """

    def __init__(
        self,
        answer: Callable[[list], list],
        max_batch: int = 32,
        max_wait: float = 0.01,
        capacity: int = 256,
        observe: Callable[[int], None] = lambda size: None,
    ):
        self.answer, self.max_batch, self.max_wait, self.observe = answer, max_batch, max_wait, observe
        self.queue: asyncio.Queue = asyncio.Queue(capacity)
        self.worker = ThreadPoolExecutor(1, "network")
        self.task: asyncio.Task | None = None

    @property
    def ready(self) -> bool:
        return self.task is not None and not self.task.done()

    async def ask(self, query):
        """The answer; raises `asyncio.QueueFull`, and what the answer raises."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.queue.put_nowait((loop.time(), query, future))
        return await future

    async def __aenter__(self) -> "Batcher":
        self.task = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *_) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.worker.shutdown()

    async def work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [(query, future) for _, query, future in await self.collect() if not future.done()]
            if not batch:  # all of them were given up
                continue
            queries, futures = zip(*batch, strict=True)
            self.observe(len(queries))
            try:
                answers = await loop.run_in_executor(self.worker, self.answer, queries)
            except Exception as error:
                answers = [error] * len(queries)
            for future, answer in zip(futures, answers, strict=True):
                settle(future, answer)

    async def collect(self) -> list[tuple]:
        """What waits, and what comes until the first has waited for `max_wait`."""
        batch = [await self.queue.get()]
        try:
            async with asyncio.timeout_at(batch[0][0] + self.max_wait):
                while len(batch) < self.max_batch:
                    batch.append(await self.queue.get())
        except TimeoutError:
            pass
        return batch


def settle(future: asyncio.Future, answer) -> None:
    if future.done():  # its time was up
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
