"""How fast an exported network forecasts, beside the network itself.

    python benchmarks/export.py [--model-config FILE] [--context 64] [--batches 1 8 64] [--rounds 15]

The network as PyTorch runs it (with the experts' products grouped), the program of torch.export, and onnxruntime with
float32 and with int8, in one process and one thread. They take turns, and what is shown is the median time of a batch
and the median of the rounds' ratios to PyTorch's. Random weights and inputs without a gap: neither time nor size
depends on them, but for the experts that the router chooses.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.scripts.export import (
    INT8,
    ONNX,
    TORCH,
    Graph,
    Run,
    quiet,
    run_module,
    run_onnx,
    write_int8,
    write_onnx,
    write_torch,
)
from spaceexploreai.train.arguments import bare_parser, command

RECIPE = Path(__file__).parents[1] / "recipes" / "27m" / "config.json"
EAGER = "PyTorch"
HEADER = "| windows | runtime | ms | of PyTorch's time |\n|---:|---|---:|---:|"


def make_graphs(model: SpaceExploreForRegression, folder: Path) -> dict[str, Run]:
    with quiet():
        write_onnx(model, folder / ONNX)
        write_int8(folder / ONNX, folder / INT8)
        write_torch(model, folder / TORCH)
        program = torch.export.load(folder / TORCH).module()
    return {
        EAGER: run_module(Graph(model)),
        "torch.export": run_module(program),
        "onnxruntime": run_onnx(folder / ONNX, threads=1),
        "onnxruntime int8": run_onnx(folder / INT8, threads=1),
    }


def make_batch(config: SpaceExploreConfig, batch_size: int, context: int) -> dict[str, torch.Tensor]:
    return {
        "past_values": torch.randn(batch_size, context, config.num_features),
        "attention_mask": torch.ones(batch_size, context, dtype=torch.long),
        "scale": torch.full((batch_size, context), 0.02),
    }


def seconds(run: Callable, batch: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    run(batch)
    return time.perf_counter() - start


def take_turns(runs: dict[str, Run], batch: dict[str, torch.Tensor], rounds: int) -> list[dict[str, float]]:
    """Seconds of each in each round; one round more, the first, warms up."""
    return [{name: seconds(run, batch) for name, run in runs.items()} for _ in range(rounds + 1)][1:]


def format_rounds(batch_size: int, rounds: list[dict[str, float]]) -> str:
    lines = []
    for name in rounds[0]:
        time_ = median(one[name] for one in rounds)
        ratio = median(one[name] / one[EAGER] for one in rounds)
        lines.append(f"| {batch_size} | {name} | {1e3 * time_:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def format_sizes(model: SpaceExploreForRegression, folder: Path) -> str:
    weights = model.get_memory_footprint()
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    shares = [f"{name} {size / 1e6:.1f} MB ({size / weights:.2f})" for name, size in sizes.items()]
    return f"weights {weights / 1e6:.1f} MB; {', '.join(shares)}"


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--model-config", type=Path, default=RECIPE, help="config.json; default: recipes/27m")
    parser.add_argument("--context", type=int, default=64, help="days of a window (default: 64)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="windows (default: 1 8 64)")
    parser.add_argument("--rounds", type=int, default=15, help="of which the medians are (default: 15)")
    args = parser.parse_args(argv)
    for name in ("context", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    torch.set_num_threads(1)  # a second would measure whatever else the machine is doing
    torch.manual_seed(0)
    config = SpaceExploreConfig(**json.loads(args.model_config.read_text(encoding="utf-8")))
    model = SpaceExploreForRegression(config).eval()
    with TemporaryDirectory() as folder:
        runs = make_graphs(model, Path(folder))
        print(f"{format_sizes(model, Path(folder))}\n\n{HEADER}", flush=True)
        for batch_size in args.batches:
            batch = make_batch(config, batch_size, args.context)
            print(format_rounds(batch_size, take_turns(runs, batch, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
