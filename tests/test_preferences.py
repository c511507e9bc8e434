"""Preference pairs of a model's own paths: scored by what was realised, never beside the worst, of known dates."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import make_market
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from spaceexploreai.data.preferences import choose_pairs, score_paths
from spaceexploreai.data.prices import read_prices, write_table
from spaceexploreai.modeling_spaceexplore import SpaceExploreForCausalLM
from spaceexploreai.scripts import build_dataset, build_preferences
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer

H = 10


def draw(seed: int, origins: int = 6, samples: int = 8, days: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paths (N, K, H), realised ones (N, H) and scales (N,)."""
    generator = np.random.default_rng(seed)
    scale = generator.uniform(0.005, 0.05, origins)
    unit = scale[:, None]
    paths = generator.normal(0, 1, (origins, samples, days)) * unit[..., None]
    return paths, generator.normal(0, 1, (origins, days)) * unit, scale


# --- the score and the choice ---


def score_one(path: list[float], realised: list[float], scale: float) -> float:
    """As the docstring says it, day by day."""
    unit, ours, theirs, distance = scale * len(path) ** 0.5, 0.0, 0.0, 0.0
    for mine, true in zip(path, realised, strict=True):
        ours, theirs = ours + mine, theirs + true
        distance += abs(ours - theirs) / unit / len(path)
    right = (ours > 0) == (theirs > 0) and abs(theirs) > 0.25 * unit
    return (0.25 if right else 0.0) - distance


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 12))
def test_scores_are_the_rule_day_by_day(seed, samples, days):
    paths, realised, scale = draw(seed, samples=samples, days=days)
    expected = [[score_one(x, y, s) for x in each] for each, y, s in zip(paths, realised, scale, strict=True)]
    np.testing.assert_allclose(score_paths(paths, realised, scale), expected)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_a_wild_ticker_scores_as_a_calm_one(seed, factor):
    paths, realised, scale = draw(seed)
    wild = score_paths(paths * factor, realised * factor, scale * factor)
    np.testing.assert_allclose(wild, score_paths(paths, realised, scale), rtol=1e-9)
    pairs = choose_pairs(paths * factor, realised * factor, scale * factor)
    np.testing.assert_allclose(pairs.margin, choose_pairs(paths, realised, scale).margin, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3, 4, 7, 8]), st.sampled_from(["realised", "best"]))
def test_the_median_is_rejected_and_never_the_worst(seed, samples, chosen):
    if samples == 1:
        chosen = "realised"
    paths, realised, scale = draw(seed, samples=samples)
    pairs = choose_pairs(paths, realised, scale, chosen)
    for row in range(len(paths)):
        scores = [score_one(path, realised[row], scale[row]) for path in paths[row]]
        which = int(np.flatnonzero((paths[row] == pairs.rejected[row]).all(axis=1))[0])
        rank = rankdata(scores)[which]  # 1 is the worst
        assert abs(rank - (samples + 1) / 2) <= 0.5
        if samples > 1:
            assert min(scores) < scores[which] < max(scores)
        expected = realised[row] if chosen == "realised" else paths[row][int(np.argmax(scores))]
        np.testing.assert_array_equal(pairs.chosen[row], expected)
        ends = abs(expected.sum() - pairs.rejected[row].sum())
        assert pairs.margin[row] == pytest.approx(ends / (scale[row] * np.sqrt(5)))


def test_equal_samples_are_a_tie():
    paths, realised, scale = draw(0)
    paths[2] = paths[2, :1]
    assert np.isnan(choose_pairs(paths, realised, scale, "best").margin).tolist() == [row == 2 for row in range(6)]


@pytest.mark.parametrize(("samples", "chosen"), [(2, "realised"), (2, "best"), (1, "best"), (8, "worst")])
def test_what_has_no_median_is_refused(samples, chosen):
    with pytest.raises(ValueError, match=chosen):
        choose_pairs(*draw(0, samples=samples), chosen)


# --- the command ---


def build(model, prices, folder, *options: str):
    argv = ["--model", str(model), "--prices", str(prices), "--universe", "all", "--output-dir", str(folder)]
    build_preferences.main([*argv, *options])
    return load_dataset(str(folder), "dpo")


