"""The pipeline: what the network says in dates and prices, whatever else is forecast beside it, for any stranger."""

import json
import random
import subprocess
import sys

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_market
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm, rankdata
from scipy.stats.mstats import mquantiles
from transformers import pipeline

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.prices import write_table
from spaceexploreai.data.windows import DateRange
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import (
    SpaceExploreForCausalLM,
    SpaceExploreForClassification,
    SpaceExploreForRegression,
    SpaceExploreForTimeToText,
    SpaceExploreModel,
)
from spaceexploreai.paths_spaceexplore import brownian_paths, interpolate_horizons, interpolate_levels, value_at_scores
from spaceexploreai.pipeline_spaceexplore import TASK, Forecast, SpaceExplorePipeline, add_pipeline
from spaceexploreai.scripts.forecasters import forecast_between, load_checkpoint, load_forecaster

LEVELS = [round(0.05 * step, 2) for step in range(1, 20)]
QUANTILES = [f"q{level:g}" for level in LEVELS]
HORIZONS = [1, 2, 5, 10]
HEADS = ("regression", "classification", "language")


@pytest.fixture(scope="module")
def folders(checkpoint, classifier, language_model) -> dict:
    return dict(zip(HEADS, (checkpoint, classifier, language_model), strict=True))


@pytest.fixture(scope="module")
def pipes(folders) -> dict[str, SpaceExplorePipeline]:
    return {
        head: pipeline(TASK, model=str(folder), pipeline_class=SpaceExplorePipeline, device="cpu")
        for head, folder in folders.items()
    }


@pytest.fixture(scope="module")
def ragged() -> pd.DataFrame:
    """Three tickers: one that is halted within the newest context, one that is late, and one that ends early."""
    prices = make_market(days=400, seed=1)
    days = prices["date"].unique()
    halted = prices["ticker"].eq("T0") & prices["date"].isin(days[360:363])
    late = prices["ticker"].eq("T1") & (prices["date"] < days[250])
    early = prices["ticker"].eq("T2") & (prices["date"] > days[390])
    return prices[~(halted | late | early)].reset_index(drop=True)


def options_of(head: str) -> dict:
    return {} if head == "classification" else {"num_samples": 6, "seed": 3}


def frames_of(answer) -> list[pd.DataFrame]:
    return list(answer) if isinstance(answer, Forecast) else [answer]


def assert_same(one, other, **tolerance) -> None:
    for ours, theirs in zip(frames_of(one), frames_of(other), strict=True):
        pd.testing.assert_frame_equal(ours, theirs, **tolerance)


# --- what the network says -------------------------------------------------------------------------------------------


def test_a_regression_is_what_the_extractor_decodes(pipes, folders, ragged):
    model, extractor = load_checkpoint(folders["regression"])
    with torch.no_grad():
        expected = extractor.decode(model(**extractor(ragged)), ragged, model.config)
        outputs = model(**extractor(ragged, "2006-05-05"))
    table = pipes["regression"](ragged)
    pd.testing.assert_frame_equal(table, expected, rtol=1e-5)
    assert list(table["horizon"].unique()) == HORIZONS
    past = {"unit": "log_return", "as_of": "2006-05-05"}
    expected = extractor.decode(outputs, ragged, model.config, **past)
    pd.testing.assert_frame_equal(pipes["regression"](ragged, **past), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("head", ["classification", "language"])
def test_other_heads_are_as_they_are_evaluated(pipes, folders, ragged, head):
    """Of a language model the very samples, which evaluation draws in other batches."""
    model, extractor = load_forecaster(folders[head], num_samples=6, seed=3, device="cpu")
    newest = ragged["date"].max()
    expected = forecast_between(model, extractor, extractor.encode(ragged), DateRange(newest, newest), stride=1)
    assert list(expected["ticker"].unique()) == ["T0", "T1"]
    table = pipes[head](ragged, **({"unit": "log_return"} | options_of(head) if head == "language" else {}))
    table = frames_of(table)[0]
    table = table[table["ticker"] != "T2"].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, expected[table.columns], rtol=1e-4, atol=1e-6)


