"""Scores of a forecast table: every metric, the model beside every baseline, as numbers and as text."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from spaceexploreai.evaluation.baselines import (
    baselines_of,
    levels_of,
    quantile_columns,
    quantile_levels,
    require_columns,
)
from spaceexploreai.evaluation.classes import score_classes
from spaceexploreai.evaluation.inference import (
    critical_value,
    date_codes,
    diebold_mariano,
    direction_t,
    effective_count,
    mean_with_error,
    skill_with_error,
    standard_error,
    t_value,
    wilson_interval,
)
from spaceexploreai.evaluation.metrics import (
    crps,
    direction_accuracy,
    direction_base_rate,
    mae,
    mase,
    mse,
    pinball,
    pinball_of_rows,
    rmse,
    weighted_interval_score,
)
from spaceexploreai.evaluation.ranking import decile_spread_by_date, ic_by_date, turnover

REGIMES = ("calm", "normal", "wild")
INTERVALS = (50, 80, 90)  # percent


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

    Errors and scores are in log-returns (mse squared), shares and correlations unscaled. `_se` is a standard error and
    `_t` a t statistic, both of the series by date (see `inference.py`); NaN where a metric is undefined.

    - mse_skill is over zero (Campbell & Thompson's R² out of sample), crps_skill over ewma.
    - direction_low, direction_high: Wilson's interval for as many independent rows as the standard error by date
      stands for, direction_n; direction_accuracy_t is of the covariance of signs: always saying up counts for nothing.
    - icir: mean of the rank correlations over their standard deviation, of dates.
    - dm_mse_t, dm_crps_t and their p: Diebold and Mariano's test of the model against the baseline of the column;
      positive where the model is better.

    Args:
        forecasts: forecast table with `y` and the baseline columns of `add_baselines`.

    Returns:
        Tidy table `horizon, metric, model, zero, drift, last, ewma, …`, one row per horizon and metric.

    Raises:
        ValueError: a column is missing, no row has a finite y, or a scored row has a forecast that is not finite.
    """
    known, names = _known(forecasts)
    tables = [_score_horizon(rows, names).assign(horizon=horizon) for horizon, rows in known.groupby("horizon")]
    return pd.concat(tables, ignore_index=True)[["horizon", "metric", "model", *names]]


def score_table(forecasts: pd.DataFrame) -> pd.DataFrame:
    """`score`, or of a table of classes `score_classes`."""
    return score_classes(forecasts) if "band" in forecasts else score(forecasts)


def score_by(forecasts: pd.DataFrame, by: str) -> pd.DataFrame:
    """As `score_table`, for each "year" of the cutoffs, volatility "regime", "ticker" or "fold": the first column.

    The regime of a cutoff is how wide `ewma` was then, as the median over its tickers at the shortest horizon: a third
    of the cutoffs each are calm, normal and wild.
    """
    if by not in _GROUPS:
        raise ValueError(f"by must be one of {', '.join(_GROUPS)}, got {by!r}")
    require_columns(forecasts, ["ticker", "cutoff", "horizon", "y"])
    known = np.isfinite(forecasts["y"])
    groups = forecasts[known].groupby(_GROUPS[by](forecasts)[known].rename(by), observed=True)
    tables = {key: score_table(rows) for key, rows in groups}
    return pd.concat(tables, names=[by]).reset_index(by).reset_index(drop=True)


def _regime(forecasts: pd.DataFrame) -> pd.Series:
    lowest, *_, highest = quantile_columns(levels_of(forecasts), "ewma_")
    shortest = forecasts["horizon"] == forecasts["horizon"].min()
    width = (forecasts[highest] - forecasts[lowest])[shortest].groupby(forecasts["cutoff"]).median()
    third = np.ceil(width.rank(method="first") / len(width) * len(REGIMES)).astype(int) - 1
    regime = pd.Series(pd.Categorical.from_codes(third, REGIMES, ordered=True), width.index)
    return forecasts["cutoff"].map(regime)


_GROUPS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "year": lambda forecasts: forecasts["cutoff"].dt.year,
    "regime": _regime,
    "ticker": lambda forecasts: forecasts["ticker"],
    "fold": lambda forecasts: forecasts["fold"],
}


