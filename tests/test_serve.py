"""The server: the same forecasts as the pipeline's whoever else asks, and a sentence for whatever is wrong."""

import asyncio
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from conftest import make_market
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from spaceexploreai.benchmarks.serve import make_requests, take_turn
from spaceexploreai.data.prices import read_sample, write_table
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.pipeline_spaceexplore import Forecast, SpaceExplorePipeline
from spaceexploreai.scripts.forecast import forecast_newest
from spaceexploreai.scripts.forecasters import load_checkpoint, load_pipeline
from spaceexploreai.scripts.serve import (
    CODES,
    HEADERS,
    Limits,
    RateLimit,
    RefusalError,
    check_depth,
    load_models,
    main,
    make_app,
    make_server,
)
from spaceexploreai.scripts.service import Batcher, ForecastRequest, ForecastService, QueryError

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits(max_bars=300, max_body_mb=0.25, rate_limit=0, timeout_s=20)
COLUMNS = ("open", "high", "low", "close", "volume")


@pytest.fixture(scope="module")
def pipes(checkpoint, classifier, language_model) -> dict[str, SpaceExplorePipeline]:
    return load_models([f"prices={checkpoint}", f"classes={classifier}", f"paths={language_model}"], "cpu")


@pytest.fixture(scope="module")
def service(pipes) -> ForecastService:
    return ForecastService(pipes, read_sample())


@pytest.fixture(scope="module")
def bars() -> dict:
    """A request's form of 120 bars."""
    table = read_sample(["IBM"]).tail(120)
    return table.assign(date=table["date"].dt.strftime("%Y-%m-%d")).to_dict("list") | {"ticker": "MINE"}


