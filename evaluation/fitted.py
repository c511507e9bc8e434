"""Columns of a forecast table by baselines that learn: from the histories of the training to those at each cutoff."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from spaceexploreai.evaluation.baselines import Training, distribution, levels_of
from spaceexploreai.evaluation.learned import LEARNED, evenly_spaced
from spaceexploreai.evaluation.neural import NEURAL, Contexts
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries, cumulative_probability

# Shapes: N training steps, P places that are forecast from, T steps of a history, H horizons, Q quantile levels


def forecast_learned(forecasts: pd.DataFrame, training: Training, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Columns `mean, q…, p_up` of a forecast table, of each baseline that is named.

    Args:
        forecasts: forecast table with an index 0 to N - 1; its horizons are among those of the training.
        training: what they are fitted to and read.
        names: of `LEARNED` and `NEURAL`.

    Raises:
        ValueError: a cutoff or a horizon that the training's histories do not have.
    """
    levels = np.array(levels_of(forecasts))
    learn = _training_places(training.labels)
    learn = learn[evenly_spaced(len(learn))]
    days, scale = _read(training.series, learn, "dates"), _read(training.series, learn, "scale")
    labels = np.stack([training.labels[which][step] for which, step in learn.tolist()])
    targets = labels / (scale[:, None] * np.sqrt(training.horizons))
    places, rows, columns = _cutoffs(forecasts, training)
    known = _read(training.series, places, "scale")
    found = {}
    for name in names:
        if name in LEARNED:
            features, new = (_read(training.series, those, "values") for those in (learn, places))
            fitted = LEARNED[name](days, features, targets, training.horizons)
        else:
            features, new = (Contexts(training.series, those, training.context_length) for those in (learn, places))
            fitted = NEURAL[name](days, features, targets, training.horizons, levels)
        mean, quantiles = fitted.forecast(new, known, levels)
        found[name] = _lay_out(mean[rows, columns], quantiles[rows, columns], levels)
    return found


def _training_places(labels: Sequence[np.ndarray]) -> np.ndarray:
    """(N, 2) series and step of all that is known at every horizon."""
    steps = [np.flatnonzero(np.isfinite(one).all(axis=1)) for one in labels]
    return np.concatenate([np.stack([np.full_like(own, which), own], axis=1) for which, own in enumerate(steps)])


def _read(series: Sequence[EncodedSeries], places: np.ndarray, name: str) -> np.ndarray:
    """(N, …) values of an attribute of the series at (N, 2) places, each with a series and a step of it."""
    example = getattr(series[0], name)
    found = np.empty((len(places), *example.shape[1:]), example.dtype)
    for which in np.unique(places[:, 0]).tolist():
        own = places[:, 0] == which
        found[own] = getattr(series[which], name)[places[own, 1]]
    return found


def _cutoffs(forecasts: pd.DataFrame, training: Training) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The (P, 2) places that are forecast from, and of each row of the table which of them and which horizon."""
    absent = sorted(set(forecasts["horizon"]) - set(training.horizons))
    if absent:
        raise ValueError(f"horizon {absent[0]} is not one of the training, which has {list(training.horizons)}")
    steps = pd.concat([_steps(one, which, forecasts["cutoff"].min()) for which, one in enumerate(training.series)])
    origins = forecasts[["ticker", "cutoff"]].drop_duplicates(ignore_index=True)
    found = origins.merge(steps, how="left", validate="1:1")
    unknown = found["step"].isna()
    if unknown.any():
        row = found.loc[unknown.idxmax()]
        raise ValueError(f"the training's histories have no step of {row['ticker']} on {row['cutoff']:%Y-%m-%d}")
    rows = forecasts[["ticker", "cutoff"]].merge(origins.reset_index(), how="left", validate="m:1")["index"]
    columns = np.searchsorted(training.horizons, forecasts["horizon"])
    return found[["series", "step"]].to_numpy(dtype=int), rows.to_numpy(), columns


def _steps(one: EncodedSeries, which: int, first: pd.Timestamp) -> pd.DataFrame:
    start = np.searchsorted(one.dates, first.to_datetime64())
    steps = np.arange(start, len(one.dates))
    return pd.DataFrame({"ticker": one.ticker, "cutoff": one.dates[start:], "series": which, "step": steps})


def _lay_out(mean: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> pd.DataFrame:
    quantiles = quantiles.astype(np.float64)
    p_up = 1 - cumulative_probability(quantiles, levels, 0.0)
    return distribution(mean.astype(np.float64), quantiles, p_up, levels)
