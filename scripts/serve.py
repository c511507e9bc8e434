"""Serves forecasts over HTTP: /v1/forecast, /v1/models, /health, /metrics and /openapi.json; see docs/api.md.

    python scripts/serve.py --model DIR [--model NAME=DIR ...] [--prices FILE_OR_DIR] [--host 127.0.0.1] [--port 8000]

Prices, the embedded sample by default, are read and cleaned once. Where the environment variable SPACEEXPLORE_TOKEN is
set, all but /health and /openapi.json want it as a bearer token.
"""

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import secrets
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, NamedTuple

import prometheus_client
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from huggingface_hub.utils import disable_progress_bars
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from spaceexploreai.data.cleaning import load_prices
from spaceexploreai.data.prices import read_sample
from spaceexploreai.pipeline_spaceexplore import SpaceExplorePipeline
from spaceexploreai.scripts.forecasters import load_pipeline
from spaceexploreai.scripts.service import (
    MAX_SAMPLES,
    MAX_TICKERS,
    MODEL_NAME,
    Batcher,
    ForecastRequest,
    ForecastResponse,
    ForecastService,
    ModelInfo,
    QueryError,
    UnknownNameError,
)
from spaceexploreai.train.arguments import command, make_parser
from spaceexploreai.train.memory import keep_freed_memory

logger = logging.getLogger(__name__)

TOKEN = "SPACEEXPLORE_TOKEN"
CODES = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid",
    429: "too_many_requests",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}
DEPTH = 3  # of a request's braces and brackets
NOT_NESTING = bytes(set(range(256)) - set(b"[]{}"))
CONNECTIONS = 1000
KEEP_ALIVE_S = 75  # longer than clients and proxies keep a connection, or they would ask while it is closed
FAILURE = "the server failed; its log says why"
SENTENCE = 300  # longest message, in characters: it may quote what was sent
# A browser that is shown an answer must run, frame, guess and keep nothing of it.
HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("Cache-Control", "no-store"),
]


class Limits(NamedTuple):
    """What one client may ask for."""

    max_bars: int
    max_body_mb: float
    rate_limit: int  # requests a minute
    timeout_s: float


# --- errors ----------------------------------------------------------------------------------------------------------


class Problem(BaseModel):
    code: str
    message: str = Field(description="one sentence")
    field: str | None = Field(None, description="of the request")


class ErrorResponse(BaseModel):
    error: Problem


class RefusalError(Exception):
    def __init__(self, status: int, message: str, field: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.field, self.headers = status, field, headers


def problem(status: int, message: str, field: str | None = None, headers: dict | None = None) -> JSONResponse:
    message = " ".join(message.split())[:SENTENCE]
    error = Problem(code=CODES.get(status, "error"), message=message, field=field and field[:SENTENCE])
    return JSONResponse({"error": error.model_dump()}, status, headers)


def explain(error: ValidationError) -> RefusalError:
    """The first of what is wrong with a request."""
    first = error.errors(include_url=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return RefusalError(400, message)
    field = ".".join(map(str, first["loc"]))
    return RefusalError(422, f"{field}: {message}" if field else message, field or None)


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RefusalError)
    def refuse(_, error: RefusalError):
        return problem(error.status, str(error), error.field, error.headers)

    @app.exception_handler(HTTPException)  # of the framework: there is no such path or method
    def refuse_path(request: Request, error: HTTPException):
        sentences = {404: "there is nothing at this path", 405: "this path does not take this method"}
        return problem(error.status_code, sentences.get(error.status_code, error.detail), None, error.headers)

    @app.exception_handler(Exception)
    def hide(_, error: Exception):
        return problem(500, FAILURE)


def answers(*statuses: int) -> dict[int, dict]:
    return {status: {"model": ErrorResponse, "description": CODES[status].replace("_", " ")} for status in statuses}


# --- what a request must pass ----------------------------------------------------------------------------------------


class RateLimit:
    """Counts requests of each address from one minute to the next."""

    def __init__(self, per_minute: int):
        self.per_minute, self.start, self.counts = per_minute, time.monotonic(), Counter()

    def __call__(self, request: Request) -> None:
        now = time.monotonic()
        if now - self.start >= 60:
            self.start = now
            self.counts.clear()
        address = request.client.host if request.client else ""
        self.counts[address] += 1
        if self.counts[address] > self.per_minute:
            headers = {"Retry-After": str(int(self.start + 60 - now) + 1)}
            raise RefusalError(429, f"more than {self.per_minute} requests a minute", headers=headers)


def authorization(token: str):
    def authorize(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]):
        if given is None or not secrets.compare_digest(given.credentials.encode(), token.encode()):
            headers = {"WWW-Authenticate": "Bearer"}
            raise RefusalError(401, "this needs the header 'Authorization: Bearer <token>'", headers=headers)

    return authorize


