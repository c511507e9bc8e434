"""Supervised training: reproducible, leak-free, and what it saves is what it trained."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import RECIPE, make_market, tiny_run
from safetensors.torch import load_file
from scipy.stats import spearmanr

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data import stocks
from spaceexploreai.data.prices import read_prices, write_table
from spaceexploreai.data.stocks import build_stocks
from spaceexploreai.data.windows import chronological_split, make_labels
from spaceexploreai.evaluation.scores import score
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.indicators_spaceexplore import select_features
from spaceexploreai.pipeline_spaceexplore import SpaceExplorePipeline
from spaceexploreai.scripts import build_dataset
from spaceexploreai.scripts.evaluate import forecast_range, scored_range
from spaceexploreai.scripts.forecast import forecast_newest
from spaceexploreai.scripts.forecasters import load_checkpoint, load_pipeline
from spaceexploreai.train.arguments import parse_run
from spaceexploreai.train.sft import main, record_cutoffs, save_checkpoint, train


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_same_seed_gives_the_same_losses_and_weights(tmp_path, market):
    run = tiny_run(tmp_path, "--prices", str(market), "--logging_strategy", "steps", "--logging_steps", "1")
    first, second, other = (train(parse_run([*run, "--seed", seed])) for seed in ("7", "7", "8"))
    assert losses(first) == losses(second) != losses(other)
    for left, right in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_checkpoint_is_a_hub_repository_without_pickles(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        "config.json",
        "configuration_spaceexplore.py",
        "feature_extraction_spaceexplore.py",
        "front_end_spaceexplore.py",
        "indicators_bars_spaceexplore.py",
        "indicators_base_spaceexplore.py",
        "indicators_spaceexplore.py",
        "model.safetensors",
        "modeling_spaceexplore.py",
        "paths_spaceexplore.py",
        "pipeline_spaceexplore.py",
        "preprocessor_config.json",
        "t2t_spaceexplore.py",
    }


def test_the_checkpoint_records_which_dates_it_has_seen(checkpoint, market):
    split = chronological_split(read_prices(market)["date"], horizon=10)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["train_cutoff"] == f"{split.train.end:%Y-%m-%d}"
    assert config["selection_cutoff"] == f"{split.validation.end:%Y-%m-%d}"


def test_a_saved_and_reloaded_model_forecasts_identically(tmp_path, market):
    trainer = train(parse_run(tiny_run(tmp_path, "--prices", str(market))))
    save_checkpoint(trainer, tmp_path)
    prices = read_prices(market)
    trained = SpaceExplorePipeline(model=trainer.model, feature_extractor=trainer.processing_class, device="cpu")
    before, after = (forecast_newest(pipe, prices).table for pipe in (trained, load_pipeline(tmp_path, "cpu")))
    # Matrix products round by where in memory the weights lie.
    pd.testing.assert_frame_equal(before, after, rtol=1e-5, atol=1e-8)


def test_nothing_after_the_validation_range_reaches_the_weights(tmp_path, market, checkpoint):
    """Prices of the test range are torn apart: weights and statistics stay what they were."""
    prices = read_prices(market)
    later = prices["date"] > chronological_split(prices["date"], horizon=10).validation.end
    prices.loc[later, ["open", "high", "low", "close"]] *= np.exp(
        np.random.default_rng(0).normal(size=(later.sum(), 1))
    )
    write_table(prices, tmp_path / "torn.parquet")
    trainer = train(parse_run(tiny_run(tmp_path, "--prices", str(tmp_path / "torn.parquet"))))
    save_checkpoint(trainer, tmp_path / "torn")
    torn, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "torn", checkpoint))
    for name in whole:
        torch.testing.assert_close(
            torn[name], whole[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name} {text}"
        )
    name = "preprocessor_config.json"
    assert (tmp_path / "torn" / name).read_text() == (checkpoint / name).read_text()


def test_statistics_are_those_of_the_training_range_alone(checkpoint, market):
    prices = read_prices(market)
    extractor = SpaceExploreFeatureExtractor.from_pretrained(checkpoint)
    fitted = (extractor.center, extractor.spread, extractor.fitted_until)
    train_end = chronological_split(prices["date"], horizon=10).train.end
    extractor.fit(extractor.compute_features(prices[prices["date"] <= train_end]))
    assert fitted == (extractor.center, extractor.spread, extractor.fitted_until)


def test_what_a_checkpoint_has_seen_stays_seen():
    """Going on with older prices must not open newer dates to evaluation."""
    old = chronological_split(make_market(tickers=1, days=300)["date"], horizon=10)
    config = SpaceExploreConfig(train_cutoff="2019-01-02", selection_cutoff="2005-01-03")
    record_cutoffs(config, old, None)
    assert config.train_cutoff == "2019-01-02"
    assert config.selection_cutoff == f"{old.validation.end:%Y-%m-%d}"


def test_dates_that_the_statistics_are_of_are_seen(tmp_path, checkpoint, market):
    """Those of a checkpoint that was trained on newer prices than those that are trained on."""
    newest = SpaceExploreConfig.from_pretrained(checkpoint).train_cutoff
    assert SpaceExploreFeatureExtractor.from_pretrained(checkpoint).fitted_until == newest
    prices = read_prices(market)
    prices[prices["date"] < newest].to_parquet(tmp_path / "old.parquet")
    data = build_stocks(prices=str(tmp_path / "old.parquet"), extractor=str(checkpoint))
    config = SpaceExploreConfig()
    record_cutoffs(config, data.split, data.extractor.fitted_until)
    assert f"{data.split.train.end:%Y-%m-%d}" < config.train_cutoff == newest


def test_training_continues_from_a_checkpoint_with_its_own_statistics(tmp_path, checkpoint, market):
    run = continued(tmp_path, checkpoint, market, "--tickers", "T1")
    trainer = train(parse_run(run))
    assert trainer.model.config.train_cutoff == load_checkpoint(checkpoint)[0].config.train_cutoff
    original = SpaceExploreFeatureExtractor.from_pretrained(checkpoint)
    assert trainer.processing_class.center == original.center
    assert trainer.state.global_step == 4


def continued(folder: Path, checkpoint: Path, market: Path, *options: str) -> list[str]:
    """The tiny run, from a checkpoint."""
    run = tiny_run(folder, "--model_name_or_path", str(checkpoint), "--prices", str(market), *options)
    (folder / "continue.yaml").write_text(
        (RECIPE / "sft.yaml").read_text().replace("model_config: recipes/tiny/config.json\n", "")
    )
    run[run.index("--config") + 1] = str(folder / "continue.yaml")
    del run[run.index("--model_config") : run.index("--model_config") + 2]
    return run


def test_other_horizons_than_a_head_has_are_refused(tmp_path, checkpoint, market, capsys):
    with pytest.raises(SystemExit):
        main(continued(tmp_path, checkpoint, market, "--horizons", "1", "5"))
    assert "horizons [1, 5] are 2, " in capsys.readouterr().err.splitlines()[-1]


def test_a_language_model_with_bins_of_its_own_is_not_taught_others(tmp_path, language_model, market, capsys):
    shutil.copytree(language_model, tmp_path / "own")
    path = tmp_path / "own" / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    fields["edges"][3] *= 0.99
    path.write_text(json.dumps(fields))
    with pytest.raises(SystemExit):
        main(continued(tmp_path, tmp_path / "own", market, "--task", "causal_lm"))
    assert f"bins of {tmp_path / 'own'} have other edges" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, market) -> Path:
    """The folder of a built dataset."""
    folder = tmp_path_factory.mktemp("dataset") / "stocks"
    build_dataset.main(["--config", "sft", "--prices", str(market), "--output-dir", str(folder)])
    return folder


def test_a_built_dataset_trains_as_the_prices_do(tmp_path, market, dataset):
    run = tiny_run(tmp_path, "--logging_strategy", "steps", "--logging_steps", "1")
    first, second = (
        train(parse_run([*run, *source])) for source in (["--prices", str(market)], ["--dataset", str(dataset)])
    )
    assert losses(first) == losses(second)
    assert first.model.config.to_dict() == second.model.config.to_dict()
    assert first.processing_class.to_dict() == second.processing_class.to_dict()


def test_groups_of_features_are_what_the_network_takes(tmp_path, market):
    (tmp_path / "config.json").write_text((RECIPE / "config.json").read_text())
    options = ("--feature_groups", "price,volume", "--prices", str(market))
    trainer = train(parse_run(tiny_run(tmp_path, *options, "--model_config", str(tmp_path / "config.json"))))
    assert trainer.processing_class.feature_names == select_features(["price", "volume"])
    assert trainer.model.config.num_features == len(select_features(["price", "volume"])) != 64


def test_a_planted_signal_is_found_out_of_sample(tmp_path):
    """Returns with autocorrelation 0.6: 36 % of the next day's variance can be known."""
    prices = make_market(tickers=4, days=1500, momentum=0.6)
    write_table(prices, tmp_path / "market.parquet")
    fields = {"quantile_form": "free", "mean_loss_weight": 1.0, "input_noise": 0.0}  # as for what has a direction
    (tmp_path / "config.json").write_text(json.dumps(json.loads((RECIPE / "config.json").read_text()) | fields))
    options = ("--prices", str(tmp_path / "market.parquet"), "--max_steps", "60", "--learning_rate", "2e-3")
    network = ("--model_config", str(tmp_path / "config.json"))
    trainer = train(parse_run([*tiny_run(tmp_path, *options), *network]))
    model, extractor = trainer.model.eval(), trainer.processing_class
    forecasts = forecast_range(model, extractor, prices, scored_range(model.config, prices, None, None))
    scores = score(forecasts).set_index(["horizon", "metric"])
    assert scores.loc[(1, "mse"), "model"] < 0.8 * scores.loc[(1, "mse"), "zero"]
    assert scores.loc[(1, "direction_accuracy"), "model"] > 0.62
    assert scores.loc[(1, "crps_skill"), "model"] > 0.1