def test_days_and_closes_are_those_that_follow_the_newest_bar(pipes, ragged):
    sessions = exchange_calendars.get_calendar("XNYS", start="2005-01-01", end="2008-12-31").sessions
    for head in ("regression", "language"):
        table, paths = pipes[head](ragged, num_samples=3, prediction_length=7)
        for ticker, bars in ragged.groupby("ticker"):
            newest = bars["date"].iloc[-1]
            expected = sessions[sessions > newest][:7]
            own = table[table["ticker"] == ticker]
            assert (own["cutoff"] == newest).all()
            assert (own["date"].to_numpy() == expected.to_numpy("datetime64[ns]")).all()
            own = paths[paths["ticker"] == ticker]
            assert (own["date"].to_numpy().reshape(3, 7) == expected.to_numpy("datetime64[ns]")).all()
            assert own["sample"].to_numpy().reshape(3, 7).tolist() == [[0] * 7, [1] * 7, [2] * 7]


# --- what it does not depend on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_neither_the_batch_nor_other_tickers_change_a_forecast(pipes, ragged, head):
    every = pipes[head](ragged, **options_of(head))
    for batch_size in (2, 3):
        assert_same(pipes[head](ragged, batch_size=batch_size, **options_of(head)), every, rtol=1e-5)
    for ticker, bars in ragged.groupby("ticker"):
        for alone, frame in zip(frames_of(pipes[head](bars, **options_of(head))), frames_of(every), strict=True):
            own = frame[frame["ticker"] == ticker].reset_index(drop=True)
            pd.testing.assert_frame_equal(alone, own, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_no_later_bar_changes_a_forecast(pipes, ragged, head, data):
    day = data.draw(st.sampled_from(ragged["date"].unique()[-60:-10].tolist()))
    factor = data.draw(st.sampled_from([0.2, 0.9, 3.0]))
    changed, later = ragged.copy(), ragged["date"] > pd.Timestamp(day)
    changed.loc[later, ["open", "high", "low", "close"]] *= factor
    expected = pipes[head](ragged[~later], **options_of(head))
    assert_same(pipes[head](changed, as_of=pd.Timestamp(day), **options_of(head)), expected, rtol=1e-6)


def test_the_generators_of_the_process_are_left_as_they_are(pipes, ragged):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    for head in HEADS:
        pipes[head](ragged, batch_size=2, **options_of(head))
    assert states() == before


@pytest.mark.parametrize("head", ["regression", "language"])
def test_the_seed_decides_the_paths_and_of_a_regression_nothing_else(pipes, ragged, head):
    one, again, other = (pipes[head](ragged, num_samples=4, seed=seed) for seed in (0, 0, 1))
    default = pipes[head](ragged, num_samples=4)
    assert_same(one, again)
    assert_same(one, default)
    assert (one.paths["close"] != other.paths["close"]).mean() > 0.9
    assert one.table.equals(other.table) == (head == "regression")
    sample = one.paths.pivot(index=["ticker", "date"], columns="sample", values="close")
    assert (sample[0] != sample[1]).mean() > 0.9
    shorter = pipes[head](ragged, num_samples=4, prediction_length=3).paths
    longer = one.paths.groupby(["ticker", "sample"], sort=False).head(3).reset_index(drop=True)
    pd.testing.assert_frame_equal(shorter, longer, rtol=1e-6)


# --- days between the horizons ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    horizons=st.lists(st.integers(1, 30), min_size=1, max_size=5, unique=True).map(sorted),
    drift=st.floats(-0.01, 0.01),
    seed=st.integers(0, 999),
)
def test_a_random_walk_is_interpolated_to_itself(horizons, drift, seed):
    """Closed forms: a mean of drift a day, quantiles that spread with the root of time."""
    days = list(range(1, horizons[-1] + 1))
    scores = np.sort(np.random.default_rng(seed).normal(size=(2, 5)), axis=1)
    mean = drift * np.array([horizons, horizons], dtype=float)
    quantiles = scores[:, None] * np.sqrt(horizons)[:, None]
    found, spread = interpolate_horizons(mean, quantiles, horizons, days)
    np.testing.assert_allclose(found, drift * np.array([days, days]), atol=1e-12)
    np.testing.assert_allclose(spread, scores[:, None] * np.sqrt(days)[:, None], atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999))
