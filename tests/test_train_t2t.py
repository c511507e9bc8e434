"""Training of the time-to-text extractor: what it reads, learns and leaves behind, and what it teaches."""

import json
from pathlib import Path

import numpy as np
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
    assert metrics["eval_word_base_rate"] == pytest.approx(
        np.unique(labels, return_counts=True)[1].max() / len(labels)
    )


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


def metrics_before_and_after(folder: Path) -> tuple[dict, dict]:
    """Of training on oscillators in a market of trends, which reach from what is visible into what is hidden."""
    write_table(make_market(tickers=4, days=1500, momentum=0.8), folder / "market.parquet")
    options = ("--feature_groups", "momentum", "--max_steps", "120", "--learning_rate", "4e-3")
    trainer, _, _ = prepare(parse_t2t(t2t_run(folder, folder / "market.parquet", *options)))
    before = trainer.evaluate()
    trainer.train()
    return before, trainer.evaluate()


def test_it_reconstructs_and_names_better_than_naive_guesses(tmp_path):
    before, after = metrics_before_and_after(tmp_path)
    assert before["eval_reconstruction_skill"] < 0 < 0.1 < after["eval_reconstruction_skill"]
    assert before["eval_word_log_loss_skill"] < 0 < 0.5 < after["eval_word_log_loss_skill"]
    assert after["eval_word_accuracy"] > after["eval_word_base_rate"] + 0.2


def test_words_of_other_charts_teach_nothing(tmp_path, monkeypatch):
    """Where returns say nothing of the values, any skill would be one of the measurement."""
    cut, generator = ReturnsWindows.cut, np.random.default_rng(0)

    def cut_elsewhere(self, which, first, stop):
        return cut(self, which, first, stop) | {"returns": generator.normal(size=stop - first)}

    monkeypatch.setattr(ReturnsWindows, "cut", cut_elsewhere)
    _, after = metrics_before_and_after(tmp_path)
    assert abs(after["eval_word_log_loss_skill"]) < 0.05


