"""What a network says beside its forecasts: counted by hand, and unable to see later days."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import RECIPE

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.prices import read_prices
from spaceexploreai.evaluation.internals import expert_load, words_of
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.t2t_spaceexplore import WORDS

CONTEXT = 40


@pytest.fixture(scope="module")
def series(checkpoint, market):
    prices = read_prices(market)
    return SpaceExploreFeatureExtractor.from_pretrained(checkpoint).encode(prices)[0]


@pytest.fixture(scope="module")
def teller(checkpoint):
    """A network with an extractor that counts as trained."""
    config = SpaceExploreConfig.from_json_file(RECIPE / "t2t.json")
    config.num_features = SpaceExploreConfig.from_pretrained(checkpoint).num_features
    torch.manual_seed(0)
    model = SpaceExploreForRegression(config).eval()
    model.base_model.t2t.num_batches_tracked += 1
    return model


def test_expert_load_counts_the_choices_of_unpadded_steps(checkpoint, market):
    extractor = SpaceExploreFeatureExtractor.from_pretrained(checkpoint)
    model = SpaceExploreForRegression.from_pretrained(checkpoint).eval()
    inputs = extractor(read_prices(market))
    inputs["attention_mask"][0, :30] = 0
    load = expert_load(model, inputs)
    with torch.no_grad():
        logits = model(**inputs, output_router_logits=True).router_logits
    real = inputs["attention_mask"].flatten().bool().numpy()
    for shares, layer in zip(load, logits, strict=True):
        chosen = np.argsort(-layer.numpy()[real], axis=1)[:, : model.config.num_experts_per_tok]
        counts = np.bincount(chosen.ravel(), minlength=model.config.n_routed_experts)
        np.testing.assert_allclose(shares, counts / counts.sum(), atol=1e-6)


def test_a_network_without_experts_has_no_load(checkpoint):
    config = SpaceExploreConfig.from_pretrained(checkpoint)
    config.first_k_dense_replace = config.num_hidden_layers
    model = SpaceExploreForRegression(config).eval()
    values = torch.zeros(1, 8, config.num_features)
    assert expert_load(model, {"past_values": values, "scale": torch.ones(1, 8)}) is None


def test_words_are_of_the_steps_to_the_cutoff(teller, series):
    cutoff = pd.Timestamp(series.dates[200])
    said = words_of(teller, series, cutoff, CONTEXT)
    assert {named["word"] for named in said} <= set(WORDS)
    assert said[-1]["end"] == cutoff
    assert said[0]["start"] == pd.Timestamp(series.dates[200 - CONTEXT + 1])
    values = torch.from_numpy(series.values[200 - CONTEXT + 1 : 201])[None]
    expected = teller.describe(values)[0]
    assert [named["word"] for named in said] == [named["word"] for named in expected]
    between = words_of(teller, series, cutoff + pd.Timedelta(hours=5), CONTEXT)
    assert between == said


def test_words_know_no_later_day(teller, series):
    cutoff = pd.Timestamp(series.dates[200])
    values = series.values.copy()
    values[201:] = 5.0
    assert words_of(teller, series._replace(values=values), cutoff, CONTEXT) == words_of(
        teller, series, cutoff, CONTEXT
    )


def test_a_halt_is_no_step_of_a_word(teller, series):
    close = series.close.copy()
    close[197:201] = np.nan
    cutoff = pd.Timestamp(series.dates[200])
    assert words_of(teller, series._replace(close=close), cutoff, CONTEXT)[-1]["end"] == series.dates[196]


def test_what_has_no_trained_extractor_says_nothing(checkpoint, teller, series):
    cutoff = pd.Timestamp(series.dates[200])
    untrained = SpaceExploreForRegression(teller.config).eval()
    assert words_of(untrained, series, cutoff, CONTEXT) == []
    assert words_of(SpaceExploreForRegression.from_pretrained(checkpoint), series, cutoff, CONTEXT) == []