def test_between_two_horizons_it_is_linear_in_units_of_the_root_and_never_crosses(seed):
    quantiles = np.random.default_rng(seed).normal(size=(1, 2, 7)).cumsum(axis=2).clip(-9, 9)
    quantiles.sort(axis=2)
    _, found = interpolate_horizons(np.zeros((1, 2)), quantiles, [2, 6], [1, 2, 3, 5, 6])
    unit = found[0] / np.sqrt([1, 2, 3, 5, 6])[:, None]
    two, six = quantiles[0] / np.sqrt([2, 6])[:, None]
    expected = [two, two, 0.75 * two + 0.25 * six, 0.25 * two + 0.75 * six, six]
    np.testing.assert_allclose(unit, expected, atol=1e-12)
    assert (np.diff(found, axis=2) >= -1e-12).all()


def test_every_day_is_forecast_and_the_horizons_as_without(pipes, ragged):
    for head in ("regression", "language"):
        table, every = pipes[head](ragged), pipes[head](ragged, prediction_length=10)
        assert every["horizon"].tolist() == list(range(1, 11)) * 3
        assert (np.diff(every[QUANTILES], axis=1) >= 0).all()
        assert every["p_up"].between(0.05, 0.95).all()
        same = every[every["horizon"].isin(HORIZONS)].reset_index(drop=True)
        pd.testing.assert_frame_equal(same, table, rtol=1e-6)
        assert pipes[head](ragged, prediction_length=4)["horizon"].tolist() == [1, 2, 3, 4] * 3


# --- levels ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=6, unique=True).map(sorted))
def test_of_a_uniform_law_every_level_is_known(wanted):
    quantiles = 3 * np.array([[LEVELS, LEVELS]]) - 1
    found = interpolate_levels(quantiles, LEVELS, wanted)
    np.testing.assert_allclose(found, np.broadcast_to(3 * np.array(wanted) - 1, found.shape), atol=1e-12)


def test_levels_take_the_place_of_the_models_own(pipes, ragged):
    for head in ("regression", "language"):
        table = pipes[head](ragged)
        other = pipes[head](ragged, quantile_levels=[0.05, 0.125, 0.5, 0.95])
        columns = ["ticker", "cutoff", "date", "horizon", "mean", "q0.05", "q0.125", "q0.5", "q0.95", "p_up"]
        assert other.columns.tolist() == columns
        columns.remove("q0.125")
        pd.testing.assert_frame_equal(other[columns], table[columns], rtol=1e-9)
        assert (other["q0.125"].between(table["q0.1"], table["q0.15"])).all()


# --- paths -----------------------------------------------------------------------------------------------------------


def test_paths_of_a_regression_have_the_forecast_distribution_of_each_day(pipes, ragged):
    count = 3000
    table, paths = pipes["regression"](ragged, prediction_length=10, num_samples=count, seed=5)
    closes = paths["close"].to_numpy().reshape(-1, count, 10)
    assert np.isfinite(closes).all()
    assert (closes > 0).all()
    below = (closes[..., None] <= table[QUANTILES].to_numpy().reshape(-1, 1, 10, 19)).sum(axis=1)
    chances = binom.cdf(below, count, LEVELS)
    assert ((chances > 1e-5) & (chances < 1 - 1e-5)).all()


def test_ranks_of_paths_are_those_of_a_brownian_motion(pipes, ragged):
    paths = pipes["regression"](ragged[ragged["ticker"] == "T1"], num_samples=4000).paths
    ranks = rankdata(paths["close"].to_numpy().reshape(4000, 10), axis=0) / 4001
    days = np.arange(1, 11)
    expected = np.sqrt(np.minimum.outer(days, days) / np.maximum.outer(days, days))
    np.testing.assert_allclose(np.corrcoef(norm.ppf(ranks).T), expected, atol=0.04)