@contextmanager
def serving(app):
    """A client of the application on a port of its own; the server is told to end at the end."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        address = f"http://127.0.0.1:{door.getsockname()[1]}"
        try:
            with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def client(service):
    with serving(make_app(service, Batcher(service.answer, max_wait=0.05), LIMITS)) as client:
        yield client


def answering(service, answer, limits=LIMITS, token=None, origins=None, **options):
    """A server whose worker does as it is told."""
    return serving(make_app(service, Batcher(answer, max_wait=0, **options), limits, token, origins))


def ask(client, **request) -> httpx.Response:
    return client.post("/v1/forecast", json=request)


def problem_of(answer: httpx.Response, *statuses: int) -> str:
    """The sentence of an error, which is one, and of these codes."""
    assert answer.status_code in statuses, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "field"}
    assert error["code"] == CODES[answer.status_code]
    message = error["message"]
    assert 8 < len(message) <= 300
    assert "\n" not in message
    assert not re.search(r"Traceback|File \"|\.py", message)
    return message


def metrics_of(client) -> dict[tuple, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


# --- forecasts -------------------------------------------------------------------------------------------------------


def assert_same(found: dict, expected: pd.DataFrame | Forecast, ticker: str) -> None:
    """What the server says of a ticker is what the pipeline does."""
    table, paths = expected if isinstance(expected, Forecast) else (expected, None)
    own = table[table["ticker"] == ticker]
    assert found["ticker"] == ticker
    assert found["cutoff"] == f"{own['cutoff'].iloc[0]:%Y-%m-%d}"
    assert found["dates"] == own["date"].dt.strftime("%Y-%m-%d").tolist()
    assert found["horizons"] == own["horizon"].tolist()
    forecast = dict(found["forecast"])
    columns = {f"q{level}": numbers for level, numbers in forecast.pop("quantiles", {}).items()} | forecast
    columns |= {"band": found["band"]} if "band" in found else {}
    values = own.drop(columns=["ticker", "cutoff", "date", "horizon"])
    assert set(columns) == set(values)
    for name, numbers in columns.items():
        np.testing.assert_allclose(numbers, values[name], rtol=1e-5)
    assert ("paths" in found) == (paths is not None)
    if paths is not None:
        own = paths[paths["ticker"] == ticker]
        assert found["paths"]["dates"] == own["date"].dt.strftime("%Y-%m-%d").unique().tolist()
        np.testing.assert_allclose(np.ravel(found["paths"]["closes"]), own["close"], rtol=1e-5)


OPTIONS = [
    {},
    {"unit": "log_return"},
    {"prediction_length": 4, "quantile_levels": [0.05, 0.125, 0.5]},
    {"num_samples": 3, "seed": 5, "as_of": "2012-10-31"},
]


@pytest.mark.parametrize("model", ["prices", "paths"])
@pytest.mark.parametrize("options", OPTIONS)
def test_forecasts_are_those_of_the_pipeline(client, pipes, model, options):
    answer = ask(client, model=model, tickers=["MSFT", "AAPL"], baselines=False, **options)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    expected = pipes[model](read_sample(["AAPL", "MSFT"]), **options)
    for ticker, found in zip(["MSFT", "AAPL"], body["forecasts"], strict=True):  # in the order asked for
        assert "ewma" not in found
        assert_same(found, expected, ticker)
    assert (body["model"], body["unit"]) == (model, options.get("unit", "price"))
    assert body["train_cutoff"] == pipes[model].model.config.train_cutoff
    assert "no investment advice" in body["disclaimer"]


def test_bars_in_the_request_are_forecast_as_a_table_is(client, pipes, bars):
    table = pd.DataFrame(bars).astype({"date": "datetime64[ns]"})
    for model, pipe in pipes.items():
        (found,) = ask(client, model=model, bars=bars).json()["forecasts"]
        assert_same(found, pipe(table), "MINE")
        assert found["close"] == bars["close"][-1]
    (unnamed,) = ask(client, bars={name: column for name, column in bars.items() if name != "ticker"}).json()[
        "forecasts"
    ]
    assert unnamed["ticker"] == "series"


def test_the_baseline_stands_beside(client, checkpoint, bars):
    """Of log-returns as `scripts/forecast.py` has it; in prices its exponential; of classes, by the band."""
    table = pd.DataFrame(bars).astype({"date": "datetime64[ns]"})
    expected = forecast_newest(load_pipeline(checkpoint), table).table
    (returns,) = ask(client, bars=bars, unit="log_return").json()["forecasts"]
    (prices,) = ask(client, bars=bars).json()["forecasts"]
    assert list(returns["ewma"]["quantiles"]) == [f"{step / 20:g}" for step in range(1, 20)]
    np.testing.assert_allclose(returns["ewma"]["mean"], expected["ewma_mean"])
    np.testing.assert_allclose(returns["ewma"]["p_up"], expected["ewma_p_up"])
    np.testing.assert_allclose(prices["ewma"]["p_up"], expected["ewma_p_up"])
    for level, numbers in returns["ewma"]["quantiles"].items():
        np.testing.assert_allclose(numbers, expected[f"ewma_q{level}"])
        np.testing.assert_allclose(
            np.log(np.array(prices["ewma"]["quantiles"][level]) / prices["close"]), numbers, atol=1e-12
        )
    (classes,) = ask(client, bars=bars, model="classes").json()["forecasts"]
    chances = np.array([classes["ewma"][name] for name in ("p_down", "p_flat", "p_up")])
    np.testing.assert_allclose(chances.sum(axis=0), 1)
    levels = [float(level) for level in returns["ewma"]["quantiles"]]
    for horizon, band in enumerate(classes["band"]):
        quantiles = [numbers[horizon] for numbers in returns["ewma"]["quantiles"].values()]
        assert chances[2, horizon] == pytest.approx(1 - np.interp(band, quantiles, levels))
        assert chances[0, horizon] == pytest.approx(np.interp(-band, quantiles, levels))


POOL = [
    {"tickers": ["AAPL"]},
    {"tickers": ["IBM", "GOOG"]},
    {"tickers": ["AAPL"], "num_samples": 2, "seed": 1},
    {"tickers": ["MSFT"], "num_samples": 2, "seed": 2},
    {"tickers": ["FB"], "as_of": "2012-12-31"},
    {"tickers": ["FB"], "as_of": "2012-06-01"},  # too few bars
    {"tickers": ["IBM"], "prediction_length": 99},  # more than the model knows
    {"model": "classes", "tickers": ["MSFT"]},
    {"model": "classes", "tickers": ["MSFT"], "unit": "price"},  # a classification takes none
    {"model": "paths", "tickers": ["AAPL", "MSFT"], "num_samples": 4},
]


@pytest.fixture(scope="module")
def alone(service) -> list:
    """What each of the pool is answered by itself."""
    return [service.answer([service.query(ForecastRequest.model_validate_json(json.dumps(one)))])[0] for one in POOL]


@settings(max_examples=8, deadline=None)
@given(places=st.lists(st.integers(0, len(POOL) - 1), min_size=1, max_size=12), size=st.integers(1, 5))
def test_no_query_changes_the_answer_to_another(pipes, alone, places, size):
    service = ForecastService(pipes, read_sample(), batch_size=size)
    asked = [service.query(ForecastRequest.model_validate_json(json.dumps(POOL[place]))) for place in places]
    for place, answer in zip(places, service.answer(asked), strict=True):
        if isinstance(alone[place], QueryError):
            assert isinstance(answer, QueryError)
            assert str(answer) == str(alone[place])
        else:
            assert_close(json.loads(answer), json.loads(alone[place]))


def assert_close(one, other) -> None:
    if isinstance(one, dict | list):
        assert type(one) is type(other)
        assert len(one) == len(other)
        pairs = [(one[key], other[key]) for key in one] if isinstance(one, dict) else zip(one, other, strict=True)
        for ours, theirs in pairs:
            assert_close(ours, theirs)
    else:
        assert one == (pytest.approx(other, rel=1e-5) if isinstance(one, float) else other)


def test_the_pool_has_answers_and_refusals(alone):
    assert sum(isinstance(one, QueryError) for one in alone) == 3
    assert all(isinstance(one, bytes | QueryError) for one in alone)


def test_clients_at_once_are_answered_together(client):
    before = metrics_of(client)
    tickers = ["AAPL", "GOOG", "IBM", "MSFT"]
    with ThreadPoolExecutor(16) as threads:
        asked = [tickers[place % 4] for place in range(32)]
        answers = list(threads.map(lambda ticker: ask(client, tickers=[ticker]), asked))
    assert [answer.json()["forecasts"][0]["ticker"] for answer in answers] == asked
    after = metrics_of(client)
    batches = after["spaceexplore_batch_requests_count",] - before["spaceexplore_batch_requests_count",]
    requests = after["spaceexplore_batch_requests_sum",] - before["spaceexplore_batch_requests_sum",]
    assert requests == 32
    assert batches < 16


def test_a_model_that_compares_tickers_sees_all_that_are_asked_for(checkpoint):
    model, _ = load_checkpoint(checkpoint)
    prices = make_market(tickers=12, days=150)
    extractor = SpaceExploreFeatureExtractor(["return_lag_1", "volatility_rank"], context_length=64)
    extractor.fit(extractor.compute_features(prices))
    config = type(model.config)(**model.config.to_dict() | {"num_features": 2})
    pipe = SpaceExplorePipeline(model=type(model)(config), feature_extractor=extractor, device="cpu")
    service = ForecastService({"m": pipe}, prices)
    asked = [f"T{place}" for place in (7, 0, 3, 5, 2, 9, 1, 4, 6, 8)]
    found = json.loads(service.answer([service.query(ForecastRequest(tickers=asked))])[0])["forecasts"]
    assert np.isfinite(next(iter(pipe.preprocess(prices)))["past_values"][0, -1].numpy()).all()
    expected = pipe(prices[prices["ticker"].isin(asked)])
    for ticker, one in zip(asked, found, strict=True):
        assert_same(one, expected, ticker)


def test_a_forecast_beyond_all_numbers_is_no_forecast(service, pipes, monkeypatch):
    """JSON has no infinity. Nobody else's is lost."""
    forecast = pipes["prices"].postprocess

    def postprocess(outputs, **options):
        table = forecast(outputs, **options)
        table.loc[table["ticker"] == "IBM", "q0.95"] = math.inf
        return table

    monkeypatch.setattr(pipes["prices"], "postprocess", postprocess)
    asked = [service.query(ForecastRequest(tickers=[ticker])) for ticker in ("IBM", "AAPL")]
    refused, answer = service.answer(asked)
    assert isinstance(refused, QueryError)
    assert str(refused) == "IBM 2013-03-01: the forecast is beyond all numbers"
    assert json.loads(answer)["forecasts"][0]["ticker"] == "AAPL"


