"""What each head is trained on, where it starts, and how it is judged while it trains."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import RECIPE, make_market, tiny_run
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, mean_pinball_loss

from spaceexploreai.data.prices import read_prices, write_table
from spaceexploreai.data.stocks import PathWindows
from spaceexploreai.data.windows import IGNORE_INDEX
from spaceexploreai.train.arguments import parse_run
from spaceexploreai.train.sft import prepare, save_checkpoint, train

TASKS = ("regression", "classification", "causal_lm")


@pytest.fixture(scope="module")
def wide_market(tmp_path_factory):
    """More tickers than a rank correlation needs, the last of them listed late."""
    prices = make_market(tickers=12, days=400)
    late = (prices["ticker"] == "T11") & (prices["date"] < prices["date"].unique()[330])
    path = tmp_path_factory.mktemp("wide") / "market.parquet"
    write_table(prices[~late], path)
    return path


def run_of(folder, market, task: str, *options: str):
    return parse_run(tiny_run(folder, "--prices", str(market), "--task", task, *options))


# --- paths ---


@pytest.fixture(scope="module")
def paths(tmp_path_factory, wide_market):
    """The trainer of a causal language model and the prices it was made of."""
    prices = read_prices(wide_market)
    halted = (prices["ticker"] == "T3") & prices["date"].isin(prices["date"].unique()[[150, 151, 240]])
    path = tmp_path_factory.mktemp("halted") / "market.parquet"
    write_table(prices[~halted], path)
    trainer, *_ = prepare(run_of(tmp_path_factory.mktemp("paths"), path, "causal_lm", "--path_length", "7"))
    return trainer, read_prices(path)


def test_a_row_says_what_happened_next(paths):
    """Every label, token by token, against the prices."""
    trainer, prices = paths
    tokenizer = trainer.data_collator.collate.tokenizer
    windows = trainer.train_dataset.windows
    close = prices.pivot(index="date", columns="ticker", values="close")
    interrupted = 0
    for index in range(0, len(windows), 7):
        batch = trainer.data_collator.collate([windows[index]])
        which, _, last, supervised = windows.rows[index].tolist()
        history = windows.windows.series[which]
        days = min(7, last + 1 - supervised)
        origin = last + 1 - days
        steps = [step for step in range(max(origin - 63, 0), origin + 1) if history.traded[step]]
        returns = np.log(close[history.ticker]).diff().reindex(history.dates).to_numpy()
        ids, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
        assert (ids[: len(steps)] == tokenizer.ts_token_id).all()
        assert ids[len(steps)] == tokenizer.bos_token_id
        path = []
        for day in range(origin + 1, last + 2):
            if not np.isfinite(returns[day]):
                break
            path.append(tokenizer.encode_returns(returns[[day]], history.scale[origin])[0])
        interrupted += len(path) < days
        assert ids[len(steps) + 1 :].tolist() == path + [tokenizer.pad_token_id] * (
            len(ids) - len(steps) - 1 - len(path)
        )
        expected = np.full(len(ids), int(IGNORE_INDEX))
        for place, step in enumerate(steps[:-1]):
            if step >= supervised and np.isfinite(returns[step + 1]):
                expected[place + 1] = tokenizer.encode_returns(returns[[step + 1]], history.scale[step])[0]
        expected[len(steps) + 1 : len(steps) + 1 + len(path)] = path
        np.testing.assert_array_equal(labels, expected)
    assert interrupted  # by the halts


def test_no_path_of_training_reaches_beyond_its_range(paths):
    trainer, _ = paths
    end = np.datetime64(trainer.model.config.train_cutoff)
    windows = trainer.train_dataset.windows
    for which, _, last, _ in windows.rows.tolist():
        assert windows.windows.series[which].dates[last + 1] <= end


def test_paths_need_the_return_of_one_day(paths):
    windows = paths[0].train_dataset.windows.windows
    with pytest.raises(ValueError, match=r"needs the horizon 1, got \[2, 5\]"):
        PathWindows(windows, [2, 5], 64, 7)


# --- where a head starts, and its metrics against scikit-learn and SciPy ---


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_a_new_head_has_no_skill_and_loses_none(tmp_path, wide_market, task):
    """Without weights in the head it says the marginal distribution of the training targets."""
    trainer, *_ = prepare(run_of(tmp_path, wide_market, task))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name.endswith("weight") and not name.startswith("model."):
                parameter.zero_()
    metrics = trainer.evaluate()
    name = "crps_skill" if task == "regression" else "log_loss_skill"
    assert [metrics[f"eval_{name}_{days}d"] for days in (1, 2, 5, 10)] == pytest.approx([0] * 4, abs=1e-4)


def predictions(trainer):
    """Outputs at all scored steps of the validation windows, one window at a time."""
    rows, model = [], trainer.model.eval()
    windows = trainer.eval_dataset
    for index in range(len(windows)):
        example = windows[index]
        tensors = {
            name: torch.as_tensor(np.asarray(value))[None] for name, value in example.items() if name != "labels"
        }
        with torch.no_grad():
            outputs = model(
                **{name: value.long() if value.dtype == torch.bool else value for name, value in tensors.items()}
            )
        which, first, last, _ = windows.rows[index].tolist()
        dates = windows.series.steps(which, first, last + 1).dates
        for step in np.flatnonzero((example["labels"] != IGNORE_INDEX).any(axis=1)):
            rows.append((dates[step], example["labels"][step], example["scale"][step], outputs, step))
    return rows


def test_metrics_of_the_regression(tmp_path, wide_market):
    trainer = train(run_of(tmp_path, wide_market, "regression"))
    metrics, rows = trainer.evaluate(), predictions(trainer)
    levels = trainer.model.config.quantile_levels
    for column, days in enumerate((1, 2, 5, 10)):
        known = [row for row in rows if row[1][column] != IGNORE_INDEX]
        y = np.array([row[1][column] for row in known], dtype=float)
        mean = np.array([row[3].mean[0, row[4], column].item() for row in known])
        quantiles = np.array([row[3].quantiles[0, row[4], column].numpy() for row in known])
        pinball = np.mean([mean_pinball_loss(y, quantiles[:, q], alpha=level) for q, level in enumerate(levels)])
        assert metrics[f"eval_crps_{days}d"] == pytest.approx(2 * pinball, rel=1e-4)
        assert metrics[f"eval_mae_{days}d"] == pytest.approx(mean_absolute_error(y, mean), rel=1e-4)
        assert metrics[f"eval_direction_{days}d"] == pytest.approx(accuracy_score(y > 0, mean > 0), abs=0.002)
        table = pd.DataFrame({"date": [row[0] for row in known], "y": y, "mean": mean})
        each = [spearmanr(day["y"], day["mean"]).statistic for _, day in table.groupby("date") if len(day) >= 10]
        assert metrics[f"eval_rank_ic_{days}d"] == pytest.approx(np.mean(each), abs=1e-3)


def test_metrics_of_the_classification(tmp_path, wide_market):
    trainer = train(run_of(tmp_path, wide_market, "classification"))
    metrics, rows = trainer.evaluate(), predictions(trainer)
    band = trainer.model.config.flat_band
    for column, days in enumerate((1, 2, 5, 10)):
        known = [row for row in rows if row[1][column] != IGNORE_INDEX]
        moves = np.array([row[1][column] / (row[2] * days**0.5) for row in known])
        true = np.digitize(moves, [-band, band])
        logits = torch.stack([row[3].logits[0, row[4], column] for row in known])
        probabilities = logits.double().softmax(dim=-1).numpy()
        assert metrics[f"eval_log_loss_{days}d"] == pytest.approx(
            log_loss(true, probabilities, labels=[0, 1, 2]), rel=1e-3
        )
        assert metrics[f"eval_accuracy_{days}d"] == pytest.approx(accuracy_score(true, logits.argmax(1)), abs=2e-3)
        assert metrics[f"eval_base_rate_{days}d"] == pytest.approx(np.bincount(true).max() / len(true), abs=2e-3)


def test_the_log_loss_of_the_causal_language_model_is_its_loss(tmp_path, wide_market):
    """The library's loss of the whole validation set, which knows nothing of our metrics."""
    trainer = train(run_of(tmp_path, wide_market, "causal_lm"))
    metrics = trainer.evaluate()
    total = count = 0
    for batch in trainer.get_eval_dataloader():
        items = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        with torch.no_grad():
            total += trainer.model.eval()(**batch).loss.item() * items.item()
        count += items.item()
    assert metrics["eval_log_loss"] == pytest.approx(total / count, rel=1e-4)


