"""What is added to Trainer: balanced windows, the load of experts, mistakes that name their cause and lose nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import RECIPE, STILL, make_market, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spaceexploreai.data.prices import write_table
from spaceexploreai.train.arguments import parse_run
from spaceexploreai.train.sft import main, prepare, save_checkpoint, train
from spaceexploreai.train.trainer import BalancedSampler, balanced_weights


def losses(trainer) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, as logged."""
    return {
        entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry
    }


def every_step(folder, market, *options: str):
    steps = ("--logging_strategy", "steps", "--logging_steps", "1")
    return parse_run(tiny_run(folder, "--prices", str(market), *steps, *options))


# --- balance ---


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=200), st.integers(0, 9), st.integers(0, 3))
def test_each_window_comes_as_often_as_its_weight_says(weights, seed, epoch):
    sampler = BalancedSampler(np.array(weights), seed)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == len(weights)
    expected = np.array(weights) / np.sum(weights) * len(weights)
    assert np.abs(np.bincount(drawn, minlength=len(weights)) - expected).max() < 1 + 1e-9
    assert drawn == list(sampler)


def test_every_epoch_has_another_order_and_other_windows():
    sampler, orders = BalancedSampler(np.linspace(0.1, 2, 100), 0), []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert len({tuple(order) for order in orders}) == 20
    counts = np.bincount(np.concatenate(orders), minlength=100)
    np.testing.assert_allclose(counts, 20 * np.linspace(0.1, 2, 100) / 1.05, atol=8)


@pytest.mark.parametrize(
    ("balance", "task"), [("ticker", "regression"), ("year", "regression"), ("ticker", "causal_lm")]
)
def test_tickers_or_years_weigh_the_same(tmp_path, balance, task):
    prices = make_market(tickers=3, days=700)
    late = (prices["ticker"] == "T2") & (prices["date"] < prices["date"].unique()[400])
    write_table(prices[~late], tmp_path / "market.parquet")
    trainer, _, data = prepare(every_step(tmp_path, tmp_path / "market.parquet", "--balance", balance, "--task", task))
    windows = trainer.train_dataset.windows
    weights = balanced_weights(windows, [balance])
    rows = windows.rows
    years = [str(data.train.series[which].dates[last])[:4] for which, _, last, _ in rows.tolist()]
    groups = np.array(years if balance == "year" else rows[:, 0])
    sums = [weights[groups == one].sum() for one in np.unique(groups)]
    assert len(sums) > 1
    np.testing.assert_allclose(sums, sums[0])
    drawn = groups[[row for batch in trainer.get_train_dataloader() for row in batch["row"].tolist()]]
    shares = [(drawn == one).mean() for one in np.unique(groups)]
    np.testing.assert_allclose(shares, 1 / len(sums), atol=0.02)


# --- what is logged ---


def test_the_load_of_the_experts_is_logged(tmp_path, market):
    trainer = train(every_step(tmp_path, market))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for entry in logged:
        assert 0 <= entry["expert_load_min"] <= 1 <= entry["expert_load_max"] <= trainer.model.config.n_routed_experts
        assert entry["grad_norm"] > 0


def test_training_stops_early(tmp_path, market):
    options = ("--early_stopping_patience", "1", "--learning_rate", "1e-1", "--max_steps", "200")
    evaluation = ("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2")
    trainer = train(every_step(tmp_path, market, *options, *evaluation, "--load_best_model_at_end", "true"))
    assert trainer.state.global_step < 50
    best = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(best), rel=1e-4)


def test_learning_rate_is_lowered_on_a_plateau(tmp_path, market):
    options = (
        "--lr_scheduler_type",
        "reduce_lr_on_plateau",
        "--lr_scheduler_kwargs",
        '{"factor": 0.5, "patience": 0}',
    )
    evaluation = ("--eval_strategy", "steps", "--eval_steps", "2", "--learning_rate", "1e-1", "--max_steps", "16")
    trainer = train(every_step(tmp_path, market, *options, *evaluation))
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert min(rates) < 0.06 < max(rates)


@pytest.mark.parametrize(
    "options", [("warmup_stable_decay", '{"num_decay_steps": 4}'), ("cosine", "{}")], ids=lambda o: o[0]
)
def test_schedules_end_at_zero(tmp_path, market, options):
    name, arguments = options
    run = ("--lr_scheduler_type", name, "--lr_scheduler_kwargs", arguments, "--max_steps", "12", "--warmup_steps", "2")
    trainer = train(every_step(tmp_path, market, *run))
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert max(rates) == pytest.approx(2e-4)
    assert rates[-1] < 0.3 * max(rates)
    if name == "warmup_stable_decay":
        assert rates[3:7] == [max(rates)] * 4