# --- what is beside --------------------------------------------------------------------------------------------------


def test_models_says_what_can_be_asked_for(client, pipes):
    body = client.get("/v1/models").json()
    assert [one["name"] for one in body["models"]] == ["prices", "classes", "paths"]
    assert [one["head"] for one in body["models"]] == ["regression", "classification", "causal_lm"]
    for one, pipe in zip(body["models"], pipes.values(), strict=True):
        assert one["horizons"] == [1, 2, 5, 10]
        assert one["min_history"] == 84
        assert one["train_cutoff"] == pipe.model.config.train_cutoff
    assert body["prices"]["tickers"] == ["AAPL", "FB", "GOOG", "IBM", "MSFT"]
    assert body["prices"]["end"] == "2013-03-01"
    assert body["limits"]["max_bars"] == 300


def test_health_is_of_the_worker(service):
    batcher = Batcher(service.answer)
    with serving(make_app(service, batcher, LIMITS)) as client:
        assert client.get("/health").json() == {"status": "ready"}
        batcher.task.get_loop().call_soon_threadsafe(batcher.task.cancel)
        deadline = time.monotonic() + 5
        while batcher.ready and time.monotonic() < deadline:
            time.sleep(0.01)
        assert problem_of(client.get("/health"), 503) == "the worker does not run"


