"""Daily bars from a provider into files that `read_prices` reads.

A provider is one function with one registration; pace, patience, cleaning, files and updates are the same for all:

    @provider("mine")
    def mine(ticker, start, end):
        return DataFrame of columns date, open, high, low, close, volume[, adj_close]
"""

import inspect
import json
import random
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import exchange_calendars
import numpy as np
import pandas as pd
import yfinance
from curl_cffi.requests import Response, Session
from tqdm import tqdm
from yfinance.data import YfData
from yfinance.exceptions import YFTickerMissingError

from spaceexploreai.data.files import write_atomically
from spaceexploreai.data.prices import adjust, parse_tickers, read_prices, write_table
from spaceexploreai.feature_extraction_spaceexplore import PRICE_COLUMNS, TABLE_COLUMNS, parse_dates, validate_prices

UNIVERSES_PATH = Path(__file__).parent / "universes.json"
FILE_COLUMNS = ["date", "close", "high", "low", "open", "volume", "ticker"]
FILE_HEADER = ["Date", "Close", "High", "Low", "Open", "Volume", "ticker"]
HALF_WRITTEN = re.compile(r"\.[0-9a-f]{32}\..+\.(csv|json|parquet)")
TIMEOUT = 15.0  # seconds for one HTTP request
REFUSED = (401, 403)  # what Yahoo answers to cookies that it does not like
LONGEST_REST = 300.0  # seconds; a provider that asks for more is asked again by the next run, not by this one
GIVE_UP_AFTER = 8  # tickers in a row that exhausted their tries: the provider is down, or does not want us
CLOSE_DELAY = pd.Timedelta(minutes=30)  # closing auctions are reported late, free quotes up to 15 minutes later still
OVERLAP = pd.Timedelta(days=7)
# Yahoo's answers to one question differ by up to 4e-7 (yfinance, issue 1871); a dividend of one cent on a share of 180
# dollars moves them by 6e-5.
SAME_PRICE = 1e-5
ROUNDING = 1e-6  # by which a close may pass the high, when all were multiplied by a rounded factor
MOST_DROPPED = 0.01
# A path that the user got wrong: no other ticker will fare better.
WRONG_PATH = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


# --- tickers ---------------------------------------------------------------------------------------------------------


def read_universe(name: str) -> dict:
    """An index's members on a day: `name`, `as_of`, `source`, `tickers`, `note`. See `universes.json`.

    Raises:
        ValueError: no such universe.
    """
    known = json.loads(UNIVERSES_PATH.read_text(encoding="utf-8"))
    if name not in known["universes"]:
        raise ValueError(f"unknown universe {name!r}; there are {', '.join(known['universes'])}")
    return {"name": name, **known["universes"][name], "note": known["note"]}


def read_tickers_file(path: str | Path) -> list[str]:
    """Tickers of a text file, one a line or separated by commas; what follows a # is a comment.

    Raises:
        ValueError: no ticker, or something that is none; names file and value.
        OSError: the file cannot be read.
    """
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    try:
        return parse_tickers(",".join(line.split("#")[0] for line in lines))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def universe_tickers(universe: str) -> str:
    """Comma-separated members of an index of `universes.json`, or tickers of a text file."""
    is_file = Path(universe).is_file()
    return ",".join(read_tickers_file(universe) if is_file else read_universe(universe)["tickers"])


# --- providers -------------------------------------------------------------------------------------------------------


class TryAgainError(Exception):
    """A provider raises it for what may pass, with the seconds `after` which it was asked to come back, if it was."""

    def __init__(self, message: str, after: float = 0.0):
        super().__init__(message)
        self.after = after


class RateLimitedError(TryAgainError):
    """The provider has had too many requests: all tickers wait."""


class Provider(NamedTuple):
    fetch: Callable[..., pd.DataFrame]
    requests: int


PROVIDERS: dict[str, Provider] = {}


def provider(name: str, requests: int = 1) -> Callable:
    """Registers `function(ticker, start, end[, argument])` as the source `name` or `name:argument`.

    The function returns a DataFrame with the columns `date, open, high, low, close, volume`, adjusted for splits and
    dividends, or with `adj_close` beside raw ones; in any order, from `start` to `end` (timestamps, both included) or
    more. It raises `TryAgainError`, `RateLimitedError` or an `OSError` for what may pass and anything else for what
    will not. It is called from several threads.

    Args:
        name: a word.
        requests: how many HTTP requests of the rate limit a call is worth.
    """

    def register(function: Callable) -> Callable:
        PROVIDERS[name] = Provider(function, requests)
        return function

    return register


