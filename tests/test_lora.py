"""Adapters: few weights are trained, they load back onto the network that needs no package, and merge into it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import RECIPE, tiny_run
from peft import PeftModel

from spaceexploreai.data.prices import read_prices
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.scripts.forecasters import load_checkpoint
from spaceexploreai.train.arguments import parse_run
from spaceexploreai.train.lora import merged
from spaceexploreai.train.sft import main, save_checkpoint, train


def run_of(folder, checkpoint, market, *options: str) -> list[str]:
    steps = ["--max_steps", "4", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    data = ["--model_name_or_path", str(checkpoint), "--prices", str(market), "--disable_tqdm", "true"]
    return ["--config", str(RECIPE / "lora.yaml"), *data, *steps, "--output_dir", str(folder), *options]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, checkpoint, market):
    """A trainer that has trained an adapter, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("tuned")
    trainer = train(parse_run(run_of(folder, checkpoint, market)))
    save_checkpoint(trainer, folder)
    return trainer, folder


def outputs(model, extractor, market) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**extractor(read_prices(market))).quantiles


def test_few_weights_are_trained(tuned, checkpoint):
    model, before = tuned[0].model, SpaceExploreForRegression.from_pretrained(checkpoint).state_dict()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained < 0.15 * sum(parameter.numel() for parameter in model.parameters())
    after = merged(model).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.1.self_attn.kv_b_proj.weight" in changed
    assert "quantile_head.weight" in changed
    assert not any("experts.gate_up_proj" in name or "norm" in name for name in changed)


def test_the_folder_holds_the_merged_network(tuned, checkpoint, market):
    trainer, folder = tuned
    model, extractor = load_checkpoint(folder)
    expected = outputs(trainer.model, extractor, market)
    torch.testing.assert_close(outputs(model, extractor, market), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(outputs(load_checkpoint(checkpoint)[0], extractor, market), expected, rtol=1e-3)
    assert model.config.train_cutoff == trainer.model.config.train_cutoff
    assert {path.suffix for path in (folder / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}


def test_the_adapter_loads_back_onto_the_network(tuned, checkpoint, market):
    trainer, folder = tuned
    base, extractor = load_checkpoint(checkpoint)
    again = PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(
        outputs(again, extractor, market), outputs(trainer.model, extractor, market), rtol=1e-5, atol=1e-7
    )


STRANGER = """
import sys
sys.modules["spaceexploreai"] = None  # any import of it raises ImportError
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForTimeSeriesPrediction
folder, adapter, inputs, output = sys.argv[1:]
base = AutoModelForTimeSeriesPrediction.from_pretrained(folder, trust_remote_code=True)
model = PeftModel.from_pretrained(base, adapter).eval()
given = {name: torch.from_numpy(array) for name, array in np.load(inputs).items()}
with torch.no_grad():
    np.save(output, model(**given).quantiles.numpy())
"""


def test_the_adapter_loads_where_the_package_is_not(tuned, checkpoint, market, tmp_path):
    trainer, folder = tuned
    extractor = load_checkpoint(folder)[1]
    batch = extractor(read_prices(market), return_tensors="np")
    np.savez(tmp_path / "inputs.npz", **batch)
    arguments = [checkpoint, folder / "adapter", tmp_path / "inputs.npz", tmp_path / "outputs.npy"]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = outputs(trainer.model, extractor, market).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected, rtol=1e-5, atol=1e-7)


def test_an_adapter_is_resumed(checkpoint, market, tmp_path):
    steps = (
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--save_total_limit",
        "3",
        "--logging_strategy",
        "steps",
        "--logging_steps",
        "1",
    )
    whole = train(parse_run(run_of(tmp_path, checkpoint, market, *steps)))
    for path in tmp_path.glob("checkpoint-4"):
        path.rename(tmp_path / "later")
    resumed = train(parse_run(run_of(tmp_path, checkpoint, market, *steps, "--resume_from_checkpoint", "true")))
    losses = [
        [e["loss"] for e in one.state.log_history if e.get("step", 0) > 2 and "loss" in e] for one in (whole, resumed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


MISTAKES = {
    "unknown field": (["--peft", '{"rank": 8}'], "rank"),
    "no JSON": (["--peft", "{rank"], "{rank"),
    "no fields": (["--peft", "8"], "'8'"),
    "no such layer": (["--peft", '{"target_modules": ["nowhere"]}'], "nowhere"),
    "new vocabulary": (["--task", "causal_lm"], "has no vocabulary"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_refused(checkpoint, market, tmp_path, capsys, case):
    options, named = MISTAKES[case]
    with pytest.raises(SystemExit) as exit_:
        main([*run_of(tmp_path / "out", checkpoint, market), *options])
    assert exit_.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_adapter_needs_a_trained_network(market, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*tiny_run(tmp_path, "--prices", str(market)), "--peft", json.dumps({"r": 4})])
    assert "peft needs a model_name_or_path" in capsys.readouterr().err