async def read_body(request: Request, limit: int) -> bytes:
    """The body, of which no more than the limit is read, and which is not nested deeply."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusalError(415, f"the body must be application/json, not {kind or 'without a type'}")
    too_large = RefusalError(413, f"the body is larger than {limit:,} bytes")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise RefusalError(400, "the body ended early") from None
    check_depth(body)
    return bytes(body)


def check_depth(body: bytes) -> None:
    """Takes the innermost pairs away, as often as they may be nested. No text in a request has brackets."""
    nesting = body.translate(None, NOT_NESTING)
    for _ in range(DEPTH):
        nesting = re.sub(rb"\[\]|\{\}", b"", nesting)
    if nesting:
        raise RefusalError(400, f"brackets are nested deeper than {DEPTH} or do not match")


async def read_request(request: Request, limits: Limits) -> ForecastRequest:
    try:
        async with asyncio.timeout(limits.timeout_s):
            body = await read_body(request, int(limits.max_body_mb * 2**20))
        asked = ForecastRequest.model_validate_json(body)
    except TimeoutError:
        raise RefusalError(408, f"the body took more than {limits.timeout_s:g} s") from None
    except ValidationError as error:
        raise explain(error) from None
    if asked.bars is not None and len(asked.bars.date) > limits.max_bars:
        raise RefusalError(422, f"bars has {len(asked.bars.date):,} entries, more than {limits.max_bars:,}", "bars")
    return asked


# --- metrics ---------------------------------------------------------------------------------------------------------


class Metrics:
    """For Prometheus. No label comes from a request: a path that is none of these is "other"."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "spaceexplore_requests", "Requests answered", ["route", "code"], registry=self.registry
        )
        self.seconds = prometheus_client.Histogram(
            "spaceexplore_request_seconds", "Seconds to the answer", ["route"], registry=self.registry
        )
        self.batch = prometheus_client.Histogram(
            "spaceexplore_batch_requests",
            "Requests run together",
            buckets=[2**power for power in range(9)],
            registry=self.registry,
        )
        self.queue = prometheus_client.Gauge(
            "spaceexplore_queue_requests", "Requests that wait", registry=self.registry
        )


class Watch:
    """Counts and times what the application answers."""

    def __init__(self, app, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, code = time.perf_counter(), 500

        async def note_code(message) -> None:
            nonlocal code
            code = message.get("status", code)
            await send(message)

        try:
            await self.app(scope, receive, note_code)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, code).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)


# --- the application -------------------------------------------------------------------------------------------------


class PricesInfo(BaseModel):
    tickers: list[str]
    start: str
    end: str


class ModelsResponse(BaseModel):
    models: list[ModelInfo]
    prices: PricesInfo = Field(description="what `tickers` may name")
    limits: dict[str, float]


class HealthResponse(BaseModel):
    status: str


def make_app(
    service: ForecastService,
    batcher: Batcher,
    limits: Limits,
    token: str | None = None,
    origins: list[str] | None = None,
) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with batcher:
            yield

    metrics = Metrics()
    batcher.observe = metrics.batch.observe
    metrics.queue.set_function(batcher.queue.qsize)
    # Their pages would be loaded from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, lifespan=lifespan)
    add_error_handlers(app)
    app.add_middleware(Watch, metrics=metrics)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_headers=["Authorization", "Content-Type"])
    gates = [Depends(RateLimit(limits.rate_limit))] if limits.rate_limit else []
    gates += [Depends(authorization(token))] if token else []
    refusals = answers(*([429] if limits.rate_limit else []), *([401] if token else []))
    add_health(app, batcher)
    add_metrics(app, metrics, gates, refusals)
    add_models(app, service, limits, gates, refusals)
    add_forecast(app, service, batcher, limits, gates, refusals)
    schema = describe(app, service)
    app.openapi = lambda: schema
    return app


