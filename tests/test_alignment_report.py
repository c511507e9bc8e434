"""The report of alignment: its dates are later than every pair, its temperature is fitted before them, and a loss of
calibration is told."""

import numpy as np
import pandas as pd
import pytest
import torch

from spaceexploreai.data.prices import read_prices
from spaceexploreai.data.stocks import build_pairs
from spaceexploreai.evaluation.paths import LIKELIHOOD
from spaceexploreai.modeling_spaceexplore import SpaceExploreForCausalLM
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer
from spaceexploreai.train.alignment_report import (
    ALIGNED,
    BEFORE,
    RECALIBRATED,
    calibration,
    held_back_origins,
    measure,
)

H = 10


@pytest.fixture(scope="module")
def data(language_model, market):
    return build_pairs(prices=str(market), extractor=str(language_model), horizons=[1, 2, 5, 10])


def test_origins_are_later_than_every_pair_and_halves_do_not_overlap(data, market):
    table = read_prices(market)
    sessions = np.sort(table["date"].unique()).astype("datetime64[D]")
    earlier, later = held_back_origins(data)
    ends = {
        name: sessions[np.searchsorted(sessions, part.outcomes.date) + H]
        for name, part in (("earlier", earlier), ("later", later))
    }
    pairs = [np.datetime64(day) for split in data.pairs.values() for day in split["date"]]
    assert sessions[np.searchsorted(sessions, max(pairs)) + H] <= data.split.train.end
    assert min(earlier.outcomes.date) > data.split.train.end.to_datetime64()
    assert max(ends["earlier"]) <= min(later.outcomes.date)
    assert max(ends["later"]) <= data.split.validation.end.to_datetime64()
    for part in (earlier, later):
        assert len(part.histories) == len(part.outcomes.date) > 0
        for history, day, scale, path in zip(part.histories, *part.outcomes, strict=True):
            bars = table[table["ticker"] == history.ticker].reset_index(drop=True)
            place = bars.index[bars["date"] == pd.Timestamp(day)][0]
            assert history.dates[-1] == day
            assert len(history.close) == 64
            assert scale == history.scale[-1]
            returns = np.log(bars["close"]).diff()[place + 1 : place + 1 + H]
            np.testing.assert_allclose(path, returns, rtol=1e-3, atol=1e-6)


def test_only_members_of_the_pairs_are_measured(language_model, market):
    options = {"extractor": str(language_model), "horizons": [1, 2, 5, 10]}
    some = build_pairs(prices=str(market), pair_tickers="T1", **options)
    assert {one.ticker for part in held_back_origins(some) for one in part.histories} == {"T1"}


def test_a_temperature_mends_what_is_too_sure(language_model, data):
    """Logits ten times as large are mended by a temperature ten times as high, and are then those of before."""
    tokenizer, plain = SpaceExploreTokenizer(), SpaceExploreForCausalLM.from_pretrained(language_model)
    sure = SpaceExploreForCausalLM.from_pretrained(language_model)
    sure.lm_head.weight = torch.nn.Parameter(10 * sure.lm_head.weight)  # no longer tied
    alone = measure({BEFORE: plain}, tokenizer, data, 20)
    mended = measure({BEFORE: sure, ALIGNED: plain}, tokenizer, data, 20)
    assert mended.temperature == pytest.approx(10 * alone.temperature, rel=1e-3)
    means = {name: table[LIKELIHOOD].mean() for name, table in mended.scores.items()}
    assert list(means) == [BEFORE, RECALIBRATED, ALIGNED]
    assert means[RECALIBRATED] > means[BEFORE] + 0.01
    assert means[RECALIBRATED] == pytest.approx(alone.scores[RECALIBRATED][LIKELIHOOD].mean(), rel=1e-4)
    assert means[ALIGNED] == pytest.approx(alone.scores[BEFORE][LIKELIHOOD].mean(), rel=1e-5)
    pd.testing.assert_frame_equal(mended.scores[ALIGNED], alone.scores[BEFORE])  # the same draws


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [(0.9, 0.8, True), (0.9, 0.97, True), (0.9, 0.89, False), (0.97, 0.9, False), (0.8, 0.9, False)],
)
def test_lost_calibration_is_told(before, after, lost):
    rows = [
        ["CRPS, 10 d", BEFORE, 0.5, 0.1, 0.0, 0.0],
        ["coverage of 90%, 1 d", BEFORE, 0.9, 0.02, 0.0, 0.0],
        ["coverage of 90%, 10 d", BEFORE, before, 0.02, 0.0, 0.0],
        ["coverage of 90%, 1 d", ALIGNED, 0.9, 0.02, 0.0, 0.01],
        ["coverage of 90%, 10 d", ALIGNED, after, 0.02, after - before, 0.01],
    ]
    names = ["metric", "model", "mean", "error", "difference", "difference_error"]
    said = calibration(pd.DataFrame(rows, columns=names))
    assert f"10 d went from {before:.1%} to {after:.1%}" in said
    assert ("Calibration was lost" in said) == lost