def _known(forecasts: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows with an outcome, and the names of the baselines beside the model."""
    names = baselines_of(forecasts)
    columns = _forecast_columns(quantile_levels(forecasts), names)
    require_columns(forecasts, ["ticker", "cutoff", "horizon", "y", *columns, "naive_error"])
    known = forecasts[np.isfinite(forecasts["y"])]
    if known.empty:
        raise ValueError(f"nothing to score: none of the {len(forecasts)} forecasts has a realised return y yet")
    _refuse_not_finite(known, columns)
    return known, names


def _forecast_columns(levels: list[float], names: list[str]) -> list[str]:
    prefixes = ["", *(f"{name}_" for name in names)]
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


def _score_horizon(rows: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Table `metric, model, zero, …` of the rows of one horizon."""
    horizon, dates = int(rows["horizon"].iloc[0]), date_codes(rows["cutoff"].to_numpy())
    prefixes = {"model": "", **{name: f"{name}_" for name in names}}
    scores = pd.DataFrame({name: _score_one(rows, prefix, dates) for name, prefix in prefixes.items()})
    losses = {name: _losses(rows, prefix) for name, prefix in prefixes.items()}
    for loss, reference in (("mse", "zero"), ("crps", "ewma")):
        skills = [skill_with_error(one[loss], losses[reference][loss], dates, horizon) for one in losses.values()]
        scores.loc[f"{loss}_skill"], scores.loc[f"{loss}_skill_se"] = zip(*skills, strict=True)
        tests = [diebold_mariano(losses["model"][loss], one[loss], dates, horizon) for one in losses.values()]
        scores.loc[f"dm_{loss}_t"], scores.loc[f"dm_{loss}_p"] = zip(*tests, strict=True)
    return scores.rename_axis("metric").reset_index()


def _losses(rows: pd.DataFrame, prefix: str) -> dict[str, np.ndarray]:
    levels, y = np.array(quantile_levels(rows)), rows["y"].to_numpy()
    quantiles = rows[quantile_columns(levels, prefix)].to_numpy()
    return {
        "mse": (y - rows[f"{prefix}mean"].to_numpy()) ** 2,
        "crps": 2 * pinball_of_rows(y, quantiles, levels),
    }


def _score_one(rows: pd.DataFrame, prefix: str, dates: np.ndarray) -> dict[str, float]:
    """Every metric of one forecaster, whose columns start with `prefix`, by itself."""
    levels, horizon = np.array(quantile_levels(rows)), int(rows["horizon"].iloc[0])
    y, mean = rows["y"].to_numpy(), rows[f"{prefix}mean"].to_numpy()
    quantiles = rows[quantile_columns(levels, prefix)].to_numpy()
    return {
        "n": float(len(y)),
        "dates": float(dates.max() + 1),
        "mse": mse(y, mean),
        "rmse": rmse(y, mean),
        "mae": mae(y, mean),
        "mase": mase(y, mean, rows["naive_error"].to_numpy()),
        **_direction(y, mean, dates, horizon),
        "pinball": pinball(y, quantiles, levels),
        "crps": crps(y, quantiles, levels),
        "wis": weighted_interval_score(y, quantiles, levels),
        **_coverages(y, rows, prefix, dates, horizon),
        **_ranking(rows, mean, horizon),
    }


def _direction(y: np.ndarray, mean: np.ndarray, dates: np.ndarray, horizon: int) -> dict[str, float]:
    accuracy, moved = direction_accuracy(y, mean), y != 0
    found = {
        "direction_accuracy": accuracy,
        "direction_base_rate": direction_base_rate(y),
        "direction_up_rate": float(np.mean(y[moved] > 0)) if moved.any() else float("nan"),
        **dict.fromkeys(("direction_n", "direction_low", "direction_high", "direction_accuracy_t"), float("nan")),
    }
    if np.isfinite(accuracy):
        y, mean, dates = y[moved], mean[moved], date_codes(dates[moved])
        hits, error = mean_with_error((np.sign(mean) == np.sign(y)).astype(float), dates, horizon)
        count = effective_count(hits, error, len(y))
        found["direction_n"] = count
        critical = critical_value(int(dates.max()) + 1, horizon)
        found["direction_low"], found["direction_high"] = wilson_interval(hits, count, critical)
        found["direction_accuracy_t"] = direction_t(y, mean, dates, horizon)
    return found


def _coverages(y: np.ndarray, rows: pd.DataFrame, prefix: str, dates: np.ndarray, horizon: int) -> dict[str, float]:
    """Coverage of the central intervals that the levels have, and the standard error of the widest."""
    found = {}
    for percent in INTERVALS:
        lower, upper = quantile_columns([(100 - percent) / 200, (100 + percent) / 200], prefix)
        known = lower in rows and upper in rows
        inside = (y >= rows[lower].to_numpy()) & (y <= rows[upper].to_numpy()) if known else np.full(len(y), np.nan)
        found[f"coverage_{percent}"], error = mean_with_error(inside.astype(float), dates, horizon)
    return {**found, f"coverage_{INTERVALS[-1]}_se": error}


def _ranking(rows: pd.DataFrame, mean: np.ndarray, horizon: int) -> dict[str, float]:
    y, cutoff, ticker = (rows[column].to_numpy() for column in ("y", "cutoff", "ticker"))
    ranks = ic_by_date(y, mean, cutoff)
    series = {"ic": ic_by_date(y, mean, cutoff, ranks=False), "rank_ic": ranks}
    series["decile_spread"] = decile_spread_by_date(y, mean, cutoff)
    found = {}
    for name, values in series.items():
        found[name] = float(values.mean())
        found[f"{name}_t"] = t_value(found[name], standard_error(values.to_numpy(), horizon) if len(values) else 0.0)
    found["rank_ic_dates"] = float(len(ranks))
    return {**found, "icir": float(ranks.mean() / ranks.std()), "turnover": turnover(mean, cutoff, ticker)}


# metric -> (label, factor, format): every log-return in the same unit, so that one line of text explains them all
_FORMATS = {
    "mse": ("MSE (1e-4)", 1e4, ".3f"),
    "mse_skill": ("MSE skill over zero (%)", 1e2, "+.2f"),
    "rmse": ("RMSE (1e-4)", 1e4, ".2f"),
    "mae": ("MAE (1e-4)", 1e4, ".2f"),
    "mase": ("MASE", 1, ".3f"),
    "crps": ("CRPS (1e-4)", 1e4, ".2f"),
    "crps_skill": ("CRPS skill over ewma (%)", 1e2, "+.2f"),
    "coverage_50": ("coverage of 50 % interval (%)", 1e2, ".1f"),
    "coverage_90": ("coverage of 90 % interval (%)", 1e2, ".1f"),
    "direction_accuracy": ("direction accuracy (%)", 1e2, ".1f"),
    "direction_base_rate": ("direction base rate (%)", 1e2, ".1f"),
    "ic": ("IC", 1, "+.3f"),
    "rank_ic": ("rank IC", 1, "+.3f"),
    "icir": ("ICIR, of dates", 1, "+.2f"),
    "decile_spread": ("decile spread (1e-4)", 1e4, "+.1f"),
    "turnover": ("turnover from cutoff to cutoff (%)", 1e2, ".0f"),
    "dm_mse_t": ("DM t of the model's MSE", 1, "+.1f"),
    "dm_crps_t": ("DM t of the model's CRPS", 1, "+.1f"),
    "accuracy": ("accuracy of the class (%)", 1e2, ".1f"),
    "base_rate": ("share of the most frequent class (%)", 1e2, ".1f"),
    "log_loss": ("log-loss (nats)", 1, ".4f"),
    "log_loss_skill": ("log-loss skill over ewma (%)", 1e2, "+.2f"),
    "dm_log_loss_t": ("DM t of the model's log-loss", 1, "+.1f"),
}
NOTE = (
    "Errors are in log-returns over the whole horizon, in units of 1e-4 (MSE: 1e-4 squared log-return). ± is one "
    "standard error, in brackets stands a t statistic, both of the series by date (Newey-West). DM: Diebold-Mariano "
    "test against the forecast of the column, positive where the model is better."
)


def format_scores(scores: pd.DataFrame) -> str:
    """The table of `score` for a person: per horizon a Markdown table, aligned for the terminal, a dash for NaN."""
    blocks = [f"Horizon {title}\n\n{_markdown(cells)}" for title, cells in tabulate(scores)]
    return "\n\n".join([NOTE, *blocks])


def tabulate(scores: pd.DataFrame) -> list[tuple[str, list[list[str]]]]:
    """For each horizon a title and rows of text, the first of them the header."""
    return [
        (
            f"{horizon} trading day{'s' if horizon > 1 else ''} ({int(values.at['n', 'model']):,} forecasts "
            f"from {int(values.at['dates', 'model']):,} dates)",
            _cells(values.drop(columns="horizon")),
        )
        for horizon, values in scores.set_index("metric").groupby("horizon")
    ]


def _cells(values: pd.DataFrame) -> list[list[str]]:
    cells = [["metric", *values.columns]]
    for metric, (label, factor, spec) in _FORMATS.items():
        # Fewer tickers than `MIN_TICKERS` have no rank correlations; classes have metrics of their own.
        if metric in values.index and values.loc[metric].notna().any():
            cells.append([label, *(_cell(values[name], metric, factor, spec) for name in values)])
    return cells


def _markdown(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [f"|{'-' * (widths[0] + 2)}|" + "|".join("-" * (width + 1) + ":" for width in widths[1:]) + "|"]
    lines = [
        f"| {row[0]:<{widths[0]}} | "
        + " | ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        + " |"
        for row in cells
    ]
    return "\n".join(lines[:1] + rule + lines[1:])


def _cell(values: pd.Series, metric: str, factor: float, spec: str) -> str:
    """A number with its standard error or its t statistic, where it has one."""
    number, error, t = (values.get(f"{metric}{suffix}", np.nan) for suffix in ("", "_se", "_t"))
    if np.isnan(number):
        return "\N{EN DASH}"
    text = format(number * factor, spec)
    text += f" ± {error * factor:{spec.lstrip('+')}}" if error > 0 else ""
    return text + (f" ({t:+.1f})" if np.isfinite(t) else "")
