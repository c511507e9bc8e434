"""Baselines that learn: ridge regression and gradient-boosted trees, of the features of the forecast's day alone.

    forecaster = LEARNED["ridge"](days, features, targets, horizons)
    mean, quantiles = forecaster.forecast(features, scale, levels)

They say what a network adds to the same numbers. Whoever calls them gives steps of the training range and no others;
strengths and numbers of trees are chosen on the tail of its dates, then everything is fitted to all of it. Those that
read a whole window are in `neural.py`; `fitted.py` puts the forecasts of both into a table.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Shapes: N steps, F features, H horizons, Q quantile levels, R residuals

MAX_ROWS = 500_000  # fitted to, evenly spaced of more: with 64 features 128 MB
MIN_ROWS = 100  # on either side of the tail's first date
TAIL = 0.15  # share of the training dates
# The strength of the penalty for each row: what it is worth then does not depend on their number.
PENALTIES = 10.0 ** np.arange(-3, 4)
# Small trees, small steps, half of the rows and columns at a time: little of a return can be known. Never tuned on the
# dates that baselines are scored on; docs/LOG.md has the trials.
TREES = {
    "num_leaves": 15,
    "learning_rate": 0.1,
    "min_data_in_leaf": 500,
    "lambda_l2": 10.0,
    "max_bin": 63,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.5,
    "bagging_freq": 1,
    "seed": 0,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}
MAX_TREES, PATIENCE = 500, 20


class Learned(NamedTuple):
    """A fitted baseline: a distribution of one shape for each horizon, put at a mean and stretched by a spread.

    Attributes:
        horizons: (H,) steps ahead.
        expect: of (N, F) features the mean and the spread, each (N, H), in units of scale·sqrt(horizon).
        residuals: (R, H), training targets less their mean over their spread.
    """

    horizons: list[int]
    expect: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    residuals: np.ndarray

    def forecast(self, features: np.ndarray, scale: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Forecasts in log-returns.

        Args:
            features: (N, F) float32, normalised, NaN where undefined.
            scale: (N,) daily volatility.
            levels: (Q,) increasing.

        Returns:
            (N, H) float32 means and (N, H, Q) float32 quantiles, which do not cross.
        """
        unit = scale[:, None] * np.sqrt(np.float32(self.horizons))
        mean, spread = self.expect(features)
        shape = np.quantile(self.residuals, levels, axis=0).T.astype(np.float32)
        quantiles = mean[..., None] + spread[..., None] * shape
        return mean * unit, quantiles * unit[..., None]


