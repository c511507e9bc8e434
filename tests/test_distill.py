"""Distillation: the losses against closed forms, what a student learns and what it does not, and the cache."""

import copy
import json
import shutil
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import distill_workers
import numpy as np
import pytest
import torch
from conftest import RECIPE, STILL, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.special import rel_entr, softmax
from scipy.stats import ortho_group
from sklearn.preprocessing import KernelCenterer
from test_distributed import ACCELERATE, EVERY_STEP, history, launch_environment
from workers import Group

from spaceexploreai.benchmarks import distillation as benchmark
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.prices import read_prices, write_table
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.scripts.forecast import forecast_newest
from spaceexploreai.scripts.forecasters import load_pipeline
from spaceexploreai.train import distill, sft
from spaceexploreai.train.arguments import parse_run
from spaceexploreai.train.distill import (
    ClassMatch,
    DistillArguments,
    ForecastMatch,
    TopTokenMatch,
    parse_distillation,
    similarities,
)

ROOT = RECIPE.parents[1]
TASKS = ("regression", "classification", "causal_lm")
STUDENT = json.loads((RECIPE / "student.json").read_text())
FEW = ["--max_steps", "4", "--learning_rate", "1e-3", "--per_device_train_batch_size", "32", "--weight_decay", "0"]
QUIET = ["--remove_unused_columns", "false", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true"]
SCRATCH = ("--model_config", str(RECIPE / "student.json"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, uneven, exact) -> dict[str, Path]:
    """A checkpoint of each head after a few large steps."""
    folders = {task: tmp_path_factory.mktemp(task) for task in TASKS}
    for task, folder in folders.items():
        options = ("--prices", str(uneven), "--model_config", str(exact), "--task", task)
        run = parse_run(tiny_run(folder, *options, "--learning_rate", "3e-3", "--max_steps", "20"))
        sft.save_checkpoint(sft.train(run), folder)
    return folders


def student_run(folder: Path, prices: Path, *options: str, start: tuple[str, ...] = SCRATCH) -> list[str]:
    """Command line for a few steps of the tiny recipe's student."""
    return [*FEW, *QUIET, *EVERY_STEP, *start, "--prices", str(prices), "--output_dir", str(folder), *options]


def distil_run(folder: Path, prices: Path, teacher: Path, *options: str, **start: tuple[str, ...]) -> list[str]:
    return student_run(folder, prices, "--teacher", str(teacher), *options, **start)


def prepared(folder: Path, prices: Path, teacher: Path, *options: str):
    return distill.prepare(parse_distillation(distil_run(folder, prices, teacher, *options)))[0]


def trained(folder: Path, prices: Path, teacher: Path, *options: str):
    trainer = prepared(folder, prices, teacher, *options)
    trainer.train()
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- the losses ---

LOGITS = st.integers(0, 2**16).map(lambda seed: 3 * np.random.default_rng(seed).normal(size=(2, 5, 9)))


def class_match(temperature: float) -> ClassMatch:
    return ClassMatch(SpaceExploreConfig(), SimpleNamespace(temperature=temperature))


@settings(max_examples=20, deadline=None)
@given(LOGITS, st.sampled_from([0.5, 1.0, 2.0, 8.0]))
def test_the_distance_of_logits_is_scipys_divergence(logits, temperature):
    match = class_match(temperature)
    teacher, student = (torch.from_numpy(one) for one in logits)
    found = match.distance(student, match.keep(teacher))
    divergences = rel_entr(*(softmax(one / temperature, axis=-1) for one in logits)).sum(-1)
    np.testing.assert_allclose(found, temperature**2 * divergences, rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(LOGITS)
def test_at_a_high_temperature_logits_are_matched(logits):
    """Equation 4 of Hinton et al., times T²: a gradient of (z - v) / N for logits that are centred."""
    teacher, student = (torch.from_numpy(one - one.mean(-1, keepdims=True)) for one in logits)
    student.requires_grad_()
    match = class_match(1e4)
    match.distance(student, match.keep(teacher)).sum().backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 9, rtol=1e-2, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(LOGITS, st.integers(1, 8), st.sampled_from([1.0, 2.0]))
def test_the_top_tokens_are_a_coarser_distribution(logits, count, temperature):
    match = TopTokenMatch(None, SimpleNamespace(temperature=temperature, teacher_top_k=count))
    teacher, student = (torch.from_numpy(one) for one in logits)
    found = match.distance(student, match.keep(teacher)).numpy()
    for row, value in enumerate(found):
        p, q = (softmax(one[row] / temperature) for one in logits)
        top = np.argsort(p)[::-1][:count]
        p, q = (np.append(one[top], np.delete(one, top).sum()) for one in (p, q))
        assert value == pytest.approx(temperature**2 * rel_entr(p, q).sum(), rel=1e-9, abs=1e-12)
    whole = class_match(temperature)
    finest = whole.distance(student, whole.keep(teacher)).numpy()
    assert (found <= finest + 1e-12).all()  # what is put together cannot be told apart
    assert count < 8 or found == pytest.approx(finest, rel=1e-9)


@pytest.mark.parametrize("moments", [((0, 1), (0, 1)), ((0.3, 1), (-0.2, 1)), ((0.1, 2), (0.1, 0.5))], ids=str)
def test_the_distance_of_quantiles_is_wassersteins(moments):
    """Of two Gaussians (Dowson and Landau, 1982): (m - n)² + (s - t)². And the means' (m - n)², as weighted."""
    levels = [(index + 0.5) / 2000 for index in range(2000)]
    config = SpaceExploreConfig(quantile_levels=levels, mean_loss_weight=0.7, quantile_loss_weight=2.0)
    match = ForecastMatch(config, None)
    student, teacher = (
        torch.tensor([[mean, *(NormalDist(mean, sd).inv_cdf(level) for level in levels)]]) for mean, sd in moments
    )
    (mean, sd), (other_mean, other_sd) = moments
    apart = (mean - other_mean) ** 2
    expected = 0.7 * apart + 2 * (apart + (sd - other_sd) ** 2)
    assert match.distance(student, match.keep(teacher)).item() == pytest.approx(expected, rel=5e-3)


def alignment(left: np.ndarray, right: np.ndarray) -> float:
    """Linear CKA (Kornblith et al., 2019, equation 5 with equation 4) of (N, D) features."""
    kernels = [KernelCenterer().fit_transform(one @ one.T) for one in (left, right)]
    dependence = [(one * other).sum() for one, other in zip(kernels * 2, [*kernels[::-1], *kernels], strict=True)]
    return dependence[0] / np.sqrt(dependence[2] * dependence[3])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(3, 12))
def test_similarities_are_aligned_as_kernels_are(seed, steps):
    """Whatever the widths, and whatever stands where no label is."""
    generator = np.random.default_rng(seed)
    left, right = generator.normal(size=(12, 8)), generator.normal(size=(12, 3))
    known = torch.zeros(1, 12, 4, dtype=torch.bool)
    places = generator.permutation(12)[:steps]
    known[0, places, generator.integers(0, 4, steps)] = True
    hidden = [torch.from_numpy(one)[None] for one in (left, right)]
    apart = (similarities(hidden[0], known) - similarities(hidden[1], known)).square().sum() / 2
    assert apart.item() == pytest.approx(1 - alignment(left[places], right[places]), abs=1e-5)
    turned = hidden[0] @ torch.from_numpy(ortho_group(8, seed=seed).rvs()) * 3 + 1
    turned[0, ~known[0].any(-1)] = torch.nan
    torch.testing.assert_close(similarities(turned, known), similarities(hidden[0], known), rtol=1e-4, atol=1e-5)


def test_a_window_with_one_label_has_no_similarities():
    known = torch.zeros(1, 5, 2, dtype=torch.bool)
    known[0, 3, 1] = True
    hidden = torch.randn(1, 5, 4, requires_grad=True)
    found = similarities(hidden, known)
    found.square().sum().backward()
    assert not found.any()
    assert not hidden.grad.any()


# --- what a student learns ---


@pytest.mark.parametrize("task", TASKS)
def test_without_weight_the_teacher_teaches_nothing(tmp_path, uneven, teachers, task):
    """To the bit, what train/sft.py makes of the same network, data and seed."""
    taught = trained(tmp_path, uneven, teachers[task], "--task", task, "--alpha", "0")
    run = student_run(tmp_path, uneven, "--task", task)
    alone = sft.train(parse_run(run))
    assert taught.processing_class.center == alone.processing_class.center
    assert logged(taught, "loss") == logged(alone, "loss")
    for name, weight in alone.model.state_dict().items():
        assert torch.equal(taught.model.state_dict()[name], weight), name


@pytest.mark.parametrize("task", TASKS)
def test_a_student_comes_near_its_teacher(tmp_path, uneven, teachers, task):
    steps = ("--max_steps", "40", "--learning_rate", "1e-2", "--per_device_train_batch_size", "16")
    distances = [
        logged(trained(tmp_path, uneven, teachers[task], "--task", task, "--alpha", alpha, *steps), "teacher_distance")
        for alpha in ("1", "0")
    ]
    taught, alone = (np.mean(some[-5:]) for some in distances)
    assert distances[0][0] == pytest.approx(distances[1][0], rel=1e-5)
    assert taught < 0.5 * distances[0][0]
    assert taught < 0.8 * alone


@pytest.mark.parametrize("task", TASKS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, uneven, teachers, task):
    options = ("--task", task, "--alpha", "1", "--hidden_weight", "1", "--max_steps", "1")
    start = ("--model_name_or_path", str(teachers[task]))
    run = parse_distillation(distil_run(tmp_path, uneven, teachers[task], *options, start=start))
    trainer = distill.prepare(run)[0]
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "grad_norm")[0] == pytest.approx(0, abs=1e-4)


def test_the_loss_is_the_sum_of_its_parts(tmp_path, uneven, teachers):
    """Means over labels; the balance of the experts keeps its whole weight."""
    fields = json.loads((RECIPE / "config.json").read_text()) | STILL
    (tmp_path / "student.json").write_text(json.dumps(fields | {"router_aux_loss_coef": 0.5}))
    options = ("--alpha", "0.7", "--hidden_weight", "0.3", "--model_config", str(tmp_path / "student.json"))
    trainer = prepared(tmp_path, uneven, teachers["regression"], *options)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 20, len(trainer.train_dataset) - 1)])
    shown = {name: value for name, value in batch.items() if name != "row"}
    labels = (batch["labels"] != -100).sum((1, 2))
    student = trainer.model.train()(**shown, output_hidden_states=True)
    with torch.no_grad():
        teacher = trainer.teacher(**shown, output_hidden_states=True)
    apart = []
    for row, known in enumerate((batch["labels"] != -100).any(-1)):
        states = [network.hidden_states[-1][row, known].detach().double().numpy() for network in (student, teacher)]
        apart.append(1 - alignment(*states))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=labels.sum()).item()
    balance = 0.5 * student.aux_loss.item()
    parts = (1 - 0.7) * (student.loss.item() - balance) + 0.7 * trainer.distances[-1].item() + balance
    assert loss == pytest.approx(parts + 0.3 * np.average(apart, weights=labels), rel=1e-5)
    assert len(set(labels.tolist())) > 1
    assert max(apart) > 0.1


