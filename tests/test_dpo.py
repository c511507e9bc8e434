"""Alignment: TRL computes what the equations say, of a model that reads its context, and what is saved is what was
trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import workers
from conftest import RECIPE, tiny_run
from datasets import load_dataset
from safetensors.torch import load_file
from scipy.special import expit, log_softmax
from transformers import GenerationConfig
from workers import Group

from spaceexploreai.data.collators import PathCollator
from spaceexploreai.data.prices import read_prices
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForCausalLM
from spaceexploreai.scripts import build_dataset, build_preferences
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer
from spaceexploreai.train.arguments import parse_run
from spaceexploreai.train.dpo import aligned_model, main, make_trainer, parse_dpo, prepare, randomised, train
from spaceexploreai.train.sft import save_checkpoint
from spaceexploreai.train.sft import train as train_supervised

BETA, H = 0.5, 10
RESUMABLE = ("--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3", "--logging_steps", "1")


def tiny_dpo(model, prices, folder, *options: str) -> list[str]:
    """Command line of the tiny recipe, for a few steps of eight pairs."""
    data = ["--model_name_or_path", str(model), "--prices", str(prices), "--output_dir", str(folder)]
    batch = ["--per_device_train_batch_size", "8", "--disable_tqdm", "true", "--use_cpu", "true"]
    steps = ["--max_steps", "4", "--eval_strategy", "no", "--controls", "false", "--num_samples", "20"]
    return ["--config", str(RECIPE / "dpo.yaml"), *data, *batch, *steps, *options]


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def batch_of(trainer, rows=range(4)) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[row] for row in rows])


def log_probabilities(model, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """(2B, S - 1) of each token after those before it by the model's own logits, zero outside of the paths."""
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1].double().numpy()
    tokens, mask = batch["input_ids"][:, 1:, None].numpy(), batch["completion_mask"][:, 1:].numpy()
    return np.take_along_axis(log_softmax(logits, axis=-1), tokens, axis=-1)[..., 0] * mask


@pytest.fixture(scope="module")
def moved(language_model, market, tmp_path_factory):
    """A trainer whose model has left its reference, without the balance of the experts in its loss."""
    run = tiny_dpo(language_model, market, tmp_path_factory.mktemp("moved"), "--router_aux_loss_coef", "0")
    trainer, data, _ = prepare(parse_dpo(run))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return trainer, data


# --- what TRL computes ---


def closed_form(losses: list[str], chosen, rejected, ref_chosen, ref_rejected) -> float:
    """Of summed log-probabilities (B,). Rafailov et al., 2023, equation 7; Azar et al., 2023, equation 17, by TRL per
    token; the negative log-likelihood of a chosen token."""
    ratios = (chosen - ref_chosen) - (rejected - ref_rejected)
    terms = {
        "sigmoid": -np.log(expit(BETA * ratios)).mean(),
        "ipo": ((ratios / H - 1 / (2 * BETA)) ** 2).mean(),
        "sft": -chosen.mean() / H,
    }
    return sum(weight * terms[name] for weight, name in zip((1.0, 0.3), losses, strict=False))


@pytest.mark.parametrize("losses", [["sigmoid"], ["sigmoid", "sft"], ["ipo"]], ids="+".join)
def test_the_loss_is_the_closed_form(moved, monkeypatch, losses):
    trainer, _ = moved
    monkeypatch.setattr(trainer, "loss_types", losses)
    monkeypatch.setattr(trainer, "loss_weights", [1.0, 0.3][: len(losses)])
    batch = batch_of(trainer)
    sums = [log_probabilities(model, batch).sum(axis=1) for model in (trainer.model, trainer.ref_model)]
    (chosen, rejected), (ref_chosen, ref_rejected) = (np.split(one, 2) for one in sums)
    assert np.abs(chosen - ref_chosen).min() > 0.01
    found = trainer.compute_loss(trainer.model, batch).item()
    assert found == pytest.approx(closed_form(losses, chosen, rejected, ref_chosen, ref_rejected), rel=1e-4)


def test_fused_log_probabilities_are_the_models_own(moved):
    trainer, _ = moved
    batch = batch_of(trainer)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    with torch.no_grad():
        fused = trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs
    np.testing.assert_allclose(fused.numpy(), log_probabilities(trainer.model, batch), rtol=1e-4, atol=1e-4)
    assert (fused != 0).sum().item() == 8 * H


