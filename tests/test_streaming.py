"""Streams as training reads them: memory stays level, processes share the windows out, a run goes on where it was."""

import copy
import ctypes
import gc
import json
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from conftest import STILL, make_market
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from spaceexploreai.benchmarks import stream
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.prices import write_table
from spaceexploreai.data.stocks import open_stocks, stream_windows
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.scripts import build_dataset

CONTEXT, BATCH = 16, 8
MB = 2**20


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing is read from or left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def columns(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("columns")
    extractor = SpaceExploreFeatureExtractor(feature_names=["gap", "body", "rsi_14"], context_length=CONTEXT)
    extractor.to_json_file(folder / "preprocessor_config.json")
    return folder


@pytest.fixture(scope="module")
def folders(columns, tmp_path_factory) -> Path:
    """Eight tickers in an even and in an odd number of files."""
    parent = tmp_path_factory.mktemp("published")
    write_table(make_market(tickers=8, days=300), parent / "prices.parquet")
    data = ["--prices", str(parent / "prices.parquet"), "--extractor", str(columns), "--config", "sft"]
    for name, files in (("even", 4), ("odd", 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_dataset, "TICKERS_PER_FILE", -(-8 // files))
            build_dataset.main([*data, "--output-dir", str(parent / name), "--stride", "5"])
        assert len(list((parent / name / "series").iterdir())) == files
    return parent


@pytest.fixture(scope="module", params=["even", "odd"])
def folder(request, folders) -> Path:
    return folders / request.param


# --- memory ---


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A market whose windows are many times what one file holds."""
    target = tmp_path_factory.mktemp("large") / "market"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_dataset, "TICKERS_PER_FILE", 4)
        stream.make_market(target, 200, 700, "--stride", "4")
    return target


def test_a_simulated_market_has_its_tickers_under_many_names(large):
    """As many files as such a market has, each a whole one."""
    assert len(list((large / "series").iterdir())) == len(list((large / "sft").glob("train-*"))) == 50
    windows = stream_windows(str(large), "train")
    assert windows.num_shards == 50
    assert sum(1 for _ in windows) == stream.count_windows(large) > 20_000


def growth(quarters: list[stream.Quarter]) -> float:
    return (quarters[-1].memory - quarters[0].memory) / MB


@pytest.fixture
def trimmed():
    """Without what earlier tests have freed and the allocator holds: what is kept would be put there, unseen."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.mark.usefixtures("trimmed")
def test_memory_stays_level_and_the_watch_sees_what_is_kept(large):
    total = stream.count_windows(large)
    batches = stream.training_input(large, batch_size=64, num_workers=0)
    quarters = stream.watch(batches, total)
    assert sum(quarter.windows for quarter in quarters) == total
    kept = []
    # Twice, since some of it may find a place that was resident before.
    leak = stream.watch((kept.append((batch, copy.deepcopy(batch))) or batch for batch in batches), total)
    streamed = sum(batch["past_values"].nbytes for batch, _ in kept) / MB
    assert streamed > 300
    assert growth(leak) > streamed / 2
    assert growth(quarters) < streamed / 20


def test_the_watch_sees_what_is_held_for_a_moment():
    """Pages of the system's own: an allocator may have free ones at hand, or keep them afterwards."""

    def batches():
        for number in range(400):
            held = mmap.mmap(-1, 200 * MB if number == 250 else mmap.PAGESIZE)
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1
            yield {"scale": np.ones(1)}
            held.close()

    quarters = stream.watch(batches(), 400, batches_per_look=1)
    assert [quarter.windows for quarter in quarters] == [100] * 4
    assert [round((quarter.memory - quarters[0].memory) / MB, -2) for quarter in quarters] == [0, 0, 200, 0]


# --- Trainer ---


def make_trainer(dataset, output: Path, steps: int, **options) -> Trainer:
    set_seed(0)
    recipe = json.loads(stream.RECIPE.read_text(encoding="utf-8"))
    # Without dropout nothing but the windows and their order decides.
    own = {"num_features": 3} | STILL
    model = SpaceExploreForRegression(SpaceExploreConfig(**{**recipe, **own}))
    arguments = TrainingArguments(
        output,
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    return Trainer(model, arguments, collate_windows, dataset)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize(
    "options", [{}, {"accelerator_config": {"dispatch_batches": False}}, {"dataloader_num_workers": 1}]
)
def test_training_from_a_stream_is_training_from_the_windows_in_order(folder, tmp_path, options):
    streamed = make_trainer(stream_windows(str(folder), "train"), tmp_path, 5, **options)
    stored = make_trainer(open_stocks(str(folder)).train, tmp_path, 5, train_sampling_strategy="sequential")
    before = weights(stored)
    for trainer in (streamed, stored):
        trainer.train()
    assert not torch.equal(weights(stored), before)
    assert torch.equal(weights(streamed), weights(stored))


@pytest.mark.parametrize("passes", [1, None])
def test_a_run_goes_on_where_it_was(folder, tmp_path, passes):
    """Trainer reads again what it had seen: exact in the first pass over the files, and in one that has no end."""
    windows = stream_windows(str(folder), "train").take(4 * BATCH).repeat(passes)
    whole, half, again = (
        make_trainer(windows, tmp_path, 9, save_strategy=strategy, save_steps=6) for strategy in ("no", "steps", "no")
    )
    whole.train()
    half.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.state.global_step == 9
    # The other run began its second pass anew.
    assert torch.equal(weights(again), weights(whole)) == (passes is None)


@settings(max_examples=8, deadline=None)
@given(epoch=st.integers(0, 9), buffer_size=st.integers(2, 400), seed=st.integers(0, 99))
def test_every_pass_has_every_window_once_in_an_order_of_its_own(folder, epoch, buffer_size, seed):
    plain = stream_windows(str(folder), "train")
    mixed = plain.shuffle(seed=seed, buffer_size=buffer_size)
    mixed.set_epoch(epoch)
    expected, found = keys_of(collate_windows(list(plain))), keys_of(collate_windows(list(mixed)))
    assert not np.array_equal(found, expected)
    np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(expected, axis=0))


# --- two processes ---


def keys_of(batch: dict[str, torch.Tensor]) -> np.ndarray:
    """What tells windows apart: their last step. (B, F + 1 + H), NaN as zero."""
    last = [batch["past_values"][:, -1], batch["scale"][:, -1:], batch["labels"][:, -1]]
    return torch.cat(last, dim=1).nan_to_num().numpy()


def prepared(options: dict, stream: datasets.IterableDataset) -> DataLoader:
    loader = DataLoader(stream, BATCH, collate_fn=collate_windows)
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options)).prepare(loader)


def run_rank(folder: Path) -> None:
    """What each of two processes does."""
    whole = stream_windows(str(folder), "train")
    # Before accelerate hears of anything: the arguments say that it is to use the CPU.
    trainer = make_trainer(whole, folder, 15, accelerator_config={"dispatch_batches": False})
    rank, world_size = trainer.args.process_index, trainer.args.world_size
    part = split_dataset_by_node(whole, rank, world_size)
    loaders = {
        "by_node": DataLoader(part, BATCH, collate_fn=collate_windows),
        "by_files": prepared({"dispatch_batches": False}, whole),
        "dispatched": prepared({"dispatch_batches": True}, whole),
        "split": prepared({"dispatch_batches": False, "split_batches": True}, whole),
        "twice": prepared({"dispatch_batches": False}, part),
    }
    found = {name: np.concatenate([keys_of(batch) for batch in loader]) for name, loader in loaders.items()}
    trainer.train()
    np.savez(folder / f"{rank}.npz", world_size=world_size, weights=weights(trainer).numpy(), **found)


@pytest.fixture(scope="module")
def launched(folders) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, __file__, str(folders / "even"), str(folders / "odd")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def ranks(launched, folder) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(folder / f"{rank}.npz")) for rank in (0, 1)]


