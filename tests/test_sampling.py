"""Paths of a causal language model, and preference pairs that take them for rejected."""

import numpy as np
import pytest
import torch
from conftest import tiny_run
from datasets import load_dataset

from spaceexploreai.data.prices import read_prices
from spaceexploreai.data.stocks import open_stocks
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries, SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForCausalLM
from spaceexploreai.scripts import build_dataset
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer
from spaceexploreai.train.arguments import parse_run
from spaceexploreai.train.sampling import ModelPaths
from spaceexploreai.train.sft import save_checkpoint, train


@pytest.fixture(scope="module")
def reference(tmp_path_factory, market):
    folder = tmp_path_factory.mktemp("reference")
    save_checkpoint(train(parse_run(tiny_run(folder, "--prices", str(market), "--task", "causal_lm"))), folder)
    return folder


@pytest.fixture(scope="module")
def histories(reference, market):
    """One with masked steps in its context among two without."""
    extractor = SpaceExploreFeatureExtractor.from_pretrained(reference)
    first, second, third = extractor.encode(read_prices(market))
    close, values = second.close.copy(), second.values.copy()
    close[-9:-6] = values[-9:-6] = np.nan
    return [first, second._replace(close=close, values=values), third]


def test_paths_have_the_shape_and_the_size_of_returns(reference, histories):
    paths = ModelPaths.from_pretrained(reference, 64)(histories, 5)
    assert paths.shape == (3, 5)
    scale = np.array([one.scale[-1] for one in histories])
    centers = SpaceExploreTokenizer().centers
    assert all(np.isclose(one, centers, rtol=1e-6).any() for one in (paths / scale[:, None]).ravel())


def test_the_seed_decides_and_the_batch_does_not_matter_to_the_first_day(reference, histories):
    one, again, other = (ModelPaths.from_pretrained(reference, 64, seed)(histories, 5) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_the_prompt_is_what_training_saw(reference, histories):
    """The first token's distribution against the network by hand, one history at a time and without padding."""
    paths = ModelPaths.from_pretrained(reference, 64)
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


def test_pairs_of_a_model(reference, market, tmp_path):
    options = ["--prices", str(market), "--config", "dpo", "--output-dir", str(tmp_path / "pairs")]
    build_dataset.main([*options, "--reference", str(reference)])
    build_dataset.main([*options[:-1], str(tmp_path / "resampled"), "--extractor", str(reference)])
    ours, theirs = (load_dataset(str(tmp_path / name), "dpo") for name in ("pairs", "resampled"))
    key = ["ticker", "date", "chosen", "prompt", "first", "last"]
    both = {tuple(map(str, row)) for row in zip(*(theirs["train"][name] for name in key), strict=True)}
    rows = [tuple(map(str, row)) for row in zip(*(ours["train"][name] for name in key), strict=True)]
    assert len(set(rows) & both) > 20  # the margin drops others
    assert ours["train"]["rejected"][:] != theirs["train"]["rejected"][:]
    assert min(ours["train"]["margin"]) >= 0.5
    assert "one sample each of the causal language model" in (tmp_path / "pairs" / "README.md").read_text()
    cutoff = SpaceExploreForCausalLM.from_pretrained(reference).config.train_cutoff
    assert max(str(day)[:10] for split in ours.values() for day in split["date"]) <= cutoff


def test_a_model_is_not_aligned_on_dates_that_it_does_not_know(reference, market, tmp_path, capsys):
    run = ["--prices", str(market), "--config", "dpo", "--output-dir", str(tmp_path / "pairs")]
    with pytest.raises(SystemExit):
        build_dataset.main([*run, "--reference", str(reference), "--validation-fraction", "0.05"])
    assert "align it on what it knows" in capsys.readouterr().err
    assert not (tmp_path / "pairs").exists()


def test_placeholders_are_as_many_as_the_steps_of_the_context(reference, tmp_path, market):
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