@pytest.mark.parametrize("task", TASKS)
def test_what_has_no_label_teaches_nothing(tmp_path, uneven, teachers, task):
    """Padding and halted days: whatever the teacher says of them, and the student."""
    trainer = prepared(tmp_path, uneven, teachers[task], "--task", task, "--alpha", "0.7")
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 20, len(trainer.train_dataset) - 1)])
    known = trainer.match.known(batch["labels"])
    assert 0 < known.sum() < known.numel()
    soft = trainer.soften(batch)
    expected = trainer.teach(trainer.model(**batch | {"row": None}), soft, batch)
    soft["said"][~known] = torch.nan
    outputs = trainer.model(**batch | {"row": None})
    said = [getattr(outputs, name) for name in ("mean", "quantiles", "logits") if name in outputs]
    for tensor in said:
        tensor.retain_grad()
    total = trainer.teach(outputs, soft, batch)
    total.backward()
    assert total.item() == expected.item() != 0
    for tensor in said:
        gradient = tensor.grad[:, :, None] if task == "causal_lm" else tensor.grad
        assert not gradient[:, known.shape[1] :].any()
        gradient = gradient[:, : known.shape[1]]
        assert gradient[known].any()
        assert not gradient[~known].any()


SIZES = {
    "deeper": {"num_hidden_layers": 3},
    "wider": {"hidden_size": 96, "num_attention_heads": 6},
    "no convolutions": {"mscnn_num_blocks": 0},
    "latent attention": {"attention_type": "mla", "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
    "all heads": {"attention_type": "mha", "head_dim": 8},
    "few experts": {
        "first_k_dense_replace": 0,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
    },
    "other norm": {"input_norm": "rms"},
}


@pytest.mark.parametrize("size", SIZES)
def test_students_of_any_size(tmp_path, uneven, teachers, size):
    (tmp_path / "student.json").write_text(json.dumps(STUDENT | SIZES[size]))
    task = TASKS[list(SIZES).index(size) % len(TASKS)]
    options = ("--task", task, "--hidden_weight", "0.5", "--model_config", str(tmp_path / "student.json"))
    trainer = prepared(tmp_path, uneven, teachers[task], *options, "--max_steps", "2", "--alpha", "1")
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(np.isfinite(logged(trainer, "loss")))
    sft.save_checkpoint(trainer, tmp_path / "model")
    again = type(trainer.model).from_pretrained(tmp_path / "model")
    for name, value in SIZES[size].items():
        assert getattr(again.config, name) == value
    changed = {name for name, weight in again.state_dict().items() if not torch.equal(before[name], weight)}
    assert {
        f"model.layers.{layer}.input_layernorm.weight" for layer in range(again.config.num_hidden_layers)
    } < changed
    assert "model.value_embedding.value_proj.weight" in changed


def test_a_teacher_in_half_precision(tmp_path, uneven, teachers):
    options = ("--task", "causal_lm", "--alpha", "1", "--max_steps", "2", "--teacher_dtype")
    dtypes = ("float32", "bfloat16", "float16")
    trainers = [trained(tmp_path, uneven, teachers["causal_lm"], *options, dtype) for dtype in dtypes]
    whole, *others = (logged(trainer, "teacher_distance") for trainer in trainers)
    assert [trainer.teacher.dtype for trainer in trainers] == [getattr(torch, dtype) for dtype in dtypes]
    assert all(trainer.model.dtype == torch.float32 for trainer in trainers)
    for other in others:
        assert other == pytest.approx(whole, rel=0.05)
        assert other != whole


# --- the teacher stays what and where it is ---


def test_the_teacher_is_not_changed_and_no_part_of_the_student(tmp_path, uneven, teachers):
    trainer = prepared(tmp_path, uneven, teachers["regression"], "--save_strategy", "steps", "--save_steps", "4")
    before = copy.deepcopy(trainer.teacher.state_dict())
    trainer.train()
    assert not trainer.teacher.training
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == SpaceExploreForRegression(trainer.model.config).state_dict().keys()
    assert sum(weight.numel() for weight in saved.values()) < 0.3 * trainer.teacher.num_parameters()


def test_what_a_teacher_has_seen_its_student_has(tmp_path, uneven, teachers):
    early, late = tmp_path / "early", tmp_path / "late"
    for folder, cutoff in ((early, "2004-01-02"), (late, "2006-01-03")):
        shutil.copytree(teachers["regression"], folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"selection_cutoff": cutoff}))
    own = prepared(tmp_path, uneven, early).model.config
    assert own.selection_cutoff == SpaceExploreConfig.from_pretrained(teachers["regression"]).selection_cutoff
    (late / "config.json").write_text(json.dumps(config | {"selection_cutoff": "2031-01-02"}))
    assert prepared(tmp_path, uneven, late).model.config.selection_cutoff == "2031-01-02"


