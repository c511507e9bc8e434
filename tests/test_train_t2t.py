"""Training of the time-to-text extractor: what it reads, learns and leaves behind, and what it teaches a forecaster."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import RECIPE, make_market
from safetensors.torch import load_file
from scipy.spatial.distance import pdist
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error
from tokenizers import Tokenizer, models
from transformers import AutoModelForPreTraining, BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

from spaceexploreai.data.prices import read_prices, write_table
from spaceexploreai.data.stocks import ReturnsWindows
from spaceexploreai.data.windows import chronological_split
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression, SpaceExploreForTimeToText
from spaceexploreai.t2t_spaceexplore import IGNORE_INDEX, WORDS, word_labels
from spaceexploreai.train import sft, t2t
from spaceexploreai.train.arguments import parse_run
from spaceexploreai.train.sft import prepare, save_checkpoint, train
from spaceexploreai.train.t2t import parse_t2t

LENGTH, OVERLAP = 12, 4  # of the tiny recipe
STRIDE = LENGTH - OVERLAP
STEPS = 6
FEW = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--disable_tqdm", "true"]


def t2t_run(folder: Path, prices: Path, *options: str) -> list[str]:
    """Command line of the tiny recipe, from any folder and for a few steps."""
    recipe = ["--config", str(RECIPE / "t2t.yaml"), "--model_config", str(RECIPE / "t2t.json")]
    data = ["--prices", str(prices), "--max_steps", str(STEPS), "--output_dir", str(folder)]
    return [*recipe, *FEW, *data, *options]


def taught_run(folder: Path, prices: Path, extractor: Path, *options: str) -> list[str]:
    """Command line of supervised training that starts from an extractor."""
    recipe = ["--config", str(RECIPE / "sft_t2t.yaml"), "--model_name_or_path", str(extractor)]
    data = ["--prices", str(prices), "--max_steps", str(STEPS), "--output_dir", str(folder)]
    return [*recipe, *FEW, *data, *options]


@pytest.fixture(scope="module")
def extractor(tmp_path_factory, market) -> Path:
    """A checkpoint folder of the extractor after a few steps, as the command leaves it."""
    folder = tmp_path_factory.mktemp("extractor")
    t2t.main(t2t_run(folder, market))
    return folder


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """Prices of which one ticker was listed late, and one has halts in training and in validation."""
    prices = make_market(tickers=3, days=900)
    days = prices["date"].unique()
    late = (prices["ticker"] == "T2") & (prices["date"] < days[300])
    halted = (prices["ticker"] == "T1") & prices["date"].isin(days[[200, 201, 350, 750]])
    path = tmp_path_factory.mktemp("uneven") / "market.parquet"
    write_table(prices[~late & ~halted], path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, uneven):
    """The trainer and task of an extractor trained on them, with its metrics."""
    trainer, task, _ = prepare(parse_t2t(t2t_run(tmp_path_factory.mktemp("trained"), uneven)))
    trainer.train()
    return trainer, task, trainer.evaluate()


# --- what it reads ---


def plain_volatility(closes: np.ndarray) -> float:
    """RiskMetrics of all closes."""
    squared = np.diff(np.log(closes)) ** 2
    weights = 0.94 ** np.arange(len(squared))[::-1]
    return ((weights * squared).sum() / weights.sum()) ** 0.5


@pytest.mark.parametrize("name", ["train", "validation"])
def test_returns_are_in_units_of_the_volatility_of_the_day_before(trained, uneven, name):
    windows, prices = getattr(trained[1], name), read_prices(uneven)
    close = prices.pivot(index="date", columns="ticker", values="close")
    unknown = 0
    for index in range(0, len(windows), 11 if name == "train" else 1):
        example, (which, first, last, _) = windows[index], windows.rows[index].tolist()
        history = windows.series[which]
        series = close[history.ticker]
        assert len(example["returns"]) == last + 1 - first
        np.testing.assert_array_equal(example["attention_mask"], series[history.dates[first : last + 1]].notna())
        np.testing.assert_array_equal(example["past_values"], history.values[first : last + 1])
        for place, step in enumerate(range(first, last + 1)):
            before, now = series[history.dates[[max(step - 1, 0), step]]]
            if step == 0 or np.isnan(before * now):
                assert np.isnan(example["returns"][place])
                unknown += 1
            else:
                volatility = plain_volatility(series[: history.dates[step - 1]].dropna().to_numpy())
                assert example["returns"][place] == pytest.approx(np.log(now / before) / volatility, rel=1e-4)
    assert unknown


@pytest.mark.parametrize("name", ["train", "validation"])
def test_windows_read_every_labelled_day_of_their_range_and_no_other(trained, uneven, name):
    dates = read_prices(uneven)["date"]
    within = getattr(chronological_split(dates, horizon=10), name)
    windows = getattr(trained[1], name)
    read = [windows.series[which].dates[first : last + 1] for which, first, last, _ in windows.rows.tolist()]
    days = np.unique(dates[(dates >= within.start) & (dates <= within.end)])
    known = days[20:] if name == "train" else days  # volatility is known from the 21st day on
    np.testing.assert_array_equal(np.unique(np.concatenate(read)), known[:-10])


def test_padding_is_on_the_left_and_unknown(trained):
    _, task, _ = trained
    examples = [task.validation[0], task.validation[len(task.validation) - 1]]
    lengths = [len(example["returns"]) for example in examples]
    batch = task.collate(examples)
    assert min(lengths) < batch["returns"].shape[1] == 64
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        assert batch["returns"][row, :-length].isnan().all()
        np.testing.assert_allclose(batch["returns"][row, -length:], example["returns"], rtol=1e-6)
        np.testing.assert_array_equal(batch["attention_mask"][row, -length:], example["attention_mask"])
        assert not batch["attention_mask"][row, :-length].any()


# --- what it learns ---


def starts(steps: int) -> list[int]:
    """First step of each patch, counted back from the newest."""
    found = [steps - LENGTH]
    while found[0] > 0:
        found.insert(0, found[0] - STRIDE)
    return found


def word_of(returns: np.ndarray) -> int:
    """Of a whole patch; the table of words has tests of its own."""
    return word_labels(torch.tensor(returns)[None], None, LENGTH, STRIDE).item()


def plain_scores(model: SpaceExploreForTimeToText, example: dict) -> tuple[list, list]:
    """(true, network, mean of the visible steps) of each hidden step, and (true, log-probabilities) of each visible
    patch with a word, of one window without padding."""
    values, traded = np.nan_to_num(example["past_values"]), example["attention_mask"]
    values = np.where(traded[:, None], values, 0)
    with torch.no_grad():
        outputs = model(
            torch.from_numpy(example["past_values"])[None].contiguous(), torch.from_numpy(traded)[None].long()
        )
    patches = [[step for step in range(start, start + LENGTH) if step >= 0] for start in starts(len(values))]
    visible = outputs.visible[0].tolist()
    shown = [step for patch, seen in zip(patches, visible, strict=True) if seen for step in patch if traded[step]]
    hidden, words = [], []
    for index, (patch, seen) in enumerate(zip(patches, visible, strict=True)):
        if not seen:
            guesses = outputs.reconstruction[0, index, -len(patch) :].numpy()
            for step, guess in zip(patch, guesses, strict=True):
                if traded[step] and step not in shown:
                    hidden.append((values[step], guess, values[shown].mean(axis=0)))
            continue
        returns = np.append(np.full(LENGTH - len(patch), np.nan), example["returns"][patch])
        if word_of(returns) != IGNORE_INDEX:
            words.append((word_of(returns), outputs.word_logits[0, index].double().log_softmax(-1).numpy()))
    return hidden, words


def test_metrics_are_scikit_learns(trained):
    trainer, task, metrics = trained
    model = trainer.model.eval()
    hidden, words = [], []
    for index in range(len(task.validation)):
        one = plain_scores(model, task.validation[index])
        hidden, words = hidden + one[0], words + one[1]
    true, network, mean = (np.array(column, dtype=float) for column in zip(*hidden, strict=True))
    errors = [mean_squared_error(true, guess) for guess in (network, np.zeros_like(true), mean)]
    names = ["reconstruction", "reconstruction_of_zero", "reconstruction_of_mean"]
    assert [metrics[f"eval_{name}"] for name in names] == pytest.approx(errors, rel=1e-4)
    assert metrics["eval_reconstruction_skill"] == pytest.approx(1 - errors[0] / min(errors[1:]), abs=1e-4)
    labels, log_probabilities = (np.array(column) for column in zip(*words, strict=True))
    loss = log_loss(labels, np.exp(log_probabilities), labels=range(len(WORDS)))
    shares = np.tile(plain_shares(task), (len(labels), 1))
    assert metrics["eval_word_log_loss"] == pytest.approx(loss, rel=1e-4)
    baseline = log_loss(labels, shares, labels=range(len(WORDS)))
    assert metrics["eval_word_log_loss_skill"] == pytest.approx(1 - loss / baseline, abs=1e-4)
    assert metrics["eval_word_accuracy"] == pytest.approx(accuracy_score(labels, log_probabilities.argmax(axis=1)))
    assert metrics["eval_word_base_rate"] == pytest.approx(np.unique(labels, return_counts=True)[1].max() / len(labels))


def plain_shares(task) -> np.ndarray:
    """Of the words in what each ticker was trained on, from its newest day back."""
    found = list(range(len(WORDS)))  # each once more than it came
    for which in range(len(task.train.series)):
        rows = task.train.rows[task.train.rows[:, 0] == which]
        returns = task.train.cut(which, rows[0, 1], rows[-1, 2] + 1)["returns"]
        padded = np.append(np.full(LENGTH, np.nan), returns)
        found += [word_of(padded[start + LENGTH :][:LENGTH]) for start in starts(len(returns))]
    found = [word for word in found if word != IGNORE_INDEX]
    return np.bincount(found) / len(found)


def test_evaluation_draws_nothing_at_random(trained):
    trainer, _, metrics = trained
    trainer.args.per_device_eval_batch_size = 5
    again = trainer.evaluate()
    names = [name for name in metrics if name.startswith(("eval_reconstruction", "eval_word"))]
    assert len(names) == 8
    assert [again[name] for name in names] == pytest.approx([metrics[name] for name in names], rel=1e-5)


@pytest.mark.parametrize("momentum", [0.8, None])
def test_it_learns_what_is_there_to_learn(tmp_path, monkeypatch, momentum):
    """A market of trends. A new extractor is no better than naive ones, and none names the words of other windows."""
    write_table(make_market(tickers=4, days=1500, momentum=momentum or 0.8), tmp_path / "market.parquet")
    if momentum is None:
        cut, generator = ReturnsWindows.cut, np.random.default_rng(0)

        def shuffled(self, *place):
            return cut(self, *place) | {"returns": generator.normal(size=place[2] - place[1])}

        monkeypatch.setattr(ReturnsWindows, "cut", shuffled)
    options = ("--max_steps", "200", "--learning_rate", "2e-3")
    trainer, _, _ = prepare(parse_t2t(t2t_run(tmp_path, tmp_path / "market.parquet", *options)))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    print(before, after)
    assert before["eval_reconstruction_skill"] < 0 < after["eval_reconstruction_skill"]
