"""Pictures of how a forecaster fails: calibration, rank correlation through time, confusion, idle experts.

Beside the model stands a baseline wherever there is one. Bands are 95 % intervals of the model's line, by dates.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from spaceexploreai.evaluation.baselines import baselines_of, quantile_columns, quantile_levels, require_columns
from spaceexploreai.evaluation.classes import CLASSES, confusion_matrix, forecast_classes
from spaceexploreai.evaluation.inference import (
    critical_value,
    date_codes,
    mean_with_error,
    standard_error,
    t_value,
)
from spaceexploreai.evaluation.metrics import pit_histogram
from spaceexploreai.evaluation.plots import (
    DPI,
    INK,
    MAX_PANELS,
    MODEL,
    NAIVE,
    days,
    label_dates,
    middle_horizon,
    with_outcome,
)
from spaceexploreai.evaluation.ranking import MIN_TICKERS, ic_by_date

ROLLING = 60  # dates
MAX_RIVALS = 2

# Shapes: N rows, Q quantile levels, D dates, L layers with experts, E experts


def plot_calibration(forecasts: pd.DataFrame) -> Figure:
    """Draws, for each of at most four horizons, how often outcomes were below each quantile, and where among the
    quantiles they fell (PIT histogram, as a density); the model with its band, and ewma.

    Args:
        forecasts: forecast table with `y`, the model's quantiles and those of ewma.

    Raises:
        ValueError: a column is missing or no row has a finite `y`.
    """
    levels = quantile_levels(forecasts)
    columns = {name: quantile_columns(levels, prefix) for name, prefix in (("model", ""), ("ewma", "ewma_"))}
    require_columns(forecasts, ["cutoff", "horizon", "y", *columns["model"], *columns["ewma"]])
    known = with_outcome(forecasts)
    horizons = spread(known["horizon"])
    figure = Figure(figsize=(9, 2.7 * len(horizons) + 0.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(horizons), 2, squeeze=False, sharex=True)
    for (left, right), horizon in zip(panels, horizons, strict=True):
        rows = known[known["horizon"] == horizon]
        quantiles = {name: rows[own].to_numpy() for name, own in columns.items()}
        _draw_reliability(left, rows, quantiles, np.array(levels), horizon)
        _draw_pit(right, rows["y"].to_numpy(), quantiles, np.array(levels))
        left.set_ylabel(f"{days(horizon)}\nshare below")
    panels[0, 0].set_title("outcomes below each quantile")
    panels[0, 1].set_title("outcomes between quantiles (PIT)")
    for axes in panels[-1]:
        axes.set_xlabel("quantile level")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def plot_rank_ic(forecasts: pd.DataFrame) -> Figure:
    """Draws the rank correlation of forecasts and outcomes across tickers through time, at the middle horizon: the
    mean of the last 60 dates with its band, and the sum of all so far; beside the model the two baselines with the
    strongest ranks.

    Args:
        forecasts: forecast table with `y`, the baselines and `mean`; of classes p_up - p_down takes its place.

    Raises:
        ValueError: a column is missing, or no date has `MIN_TICKERS` tickers to rank.
    """
    series = {"model": ranks_of_model(forecasts)}
    rows = middle_horizon(forecasts)
    if series["model"].empty:
        most = rows.groupby("cutoff").size().max()
        raise ValueError(
            f"nothing to rank: a date needs {MIN_TICKERS} tickers whose forecasts differ, here it has {most} at most"
        )
    series |= _strongest_ranks(rows)
    horizon = int(rows["horizon"].iloc[0])
    figure = Figure(figsize=(9, 6.2), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    styles = ((MODEL, "-", 2.0), (NAIVE, "--", 1.4), (INK, ":", 1.6))
    for (name, one), (color, line, width) in zip(series.items(), styles, strict=False):
        style = {"color": color, "linestyle": line, "linewidth": width}
        t = t_value(one.mean(), standard_error(one.to_numpy(), horizon))
        lower.plot(one.index, one.cumsum(), label=f"{name}: mean {one.mean():+.3f} (t {t:+.1f})", **style)
        rolling = one.rolling(min(ROLLING, len(one))).mean()
        upper.plot(rolling.index, rolling, **style)
    _draw_rank_band(upper, series["model"], horizon)
    upper.set_ylabel(f"RankIC, mean of {min(ROLLING, len(series['model']))} dates")
    lower.set_ylabel("RankIC, sum so far")
    for axes in (upper, lower):
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.margins(x=0.01)
        axes.grid(alpha=0.25)
    label_dates(lower)
    upper.set_title(f"RankIC over {days(horizon)}: {rows['ticker'].nunique()} tickers, {len(series['model'])} dates")
    upper.legend(loc="best", fontsize=9)
    lower.legend(loc="best", fontsize=9)
    return figure


def plot_confusion(forecasts: pd.DataFrame) -> Figure:
    """Draws, for each of at most four horizons, which class came true and which was the most probable: shares of the
    row, and counts.

    Args:
        forecasts: forecast table with `y` and `band`; the probabilities are its own, or follow from its quantiles.

    Raises:
        ValueError: a column is missing or no row has a finite `y`.
    """
    require_columns(forecasts, ["horizon", "y", "band"])
    known = with_outcome(forecasts)
    horizons = spread(known["horizon"])
    columns = min(len(horizons), 2)
    rows = -(-len(horizons) // columns)
    figure = Figure(figsize=(4.5 * columns, 4 * rows), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for horizon, axes in zip(horizons, panels, strict=False):
        true, probabilities = forecast_classes(known[known["horizon"] == horizon])
        counts = confusion_matrix(true, probabilities)
        right, most = np.trace(counts) / len(true), counts.sum(axis=1).max() / len(true)
        axes.set_title(f"{days(horizon)}: right {right:.1%}, base rate {most:.1%}", fontsize=9.5)
        _draw_matrix(axes, counts)
    for axes in panels:  # those left over
        axes.set_axis_off()
    return figure


def plot_expert_usage(load: np.ndarray) -> Figure:
    """Draws which share of the choices each expert got, a panel for each layer; balance is 1/E.

    Args:
        load: (L, E) shares, rows of which sum to 1, as of the model's `expert_load`.

    Raises:
        ValueError: the load has another shape, or a row does not sum to 1.
    """
    load = np.asarray(load, dtype=float)
    if load.ndim != 2 or not load.size or not np.allclose(load.sum(axis=1), 1, atol=1e-3):
        raise ValueError(f"the load of experts must be (layers, experts), each row of sum 1, got {load.tolist()}")
    layers, experts = load.shape
    figure = Figure(figsize=(9, 1.5 * layers + 1.2), dpi=DPI, layout="constrained")
    panels = figure.subplots(layers, squeeze=False, sharex=True, sharey=True)[:, 0]
    for layer, (axes, shares) in enumerate(zip(panels, load, strict=True), 1):
        axes.bar(np.arange(experts), shares, color="0.75", edgecolor="0.3", label="share of the choices")
        axes.axhline(1 / experts, color=NAIVE, linestyle="--", linewidth=1.4, label=f"balance, 1/{experts}")
        axes.set_ylabel(f"MoE layer {layer}")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="y", alpha=0.25)
    panels[-1].set_xlabel("expert")
    panels[-1].set_xticks(np.arange(experts)[:: -(-experts // 16)])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


# --- rows and horizons -----------------------------------------------------------------------------------------------


def spread(horizons: pd.Series) -> list[int]:
    """The distinct horizons; of more than `MAX_PANELS` as many, evenly chosen from the first to the last."""
    found = np.unique(horizons)
    places = np.linspace(0, len(found) - 1, min(len(found), MAX_PANELS)).round().astype(int)
    return found[places].tolist()


# --- ranks -----------------------------------------------------------------------------------------------------------


def ranks_of_model(forecasts: pd.DataFrame) -> pd.Series:
    """The model's rank correlation at each date that has one, at the middle horizon."""
    require_columns(forecasts, ["ticker", "cutoff", "horizon", "y"])
    rows = middle_horizon(forecasts)
    if "mean" not in rows:
        require_columns(rows, ["p_up", "p_down"])
        return _ranks(rows, rows["p_up"] - rows["p_down"])
    return _ranks(rows, rows["mean"])


