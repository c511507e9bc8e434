"""Pictures of prices: the fan chart of one forecast, predictions beside outcomes through time, equity curves.

Drawn on `matplotlib.figure.Figure` alone: no global state, no display, safe in servers and threads. Lines differ in
style and areas in darkness, so that a print in grey can be read, and widths are those of a page.
"""

from collections.abc import Iterable
from textwrap import wrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from spaceexploreai.evaluation.baselines import quantile_columns, require_columns

DPI = 150
MAX_PANELS = 4
MAX_HISTORY_TICKS = MAX_HORIZON_TICKS = 5
# (lower level, upper level, grey): nested, darker towards the median, told apart in print
INTERVALS = ((0.05, 0.95, "0.9"), (0.1, 0.9, "0.8"), (0.25, 0.75, "0.67"))
FAN_LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)  # their bounds and the median
INK, MODEL, NAIVE = "black", "#0b3d91", "tab:red"
ROSE, FELL = "white", "0.45"  # bodies of candles
LETTERS_PER_INCH = 9  # of a bold title


def stamp(figure: Figure, notices: Iterable[str]) -> Figure:
    """Writes above a whole figure what a reader must know before anything else, such as that it is in sample."""
    width = int(figure.get_figwidth() * LETTERS_PER_INCH)
    lines, below = [line for notice in notices for line in wrap(notice, width)], figure.get_suptitle()
    if lines and not below.startswith(lines[0]):  # once is enough
        figure.suptitle("\n".join([*lines, below] if below else lines), fontsize=11, weight="bold", parse_math=False)
    return figure


def plot_forecast(
    forecasts: pd.DataFrame, prices: pd.DataFrame, ticker: str, history: int = 60, words: Iterable[dict] = ()
) -> Figure:
    """Draws the newest forecast of `ticker` as a fan of prices behind the candles of its last `history` days.

    Args:
        forecasts: forecast table with the ewma columns of `add_baselines` and the quantiles 0.05, 0.1, 0.25, 0.5,
            0.75, 0.9, 0.95.
        prices: validated price table; closes after the cutoff are drawn too, where it has them.
        words: what the time-to-text extractor's `describe` says of the days to the cutoff, with their dates; drawn
            beneath the candles.

    Raises:
        ValueError: a table has no such ticker or column, `prices` no bar on the cutoff, or a word is of later days.
    """
    rows = _newest(forecasts, ticker)
    cutoff = rows["cutoff"].iloc[0]
    bars = prices[prices["ticker"] == ticker]
    past, future = bars[bars["date"] <= cutoff].tail(history), bars[bars["date"] > cutoff]
    if past.empty or past["date"].iloc[-1] != cutoff:
        raise ValueError(f"{ticker} has no bar in the price table on its cutoff {cutoff:%Y-%m-%d}")
    future = future.head(rows["horizon"].iloc[-1])

    words = list(words)
    figure = Figure(figsize=(10, 6.8 if words else 6), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, sharex=True, height_ratios=(8, 1)) if words else [figure.add_subplot()]
    axes, lowest = panels[0], panels[-1]
    _draw_candles(axes, past)
    _draw_fan(axes, rows, past["close"].iloc[-1])
    if len(future):
        axes.plot(
            np.arange(1, len(future) + 1), future["close"], "o:", color=INK, markerfacecolor="white", label="realised"
        )
    axes.axvline(0, color="0.4", linewidth=0.8)
    if words:
        _draw_words(lowest, words, past["date"])
        axes.tick_params(labelbottom=False, which="both")
    _label_trading_days(lowest, past["date"], rows)
    axes.grid(alpha=0.25)
    axes.set_ylabel("adjusted close (currency of the quotes)")
    last = rows.iloc[-1]
    axes.set_title(
        f"{ticker}: forecast from the close of {cutoff:%Y-%m-%d}\n"
        f"P(up after {days(last['horizon'])}) = {last['p_up']:.0%}",
        parse_math=False,
    )
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def price_fan(rows: pd.DataFrame, close: float, levels: Iterable[float], prefix: str = "") -> pd.DataFrame:
    """Quantiles of one forecast as prices, fanning out of the last close.

    A price quantile is close·exp(log-return quantile): quantiles, unlike the mean, pass through the exponential.

    Args:
        rows: forecast table of one ticker and one cutoff, by horizon.
        close: close at the cutoff.
        levels: Q quantile levels.
        prefix: "" for the model, "ewma_" and so on for a baseline.

    Returns:
        (H + 1, Q) prices, columns the levels, index the trading days after the cutoff: 0 (the close), the horizons.
    """
    levels = list(levels)
    returns = rows.set_index("horizon")[quantile_columns(levels, prefix)].set_axis(levels, axis=1)
    origin = pd.DataFrame(0.0, index=[0], columns=levels)
    return close * np.exp(pd.concat([origin, returns]).rename_axis("horizon"))