def information_coefficients(prices: pd.DataFrame, folder: Path) -> np.ndarray:
    """Spearman correlations over the tickers of next-day means and outcomes, one for each day of the test range."""
    write_table(prices, folder / "market.parquet")
    options = ("--prices", str(folder / "market.parquet"), "--max_steps", "60", "--learning_rate", "2e-3")
    trainer = train(parse_run(tiny_run(folder, *options)))
    model, extractor = trainer.model.eval(), trainer.processing_class
    forecasts = forecast_range(model, extractor, prices, scored_range(model.config, prices, None, None))
    days = forecasts[forecasts["horizon"] == 1].dropna(subset=["y"]).groupby("cutoff")
    return np.array([spearmanr(day["mean"], day["y"]).statistic for _, day in days])


@pytest.mark.parametrize("shuffled", [False, True])
def test_shuffled_labels_teach_nothing(tmp_path, monkeypatch, shuffled):
    """The permuted-label null. Any function of an input that knew the outcome would correlate with it, day by day; so
    would one of yesterday's return where there is momentum, hence none in that market."""
    generator = np.random.default_rng(0)

    def shuffle(*args):
        labels = make_labels(*args)
        known = np.flatnonzero((labels != -100).all(axis=1))
        labels[known] = labels[generator.permutation(known)]
        return labels

    if shuffled:
        monkeypatch.setattr(stocks, "make_labels", shuffle)
    found = information_coefficients(make_market(12, days=1000, momentum=0.0 if shuffled else 0.6), tmp_path)
    t = found.mean() / (found.std(ddof=1) / len(found) ** 0.5)
    assert abs(t) < 3 if shuffled else t > 10


@pytest.mark.parametrize(
    "launch",
    [
        ["-m", "spaceexploreai.train.sft"],
        ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml", "train/sft.py"],
    ],
    ids=["python -m", "accelerate launch"],
)
def test_it_launches_as_documented(tmp_path, market, launch):
    command = [sys.executable, *launch, *tiny_run(tmp_path / "model", "--prices", str(market))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=RECIPE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_main_writes_the_checkpoint(tmp_path, market):
    main(tiny_run(tmp_path / "model", "--prices", str(market)))
    assert (tmp_path / "model" / "config.json").exists()