@pytest.fixture(scope="module")
def pairs(language_model, market, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    return build(language_model, market, folder), folder


def every_row(datasets) -> list[dict]:
    return [row for split in datasets.values() for row in split]


def test_the_realised_path_is_preferred_to_a_sample(pairs, market):
    datasets, folder = pairs
    table, tokenizer = read_prices(market), SpaceExploreTokenizer()
    assert {name: len(split) > 3 for name, split in datasets.items()} == dict.fromkeys(datasets, True)
    for row in every_row(datasets):
        bars = table[table["ticker"] == row["ticker"]].reset_index(drop=True)
        day = bars.index[bars["date"] == pd.Timestamp(row["date"])][0]
        realised = np.log(bars["close"]).diff()[day + 1 : day + 1 + H].to_numpy()
        ids = [np.array(tokenizer(row[name])["input_ids"][:-1]) for name in ("chosen", "rejected")]
        np.testing.assert_array_equal(ids[0], tokenizer.encode_returns(realised, row["scale"]))
        assert not np.array_equal(*ids)
        rejected = tokenizer.decode_returns(ids[1], row["scale"])
        assert abs(realised.sum() - rejected.sum()) / row["scale"] / H**0.5 == pytest.approx(row["margin"], rel=1e-3)
        assert row["margin"] >= 0.5
    said = (folder / "README.md").read_text()
    assert "scripts/build_preferences.py" in said
    assert "median rank\n  among 8 of" in said


def test_pairs_are_of_known_dates_and_one_for_each_path(pairs, market, language_model):
    datasets, folder = pairs
    sessions = np.sort(read_prices(market)["date"].unique())
    cutoff = SpaceExploreForCausalLM.from_pretrained(language_model).config.train_cutoff
    assert json.loads((folder / "stocks.json").read_text())["splits"]["train"][1] == cutoff
    rows = pd.DataFrame([{name: row[name] for name in ("ticker", "date", "last")} for row in every_row(datasets)])
    ends = sessions[np.searchsorted(sessions, rows["date"].to_numpy("datetime64[ns]")) + H]
    assert str(ends.max())[:10] <= cutoff
    gaps = rows.sort_values(["ticker", "last"]).groupby("ticker")["last"].diff().dropna()
    assert (gaps >= H).all()


def test_the_best_sample_may_be_preferred(pairs, language_model, market, tmp_path):
    best = build(language_model, market, tmp_path / "best", "--chosen", "best")
    realised = {(row["ticker"], row["date"]): row["chosen"] for row in every_row(pairs[0])}
    ours = {(row["ticker"], row["date"]): row["chosen"] for row in every_row(best)}
    common = realised.keys() & ours.keys()
    assert len(common) > 10
    assert all(realised[key] != ours[key] for key in common)
    assert "best sample" in (tmp_path / "best" / "README.md").read_text()


def test_later_prices_change_no_pair(pairs, language_model, market, tmp_path):
    """All prices after some day of the training range are others: pairs whose paths end before it stay."""
    table = read_prices(market)
    day = np.sort(table["date"].unique())[220]
    later = table["date"] > day
    prices = ["open", "high", "low", "close"]
    moved = make_market(seed=5).loc[later, prices]
    table.loc[later, prices] = moved
    write_table(table, tmp_path / "market.parquet")
    changed = build(language_model, tmp_path / "market.parquet", tmp_path / "pairs", "--margin", "0")
    whole = build(language_model, market, tmp_path / "whole", "--margin", "0")
    sessions = np.sort(table["date"].unique())

    def split_rows(datasets) -> tuple[list[dict], list[dict]]:
        early, late = [], []
        for row in every_row(datasets):
            end = sessions[np.searchsorted(sessions, np.datetime64(row["date"], "ns")) + H]
            (early if end <= day else late).append(row)
        return early, late

    (before, after), (expected, others) = split_rows(changed), split_rows(whole)
    assert len(before) > 20
    assert before == expected
    assert [row["chosen"] for row in after] != [row["chosen"] for row in others]


def test_the_seed_changes_the_samples(pairs, language_model, market, tmp_path):
    rows, again, other = (
        every_row(one)
        for one in (
            pairs[0],
            build(language_model, market, tmp_path / "again"),
            build(language_model, market, tmp_path / "other", "--seed", "1"),
        )
    )
    assert rows == again
    assert [row["rejected"] for row in rows] != [row["rejected"] for row in other]


MISTAKES = {
    "two samples": (["--num-samples", "2"], "num_samples 2"),
    "no samples": (["--num-samples", "0"], "num_samples 0"),
    "another range": (["--validation-fraction", "0.05"], "align it on what it knows"),
    "no member": (["--universe", "dow30"], "none of the 30 pair_tickers"),
    "no universe": (["--universe", "nasdaq"], "'nasdaq'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(language_model, market, tmp_path, capsys, case):
    options, named = MISTAKES[case]
    with pytest.raises(SystemExit, match="2"):
        build(language_model, market, tmp_path / "pairs", *options)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert named in last
    assert not (tmp_path / "pairs").exists()


def test_a_model_without_a_vocabulary_has_no_paths(checkpoint, market, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        build(checkpoint, market, tmp_path / "pairs")
    assert "no vocabulary" in capsys.readouterr().err.splitlines()[-1]


def test_pairs_without_a_model_are_of_the_same_contexts(pairs, language_model, market, tmp_path):
    argv = ["--prices", str(market), "--config", "dpo", "--output-dir", str(tmp_path / "resampled")]
    build_dataset.main([*argv, "--extractor", str(language_model)])
    theirs = every_row(load_dataset(str(tmp_path / "resampled"), "dpo"))
    key = ["ticker", "date", "chosen", "prompt", "first", "last"]
    both = {tuple(map(str, (row[name] for name in key))) for row in theirs}
    rows = {tuple(map(str, (row[name] for name in key))) for row in every_row(pairs[0])}
    assert len(rows & both) > 20  # the margin drops others
