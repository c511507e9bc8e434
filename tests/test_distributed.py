"""Several processes train as one does, and a killed run goes on as if it had not been."""

import hashlib
import json
import random
from pathlib import Path

import pytest
from conftest import RECIPE, make_market, tiny_run
from workers import Group, killed, train

from spaceexploreai.data.prices import write_table

EVERY_STEP = ("--logging_strategy", "steps", "--logging_steps", "1", "--use_cpu", "true")


def history(checkpoint: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, as logged until a checkpoint."""
    logged = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in logged if "loss" in entry}


# --- a step is the same step ---


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """A market with a late ticker, whose windows are short, and a halt, whose steps are masked."""
    prices = make_market(tickers=4, days=400)
    late = (prices["ticker"] == "T3") & (prices["date"] < prices["date"].unique()[200])
    halt = (prices["ticker"] == "T1") & prices["date"].isin(prices["date"].unique()[100:130])
    path = tmp_path_factory.mktemp("uneven") / "market.parquet"
    write_table(prices[~(late | halt)], path)
    return path


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Path:
    """The tiny network without what depends on how a batch is parted: dropout, and the balance of its experts."""
    fields = json.loads((RECIPE / "config.json").read_text())
    fields |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "router_aux_loss_coef": 0.0}
    path = tmp_path_factory.mktemp("exact") / "config.json"
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    "task", [("regression",), ("regression", "--balance", "ticker"), ("causal_lm", "--balance", "year")], ids=" ".join
)
def test_accumulated_batches_and_those_of_two_processes_are_the_large_batch(tmp_path, uneven, exact, task):
    steps = ("--max_steps", "6", "--save_strategy", "steps", "--save_steps", "6", "--dataloader_drop_last", "true")
    options = ("--prices", str(uneven), "--model_config", str(exact), *EVERY_STEP, *steps, "--task", *task)
    ways = {"large": (1, "16"), "accumulated": (1, "8", "--gradient_accumulation_steps", "2"), "two": (2, "8")}
    groups = [
        Group(size, tmp_path / name, train, [*tiny_run(tmp_path / name, *options), "--per_device_train_batch_size", *batch])
        for name, (size, *batch) in ways.items()
    ]
    for group in groups:
        group.succeed()
    large, *others = (history(tmp_path / name / "checkpoint-6") for name in ways)
    assert list(large) == [1, 2, 3, 4, 5, 6]
    for other in others:
        assert list(other) == list(large)
        for step, pair in large.items():
            assert other[step] == pytest.approx(pair, rel=2e-4)


# --- resuming ---

INTERRUPTED = {
    "one process": (1, ()),
    "accumulated batches": (1, ("--gradient_accumulation_steps", "2")),
    "balanced windows": (1, ("--balance", "year")),
    "two processes": (2, ()),
    "two processes, balanced windows": (2, ("--balance", "year")),
}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, market, case):
    """To the bit, in the middle of the second epoch, with dropout."""
    size, options = INTERRUPTED[case]
    batch = ("--per_device_train_batch_size", str(8 // size), *EVERY_STEP, *options)
    steps = ("--max_steps", "14", "--save_strategy", "steps", "--save_steps", "5")
    whole, broken = (
        tiny_run(tmp_path / name, "--prices", str(market), *batch, *steps) for name in ("whole", "broken")
    )
    uninterrupted = Group(size, tmp_path / "whole", train, whole)
    micro_batches = 2 if "accumulated" in case else 1
    moment = random.Random(case).randrange(10 * micro_batches, 14 * micro_batches)
    assert -9 in Group(size, tmp_path / "broken", killed, broken, moment).wait()
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    Group(size, tmp_path / "broken", train, [*broken, "--resume_from_checkpoint", "true"]).succeed()
    uninterrupted.succeed()
    expected, found = (history(tmp_path / name / "checkpoint-14") for name in ("whole", "broken"))
    assert found == expected
    assert list(found) == list(range(1, 15))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert hashlib.sha256(weights[0]).hexdigest() == hashlib.sha256(weights[1]).hexdigest()
