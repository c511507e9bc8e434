"""A saved checkpoint loads with `trust_remote_code=True` in a process where this package cannot be imported."""

import os
import subprocess
import sys

import pandas as pd

from spaceexploreai.data.prices import read_prices
from spaceexploreai.scripts.forecast import load_checkpoint

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


def run_stranger(tmp_path, folder, market, name) -> pd.DataFrame:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STRANGER, str(folder), str(market), str(tmp_path / name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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