# --- a step is the same step ---


@pytest.mark.parametrize("task", ["regression", "causal_lm"])
def test_accumulated_batches_and_those_of_two_processes_are_the_large_batch(tmp_path, uneven, teachers, task):
    """The causal language model's with a cache, which one process writes."""
    options = ("--task", task, "--hidden_weight", "0.3", "--alpha", "0.6", "--dataloader_drop_last", "true")
    options += ("--save_strategy", "steps", "--save_steps", "4")
    ways = {"large": (1, "10"), "accumulated": (1, "5", "--gradient_accumulation_steps", "2"), "two": (2, "5")}
    groups = []
    for name, (size, *batch) in ways.items():
        cache = ("--teacher_cache", str(tmp_path / f"cache of {name}")) if task == "causal_lm" else ()
        run = distil_run(
            tmp_path / name, uneven, teachers[task], *options, *cache, "--per_device_train_batch_size", *batch
        )
        groups.append(Group(size, tmp_path / name, distill_workers.distil, run))
    for group in groups:
        group.succeed()
    large, *others = (history(tmp_path / name / "checkpoint-4") for name in ways)
    assert list(large) == [1, 2, 3, 4]
    for other in others:
        for step, pair in large.items():
            assert other[step] == pytest.approx(pair, rel=2e-5)