# --- what it leaves behind ---


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that are not the same bit for bit, of those in both."""
    return {name for name in left.keys() & right.keys() if not torch.equal(left[name], right[name])}


def test_the_backbone_is_as_freshly_initialised_and_all_of_the_extractor_is_trained(extractor):
    weights = weights_of(extractor)
    set_seed(0)
    fresh = SpaceExploreForTimeToText(SpaceExploreForTimeToText.config_class.from_pretrained(extractor)).state_dict()
    assert weights.keys() == fresh.keys()
    learned = {name for name in weights if name.startswith(("model.t2t.", "decoder."))}
    assert differing(weights, fresh) == learned
    assert weights["model.t2t.num_batches_tracked"] == STEPS


def test_nothing_after_the_training_range_reaches_the_weights(tmp_path, market, extractor):
    """Prices of the validation range too are torn apart: weights and statistics stay what they were."""
    prices = read_prices(market)
    later = prices["date"] > chronological_split(prices["date"], horizon=10).train.end
    tear = np.exp(np.random.default_rng(0).normal(size=(later.sum(), 1)))
    prices.loc[later, ["open", "high", "low", "close"]] *= tear
    write_table(prices, tmp_path / "torn.parquet")
    save_checkpoint(train(parse_t2t(t2t_run(tmp_path, tmp_path / "torn.parquet"))), tmp_path / "torn")
    assert differing(weights_of(tmp_path / "torn"), weights_of(extractor)) == set()
    statistics = [(folder / "preprocessor_config.json").read_text() for folder in (tmp_path / "torn", extractor)]
    assert statistics[0] == statistics[1]


def test_resumed_training_ends_where_it_would_have(tmp_path, market):
    """Which patches are hidden is drawn as if nothing had happened."""
    often = ("--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "5", "--save_only_model", "false")
    whole = train(parse_t2t(t2t_run(tmp_path / "whole", market, *often)))
    from_middle = ("--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-4"))
    resumed = train(parse_t2t(t2t_run(tmp_path / "resumed", market, *often, *from_middle)))
    assert differing(resumed.model.state_dict(), whole.model.state_dict()) == set()
    assert differing(weights_of(tmp_path / "whole" / "checkpoint-4"), whole.model.state_dict())


def test_the_checkpoint_is_a_hub_repository_without_pickles(extractor, market):
    files = {path.name for path in extractor.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_spaceexplore.py", "preprocessor_config.json"} <= files
    assert {Path(name).suffix for name in files} <= {".json", ".md", ".png", ".py", ".safetensors"}
    model = AutoModelForPreTraining.from_pretrained(extractor)
    assert type(model).__name__ == "SpaceExploreForTimeToText"
    assert differing(model.state_dict(), weights_of(extractor)) == set()
    split = chronological_split(read_prices(market)["date"], horizon=10)
    config = json.loads((extractor / "config.json").read_text())
    assert config["train_cutoff"] == f"{split.train.end:%Y-%m-%d}"
    assert config["selection_cutoff"] == f"{split.validation.end:%Y-%m-%d}"


def test_words_start_from_a_text_model(tmp_path, market):
    """And then are as far apart as there."""
    set_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "hidden_size": 16}
    text = BertModel(BertConfig(vocab_size=len(WORDS), **sizes))
    text.save_pretrained(tmp_path / "text")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="flat"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "text")
    run = t2t_run(tmp_path / "model", market, "--word_embeddings", str(tmp_path / "text"))
    trainer, _, _ = prepare(parse_t2t(run))
    words, table = (
        one.weight.detach().numpy()
        for one in (trainer.model.model.t2t.word_embeddings, text.embeddings.word_embeddings)
    )
    ratios = pdist(words) / pdist(table)
    assert ratios == pytest.approx(np.full(len(ratios), ratios[0]), rel=1e-4)


# --- what it teaches ---


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("task", ["regression", "classification", "causal_lm"])
def test_a_forecaster_is_taught_and_the_extractor_stays_as_it_was(tmp_path, market, extractor, task):
    trainer, _, _ = prepare(parse_run(taught_run(tmp_path, market, extractor, "--task", task)))
    assert trainer.model.config.t2t_loss_weight == 0.01
    before = state(trainer.model)
    learned = weights_of(extractor)
    assert differing(before, learned) == set()  # from the checkpoint, as far as it goes
    trainer.train()
    save_checkpoint(trainer, tmp_path)
    after = weights_of(tmp_path)
    frozen = {name for name in learned if name.startswith("model.t2t.")}
    assert frozen <= after.keys()
    assert not any(name.startswith("decoder.") for name in after)
    parameters = {name for name, _ in trainer.model.named_parameters()}
    assert differing(before, after) == parameters - frozen


def test_a_taught_head_starts_from_the_marginal_distribution(tmp_path, market, extractor):
    """Without weights in the head it has no skill and loses none."""
    trainer, _, _ = prepare(parse_run(taught_run(tmp_path, market, extractor)))
    with torch.no_grad():
        trainer.model.mean_head.weight.zero_()
        trainer.model.quantile_head.weight.zero_()
    metrics = trainer.evaluate()
    assert [metrics[f"eval_crps_skill_{days}d"] for days in (1, 2, 5, 10)] == pytest.approx([0] * 4, abs=1e-4)


def feature_loss(trainer) -> float:
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(32)])
    with torch.no_grad():
        outputs = trainer.model.train().model(batch["past_values"], batch["attention_mask"])
    return outputs.feature_loss.item()


def test_the_weight_decides_how_much_is_learned_from_the_extractor(tmp_path, market, extractor):
    lost = {}
    for weight in ("0.000001", "1"):
        options = ("--t2t_loss_weight", weight, "--max_steps", "20", "--learning_rate", "1e-2")
        trainer, _, _ = prepare(parse_run(taught_run(tmp_path, market, extractor, *options)))
        start = feature_loss(trainer)
        trainer.train()
        lost[weight] = feature_loss(trainer) / start
    assert lost["1"] < 0.6
    assert lost["1"] < 0.7 * lost["0.000001"]


@pytest.mark.parametrize("taught", [False, True], ids=["extractor", "forecaster"])
def test_every_parameter_that_is_to_be_trained_gets_a_gradient(tmp_path, market, extractor, taught):
    """One that got none would stop distributed training."""
    run = parse_run(taught_run(tmp_path, market, extractor)) if taught else parse_t2t(t2t_run(tmp_path, market))
    trainer, *_ = prepare(run)
    trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader()))).backward()
    assert all((one.grad is not None) == one.requires_grad for one in trainer.model.parameters())
    assert (trainer.model.model.t2t.word_proj.weight.grad is None) == taught


def test_a_taught_forecaster_describes_as_its_teacher(tmp_path, market, extractor):
    sft.main(taught_run(tmp_path, market, extractor))
    prices = read_prices(market)
    said = []
    for head, folder in ((SpaceExploreForTimeToText, extractor), (SpaceExploreForRegression, tmp_path)):
        inputs = SpaceExploreFeatureExtractor.from_pretrained(folder)(prices)
        said.append(head.from_pretrained(folder).describe(inputs["past_values"], inputs["attention_mask"]))
    words = [[[patch["word"] for patch in row] for row in one] for one in said]
    assert words[0] == words[1]
    assert [len(row) for row in words[0]] == [len(starts(64))] * 3


# --- recipes and mistakes ---


def test_the_recipe_is_the_tiny_network_with_an_extractor():
    tiny, with_extractor = (json.loads((RECIPE / name).read_text()) for name in ("config.json", "t2t.json"))
    assert tiny.pop("t2t_num_hidden_layers") == 0
    assert {name: value for name, value in with_extractor.items() if not name.startswith("t2t_")} == tiny
    assert (with_extractor["t2t_patch_length"], with_extractor["t2t_patch_overlap"]) == (LENGTH, OVERLAP)
    SpaceExploreForTimeToText.config_class(**with_extractor)


def test_the_recipes_follow_from_each_other():
    teacher = parse_t2t(["--config", str(RECIPE / "t2t.yaml")])
    pupil = parse_run(["--config", str(RECIPE / "sft_t2t.yaml")])
    assert pupil.model.model_name_or_path == teacher.training.output_dir != pupil.training.output_dir
    assert pupil.model.t2t_loss_weight == 0.01  # of LLM-PS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model_config", str(RECIPE / "config.json")), "there is no time-to-text extractor to train"),
        (("--context_length", "12", "--stride", "8"), "12 days, the longest window of train, leave nothing to hide"),
        (("--validation_fraction", "0.055"), "12 days, the longest window of validation, leave nothing to hide"),
        (("--t2t_loss_weight", "0.01"), "needs a trained time-to-text extractor"),
        (("--word_embeddings", "no/such/model"), "no/such/model"),
        (("--task", "regression"), "--task"),
        (("--balance", "sector"), "got 'sector'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, market, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        t2t.main(t2t_run(tmp_path / "model", market, *options))
    assert_refused(stop.value.code, capsys.readouterr().err, message, tmp_path / "model")


def assert_refused(code: int, errors: str, message: str, folder: Path) -> None:
    """Other lines are what was read, and the library's progress."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in errors
    assert not folder.exists()


