"""The benchmarks of alignment: the optimum of a rule against its closed form, and the errors over seeds."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from spaceexploreai.benchmarks.alignment import format_seeds
from spaceexploreai.benchmarks.preferences import CASES, GRID, draw_pairs, optimum
from spaceexploreai.train.alignment_report import ALIGNED, BEFORE


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_the_optimum_against_one_sample_is_the_closed_form(beta):
    """Reference · (truth / reference)^(1/beta), of independent pairs: the truth itself at beta 1. A margin that is the
    same for both sides changes nothing."""
    case = CASES[1]
    _, mean, deviation, reference = case
    log_p = norm.logpdf(GRID, 0, reference) * (1 - 1 / beta) + norm.logpdf(GRID, mean, deviation) / beta
    expected = np.exp(log_p - log_p.max())
    expected /= expected.sum()
    found = optimum(draw_pairs("one sample", 8, case), reference, beta, 0.0)
    assert found @ GRID == pytest.approx(expected @ GRID, abs=0.03)
    assert np.abs(found.cumsum() - expected.cumsum()).max() < 0.02


def test_worst_of_several_narrows_and_a_supervised_term_holds():
    case = CASES[0]
    worst, median = (draw_pairs(rule, 8, case) for rule in ("worst", "median"))
    spread = [
        np.sqrt(optimum(joint, 1.0, 0.5, weight) @ GRID**2)
        for joint, weight in ((worst, 0.0), (median, 0.0), (median, 1.0))
    ]
    assert spread[0] < 0.5
    assert spread[1] > 1.3
    assert spread[2] == pytest.approx(1, abs=0.1)


def test_the_table_has_mean_and_error_over_seeds():
    def table(difference: float) -> pd.DataFrame:
        rows = [
            ["CRPS, 1 d", BEFORE, 0.5, 0.1, 0.0, 0.0],
            ["CRPS, 1 d", ALIGNED, 0.5, 0.1, difference, 0.02],
            ["RankIC, 1 d", ALIGNED, np.nan, np.nan, np.nan, np.nan],
        ]
        return pd.DataFrame(rows, columns=["metric", "model", "mean", "error", "difference", "difference_error"])

    text = format_seeds([table(0.1), table(0.2), table(0.6)])
    error = np.std([0.1, 0.2, 0.6], ddof=1) / 3**0.5
    assert text.splitlines() == [
        "| metric | aligned |",
        "|---|---:|",
        f"| CRPS, 1 d | +0.3000 ± {error:.4f} (0.0200) |",
    ]