def open_source(source: str) -> Provider:
    """The provider that `name` or `name:argument` names.

    Raises:
        ValueError: no such provider, or one that needs an argument or takes none.
    """
    name, *argument = source.split(":", maxsplit=1)
    if name not in PROVIDERS:
        raise ValueError(f"unknown source {name!r}; there are {', '.join(sorted(PROVIDERS))}")
    fetch, requests = PROVIDERS[name]
    try:
        inspect.signature(fetch).bind("TICKER", None, None, *argument)
    except TypeError:
        form = f"{name}:PATH" if not argument else name
        raise ValueError(f"source {source!r}: write {form}") from None
    return Provider(lambda ticker, start, end: fetch(ticker, start, end, *argument), requests)


@provider("csv", requests=0)
def fetch_from_files(ticker: str, start: pd.Timestamp, end: pd.Timestamp, path: str) -> pd.DataFrame:
    """Bars of the user's own table or folder; see `read_prices`."""
    return read_prices(path, [ticker])


# Two: for the time zone of the ticker's exchange, which yfinance keeps in its cache, and for the bars.
@provider("yahoo", requests=2)
def fetch_from_yahoo(ticker: str, start: pd.Timestamp, end: pd.Timestamp) -> pd.DataFrame:
    """Bars of Yahoo Finance through yfinance, adjusted for splits and dividends."""
    session = _yahoo_session()
    # yfinance keeps answers for the life of the process; after a split they would be on the old base.
    YfData.cache_get.cache_clear()
    try:
        bars = yfinance.Ticker(ticker, session=session).history(
            start=start.date(), end=(end + pd.Timedelta(days=1)).date(), auto_adjust=True, actions=False
        )
    except Exception as error:
        if getattr(session.answered, "status", None) in REFUSED:
            raise TryAgainError(f"HTTP {session.answered.status}, refused") from error
        if isinstance(error, YFTickerMissingError):
            raise LookupError(error.rationale) from error
        raise
    return bars.rename(columns=str.lower).rename_axis("date").reset_index()


@lru_cache(maxsize=1)
def _yahoo_session() -> Session:
    yfinance.config.debug.hide_exceptions = False  # else a failure is logged and an empty table returned
    warnings.filterwarnings("ignore", category=pd.errors.Pandas4Warning, module="yfinance")
    return _YahooSession(impersonate="chrome")


class _YahooSession(Session):
    """Says at once of an answer whether to try again, and when.

    yfinance would repeat the request on the spot, drop Retry-After, and keep a truncated answer in its cache, so that
    a second try gets the same.
    """

    answered = threading.local()

    def request(self, method: str, url: str, **options) -> Response:
        response = super().request(method, url, **{**options, "timeout": TIMEOUT})
        if "/v8/finance/chart/" in url:
            self.answered.status = response.status_code
            _check_answer(response)
        return response


def _check_answer(response: Response) -> None:
    status, after = response.status_code, _retry_after(response.headers.get("Retry-After"))
    if status == 429:
        raise RateLimitedError("HTTP 429, too many requests", after)
    if status >= 500:
        raise TryAgainError(f"HTTP {status}", after)
    if status in REFUSED:
        return  # yfinance gets itself new cookies and asks once more
    if status >= 400:
        reason = re.search(r'"description": ?"([^"]+)"', response.text)
        raise LookupError(f"HTTP {status}, {reason[1] if reason else 'not found'}")
    try:
        json.loads(response.text)
    except ValueError:
        raise TryAgainError(f"HTTP {status} with an answer that is cut off or no JSON") from None


