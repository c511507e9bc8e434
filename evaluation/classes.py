"""Down, flat or up: confusion matrix and log-loss of a forecast table with a column `band`.

An outcome is flat within ±band, a log-return. The model's probabilities are its columns `p_down, p_flat, p_up`, or,
where it has none, follow from its quantiles as those of the baselines do.
"""

import numpy as np
import pandas as pd

from spaceexploreai.evaluation.baselines import baselines_of, levels_of, quantile_columns, require_columns
from spaceexploreai.evaluation.inference import date_codes, diebold_mariano, skill_with_error
from spaceexploreai.feature_extraction_spaceexplore import cumulative_probability

CLASSES = ("down", "flat", "up")
LEAST = 1e-6  # a class that was held impossible costs this, not infinity

# Shapes: N rows


def classes(y: np.ndarray, band: np.ndarray) -> np.ndarray:
    """(N,) 0, 1 or 2: down, flat or up."""
    return 1 + (y > band).astype(int) - (y < -band).astype(int)


def class_probabilities(quantiles: np.ndarray, levels: np.ndarray, band: np.ndarray) -> np.ndarray:
    """(N, 3) of (N, Q) quantiles, between which they are interpolated; beyond the outermost nothing is."""
    down, not_up = (cumulative_probability(quantiles + side * band[:, None], levels, 0.0) for side in (1, -1))
    return np.stack([down, not_up - down, 1 - not_up], axis=1)


def log_losses(true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(N,) of (N,) classes and their (N, 3) probabilities."""
    return -np.log(probabilities[np.arange(len(true)), true].clip(LEAST))


def confusion_matrix(true: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Counts: a row for each class that came true, a column for each that was the most probable."""
    counts = np.zeros((len(CLASSES), len(CLASSES)), dtype=int)
    np.add.at(counts, (true, probabilities.argmax(axis=1)), 1)
    return pd.DataFrame(counts, pd.Index(CLASSES, name="true"), pd.Index(CLASSES, name="forecast"))


def probabilities_of(forecasts: pd.DataFrame, name: str = "model") -> np.ndarray:
    """(N, 3) of the model or a baseline."""
    own = [f"p_{one}" for one in CLASSES]
    if name == "model" and set(own) <= set(forecasts):
        return forecasts[own].to_numpy()
    levels = np.array(levels_of(forecasts))
    quantiles = forecasts[quantile_columns(levels, "" if name == "model" else f"{name}_")].to_numpy()
    return class_probabilities(quantiles, levels, forecasts["band"].to_numpy())


def forecast_classes(forecasts: pd.DataFrame, name: str = "model") -> tuple[np.ndarray, np.ndarray]:
    """The (N,) classes that came true and the (N, 3) probabilities of the model or a baseline, of rows with a `y`."""
    known = forecasts[np.isfinite(forecasts["y"])]
    return classes(known["y"].to_numpy(), known["band"].to_numpy()), probabilities_of(known, name)


def score_classes(forecasts: pd.DataFrame) -> pd.DataFrame:
    """Scores classes on the rows with finite `y`, the model beside every baseline, as `metrics.score` does.

    `base_rate` is the share of the most frequent class. `log_loss_skill` is over ewma, with its standard error;
    dm_log_loss_t and its p are Diebold and Mariano's, positive where the model is better.

    Returns:
        Tidy table `horizon, metric, model, zero, …`.

    Raises:
        ValueError: a column is missing, or no row has a finite y.
    """
    require_columns(forecasts, ["cutoff", "horizon", "y", "band"])
    known, names = forecasts[np.isfinite(forecasts["y"])], ["model", *baselines_of(forecasts)]
    if known.empty:
        raise ValueError(f"nothing to score: none of the {len(forecasts)} forecasts has a realised return y yet")
    tables = [_score_horizon(rows, names).assign(horizon=horizon) for horizon, rows in known.groupby("horizon")]
    return pd.concat(tables, ignore_index=True)[["horizon", "metric", *names]]


def _score_horizon(rows: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    horizon, dates = int(rows["horizon"].iloc[0]), date_codes(rows["cutoff"].to_numpy())
    found, losses = {}, {}
    for name in names:
        true, probabilities = forecast_classes(rows, name)
        losses[name] = log_losses(true, probabilities)
        found[name] = {
            "n": float(len(true)),
            "dates": float(dates.max() + 1),
            "accuracy": float(np.mean(probabilities.argmax(axis=1) == true)),
            "base_rate": np.bincount(true).max() / len(true),
            "log_loss": float(losses[name].mean()),
        }
    scores = pd.DataFrame(found)
    skills = [skill_with_error(loss, losses["ewma"], dates, horizon) for loss in losses.values()]
    scores.loc["log_loss_skill"], scores.loc["log_loss_skill_se"] = zip(*skills, strict=True)
    tests = [diebold_mariano(losses["model"], loss, dates, horizon) for loss in losses.values()]
    scores.loc["dm_log_loss_t"], scores.loc["dm_log_loss_p"] = zip(*tests, strict=True)
    return scores.rename_axis("metric").reset_index()
