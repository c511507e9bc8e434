"""How near a training step comes to the matrix products that it is made of, at this machine's speed of such.

    python benchmarks/train_step.py [--model-config FILE] [--tokens 2048] [--context 64] [--rounds 9] [--threads 1]

Random inputs with a label at every step, float32: forward, backward, clipping and the optimiser that `Trainer` takes
by default. Model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B) is the time that the products of the model
would take at the speed of a large square one with as many threads, over the time of the step. Both take turns, and the
median of the rounds' ratios is shown. Times of one thread are CPU times of the process: where nothing else runs, those
of the clock. Those of several are the clock's: where others compute too, OMP_WAIT_POLICY=passive keeps
threads from spinning for the one that has no core. First with the allocator as it is, then with freed memory kept, as
the training programs have it. Exit code 1 when 2,000 tokens or more have a utilisation below 0.75 then, which is asked
of recipes/27m.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import Trainer, TrainingArguments

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.modeling_spaceexplore import (
    SpaceExploreForRegression,
    SpaceExploreModel,
    SpaceExploreModelOutput,
    SpaceExploreMoE,
)
from spaceexploreai.train.arguments import bare_parser, command
from spaceexploreai.train.memory import keep_freed_memory

RECIPE = Path(__file__).parents[1] / "recipes" / "27m" / "config.json"
SQUARE = 2048  # rows and columns of the product that sets the machine's speed
LEAST_UTILISATION, LEAST_TOKENS = 0.75, 2000


def clock() -> float:
    """CPU time of the process, which other programs hardly lengthen; of several threads that would be the sum."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def grouped_flops(rows: torch.Size, weights: torch.Size, *args, out_shape=None, **kwargs) -> int:
    """Every row with the weights of its expert; of the weights' gradient, every column with its row."""
    return 2 * rows[0] * rows[1] * weights[-1]


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args, out_shape=None, **kwargs) -> int:
    """The triangle of keys up to each query."""
    batch_size, heads, steps, width = query
    return 2 * batch_size * heads * (steps * (steps + 1) // 2) * (width + value[-1])


def attention_backward_flops(grad: torch.Size, *args, **kwargs) -> int:
    """Two products for each one; that the kernel makes the weights again is no work of the model."""
    return 2 * attention_flops(*args, **kwargs)


# Of what the network calls, what the counter of torch does not know.
UNCOUNTED = {
    torch.ops.aten._grouped_mm: grouped_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
PRODUCTS = {*UNCOUNTED, *flop_registry}


class ProductClock(TorchDispatchMode):
    """Seconds in matrix products, as they run within the step."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = clock()
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.seconds += clock() - start
        return output


def count_flops(function: Callable[[], object]) -> int:
    """Of the matrix products and convolutions; experts work on the tokens they got."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        function()
    return counter.get_total_flops()


class Training:
    """The network of a recipe, a batch and an optimiser."""

    def __init__(
        self,
        config: SpaceExploreConfig,
        tokens: int,
        context: int,
        make_model: Callable[[SpaceExploreConfig], SpaceExploreForRegression] = SpaceExploreForRegression,
    ):
        torch.manual_seed(0)
        self.model = make_model(config).train()
        arguments = TrainingArguments("unused", use_cpu=True, report_to=[])
        self.max_grad_norm = arguments.max_grad_norm
        self.optimizer = Trainer(self.model, arguments).create_optimizer()
        shape = (tokens // context, context)
        self.batch = {
            "past_values": torch.randn(*shape, config.num_features),
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "scale": torch.full(shape, 0.02),
            "labels": 0.02 * torch.randn(*shape, len(config.horizons)),
        }

    def backward(self) -> None:
        self.model(**self.batch).loss.backward()

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.backward()
        self.clip()
        self.update()

    def count_flops(self) -> int:
        """Of forward and backward."""
        flops = count_flops(self.backward)
        self.optimizer.zero_grad()
        return flops


def seconds(function: Callable[[], None]) -> float:
    start = clock()
    function()
    return clock() - start


class Square:
    """A large square product, by which the speed of the machine is judged."""

    def __init__(self, size: int):
        self.factor, self.product = torch.randn(size, size), torch.empty(size, size)

    def speed(self) -> float:
        """Floating-point operations a second."""
        multiply = seconds(lambda: torch.mm(self.factor, self.factor, out=self.product))
        return 2 * len(self.product) ** 3 / multiply


class Round(NamedTuple):
    step: float  # seconds
    products: float  # seconds of another step's matrix products
    speed: float  # of the square product before and after
    parts: dict[str, float]  # seconds of each part of the step by itself


def measure(training: Training, rounds: int) -> list[Round]:
    square, parts, measured = Square(SQUARE), parts_of(training), []
    for _ in range(rounds + 1):
        before = square.speed()
        step = seconds(training.step)
        after = square.speed()
        with ProductClock() as products:
            training.step()
        alone = {name: sum(map(seconds, runs)) for name, runs in parts.items()}
        measured.append(Round(step, products.seconds, (before + after) / 2, alone))
    return measured[1:]  # the first warms up


def parts_of(training: Training) -> dict[str, list[Callable[[], None]]]:
    """What a step consists of, in an order in which each can be run by itself."""
    base, parts = training.model.model, {}
    modules = {base.value_embedding: "front end", base.mscnn: "front end"}
    for layer in base.layers:
        mlp = "router and experts" if isinstance(layer.mlp, SpaceExploreMoE) else "dense layers"
        modules |= {layer.self_attn: "attention", layer.mlp: mlp}

    def keep(module, args, kwargs):
        parts.setdefault(modules[module], []).append(partial(both_ways, module, *detached((args, kwargs))))

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    inputs = {name: training.batch[name] for name in ("past_values", "attention_mask")}
    outputs = detached(base(**inputs, output_router_logits=True))
    for hook in hooks:
        hook.remove()
    heads = partial(heads_both_ways, training, outputs)
    return parts | {"heads and loss": [heads], "clipping": [training.clip], "optimiser": [training.update]}


def both_ways(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward and backward of one part of the network, on what it was given."""
    output = module(*args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    output.backward(torch.ones_like(output))


def heads_both_ways(training: Training, outputs: SpaceExploreModelOutput) -> None:
    with patch.object(SpaceExploreModel, "forward", return_value=outputs):
        training.backward()


def detached(values):
    """The same tensors as leaves, which get a gradient if they had one."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), values)


def utilisation(rounds: list[Round], flops: int) -> float:
    return median(flops / one.speed / one.step for one in rounds)


HEAD = (
    "| tokens | threads | freed memory | products, GFLOP | square, GFLOP/s | products at that speed, s "
    "| products as they run, s | step, s | utilisation | targets/s | peak MB |\n"
    "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def format_steps(training: Training, memory: str, rounds: list[Round], flops: int) -> str:
    """A row under `HEAD`."""
    step, products, speed = (median(values) for values in list(zip(*rounds, strict=True))[:3])
    tokens, targets = training.batch["scale"].numel(), training.batch["labels"].numel()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
    return (
        f"| {tokens:,} | {torch.get_num_threads()} | {memory} | {flops / 1e9:.1f} | {speed / 1e9:.1f} "
        f"| {flops / speed:.3f} | {products:.3f} | {step:.3f} | {utilisation(rounds, flops):.3f} "
        f"| {targets / step:,.0f} | {peak / 2**20:,.0f} |"
    )


def format_parts(rounds: list[Round]) -> str:
    shares = {name: median(one.parts[name] / one.step for one in rounds) for name in rounds[0].parts}
    shares["the rest: norms, residuals, mask"] = 1 - sum(shares.values())
    lines = ["| part, forward and backward | of the step |", "|---|---:|"]
    return "\n".join(lines + [f"| {name} | {share:.1%} |" for name, share in shares.items()])


def read_config(path: Path) -> SpaceExploreConfig:
    return SpaceExploreConfig(**json.loads(path.read_text(encoding="utf-8")))


def parse_options(description: str, argv: list[str] | None, **numbers: float) -> argparse.Namespace:
    """Options of a program that trains: a network, and the given numbers beside how many tokens a batch has."""
    numbers = {"tokens": SQUARE, "context": 64, **numbers}
    parser = bare_parser(description)
    parser.add_argument("--model-config", type=Path, default=RECIPE, help="config.json; default: recipes/27m")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)g")
    args = parser.parse_args(argv)
    for name in numbers:
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.tokens % args.context:
        raise ValueError(f"tokens must be a multiple of the context, got {args.tokens} and {args.context}")
    return args


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_options(__doc__, argv, rounds=9, threads=1)
    torch.set_num_threads(args.threads)
    training = Training(read_config(args.model_config), args.tokens, args.context)
    flops = training.count_flops()
    print(HEAD)
    given_back = measure(training, args.rounds)
    print(format_steps(training, "given back", given_back, flops), flush=True)
    keep_freed_memory()
    rounds = measure(training, args.rounds)
    print(f"{format_steps(training, 'kept', rounds, flops)}\n\n{format_parts(rounds)}\n")
    ratio = median(one.step for one in rounds) / median(one.step for one in given_back)
    print(f"a step with freed memory kept takes {ratio:.2f} of the time")
    if args.tokens >= LEAST_TOKENS and utilisation(rounds, flops) < LEAST_UTILISATION:
        raise SystemExit(f"the utilisation is below {LEAST_UTILISATION}")  # on standard error, with exit code 1


if __name__ == "__main__":
    main()