def add_health(app: FastAPI, batcher: Batcher) -> None:
    @app.get("/health", responses=answers(503), summary="Whether forecasts can be asked for")
    async def health() -> HealthResponse:
        if not batcher.ready:
            raise RefusalError(503, "the worker does not run")
        return HealthResponse(status="ready")


def add_metrics(app: FastAPI, metrics: Metrics, gates: list, refusals: dict) -> None:
    found = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format"}
    }

    @app.get(
        "/metrics", dependencies=gates, responses=found | refusals, response_class=Response, summary="For Prometheus"
    )
    async def show_metrics():
        return Response(generate_latest(metrics.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)


def add_models(app: FastAPI, service: ForecastService, limits: Limits, gates: list, refusals: dict) -> None:
    @app.get(
        "/v1/models",
        dependencies=gates,
        responses=refusals,
        response_model_exclude_none=True,
        summary="What can be asked for",
    )
    async def models() -> ModelsResponse:
        return ModelsResponse(
            models=service.models(),
            prices=PricesInfo(tickers=list(service.stored), start=service.start, end=service.end),
            limits={"max_tickers": MAX_TICKERS, "max_samples": MAX_SAMPLES, **limits._asdict()},
        )


def add_forecast(
    app: FastAPI, service: ForecastService, batcher: Batcher, limits: Limits, gates: list, refusals: dict
) -> None:
    @app.post(
        "/v1/forecast",
        dependencies=gates,
        responses=answers(400, 404, 408, 413, 415, 422, 503, 504) | refusals,
        response_model=ForecastResponse,
        openapi_extra={"requestBody": request_body(service)},
        summary="Forecast the trading days after the newest bar",
    )
    async def forecast(request: Request):
        asked = await read_request(request, limits)
        try:
            query = service.query(asked)
            async with asyncio.timeout(limits.timeout_s):
                return Response(await batcher.ask(query), media_type="application/json")
        except UnknownNameError as error:
            raise RefusalError(404, str(error), error.field) from None
        except QueryError as error:
            raise RefusalError(422, str(error)) from None
        except asyncio.QueueFull:
            raise RefusalError(503, "too many requests wait; try again", headers={"Retry-After": "1"}) from None
        except TimeoutError:
            raise RefusalError(504, f"no answer within {limits.timeout_s:g} s") from None
        except Exception as error:  # here, and not by the framework, which would close the connection
            logger.exception("a forecast failed")
            raise RefusalError(500, FAILURE) from error


# --- its description -------------------------------------------------------------------------------------------------


def request_body(service: ForecastService) -> dict:
    ticker = max(service.stored, key=lambda name: len(service.stored[name]))
    examples = {
        "tickers": {"summary": "A ticker of the server's prices", "value": {"tickers": [ticker]}},
        "bars": {"summary": "Bars of one's own", "value": {"bars": example_bars(service)}},
    }
    content = {"schema": {"$ref": "#/components/schemas/ForecastRequest"}, "examples": examples}
    return {"required": True, "content": {"application/json": content}}


def example_bars(service: ForecastService) -> dict:
    """The newest bars of the sample, as many as every model needs, with fewer digits."""
    bars = read_sample(["AAPL"]).tail(max(one.min_history for one in service.models()))
    columns = {name: [float(f"{number:.6g}") for number in bars[name]] for name in bars.columns[2:]}
    return {"ticker": "AAPL", "date": bars["date"].dt.strftime("%Y-%m-%d").tolist(), **columns}


def describe(app: FastAPI, service: ForecastService) -> dict:
    """OpenAPI; the request is read by ourselves, and added by ourselves."""
    schema = get_openapi(
        title="SpaceExploreAI",
        version="1",
        description="Distributions of the coming days' prices, a naive forecast beside each.",
        routes=app.routes,
    )
    asked = ForecastRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["components"]["schemas"] |= asked.pop("$defs") | {"ForecastRequest": asked}
    return schema


# --- the command -----------------------------------------------------------------------------------------------------


def load_models(named: list[str], device: str | None) -> dict[str, SpaceExplorePipeline]:
    pipes = {}
    for text in named:
        name, folder = re.fullmatch(r"(?:([\w.-]+)=)?(.+)", text).groups()
        name = name or Path(folder).resolve().name
        if not re.fullmatch(MODEL_NAME, name):
            raise ValueError(f"--model {text}: {name!r} is no name; give one as NAME={folder}")
        if name in pipes:
            raise ValueError(f"--model {text}: there are two models with the name {name!r}")
        pipes[name] = load_pipeline(folder, device)
    return pipes


def calendar_of(pipes: dict[str, SpaceExplorePipeline]) -> str:
    calendars = {name: pipe.feature_extractor.calendar for name, pipe in pipes.items()}
    if len(set(calendars.values())) > 1:
        raise ValueError(f"models must share one exchange calendar, got {calendars}")
    return next(iter(calendars.values()))


def token_of(environment: dict[str, str]) -> str | None:
    token = environment.get(TOKEN)
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ValueError(f"{TOKEN} must be of printable ASCII characters without spaces")
    return token


def listen(host: str, port: int, open_to_all: bool) -> socket.socket:
    """A socket at an address; one that others can reach only if it may be open to them."""
    if not 0 <= port <= 65535:  # the C library would take it modulo 65536
        raise ValueError(f"--port must be from 0 to 65535, got {port}")
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if not open_to_all and not ipaddress.ip_address(address[0]).is_loopback:
        raise ValueError(f"--host {host} can be reached by others: set {TOKEN}, or give --allow-no-token")
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror}") from error


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add(
        "--model", required=True, action="append", help="checkpoint folder or Hub repository, or NAME=that; repeatable"
    )
    add("--host", default="127.0.0.1", help="address to listen at; by default no other machine can reach it")
    add("--port", type=int, default=8000, help="0 for a free one")
    add("--device", help="where to compute; an accelerator by default, if there is one")
    add("--max-batch", type=int, default=32, help="requests that go through the network together")
    add("--max-wait-ms", type=float, default=10, help="that a request waits for others")
    add("--rate-limit", type=int, default=600, help="requests a minute of each address; 0 for any number")
    add("--max-bars", type=int, default=10_000, help="of a request")
    add("--max-body-mb", type=float, default=4)
    add("--timeout-s", type=float, default=30, help="for reading a request, and for answering it")
    add(
        "--allow-origin", action="append", help="web page that may ask (CORS), such as https://example.com; repeatable"
    )
    add("--allow-no-token", action="store_true", help="let any machine ask, without a token")
    args = parser.parse_args(argv)
    for name, least in {"max_batch": 1, "max_wait_ms": 0, "rate_limit": 0, "max_bars": 1}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    for name in ("max_body_mb", "timeout_s"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    return args


def make_server(app: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            server_header=False,
            proxy_headers=False,  # an address is what a client has, not what it says
            headers=HEADERS,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
    )


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    disable_progress_bars()
    keep_freed_memory()
    token = token_of(os.environ)
    with listen(args.host, args.port, open_to_all=bool(token) or args.allow_no_token) as door:
        pipes = load_models(args.model, args.device)
        prices = load_prices(args.prices, args.tickers, calendar_of(pipes), args.strict, args.fill)
        service = ForecastService(pipes, prices, args.max_batch)
        batcher = Batcher(service.answer, args.max_batch, args.max_wait_ms / 1000)
        limits = Limits(args.max_bars, args.max_body_mb, args.rate_limit, args.timeout_s)
        app = make_app(service, batcher, limits, token, args.allow_origin)
        host, port = door.getsockname()[:2]
        print(f"serving {', '.join(pipes)} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            make_server(app).run(sockets=[door])


if __name__ == "__main__":
    main()
