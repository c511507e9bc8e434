"""Cross-sections against plain loops and SciPy."""

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, rankdata, spearmanr

from spaceexploreai.evaluation import ranking
from spaceexploreai.evaluation.ranking import MIN_TICKERS, rank_ic

CORRELATIONS = pytest.mark.parametrize(("ranks", "reference"), [(True, spearmanr), (False, pearsonr)])


def make_rows(dates=8, tickers=12, seed=0, decimals=1) -> pd.DataFrame:
    """Cross-sections with ties, the last of 9 tickers only."""
    generator = np.random.default_rng(seed)
    cutoff = np.repeat(pd.bdate_range("2024-01-01", periods=dates), tickers)
    ticker = np.tile([f"T{which:02}" for which in range(tickers)], dates)
    y, mean = generator.normal(size=(2, len(cutoff))).round(decimals)
    rows = pd.DataFrame({"ticker": ticker, "cutoff": cutoff, "y": y, "mean": mean})
    return rows[(rows["cutoff"] != cutoff[-1]) | (rows["ticker"] < "T09")].sample(frac=1, random_state=seed)


def columns(rows: pd.DataFrame, *names: str) -> list[np.ndarray]:
    return [rows[name].to_numpy() for name in names]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 60))
def test_places_are_those_of_scipy(seed, count):
    generator = np.random.default_rng(seed)
    values, codes = generator.integers(0, 6, size=(2, count))
    less, upto = ranking.places_within(values, codes)
    for code in np.unique(codes):
        own = codes == code
        np.testing.assert_array_equal(less[own] + 1, rankdata(values[own], method="min"))
        np.testing.assert_array_equal(upto[own], rankdata(values[own], method="max"))


@CORRELATIONS
def test_correlation_of_each_date(ranks, reference):
    rows = make_rows()
    found = ranking.ic_by_date(*columns(rows, "y", "mean", "cutoff"), ranks)
    expected = {
        date: reference(own["mean"], own["y"]).statistic
        for date, own in rows.groupby("cutoff")
        if len(own) >= MIN_TICKERS
    }
    assert len(expected) == 7
    pd.testing.assert_series_equal(found, pd.Series(expected), check_names=False)
    if ranks:
        assert rank_ic(*columns(rows, "y", "mean", "cutoff")) == pytest.approx(np.mean(list(expected.values())))


@CORRELATIONS
def test_correlation_is_undefined_without_two_sides_that_vary(ranks, reference):
    y, cutoff = np.random.default_rng(0).normal(size=20), np.repeat([1, 2], 10)
    for mean in (np.full(20, 0.1), np.zeros(20)):
        assert ranking.ic_by_date(y, mean, cutoff, ranks).empty
    assert ranking.ic_by_date(y[:18], y[:18], np.repeat([1, 2], 9), ranks).empty
    assert math.isnan(rank_ic(y[:18], y[:18], np.repeat([1, 2], 9)))
    half = np.where(cutoff == 1, 0.3, y)  # the constant cross-section has no say
    assert ranking.ic_by_date(y, half, cutoff, ranks).to_dict() == {2: pytest.approx(1.0)}


def test_decile_spread_is_top_less_bottom():
    rows = make_rows(tickers=20, decimals=9)
    found = ranking.decile_spread_by_date(*columns(rows, "y", "mean", "cutoff"))
    whole = [own.sort_values("mean")["y"].to_numpy() for _, own in rows.groupby("cutoff") if len(own) == 20]
    np.testing.assert_allclose(found, [one[-2:].mean() - one[:2].mean() for one in whole])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), tickers=st.integers(MIN_TICKERS, 35))
def test_weights_share_ties_and_fractions(seed, tickers):
    """Each row's weight is that of an average over all orders of its ties, here many random ones."""
    generator = np.random.default_rng(seed)
    mean = generator.integers(0, 5, size=tickers).astype(float)
    weights = ranking.decile_weights(mean, np.zeros(tickers, dtype=int))
    assert weights.clip(min=0).sum() <= 1 + 1e-9
    assert weights.sum() == pytest.approx(0, abs=1e-9)
    share, total = tickers / 10, np.zeros(tickers)
    for _ in range(400):
        order = np.lexsort([generator.random(tickers), mean])
        ideal = (share - np.arange(tickers)).clip(0, 1) / share  # of the lowest, the last of them in part
        total[order] += ideal[::-1] - ideal
    np.testing.assert_allclose(weights, total / 400, atol=0.12)


def test_a_planted_order_has_its_spread():
    generator = np.random.default_rng(0)
    cutoff = np.repeat(np.arange(200), 100)
    mean = generator.normal(size=len(cutoff))
    spread = ranking.decile_spread_by_date(0.5 * mean + generator.normal(size=len(cutoff)), mean, cutoff).mean()
    # The mean of the top tenth of a unit normal is 1.755.
    assert spread == pytest.approx(0.5 * 2 * 1.755, abs=0.06)


def turnover_twin(rows: pd.DataFrame) -> float:
    """Of two tickers a side out of twenty, by their names."""
    books = []
    for _, own in rows.sort_values("cutoff").groupby("cutoff"):
        names = own.sort_values("mean")["ticker"].tolist()
        books.append((set(names[-2:]), set(names[:2])))
    replaced = []
    for before, after in pairwise(books):
        replaced.append(np.mean([len(new - old) / 2 for old, new in zip(before, after, strict=True)]))
    return np.mean(replaced)


def test_turnover_is_the_share_of_names_that_are_new():
    rows = make_rows(tickers=20, decimals=9)
    rows = rows[rows["cutoff"] != rows["cutoff"].max()]
    assert 0 < turnover_twin(rows) < 1
    assert ranking.turnover(*columns(rows, "mean", "cutoff", "ticker")) == pytest.approx(turnover_twin(rows))


def test_turnover_from_nothing_to_all():
    ticker, cutoff = np.tile(np.arange(10), 3), np.repeat([1, 2, 3], 10)
    stays = np.tile(np.arange(10.0), 3)
    assert ranking.turnover(stays, cutoff, ticker) == 0
    moves = np.where(cutoff == 2, (stays + 5) % 10, stays)  # other names first and last
    assert ranking.turnover(moves, cutoff, ticker) == 1
    swapped = np.where(cutoff == 2, -stays, stays)  # long and short change places
    assert ranking.turnover(swapped, cutoff, ticker) == 1
    assert math.isnan(ranking.turnover(stays[:10], cutoff[:10], ticker[:10]))
    assert math.isnan(ranking.turnover(stays * 0, cutoff, ticker))