def test_no_label_of_a_metric_is_what_a_client_sent(client):
    before = metrics_of(client).get(("spaceexplore_requests_total", "404", "other"), 0)
    for path in ("/evil-path", "/v1/forecast/x", "/v1/%00", "/../../secret"):
        problem_of(client.get(path), 404)
    problem_of(client.request("EVIL", "/v1/forecast"), 405)
    text = client.get("/metrics").text
    assert not re.search("evil|secret|%00|EVIL", text)
    assert metrics_of(client)["spaceexplore_requests_total", "404", "other"] == before + 4
    assert metrics_of(client)["spaceexplore_queue_requests",] == 0


def test_every_example_of_the_description_works(client):
    content = client.get("/openapi.json").json()["paths"]["/v1/forecast"]["post"]["requestBody"]["content"]
    examples = content["application/json"]["examples"]
    assert set(examples) == {"tickers", "bars"}
    for example in examples.values():
        assert len(ask(client, **example["value"]).json()["forecasts"]) == 1


def test_nothing_is_loaded_from_elsewhere_and_browsers_are_told_to_be_careful(client):
    for path in ("/docs", "/redoc"):
        problem_of(client.get(path), 404)
    for answer in (client.get("/health"), client.get("/absent"), ask(client, tickers=["AAPL"])):
        for name, value in HEADERS:
            assert answer.headers[name] == value


# --- what a user or an enemy may send --------------------------------------------------------------------------------


def patched(bars: dict, **columns) -> dict:
    return {"bars": bars | columns}


def with_last(bars: dict, column: str, value) -> dict:
    return patched(bars, **{column: [*bars[column][:-1], value]})


def hostile_bars(bars: dict) -> dict[str, dict]:
    """Requests with bars that cannot be."""
    values = {"NaN": math.nan, "Infinity": -math.inf, "text": "1.5", "null": None, "negative": -1.0, "list": [1.0]}
    values |= {"huge": 1e308, "true": True}
    requests = {
        f"{name} as {column}": with_last(bars, column, value) for column in COLUMNS for name, value in values.items()
    }
    requests |= {f"zero as {column}": with_last(bars, column, 0) for column in COLUMNS[:4]}
    days = [
        "2013-02-30",
        "9999-12-31",
        "0001-01-01",
        "1969-12-31",
        "yesterday",
        20130301,
        None,
        "",
        "2013-03-01T00:00:00+25:00",
    ]
    requests |= {f"{day!r} as date": with_last(bars, "date", day) for day in days}
    requests |= {
        f"no {column}": {"bars": {n: c for n, c in bars.items() if n != column}} for column in ("date", *COLUMNS)
    }
    path = "../../etc/passwd"
    return requests | {
        "one close less": patched(bars, close=bars["close"][1:]),
        "newest first": patched(bars, **{name: bars[name][::-1] for name in ("date", *COLUMNS)}),
        "a day twice": with_last(bars, "date", bars["date"][-2]),
        "high below low": with_last(bars, "high", 0.01),
        "too few": patched(bars, **{name: bars[name][:10] for name in ("date", *COLUMNS)}),
        "none": patched(bars, **{name: [] for name in ("date", *COLUMNS)}),
        "too many": patched(bars, **{name: bars[name] * 3 for name in ("date", *COLUMNS)}),
        "a path as ticker": patched(bars, ticker=path),
        "a number as ticker": patched(bars, ticker=5),
        "a column more": patched(bars, adj_close=bars["close"]),
        "records": {"bars": [{"date": "2013-03-01", "close": 1.0}]},
        "a path as bars": {"bars": path},
    }