# --- a signal to find ---


@pytest.mark.parametrize("momentum", [0.6, 0.0])
@pytest.mark.parametrize(
    ("task", "metric", "enough", "chance"),
    [("classification", "log_loss_skill_1d", 0.02, 0.01), ("causal_lm", "correlation", 0.3, 0.15)],
)
def test_a_planted_signal_is_found_and_none_where_none_is(tmp_path, task, metric, enough, chance, momentum):
    """Returns with autocorrelation 0.6, of which 36 % of the next day's variance can be known, and a random walk."""
    write_table(make_market(tickers=6, days=1200, momentum=momentum), tmp_path / "market.parquet")
    options = ("--max_steps", "80", "--learning_rate", "3e-3")
    found = train(run_of(tmp_path, tmp_path / "market.parquet", task, *options)).evaluate()[f"eval_{metric}"]
    assert found > enough if momentum else found < chance


@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_of_one_head_goes_on_as_another(tmp_path, checkpoint, market, task):
    run = tiny_run(tmp_path / "next", "--model_name_or_path", str(checkpoint), "--prices", str(market), "--task", task)
    del run[run.index("--model_config") : run.index("--model_config") + 2]
    recipe = (RECIPE / "sft.yaml").read_text().replace("model_config: recipes/tiny/config.json\n", "")
    (tmp_path / "continue.yaml").write_text(recipe)
    run[run.index("--config") + 1] = str(tmp_path / "continue.yaml")
    trainer = train(parse_run(run))
    save_checkpoint(trainer, tmp_path / "next")
    files = {path.name for path in (tmp_path / "next").iterdir()}
    assert ("tokenizer_config.json" in files) == (task == "causal_lm")
    again = type(trainer.model).from_pretrained(tmp_path / "next")
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
