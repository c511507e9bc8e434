"""Training with several processes: what it costs here, and what it would cost on GPUs, on paper.

    python benchmarks/scaling.py [--model-config FILE] [--tokens 2048] [--context 64] [--rounds 5] [--processes 2]
        [--flops 989e12] [--memory 3.35e12] [--link 450e9]

Here: processes of one thread, each with a batch of its own, whose gradients torch averages (DDP, gloo). One trains
alone while the others wait, all train at once without averaging, and all train together, by turns and by the clock.
What the second costs over the first is the machine's, what the third costs over the second is communication; beside
them is what the cost model says with this machine's speeds: of a square product, of a copy and of an all-reduce.

On paper: the same model with the speeds of an H100 SXM, which are those of its datasheet unless given: operations a
second in bfloat16 without sparsity, bytes a second of its memory, and of NVLink in one direction.
"""

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from spaceexploreai.benchmarks.peers import active_parameters
from spaceexploreai.benchmarks.train_step import SQUARE, Training, parse_options, read_config
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.train.arguments import command
from spaceexploreai.train.memory import keep_freed_memory

RECIPES = Path(__file__).parents[1] / "recipes"
BUCKET = 25 * 2**20  # bytes that DDP averages at a time


# --- on paper --------------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """A second of one GPU, or of one thread."""

    flops: float
    memory: float  # bytes
    link: float  # bytes to each other one


class Cost(NamedTuple):
    """Of a step, for each GPU."""

    parameters: int
    active: int
    flops: float
    states: float  # bytes that stay: weights, gradients and the two moments of AdamW, in float32
    activations: float  # bytes that the forward pass leaves for the backward pass
    compute: float  # seconds
    memory: float
    all_reduce: float

    @property
    def alone(self) -> float:
        """Products and memory at once."""
        return max(self.compute, self.memory)

    @property
    def step(self) -> float:
        """As if no gradient were sent before the last one is there."""
        return self.alone + self.all_reduce

    @property
    def efficiency(self) -> float:
        return self.alone / self.step


def cost_model(
    config: SpaceExploreConfig, tokens: int, context: int, gpus: int, machine: Machine, width: int = 2
) -> Cost:
    """What a step of `tokens` a GPU costs at least, with activations of `width` bytes a number."""
    with torch.device("meta"):
        model = SpaceExploreForRegression(config)
    parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    active = active_parameters(model)
    flops = tokens * flops_per_token(config, active, context)
    activations = tokens * width * kept_numbers(config)
    # Weights are read forward and backward, gradients written; AdamW reads both and two moments, and writes but those.
    traffic = 4 * parameters * (2 + 1 + 4 + 3) + 2 * activations
    seconds = (flops / machine.flops, traffic / machine.memory, ring(4 * parameters, gpus) / machine.link)
    return Cost(parameters, active, flops, 16 * parameters, activations, *seconds)


def flops_per_token(config: SpaceExploreConfig, active: int, context: int) -> float:
    """Forward, and twice that backward: a multiplication and an addition for each weight, and for each key before."""
    head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * head * (context + 1) / 2
    return 3 * 2 * (active + attention)


def kept_numbers(config: SpaceExploreConfig) -> int:
    """What a token leaves for the backward pass of a decoder with latent attention: inputs of products and of SiLU."""
    if config.attention_type != "mla":
        raise ValueError(f"the cost model is that of attention_type 'mla', got {config.attention_type!r}")
    heads, value, norm = config.num_attention_heads, config.v_head_dim, 3 * config.hidden_size
    queries_and_keys = 2 * heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    latents = 3 * config.kv_lora_rank + config.qk_rope_head_dim
    attention = queries_and_keys + heads * (config.qk_nope_head_dim + value) + latents + 2 * heads * value
    routed = config.num_experts_per_tok * (2 * config.hidden_size + 4 * config.moe_intermediate_size)
    experts = routed + config.n_shared_experts * 4 * config.moe_intermediate_size
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    mlps = dense * 4 * config.intermediate_size + (config.num_hidden_layers - dense) * experts
    # Of the CNN and its wavelet 16 a channel, as counted: its parts are many, and no large part of the whole.
    front_end = config.mscnn_num_blocks * (16 * (config.mscnn_hidden_size or config.hidden_size) + norm)
    return config.num_hidden_layers * (attention + 2 * norm) + mlps + norm + front_end


