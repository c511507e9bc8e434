"""The shipped checkpoint: rounded and nothing else, of the code beside it, and one forecast however it is asked."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTimeSeriesPrediction,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.prices import read_sample
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.indicators_spaceexplore import FEATURE_PRESETS
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.scripts import export
from spaceexploreai.scripts.forecasters import load_checkpoint, load_pipeline
from spaceexploreai.scripts.serve import Limits, make_app
from spaceexploreai.scripts.service import Batcher, ForecastService
from spaceexploreai.scripts.ship import main, ship

ROOT = Path(__file__).resolve().parents[1]
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json"}
QUANTILES = [f"q{level / 20:.2f}".rstrip("0") for level in range(1, 20)]


# --- shipping ---


def test_weights_are_rounded_and_computed_with_as_before(checkpoint, tmp_path, capsys):
    main(["--model", str(checkpoint), "--output-dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == FILES
    printed = capsys.readouterr().out
    assert all(name in printed for name in FILES)
    whole, rounded = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(whole) == set(rounded)
    for name, tensor in whole.items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(rounded[name], expected), name
    for code in checkpoint.glob("*_spaceexplore.py"):
        shutil.copy(code, tmp_path)
    model = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path, trust_remote_code=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ours, _ = load_checkpoint(checkpoint)
    for name, parameter in ours.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16().float()), name


def test_what_is_not_written_stays(checkpoint, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    ship(str(checkpoint), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not list(tmp_path.glob("*.py"))


def test_a_checkpoint_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "none"), "--output-dir", str(tmp_path / "out")])
    assert "none" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# --- what is shipped ---


@pytest.fixture(scope="module")
def config() -> SpaceExploreConfig:
    return SpaceExploreConfig.from_pretrained(ROOT)


def test_configuration_is_of_the_recipe_and_of_the_code(config):
    written = json.loads((ROOT / "config.json").read_text())
    known = {field.name for field in fields(SpaceExploreConfig)} | {"auto_map", "custom_pipelines", "model_type"}
    assert set(SpaceExploreConfig.__annotations__) - {"keys_to_ignore_at_inference"} <= set(written) <= known
    recipe = json.loads((ROOT / "recipes" / "27m" / "config.json").read_text())
    assert {name: written[name] for name in recipe} == recipe
    assert config.architectures == ["SpaceExploreForRegression"]
    assert config.auto_map == SpaceExploreConfig().auto_map


def test_weights_are_those_of_the_network():
    model, info = SpaceExploreForRegression.from_pretrained(ROOT, output_loading_info=True)
    assert not any(info.values()), info
    assert 26e6 < model.num_parameters() < 28e6
    assert (ROOT / "model.safetensors").stat().st_size <= 60e6
    with safe_open(ROOT / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.model.t2t.num_batches_tracked > 0  # it was trained, so `describe` may speak


def test_features_are_the_frozen_default():
    extractor = SpaceExploreFeatureExtractor.from_pretrained(ROOT)
    assert extractor.feature_names == list(FEATURE_PRESETS["default"])
    assert np.isfinite([extractor.center, extractor.spread]).all()


def test_card_says_when_it_stopped_to_learn(config):
    card = ModelCard.load(ROOT / "README.md").data.to_dict()
    assert str(card["train_cutoff"]) == config.train_cutoff < config.selection_cutoff
    assert str(card["selection_cutoff"]) == config.selection_cutoff
    assert (card["library_name"], card["pipeline_tag"]) == ("transformers", "time-series-forecasting")


# --- one forecast ---


@pytest.fixture(scope="module")
def prices() -> pd.DataFrame:
    return read_sample(["AAPL", "IBM"])


@pytest.fixture(scope="module")
def expected(prices) -> pd.DataFrame:
    """Of the auto classes, in log-returns."""
    extractor = AutoFeatureExtractor.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModelForTimeSeriesPrediction.from_pretrained(ROOT, trust_remote_code=True)
    with torch.inference_mode():
        return extractor.decode(model(**extractor(prices)), prices, model.config, unit="log_return")


def test_pipeline_forecasts_the_same(prices, expected):
    pipe = pipeline("time-series-forecasting", model=str(ROOT), trust_remote_code=True)
    table = pipe(prices, unit="log_return")
    pd.testing.assert_frame_equal(table[expected.columns], expected, rtol=1e-4, atol=1e-7)


def test_graph_forecasts_the_same(prices, expected, tmp_path):
    export.main(["--model", str(ROOT), "--output-dir", str(tmp_path / "export")])
    extractor = SpaceExploreFeatureExtractor.from_pretrained(ROOT)
    inputs = {name: tensor.numpy() for name, tensor in extractor(prices).items()}
    session = onnxruntime.InferenceSession(tmp_path / "export" / "model.onnx")
    mean, quantiles = session.run(["mean", "quantiles"], inputs)
    np.testing.assert_allclose(mean[:, -1].flatten(), expected["mean"], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(quantiles[:, -1].reshape(-1, 19), expected[QUANTILES], rtol=1e-3, atol=1e-6)


def test_server_forecasts_the_same(prices, expected):
    service = ForecastService({"shipped": load_pipeline(str(ROOT), "cpu")}, prices)
    app = make_app(
        service, Batcher(service.answer, max_wait=0), Limits(max_bars=300, max_body_mb=1, rate_limit=0, timeout_s=60)
    )
    with TestClient(app, base_url="http://127.0.0.1") as client:
        answer = client.post("/v1/forecast", json={"tickers": ["AAPL", "IBM"], "unit": "log_return"})
    assert answer.status_code == 200, answer.text
    for found in answer.json()["forecasts"]:
        own = expected[expected["ticker"] == found["ticker"]]
        np.testing.assert_allclose(found["forecast"]["mean"], own["mean"], rtol=1e-4, atol=1e-7)
        quantiles = np.transpose(list(found["forecast"]["quantiles"].values()))
        np.testing.assert_allclose(quantiles, own[QUANTILES], rtol=1e-4, atol=1e-7)


def test_hidden_states_and_tokens_come_from_the_root():
    assert AutoModel.from_pretrained(ROOT, trust_remote_code=True).config.hidden_size == 256
    assert len(AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)) == 261


# --- the small ones beside it ---

SMALL = {
    "5m-student": AutoModelForTimeSeriesPrediction,
    "5m-clm": AutoModelForCausalLM,
    "5m-clm-nasdaq100": AutoModelForCausalLM,
}
by_name = pytest.mark.parametrize("name", SMALL)


@by_name
def test_a_small_one_loads_with_the_code_of_the_root(name):
    folder = f"checkpoints/{name}"
    model, info = SMALL[name].from_pretrained(ROOT, subfolder=folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert 4.5e6 < model.num_parameters() < 5.5e6
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert (ROOT / folder / "model.safetensors").stat().st_size <= 11e6
    written = json.loads((ROOT / folder / "config.json").read_text())
    recipe = json.loads((ROOT / "recipes" / "5m" / "config.json").read_text())
    assert {key: written[key] for key in recipe} == recipe


@by_name
def test_a_small_one_saw_no_other_days_and_columns(name, config):
    """The root's extractor is what `pipeline` reads, and the card's dates are of all."""
    folder = ROOT / "checkpoints" / name
    assert (folder / "preprocessor_config.json").read_text() == (ROOT / "preprocessor_config.json").read_text()
    own = SpaceExploreConfig.from_pretrained(folder)
    assert (own.train_cutoff, own.selection_cutoff) == (config.train_cutoff, config.selection_cutoff)


@by_name
def test_pipeline_of_a_small_one(name, prices, monkeypatch):
    """As the README has it, from within the clone."""
    monkeypatch.chdir(ROOT)
    own = load_pipeline(str(ROOT / "checkpoints" / name), "cpu")
    pipe = pipeline(
        "time-series-forecasting",
        model=".",
        model_kwargs={"subfolder": f"checkpoints/{name}"},
        trust_remote_code=True,
    )
    one, other = pipe(prices, unit="log_return", seed=0), own(prices, unit="log_return", seed=0)
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-7)


def test_the_aligned_one_has_other_weights_and_draws_from_all_bins():
    clm, aligned = (load_file(ROOT / "checkpoints" / name / "model.safetensors") for name in list(SMALL)[1:])
    assert clm.keys() == aligned.keys()
    assert not torch.equal(clm["lm_head.weight"], aligned["lm_head.weight"])
    for name in list(SMALL)[1:]:
        sampling = GenerationConfig.from_pretrained(ROOT / "checkpoints" / name)
        assert (sampling.do_sample, sampling.top_k) == (True, 0)