def hostile_options() -> dict[str, dict]:
    """Requests for a stored ticker with options that cannot be."""
    options = {
        "model": ["../prices", "/etc", "os.system", "nobody/model", "", 1, None, ["prices"], "x" * 1000],
        "prediction_length": [0, -1, 11, 10**9, 10**30, 1.5, "5", True, [5], math.nan],
        "num_samples": [0, -5, 1001, 1e9, "all"],
        "seed": [-1, 2**64, 0.5, "0"],
        "quantile_levels": [
            [],
            [0],
            [1],
            [-0.5],
            [0.5, 0.5],
            [0.9, 0.1],
            [0.01],
            ["0.5"],
            [math.nan],
            0.5,
            [0.5] * 100,
            [0.123456789],
            {"0": 0.5},
        ],
        "unit": ["euro", 1, "", ["price"]],
        "as_of": ["someday", 5, "1970-01-02", "2999-01-01", ["2013-01-02"]],
        "baselines": ["yes", 1, "__import__('os')"],
        "device": ["cuda"],
        "trust_remote_code": [True],
        "__class__": ["x"],
        "x" * 500: [1],
    }
    return {
        f"{name[:20]} {str(value)[:40]}": {"tickers": ["AAPL"], name: value}
        for name, values in options.items()
        for value in values
    }


def hostile_tickers() -> dict[str, dict]:
    lists = [[], "AAPL", [""], [" "], ["AAPL\n"], ["\0"], ["../../etc/passwd"], ["C:\\x"], ["file:///x"], ["AAPL"] * 2]
    lists += [
        ["NOPE"],
        [None],
        [1],
        [["AAPL"]],
        [f"T{place}" for place in range(33)],
        ["A" * 100],
        {"AAPL": 1},
        None,
        ["\ud800"],
    ]
    return {f"tickers {str(one)[:30]!r}": {"tickers": one} for one in lists} | {
        "nothing": {},
        "two sources": {"tickers": ["AAPL"], "bars": {}},
        "too many paths": {"tickers": ["AAPL", "IBM"], "num_samples": 501},
    }


BODIES = {
    "empty": b"",
    "cut": b'{"tickers": ["AAPL"',
    "null": b"null",
    "number": b"5",
    "text": b'"AAPL"',
    "list": b"[]",
    "more after it": b'{"tickers": ["AAPL"]} x',
    "no unicode": b'{"tickers": ["\xff\xfe"]}',
    "UTF-16": '{"tickers": ["AAPL"]}'.encode("utf-16"),
    "single quotes": b"{'tickers': ['AAPL']}",
    "deep lists": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"bars":' * 20_000 + b"1" + b"}" * 20_000,
    "unbalanced": b"[" * 200_000,
    "too deep for the form": b'{"tickers": [["AAPL", [1]]]}',
    "a number of digits": b'{"tickers": ["AAPL"], "seed": ' + b"9" * 100_000 + b"}",
    "a number beyond all": b'{"tickers": ["AAPL"], "quantile_levels": [1e999]}',
    "NaN": b'{"tickers": NaN}',
    "white space": b" " * 300_000,
    "binary": bytes(range(256)) * 10,
}


def test_a_hundred_hostile_requests_get_a_sentence(client, bars):
    requests = hostile_bars(bars) | hostile_options() | hostile_tickers()
    bodies = {name: json.dumps(request).encode() for name, request in requests.items()} | BODIES
    assert len(bodies) > 150
    accepted = {}
    for name, body in bodies.items():
        answer = client.post("/v1/forecast", content=body, headers={"content-type": "application/json"})
        if not 400 <= answer.status_code < 500:
            accepted[name] = answer.text[:200]
        else:
            problem_of(answer, 400, 404, 413, 422)
    assert accepted == {}
    assert ask(client, tickers=["AAPL"]).status_code == 200


SENTENCES = [
    ({"tickers": ["NOPE"]}, 404, "tickers", "there are no prices of 'NOPE'; /v1/models lists the tickers"),
    ({"tickers": ["AAPL"], "model": "x"}, 404, "model", "there is no model 'x'; /v1/models lists them"),
    ({}, 422, None, "give one of tickers and bars"),
    ({"tickers": ["AAPL"], "seed": "1"}, 422, "seed", "seed: Input should be a valid integer"),
    ({"tickers": ["AAPL"], "sed": 1}, 422, "sed", "sed: Extra inputs are not permitted"),
    ({"tickers": ["FB"], "as_of": "2012-06-01"}, 422, None, "FB has 10 bars up to 2012-06-01; a forecast needs 84 "),
    ({"tickers": ["AAPL"], "quantile_levels": [0.01]}, 422, None, "quantile level 0.01 is not within 0.05 and 0.95"),
    ({"model": "classes", "tickers": ["AAPL"], "num_samples": 2}, 422, None, "takes no num_samples, got 2"),
]