def _retry_after(header: str | None) -> float:
    """Seconds of a Retry-After header, which gives them or a date; 0 without one, or with one that cannot be read."""
    if header is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}", header.strip()):
        return float(header)
    try:
        return max(parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


# --- pace and patience -----------------------------------------------------------------------------------------------


class FailedError(Exception):
    """A ticker's failure, in words; `exhausted` if it was tried as often as is allowed."""

    def __init__(self, message: str, exhausted: bool = False):
        super().__init__(" ".join(message.split()))
        self.exhausted = exhausted


@dataclass(frozen=True)
class Patience:
    """How a provider is asked: requests a second, tries for a ticker, seconds before the second try (then doubled)."""

    rate: float = 2.0
    tries: int = 5
    backoff: float = 1.0
    batch_size: int = 8

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not 0 < value < np.inf:
                raise ValueError(f"{name} must be a positive number, got {value}")


class Throttle:
    """Spaces the requests of all threads, holds them back while a provider rests, and ends their waiting."""

    def __init__(self, rate: float):
        self._interval = 1 / rate
        self._turn = threading.Lock()
        self._next = self._rest = time.monotonic()
        self._stopped = threading.Event()

    def wait(self, requests: int) -> None:
        """Returns when it is the caller's turn to send so many requests."""
        with self._turn:
            self.sleep(0)
            while (delay := max(self._next, self._rest) - time.monotonic()) > 0:
                self.sleep(delay)
            self._next = time.monotonic() + requests * self._interval

    def rest(self, seconds: float) -> None:
        """Lets nobody through for a while."""
        self._rest = max(self._rest, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise FailedError("the run was stopped")

    def close(self) -> None:
        self._stopped.set()


def ask(
    source: Provider, ticker: str, start: pd.Timestamp, end: pd.Timestamp, patience: Patience, throttle: Throttle
) -> pd.DataFrame:
    """What the provider says, after at most `patience.tries` tries.

    Raises:
        FailedError: it would not, or not in time.
        OSError: a path of the user's is wrong.
    """
    for attempt in range(patience.tries):
        throttle.wait(source.requests)
        try:
            return source.fetch(ticker, start, end)
        except WRONG_PATH:
            raise
        except (TryAgainError, OSError) as error:
            trouble = error
        # A provider is anyone's code: what it raises is the failure of this ticker, not the end of the run.
        except Exception as error:
            raise FailedError(_in_words(error)) from error
        if attempt + 1 < patience.tries:
            _hold_back(trouble, patience.backoff * 2 ** min(attempt, 16), throttle)
    raise FailedError(f"{_in_words(trouble)}; gave up after {patience.tries} tries", exhausted=True)


def _hold_back(trouble: Exception, backoff: float, throttle: Throttle) -> None:
    asked = getattr(trouble, "after", 0.0)
    if asked > LONGEST_REST:
        raise FailedError(f"{_in_words(trouble)}; asked to wait {asked:.0f} s, run again later", exhausted=True)
    # The jitter keeps the tickers of a batch from coming back all at once.
    delay = max(asked, min(backoff, LONGEST_REST) * random.uniform(0.5, 1.0))
    if isinstance(trouble, RateLimitedError):
        throttle.rest(delay)
    else:
        throttle.sleep(delay)


def _in_words(error: Exception) -> str:
    """The message without curl's pointer to its manual, after the type where that is not one of ours."""
    message = str(error).split(". See https://curl.se")[0]
    ours = isinstance(error, TryAgainError) or type(error) in (LookupError, ValueError)
    return message if ours else f"{type(error).__name__}: {message}"


# --- bars ------------------------------------------------------------------------------------------------------------


def newest_session(calendar: str, now: pd.Timestamp) -> pd.Timestamp:
    """The last trading day whose close has passed; the bar of a later one is not finished, or not begun.

    Raises:
        ValueError: no such calendar.
    """
    today = now.tz_convert(None).normalize()
    try:
        sessions = exchange_calendars.get_calendar(
            calendar, start=today - pd.Timedelta(days=30), end=today + pd.Timedelta(days=1)
        )
    except exchange_calendars.errors.InvalidCalendarName:
        raise ValueError(f"calendar {calendar!r} is not known to exchange_calendars") from None
    return sessions.closes.index[sessions.closes + CLOSE_DELAY <= now][-1].as_unit("ns")


def calendar_of(ticker: str, calendar: str) -> str:
    """Currencies (EURUSD=X), futures (ES=F) and coins (BTC-USD) have bars of whole days; BRK-B has not."""
    return "24/7" if re.search(r"=|-[A-Z]{3,}$", ticker) else calendar


def clean(
    bars: pd.DataFrame, ticker: str, start: pd.Timestamp, end: pd.Timestamp
) -> tuple[pd.DataFrame, dict[str, str]]:
    """A provider's bars of `start` to `end` as a canonical table, and what is wrong with days that were left out.

    Bars are sorted, a day's later row replaces an earlier one, days without prices (Yahoo has them for some holidays)
    are no bars, a missing volume is 0, and rounding is repaired.

    Raises:
        ValueError: no bar, a missing column, or more than one in a hundred that cannot be a daily bar.
    """
    _check_answer_table(bars, ticker)
    dates = parse_dates(bars["date"])
    if dates.isna().any():
        raise ValueError(f"{ticker}: {str(bars['date'][dates.isna()].iloc[0])!r} is not a date")
    prices = [column for column in [*PRICE_COLUMNS, "adj_close"] if column in bars.columns]
    table = bars[[*prices, "volume"]].apply(pd.to_numeric, errors="coerce").astype("float64")
    table = table.assign(ticker=ticker, date=dates, volume=table["volume"].fillna(0))
    table = table[table["date"].between(start, end) & table[PRICE_COLUMNS].notna().any(axis=1)]
    table = table.sort_values("date", kind="stable").drop_duplicates("date", keep="last", ignore_index=True)
    if table.empty:
        raise ValueError(f"{ticker}: no bars from {start.date()} to {end.date()}")
    return _without_impossible(_repair_rounding(table), prices)


def _check_answer_table(bars: pd.DataFrame, ticker: str) -> None:
    if not isinstance(bars, pd.DataFrame):
        raise ValueError(f"{ticker}: the source returned a {type(bars).__name__}, not a DataFrame")
    missing = [column for column in TABLE_COLUMNS if column not in {*bars.columns, "ticker"}]
    if missing:
        given = ", ".join(map(str, bars.columns))
        raise ValueError(f"{ticker}: the source gave no column {missing[0]!r}, only {given}")


def _repair_rounding(table: pd.DataFrame) -> pd.DataFrame:
    body = table[["open", "close"]]
    highest, lowest = body.max(axis=1), body.min(axis=1)
    high = table["high"].where(highest > table["high"] * (1 + ROUNDING), np.maximum(highest, table["high"]))
    low = table["low"].where(lowest < table["low"] * (1 - ROUNDING), np.minimum(lowest, table["low"]))
    return table.assign(high=high, low=low)


def _without_impossible(table: pd.DataFrame, prices: list[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    body = table[["open", "close"]]
    possible = (np.isfinite(table[prices]) & (table[prices] > 0)).all(axis=1)
    possible &= (body.max(axis=1) <= table["high"]) & (body.min(axis=1) >= table["low"])
    possible &= np.isfinite(table["volume"]) & (table["volume"] >= 0)
    wrong = {f"{day:%Y-%m-%d}": _complaint(table[table["date"] == day]) for day in table["date"][~possible]}
    if len(wrong) > max(1, MOST_DROPPED * len(table)) or not possible.any():
        day, complaint = next(iter(wrong.items()))
        raise ValueError(f"{len(wrong)} of {len(table)} bars are impossible, the first on {day}: {complaint}")
    kept = table[possible].reset_index(drop=True)
    return adjust(kept) if "adj_close" in prices else validate_prices(kept), wrong


def _complaint(bar: pd.DataFrame) -> str:
    """What `validate_prices` says of one bar, without ticker and day."""
    try:
        validate_prices(bar)
    except ValueError as error:
        return str(error).partition(": ")[2]
    return f"adj_close {bar['adj_close'].iloc[0]} is not a positive price"


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """What the manifest says of a ticker: what was asked for (`start`, `end`), and what its file has."""

    source: str
    start: str
    end: str | None
    time: str
    file: str
    rows: int
    first: str
    last: str
    dropped: dict[str, str]


@dataclass
class Manifest:
    """`manifest.json`: `run`, the latest; `tickers`, all that have a file; `failures` of the latest run, in words."""

    folder: Path
    run: dict = field(default_factory=dict)
    tickers: dict[str, Entry] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / "manifest.json"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The tickers that a folder has, without those whose files are gone.

        Raises:
            ValueError: the folder's manifest is none.
        """
        manifest = cls(folder)
        if manifest.path.exists():
            try:
                entries = json.loads(manifest.path.read_text(encoding="utf-8"))["tickers"]
                manifest.tickers = {ticker: Entry(**entry) for ticker, entry in entries.items()}
                parse_tickers(",".join(["ANY", *entries]))
                missing = [ticker for ticker in entries if not manifest.file(ticker).is_file()]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{manifest.path} is not a manifest of downloads: {error}") from error
            for ticker in missing:
                del manifest.tickers[ticker]
        return manifest

    def write(self) -> None:
        content = {"run": self.run}
        content |= {name: dict(sorted(getattr(self, name).items())) for name in ("tickers", "failures")}
        text = json.dumps(content, indent=2, ensure_ascii=False, default=asdict) + "\n"
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def file(self, ticker: str) -> Path:
        """The ticker's file, in its own folder whatever the manifest says."""
        return self.folder / "price_history" / ticker / Path(self.tickers[ticker].file).name

    def replace(self, ticker: str, entry: Entry) -> None:
        """Lists a ticker's new file and then deletes the one before: at any moment one of them is whole and listed."""
        old = self.file(ticker) if ticker in self.tickers else None
        self.tickers[ticker] = entry
        self.write()
        if old is not None and old != self.file(ticker):
            old.unlink(missing_ok=True)

    def bars(self, ticker: str) -> pd.DataFrame:
        return read_prices(self.file(ticker))


def sweep(folder: Path) -> None:
    """Deletes what a killed run left half-written; see `write_atomically`."""
    for path in [*folder.glob(".*"), *folder.glob("price_history/*/.*")]:
        if HALF_WRITTEN.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_bars(table: pd.DataFrame, path: Path) -> None:
    """Writes one ticker's bars in the layout of Yahoo files; see `read_prices`."""
    whole = (table["volume"] % 1 == 0).all()  # coins have fractions
    volume = table["volume"].astype("int64") if whole else table["volume"]
    frame = table.assign(volume=volume, date=table["date"].dt.strftime("%Y-%m-%d"))[FILE_COLUMNS]
    write_atomically(path, partial(frame.set_axis(FILE_HEADER, axis=1).to_csv, index=False))


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What is wanted of every ticker: the days from `start` to `end`, without `end` all that are finished."""

    source: str
    start: pd.Timestamp
    end: pd.Timestamp | None = None
    calendar: str = "XNYS"

    @property
    def texts(self) -> dict[str, str | None]:
        """The order as the manifest has it."""
        end = None if self.end is None else f"{self.end:%Y-%m-%d}"
        return {"source": self.source, "start": f"{self.start:%Y-%m-%d}", "end": end}


@dataclass
class Report:
    """What became of the tickers: new files, files left as they were, failures in words, and bars left out."""

    written: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def download(
    tickers: Sequence[str],
    folder: str | Path,
    order: Order,
    *,
    update: bool = False,
    patience: Patience | None = None,
    universe: dict | None = None,
    progress: bool = True,
) -> Report:
    """Downloads tickers into `folder`, which `read_prices` then reads.

    Writes `price_history/TICKER/TICKER_yahoo_YYYYMMDD.csv` (the layout's name, whatever the source), `manifest.json`
    after every ticker, and at the end `prices.parquet`, one table of all tickers of the manifest; each at once or not
    at all. A ticker whose file answers the order is left alone, so that a run that was cut off goes on where it was.

    Args:
        tickers: see `parse_tickers`.
        folder: created if it is missing.
        order: what is wanted.
        update: whether to append, to files that answer the order, the days since. Where prices of days that a file
            has already were changed, as every dividend and split does, the file is downloaded anew.
        patience: how the provider is asked.
        universe: where the tickers come from, for the manifest; see `read_universe`.
        progress: whether to show a progress bar.

    Raises:
        ValueError: no ticker can meet the order.
        OSError: a path cannot be read or written.
    """
    run = _Run(Path(folder), order, update, patience or Patience())
    run.manifest.run["universe"] = universe and {name: universe[name] for name in ("name", "as_of", "note")}
    tickers = parse_tickers(",".join(tickers))
    for _ in tqdm(run.finish_all(tickers), "downloading", len(tickers), unit="ticker", disable=not progress):
        pass
    run.manifest.write()
    if run.manifest.tickers:
        table = pd.concat([run.manifest.bars(ticker) for ticker in sorted(run.manifest.tickers)], ignore_index=True)
        write_table(table, run.manifest.folder / "prices.parquet")
    return run.report


class _Run:
    def __init__(self, folder: Path, order: Order, update: bool, patience: Patience):
        self.order, self.update, self.patience = order, update, patience
        self.source = open_source(order.source)
        self.throttle = Throttle(patience.rate)
        self.now = utc_now()
        self.newest = {name: newest_session(name, self.now) for name in (order.calendar, "24/7")}
        if order.end is not None and order.end < order.start:
            raise ValueError(f"the end {order.end.date()} is before the start {order.start.date()}")
        if order.start > max(self.newest.values()):
            raise ValueError(f"the start {order.start.date()} is after the newest finished day")
        self.manifest, self.report = Manifest.read(folder), Report()
        sweep(folder)
        self.manifest.run = {**order.texts, "calendar": order.calendar, "update": update, "time": _text(self.now)}

    def finish_all(self, tickers: list[str]) -> Iterator[str]:
        """Yields each ticker when it is dealt with, batch by batch."""
        waiting, in_a_row = tickers, 0
        with ThreadPoolExecutor(self.patience.batch_size) as pool, closing(self.throttle):
            while waiting and in_a_row < GIVE_UP_AFTER:
                batch, waiting = waiting[: self.patience.batch_size], waiting[self.patience.batch_size :]
                asked = {pool.submit(self.finish, ticker): ticker for ticker in batch}
                for answered in as_completed(asked):
                    outcome, ticker = answered.result(), asked[answered]
                    self.record(ticker, outcome)
                    in_a_row = in_a_row + 1 if getattr(outcome, "exhausted", False) else 0
                    yield ticker
        for ticker in waiting:
            self.record(ticker, FailedError(f"not tried, after {in_a_row} tickers in a row without an answer"))
            yield ticker

    def record(self, ticker: str, outcome: Entry | FailedError | None) -> None:
        if isinstance(outcome, FailedError):
            self.report.failures[ticker] = self.manifest.failures[ticker] = str(outcome)
        elif outcome is None:
            self.report.unchanged.append(ticker)
        else:
            self.manifest.replace(ticker, outcome)
            self.report.written.append(ticker)
            self.report.dropped += [f"{ticker} {day}: {why}" for day, why in outcome.dropped.items()]

    def finish(self, ticker: str) -> Entry | FailedError | None:
        """Gets and writes a ticker's bars; None if its file has them all."""
        entry, wanted = self.manifest.tickers.get(ticker), self.order.texts
        answers = entry is not None and (entry.source, entry.start) == (wanted["source"], wanted["start"])
        if answers and not self.update and entry.end == wanted["end"]:
            return None
        newest = self.newest[calendar_of(ticker, self.order.calendar)]
        end = newest if self.order.end is None else min(self.order.end, newest)
        try:
            if answers and self.update:
                return self.append(ticker, entry, end)
            return self.write(ticker, *self.get(ticker, self.order.start, end))
        except FailedError as error:
            return error

    def append(self, ticker: str, entry: Entry, end: pd.Timestamp) -> Entry | None:
        last = pd.Timestamp(entry.last)
        if end <= last:
            return None
        try:
            known = self.manifest.bars(ticker)
        except ValueError:  # damaged
            return self.write(ticker, *self.get(ticker, self.order.start, end))
        start = max(self.order.start, last - OVERLAP)
        new, dropped = self.get(ticker, start, end)
        if not _agree(known[known["date"] >= start], new[new["date"] <= last]):
            # Not rescaled: a factor measured on rounded prices is not exact, a split changes volumes too, and to a
            # provider the whole history is one request as well.
            return self.write(ticker, *self.get(ticker, self.order.start, end))
        if new["date"].iloc[-1] == last:
            return None
        older = {day: complaint for day, complaint in entry.dropped.items() if day < f"{start:%Y-%m-%d}"}
        return self.write(ticker, pd.concat([known[known["date"] < start], new]), older | dropped)

    def get(self, ticker: str, start: pd.Timestamp, end: pd.Timestamp) -> tuple[pd.DataFrame, dict[str, str]]:
        if end < start:
            raise FailedError(f"no trading day since {start.date()} is finished")
        bars = ask(self.source, ticker, start, end, self.patience, self.throttle)
        try:
            return clean(bars, ticker, start, end)
        except ValueError as error:
            raise FailedError(str(error).removeprefix(f"{ticker}: ")) from error

    def write(self, ticker: str, table: pd.DataFrame, dropped: dict[str, str]) -> Entry:
        file = Path("price_history", ticker, f"{ticker}_yahoo_{self.now:%Y%m%d}.csv")
        write_bars(table, self.manifest.folder / file)
        first, last = (f"{day:%Y-%m-%d}" for day in table["date"].iloc[[0, -1]])
        return Entry(
            **self.order.texts,
            time=_text(utc_now()),
            file=file.as_posix(),
            rows=len(table),
            first=first,
            last=last,
            dropped=dropped,
        )


def _agree(known: pd.DataFrame, new: pd.DataFrame) -> bool:
    """Whether two tables have the same days at the same prices."""
    return known["date"].tolist() == new["date"].tolist() and np.allclose(
        known[PRICE_COLUMNS], new[PRICE_COLUMNS], rtol=SAME_PRICE, atol=0
    )


def utc_now() -> pd.Timestamp:
    return pd.Timestamp.now("UTC")


def _text(time: pd.Timestamp) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
