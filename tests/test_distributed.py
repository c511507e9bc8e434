"""Several processes train as one does, and a killed run goes on as if it had not been."""

import copy
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import workers
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from accelerate.utils.other import get_free_port
from conftest import RECIPE, make_market, tiny_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import StateDictType
from workers import Group

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.prices import read_prices, write_table
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.pipeline_spaceexplore import SpaceExplorePipeline
from spaceexploreai.scripts.forecast import forecast_newest
from spaceexploreai.scripts.forecasters import load_pipeline
from spaceexploreai.train import sft
from spaceexploreai.train.arguments import parse_run

ROOT = RECIPE.parents[1]
ACCELERATE = ROOT / "recipes" / "accelerate"
EVERY_STEP = ("--logging_strategy", "steps", "--logging_steps", "1", "--use_cpu", "true")


def logged(checkpoint: Path) -> list[dict]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def history(checkpoint: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, as logged until a checkpoint."""
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in logged(checkpoint) if "loss" in entry}


def metrics(checkpoint: Path) -> dict[str, float]:
    """Of the last evaluation; not its loss, which is a mean over batches that have labels unlike in number."""
    *_, last = (entry for entry in logged(checkpoint) if "eval_loss" in entry)
    left_out = ("eval_loss", "eval_runtime", "per_second")
    return {name: value for name, value in last.items() if not any(part in name for part in left_out)}


def launch_environment(recipe: Path, *options: str) -> dict[str, str]:
    """What `accelerate launch` tells the processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(recipe), *options, "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    ours = ("FSDP", "ACCELERATE")
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if name.startswith(ours)}


# --- launching ---


def launch(recipe: Path, run: list[str], *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(recipe), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, "train/sft.py", *run], cwd=ROOT, env=environment, **pipes)


def check_launched(folder: Path, printed: str, market: Path) -> None:
    """Two processes trained together, one of them said so, and what it left forecasts."""
    assert "4 steps of 64 windows" in (folder / "report.md").read_text()
    assert " s on 2 cpu, " in (folder / "report.md").read_text()
    assert printed.count("'train_runtime'") == printed.count("rows read") == 1
    forecast = forecast_newest(load_pipeline(folder), read_prices(market)).table
    assert set(forecast["ticker"]) == {"T0", "T1", "T2"}
    assert forecast["mean"].notna().all()


def test_two_processes_on_the_cpu(tmp_path, market):
    launched = launch(ACCELERATE / "ddp_cpu.yaml", tiny_run(tmp_path, "--prices", str(market), "--use_cpu", "true"))
    printed, _ = launched.communicate(timeout=workers.TIME_LIMIT)
    assert launched.returncode == 0, printed
    check_launched(tmp_path, printed, market)


def test_two_machines(tmp_path, market):
    """Both of them this one, without the recipe's GPUs."""
    recipe = yaml.safe_load((ACCELERATE / "multi_node.yaml").read_text())
    here = {"num_processes": 2, "mixed_precision": "no", "use_cpu": True, "main_process_port": get_free_port()}
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(recipe | here))
    run = tiny_run(tmp_path / "model", "--prices", str(market), "--use_cpu", "true")
    launched = [launch(tmp_path / "here.yaml", run, "--machine_rank", rank) for rank in ("0", "1")]
    printed = [machine.communicate(timeout=workers.TIME_LIMIT)[0] for machine in launched]
    assert [machine.returncode for machine in launched] == [0, 0], printed
    check_launched(tmp_path / "model", printed[0], market)


@pytest.mark.parametrize("recipe", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_starts_what_it_says(recipe):
    """accelerate ignores, silently, what it does not start several processes for."""
    asked = load_config_from_file(str(recipe))  # refuses unknown keys
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(recipe), "script.py"])
    )
    assert (arguments.multi_gpu or arguments.use_fsdp) == (asked.num_processes > 1) == (recipe.stem != "cpu")
    assert (arguments.num_processes, arguments.num_machines) == (asked.num_processes, asked.num_machines)
    assert asked.num_processes % asked.num_machines == 0
    assert (arguments.num_machines > 1) == (recipe.stem == "multi_node")
    assert arguments.use_fsdp == (recipe.stem == "fsdp")