@pytest.mark.parametrize(("request_", "status", "field", "sentence"), SENTENCES)
def test_the_sentence_says_what_is_wrong(client, request_, status, field, sentence):
    answer = ask(client, **request_)
    assert sentence in problem_of(answer, status)
    assert answer.json()["error"]["field"] == field


def test_bars_that_cannot_be_are_named(client, bars):
    answer = ask(client, **with_last(bars, "high", 0.01))
    assert re.match("MINE 2013-03-01: high 0.01 is below the low of", problem_of(answer, 422))
    answer = ask(client, **with_last(bars, "close", -1))
    assert answer.json()["error"]["field"] == "bars.close.119"


def depth_of(value) -> int:
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth_of, inner), default=0) if isinstance(value, dict | list) else 0


def nested(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)


@settings(max_examples=25, deadline=None)
@given(st.recursive(st.integers(), nested, max_leaves=12))
def test_the_depth_of_a_body_is_known_before_it_is_parsed(value):
    body = json.dumps(value).encode()
    if depth_of(value) > 3:
        with pytest.raises(RefusalError, match="nested deeper than 3"):
            check_depth(body)
    else:
        check_depth(body)


def test_a_deep_body_is_not_parsed(client):
    answer = client.post("/v1/forecast", content=BODIES["deep lists"], headers={"content-type": "application/json"})
    assert problem_of(answer, 400) == "brackets are nested deeper than 3 or do not match"


REQUEST = b"POST /v1/forecast HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def raw(client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)


def test_a_body_is_no_larger_than_allowed_whatever_it_says_of_itself(client):
    def parts():
        for _ in range(40):
            yield b" " * 10_000

    with raw(client) as lying:  # it is refused before any of it is read
        lying.sendall(REQUEST + b"Content-Length: 99999999999\r\n\r\n")
        assert lying.recv(100).startswith(b"HTTP/1.1 413 ")
    kind = {"content-type": "application/json"}
    answer = client.post("/v1/forecast", content=parts(), headers=kind)  # chunked, without a length
    assert "larger than 262,144 bytes" in problem_of(answer, 413)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/json5"])
def test_a_body_that_is_said_to_be_no_json_is_refused(client, kind):
    answer = client.post("/v1/forecast", content=b'{"tickers": ["AAPL"]}', headers={"content-type": kind})
    problem_of(answer, 415)


# --- time, numbers, tokens, other pages ------------------------------------------------------------------------------


def test_a_body_that_never_ends_is_given_up(service):
    with answering(service, service.answer, LIMITS._replace(timeout_s=0.2)) as client, raw(client) as slow:
        slow.sendall(REQUEST + b"Content-Length: 100\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


def test_what_takes_too_long_is_given_up_and_nobody_else(service):
    entered, leave, seen = threading.Event(), threading.Event(), []

    def answer(queries):
        seen.append([query.tickers for query in queries])
        entered.set()
        leave.wait(10)
        return [b'"answered"'] * len(queries)

    with answering(service, answer, LIMITS._replace(timeout_s=0.4)) as client, ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask, client, tickers=["AAPL"])
        assert entered.wait(5)
        second = threads.submit(ask, client, tickers=["IBM"])  # waits, and is never begun
        for one in (first, second):
            assert problem_of(one.result(), 504) == "no answer within 0.4 s"
        leave.set()
        assert ask(client, tickers=["MSFT"]).json() == "answered"
    assert seen == [[("AAPL",)], [("MSFT",)]]


def test_too_many_that_wait_are_sent_away(service):
    entered, leave = threading.Event(), threading.Event()

    def answer(queries):
        entered.set()
        leave.wait(10)
        return [b'"answered"'] * len(queries)

    with answering(service, answer, capacity=2, max_batch=1) as client, ThreadPoolExecutor(4) as threads:
        running = threads.submit(ask, client, tickers=["AAPL"])
        assert entered.wait(5)
        waiting = [threads.submit(ask, client, tickers=["AAPL"]) for _ in range(2)]
        deadline = time.monotonic() + 5
        while metrics_of(client)["spaceexplore_queue_requests",] < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = ask(client, tickers=["AAPL"])
        leave.set()
        assert problem_of(refused, 503) == "too many requests wait; try again"
        assert refused.headers["retry-after"] == "1"
        assert [one.result().status_code for one in (running, *waiting)] == [200] * 3