def test_the_context_is_read_and_receives_gradient(moved):
    trainer, _ = moved
    batch = batch_of(trainer)
    values = batch["past_values"].nan_to_num().requires_grad_()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, {**batch, "past_values": values}).backward()
    of_rows = values.grad.abs().sum(dim=(1, 2))
    assert (of_rows > 0).all()
    assert trainer.model.model.value_embedding.value_proj.weight.grad.abs().sum() > 0
    other = {**batch, "past_values": batch["past_values"].flip(1)}
    assert np.abs(log_probabilities(trainer.model, other) - log_probabilities(trainer.model, batch)).max() > 1e-3


def test_placeholders_without_their_context_are_refused(moved):
    trainer, _ = moved
    batch = batch_of(trainer)
    del batch["past_values"], batch["past_values_mask"]
    with pytest.raises(ValueError, match="<ts> tokens stand for past_values"):
        trainer.compute_loss(trainer.model, batch)


def test_tokens_are_those_of_supervised_training(moved):
    """The chosen rows beside what `PathCollator` makes of the same steps and of prices."""
    trainer, data = moved
    rows = [trainer.train_dataset[row] for row in range(6)]
    examples = []
    for row in rows:
        known = data.series.steps(row["series"], row["first"], row["last"] + 1 + H)
        examples.append(
            {
                "past_values": known.values[:-H],
                "attention_mask": known.traded[:-H],
                "scale": known.scale[:-H],
                "next_returns": np.full(64, -100.0),
                "path": np.diff(np.log(known.close[-H - 1 :])),
            }
        )
    expected = PathCollator(SpaceExploreTokenizer(), 64, H)(examples)
    found = batch_of(trainer, range(6))
    assert torch.equal(found["input_ids"][:6], expected["input_ids"])
    assert torch.equal(found["past_values"][:6].nan_to_num(), expected["past_values"].nan_to_num())
    for name in ("attention_mask", "past_values_mask"):
        assert torch.equal(found[name][:6], expected[name])
    assert torch.equal(found["completion_mask"][:6].bool(), expected["labels"] != -100)
    for name in ("past_values", "past_values_mask"):
        assert torch.equal(found[name][:6].nan_to_num(), found[name][6:].nan_to_num())
    assert not torch.equal(found["input_ids"][:6], found["input_ids"][6:])


def test_nothing_is_dropped_out(language_model, market, tmp_path):
    noisy = Path(shutil.copytree(language_model, tmp_path / "noisy"))
    fields = json.loads((noisy / "config.json").read_text())
    (noisy / "config.json").write_text(json.dumps(fields | {"input_noise": 0.5}))
    trainer, *_ = prepare(parse_dpo(tiny_dpo(noisy, market, tmp_path)))
    model, batch = trainer.model.train(), batch_of(trainer)
    assert model.config.attention_dropout > 0
    assert model.config.input_noise > 0
    np.testing.assert_array_equal(log_probabilities(model, batch), log_probabilities(model, batch))
    np.testing.assert_allclose(
        log_probabilities(model, batch), log_probabilities(trainer.ref_model, batch), rtol=1e-5, atol=1e-5
    )


# --- what it learns ---


@pytest.fixture(scope="module")
def plain_pairs(language_model, market, tmp_path_factory):
    """A run whose pairs have a plain difference: one path drifts up and the other down."""
    folder = tmp_path_factory.mktemp("plain")
    run = parse_dpo(tiny_dpo(language_model, market, folder, "--learning_rate", "2e-3", "--max_steps", "15"))
    _, data, config = prepare(run)
    tokenizer = SpaceExploreTokenizer()

    def draw(row: dict, index: int) -> dict:
        noise = np.random.default_rng(index).normal(size=(2, H))
        up, down = (tokenizer.to_text(path, 1.0) for path in noise + np.array([[0.7], [-0.7]]))
        return {"chosen": up, "rejected": down}

    pairs = {name: split.map(draw, with_indices=True) for name, split in data.pairs.items()}
    return run, data._replace(pairs=pairs), config


def test_margins_and_accuracies_rise(plain_pairs):
    run, data, config = plain_pairs
    trainer = make_trainer(run, data, config, data.pairs["train"])
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert after["eval_rewards/margins"] > 1
    assert after["eval_rewards/accuracies"] > 0.9
    assert after["eval_logps/chosen"] > before["eval_logps/chosen"]


