"""How many forecasts a second the server gives, and how long each is waited for.

    python benchmarks/serve.py --model DIR [--clients 50] [--seconds 60] [--requests tickers bars] [--threads 1]

Starts `scripts/serve.py` as a user would, on the embedded sample, once with requests batched and once with each by
itself (--max-batch 1); without a rate limit, and with more time to answer, so that what is measured is the wait. As
many clients ask again as soon as they are answered: for a ticker of the sample, whose features the server then
remembers ("tickers"), or with 120 bars of their own, whose features it must make ("bars"). The two servers take turns
of a quarter of the time each, so that what else the machine does meets both. Exit code 1 if a request fails.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pandas as pd

from spaceexploreai.data.prices import read_sample
from spaceexploreai.train.arguments import bare_parser, command

SERVER = Path(__file__).parents[1] / "scripts" / "serve.py"
KINDS = ("tickers", "bars")
BATCHES = {"batched": 32, "each by itself": 1}
TURNS = 4
BARS = 120  # of a request
TIMEOUT = 120


@contextmanager
def serving(model: str, threads: int, *options: str) -> Iterator[str]:
    """The address of a server."""
    arguments = [sys.executable, str(SERVER), "--model", model, "--port", "0", "--rate-limit", "0"]
    arguments += ["--timeout-s", str(TIMEOUT), *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            if not line:
                raise ValueError(f"the server did not start: {' '.join(arguments)}")
            yield line.split()[-1]
        finally:
            process.terminate()


def make_requests(kind: str, count: int = 500) -> list[dict]:
    prices, generator = read_sample(), np.random.default_rng(0)
    frames = dict(list(prices.groupby("ticker")))
    tickers = generator.choice(list(frames), count).tolist()
    if kind == "tickers":
        return [{"tickers": [ticker]} for ticker in tickers]
    ends = [int(generator.integers(BARS, len(frames[ticker]) + 1)) for ticker in tickers]
    frames = [frames[ticker].iloc[end - BARS : end] for ticker, end in zip(tickers, ends, strict=True)]
    return [{"bars": columns_of(bars)} for bars in frames]


def columns_of(bars: pd.DataFrame) -> dict:
    columns = bars.assign(date=bars["date"].dt.strftime("%Y-%m-%d")).to_dict("list")
    return columns | {"ticker": bars["ticker"].iloc[0]}


class Turn(NamedTuple):
    latencies: list[float]
    errors: list[str]
    seconds: float


async def ask_for(client: httpx.AsyncClient, requests: Iterator[dict], until: float, turn: Turn) -> None:
    while time.perf_counter() < until:
        start = time.perf_counter()
        try:
            answer = await client.post("/v1/forecast", json=next(requests))
            turn.latencies.append(time.perf_counter() - start)
            turn.errors.extend([] if answer.status_code == 200 else [answer.text])
        except httpx.HTTPError as error:
            turn.errors.append(repr(error))


def take_turn(address: str, requests: list[dict], clients: int, seconds: float) -> Turn:
    async def ask_all() -> Turn:
        endless = chain.from_iterable(iter(lambda: requests, None))
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=address, timeout=TIMEOUT, limits=limits, trust_env=False) as client:
            start = time.perf_counter()
            turn = Turn([], [], seconds)
            await asyncio.gather(*(ask_for(client, endless, start + seconds, turn) for _ in range(clients)))
            return turn._replace(seconds=time.perf_counter() - start)

    return asyncio.run(ask_all())


def measure(addresses: dict[str, str], kind: str, clients: int, seconds: float) -> dict[str, list[Turn]]:
    requests = make_requests(kind)
    turns = {name: [] for name in addresses}
    for address in addresses.values():
        take_turn(address, requests, 1, 0.1)  # the first makes the calendar
    for _ in range(TURNS):
        for name, address in addresses.items():
            turns[name].append(take_turn(address, requests, clients, seconds / TURNS))
    return turns


def rate(turns: list[Turn]) -> float:
    return sum(len(turn.latencies) for turn in turns) / sum(turn.seconds for turn in turns)


def format_row(kind: str, name: str, turns: list[Turn], alone: list[Turn]) -> str:
    latencies = np.concatenate([turn.latencies for turn in turns])
    half, most = 1000 * np.quantile(latencies, [0.5, 0.99])
    errors = sum(len(turn.errors) for turn in turns)
    figures = f"{len(latencies):,} | {errors} | {half:,.0f} | {most:,.0f} | {rate(turns):.1f}"
    return f"| {kind} | {name} | {figures} | {rate(turns) / rate(alone):.2f} |"


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60, help="of each server and kind of request")
    parser.add_argument("--requests", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--threads", type=int, default=1, help="of a server's network")
    args = parser.parse_args(argv)
    batched, alone = ((args.model, args.threads, "--max-batch", str(size)) for size in BATCHES.values())
    print("| requests | server | answers | errors | p50, ms | p99, ms | answers/s | over each by itself |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    errors = []
    with serving(*batched) as one, serving(*alone) as other:
        for kind in args.requests:
            turns = measure(dict(zip(BATCHES, (one, other), strict=True)), kind, args.clients, args.seconds)
            for name, own in turns.items():
                print(format_row(kind, name, own, list(turns.values())[-1]), flush=True)
                errors += [error for turn in own for error in turn.errors]
    if errors:
        print(f"{len(errors)} requests failed, the first: {errors[0][:300]}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