def test_words_are_not_taken_from_two_places(tmp_path, market, extractor, capsys):
    run = t2t_run(tmp_path / "model", market, "--model_name_or_path", str(extractor), "--word_embeddings", "text")
    del run[run.index("--model_config") : run.index("--model_config") + 2]
    recipe = (RECIPE / "t2t.yaml").read_text().replace("model_config: recipes/tiny/t2t.json\n", "")
    (tmp_path / "continue.yaml").write_text(recipe)
    run[run.index("--config") + 1] = str(tmp_path / "continue.yaml")
    with pytest.raises(SystemExit) as stop:
        t2t.main(run)
    assert_refused(stop.value.code, capsys.readouterr().err, "has words of its own", tmp_path / "model")


@pytest.mark.parametrize("trained_before", [False, True], ids=["untrained", "none"])
def test_only_a_trained_extractor_teaches(tmp_path, market, checkpoint, capsys, trained_before):
    """Neither a new one nor the one that the checkpoint of the tiny recipe does not have."""
    untrained = tmp_path / "untrained"
    save_checkpoint(prepare(parse_t2t(t2t_run(untrained, market)))[0], untrained)
    with pytest.raises(SystemExit) as stop:
        sft.main(taught_run(tmp_path / "model", market, checkpoint if trained_before else untrained))
    message = "compares the features" if trained_before else "needs a trained time-to-text extractor"
    assert_refused(stop.value.code, capsys.readouterr().err, message, tmp_path / "model")