def ring(size: float, gpus: int) -> float:
    """Bytes that each sends in a ring all-reduce: all parts but one, once to add them up and once to hand them out."""
    return 2 * (gpus - 1) / gpus * size


# Of docs/LOG.md, 2026-11-26, on one H100, 27m, windows of 64 days: tokens a step and seconds.
H100_STEPS = {64 * 64: 0.0315, 512 * 64: 512 * 64 / 486_000}


def format_paper(machine: Machine) -> str:
    lines = ["| network | tokens a GPU | GPUs | parameters, M | active, M | MFLOP a token | states, GB "]
    lines[0] += "| activations, GB | products, ms | memory, ms | all-reduce, ms | step, ms | tokens/s | efficiency |"
    lines.append("|---" + "|---:" * 13 + "|")
    for name in ("27m", "300m"):
        config = read_config(RECIPES / name / "config.json")
        for tokens in H100_STEPS:
            costs = {gpus: cost_model(config, tokens, 64, gpus, machine) for gpus in (1, 8)}
            lines += [format_cost(name, tokens, gpus, cost) for gpus, cost in costs.items()]
    return "\n".join(lines)


def format_cost(name: str, tokens: int, gpus: int, cost: Cost) -> str:
    return (
        f"| {name} | {tokens:,} | {gpus} | {cost.parameters / 1e6:.1f} | {cost.active / 1e6:.1f} "
        f"| {cost.flops / tokens / 1e6:.1f} | {cost.states / 1e9:.2f} | {cost.activations / 1e9:.2f} "
        f"| {cost.compute * 1e3:.2f} | {cost.memory * 1e3:.2f} | {cost.all_reduce * 1e3:.2f} | {cost.step * 1e3:.2f} "
        f"| {gpus * tokens / cost.step:,.0f} | {cost.efficiency:.2f} |"
    )


class Operations(TorchDispatchMode):
    """Counts what torch calls but views: on a GPU a kernel each, or several."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations_of(config: SpaceExploreConfig) -> int:
    """Of a step, whatever the size of its batch."""
    training = Training(config, 128, 64)
    with Operations() as operations:
        training.step()
    return operations.count


def compare_h100(machine: Machine) -> str:
    config = read_config(RECIPES / "27m" / "config.json")
    operations, lines = operations_of(config), []
    for tokens, measured in H100_STEPS.items():
        paper = cost_model(config, tokens, 64, 1, machine).step
        lines.append(
            f"27m, {tokens:,} tokens on an H100: {measured * 1e3:.1f} ms measured (docs/LOG.md), "
            f"{measured / paper:.0f} times the {paper * 1e3:.2f} on paper, where kernels are fused and launched "
            f"for nothing; {measured / operations * 1e6:.0f} µs for each of the {operations:,} operations"
        )
    return "\n".join(lines)


# --- here ------------------------------------------------------------------------------------------------------------


class Round(NamedTuple):
    """Seconds by the clock."""

    product: float  # a square one of the first process
    copy: float  # of as many bytes as DDP averages at a time
    all_reduce: float  # of as many
    alone: float  # a step of the first process
    apart: float  # of all, without averaging
    together: float


def timed(function: Callable[[], object] | None) -> float:
    """Until it has run in every process, or in those that have one to run."""
    dist.barrier()
    start = time.perf_counter()
    if function is not None:
        function()
    dist.barrier()
    return time.perf_counter() - start


class Process:
    """One of those that train together."""

    def __init__(self, training: Training):
        self.training, self.bare, self.wrapped = training, training.model, DistributedDataParallel(training.model)
        self.factor, self.product = torch.randn(SQUARE, SQUARE), torch.empty(SQUARE, SQUARE)
        self.bucket, self.other = torch.zeros(BUCKET // 4), torch.zeros(BUCKET // 4)

    def step(self, network: torch.nn.Module, average: bool = False) -> None:
        averaging = nullcontext() if average or network is self.bare else network.no_sync()
        with averaging, patch.object(self.training, "model", network):
            self.training.step()

    def measure(self) -> Round:
        first = dist.get_rank() == 0
        multiply = timed((lambda: torch.mm(self.factor, self.factor, out=self.product)) if first else None)
        copy = timed((lambda: self.other.copy_(self.bucket)) if first else None)
        all_reduce = timed(lambda: dist.all_reduce(self.bucket))
        alone = timed((lambda: self.step(self.bare)) if first else None)
        apart = timed(lambda: self.step(self.wrapped))
        return Round(multiply, copy, all_reduce, alone, apart, timed(lambda: self.step(self.wrapped, average=True)))


def take_turns(training: Training, rounds: int) -> list[Round]:
    """A function of its own, so that DDP is gone before the group is. Where it is the last to hold that, torch waits,
    with Python's lock, for a thread that wants it."""
    process = Process(training)
    return [process.measure() for _ in range(rounds + 1)][1:]  # the first warms up


