"""Which of two paths a forecaster should prefer: scores of sampled paths, and the pair that is made of them.

The score of a path is minus the mean distance of its cumulative log-returns to those that were realised, over days 1
to H and in units of scale·sqrt(H), so that a wild ticker weighs no more than a calm one. A path that ends on the
realised side gets `DIRECTION_BONUS` on top, if the move was large enough to have a side.
"""

from typing import NamedTuple

import numpy as np

# Both in units of scale·sqrt(H), in which a move of the whole path is typically one.
DIRECTION_BONUS, FLAT = 0.25, 0.25
CHOICES = ("realised", "best")

# Shapes: N origins, K samples of each, H days. Paths are daily log-returns.


class Pairs(NamedTuple):
    """Two paths (N, H) of each origin, and (N,) how far apart they end in units of scale·sqrt(H); NaN in a tie."""

    chosen: np.ndarray
    rejected: np.ndarray
    margin: np.ndarray


def score_paths(paths: np.ndarray, realised: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(N, K) scores, the higher the better, of (N, K, H) paths against what was realised, (N, H).

    Args:
        scale: (N,) daily volatility known at the origins.
    """
    unit = scale * np.sqrt(realised.shape[-1])
    sampled, true = paths.cumsum(axis=-1), realised[:, None].cumsum(axis=-1)
    distance = np.abs(sampled - true).mean(axis=-1) / unit[:, None]
    is_right = np.sign(sampled[..., -1]) == np.sign(true[..., -1])
    has_side = np.abs(true[..., -1]) > FLAT * unit[:, None]
    return DIRECTION_BONUS * (is_right & has_side) - distance


def choose_pairs(paths: np.ndarray, realised: np.ndarray, scale: np.ndarray, chosen: str = "realised") -> Pairs:
    """The realised path, or the best sample, against the sample of median rank; of an even K the lower of the two.

    Never the worst of K: its optimum is a forecast that is too narrow.

    Args:
        chosen: of `CHOICES`.
    """
    count = paths.shape[1]
    check_samples(count, chosen)
    scores = score_paths(paths, realised, scale)
    order = scores.argsort(axis=1, kind="stable")
    rows, median, best = np.arange(len(paths)), order[:, (count - 1) // 2], order[:, -1]
    rejected = paths[rows, median]
    preferred = realised if chosen == "realised" else paths[rows, best]
    margin = np.abs(preferred.sum(axis=1) - rejected.sum(axis=1)) / (scale * np.sqrt(realised.shape[1]))
    if chosen == "best":
        margin = np.where(scores[rows, best] > scores[rows, median], margin, np.nan)
    return Pairs(preferred, rejected, margin)


def check_samples(count: int, chosen: str) -> None:
    """Refuses two samples, whose lower median is the worst, and a best sample that is the median."""
    if chosen not in CHOICES:
        raise ValueError(f"chosen must be one of {', '.join(CHOICES)}, got {chosen!r}")
    if count < 1 or count == 2 or (count == 1 and chosen == "best"):
        raise ValueError(f"the {chosen} path against the median of num_samples {count}: take 3 or more, or 1 alone")