def test_what_runs_is_finished_when_the_server_ends(service):
    entered = threading.Event()

    def answer(queries):
        entered.set()
        time.sleep(0.5)
        return [b'"answered"'] * len(queries)

    with ThreadPoolExecutor(1) as threads:
        with answering(service, answer) as client:
            address = str(client.base_url)
            request = threads.submit(httpx.post, f"{address}/v1/forecast", json={"tickers": ["AAPL"]}, trust_env=False)
            assert entered.wait(5)
        assert request.result().json() == "answered"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health", trust_env=False)


@pytest.mark.parametrize("failure", [RuntimeError("secret path /x/model.py"), [RuntimeError("secret")]])
def test_a_failure_of_ours_is_not_shown_and_not_the_last_word(service, failure):
    failures = [failure]

    def answer(queries):
        if failures:
            one = failures.pop()
            if isinstance(one, list):
                return one
            raise one
        return [b'"answered"'] * len(queries)

    with answering(service, answer) as client:
        assert problem_of(ask(client, tickers=["AAPL"]), 500) == "the server failed; its log says why"
        assert ask(client, tickers=["AAPL"]).json() == "answered"
        assert metrics_of(client)["spaceexplore_requests_total", "500", "/v1/forecast"] == 1


def test_a_client_may_not_ask_too_often(service):
    with answering(service, service.answer, LIMITS._replace(rate_limit=3)) as client:
        assert [client.get("/v1/models").status_code for _ in range(3)] == [200] * 3
        refused = client.get("/v1/models", headers={"X-Forwarded-For": "1.2.3.4"})
        assert problem_of(refused, 429) == "more than 3 requests a minute"
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert client.get("/health").status_code == 200