def test_student_and_teacher_in_parts_are_those_in_one(tmp_path, uneven, teachers):
    environment = launch_environment(ACCELERATE / "fsdp.yaml", "--mixed_precision", "no")
    options = ("--hidden_weight", "0.3", "--alpha", "0.6", "--save_strategy", "steps", "--save_steps", "4")
    runs = [distil_run(tmp_path / name, uneven, teachers["regression"], *options) for name in ("parts", "whole")]
    batches = [("--per_device_train_batch_size", size) for size in ("5", "10")]
    parts = Group(2, tmp_path / "parts", distill_workers.distil_sharded, [*runs[0], *batches[0]], environment)
    parse = parse_distillation([*runs[1], *batches[1]])
    trainer, _, data = distill.prepare(parse)
    sft.fit(trainer, data, parse)
    parts.succeed()
    expected, found = (history(tmp_path / name / "checkpoint-4") for name in ("whole", "parts"))
    for step, pair in expected.items():
        assert found[step] == pytest.approx(pair, rel=1e-4)
    assert forecast_newest(load_pipeline(tmp_path / "parts"), read_prices(uneven)).table["mean"].notna().all()


@pytest.mark.parametrize("cached", [False, True], ids=["asked", "cached"])
def test_a_resumed_run_goes_on_as_if_it_had_not_been_interrupted(tmp_path, uneven, teachers, cached):
    (tmp_path / "student.json").write_text(json.dumps(STUDENT | {"hidden_dropout": 0.1}))
    options = ("--max_steps", "8", "--save_strategy", "steps", "--save_steps", "4", "--hidden_weight", "0.1")
    options += ("--per_device_train_batch_size", "12", "--model_config", str(tmp_path / "student.json"))
    options += ("--teacher_cache", str(tmp_path / "cache")) if cached else ()
    argv = distil_run(tmp_path / "run", uneven, teachers["regression"], *options)
    expected, found = [], []
    for history_, more in ((expected, ()), (found, ("--resume_from_checkpoint", "true"))):
        run = parse_distillation([*argv, *more])
        trainer, _, data = distill.prepare(run)
        sft.fit(trainer, data, run)
        history_ += [logged(trainer, "loss"), copy.deepcopy(trainer.model.state_dict())]
        shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    assert found[0] == expected[0]
    assert all(torch.equal(weight, found[1][name]) for name, weight in expected[1].items())