def test_randomised_labels_teach_no_preference(plain_pairs):
    """The control that a run has beside itself."""
    run, data, config = plain_pairs
    pairs = randomised(data.pairs["train"], 0)
    exchanged = []
    for before, after in zip(data.pairs["train"], pairs, strict=True):
        exchanged.append(after["chosen"] == before["rejected"])
        assert {after["chosen"], after["rejected"]} == {before["chosen"], before["rejected"]}
        assert {**before, **{name: after[name] for name in ("chosen", "rejected")}} == after
    assert 0.3 < np.mean(exchanged) < 0.7
    trainer = make_trainer(run, data, config, pairs)
    trainer.train()
    assert abs(trainer.evaluate()["eval_rewards/margins"]) < 0.5


# --- references, adapters, processes ---


@pytest.fixture(scope="module")
def aligned(language_model, market, tmp_path_factory):
    """A trainer after a few steps against a copy."""
    folder = tmp_path_factory.mktemp("aligned")
    trainer, data, _ = train(parse_dpo(tiny_dpo(language_model, market, folder, "--logging_steps", "1")))
    save_checkpoint(trainer, folder, data.extractor, trainer.processing_class)
    return trainer, folder


REFERENCES = {
    "checkpoint": ("--ref_model_name_or_path", "{model}"),
    "precomputed": ("--precompute_ref_log_probs", "true"),
    "precomputed by a checkpoint": ("--precompute_ref_log_probs", "true", "--ref_model_name_or_path", "{model}"),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_every_reference_is_the_copy(aligned, language_model, market, tmp_path, case):
    options = [option.format(model=language_model) for option in REFERENCES[case]]
    run = tiny_dpo(language_model, market, tmp_path, "--logging_steps", "1", *options)
    trainer, *_ = train(parse_dpo(run))
    assert (trainer.ref_model is None) == (case == "precomputed")
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert logged(trainer, name) == pytest.approx(logged(aligned[0], name), rel=1e-4, abs=1e-5)
    assert logged(trainer, "rewards/margins")[-1] != 0


def test_another_checkpoint_may_be_the_reference(aligned, language_model, market, tmp_path):
    run = tiny_dpo(language_model, market, tmp_path, "--ref_model_name_or_path", str(aligned[1]))
    trainer, *_ = prepare(parse_dpo(run))
    other = SpaceExploreForCausalLM.from_pretrained(aligned[1])
    batch = batch_of(trainer)
    np.testing.assert_allclose(
        log_probabilities(trainer.ref_model, batch), log_probabilities(other, batch), rtol=1e-4, atol=1e-5
    )
    assert abs(log_probabilities(trainer.model, batch) - log_probabilities(other, batch)).max() > 1e-4


def test_an_adapter_is_trained_against_the_network_without_it(language_model, market, tmp_path):
    options = ("--peft", '{"r": 4}', "--learning_rate", "2e-3", "--logging_steps", "1")
    trainer, data, _ = train(parse_dpo(tiny_dpo(language_model, market, tmp_path, *options)))
    assert trainer.ref_model is None
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)
    batch, before = batch_of(trainer), SpaceExploreForCausalLM.from_pretrained(language_model)
    with trainer.model.disable_adapter():
        np.testing.assert_allclose(
            log_probabilities(trainer.model, batch), log_probabilities(before, batch), rtol=1e-4, atol=1e-5
        )
    expected = log_probabilities(trainer.model, batch)
    assert np.abs(expected - log_probabilities(before, batch)).max() > 1e-3
    save_checkpoint(trainer, tmp_path / "model", data.extractor, trainer.processing_class)
    saved = SpaceExploreForCausalLM.from_pretrained(tmp_path / "model")
    for model in (saved, aligned_model(trainer)):
        np.testing.assert_allclose(log_probabilities(model, batch), expected, rtol=1e-3, atol=1e-4)
    assert {path.name for path in (tmp_path / "model" / "adapter").iterdir()} >= {"adapter_model.safetensors"}