def test_a_minute_later_a_client_may_ask_again(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limit = RateLimit(1)
    request = type("Request", (), {"client": type("Client", (), {"host": "::1"})})
    limit(request)
    now[0] += 59
    with pytest.raises(Exception, match="more than 1 requests a minute"):
        limit(request)
    now[0] += 1
    limit(request)


TOKENS = [
    None,
    "Bearer wrong",
    "Bearer",
    "Basic good-token",
    "good-token",
    "Bearer good-token2",
    "Bearer good-toke\xe9",
]


def test_where_there_is_a_token_all_must_have_it(service):
    paths = [("GET", "/v1/models"), ("POST", "/v1/forecast"), ("GET", "/metrics")]
    with answering(service, service.answer, token="good-token") as client:
        for method, path in paths:
            for given_ in TOKENS:
                headers = {} if given_ is None else {"Authorization": given_.encode("latin-1")}
                answer = client.request(method, path, headers=headers)
                problem_of(answer, 401)
                assert answer.headers["www-authenticate"] == "Bearer"
            answer = client.request(method, path, headers={"Authorization": "Bearer good-token"})
            assert answer.status_code == (415 if method == "POST" else 200)
        assert client.get("/health").status_code == 200
        schema = client.get("/openapi.json").json()
        assert schema["paths"]["/v1/forecast"]["post"]["security"] == [{"HTTPBearer": []}]


def test_other_pages_may_ask_only_where_they_are_named(client, service):
    preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    problem_of(client.options("/v1/forecast", headers=preflight), 405)
    answer = client.get("/health", headers=preflight)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    with answering(service, service.answer, origins=["https://page.example"]) as open_:
        answer = open_.options("/v1/forecast", headers=preflight)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert open_.options("/v1/forecast", headers=preflight | {"Origin": "https://evil.example"}).status_code == 400


# --- under load, and under test --------------------------------------------------------------------------------------


def test_fifty_clients_at_once_meet_no_error(client):
    turn = take_turn(str(client.base_url), make_requests("tickers", 40), clients=50, seconds=3)
    assert turn.errors == []
    assert len(turn.latencies) >= 50


def test_schemathesis_finds_nothing(client, tmp_path):
    """Beyond the schema are the rules of bars, such as that no low is above its close: refused by 422."""
    config = tmp_path / "schemathesis.toml"
    config.write_text('[checks.positive_data_acceptance]\nexpected-statuses = ["2xx", "404", "422"]\n')
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    options = ["--max-examples", "5", "--no-color", "--seed", "1"]
    command += [f"{client.base_url}/openapi.json", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"NO_PROXY": "*"})
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Tested: 4" in done.stdout


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_serves_and_ends_as_it_is_told(tmp_path, checkpoint):
    write_table(make_market(tickers=1, days=200), tmp_path / "prices.parquet")
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--model", f"mine={checkpoint}", "--port", "0"]
    command += ["--prices", str(tmp_path / "prices.parquet"), "--device", "cpu"]
    environment = os.environ | {"SPACEEXPLORE_TOKEN": "a-token"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        line = server.stdout.readline()
        found = re.fullmatch(r"serving mine at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, server.stderr.read()[-2000:] if server.poll() is not None else line
        headers = {"Authorization": "Bearer a-token"}
        with httpx.Client(base_url=found[1], headers=headers, timeout=60, trust_env=False) as client:
            assert ask(client, tickers=["T0"]).json()["model"] == "mine"
            assert client.get("/health", headers={"Host": "x"}).status_code == 200
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert "Traceback" not in server.stderr.read()


COMPLAINTS = [
    (
        ["--host", "0.0.0.0"],
        "--host 0.0.0.0 can be reached by others: set SPACEEXPLORE_TOKEN, or give --allow-no-token",
    ),
    (["--host", "::"], "--host :: can be reached by others"),
    (["--port", "x"], "argument --port: invalid int value: 'x'"),
    (["--max-batch", "0"], "--max-batch must be at least 1, got 0"),
    (["--timeout-s", "nan"], "--timeout-s must be positive, got nan"),
    (["--rate-limit", "-1"], "--rate-limit must be at least 0, got -1"),
    (["--port", "0"], "cannot load absent: "),
]


@pytest.mark.parametrize(("options", "complaint"), COMPLAINTS)
def test_a_mistake_on_the_command_line_is_one_line(refused, monkeypatch, options, complaint):
    monkeypatch.delenv("SPACEEXPLORE_TOKEN", raising=False)
    assert complaint in refused(main, ["--model", "absent", *options])


@pytest.mark.parametrize("token", ["", "two words", "line\n", "é"])
def test_a_token_that_no_header_can_hold_is_refused(refused, monkeypatch, token):
    monkeypatch.setenv("SPACEEXPLORE_TOKEN", token)
    assert "SPACEEXPLORE_TOKEN must be of printable ASCII" in refused(main, ["--model", "absent", "--port", "0"])


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_port_that_cannot_be_is_refused(refused, port):
    assert f"--port must be from 0 to 65535, got {port}" in refused(main, ["--model", "absent", "--port", port])


def test_a_port_that_is_taken_is_named(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen at 127.0.0.1:{port}" in refused(main, ["--model", "absent", "--port", port])


def test_models_have_names_of_their_own(checkpoint):
    with pytest.raises(ValueError, match="there are two models with the name 'a'"):
        load_models([f"a={checkpoint}", f"a={checkpoint}"], "cpu")
    (name,) = load_models([str(checkpoint)], "cpu")
    assert name == checkpoint.name


# --- the worker ------------------------------------------------------------------------------------------------------


def run_batches(arrivals: list[float], max_batch: int, max_wait: float) -> list[list[int]]:
    """Which queries are answered together, of those that arrive at these seconds."""
    batches = []

    def answer(queries):
        batches.append(list(queries))
        return queries

    async def arrive(batcher, number, seconds):
        await asyncio.sleep(seconds)
        assert await batcher.ask(number) == number

    async def run():
        async with Batcher(answer, max_batch, max_wait) as batcher:
            await asyncio.gather(*(arrive(batcher, number, seconds) for number, seconds in enumerate(arrivals)))

    asyncio.run(run())
    return batches


def test_the_first_waits_for_others_but_no_longer_than_it_may():
    assert run_batches([0, 0.05, 0.1, 1.0], max_batch=10, max_wait=0.5) == [[0, 1, 2], [3]]
    assert run_batches([0, 0, 0, 0], max_batch=2, max_wait=5) == [[0, 1], [2, 3]]
    assert run_batches([0, 0, 0], max_batch=1, max_wait=5) == [[0], [1], [2]]
