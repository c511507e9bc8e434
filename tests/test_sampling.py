"""Paths of a causal language model: what is drawn is what it says, and how likely it takes what happened to be."""

import numpy as np
import pytest
import torch
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import kstest, norm

from spaceexploreai.data.collators import PathCollator
from spaceexploreai.data.prices import read_prices
from spaceexploreai.data.stocks import open_stocks
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries, SpaceExploreFeatureExtractor
from spaceexploreai.paths_spaceexplore import InverseTransformProcessor, draw_shocks
from spaceexploreai.scripts import build_dataset
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer
from spaceexploreai.train.sampling import ModelPaths, fit_temperature


@pytest.fixture(scope="module")
def histories(language_model, market):
    """One with masked steps in its context among two without."""
    extractor = SpaceExploreFeatureExtractor.from_pretrained(language_model)
    first, second, third = extractor.encode(read_prices(market))
    close, values = second.close.copy(), second.values.copy()
    close[-9:-6] = values[-9:-6] = np.nan
    return [first, second._replace(close=close, values=values), third]


def test_paths_have_the_shape_and_the_size_of_returns(language_model, histories):
    paths = ModelPaths.from_pretrained(language_model, 64, num_samples=4)(histories, 5)
    assert paths.shape == (3, 4, 5)
    scale = np.array([one.scale[-1] for one in histories])
    centers = SpaceExploreTokenizer().centers
    assert all(np.isclose(one, centers, rtol=1e-6).any() for one in (paths / scale[:, None, None]).ravel())


def test_the_seed_decides(language_model, histories):
    one, again, other = (ModelPaths.from_pretrained(language_model, 64, 2, seed)(histories, 5) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[:, 0], one[:, 1])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_of_a_history_are_those_of_generate(language_model, histories, temperature):
    """The library reads the context once for each sample; read once for all of them, it must say the same."""
    paths = ModelPaths.from_pretrained(language_model, 64, num_samples=5)
    paths.temperature = temperature
    prompt = paths._prompt(histories)
    shocks = np.concatenate([draw_shocks(0, one.ticker, one.dates[-1], 5, 6) for one in histories])
    uniforms = torch.from_numpy(norm.cdf(shocks)).float()
    tokens = paths.model.generate(
        **prompt,
        min_new_tokens=6,
        max_new_tokens=6,
        num_return_sequences=5,
        do_sample=True,  # of one token
        logits_processor=[InverseTransformProcessor(uniforms, prompt["input_ids"].shape[1], temperature)],
        suppress_tokens=paths.tokenizer.suppress_tokens,
    )[:, -6:]
    scale = np.array([one.scale[-1] for one in histories], dtype=np.float64).repeat(5)
    expected = paths.tokenizer.decode_returns(tokens.numpy(), scale)
    np.testing.assert_array_equal(paths(histories, 6).reshape(15, 6), expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.2, 5), uniform=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_the_token_is_the_one_that_the_distribution_function_passes_at(seed, temperature, uniform):
    logits = np.random.default_rng(seed).normal(0, 3, (4, 9))
    logits[:, :3] = -np.inf  # suppressed
    uniforms = np.column_stack([np.full(4, 0.9), [uniform, 0.1, 0.6, 0.95]])
    processor = InverseTransformProcessor(torch.tensor(uniforms), 7, temperature)
    scores = processor(torch.zeros(4, 8, dtype=torch.long), torch.tensor(logits))  # the second day
    for row, chances in enumerate(softmax(logits / temperature, axis=1)):
        (token,) = np.flatnonzero(scores[row].isfinite().numpy())
        below, upto = chances[:token].sum(), chances[: token + 1].sum()
        assert below - 1e-9 <= uniforms[row, 1] <= upto + 1e-9
        assert token >= 3


def test_shocks_are_normal_numbers_of_a_forecast_alone():
    day = np.datetime64("2020-03-02")
    shocks = draw_shocks(1, "T0", day, 2000, 5)
    assert kstest(shocks.ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(shocks.T), np.eye(5), atol=0.1)
    np.testing.assert_array_equal(draw_shocks(1, "T0", day, 2000, 3), shocks[:, :3])
    others = [(2, "T0", day), (1, "T1", day), (1, "T0", day + 1), (1, "T", np.datetime64("1969-12-31"))]
    for other in others:
        assert abs(np.corrcoef(draw_shocks(*other, 2000, 5).ravel(), shocks.ravel())[0, 1]) < 0.05


