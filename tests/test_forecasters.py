"""Any checkpoint makes a forecast table: classes by their probabilities, a language model by its paths."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss

from spaceexploreai.data.prices import read_prices
from spaceexploreai.data.windows import DateRange, forecast_windows
from spaceexploreai.evaluation.leaks import check_leaks
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForClassification
from spaceexploreai.paths_spaceexplore import forecast_of_samples
from spaceexploreai.scripts import evaluate
from spaceexploreai.scripts.evaluate import forecast_range
from spaceexploreai.scripts.forecasters import forecast_between, load_forecaster

PROBABILITIES = ["p_down", "p_flat", "p_up"]
LEVELS = [step / 20 for step in range(1, 20)]
QUANTILES = [f"q{level:g}" for level in LEVELS]


@pytest.fixture(scope="module")
def prices(market) -> pd.DataFrame:
    return read_prices(market)


def last_days(prices: pd.DataFrame, days: int) -> DateRange:
    return DateRange(prices["date"].unique()[-days], prices["date"].max())


def run(checkpoint, market, output, *options: str) -> tuple[pd.DataFrame, dict]:
    evaluate.main(["--model", str(checkpoint), "--prices", str(market), "--output", str(output), *options])
    return pd.read_parquet(output), json.loads(output.with_name("metrics.json").read_text())


# --- classification ---


def test_classes_are_those_of_the_network_on_the_newest_window(classifier, prices):
    model, extractor = load_forecaster(classifier)
    table = forecast_range(model, extractor, prices, last_days(prices, 5), stride=1)
    day = prices["date"].unique()[-3]
    direct = SpaceExploreForClassification.from_pretrained(classifier).eval()
    inputs = SpaceExploreFeatureExtractor.from_pretrained(classifier)(prices, as_of=day)
    with torch.no_grad():
        expected = direct(**inputs).logits[:, -1].softmax(dim=-1)  # (tickers, H, 3)
    found = table[table["cutoff"] == day].set_index(["ticker", "horizon"]).sort_index()
    np.testing.assert_allclose(found[PROBABILITIES], expected.reshape(-1, 3), rtol=1e-4, atol=1e-6)
    move = inputs["scale"][:, -1:].numpy() * np.sqrt(direct.config.horizons)
    np.testing.assert_allclose(found["band"], direct.config.flat_band * move.reshape(-1), rtol=1e-6)


def test_scores_of_classes_are_those_of_scikit_learn(classifier, market, tmp_path, capsys):
    table, metrics = run(classifier, market, tmp_path / "classes.parquet", "--by", "year", "regime")
    known = table[table["y"].notna() & (table["horizon"] == 5)]
    true = np.select([known["y"] < -known["band"], known["y"] > known["band"]], [0, 2], 1)
    assert metrics["5"]["log_loss"]["model"] == pytest.approx(log_loss(true, known[PROBABILITIES]))
    assert metrics["5"]["accuracy"]["model"] == pytest.approx(
        accuracy_score(true, known[PROBABILITIES].to_numpy().argmax(axis=1))
    )
    assert "log-loss skill over ewma" in capsys.readouterr().out
    assert "Experts" in (tmp_path / "report.md").read_text()
    for group, names in {"year": {"2006"}, "regime": {"calm", "normal", "wild"}}.items():
        assert set(json.loads((tmp_path / f"metrics_by_{group}.json").read_text())) == names


# --- several days from one window ---


@pytest.mark.parametrize("stride", [1, 5, None])
def test_forecasts_of_a_window_are_those_of_its_beginning(checkpoint, uneven, stride):
    """Each day's is what the network says at the end of what it was shown of the days before, and of none after."""
    prices = read_prices(uneven)
    model, extractor = load_forecaster(checkpoint)
    series, within = extractor.encode(prices), last_days(prices, 40)
    table = forecast_between(model, extractor, series, within, stride).set_index(["ticker", "cutoff"])
    windows = forecast_windows(series, extractor.context_length, within, stride or extractor.context_length // 4)
    for row in windows.origins.iloc[::7].itertuples():
        example = windows[row.window]
        shown = {name: torch.from_numpy(array[: len(array) - row.back])[None] for name, array in example.items()}
        with torch.no_grad():
            expected = model(**shown)
        found = table.loc[(row.ticker, row.cutoff)]
        np.testing.assert_allclose(found["mean"], expected.mean[0, -1], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[QUANTILES], expected.quantiles[0, -1], rtol=1e-4, atol=1e-6)


# --- causal language model ---


@settings(max_examples=20, deadline=None)
@given(data=st.data(), samples=st.integers(2, 12), seed=st.integers(0, 99))
def test_the_kth_sample_stands_for_k_of_one_more_than_there_are(data, samples, seed):
    place = data.draw(st.integers(1, samples))
    paths = np.random.default_rng(seed).normal(size=(3, samples, 4))
    mean, quantiles = forecast_of_samples(paths, [1, 3], [place / (samples + 1)])
    for column, days in enumerate([1, 3]):
        reached = np.sort([[sum(path[:days]) for path in one] for one in paths], axis=1)
        np.testing.assert_allclose(quantiles[:, column, 0], reached[:, place - 1], atol=1e-12)
        np.testing.assert_allclose(mean[:, column], reached.mean(axis=1), atol=1e-12)


def test_sampled_forecasts_are_those_of_the_law_they_are_drawn_from(language_model, prices):
    """Of the next day the probabilities are known, without a draw."""
    paths, extractor = load_forecaster(language_model, num_samples=2000)
    few = prices[prices["ticker"] == "T1"].reset_index(drop=True)
    table = forecast_range(paths, extractor, few, last_days(few, 1))
    history = extractor.encode(few)[0]
    logits, _ = paths.logits([history], np.zeros((1, 1)))
    probabilities = logits[0, 0].double().softmax(dim=-1).numpy()
    values = paths.tokenizer.decode_returns(
        np.array(paths.tokenizer.return_token_ids)[None], np.array(history.scale[-1:], dtype=np.float64)
    )[0]
    row = table[table["horizon"] == 1].iloc[0]
    mean = probabilities @ values
    error = np.sqrt(probabilities @ (values - mean) ** 2 / 2000)
    assert row["mean"] == pytest.approx(mean, abs=4 * error)
    for level, quantile in zip(LEVELS, row[QUANTILES].to_numpy(dtype=float), strict=True):
        below = probabilities[values < quantile - 1e-12].sum()
        upto = probabilities[values <= quantile + 1e-12].sum()
        allowed = 4 * np.sqrt(level * (1 - level) / 2000)
        assert below - allowed <= level <= upto + allowed


def test_a_language_model_is_scored_like_a_regression(language_model, market, tmp_path):
    start = ["--start", "2006-06-01", "--end", "2006-07-14", "--num-samples", "16"]
    table, metrics = run(language_model, market, tmp_path / "one.parquet", *start)
    assert (np.diff(table[QUANTILES], axis=1) >= 0).all()
    assert "Calibration" in (tmp_path / "report.md").read_text()
    assert metrics["5"]["crps"]["model"] > 0
    again, _ = run(language_model, market, tmp_path / "again.parquet", *start)
    pd.testing.assert_frame_equal(table, again)
    other, _ = run(language_model, market, tmp_path / "other.parquet", *start, "--seed", "1")
    assert (table["mean"] != other["mean"]).mean() > 0.9


def test_later_prices_change_no_sampled_forecast(language_model, prices):
    days = prices["date"].unique()
    later = prices["date"] > days[-20]
    changed = prices.copy()
    changed.loc[later, ["open", "high", "low", "close"]] *= 1.5
    tables = []
    for one in (prices, changed):
        paths, extractor = load_forecaster(language_model, num_samples=4)
        tables.append(forecast_range(paths, extractor, one, DateRange(days[-25], days[-20])).drop(columns="y"))
    pd.testing.assert_frame_equal(*tables)


class Clairvoyant(SpaceExploreFeatureExtractor):
    """Whose features are those of tomorrow."""

    def compute_features(self, prices: pd.DataFrame) -> pd.DataFrame:
        features = super().compute_features(prices)
        columns = list(self.feature_names)
        features[columns] = features.groupby("ticker")[columns].shift(-1)
        return features


@pytest.mark.parametrize("head", ["classifier", "language_model"])
def test_a_planted_leak_is_found_whatever_the_head(request, head, prices):
    model, extractor = load_forecaster(request.getfixturevalue(head), num_samples=2)
    cheat = Clairvoyant(**extractor.to_dict())
    origins = forecast_windows(extractor.encode(prices), extractor.context_length, last_days(prices, 70)).origins
    evaluate.refuse_leaks(model, extractor, prices, origins)
    with pytest.raises(ValueError, match="leak"):
        evaluate.refuse_leaks(model, cheat, prices, origins)
    assert check_leaks(extractor.compute_features, prices) > 0


# --- refused ---


def test_what_cannot_be_is_refused(refused, classifier, language_model, market, tmp_path):
    output = ["--prices", str(market), "--output", str(tmp_path / "table.parquet")]
    assert "--device nonsense" in refused(evaluate.main, ["--model", str(classifier), "--device", "nonsense", *output])
    if not torch.cuda.is_available():
        assert "--device cuda" in refused(evaluate.main, ["--model", str(classifier), "--device", "cuda", *output])
    complaint = refused(evaluate.main, ["--model", str(language_model), "--num-samples", "0", *output])
    assert "num_samples must be at least 1, got 0" in complaint
    assert not list(tmp_path.iterdir())


def test_a_network_without_a_head_is_refused(refused, classifier, market, tmp_path):
    model, extractor = load_forecaster(classifier)
    model.model.save_pretrained(tmp_path / "bare")
    extractor.save_pretrained(tmp_path / "bare")
    run = ["--model", str(tmp_path / "bare"), "--prices", str(market), "--output", str(tmp_path / "table.parquet")]
    assert "forecasts no prices: it holds SpaceExploreModel" in refused(evaluate.main, run)