# --- the cache ---


def cached_run(tmp_path: Path, uneven: Path, teachers: dict, task: str, *options: str):
    return trained(
        tmp_path / "run", uneven, teachers[task], "--task", task, "--teacher_cache", str(tmp_path / "cache"), *options
    )


@pytest.mark.parametrize("task", ["regression", "causal_lm"])
def test_a_cached_teacher_teaches_the_same(tmp_path, uneven, teachers, task, monkeypatch):
    options = ("--alpha", "0.9", "--hidden_weight", "0.3")
    asked = trained(tmp_path, uneven, teachers[task], "--task", task, *options)
    monkeypatch.setattr(distill, "SHARD_WINDOWS", 7)
    cached = cached_run(tmp_path, uneven, teachers, task, *options)
    (folder,) = (tmp_path / "cache").iterdir()
    names = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(names) == 1 + -(-len(cached.train_dataset) // 7)
    for name in ("loss", "grad_norm", "teacher_distance"):
        assert logged(cached, name) == pytest.approx(logged(asked, name), rel=1e-3)
    monkeypatch.setattr(distill, "ask", None)  # nobody is asked twice
    prepared(tmp_path, uneven, teachers[task], "--task", task, "--teacher_cache", str(tmp_path / "cache"), *options)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == names


def test_top_tokens_are_less_to_keep_and_nearly_as_much_to_learn(tmp_path, uneven, teachers):
    whole = cached_run(tmp_path / "whole", uneven, teachers, "causal_lm")
    top = cached_run(tmp_path / "top", uneven, teachers, "causal_lm", "--teacher_top_k", "32")
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name / "cache").rglob("*.safetensors"))
        for name in ("top", "whole")
    ]
    assert sizes[0] < 0.4 * sizes[1]
    pairs = zip(logged(top, "teacher_distance"), logged(whole, "teacher_distance"), strict=True)
    assert all(0 < coarse < fine for coarse, fine in pairs)