def plot_predicted_vs_actual(forecasts: pd.DataFrame) -> Figure:
    """Draws forecasts of the middle horizon beside what happened.

    A panel through time for each of the (at most four) tickers with most rows, and the predicted means of all tickers
    against the realised returns.

    Args:
        forecasts: forecast table with `y`, the ewma columns of `add_baselines`, and the quantiles 0.05, 0.5, 0.95.

    Raises:
        ValueError: a column is missing or no row has a finite `y`.
    """
    band = quantile_columns([0.05, 0.95])
    require_columns(forecasts, ["y", "mean", "q0.5", *band, *(f"ewma_{column}" for column in band)])
    rows = middle_horizon(forecasts)
    horizon = rows["horizon"].iloc[0]
    tickers = rows.groupby("ticker").size().sort_values(ascending=False, kind="stable").index[:MAX_PANELS]

    figure = Figure(figsize=(10, max(4.5, 1.9 * len(tickers) + 0.8)), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(len(tickers), 2, width_ratios=(3, 2))
    panels = [figure.add_subplot(grid[i, 0]) for i in range(len(tickers))]
    for panel, ticker in zip(panels, tickers, strict=True):
        panel.sharex(panels[-1])
        _draw_through_time(panel, rows[rows["ticker"] == ticker].sort_values("date"), ticker)
        panel.label_outer()
    _draw_scatter(figure.add_subplot(grid[:, 1]), rows)
    figure.suptitle(f"Log-returns over {days(horizon)}: predicted and realised")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=9)
    return figure


def _newest(forecasts: pd.DataFrame, ticker: str) -> pd.DataFrame:
    """Rows of the ticker's last cutoff, by horizon."""
    require_columns(forecasts, [*quantile_columns(FAN_LEVELS), *quantile_columns([0.05, 0.95], "ewma_")])
    rows = forecasts[forecasts["ticker"] == ticker]
    if rows.empty:
        raise ValueError(f"forecast table has no ticker {ticker!r}")
    return rows[rows["cutoff"] == rows["cutoff"].max()].sort_values("horizon")


def _draw_candles(axes: Axes, bars: pd.DataFrame) -> None:
    """One for each bar, the newest at 0: a line from low to high, a body from open to close, white where it rose."""
    steps = np.arange(1 - len(bars), 1)
    first, last = bars["open"].to_numpy(), bars["close"].to_numpy()
    axes.vlines(steps, bars["low"], bars["high"], color="0.3", linewidth=0.8)
    rose = last >= first
    for which, color, name in ((rose, ROSE, "day that rose"), (~rose, FELL, "day that fell")):
        height, bottom = np.abs(last - first)[which], np.minimum(first, last)[which]
        style = {"color": color, "edgecolor": "0.3", "linewidth": 0.8, "label": name}
        axes.bar(steps[which], height, 0.65, bottom, zorder=2, **style)


def _draw_words(axes: Axes, words: list[dict], dates: pd.Series) -> None:
    """A box for each word under the days it is of, if all are drawn; boxes that overlap lie in turn in two rows."""
    known = dates.to_numpy()
    for place, named in enumerate(words):
        start, end = (np.datetime64(pd.Timestamp(named[side])) for side in ("start", "end"))
        if end > known[-1]:
            raise ValueError(f"the word {named['word']!r} is of days after the cutoff, to {named['end']}")
        if start < known[0]:
            continue
        left, right = (np.searchsorted(known, day) + 1 - len(known) for day in (start, end))
        axes.barh(place % 2, right - left + 1, 0.84, left - 0.5, color="0.92", edgecolor="0.3", linewidth=0.8)
        said = f"{named['word']} {named['probability']:.0%}"
        axes.text((left + right) / 2, place % 2, said, ha="center", va="center", fontsize=9, clip_on=True)
    axes.set_ylabel("words")
    axes.set_yticks([])
    axes.set_ylim(1.5, -0.5)


def _draw_fan(axes: Axes, rows: pd.DataFrame, close: float) -> None:
    """Straight lines join the horizons: nothing is forecast between them."""
    for lower, upper, grey in INTERVALS:
        fan = price_fan(rows, close, (lower, upper))
        axes.fill_between(
            fan.index, fan[lower], fan[upper], color=grey, linewidth=0, label=f"{upper - lower:.0%} interval"
        )
    naive = price_fan(rows, close, (0.05, 0.95), "ewma_")
    for level, label in ((0.05, "90% interval, ewma baseline"), (0.95, None)):
        axes.plot(naive.index, naive[level], "--", color=NAIVE, linewidth=1.3, label=label)
    median = price_fan(rows, close, (0.5,))[0.5]
    axes.plot(median.index, median, "-", color=MODEL, marker=".", linewidth=2, label="median")
    for price in price_fan(rows, close, (0.05, 0.5, 0.95)).iloc[-1]:
        place = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points"}
        axes.annotate(f"{price:,.2f}", (1, price), va="center", fontsize=8, **place)