@settings(max_examples=25, deadline=None)
@given(st.floats(-0.02, 0.02), st.floats(0.001, 0.1), st.lists(st.floats(-6, 6), min_size=1, max_size=9))
def test_the_tails_are_those_of_a_normal_law(mean, deviation, scores):
    """Of a normal law, all that lies beyond its outermost quantiles is known."""
    levels = np.array(LEVELS)
    scores, bound = np.array(scores), norm.ppf(0.95)
    found = value_at_scores(mean + deviation * norm.ppf(levels), LEVELS, scores)
    beyond = np.abs(scores) > bound
    np.testing.assert_allclose(found[beyond], mean + deviation * scores[beyond], atol=1e-12)
    np.testing.assert_allclose(found, mean + deviation * scores, atol=0.025 * deviation)


@pytest.mark.parametrize("head", ["regression", "language"])
def test_one_path_is_a_path(pipes, ragged, head):
    paths = pipes[head](ragged, num_samples=1).paths
    assert paths.columns.tolist() == ["ticker", "sample", "date", "close"]
    assert (paths["close"] > 0).all()
    assert len(paths) == 30


def test_a_single_level_has_no_spread():
    shocks = np.random.default_rng(0).normal(size=(1, 5, 2))
    paths = brownian_paths(np.array([[[0.1], [0.2]]]), [0.5], shocks)
    np.testing.assert_allclose(paths, np.broadcast_to([0.1, 0.2], (1, 5, 2)))


def test_the_table_of_a_language_model_is_of_its_paths(pipes, ragged):
    table, paths = pipes["language"](ragged, num_samples=30, unit="log_return", quantile_levels=[1 / 31, 0.4, 30 / 31])
    newest = ragged.groupby("ticker")["close"].last()
    scale = SpaceExploreFeatureExtractor.from_pretrained(pipes["language"].model.name_or_path)(ragged)["scale"][:, -1]
    for row, (ticker, own) in enumerate(paths.groupby("ticker")):
        closes = own["close"].to_numpy().reshape(30, 10)
        assert (closes > 0).all()
        returns = np.log(closes / newest[ticker])
        for _, forecast in table[table["ticker"] == ticker].iterrows():
            reached = returns[:, forecast["horizon"] - 1]
            assert forecast["mean"] == pytest.approx(reached.mean())
            expected = mquantiles(reached, [1 / 31, 0.4, 30 / 31], alphap=0, betap=0)
            np.testing.assert_allclose(forecast[["q0.0322581", "q0.4", "q0.967742"]].astype(float), expected)
        daily = np.diff(returns, axis=1, prepend=0) / scale[row].item()
        centers = np.array(pipes["language"].tokenizer.centers)
        assert np.abs(daily[..., None] - centers).min(axis=2).max() < 1e-6


# --- what it takes ---------------------------------------------------------------------------------------------------


def test_one_series_needs_no_ticker_and_many_tables_are_many_forecasts(pipes, ragged):
    bars = ragged[ragged["ticker"] == "T1"]
    with_name = pipes["regression"](bars.assign(ticker="series"), num_samples=2)
    assert_same(pipes["regression"](bars.drop(columns="ticker"), num_samples=2), with_name)
    for head in HEADS:
        several = pipes[head]([bars, ragged], batch_size=3, **options_of(head))
        assert len(several) == 2
        for one, expected in zip(several, (bars, ragged), strict=True):
            assert_same(one, pipes[head](expected, **options_of(head)), rtol=1e-5)


def test_what_a_call_takes_may_be_settled_before(pipes, folders, ragged):
    options = {"num_samples": 3, "seed": 4, "prediction_length": 3, "unit": "log_return", "batch_size": 2}
    settled = pipeline(TASK, model=str(folders["regression"]), pipeline_class=SpaceExplorePipeline, **options)
    assert_same(settled(ragged), pipes["regression"](ragged, **options), rtol=1e-6)
    assert settled(ragged, prediction_length=2).table["horizon"].tolist() == [1, 2] * 3