def folders(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir()}


def test_another_cache_for_whatever_the_teacher_would_say_otherwise(tmp_path, uneven, teachers):
    """Other weights, windows, prices, or what is kept; not another alpha, student, or temperature of whole rows."""
    options = ("--task", "causal_lm", "--teacher_cache", str(tmp_path / "cache"))
    prices = read_prices(uneven)
    prices.loc[300, "volume"] *= 2
    write_table(prices, tmp_path / "other.parquet")
    other = tmp_path / "other"
    shutil.copytree(teachers["causal_lm"], other)
    model = type(prepared(tmp_path, uneven, other, *options).teacher).from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1e-3
    model.save_pretrained(other)
    same = [
        (),
        ("--alpha", "1"),
        ("--temperature", "4"),
        ("--hidden_size", "64"),
        ("--seed", "3"),
        ("--balance", "year"),
    ]
    for more in same:
        prepared(tmp_path, uneven, teachers["causal_lm"], *options, *more)
        assert len(folders(tmp_path)) == 1
    differing = [
        (uneven, other),
        (tmp_path / "other.parquet", teachers["causal_lm"]),
        (uneven, teachers["causal_lm"], "--stride", "8"),
        (uneven, teachers["causal_lm"], "--tickers", "T0,T1"),
        (uneven, teachers["causal_lm"], "--path_length", "5"),
        (uneven, teachers["causal_lm"], "--hidden_weight", "0.1"),
        (uneven, teachers["causal_lm"], "--teacher_dtype", "bfloat16"),
        (uneven, teachers["causal_lm"], "--teacher_top_k", "8"),
        (uneven, teachers["causal_lm"], "--teacher_top_k", "9"),
        (uneven, teachers["causal_lm"], "--teacher_top_k", "9", "--temperature", "3"),
    ]
    for count, (prices, teacher, *more) in enumerate(differing, 2):
        prepared(tmp_path, prices, teacher, *options, *more)
        assert len(folders(tmp_path)) == count


def overwrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit": overwrite,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a file is gone": Path.unlink,
    "the list is gone": lambda path: (path.parent / distill.INDEX).unlink(),
    "the list is half": lambda path: (path.parent / distill.INDEX).write_text('{"0000'),
}


def test_a_damaged_cache_is_made_anew(tmp_path, uneven, teachers):
    options = ("--teacher_cache", str(tmp_path / "cache"))
    prepared(tmp_path, uneven, teachers["regression"], *options)
    (folder,) = (tmp_path / "cache").iterdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for damage in DAMAGES.values():
        damage(folder / "000000.safetensors")
        prepared(tmp_path, uneven, teachers["regression"], *options)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_cache_is_written_whole_or_not_at_all(tmp_path, uneven, teachers, monkeypatch, capsys):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(distill, "save_file", full)
    run = distil_run(tmp_path / "run", uneven, teachers["regression"], "--teacher_cache", str(tmp_path / "cache"))
    assert "No space left" in refusal(capsys, run)
    assert folders(tmp_path) == set()