# --- accumulation and precision ---


@pytest.mark.parametrize("task", ["regression", "classification", "causal_lm"])
def test_accumulated_batches_are_the_large_batch(tmp_path, task):
    """Also where they have labels unlike in number: a late ticker has short windows, a halt masked steps."""
    prices = make_market(tickers=4, days=400)
    late = (prices["ticker"] == "T3") & (prices["date"] < prices["date"].unique()[200])
    halt = (prices["ticker"] == "T1") & prices["date"].isin(prices["date"].unique()[100:130])
    write_table(prices[~(late | halt)], tmp_path / "market.parquet")
    still = ("--task", task, "--hidden_size", "32", "--per_device_train_batch_size")
    fields = json.loads((RECIPE / "config.json").read_text()) | STILL
    fields |= {"router_aux_loss_coef": 0.0}  # of a micro-batch by itself, not of the large one
    (tmp_path / "config.json").write_text(json.dumps(fields))
    network = ("--model_config", str(tmp_path / "config.json"))
    large, small = (
        losses(train(every_step(tmp_path / size, tmp_path / "market.parquet", *network, *still, size, *more)))
        for size, more in (("12", ()), ("3", ("--gradient_accumulation_steps", "4")))
    )
    assert list(large) == list(small) == [1, 2, 3, 4]
    for step, pair in large.items():
        assert small[step] == pytest.approx(pair, rel=2e-4)


def test_recomputed_activations_train_alike(tmp_path, market):
    plain, recomputed = (
        losses(train(every_step(tmp_path, market, *options))) for options in ((), ("--gradient_checkpointing", "true"))
    )
    for step, (loss, _) in plain.items():
        assert recomputed[step][0] == pytest.approx(loss, rel=1e-5)


def test_half_precision_trains_alike(tmp_path, market):
    """Eight binary digits change the loss in its third decimal one."""
    plain, rounded = (
        losses(train(every_step(tmp_path, market, *options)))
        for options in ((), ("--bf16", "true", "--use_cpu", "true"))
    )
    for step, (loss, _) in plain.items():
        assert rounded[step][0] == pytest.approx(loss, rel=2e-2)
    assert rounded != plain


def test_the_compiled_network_trains_alike(tmp_path, market):
    """As torch traces it; what a compiler makes of that is the compiler's."""
    options = ("--max_steps", "3", "--torch_compile", "true", "--torch_compile_backend", "eager")
    plain, traced = (losses(train(every_step(tmp_path, market, *some))) for some in (options[:2], options))
    for step, pair in plain.items():
        assert traced[step] == pytest.approx(pair, rel=1e-5)


def test_curves_go_to_tensorboard(tmp_path, market):
    train(every_step(tmp_path, market, "--report_to", "tensorboard", "--max_steps", "2"))
    events = EventAccumulator(str(next(tmp_path.glob("runs/*"))))
    events.Reload()
    assert {"train/loss", "train/grad_norm", "train/expert_load_max"} <= set(events.Tags()["scalars"])


# --- mistakes ---


def refusal(capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("error: ")
    return complaint


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, market):
    """The output folder of a run that ended after a checkpoint, and its command line."""
    folder = tmp_path_factory.mktemp("interrupted")
    run = tiny_run(folder, "--prices", str(market), "--save_strategy", "steps", "--save_steps", "2")
    train(parse_run(run))
    return folder, run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor 0.1: "),
        (["--neftune_noise_alpha", "5"], "neftune_noise_alpha 5.0: "),
        (["--prediction_loss_only", "true"], "prediction_loss_only True: "),
        (["--gradient_checkpointing_kwargs", "{}"], "gradient_checkpointing_kwargs {}: reentrant"),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], "reentrant"),
    ],
)
def test_options_that_are_not_for_these_networks_are_refused(tmp_path, market, refused, options, message):
    assert message in refused(main, tiny_run(tmp_path, "--prices", str(market), *options))


def test_an_unknown_metric_is_named_with_those_there_are(tmp_path, market, capsys):
    run = tiny_run(tmp_path, "--prices", str(market), "--metric_for_best_model", "eval_sharpe")
    run += ["--eval_strategy", "steps", "--eval_steps", "2"]
    with pytest.raises(SystemExit):
        main(run)
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("error: ")
    assert "eval_sharpe" in complaint
    assert "eval_crps_skill" in complaint


