"""Point, interval and distribution metrics of a forecast table, the model beside the naive baselines."""

import numpy as np
import pandas as pd

from spaceexploreai.evaluation.baselines import BASELINES, quantile_columns, quantile_levels, require_columns

MIN_TICKERS = 10  # a cross-section smaller than this has no meaningful rank correlation

# Shapes: N rows with known outcome, Q quantile levels. y, mean and quantiles are log-returns.


def mse(y: np.ndarray, mean: np.ndarray) -> float:
    """Mean squared error of (N,) means, in squared log-return."""
    return float(np.mean((y - mean) ** 2))


def rmse(y: np.ndarray, mean: np.ndarray) -> float:
    """Root mean squared error of (N,) means."""
    return float(np.sqrt(mse(y, mean)))


def mae(y: np.ndarray, mean: np.ndarray) -> float:
    """Mean absolute error of (N,) means."""
    return float(np.mean(np.abs(y - mean)))


def direction_accuracy(y: np.ndarray, mean: np.ndarray) -> float:
    """Share of the rows with y ≠ 0 where mean has the sign of y; NaN where there are none or every mean is 0."""
    moved = y != 0
    if not np.any(mean[moved]):
        return float("nan")
    return float(np.mean(np.sign(mean[moved]) == np.sign(y[moved])))


def direction_base_rate(y: np.ndarray) -> float:
    """Share of the more frequent sign among y ≠ 0: what always saying the same direction, the right one, would get."""
    moved = y != 0
    if not np.any(moved):
        return float("nan")
    up = np.mean(y[moved] > 0)
    return float(max(up, 1 - up))