def _label_trading_days(axes: Axes, dates: pd.Series, rows: pd.DataFrame) -> None:
    """Dates on an axis that counts trading days from the cutoff, and small numbers under the horizons between them."""
    step, last = -(-len(dates) // MAX_HISTORY_TICKS), rows["horizon"].iloc[-1]
    history = [day for day in range(0, -len(dates), -step) if last - day > step / 3]  # names would overlap
    names = [*(dates.iloc[day - 1] for day in history), rows["date"].iloc[-1]]
    axes.set_xticks([*history, last], [f"{name:%Y-%m-%d}" for name in names], rotation=25, ha="right")
    between = rows["horizon"].iloc[: -1 : -(-len(rows) // MAX_HORIZON_TICKS)]
    between = between[last - between > (len(dates) + last) / 50]  # nearer, it would be in the last date
    axes.set_xticks(between, between, minor=True, fontsize=7)
    axes.margins(x=0.02)
    axes.set_xlabel("trading day (vertical line: last day known; small numbers: trading days after it)")


def _draw_through_time(axes: Axes, rows: pd.DataFrame, ticker: str) -> None:
    date, percent = rows["date"], 100 * rows.select_dtypes("number")
    axes.fill_between(
        date, percent["q0.05"], percent["q0.95"], color="0.82", linewidth=0, label="90% interval, predicted"
    )
    for column, label in (("ewma_q0.05", "90% interval, ewma baseline"), ("ewma_q0.95", None)):
        axes.plot(date, percent[column], "--", color=NAIVE, linewidth=0.9, label=label)
    axes.plot(date, percent["y"], "-", color=INK, marker=".", markersize=2.5, linewidth=0.6, label="realised")
    axes.plot(date, percent["q0.5"], color=MODEL, linewidth=1.6, label="median, predicted")
    axes.set_ylabel(f"{ticker}\nlog-return (%)", parse_math=False)
    axes.set_xlabel("day forecast")
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    label_dates(axes)


def _draw_scatter(axes: Axes, rows: pd.DataFrame) -> None:
    mean, y = 100 * rows["mean"].to_numpy(), 100 * rows["y"].to_numpy()
    constant = np.ptp(mean) == 0 or np.ptp(y) == 0
    correlation = "undefined (constant)" if constant else f"{np.corrcoef(mean, y)[0, 1]:+.3f}"
    axes.plot(mean, y, ".", color=MODEL, markersize=3, alpha=0.4, label="one forecast", rasterized=True)
    axes.axhline(0, color="0.4", linewidth=0.8, label="zero")
    axes.axvline(0, color="0.4", linewidth=0.8)
    limits = axes.get_xlim()
    axes.plot(limits, limits, "--", color=INK, linewidth=1, label="predicted = realised")
    axes.set_xlim(limits)
    axes.set_title(f"tickers: {rows['ticker'].nunique()}, forecasts: {len(rows):,}\ncorrelation: {correlation}")
    axes.set_xlabel("predicted mean log-return (%)")
    axes.set_ylabel("realised log-return (%)")
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(alpha=0.25)


def plot_equity(equity: pd.DataFrame, title: str = "") -> Figure:
    """Draws equity curves on a logarithmic scale, and how far each is below its highest so far.

    Args:
        equity: by date, a column for each portfolio; at most four, the first of them drawn as the model.
    """
    figure = Figure(figsize=(10, 7), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    styles = ((MODEL, "-", 2.0), (NAIVE, "--", 1.4), (INK, ":", 1.4), ("0.5", "-.", 1.4))
    for name, (color, line, width) in zip(equity, styles, strict=False):
        curve, style = equity[name], {"color": color, "linestyle": line, "linewidth": width}
        label = f"{name.replace('_', ' ')}: {curve.iloc[-1] / curve.iloc[0] - 1:+.1%}"
        upper.plot(curve.index, curve, label=label, **style)
        lower.plot(curve.index, 100 * (curve / curve.cummax() - 1), **style)
    upper.set_yscale("log")
    upper.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    upper.yaxis.set_major_formatter("{x:g}")
    upper.yaxis.set_minor_locator(NullLocator())
    upper.set_ylabel("equity, of 1 (log scale)")
    lower.set_ylabel("drawdown (%)")
    for axes in (upper, lower):
        axes.margins(x=0.01)
        axes.grid(alpha=0.25)
    label_dates(lower)
    upper.legend(loc="upper left", fontsize=9)
    upper.set_title(title)
    return figure


def with_outcome(forecasts: pd.DataFrame) -> pd.DataFrame:
    """The rows whose outcome is known."""
    known = forecasts[np.isfinite(forecasts["y"])]
    if known.empty:
        raise ValueError(f"nothing to plot: none of the {len(forecasts)} forecasts has a realised return y yet")
    return known


def middle_horizon(forecasts: pd.DataFrame) -> pd.DataFrame:
    """The rows of the middle horizon whose outcome is known."""
    known = with_outcome(forecasts)
    horizons = np.unique(known["horizon"])
    return known[known["horizon"] == horizons[len(horizons) // 2]]


def days(horizon: int) -> str:
    return f"{horizon} trading day{'s' if horizon > 1 else ''}"


def label_dates(axes: Axes) -> None:
    """Dates under an axis of time, as few letters as tell them apart."""
    locator = AutoDateLocator(minticks=3, maxticks=8)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