def test_columns_are_not_taken_from_the_windows(tmp_path, market):
    """A YAML of one's own need not say so."""
    run = tiny_run(tmp_path, "--prices", str(market), "--remove_unused_columns", "true", "--task", "causal_lm")
    assert train(parse_run(run)).evaluate()["eval_log_loss"] > 0


def test_a_language_model_has_its_tokenizer_at_every_checkpoint(tmp_path, market):
    steps = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "2", "--load_best_model_at_end", "false")
    train(parse_run(tiny_run(tmp_path, "--prices", str(market), "--task", "causal_lm", *steps)))
    assert (tmp_path / "checkpoint-2" / "tokenizer_config.json").is_file()


def test_half_precision_that_a_cpu_lacks_is_refused(tmp_path, market, capsys):
    """accelerate would train in float32 and say nothing."""
    run = tiny_run(tmp_path, "--prices", str(market), "--fp16", "true", "--use_cpu", "true")
    assert refusal(capsys, run).startswith("error: fp16 true needs a GPU")


def test_a_loss_that_is_no_number_names_the_window(tmp_path, market, monkeypatch):
    trainer, _, data = prepare(every_step(tmp_path, market))
    which, first, last, _ = data.train.rows[5].tolist()
    original = type(data.train)._cut

    def broken(self, *window):
        cut = original(self, *window)
        if window[0] == which and window[2] == last + 1:
            cut.series[0] = cut.series[0]._replace(scale=cut.series[0].scale * np.float32("nan"))
        return cut

    monkeypatch.setattr(type(data.train), "_cut", broken)
    history = data.train.series.steps(which, first, last + 1)
    dates = [str(day)[:10] for day in history.dates[[0, -1]]]
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the loss is nan at step \d+") as error:
        trainer.train()
    assert f"of the windows {history.ticker} {dates[0]} to {dates[1]}" in str(error.value)
    assert str(error.value).count(" to ") == 1
    assert all(torch.isfinite(weight).all() for weight in trainer.model.state_dict().values())
    assert before.keys() == trainer.model.state_dict().keys()


def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path, market, capsys, monkeypatch, interrupted):
    folder, run = interrupted
    shutil.copytree(folder, tmp_path / "run")
    run = [str(tmp_path / "run") if option == str(folder) else option for option in run]

    def full(*args, **kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        complaint = refusal(capsys, [*run, "--max_steps", "8", "--resume_from_checkpoint", "true"])
    assert "checkpoint-6" in complaint
    assert "No space left" in complaint
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-4"}
    main([*run, "--max_steps", "6", "--resume_from_checkpoint", "true"])
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_last_files_are_written_whole_or_not_at_all(tmp_path, market, checkpoint, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "model")
    trainer, *_ = prepare(every_step(tmp_path, market))
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(folder, *args, **kwargs):
        (type(tmp_path)(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer.model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(trainer, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


RESUME_MISTAKES = {
    "none there": (lambda folder: shutil.rmtree(folder / "checkpoint-4"), (), "no checkpoint to resume from"),
    "a folder that is none": (lambda folder: None, ("--resume_from_checkpoint", "recipes"), "recipes"),
    "cut short": (
        lambda folder: (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"\x08\0\0\0"),
        (),
        "cannot read",
    ),
    "optimizer cut short": (
        lambda folder: (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"PK\3\4"),
        (),
        "cannot read",
    ),
    "other features": (lambda folder: None, ("--feature_groups", "price,volume"), "feature_names of the checkpoint"),
    "other statistics": (lambda folder: None, ("--normalization", "standard"), "center of the checkpoint"),
    "other sizes": (lambda folder: None, ("--hidden_size", "32"), "hidden_size is 32, that of the checkpoint"),
}


@pytest.mark.parametrize("case", RESUME_MISTAKES)
def test_mistakes_of_resuming_are_refused(tmp_path, capsys, interrupted, case):
    damage, options, named = RESUME_MISTAKES[case]
    folder, run = interrupted
    shutil.copytree(folder, tmp_path / "run")
    damage(tmp_path / "run")
    run = [str(tmp_path / "run") if option == str(folder) else option for option in run]
    run += (
        ["--max_steps", "6"]
        if "--resume_from_checkpoint" in options
        else ["--max_steps", "6", "--resume_from_checkpoint", "true"]
    )
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    assert named in refusal(capsys, [*run, *options])
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path, market, capsys):
    (tmp_path / "file").write_text("")
    run = tiny_run(tmp_path / "file" / "model", "--prices", str(market))
    assert "file" in refusal(capsys, run)