def test_a_model_in_training_is_put_to_rest(pipes, ragged, folders):
    model, extractor = load_checkpoint(folders["regression"])
    pipe = SpaceExplorePipeline(model=model.train(), feature_extractor=extractor, device="cpu")
    pd.testing.assert_frame_equal(pipe(ragged), pipes["regression"](ragged), rtol=1e-6)


REFUSED = [
    (
        {"prediction_length": 11},
        "prediction_length must be an integer, from 1 to 10, the model's last horizon, got 11",
    ),
    ({"prediction_length": 0}, "got 0"),
    ({"prediction_length": 2.5}, "got 2.5"),
    ({"num_samples": 0}, "num_samples must be an integer, at least 1, got 0"),
    ({"num_samples": 3, "seed": -1}, "seed must be an integer, at least 0, got -1"),
    ({"quantile_levels": [0.01, 0.5]}, "quantile level 0.01 is not within 0.05 and 0.95"),
    ({"quantile_levels": [0.5, 0.99]}, "quantile level 0.99 is not within 0.05 and 0.95"),
    ({"quantile_levels": [0.5, 0.5]}, "increasing"),
    ({"quantile_levels": [0.5, 0.50000001]}, "differ in the columns' names, q0.5, q0.5"),
    ({"quantile_levels": []}, "increasing"),
    ({"quantile_levels": 0.5}, "got 0.5"),
    ({"unit": "euro"}, "unit must be one of price, log_return, got 'euro'"),
    ({"as_of": "someday"}, "'someday' is not a date"),
    ({"as_of": "2005-03-01"}, "T0 has 40 bars up to 2005-03-01; a forecast needs 84"),
]


