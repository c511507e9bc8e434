"""A stand-in for Yahoo on 127.0.0.1: the chart endpoint's JSON, adjusted as Yahoo adjusts, and its troubles."""

import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pandas as pd
from curl_cffi.requests import Session

PRICES = ["open", "high", "low", "close"]
NOT_FOUND = {"code": "Not Found", "description": "No data found, symbol may be delisted"}
META = {
    "currency": "USD",
    "exchangeName": "NYQ",
    "instrumentType": "EQUITY",
    "gmtoffset": -18000,
    "timezone": "EST",
    "exchangeTimezoneName": "America/New_York",
    "priceHint": 2,
    "dataGranularity": "1d",
    "validRanges": ["1d", "5d", "1mo", "max"],
}


@dataclass
class Listing:
    """A share as it was traded: raw bars (index: days), and dividends and split ratios by ex-date."""

    bars: pd.DataFrame
    dividends: dict[pd.Timestamp, float] = field(default_factory=dict)
    splits: dict[pd.Timestamp, float] = field(default_factory=dict)

    def as_of(self, today: pd.Timestamp) -> pd.DataFrame:
        """Bars until `today`, split-adjusted, with `adj_close`; rounded to float32 as Yahoo's are."""
        bars = self.bars.loc[:today]
        days, prices, volume = (
            bars.index,
            bars[PRICES].to_numpy("float64", copy=True),
            bars["volume"].to_numpy("float64"),
        )
        factor = np.ones(len(bars))
        for day, amount in self.dividends.items():
            if days[0] < day <= today:
                factor[days < day] *= 1 - amount / bars["close"].to_numpy()[days < day][-1]
        for day, ratio in self.splits.items():
            if day <= today:
                prices[days < day] /= ratio
                volume = np.where(days < day, volume * ratio, volume)
        prices = np.column_stack([prices, prices[:, -1] * factor]).astype("float32").astype("float64")
        return pd.DataFrame(prices, days, [*PRICES, "adj_close"]).assign(volume=volume.round())


Trouble = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, body: str = "", **headers: str) -> Trouble:
    return lambda handler: handler.reply(code, body, {name.replace("_", "-"): text for name, text in headers.items()})


def fine(handler: BaseHTTPRequestHandler) -> None:
    handler.reply(200, handler.chart())


def truncated(handler: BaseHTTPRequestHandler) -> None:
    """JSON that ends in the middle, of the length that the header says."""
    handler.reply(200, handler.chart()[:-400])


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    """A connection that ends before the length that the header says."""
    handler.reply(200, handler.chart()[:-400], {"Content-Length": str(len(handler.chart()))})
    handler.close_connection = True


def hanging(handler: BaseHTTPRequestHandler) -> None:
    handler.server.released.wait(10)
    handler.close_connection = True


class YahooServer(ThreadingHTTPServer):
    """Answers for `listings` as of `today`; `troubles[ticker]` are what its next chart requests meet instead.

    `rewrite` may change the rows of an answer; `delay` is waited before each.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def reset(self) -> None:
        self.listings: dict[str, Listing] = {}
        self.today = pd.Timestamp("2024-06-28")
        self.troubles = defaultdict(deque)
        self.rewrite = lambda rows: rows
        self.delay = 0.0
        self.asked: list[tuple[float, str]] = []
        self.released = threading.Event()

    def charts(self, ticker: str | None = None) -> list[float]:
        """Times of the chart requests, of one ticker or of all."""
        return [moment for moment, path in self.asked if path.startswith(f"/v8/finance/chart/{ticker or ''}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append((time.monotonic(), path))
        if not path.startswith("/v8/finance/chart/"):
            return self.reply(*{"/v1/test/getcrumb": (200, "a.crumb")}.get(path, (404, "")))
        self.ticker = unquote(path.rsplit("/", 1)[1])
        time.sleep(self.server.delay)
        if self.server.troubles[self.ticker]:
            return self.server.troubles[self.ticker].popleft()(self)
        if self.ticker not in self.server.listings:
            return self.reply(404, json.dumps({"chart": {"result": None, "error": NOT_FOUND}}))
        return self.reply(200, self.chart())

    def reply(self, code: int, body: str, headers: dict[str, str] | None = None) -> None:
        content = body.encode()
        self.send_response(code)
        for name, text in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def chart(self) -> str:
        listing = self.server.listings[self.ticker]
        rows = listing.as_of(self.server.today).reset_index(names="day")
        rows["timestamp"] = seconds(rows["day"] + pd.Timedelta(hours=9, minutes=30))
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        if "period1" in query:
            rows = rows[rows["timestamp"].between(int(query["period1"]), int(query["period2"]) - 1)]
        else:
            rows = rows.tail(1)
        rows = self.server.rewrite(rows)
        result = {"meta": META | {"symbol": self.ticker}, "indicators": {"quote": [{}], "adjclose": [{}]}}
        if len(rows):
            result["timestamp"] = rows["timestamp"].tolist()
            result["indicators"] = {
                "quote": [{column: nullable(rows[column]) for column in [*PRICES, "volume"]}],
                "adjclose": [{"adjclose": nullable(rows["adj_close"])}],
            }
            result["events"] = self.events(listing, rows)
        return json.dumps({"chart": {"result": [result], "error": None}})

    def events(self, listing: Listing, rows: pd.DataFrame) -> dict:
        stamps = dict(zip(rows["day"], rows["timestamp"], strict=True))
        dividends = {stamps[day]: amount for day, amount in listing.dividends.items() if day in stamps}
        splits = {stamps[day]: ratio for day, ratio in listing.splits.items() if day in stamps}
        return {
            "dividends": {str(stamp): {"amount": amount, "date": stamp} for stamp, amount in dividends.items()},
            "splits": {str(at): {"date": at, "numerator": ratio, "denominator": 1} for at, ratio in splits.items()},
        }


def seconds(times: pd.Series) -> pd.Series:
    """Unix time of local times in New York."""
    return times.dt.tz_localize("America/New_York").dt.tz_convert(None).astype("datetime64[s]").astype("int64")


def nullable(column: pd.Series) -> list:
    whole = column.name == "volume"
    return [None if np.isnan(value) else int(value) if whole else value for value in column]


def redirect(port: int, patch: Callable = setattr) -> None:
    """Sends what would go to Yahoo to the stand-in, and nothing to anywhere else."""
    send = Session.request

    def request(self, method, url, **options):
        parts = urlsplit(url)
        assert parts.hostname.endswith(".yahoo.com"), url
        here = parts._replace(scheme="http", netloc=f"127.0.0.1:{port}").geturl()
        return send(self, method, here, **options)

    patch(Session, "request", request)