# --- mistakes ---


def refusal(capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        distill.main(argv)
    assert exit_.value.code == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("error: ")
    return complaint


MISTAKES = {
    "no such teacher": (("--teacher", "nowhere"), "cannot read the teacher nowhere: "),
    "another head": (
        ("--task", "classification"),
        "is SpaceExploreForRegression, task classification needs SpaceExploreForC",
    ),
    "horizons": (("--horizons", "1", "5"), "horizons of the student is [1, 5], that of the teacher"),
    "alpha": (("--alpha", "1.5"), "alpha must be within [0, 1], got 1.5"),
    "alpha that is no number": (("--alpha", "nan"), "alpha must be within [0, 1], got nan"),
    "hidden_weight": (("--hidden_weight", "-1"), "hidden_weight must be at least 0, got -1.0"),
    "temperature": (("--temperature", "3"), "temperature 3.0 divides logits; a regression has none"),
    "no temperature": (("--task", "causal_lm", "--temperature", "0"), "temperature must be above 0, got 0.0"),
    "dtype": (
        ("--teacher_dtype", "int8"),
        "teacher_dtype must be one of auto, float32, bfloat16, float16, got 'int8'",
    ),
    "top_k of a regression": (
        ("--teacher_top_k", "4", "--teacher_cache", "c"),
        "teacher_top_k 4 is of the teacher_cache",
    ),
    "top_k without a cache": (
        ("--task", "causal_lm", "--teacher_top_k", "4"),
        "teacher_top_k 4 is of the teacher_cache",
    ),
    "all of top_k": (
        ("--task", "causal_lm", "--teacher_top_k", "256", "--teacher_cache", "c"),
        "teacher_top_k must be at least 1 and below the 256 bins, got 256",
    ),
    "dates": (
        ("--validation_fraction", "0.3"),
        "validation begins on",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_refused(tmp_path, uneven, teachers, capsys, case):
    options, named = MISTAKES[case]
    assert named in refusal(capsys, distil_run(tmp_path / "run", uneven, teachers["regression"], *options))
    assert not (tmp_path / "run").exists()


SHARED = {
    "regression": {"quantile_levels": [0.1, 0.5, 0.9], "target": "simple_return"},
    "classification": {"flat_band": 0.5},
    "causal_lm": {"ts_token_id": 5},
}


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, fields in SHARED.items() for name in fields])
def test_a_student_of_other_forecasts_is_refused(tmp_path, uneven, teachers, capsys, task, name):
    value = SHARED[task][name]
    (tmp_path / "student.json").write_text(json.dumps(STUDENT | {name: value}))
    options = ("--task", task, "--model_config", str(tmp_path / "student.json"))
    complaint = refusal(capsys, distil_run(tmp_path / "run", uneven, teachers[task], *options))
    assert complaint.startswith(f"error: {name} of the student is {value}, that of the teacher {teachers[task]} ")


def test_a_teacher_of_other_bins_is_refused(tmp_path, uneven, teachers, capsys):
    shutil.copytree(teachers["causal_lm"], tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    fields["edges"][3] *= 0.99
    path.write_text(json.dumps(fields))
    complaint = refusal(capsys, distil_run(tmp_path / "run", uneven, tmp_path / "teacher", "--task", "causal_lm"))
    assert f"bins of {tmp_path / 'teacher'} have other edges" in complaint


def test_a_student_of_other_statistics_is_refused(tmp_path, uneven, teachers, checkpoint, capsys):
    teacher, start = teachers["regression"], ("--model_name_or_path", str(checkpoint))
    complaint = refusal(capsys, distil_run(tmp_path / "run", uneven, teacher, start=start))
    assert complaint == f"error: center of the checkpoint {checkpoint} is not that of the teacher {teacher}"


def test_a_teacher_is_needed(tmp_path, uneven, capsys):
    assert "distillation needs a teacher" in refusal(capsys, student_run(tmp_path / "run", uneven))


def test_a_teacher_that_overflows_is_named(tmp_path, uneven, teachers):
    trainer = prepared(tmp_path, uneven, teachers["regression"], "--teacher_dtype", "float16")
    with torch.no_grad():
        trainer.teacher.mean_head.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match=f"teacher {teachers['regression']} in torch.float16 is inf at step 1"):
        trainer.train()


def test_a_window_without_a_loss_is_named(tmp_path, uneven, teachers):
    """Also where hidden states are asked for."""
    trainer = prepared(tmp_path, uneven, teachers["regression"], "--hidden_weight", "1")
    collate = trainer.data_collator

    def broken(examples):
        batch = collate(examples)
        batch["scale"][2] = torch.nan
        return batch

    trainer.data_collator = broken
    with pytest.raises(ValueError, match="the loss is nan at step 1, of the windows T") as error:
        trainer.train()
    assert str(error.value).count(" to ") == 1


# --- recipes and the report ---


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*/distill.yaml")), ids=lambda path: path.parent.name)
def test_a_recipe_is_a_run_of_a_network(recipe):
    run = parse_distillation(["--config", str(recipe)])
    assert isinstance(run.objective, DistillArguments)
    fields = json.loads((ROOT / run.model.model_config).read_text())
    student = SpaceExploreConfig(**fields)
    assert fields.keys() <= student.to_dict().keys()
    sizes = []
    for config in (student, SpaceExploreConfig(**json.loads((recipe.parent / "config.json").read_text()))):
        with torch.device("meta"):
            sizes.append(SpaceExploreForRegression(config).num_parameters())
    assert sizes[0] < 0.3 * sizes[1] or recipe.parent.name != "tiny"


def test_the_report_has_the_teacher_beside_the_student(tmp_path, uneven, teachers):
    """The teacher's figures are those that `train/sft.py` would have of it."""
    distill.main(
        distil_run(tmp_path / "model", uneven, teachers["causal_lm"], "--task", "causal_lm", "--max_steps", "2")
    )
    text = (tmp_path / "model" / "report.md").read_text()
    assert "trained by `accelerate launch train/distill.py`" in text
    assert f"Taught by `{teachers['causal_lm']}` with alpha 0.5 and temperature 2." in text
    rows = dict(
        line.strip("| ").split(" | ", 1) for line in text.split("Taught by")[1].splitlines() if line.startswith("| ")
    )
    assert rows["metric"] == "student | teacher"
    trainer = prepared(tmp_path, uneven, teachers["causal_lm"], "--task", "causal_lm")
    trainer.model = trainer.teacher
    expected = trainer.evaluate()
    for name in ("log_loss", "direction"):
        student, teacher = map(float, rows[name].split(" | "))
        assert teacher == pytest.approx(expected[f"eval_{name}"], rel=1e-3)
        assert student != teacher


def test_a_benchmark_compares_students(tmp_path, uneven, teachers, capsys):
    argv = distil_run(tmp_path, uneven, teachers["classification"], "--task", "classification", "--max_steps", "2")
    at = argv.index("--output_dir")
    benchmark.main([*argv[:at], *argv[at + 2 :], "--alphas", "0", "1", "--seeds", "0", "1"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines] == ["alpha", "---", "0", "1", "teacher"]
    column = lines[0].index("log_loss_skill")
    alone, taught = (float(line[column].split(" ")[0]) for line in lines[2:4])
    assert float(lines[3][column].split("(")[1].split(" ")[0]) == pytest.approx(taught - alone, abs=2e-4)
    options = ("--task", "classification", "--max_steps", "2", "--alpha", "0", "--seed")
    students = [trained(tmp_path, uneven, teachers["classification"], *options, seed) for seed in ("0", "1")]
    scores = [student.evaluate()["eval_log_loss_skill"] for student in students]
    assert alone == pytest.approx(np.mean(scores), abs=1e-4)
    trainer = students[0]
    trainer.model = trainer.teacher
    assert float(lines[4][column]) == pytest.approx(trainer.evaluate()["eval_log_loss_skill"], abs=1e-4)