@pytest.mark.parametrize(("options", "complaint"), REFUSED)
def test_what_cannot_be_forecast_is_refused(pipes, ragged, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        pipes["regression"](ragged, **options)


def test_bars_that_cannot_be_are_refused(pipes, ragged):
    pipe = pipes["regression"]
    with pytest.raises(ValueError, match="comes after a later date"):
        pipe(ragged.iloc[::-1])
    with pytest.raises(ValueError, match="is not a finite number"):
        pipe(ragged.assign(close=ragged["close"].where(ragged.index != 7)))
    with pytest.raises(ValueError, match="has no column 'volume'"):
        pipe(ragged.drop(columns="volume"))
    with pytest.raises(ValueError, match="T2 has 50 bars; a forecast needs 84"):
        pipe(ragged[(ragged["ticker"] != "T2") | (ragged["date"] > ragged["date"].unique()[340])])
    with pytest.raises(ValueError, match="must be a DataFrame of daily bars or a list of them, got str"):
        pipe("AAPL")
    with pytest.raises(ValueError, match="the list is empty"):
        pipe([])


def test_levels_beyond_the_samples_are_refused(pipes, ragged):
    with pytest.raises(ValueError, match=r"0\.05 is not within 0\.1 and 0\.9"):
        pipes["language"](ragged, num_samples=9, quantile_levels=[0.05, 0.5])


@pytest.mark.parametrize("option", [{"num_samples": 5}, {"prediction_length": 5}, {"unit": "price"}])
def test_a_classification_has_neither_prices_nor_paths(pipes, ragged, option):
    with pytest.raises(ValueError, match=f"a classification forecasts no returns and takes no {next(iter(option))}"):
        pipes["classification"](ragged, **option)


# --- a checkpoint ----------------------------------------------------------------------------------------------------

TINY = {"num_features": 3, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
TINY |= {"intermediate_size": 16, "moe_intermediate_size": 16, "kv_lora_rank": 8, "t2t_num_hidden_layers": 1}
AUTO = {
    SpaceExploreForRegression: "AutoModelForTimeSeriesPrediction",
    SpaceExploreForClassification: "AutoModelForSequenceClassification",
    SpaceExploreForCausalLM: "AutoModelForCausalLM",
}


def test_a_checkpoint_names_its_own_head_whatever_it_was_trained_from(tmp_path):
    config = SpaceExploreConfig(**TINY)
    for head, auto in AUTO.items():
        model = head(config)  # of one configuration, which the one before has written to
        add_pipeline(model, tmp_path)
        model.save_pretrained(tmp_path)
        (info,) = json.loads((tmp_path / "config.json").read_text())["custom_pipelines"].values()
        assert info == {"impl": "pipeline_spaceexplore.SpaceExplorePipeline", "pt": [auto]}
    for head in (SpaceExploreForTimeToText, SpaceExploreModel):
        folder = tmp_path / head.__name__
        model = head(config)
        model.config.custom_pipelines = {TASK: {}}
        folder.mkdir()
        add_pipeline(model, folder)
        model.save_pretrained(folder)
        assert "custom_pipelines" not in json.loads((folder / "config.json").read_text())
        assert not (folder / "pipeline_spaceexplore.py").exists()


def test_what_forecasts_no_prices_is_refused(folders, language_model):
    extractor = SpaceExploreFeatureExtractor.from_pretrained(language_model)
    with pytest.raises(ValueError, match="SpaceExploreModel forecasts no prices"):
        SpaceExplorePipeline(model=SpaceExploreModel(SpaceExploreConfig(**TINY)), feature_extractor=extractor)
    wrong = SpaceExploreForClassification.from_pretrained(folders["regression"])
    with pytest.raises(ValueError, match="holds SpaceExploreForRegression, and was loaded as SpaceExploreForClassif"):
        SpaceExplorePipeline(model=wrong, feature_extractor=extractor)
    with pytest.raises(ValueError, match="holds a language model and no tokenizer"):
        SpaceExplorePipeline(
            model=SpaceExploreForCausalLM.from_pretrained(language_model), feature_extractor=extractor
        )


STRANGER = """
import json, sys
sys.modules["spaceexploreai"] = None  # any import of it raises ImportError
import pandas as pd
from huggingface_hub import HfApi
from transformers import pipeline

prices, output, heads = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
prices = pd.read_parquet(prices)
task = "time-series-forecasting"

def write(pipe, name, options):
    answer = pipe(prices, batch_size=2, **options)
    for which, frame in enumerate([answer] if isinstance(answer, pd.DataFrame) else answer):
        frame.to_parquet(f"{output}/{name}-{which}.parquet")

for head, (folder, options) in heads.items():
    name = f"NEOAI/{head}"
    HfApi().create_repo(name)
    commit = HfApi().upload_folder(folder_path=folder, repo_id=name).oid
    pipe = pipeline(model=name, revision=commit, trust_remote_code=True)  # which says itself what it is for
    write(pipe, f"{head}-hub", options)
    pipe.save_pretrained(f"{output}/{head}-again")
    write(pipeline(task, model=f"{output}/{head}-again", trust_remote_code=True), f"{head}-saved", options)
pipe.push_to_hub("NEOAI/pushed")
write(pipeline(task, model="NEOAI/pushed", trust_remote_code=True), f"{head}-pushed", options)
"""


def test_a_stranger_gets_the_same_forecasts_from_folders_and_from_the_hub(pipes, folders, ragged, tmp_path):
    server = HubServer()
    try:
        write_table(ragged, tmp_path / "ragged.parquet")
        heads = {head: (str(folder), options_of(head)) for head, folder in folders.items()}
        arguments = [str(tmp_path / "ragged.parquet"), str(tmp_path), json.dumps(heads)]
        environment = server.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", STRANGER, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    for head in HEADS:
        ways = ["hub", "saved", *(["pushed"] if head == HEADS[-1] else [])]
        for way in ways:
            for which, expected in enumerate(frames_of(pipes[head](ragged, **options_of(head)))):
                loaded = pd.read_parquet(tmp_path / f"{head}-{way}-{which}.parquet")
                pd.testing.assert_frame_equal(loaded, expected, rtol=1e-5)
