"""How fast a market larger than memory streams into training, and how much memory that takes.

    python benchmarks/stream.py [--tickers 20000] [--days 5000] [--stride 16] [--batch-size 64] [--num-workers 0]

One file of random walks is built, and stands in the folder under as many names as the market has files: bytes are few,
but each name is read and decoded. Batches are those that `Trainer` gives the network. Exit code 1 when the process
takes more memory in the last quarter of the windows than in the first.
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import exchange_calendars
import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.prices import write_table
from spaceexploreai.data.stocks import stream_windows
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.scripts import build_dataset
from spaceexploreai.train.arguments import bare_parser, command

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny" / "config.json"
GROWTH = 0.05  # of the memory that the first quarter takes; allocators keep some of what they get


def make_prices(tickers: int, days: int) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    dates = exchange_calendars.get_calendar("XNYS", start="1995-01-01", end="2024-12-31").sessions[-days:]
    close = 50 * np.exp(generator.normal(0, 0.02, (tickers, days)).cumsum(axis=1))
    spread = np.exp(np.abs(generator.normal(0, 0.01, (2, tickers, days))))
    frame = {"open": close, "high": close * spread[0], "low": close / spread[1], "close": close}
    names = [f"T{number:05d}" for number in range(tickers)]
    table = pd.DataFrame({name: values.reshape(-1) for name, values in frame.items()})
    table.insert(0, "ticker", np.repeat(names, days))
    table.insert(1, "date", np.tile(dates.to_numpy(), tickers))
    return table.assign(volume=generator.integers(1e5, 1e6, len(table)).astype(float))


def make_market(folder: Path, tickers: int, days: int, *options: str) -> None:
    """Builds a file of tickers, and gives it as many names as a market of so many has files."""
    size = min(tickers, build_dataset.TICKERS_PER_FILE)
    with TemporaryDirectory() as prices:
        write_table(make_prices(size, days), Path(prices, "prices.parquet"))
        data = ["--prices", str(Path(prices, "prices.parquet")), "--config", "sft", "--output-dir", str(folder)]
        build_dataset.main([*data, *options])
    multiply(folder, -(-tickers // size))


def multiply(folder: Path, count: int) -> None:
    """Replaces each file of a published folder, the only one of its split, by as many names of it."""
    for path in list(folder.glob("*/*-00000-of-00001.parquet")):
        split = path.name.split("-")[0]
        for number in range(count):
            os.link(path, path.with_name(f"{split}-{number:05d}-of-{count:05d}.parquet"))
        path.unlink()


def training_input(folder: Path, batch_size: int, num_workers: int) -> DataLoader:
    """What `Trainer` iterates over."""
    features = len(json.loads((folder / "preprocessor_config.json").read_text())["feature_names"])
    recipe = json.loads(RECIPE.read_text(encoding="utf-8"))
    model = SpaceExploreForRegression(SpaceExploreConfig(**{**recipe, "num_features": features}))
    arguments = TrainingArguments(
        folder / "unused",
        per_device_train_batch_size=batch_size,
        dataloader_num_workers=num_workers,
        max_steps=1,
        use_cpu=True,
        report_to=[],
    )
    dataset = stream_windows(str(folder), "train")
    return Trainer(model, arguments, collate_windows, dataset).get_train_dataloader()


class Quarter(NamedTuple):
    windows: int
    seconds: float
    memory: int  # the most that was resident, in bytes


def watch(batches: Iterable[dict], total: int, batches_per_look: int = 20) -> list[Quarter]:
    """What each quarter of `total` windows took."""
    quarters, seen, batches = [], 0, enumerate(batches)
    for number in range(1, 5):
        before, start, memory = seen, time.perf_counter(), resident()
        for step, batch in batches:
            seen += len(batch["scale"])
            if step % batches_per_look == 0:
                memory = max(memory, resident())
            if seen >= total * number / 4:
                break
        quarters.append(Quarter(seen - before, time.perf_counter() - start, memory))
    return quarters


def resident() -> int:
    """Bytes of memory of this process and of those it started."""
    process = psutil.Process()
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def count_windows(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in (folder / "sft").glob("train-*.parquet"))


def format_quarters(quarters: list[Quarter]) -> str:
    lines = ["| quarter | windows | windows/s | MB |", "|---|---:|---:|---:|"]
    for number, (windows, seconds, memory) in enumerate(quarters, 1):
        lines.append(f"| {number} | {windows:,} | {windows / seconds:,.0f} | {memory / 2**20:,.0f} |")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    defaults = {"tickers": 20_000, "days": 5_000, "stride": 16, "batch_size": 64, "num_workers": 0}
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args(argv)
    with TemporaryDirectory() as parent:
        folder = Path(parent, "market")
        make_market(folder, args.tickers, args.days, "--stride", str(args.stride))
        total = count_windows(folder)
        quarters = watch(training_input(folder, args.batch_size, args.num_workers), total)
    print(f"{args.tickers:,} tickers of {args.days:,} days, {total:,} windows\n\n{format_quarters(quarters)}")
    if quarters[-1].memory > quarters[0].memory * (1 + GROWTH):
        raise SystemExit("the process grew")


if __name__ == "__main__":
    main()
