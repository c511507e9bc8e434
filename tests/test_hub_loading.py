"""A saved checkpoint loads with `trust_remote_code=True` in a process where this package cannot be imported."""

import inspect
import os
import subprocess
import sys

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.prices import read_prices
from spaceexploreai.modeling_spaceexplore import (
    SpaceExploreForCausalLM,
    SpaceExploreForClassification,
    SpaceExploreForRegression,
    SpaceExploreForTimeToText,
    SpaceExploreModel,
)
from spaceexploreai.scripts.forecasters import load_checkpoint

STRANGER = """
import sys
sys.modules["spaceexploreai"] = None  # any import of it raises ImportError
import pandas as pd
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForTimeSeriesPrediction

folder, prices, output = sys.argv[1:]
prices = pd.read_parquet(prices)
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForTimeSeriesPrediction.from_pretrained(folder, trust_remote_code=True)
with torch.inference_mode():
    outputs = model(**extractor(prices))
    trunk = AutoModel.from_pretrained(folder, trust_remote_code=True)(**{
        name: tensor for name, tensor in extractor(prices).items() if name != "scale"
    })
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "spaceexplore"
assert trunk.last_hidden_state.shape[1] == extractor.context_length
assert model.can_generate() is False and model.config._experts_implementation == "grouped_mm"
extractor.decode(outputs, prices, model.config).to_parquet(output)
model.save_pretrained(output + ".again")
extractor.save_pretrained(output + ".again")
"""


def run_elsewhere(tmp_path, code: str, *arguments) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_stranger(tmp_path, folder, market, name) -> pd.DataFrame:
    run_elsewhere(tmp_path, STRANGER, folder, market, tmp_path / name)
    return pd.read_parquet(tmp_path / name)


def test_a_stranger_gets_the_same_forecast_also_after_saving_it_again(tmp_path, checkpoint, market):
    model, extractor = load_checkpoint(checkpoint)
    prices = read_prices(market)
    expected = extractor.decode(model(**extractor(prices)), prices, model.config)
    loaded = run_stranger(tmp_path, checkpoint, market, "first.parquet")
    # Matrix products round by where in memory the weights lie.
    pd.testing.assert_frame_equal(loaded, expected, rtol=1e-6)
    again = run_stranger(tmp_path, tmp_path / "first.parquet.again", market, "second.parquet")
    pd.testing.assert_frame_equal(again, expected, rtol=1e-6)


HEADS = {
    "AutoModel": SpaceExploreModel,
    "AutoModelForCausalLM": SpaceExploreForCausalLM,
    "AutoModelForPreTraining": SpaceExploreForTimeToText,
    "AutoModelForSequenceClassification": SpaceExploreForClassification,
    "AutoModelForTimeSeriesPrediction": SpaceExploreForRegression,
}
# Every kind of buffer and parameter: wavelet filter, running statistics, rotary frequencies, extractor, tokens.
SIZES = {
    "num_features": 5,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "kv_lora_rank": 24,
    "moe_intermediate_size": 40,
    "mscnn_hidden_size": 24,
    "t2t_num_hidden_layers": 1,
    "t2t_hidden_size": 16,
    "t2t_loss_weight": 0.01,
    "input_norm": "batch",
    "wavelet": "sym4",
    "vocab_size": 30,
    "initializer_range": 0.1,
}
STRANGER_TO_HEADS = """
import sys
sys.modules["spaceexploreai"] = None  # any import of it raises ImportError
import torch
import transformers
from safetensors.torch import load_file, save_file

folder, *heads = sys.argv[1:]
batch = load_file(folder + "/batch.safetensors")
loaded = {}
for head in heads:
    model, info = getattr(transformers, head).from_pretrained(
        folder + "/" + head, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.inference_mode():
        loaded[head] = read(model, batch)
save_file(loaded, folder + "/loaded.safetensors")
"""


def read(model, batch):
    """The first thing that a head says."""
    outputs = model(**batch)
    return next(outputs[name] for name in ("mean", "logits", "word_logits", "last_hidden_state") if name in outputs)


def test_a_stranger_gets_the_same_answers_of_every_head(tmp_path):
    torch.manual_seed(0)
    batch = {"past_values": torch.randn(2, 40, 5)}
    save_file(batch, tmp_path / "batch.safetensors")
    expected = {}
    for auto, head in HEADS.items():
        model = head(SpaceExploreConfig(**SIZES)).eval()
        for statistics in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d)):
            statistics.running_mean.normal_()
        model.save_pretrained(tmp_path / auto)
        with torch.inference_mode():
            expected[auto] = read(model, batch)
    code = STRANGER_TO_HEADS.replace("folder, *heads", inspect.getsource(read) + "\n\nfolder, *heads")
    run_elsewhere(tmp_path, code, tmp_path, *HEADS)
    loaded = load_file(tmp_path / "loaded.safetensors")
    for auto, answer in expected.items():
        torch.testing.assert_close(
            loaded[auto], answer, rtol=1e-5, atol=1e-6, msg=lambda text, auto=auto: f"{auto}: {text}"
        )
