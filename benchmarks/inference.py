"""How fast the network forecasts: beside networks that others published, in sample paths, and from a cold start.

    python benchmarks/inference.py [--parts networks paths start] [--model-config FILE] [--rounds 3]
        [--series 1 32] [--context 64 256 1024] [--peers chronos-bolt-tiny …] [--paths-context 256] [--model DIR]

One thread, float32, random weights: time depends on neither weights nor values, but for the experts that the router
chooses. Sides take turns in one process, in reverse order every other round, after a round that does not count; shown
are medians, of seconds and of the ratios within a round. Times are CPU times of the process: where nothing else runs,
those of the clock. Freed memory is kept, as the training programs have it (docs/performance.md); the new processes of
the last part are as a user has them.

networks: the forward pass for so many series, at most 32 at once (500 are 15 batches of 32 and one of 20). What a pass
gives is not the same. Ours reads 64 features of each day, as one token, and gives mean and 19 quantiles of the returns
over 1, 2, 5 and 10 days, from every day of the context as from the last. The others read one number a day, 16 or 32
days as one token, and forecast from the last day alone: Chronos-Bolt 9 quantiles of 64 steps, Chronos-2 21 of 16 (the
least it can), TimesFM 9 and a mean of 128. "Next day" is ours where yesterday's cache was kept and one bar has come;
the others, whose normalisation and attention look at the whole context, read all of it again. The operations of matrix
products and convolutions that a series takes do not depend on the machine. What our features cost is in the last part.

paths: 20 days from a context. `sample_paths` reads the context once for all paths. `generate` of transformers, with a
cache too, reads it once for each. Without a cache all of it is read again for every day of every path, as Kronos does
(github.com/shiyu-coder/Kronos, `auto_regressive_inference` of model/kronos.py); here it is our own network that does,
so that nothing but the cache differs, and both draw the same paths from the same random numbers.

start: a new process that knows transformers and a folder, `pipeline(model=folder, trust_remote_code=True)`, to its
first forecast of one ticker; then the newest day of 500, from a table of bars, and what of it are features and
network. The folder of --model holds a regression; without one, it is made with random weights.

Exit code 1 when a goal is missed: 1.5 times as many series a second as Chronos-Bolt-small; 20 times as many paths as
without a cache.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from chronos.chronos2.config import Chronos2CoreConfig
from chronos.chronos2.model import Chronos2Model
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from torch import nn
from transformers import T5Config, TimesFm2_5Config, TimesFm2_5ModelForPrediction
from transformers.utils import logging

from spaceexploreai.benchmarks.export import make_batch
from spaceexploreai.benchmarks.stream import make_prices
from spaceexploreai.benchmarks.train_step import RECIPE, count_flops, read_config, seconds
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.prices import read_sample, write_table
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForCausalLM, SpaceExploreForRegression
from spaceexploreai.paths_spaceexplore import make_prompt, sample_paths
from spaceexploreai.pipeline_spaceexplore import add_pipeline
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer
from spaceexploreai.train.arguments import bare_parser, command
from spaceexploreai.train.memory import keep_freed_memory

BATCH = 32
DAYS = 20  # of a path
FEW, MANY = 10, 100  # paths; without a cache the few alone are measured
TICKERS, BARS = 500, 400
BOLT = "chronos-bolt-small"
OVER_BOLT, OVER_NO_CACHE = 1.5, 20

Run = Callable[[], object]


# --- taking turns ---


@torch.inference_mode()
def take_turns(runs: dict[str, Run], rounds: int) -> list[dict[str, float]]:
    """Seconds of each in each round."""
    measured = []
    for which in range(rounds + 1):
        names = list(runs)[:: -1 if which % 2 else 1]
        measured.append({name: seconds(runs[name]) for name in names})
    return measured[1:]  # the first warms up


def typical(rounds: list[dict[str, float]], name: str) -> float:
    return median(one[name] for one in rounds)


def speedup(rounds: list[dict[str, float]], ours: str, theirs: str) -> float:
    return median(one[theirs] / one[ours] for one in rounds)


# --- networks ---


class Network(NamedTuple):
    """`start` takes the numbers of series and of days, and gives what forecasts them."""

    model: nn.Module
    start: Callable[[int, int], Run]


def make_ours(config: SpaceExploreConfig, name: str) -> dict[str, Network]:
    model = SpaceExploreForRegression(config).eval()

    def whole(series: int, context: int) -> Run:
        return partial(model, **make_batch(config, series, context))

    @torch.inference_mode()
    def next_day(series: int, context: int) -> Run:
        today = make_batch(config, series, context)
        cache = model(**{name: values[:, :-1] for name, values in today.items()}, use_cache=True).cache

        def run():
            outputs = model(**today, cache=cache)
            cache.crop(-1)  # the next round comes the same day
            return outputs

        return run

    return {name: Network(model, whole), next_day_of(name): Network(model, next_day)}


def next_day_of(name: str) -> str:
    return f"{name}, next day"


# Fields of the published checkpoints' config.json; those not named change no time.


def make_bolt(d_model: int, num_layers: int, num_heads: int) -> Network:
    """9M and 48M parameters, as published."""
    config = T5Config(
        d_model=d_model,
        d_ff=4 * d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        decoder_start_token_id=0,
        chronos_config={
            "context_length": 2048,
            "prediction_length": 64,
            "input_patch_size": 16,
            "input_patch_stride": 16,
            "quantiles": [level / 10 for level in range(1, 10)],
            "use_reg_token": True,
        },
    )
    model = ChronosBoltModelForForecasting(config).eval()
    return Network(model, lambda series, context: partial(model, context=make_values(series, context)))


def make_chronos2() -> Network:
    """120M parameters, as published."""
    config = Chronos2CoreConfig(
        d_model=768,
        d_ff=3072,
        num_layers=12,
        num_heads=12,
        chronos_config={
            "context_length": 8192,
            "output_patch_size": 16,
            "input_patch_size": 16,
            "input_patch_stride": 16,
            "quantiles": [0.01, *(level / 20 for level in range(1, 20)), 0.99],
            "use_reg_token": True,
            "use_arcsinh": True,
            "max_output_patches": 64,
        },
    )
    model = Chronos2Model(config).eval()
    return Network(model, lambda series, context: partial(model, context=make_values(series, context)))


def make_timesfm() -> Network:
    """The library's default; a pass reads the context and its mirror image (`force_flip_invariance`)."""
    model = TimesFm2_5ModelForPrediction(TimesFm2_5Config()).eval()

    def start(series: int, context: int) -> Run:
        patches = -(-context // model.config.patch_length)
        values = list(make_values(series, context))
        return partial(model, values, forecast_context_len=patches * model.config.patch_length)

    return Network(model, start)


def make_values(series: int, context: int) -> torch.Tensor:
    return 50 + torch.randn(series, context).cumsum(dim=1)


PEERS = {
    "chronos-bolt-tiny": partial(make_bolt, 256, 4, 4),
    BOLT: partial(make_bolt, 512, 6, 8),
    "chronos-2": make_chronos2,
    "timesfm-2.5": make_timesfm,
}


def in_batches(network: Network, series: int, context: int) -> Run:
    sizes = [min(BATCH, series - first) for first in range(0, series, BATCH)]
    runs = {size: network.start(size, context) for size in set(sizes)}

    def run():
        for size in sizes:
            runs[size]()

    return run


@torch.inference_mode()
def flops_of_one(network: Network, context: int) -> int:
    return count_flops(network.start(1, context))


def format_networks(
    networks: dict[str, Network], ours: str, series: int, context: int, rounds: list[dict[str, float]]
) -> str:
    lines = []
    for name, network in networks.items():
        size = sum(weight.numel() for weight in network.model.parameters())
        speed = series / typical(rounds, name)
        ratios = [f"{speedup(rounds, one, name):.2f}" for one in (ours, next_day_of(ours))]
        figures = f"{size / 1e6:.1f} | {flops_of_one(network, context) / 1e9:.2f} | {speed:.1f}"
        lines.append(f"| {series} | {context:,} | {name} | {figures} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def compare_networks(args, config: SpaceExploreConfig) -> list[str]:
    """Prints a table, and returns what was missed."""
    ours, missed = args.model_config.parent.name, []
    networks = make_ours(config, ours) | {name: PEERS[name]() for name in args.peers}
    head = "| series | context | network | M parameters | GFLOP a series | series/s"
    print(f"{head} | {ours} over it | next day over it |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|")
    for series in args.series:
        for context in args.context:
            runs = {name: in_batches(network, series, context) for name, network in networks.items()}
            rounds = take_turns(runs, args.rounds)
            print(format_networks(networks, ours, series, context, rounds), flush=True)
            if BOLT in networks and (ratio := speedup(rounds, ours, BOLT)) < OVER_BOLT:
                missed.append(f"{series} x {context}: {ratio:.2f} and not {OVER_BOLT} times as many as {BOLT}")
    return missed


# --- paths ---


@torch.no_grad()
def paths_without_cache(
    model: SpaceExploreForCausalLM,
    tokenizer: SpaceExploreTokenizer,
    context: dict[str, torch.Tensor],
    shocks: torch.Tensor,
) -> np.ndarray:
    """As `sample_paths`, by reading context and path again for each day of each path."""
    _, num_samples, length = shocks.shape
    prompt = {name: one.repeat_interleave(num_samples, dim=0) for name, one in make_prompt(tokenizer, context).items()}
    uniforms = torch.special.ndtr(shocks.flatten(0, 1))
    for day in range(length):
        logits = model(**prompt, use_cache=False, logits_to_keep=1).logits[:, -1]
        logits[:, tokenizer.suppress_tokens] = -torch.inf
        distribution = logits.softmax(dim=-1).cumsum(dim=-1)
        passed = distribution <= uniforms[:, day, None] * distribution[:, -1:]
        tokens = passed.sum(dim=-1, keepdim=True)
        prompt["input_ids"] = torch.cat([prompt["input_ids"], tokens], dim=1)
        prompt["attention_mask"] = torch.cat([prompt["attention_mask"], torch.ones_like(tokens)], dim=1)
    scale = context["scale"][:, -1].double().numpy().repeat(num_samples)
    return tokenizer.decode_returns(prompt["input_ids"][:, -length:].numpy(), scale).reshape(shocks.shape)


def paths_of_generate(
    model: SpaceExploreForCausalLM,
    tokenizer: SpaceExploreTokenizer,
    context: dict[str, torch.Tensor],
    shocks: torch.Tensor,
) -> torch.Tensor:
    """As many tokens of as many paths, drawn by the library."""
    _, num_samples, length = shocks.shape
    return model.generate(
        **make_prompt(tokenizer, context),
        do_sample=True,
        num_return_sequences=num_samples,
        min_new_tokens=length,
        max_new_tokens=length,
        suppress_tokens=tokenizer.suppress_tokens,
    )[:, -length:]


OURS, GENERATE, NO_CACHE = "sample_paths", "generate", "no cache"
SIDES = {OURS: sample_paths, GENERATE: paths_of_generate, NO_CACHE: paths_without_cache}


def measure_paths(config: SpaceExploreConfig, context: int, rounds: int) -> dict[int, list[dict[str, float]]]:
    """Rounds of few paths, and of many without the slowest side."""
    tokenizer = SpaceExploreTokenizer()
    config = SpaceExploreConfig(**{**config.to_dict(), "vocab_size": len(tokenizer)})
    model = SpaceExploreForCausalLM(config).eval()
    known = make_batch(config, 1, context)
    measured = {}
    for paths in (FEW, MANY):
        shocks = torch.randn(1, paths, DAYS)
        sides = {name: side for name, side in SIDES.items() if paths == FEW or name != NO_CACHE}
        runs = {name: partial(side, model, tokenizer, known, shocks) for name, side in sides.items()}
        measured[paths] = take_turns(runs, rounds)
    return measured


def format_paths(measured: dict[int, list[dict[str, float]]]) -> str:
    lines = ["| paths | side | s | paths/s | sample_paths over it |", "|---:|---|---:|---:|---:|"]

    def add(paths: int, side: str, taken: float, ratio: float):
        lines.append(f"| {paths} | {side} | {taken:.2f} | {paths / taken:.1f} | {ratio:.1f} |")

    for paths, rounds in measured.items():
        for side in [side for side in SIDES if side in rounds[0]]:
            add(paths, side, typical(rounds, side), speedup(rounds, OURS, side))
    scaled = typical(measured[FEW], NO_CACHE) * MANY / FEW
    add(MANY, f"{NO_CACHE}: not measured, {MANY // FEW} times {FEW}", scaled, scaled / typical(measured[MANY], OURS))
    return "\n".join(lines)


def compare_paths(args, config: SpaceExploreConfig) -> list[str]:
    """Prints a table, and returns what was missed."""
    measured = measure_paths(config, args.paths_context, args.rounds)
    print(f"{DAYS} days from a context of {args.paths_context}:\n\n{format_paths(measured)}", flush=True)
    ratio = speedup(measured[FEW], OURS, NO_CACHE)
    goal = f"{FEW} paths: {ratio:.1f} and not {OVER_NO_CACHE} times as many as without a cache"
    return [goal] if ratio < OVER_NO_CACHE else []


# --- from a cold start ---

STAGES = ("imports", "load", "first forecast", "second forecast")
CHILD = """
import json, sys, time

def now():
    return [time.process_time(), time.time()]

def timed(function):
    start = time.process_time()
    result = function()
    return result, time.process_time() - start

import pandas as pd
import torch
from transformers import pipeline

folder, path, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
stages = [now()]
pipe = pipeline("time-series-forecasting", model=folder, trust_remote_code=True)
stages.append(now())
prices = pd.read_parquet(path)
one = prices[prices["ticker"] == prices["ticker"].iloc[0]]
for _ in range(2):
    table = pipe(one)
    stages.append(now())

@torch.inference_mode()
def network(inputs):
    for row in range(0, len(inputs["scale"]), batch_size):
        pipe.model(**{name: values[row : row + batch_size] for name, values in inputs.items()})

whole = timed(lambda: pipe(prices, batch_size=batch_size))[1]
inputs, features = timed(lambda: pipe.feature_extractor(prices))
network = timed(lambda: network(inputs))[1]
print(json.dumps({"stages": stages, "whole": whole, "features": features, "network": network}))
"""


class Start(NamedTuple):
    stages: np.ndarray  # (4, 2) seconds of each stage, of the CPU and of the clock
    market: dict[str, float]  # seconds of the CPU for the newest day of all tickers


def make_checkpoint(config: SpaceExploreConfig, folder: Path) -> None:
    """A model repository as training writes it, with random weights."""
    extractor, prices = SpaceExploreFeatureExtractor(), read_sample()
    extractor.fit(extractor.compute_features(prices)).save_pretrained(folder)
    model = SpaceExploreForRegression(config)
    add_pipeline(model, folder)
    model.save_pretrained(folder)


def start_process(folder: Path, prices: Path, modules: Path) -> Start:
    """
    Args:
        modules: where the library copies the code of a model repository to, which it does once.
    """
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = os.environ | offline | {"HF_MODULES_CACHE": str(modules), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", CHILD, str(folder), str(prices), str(BATCH)]
    begun = [0.0, time.time()]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(f"{folder} does not forecast: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Start(np.diff([begun, *found.pop("stages")], axis=0), found)


def format_start(starts: list[Start]) -> str:
    stages = np.median([one.stages for one in starts], axis=0)
    lines = ["| from a cold start | CPU s | clock s |", "|---|---:|---:|"]
    rows = [*zip(STAGES, stages, strict=True), ("to the first forecast", stages[:-1].sum(axis=0))]
    return "\n".join(lines + [f"| {name} | {cpu:.2f} | {clock_:.2f} |" for name, (cpu, clock_) in rows])


def format_market(starts: list[Start], tickers: int) -> str:
    whole, features, network = (
        median(one.market[part] for one in starts) for part in ("whole", "features", "network")
    )
    rest = median(one.market["whole"] - one.market["features"] - one.market["network"] for one in starts)
    parts = {"pipeline": whole, "features": features, "network": network, "dates, table, batches": rest}
    lines = [f"| {tickers} tickers | CPU s | series/s | of the pipeline |", "|---|---:|---:|---:|"]
    rows = [f"| {name} | {taken:.2f} | {tickers / taken:.1f} | {taken / whole:.0%} |" for name, taken in parts.items()]
    return "\n".join(lines + rows)


def measure_start(args, config: SpaceExploreConfig) -> list[str]:
    """Prints two tables. There is no goal to miss."""
    with TemporaryDirectory() as temporary:
        prices, folder = Path(temporary, "prices.parquet"), args.model
        write_table(make_prices(TICKERS, BARS), prices)
        if folder is None:
            folder = Path(temporary, "model")
            make_checkpoint(config, folder)
        starts = [start_process(folder, prices, Path(temporary, "modules")) for _ in range(args.rounds + 1)][1:]
    print(f"{format_start(starts)}\n\n{format_market(starts, TICKERS)}", flush=True)
    return []


PARTS = {"networks": compare_networks, "paths": compare_paths, "start": measure_start}


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--model-config", type=Path, default=RECIPE, help="config.json; default: recipes/27m")
    parser.add_argument("--series", type=int, nargs="+", default=[1, BATCH], help="default: %(default)s")
    parser.add_argument("--context", type=int, nargs="+", default=[64, 256, 1024], help="default: %(default)s")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument("--paths-context", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="checkpoint folder of a regression; default: random weights")
    args = parser.parse_args(argv)
    for name in ("series", "context", "paths_context", "rounds"):
        if (least := np.min(getattr(args, name))) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {least}")
    config = read_config(args.model_config)
    torch.set_num_threads(1)  # a second would measure whatever else the machine is doing
    torch.manual_seed(0)
    keep_freed_memory()
    logging.disable_progress_bar()  # of weights being written
    missed = []
    for part in args.parts:
        missed += PARTS[part](args, config)
        print()
    if missed:
        raise SystemExit("\n".join(missed))  # on standard error, with exit code 1


if __name__ == "__main__":
    main()