def rows(*parts: np.ndarray) -> list[tuple]:
    return sorted(map(tuple, np.concatenate(parts).tolist()))


@pytest.fixture(scope="module")
def every(folder) -> list[tuple]:
    windows = rows(keys_of(collate_windows(list(stream_windows(str(folder), "train")))))
    assert len(set(windows)) == len(windows)
    return windows


@pytest.mark.parametrize("route", ["by_node", "by_files"])
def test_two_processes_share_out_all_windows(ranks, every, route):
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert rows(*(rank[route] for rank in ranks)) == every
    assert all(len(rank[route]) for rank in ranks)


@pytest.mark.parametrize("route", ["dispatched", "split"])
def test_batches_shared_out_repeat_windows_only_to_fill_the_last(ranks, every, route):
    found = rows(*(rank[route] for rank in ranks))
    assert set(found) == set(every)
    assert 0 <= len(found) - len(every) < 2 * BATCH


def test_sharing_out_twice_loses_windows(ranks, every):
    """accelerate shares a stream out by itself: it must not get one that was split by node."""
    found = rows(*(rank["twice"] for rank in ranks))
    assert set(found) < set(every)


def test_two_processes_train_one_network_from_parts_of_unlike_length(ranks):
    """One of them begins another pass while the other is in its first."""
    one, other = (rank["weights"] for rank in ranks)
    np.testing.assert_array_equal(one, other)
    assert np.isfinite(one).all()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        run_rank(Path(argument))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