def _strongest_ranks(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Of the `MAX_RIVALS` baselines whose mean is furthest from zero: picked with hindsight, as strong as they get."""
    names = baselines_of(rows)
    require_columns(rows, [f"{name}_mean" for name in names])
    series = {name: _ranks(rows, rows[f"{name}_mean"]) for name in names}
    ranked = sorted((name for name in names if len(series[name])), key=lambda name: -abs(series[name].mean()))
    return {name: series[name] for name in ranked[:MAX_RIVALS]}


def _ranks(rows: pd.DataFrame, mean: pd.Series) -> pd.Series:
    return ic_by_date(rows["y"].to_numpy(), mean.to_numpy(), rows["cutoff"].to_numpy())


# --- panels ----------------------------------------------------------------------------------------------------------


def _draw_reliability(
    axes: Axes, rows: pd.DataFrame, quantiles: dict[str, np.ndarray], levels: np.ndarray, horizon: int
) -> None:
    """An outcome on a quantile, as of a price that did not move, counts half."""
    y, dates = rows["y"].to_numpy()[:, None], date_codes(rows["cutoff"].to_numpy())
    axes.plot([0, 1], [0, 1], color="0.4", linewidth=0.8, label="calibrated")
    for name, style in (("ewma", {"color": NAIVE, "linestyle": "--"}), ("model", {"color": MODEL, "marker": "."})):
        below = (np.sign(quantiles[name] - y) + 1) / 2
        shares, errors = zip(*(mean_with_error(one, dates, horizon) for one in below.T), strict=True)
        axes.plot(levels, shares, linewidth=1.5, label=name, **style)
    half = critical_value(dates.max() + 1, horizon) * np.array(errors)
    lower, upper = (np.clip(shares + side * half, 0, 1) for side in (-1, 1))
    axes.fill_between(levels, lower, upper, color="0.8", linewidth=0, label="model's 95 % band")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)


def _draw_pit(axes: Axes, y: np.ndarray, quantiles: dict[str, np.ndarray], levels: np.ndarray) -> None:
    pit = {name: pit_histogram(y, own, levels) for name, own in quantiles.items()}
    edges = [0, *pit["model"]["upper"]]
    density = {name: own["share"] / own["expected"] for name, own in pit.items()}
    axes.stairs(density["model"], edges, fill=True, facecolor="0.8", edgecolor=MODEL, linewidth=1.2, label="model")
    axes.stairs(density["ewma"], edges, color=NAIVE, linestyle="--", linewidth=1.4, label="ewma")
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.set_ylim(0, max(2.0, 1.1 * max(own.max() for own in density.values())))
    axes.set_ylabel("share / expected")
    axes.grid(alpha=0.25)


def _draw_rank_band(axes: Axes, series: pd.Series, horizon: int) -> None:
    """Around the rolling mean, of the error that the same dates give it."""
    length = min(ROLLING, len(series))
    rolling = series.rolling(length)
    half = critical_value(length, horizon) * rolling.apply(lambda one: standard_error(one, horizon), raw=True)
    axes.fill_between(
        series.index,
        rolling.mean() - half,
        rolling.mean() + half,
        color="0.85",
        linewidth=0,
        label="model's 95 % band",
    )


def _draw_matrix(axes: Axes, counts: pd.DataFrame) -> None:
    shares = counts / counts.sum(axis=1).clip(lower=1).to_numpy()[:, None]
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        share, count = shares.iat[row, column], counts.iat[row, column]
        color = "white" if share > 0.5 else INK
        axes.text(column, row, f"{share:.0%}\n{count:,}", ha="center", va="center", color=color, fontsize=10)
    axes.set_xticks(range(len(CLASSES)), CLASSES)
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set_xlabel("forecast")
    axes.set_ylabel("came true")