def test_the_recipe_of_fsdp_fits_every_network(monkeypatch):
    for name, value in launch_environment(ACCELERATE / "fsdp.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading
    for recipe in ("tiny", "27m"):
        fields = {"num_features": 64, **json.loads((ROOT / "recipes" / recipe / "config.json").read_text())}
        with torch.device("meta"):
            plugin.set_auto_wrap_policy(SpaceExploreForRegression(SpaceExploreConfig(**fields)))


def test_processes_that_do_not_find_each_other_are_refused(tmp_path, market):
    """As started on a CPU without --use_cpu, where each would train alone."""
    run = tiny_run(tmp_path / "model", "--prices", str(market))
    group = Group(2, tmp_path, workers.train, run)
    assert group.wait() == [2, 2]
    for log in group.logs:
        assert log.read_text().splitlines()[-1].startswith("error: of 2 processes each would train alone")
    assert not (tmp_path / "model").exists()


# --- data ---


def test_one_process_prepares_the_data_and_writes(tmp_path):
    write_table(make_market(seed=1), tmp_path / "market.parquet")
    run = tiny_run(tmp_path, "--prices", str(tmp_path / "market.parquet"), "--use_cpu", "true")
    steps = ("--save_strategy", "steps", "--save_steps", "2")
    group = Group(2, tmp_path, workers.train_apart, [*run, *steps], tmp_path)
    group.succeed()
    assert ["Generating train split" in log.read_text() for log in group.logs] == [True, False]
    assert (tmp_path / "0" / "model.safetensors").exists()
    written = {path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file()}
    assert written == {Path("checkpoint-4", "rng_state_1.pth"), Path("checkpoint-2", "rng_state_1.pth")}


def test_a_mistake_ends_all_processes(tmp_path, market):
    run = tiny_run(tmp_path / "model", "--prices", str(market), "--tickers", "T0,NONE", "--use_cpu", "true")
    group = Group(2, tmp_path, workers.train, run)
    assert group.wait() == [2, 2]
    for log in group.logs:
        (complaint,) = [line for line in log.read_text().splitlines() if line]
        assert complaint.startswith("error: ")
        assert "NONE" in complaint
    assert not (tmp_path / "model").exists()


def test_a_mistake_of_one_process_ends_the_other(tmp_path, market):
    """It is in no step with the other any more, which waits for its gradients."""
    run = tiny_run(tmp_path / "model", "--prices", str(market), "--use_cpu", "true")
    disturbance = ("compute_loss", 2, workers.poison, workers.train)
    group = Group(2, tmp_path, workers.train_disturbed, run, *disturbance)
    first, last = group.wait()
    assert last == 2
    assert first != 0
    complaint = group.logs[1].read_text().splitlines()[-1]
    assert complaint.startswith("error: the loss is nan at step 3, of the windows T")
    assert complaint.count(" to ") == 1
    assert not (tmp_path / "model" / "model.safetensors").exists()


# --- a step is the same step ---


@pytest.mark.parametrize(
    "task", [("regression",), ("regression", "--balance", "ticker"), ("causal_lm", "--balance", "year")], ids=" ".join
)
def test_accumulated_batches_and_those_of_two_processes_are_the_large_batch(tmp_path, uneven, exact, task):
    """Also in the second epoch, and where they have labels unlike in number. All windows are evaluated, once."""
    steps = ("--max_steps", "8", "--save_strategy", "steps", "--save_steps", "8", "--dataloader_drop_last", "true")
    steps += ("--eval_strategy", "steps", "--eval_steps", "8", "--per_device_eval_batch_size", "3")
    options = ("--prices", str(uneven), "--model_config", str(exact), *EVERY_STEP, *steps, "--task", *task)
    # An epoch of 60 to 64 windows is six whole steps in every way.
    ways = {"large": (1, "10"), "accumulated": (1, "5", "--gradient_accumulation_steps", "2"), "two": (2, "5")}
    groups = []
    for name, (size, *batch) in ways.items():
        run = [*tiny_run(tmp_path / name, *options), "--per_device_train_batch_size", *batch]
        groups.append(Group(size, tmp_path / name, workers.train, run))
    for group in groups:
        group.succeed()
    large, *others = (tmp_path / name / "checkpoint-8" for name in ways)
    assert list(history(large)) == list(range(1, 9))
    for other in others:
        assert metrics(other) == pytest.approx(metrics(large), rel=1e-3, abs=1e-4)
        assert list(history(other)) == list(history(large))
        for step, pair in history(large).items():
            assert history(other)[step] == pytest.approx(pair, rel=2e-5)


def test_evaluation_drops_no_window(tmp_path, market):
    options = ("--dataloader_drop_last", "true", "--per_device_eval_batch_size", "4")
    trainer, task, _ = sft.prepare(parse_run(tiny_run(tmp_path, "--prices", str(market), *options)))
    evaluated, trained = (
        sum(len(batch["past_values"]) for batch in loader)
        for loader in (trainer.get_eval_dataloader(), trainer.get_train_dataloader())
    )
    assert evaluated == len(task.validation)
    assert evaluated % 4 != 0
    assert trained == len(task.train) // 32 * 32 < len(task.train)


def test_a_step_with_parts_of_the_network_is_the_step_with_the_whole(tmp_path, market, checkpoint):
    """FSDP2 by itself: the weights after it make a checkpoint that forecasts the same."""
    _, _, data = sft.prepare(parse_run(tiny_run(tmp_path, "--prices", str(market))))
    batch = dict(collate_windows([data.train[row] for row in range(6)]))
    save_file(batch, tmp_path / "batch.safetensors")
    folder = tmp_path / "stepped"
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    Group(2, tmp_path, workers.sharded_step, checkpoint, tmp_path / "batch.safetensors", weights).succeed()

    model = SpaceExploreForRegression.from_pretrained(checkpoint)
    before = copy.deepcopy(model.state_dict())
    loss = workers.step(model, batch, int((batch["labels"] != -100).sum()))
    with safe_open(weights, "pt") as file:
        assert float(file.metadata()["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    found = load_file(weights)
    assert found.keys() == model.state_dict().keys()
    for name, after in model.state_dict().items():
        torch.testing.assert_close(found[name] - before[name], after - before[name], rtol=1e-3, atol=1e-5)
    assert any((after != before[name]).any() for name, after in model.state_dict().items())
    prices = read_prices(market)
    stepped = load_pipeline(folder, "cpu")
    expected = SpaceExplorePipeline(model=model, feature_extractor=stepped.feature_extractor, device="cpu")
    pd.testing.assert_frame_equal(stepped(prices), expected(prices), rtol=1e-4)


# --- resuming ---


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Processes, options, and before which call of what method of the trainer the last of them is killed.
IN_A_STEP, IN_A_CHECKPOINT = ("compute_loss", range(9, 12)), ("_save_rng_state", range(1, 3))
INTERRUPTED = {
    "one process": (1, (), *IN_A_STEP),
    "accumulated batches": (1, ("--gradient_accumulation_steps", "2"), "compute_loss", range(18, 24)),
    "balanced windows": (1, ("--balance", "year"), *IN_A_STEP),
    "two processes": (2, (), *IN_A_CHECKPOINT),
    "two processes, balanced windows": (2, ("--balance", "year"), *IN_A_STEP),
}


def test_what_a_killed_process_did_not_finish_writing_is_passed_over(tmp_path, market):
    steps = ("--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "3")
    run = tiny_run(tmp_path, "--prices", str(market), *EVERY_STEP, *steps)
    whole = sft.train(parse_run(run))
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("")
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    resumed = sft.train(parse_run([*run, "--resume_from_checkpoint", "true"]))
    expected = whole.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.state_dict().items())


def test_patience_is_what_was_left_of_it(tmp_path, market):
    """Evaluations after the second step are worse than the one there; the fourth of them is not waited for."""
    options = ("--early_stopping_patience", "3", "--learning_rate", "3e-2", "--max_steps", "40")
    steps = [option for name in ("eval", "save") for option in (f"--{name}_strategy", "steps", f"--{name}_steps", "2")]
    run = tiny_run(tmp_path, "--prices", str(market), *EVERY_STEP, *options, *steps, "--save_total_limit", "9")
    run += ["--load_best_model_at_end", "true", "--per_device_train_batch_size", "8"]
    whole = sft.train(parse_run(run))
    assert (whole.state.best_global_step, whole.state.global_step) == (2, 8)
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert sft.train(parse_run([*run, "--resume_from_checkpoint", "true"])).state.global_step == 8


def test_patience_without_evaluations_is_refused(tmp_path, market, capsys):
    with pytest.raises(SystemExit, match="2"):
        sft.main(tiny_run(tmp_path, "--prices", str(market), "--early_stopping_patience", "3"))
    assert "early_stopping_patience 3 needs an eval_strategy" in capsys.readouterr().err.splitlines()[-1]


def test_weights_alone_are_not_resumed_from(tmp_path, market, capsys):
    """The optimizer and its schedule would begin anew in the middle of training."""
    run = tiny_run(tmp_path, "--prices", str(market), "--save_strategy", "steps", "--save_steps", "4")
    sft.train(parse_run([*run, "--save_only_model", "true"]))
    with pytest.raises(SystemExit, match="2"):
        sft.main([*run, "--max_steps", "6", "--resume_from_checkpoint", "true"])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'checkpoint-4'} has weights alone")


@pytest.mark.parametrize("case", INTERRUPTED)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, market, case):
    """To the bit, in the second epoch, with dropout."""
    size, options, method, calls = INTERRUPTED[case]
    check_resumed(tmp_path, market, size, options, (method, random.Random(case).choice(calls)))


def test_a_killed_run_with_parts_of_the_network_goes_on_too(tmp_path, market, checkpoint):
    """FSDP2 as accelerate has it. Its checkpoint is the repository that others write, code included."""
    environment = launch_environment(ACCELERATE / "fsdp.yaml", "--mixed_precision", "no")
    check_resumed(tmp_path, market, 2, (), ("compute_loss", 10), workers.train_sharded, environment)
    for folder in (tmp_path / "broken", tmp_path / "broken" / "checkpoint-12"):
        names = {path.name for path in folder.glob("*.py")}
        assert names == {path.name for path in checkpoint.glob("*.py")}
    config = json.loads((tmp_path / "broken" / "config.json").read_text())
    assert config["architectures"] == ["SpaceExploreForRegression"]
    assert forecast_newest(load_pipeline(tmp_path / "broken"), read_prices(market)).table["mean"].notna().all()


def test_an_adapter_is_not_trained_in_parts(tmp_path, market, checkpoint):
    run = tiny_run(tmp_path / "model", "--prices", str(market), "--use_cpu", "true", "--peft", '{"r": 4}')
    (tmp_path / "run.yaml").write_text((RECIPE / "lora.yaml").read_text())
    run = ["--config", str(tmp_path / "run.yaml"), "--model_name_or_path", str(checkpoint), *run[4:]]
    group = Group(2, tmp_path, workers.train_sharded, run, launch_environment(ACCELERATE / "fsdp.yaml"))
    assert group.wait() == [2, 2]
    assert group.logs[0].read_text().splitlines()[-1].endswith("an adapter is not trained in parts (FSDP)")


def check_resumed(folder: Path, market: Path, size: int, options: tuple, moment: tuple, *how) -> None:
    """Trains 12 steps, kills another such run at some moment, and resumes that."""
    target, *arguments = how or (workers.train,)
    batch = ("--per_device_train_batch_size", str(8 // size), *EVERY_STEP, *options)
    steps = ("--max_steps", "12", "--save_strategy", "steps", "--save_steps", "3")
    whole, broken = (tiny_run(folder / name, "--prices", str(market), *batch, *steps) for name in ("whole", "broken"))
    uninterrupted = Group(size, folder / "whole", target, whole, *arguments)
    disturbance = (*moment, workers.kill, target, *arguments)
    killed = Group(size, folder / "broken", workers.train_disturbed, broken, *disturbance)
    assert -9 in killed.wait(), killed.printed()
    assert not (folder / "broken" / "checkpoint-12").exists()
    Group(size, folder / "broken", target, [*broken, "--resume_from_checkpoint", "true"], *arguments).succeed()
    uninterrupted.succeed()
    expected, found = (history(folder / name / "checkpoint-12") for name in ("whole", "broken"))
    assert list(expected) == list(range(1, 13))
    assert found == expected
    assert sha256(folder / "broken" / "model.safetensors") == sha256(folder / "whole" / "model.safetensors")