WAYS = {"copy": (), "precomputed": ("--precompute_ref_log_probs", "true"), "lora": ("--peft", '{"r": 4}')}


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(language_model, market, tmp_path, way):
    run = tiny_dpo(language_model, market, tmp_path, *RESUMABLE, *WAYS[way])
    whole, *_ = train(parse_dpo(run))
    expected = {name: weight.clone() for name, weight in whole.model.state_dict().items()}
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed, *_ = train(parse_dpo([*run, "--resume_from_checkpoint", "true"]))
    assert resumed.state.global_step == 6
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.state_dict().items())
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert (tmp_path / "checkpoint-3" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("way", ["copy", "precomputed"])
def test_two_processes_are_one_with_the_whole_batch(language_model, market, tmp_path, way):
    groups = []
    for size in (1, 2):
        own = ("--per_device_train_batch_size", str(8 // size), "--router_aux_loss_coef", "0")
        own += ("--dataloader_drop_last", "true")  # what is left of an epoch cannot be parted evenly
        run = tiny_dpo(language_model, market, tmp_path / str(size), *RESUMABLE, *own, *WAYS[way])
        groups.append(Group(size, tmp_path / str(size), workers.align, run))
    for group in groups:
        group.succeed()
    one, two = (
        json.loads((tmp_path / str(size) / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        for size in (1, 2)
    )
    for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        found, expected = ([entry[name] for entry in each if name in entry] for each in (two, one))
        assert len(found) == 6
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-5)
    weights = [load_file(tmp_path / str(size) / "model.safetensors") for size in (1, 2)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


# --- the command ---


@pytest.fixture(scope="module")
def dataset(language_model, market, tmp_path_factory) -> Path:
    """A folder of the model's own pairs."""
    folder = tmp_path_factory.mktemp("dataset") / "pairs"
    argv = ["--model", str(language_model), "--prices", str(market), "--universe", "all", "--margin", "0"]
    build_preferences.main([*argv, "--output-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def written(language_model, dataset, market, tmp_path_factory) -> Path:
    """What the command leaves, controls included, of a dataset."""
    folder = tmp_path_factory.mktemp("written") / "model"
    evaluated = ("--eval_strategy", "steps", "--eval_steps", "2")
    run = tiny_dpo(language_model, market, folder, "--controls", "true", *evaluated)
    place = run.index("--prices")
    main([*run[:place], "--dataset", str(dataset), *run[place + 2 :]])
    return folder


def test_the_report_has_the_model_before_and_what_else_would_have_done_it(written, language_model):
    report = (written / "report.md").read_text()
    models = ["before", "temperature alone", "aligned", "randomised labels", "SFT continued"]
    assert f"| metric | {' | '.join(models)} |" in report
    assert f"| metric | {' | '.join(models[1:])} |" in report
    for metric in ("path log-likelihood", "CRPS, 10 d", "coverage of 90%, 1 d", "direction, 5 d"):
        assert report.count(f"| {metric}") == 2
    assert "| aligned | " in report
    assert "| randomised labels | " in report
    assert "nan" not in report
    assert f"model_name_or_path: {language_model}" in report
    assert (written / "README.md").read_text().endswith(report)
    assert (written / "training.png").stat().st_size > 10_000


def test_the_folder_is_a_repository_that_says_what_it_has_seen(written, language_model):
    names = {path.name for path in written.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "modeling_spaceexplore.py", "preprocessor_config.json"} <= names
    assert {"tokenizer_config.json", "tokenization_spaceexplore.py", "README.md", "report.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (language_model, written))
    for name in ("train_cutoff", "selection_cutoff", "attention_dropout", "horizons", "vocab_size"):
        assert after[name] == before[name]
    assert (written / "preprocessor_config.json").read_text() == (
        language_model / "preprocessor_config.json"
    ).read_text()


STRANGER = """
import sys
sys.modules["spaceexploreai"] = None  # any import of it raises ImportError
import numpy as np, torch
from transformers import AutoFeatureExtractor, AutoModelForCausalLM, AutoTokenizer
folder, values, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer(tokenizer.prompt(extractor.context_length), return_tensors="pt")
days = {"min_new_tokens": 10, "max_new_tokens": 10, "suppress_tokens": tokenizer.suppress_tokens}
past_values = torch.from_numpy(np.load(values))
np.save(output, model.generate(**prompt, past_values=past_values, do_sample=False, **days).numpy())
"""


def test_the_aligned_model_generates_where_the_package_is_not(written, market, tmp_path):
    extractor = SpaceExploreFeatureExtractor.from_pretrained(written)
    values = np.array(extractor.encode(read_prices(market))[0].values[-64:])[None]
    np.save(tmp_path / "values.npy", values)
    arguments = [written, tmp_path / "values.npy", tmp_path / "paths.npy"]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = SpaceExploreForCausalLM.from_pretrained(written), SpaceExploreTokenizer()
    prompt = tokenizer(tokenizer.prompt(64), return_tensors="pt")
    days = GenerationConfig(
        min_new_tokens=H, max_new_tokens=H, do_sample=False, suppress_tokens=tokenizer.suppress_tokens
    )
    expected = model.generate(**prompt, past_values=torch.from_numpy(values), generation_config=days)
    np.testing.assert_array_equal(np.load(tmp_path / "paths.npy"), expected.numpy())
    assert expected.shape[1] == 64 + 1 + H


def test_pairs_of_prices_are_those_of_a_built_dataset(language_model, market, tmp_path):
    folder = tmp_path / "stocks"
    argv = ["--prices", str(market), "--extractor", str(language_model), "--config", "dpo"]
    build_dataset.main([*argv, "--output-dir", str(folder)])
    run = tiny_dpo(language_model, market, tmp_path)
    place = run.index("--prices")
    _, ours, _ = prepare(parse_dpo(run))
    _, theirs, _ = prepare(parse_dpo([*run[:place], "--dataset", str(folder), *run[place + 2 :]]))
    for name in ("train", "validation"):
        assert ours.pairs[name].to_dict() == theirs.pairs[name].to_dict()
        assert ours.pairs[name].to_dict() == load_dataset(str(folder), "dpo", split=name).to_dict()


@pytest.mark.parametrize("recipe", sorted(RECIPE.parent.glob("*/dpo.yaml")), ids=lambda path: path.parent.name)
def test_a_recipe_is_a_run_that_keeps_the_width(recipe, tmp_path):
    run = parse_dpo(["--config", str(recipe)])
    assert 0.3 <= run.training.beta <= 1
    assert "sft" in run.training.loss_type
    planted = tmp_path / "dpo.yaml"
    planted.write_text(recipe.read_text() + "\nbetta: 0.1\n")
    with pytest.raises(ValueError, match="betta"):
        parse_dpo(["--config", str(planted)])


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, market, dataset) -> Path:
    """A dataset whose statistics are not the model's."""
    folder = tmp_path_factory.mktemp("stranger") / "pairs"
    shutil.copytree(dataset, folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clip": 3.0}))
    return folder


MISTAKES = {
    "no pairs": (["--dataset", "nowhere"], "is no dataset of scripts/build_dataset.py with preference pairs"),
    "other statistics": (["--dataset", "STRANGER"], "clip of the checkpoint"),
    "new network": (["--model_config", "config.json"], "model_config"),
    "lost columns": (["--remove_unused_columns", "true"], "remove_unused_columns"),
    "cut prompt": (["--max_length", "40"], "max_length 40 would cut the 75 tokens"),
    "unknown loss": (["--loss_type", "sigmod", "--loss_weights", "1"], "sigmod"),
    "taught": (["--t2t_loss_weight", "0.1"], "t2t_loss_weight 0.1"),
    "few samples": (["--num_samples", "3"], "got 3"),
    "no member": (["--universe", "dow30"], "none of the 30 pair_tickers"),
    "unknown dates": (["--validation_fraction", "0.05"], "align it on what it knows"),
    "unknown adapter": (["--peft", '{"rank": 4}'], "rank"),
    "nothing to resume": (["--resume_from_checkpoint", "true"], "no checkpoint to resume from"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(language_model, market, stranger, tmp_path, capsys, case):
    options, named = MISTAKES[case]
    run = tiny_dpo(language_model, market, tmp_path / "model")
    if options[0] == "--dataset":
        place = run.index("--prices")
        run = [*run[:place], *run[place + 2 :]]
    with pytest.raises(SystemExit, match="2"):
        main([*run, *(str(stranger) if option == "STRANGER" else option for option in options)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert named in last
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_a_model_without_a_vocabulary_cannot_be_aligned(checkpoint, market, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(tiny_dpo(checkpoint, market, tmp_path / "model"))
    assert "has no vocabulary" in capsys.readouterr().err.splitlines()[-1]


def test_the_model_can_be_trained_on(written, market, tmp_path):
    """Supervised training goes on from it, with its statistics and dropout."""
    run = tiny_run(tmp_path, "--prices", str(market), "--task", "causal_lm", "--model_name_or_path", str(written))
    (tmp_path / "sft.yaml").write_text((RECIPE / "sft.yaml").read_text().replace("model_config: ", "# "))
    run[run.index("--config") + 1] = str(tmp_path / "sft.yaml")
    place = run.index("--model_config")
    trainer = train_supervised(parse_run([*run[:place], *run[place + 2 :]]))
    assert trainer.model.model.layers[0].self_attn.attention_dropout == 0.1
    assert trainer.state.global_step == 4