def work(rank: int, processes: int, store: str, options: tuple[SpaceExploreConfig, int, int], rounds: int) -> Round:
    """One process' life; the medians of its rounds."""
    torch.set_num_threads(1)
    keep_freed_memory()
    training = Training(*options)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    measured = take_turns(training, rounds)
    dist.destroy_process_group()
    return Round(*map(median, zip(*measured, strict=True)))


def measure(processes: int, config: SpaceExploreConfig, tokens: int, context: int, rounds: int) -> Round:
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        shared = (processes, str(Path(folder, "store")), (config, tokens, context), rounds)
        first, *_ = [pool.submit(work, rank, *shared) for rank in range(processes)]
        return first.result()


def machine_of(measured: Round, processes: int) -> Machine:
    """The speeds of a thread here."""
    link = ring(BUCKET, processes) / measured.all_reduce
    return Machine(2 * SQUARE**3 / measured.product, 2 * BUCKET / measured.copy, link)


def format_here(processes: int, tokens: int, measured: Round, cost: Cost, machine: Machine) -> str:
    averaging = measured.together - measured.apart
    rows = {
        "one alone": (measured.alone, cost.alone),
        "all at once, without averaging": (measured.apart, cost.alone),
        "averaging": (averaging, cost.all_reduce),
        "all together": (measured.together, cost.step),
    }
    speeds = f"{machine.flops / 1e9:.0f} GFLOP/s, copies {machine.memory / 1e9:.1f} GB/s, all-reduce"
    lines = [f"{speeds} {machine.link / 1e9:.2f} GB/s; {4 * cost.parameters / 1e6:.0f} MB of gradients\n"]
    lines += [f"| step of {processes} processes, {tokens:,} tokens each | s | on paper |", "|---|---:|---:|"]
    lines += [f"| {name} | {here:.3f} | {paper:.3f} |" for name, (here, paper) in rows.items()]
    return "\n".join(lines) + f"\n| efficiency | {measured.alone / measured.together:.2f} | {cost.efficiency:.2f} |"


@command
def main(argv: list[str] | None = None) -> None:
    speeds = {"flops": 989e12, "memory": 3.35e12, "link": 450e9}
    args = parse_options(__doc__, argv, rounds=5, processes=2, **speeds)
    if args.processes < 2:
        raise ValueError(f"processes must be at least 2, got {args.processes}")
    config = read_config(args.model_config)
    measured = measure(args.processes, config, args.tokens, args.context, args.rounds)
    here = machine_of(measured, args.processes)
    cost = cost_model(config, args.tokens, args.context, args.processes, here, width=4)
    print(format_here(args.processes, args.tokens, measured, cost, here), flush=True)
    gpu = Machine(args.flops, args.memory, args.link)
    print(f"\non paper, from a datasheet:\n\n{format_paper(gpu)}\n\n{compare_h100(gpu)}")


if __name__ == "__main__":
    main()