def fit_ridge(days: np.ndarray, features: np.ndarray, targets: np.ndarray, horizons: list[int]) -> Learned:
    """Means by ridge regression (Hoerl & Kennard, 1970), all spreads alike.

    An undefined feature counts as its centre; an indicator beside it changed nothing (docs/LOG.md).

    Args:
        days: (N,) dates of training steps, in any order, repeated over tickers.
        features: (N, F) float32, normalised, NaN where undefined.
        targets: (N, H) log-returns from each step, in units of scale·sqrt(horizon).
        horizons: (H,) steps ahead.

    Raises:
        ValueError: a target that is not finite, or too few steps in the tail of the dates or before it.
    """
    days, features, targets = _checked(days, features, targets)
    fit, tail = split_tail(days, max(horizons))
    filled = _fill(features)
    trials = (_ridge(filled[fit], targets[fit], penalty)(filled[tail]) for penalty in PENALTIES)
    errors = [np.mean((targets[tail] - mean) ** 2, axis=0) for mean in trials]
    ridge = _ridge(filled, targets, PENALTIES[np.argmin(errors, axis=0)])

    def expect(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = ridge(_fill(features))
        return mean, np.ones_like(mean)

    return _learned(horizons, expect, features, targets)


def _ridge(features: np.ndarray, targets: np.ndarray, penalty: float | np.ndarray) -> Callable:
    """A function of (N, F) features; the penalty is one or (H,)."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=penalty * len(features)).fit(features, targets)
    return lambda features: model.predict(features).reshape(len(features), -1)


def _fill(features: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(features), np.float32(0), features)


def fit_lightgbm(
    days: np.ndarray, features: np.ndarray, targets: np.ndarray, horizons: list[int], num_threads: int = 1
) -> Learned:
    """Means and spreads by gradient-boosted trees (LightGBM; Ke et al., 2017), two models for each horizon.

    The spread is the expected distance between a target and its mean: a regression of absolute residuals (Davidian &
    Carroll, 1987) whose logarithmic link keeps it positive. Arguments and errors are those of `fit_ridge`; the number
    of threads changes no forecast.
    """
    days, features, targets = _checked(days, features, targets)
    fit, tail = split_tail(days, max(horizons))
    means, spreads = [], []
    for target in map(np.array, targets.T):
        means.append(_boost("regression", features, target, fit, tail, num_threads))
        distance = np.abs(target - means[-1](features))
        spreads.append(_boost("poisson", features, distance, fit, tail, num_threads))

    def expect(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, spread = (np.stack([model(features) for model in models], axis=1) for models in (means, spreads))
        return mean, spread

    return _learned(horizons, expect, features, targets)


def _boost(
    objective: str, features: np.ndarray, target: np.ndarray, fit: np.ndarray, tail: np.ndarray, num_threads: int
) -> Callable:
    """A function of (N, F) features: as many trees as serve the tail best, grown again on all rows."""
    import lightgbm

    options = TREES | {"objective": objective, "num_threads": num_threads}
    early = lightgbm.Dataset(features[fit], target[fit], params=options)
    late = early.create_valid(features[tail], target[tail])
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    trees = lightgbm.train(options, early, MAX_TREES, valid_sets=[late], callbacks=[stop]).best_iteration
    model = lightgbm.train(options, lightgbm.Dataset(features, target), trees)
    return lambda features: model.predict(features, num_threads=num_threads).astype(np.float32)


def _learned(horizons: list[int], expect: Callable, features: np.ndarray, targets: np.ndarray) -> Learned:
    mean, spread = expect(features)
    return Learned(list(horizons), expect, (targets - mean) / spread)


LEARNED = {"ridge": fit_ridge, "lightgbm": fit_lightgbm}


# --- rows ---


def split_tail(days: np.ndarray, purge: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) masks of the tail of the dates and of what lies more than `purge` dates before its first: fit, tail.

    Raises:
        ValueError: fewer than `MIN_ROWS` steps in one of them.
    """
    calendar, position = np.unique(days, return_inverse=True)
    first = len(calendar) - round(TAIL * len(calendar))
    fit, tail = position < first - purge, position >= first
    if min(fit.sum(), tail.sum()) < MIN_ROWS:
        raise ValueError(
            f"learned baselines need {MIN_ROWS} steps in the last {TAIL:.0%} of the training dates and before them, "
            f"got {tail.sum()} and {fit.sum()} of {len(calendar)} dates"
        )
    return fit, tail


def evenly_spaced(count: int, limit: int = MAX_ROWS) -> np.ndarray:
    """At most `limit` increasing indices of `count` rows, one at random of each stretch: no weekday is left out."""
    if count <= limit:
        return np.arange(count)
    places = np.arange(limit) + np.random.default_rng(0).random(limit)
    return np.unique((places * (count / limit)).astype(np.int64))


def refuse_not_finite(targets: np.ndarray) -> None:
    finite = np.isfinite(targets)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(f"target {targets[row, column]} in row {row}, column {column}: every target must be finite")


def _checked(days: np.ndarray, features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, ...]:
    refuse_not_finite(targets)
    rows = evenly_spaced(len(days))
    return days[rows], features[rows].astype(np.float32), targets[rows].astype(np.float32)
