"""What several test files need: no network, small synthetic markets, one checkpoint trained for a few steps."""

import atexit
import json
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a test that asks the Hub must fail at once
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # before datasets is

from pathlib import Path

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
import torch

from spaceexploreai.data.prices import write_table
from spaceexploreai.train import memory
from spaceexploreai.train.arguments import parse_run
from spaceexploreai.train.sft import save_checkpoint, train

memory.mallopt = lambda *_: None  # a test that trains would hide from another, in the same process, what is freed
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
torch.set_num_threads(1)  # two test processes on two cores
RECIPE = Path(__file__).parents[1] / "recipes" / "tiny"
STILL = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "input_noise": 0.0}  # nothing random in a step
FAILURES = [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("cannot convert")]
by_failure = pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)


def make_market(tickers: int = 3, days: int = 400, seed: int = 0, momentum: float = 0.0) -> pd.DataFrame:
    """A price table of random walks on NYSE sessions; `momentum` is the autocorrelation of daily returns."""
    generator = np.random.default_rng(seed)
    dates = exchange_calendars.get_calendar("XNYS", start="2005-01-01", end="2020-12-31").sessions[:days]
    frames = []
    for which in range(tickers):
        shocks = generator.normal(0, 0.02 * (1 + which), days)
        returns = np.zeros(days)
        for day in range(1, days):
            returns[day] = momentum * returns[day - 1] + shocks[day]
        close = 50 * np.exp(returns.cumsum())
        open_ = close * np.exp(generator.normal(0, 0.005, days))
        high = np.maximum(open_, close) * np.exp(np.abs(generator.normal(0, 0.004, days)))
        low = np.minimum(open_, close) * np.exp(-np.abs(generator.normal(0, 0.004, days)))
        bars = {"date": dates, "open": open_, "high": high, "low": low, "close": close}
        frames.append(pd.DataFrame({"ticker": f"T{which}", **bars, "volume": generator.integers(1e5, 1e6, days)}))
    return pd.concat(frames, ignore_index=True)


def tiny_run(output_dir: Path, *options: str) -> list[str]:
    """Command line of the tiny recipe, from any folder and for a few steps."""
    recipe = ["--config", str(RECIPE / "sft.yaml"), "--model_config", str(RECIPE / "config.json")]
    steps = ["--max_steps", "4", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    return [*recipe, *steps, "--disable_tqdm", "true", "--output_dir", str(output_dir), *options]


@pytest.fixture(scope="session")
def market(tmp_path_factory) -> Path:
    """The file of a synthetic price table."""
    path = tmp_path_factory.mktemp("market") / "market.parquet"
    write_table(make_market(), path)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, market) -> Path:
    """A checkpoint folder of the tiny recipe after a few steps on the synthetic market."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(train(parse_run(tiny_run(folder, "--prices", str(market)))), folder)
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory, market) -> Path:
    """A checkpoint folder of a causal language model after a few steps on the synthetic market."""
    folder = tmp_path_factory.mktemp("language_model")
    run = tiny_run(folder, "--prices", str(market), "--task", "causal_lm", "--learning_rate", "2e-3")
    save_checkpoint(train(parse_run([*run, "--max_steps", "12"])), folder)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, market) -> Path:
    """A checkpoint folder of a classification after a few steps on the synthetic market."""
    folder = tmp_path_factory.mktemp("classifier")
    run = tiny_run(folder, "--prices", str(market), "--task", "classification", "--learning_rate", "3e-3")
    save_checkpoint(train(parse_run(run)), folder)
    return folder


@pytest.fixture(scope="session")
def uneven(tmp_path_factory) -> Path:
    """A market with a late ticker, whose windows are short, and a halt, whose steps are masked."""
    prices = make_market(tickers=4, days=400)
    late = (prices["ticker"] == "T3") & (prices["date"] < prices["date"].unique()[200])
    halt = (prices["ticker"] == "T1") & prices["date"].isin(prices["date"].unique()[100:130])
    path = tmp_path_factory.mktemp("uneven") / "market.parquet"
    write_table(prices[~(late | halt)], path)
    return path


@pytest.fixture(scope="session")
def exact(tmp_path_factory) -> Path:
    """The tiny network without what depends on how a batch is parted: dropout, and the balance of its experts."""
    fields = json.loads((RECIPE / "config.json").read_text())
    fields |= STILL | {"router_aux_loss_coef": 0.0}
    path = tmp_path_factory.mktemp("exact") / "config.json"
    path.write_text(json.dumps(fields))
    return path


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder and returns its one-line complaint."""
    monkeypatch.chdir(tmp_path)

    def run(main, argv: list[str]) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        complaint = capsys.readouterr().err.splitlines()[-1]
        assert exit_.value.code == 2
        assert complaint.startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return complaint

    return run