def test_the_first_day_has_the_distribution_of_the_logits(language_model, histories):
    """All of it: a library's default of the 50 likeliest tokens would cut the tails off."""
    paths = ModelPaths.from_pretrained(language_model, 64, num_samples=20_000)
    first = paths(histories[:1], 1)[0, :, 0]
    counts = np.bincount(paths.tokenizer.encode_returns(first, histories[0].scale[-1]) - 5, minlength=256)
    logits, _ = paths.logits(histories[:1], np.zeros((1, 1)))
    expected = softmax(logits[0, 0].numpy().astype(np.float64)) * counts.sum()
    # Pearson's statistic has as many degrees of freedom in expectation, and twice as many for a variance.
    likely = expected > 5
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert likely.sum() > 100
    assert statistic == pytest.approx(likely.sum(), abs=5 * np.sqrt(2 * likely.sum()))


def test_what_a_model_says_of_a_path_is_what_it_was_trained_to_say(language_model, histories):
    """The training loss of a batch with labels on its path alone, padded on the other side."""
    paths = ModelPaths.from_pretrained(language_model, 64)
    realised = np.random.default_rng(0).normal(0, 0.02, (3, 7))
    logits, tokens = paths.logits(histories, realised)
    log_likelihood = np.take_along_axis(log_softmax(logits.numpy(), axis=2), tokens.numpy()[..., None], axis=2)
    for one, path, own in zip(histories, realised, log_likelihood, strict=True):
        example = {
            "past_values": one.values[-64:],
            "attention_mask": one.traded[-64:],
            "scale": one.scale[-64:],
            "next_returns": np.full(64, -100.0),
            "path": path,
        }
        batch = PathCollator(paths.tokenizer, 64, 9)([example])
        with torch.no_grad():
            every = log_softmax(paths.model(**batch).logits[0, :-1].numpy(), axis=1)
        labels = batch["labels"][0, 1:].numpy()
        known = labels != -100
        # Of all tokens; the paths are of return tokens alone.
        of_returns = np.log(np.exp(every[:, 5:]).sum(axis=1))
        expected = every[np.flatnonzero(known), labels[known]] - of_returns[known]
        np.testing.assert_allclose(own[:, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("true", [0.6, 1.7])
def test_the_temperature_is_the_likeliest(true):
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (300, 4, 12))
    chances = softmax(logits / true, axis=2).reshape(-1, 12)
    tokens = np.array([generator.choice(12, p=one) for one in chances]).reshape(300, 4)

    def loss(temperature: float) -> float:
        return -np.take_along_axis(log_softmax(logits / temperature, axis=2), tokens[..., None], axis=2).mean()

    expected = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-8}).x
    found = fit_temperature(torch.tensor(logits, dtype=torch.float), torch.tensor(tokens))
    assert found == pytest.approx(expected, rel=1e-4)
    assert found == pytest.approx(true, rel=0.1)


def test_the_prompt_is_what_training_saw(language_model, histories):
    """The first token's distribution against the network by hand, one history at a time and without padding."""
    paths = ModelPaths.from_pretrained(language_model, 64)
    with torch.no_grad():
        together = paths.model(**paths._prompt(histories)).logits[:, -1]
        for row, one in enumerate(histories):
            traded = one.traded[-64:]
            ids = [paths.tokenizer.ts_token_id] * int(traded.sum()) + [paths.tokenizer.bos_token_id]
            alone = paths.model(
                input_ids=torch.tensor([ids]),
                past_values=torch.from_numpy(np.array(one.values[-64:]))[None],
                past_values_mask=torch.from_numpy(traded).long()[None],
            ).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_placeholders_are_as_many_as_the_steps_of_the_context(language_model, tmp_path, market):
    """A halt within the context: the network takes a placeholder for each step that is not masked."""
    prices = read_prices(market)
    halted = prices["ticker"].eq("T1") & prices["date"].isin(prices["date"].unique()[[150, 151, 230]])
    prices[~halted].to_parquet(tmp_path / "halted.parquet")
    folder = tmp_path / "stocks"
    build_dataset.main(["--prices", str(tmp_path / "halted.parquet"), "--output-dir", str(folder)])
    series = open_stocks(str(folder)).train.series
    counts = set()
    for row in load_dataset(str(folder), "dpo", split="train"):
        steps: EncodedSeries = series.steps(row["series"], row["first"], row["last"] + 1)
        assert row["prompt"].count("<ts>") == steps.traded.sum()
        counts.add(row["prompt"].count("<ts>"))
    assert len(counts) > 1