def pinball(y: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> float:
    """Mean pinball loss of (N, Q) quantiles at (Q,) levels, over rows and levels. Koenker & Bassett, 1978."""
    error = y[:, None] - quantiles
    return float(np.mean(np.maximum(levels * error, (levels - 1) * error)))


def crps(y: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> float:
    """Continuous ranked probability score from (N, Q) quantiles: twice the mean pinball loss over the levels.

    Gneiting & Ranjan, 2011, with equal weights; GluonTS' mean weighted quantile loss before its division by sum |y|.
    It leaves out the tails beyond the outermost levels, so compare it only at equal levels.
    """
    return 2 * pinball(y, quantiles, levels)


def crps_skill(crps_forecast: float, crps_reference: float) -> float:
    """Share of the reference's CRPS that the forecast saves, negative if it is worse; NaN if the reference is 0."""
    return 1 - crps_forecast / crps_reference if crps_reference else float("nan")


def coverage(y: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """Share of rows with lower ≤ y ≤ upper, all (N,)."""
    return float(np.mean((lower <= y) & (y <= upper)))


def rank_ic(y: np.ndarray, mean: np.ndarray, cutoff: np.ndarray) -> float:
    """Rank information coefficient: Spearman correlation of mean and y across tickers, averaged over cutoffs.

    Args:
        y, mean: (N,) floats.
        cutoff: (N,) keys of the cross-section a row belongs to.

    Returns:
        The average over cutoffs with at least `MIN_TICKERS` rows where neither side is constant; NaN without any.
    """
    table = pd.DataFrame({"y": y, "mean": mean, "cutoff": cutoff})
    table = table[table.groupby("cutoff")["y"].transform("size") >= MIN_TICKERS]
    ranks = table.groupby("cutoff")[["y", "mean"]].rank()
    ranks -= ranks.groupby(table["cutoff"]).transform("mean")
    products = pd.DataFrame({"xy": ranks["y"] * ranks["mean"], "xx": ranks["y"] ** 2, "yy": ranks["mean"] ** 2})
    sums = products.groupby(table["cutoff"]).sum()
    # A constant side gives 0/0, NaN, which the mean leaves out.
    return float((sums["xy"] / np.sqrt(sums["xx"] * sums["yy"])).mean())


def add_outcomes(forecasts: pd.DataFrame, prices: pd.DataFrame) -> pd.DataFrame:
    """Adds `y`, the realised log-return from the close at `cutoff` to the close at `date`; NaN where either is not in
    the price table, as for days yet to come."""
    close = prices.set_index(["ticker", "date"])["close"]
    start, end = (
        close.reindex(pd.MultiIndex.from_frame(forecasts[["ticker", day]])).to_numpy() for day in ("cutoff", "date")
    )
    return forecasts.assign(y=np.log(end / start))


def score(forecasts: pd.DataFrame) -> pd.DataFrame:
    """Scores a forecast table on its rows with finite `y`, the model beside every baseline.

    Args:
        forecasts: forecast table with `y` and the baseline columns of `add_baselines`.

    Returns:
        Tidy table `horizon, metric, model, zero, drift, ewma`, one row per horizon and metric. Errors and scores are
        in log-returns (mse squared), shares and correlations unscaled; NaN where a metric is undefined.

    Raises:
        ValueError: a column is missing, no row has a finite y, or a scored row has a forecast that is not finite.
    """
    columns = _forecast_columns(quantile_levels(forecasts))
    require_columns(forecasts, ["ticker", "cutoff", "horizon", "y", *columns])
    known = forecasts[np.isfinite(forecasts["y"])]
    if known.empty:
        raise ValueError(f"nothing to score: none of the {len(forecasts)} forecasts has a realised return y yet")
    _refuse_not_finite(known, columns)
    tables = [_score_horizon(rows).assign(horizon=horizon) for horizon, rows in known.groupby("horizon")]
    return pd.concat(tables, ignore_index=True)[["horizon", "metric", "model", *BASELINES]]


def _forecast_columns(levels: list[float]) -> list[str]:
    prefixes = ["", *(f"{name}_" for name in BASELINES)]
    return [column for prefix in prefixes for column in (f"{prefix}mean", *quantile_columns(levels, prefix))]


def _refuse_not_finite(known: pd.DataFrame, columns: list[str]) -> None:
    """A NaN would drop out of one metric and count as a miss in another."""
    finite = np.isfinite(known[columns].to_numpy())
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        bad = known.iloc[row]
        raise ValueError(
            f"{bad['ticker']} has {columns[column]} = {bad[columns[column]]} at cutoff {bad['cutoff']:%Y-%m-%d}, "
            f"horizon {bad['horizon']}: every scored forecast must be finite"
        )


def _score_horizon(rows: pd.DataFrame) -> pd.DataFrame:
    """Table `metric, model, zero, drift, ewma` of the rows of one horizon."""
    scores = pd.DataFrame(
        {"model": _score_one(rows, ""), **{name: _score_one(rows, f"{name}_") for name in BASELINES}}
    )
    scores.loc["crps_skill"] = [crps_skill(value, scores.at["crps", "ewma"]) for value in scores.loc["crps"]]
    return scores.rename_axis("metric").reset_index()


def _score_one(rows: pd.DataFrame, prefix: str) -> dict[str, float]:
    """Every metric of one forecaster, whose columns start with `prefix`."""
    levels = np.array(quantile_levels(rows))
    y, mean = rows["y"].to_numpy(), rows[f"{prefix}mean"].to_numpy()
    quantiles = rows[quantile_columns(levels, prefix)].to_numpy()
    interval = quantile_columns([0.05, 0.95], prefix)
    return {
        "n": float(len(y)),
        "mse": mse(y, mean),
        "rmse": rmse(y, mean),
        "mae": mae(y, mean),
        "direction_accuracy": direction_accuracy(y, mean),
        "direction_base_rate": direction_base_rate(y),
        "pinball": pinball(y, quantiles, levels),
        "crps": crps(y, quantiles, levels),
        "coverage_90": coverage(y, *rows[interval].to_numpy().T) if set(interval) <= set(rows) else float("nan"),
        "rank_ic": rank_ic(y, mean, rows["cutoff"].to_numpy()),
    }


# metric -> (label, factor, format): every log-return in the same unit, so that one line of text explains them all
_FORMATS = {
    "mse": ("MSE (1e-4)", 1e4, ".3f"),
    "rmse": ("RMSE (1e-4)", 1e4, ".2f"),
    "mae": ("MAE (1e-4)", 1e4, ".2f"),
    "pinball": ("pinball loss (1e-4)", 1e4, ".3f"),
    "crps": ("CRPS (1e-4)", 1e4, ".2f"),
    "crps_skill": ("CRPS skill over ewma (%)", 1e2, "+.2f"),
    "coverage_90": ("coverage of 90 % interval (%)", 1e2, ".1f"),
    "direction_accuracy": ("direction accuracy (%)", 1e2, ".1f"),
    "direction_base_rate": ("direction base rate (%)", 1e2, ".1f"),
    "rank_ic": ("rank IC", 1, "+.3f"),
}


def format_scores(scores: pd.DataFrame) -> str:
    """The table of `score` for a person: per horizon a Markdown table, aligned for the terminal, a dash for NaN."""
    blocks = ["Errors are in log-returns over the whole horizon, in units of 1e-4 (MSE: 1e-4 squared log-return)."]
    for horizon, rows in scores.groupby("horizon"):
        values = rows.set_index("metric")
        title = (
            f"Horizon {horizon} trading day{'s' if horizon > 1 else ''} ({int(values.at['n', 'model']):,} forecasts)"
        )
        blocks.append(f"{title}\n\n{_markdown(values)}")
    return "\n\n".join(blocks)


def _markdown(values: pd.DataFrame) -> str:
    names = ["model", *BASELINES]
    cells = [["metric", *names]]
    for metric, (label, factor, spec) in _FORMATS.items():
        numbers = (values.at[metric, name] * factor for name in names)
        cells.append([label, *("\N{EN DASH}" if np.isnan(number) else format(number, spec) for number in numbers)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [f"|{'-' * (widths[0] + 2)}|" + "|".join("-" * (width + 1) + ":" for width in widths[1:]) + "|"]
    lines = [
        f"| {row[0]:<{widths[0]}} | "
        + " | ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        + " |"
        for row in cells
    ]
    return "\n".join(lines[:1] + rule + lines[1:])
