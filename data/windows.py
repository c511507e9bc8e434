"""Encoded histories to training windows: chronological splits, labels, lazy index pairs."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset

from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries, parse_date

IGNORE_INDEX = -100.0  # as transformers marks a label that is not supervised


class DateRange(NamedTuple):
    """Dates of a split, both ends included."""

    start: pd.Timestamp
    end: pd.Timestamp


class Split(NamedTuple):
    train: DateRange
    validation: DateRange
    test: DateRange


def chronological_split(
    dates: pd.Series,
    horizon: int,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    train_start: str | None = None,
) -> Split:
    """Cuts the calendar of all tickers together into train, validation and test.

    The ranges touch; the purge between them is made by `make_labels`, which supervises no step whose longest label
    reaches past its own range.

    Args:
        dates: dates of the price table, in any order, repeated over tickers.
        horizon: longest horizon, in trading days; every range must be longer.
        validation_fraction: share of the dates before the test range.
        test_fraction: share of the dates at the end.
        train_start: first date that is trained on (YYYY-MM-DD); the first of all by default.

    Raises:
        ValueError: fractions, or a start, that leave a range no longer than the horizon.
    """
    calendar = np.sort(dates.unique())
    test = len(calendar) - round(len(calendar) * test_fraction)
    validation = test - round(len(calendar) * validation_fraction)
    first = 0 if train_start is None else int(calendar.searchsorted(parse_date(train_start).to_datetime64()))
    bounds = [first, max(validation, first), max(test, first), len(calendar)]
    ranges = []
    for name, first, stop in zip(Split._fields, bounds[:-1], bounds[1:], strict=True):
        if stop - first <= horizon:
            raise ValueError(
                f"the {name} range has {stop - first} of {len(calendar)} trading days; "
                f"a horizon of {horizon} days needs more than {horizon}"
            )
        ranges.append(DateRange(pd.Timestamp(calendar[first]), pd.Timestamp(calendar[stop - 1])))
    return Split(*ranges)


# --- targets ---

TARGETS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {}


def target(function: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[np.ndarray, int], np.ndarray]:
    """Registers what the network is to predict, under the function's name.

    The function takes the (T,) log-closes of a ticker, NaN at masked steps, and a horizon in steps. It gives
    (T - horizon,) numbers, for each step what is known `horizon` steps later and not before, NaN where it is not, in
    units of log-return: the network predicts them in units of volatility times the square root of the horizon.

        @target
        def drawdown(log_close, horizon):
            path = sliding_window_view(log_close, horizon + 1)
            return path.min(axis=1) - path[:, 0]

    Raises:
        ValueError: the name is taken.
    """
    if function.__name__ in TARGETS:
        raise ValueError(f"target {function.__name__!r} is registered already")
    TARGETS[function.__name__] = function
    return function


@target
def log_return(log_close: np.ndarray, horizon: int) -> np.ndarray:
    """From each step to `horizon` steps later. A classification head makes directions of it."""
    return log_close[horizon:] - log_close[:-horizon]


@target
def volatility(log_close: np.ndarray, horizon: int) -> np.ndarray:
    """Realised volatility of the coming `horizon` steps together: root of the sum of their squared log-returns."""
    return np.sqrt(sliding_window_view(np.diff(log_close) ** 2, horizon).sum(axis=1))


def make_labels(
    series: EncodedSeries, horizons: list[int], within: DateRange, target: str = "log_return"
) -> np.ndarray:
    """Realised values of the target to each horizon.

    A step is supervised when it and the end of its longest label lie within the range, so that no price outside the
    range enters, be it as a label of the steps before or as an origin.

    Args:
        series: one ticker.
        horizons: (H,) steps ahead, increasing.
        within: dates that labels may know.
        target: name in `TARGETS`.

    Returns:
        (T, H) float32, `IGNORE_INDEX` where not supervised, which a label from or to a masked step never is.
    """
    log_close = np.log(series.close)
    labels = np.full((len(log_close), len(horizons)), IGNORE_INDEX, dtype=np.float32)
    steps = np.arange(max(len(log_close) - horizons[-1], 0))
    last_label = series.dates[steps + horizons[-1]]
    steps = steps[(series.dates[steps] >= within.start.to_datetime64()) & (last_label <= within.end.to_datetime64())]
    for column, horizon in enumerate(horizons[: len(horizons) if len(steps) else 0]):
        labels[steps, column] = TARGETS[target](log_close, horizon)[steps]
    return np.nan_to_num(labels, copy=False, nan=IGNORE_INDEX)


def network_inputs(one: EncodedSeries, steps: slice) -> dict[str, np.ndarray]:
    """Steps of a history as a head takes them, without a batch: views of its arrays."""
    return {
        "past_values": one.values[steps],
        "attention_mask": np.isfinite(one.close[steps]),
        "scale": one.scale[steps],
    }


class WindowDataset(Dataset):
    """Windows as pairs (series, last step): slices of the encoded histories, never copies.

    Args:
        series: encoded tickers.
        ends: (N, 2) integers, series index and last step of each window.
        context_length: steps T of a window; fewer at the start of a history.
        labels: one (T, H) array per series, or None for inference.
        supervised_steps: newest steps of a window whose labels count; all by default. With the stride of the windows,
            each step is scored once and never with a short context.
    """

    def __init__(
        self,
        series: list[EncodedSeries],
        ends: np.ndarray,
        context_length: int,
        labels: list[np.ndarray] | None = None,
        supervised_steps: int | None = None,
    ):
        self.series = series
        self.ends = ends
        self.context_length = context_length
        self.labels = labels
        self.supervised_steps = context_length if supervised_steps is None else supervised_steps

    def __len__(self) -> int:
        return len(self.ends)

    def scaled_targets(self, horizons: list[int]) -> np.ndarray:
        """Labels of steps where all are known, in units of scale·sqrt(horizon) as the network sees them: (N, H)."""
        targets = []
        for one, labels in zip(self.series, self.labels, strict=True):
            known = (labels != IGNORE_INDEX).all(axis=1)
            targets.append(labels[known] / (one.scale[known, None] * np.sqrt(np.float32(horizons))))
        return np.concatenate(targets)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which, end = self.ends[index]
        window = slice(max(end + 1 - self.context_length, 0), end + 1)
        example = network_inputs(self.series[which], window)
        if self.labels is not None:
            example["labels"] = self.labels[which][window]
            if self.supervised_steps < len(example["labels"]):
                example["labels"] = example["labels"].copy()
                example["labels"][: -self.supervised_steps] = IGNORE_INDEX
        return example


def supervised_windows(
    series: list[EncodedSeries],
    horizons: list[int],
    within: DateRange,
    context_length: int,
    stride: int,
    score_once: bool = False,
    target: str = "log_return",
) -> WindowDataset:
    """Windows over all supervised steps of a date range.

    Args:
        series: encoded tickers.
        horizons: (H,) steps ahead.
        within: dates that labels may know; contexts reach back before its start.
        context_length: steps of a window.
        stride: steps between windows, counted back from a ticker's last supervised one.
        score_once: supervise only the newest `stride` steps of each window, as for validation.
        target: name in `TARGETS`.

    Raises:
        ValueError: no step is supervised, or a stride longer than a window would leave some out.
    """
    if stride > context_length:
        raise ValueError(f"a stride of {stride} is longer than the context_length of {context_length}")
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    labels = [make_labels(one, horizons, within, target) for one in series]
    ends = []
    for which, known in enumerate(labels):
        steps = np.flatnonzero((known != IGNORE_INDEX).any(axis=1))
        if len(steps):
            last = np.arange(steps[-1], steps[0] - 1, -stride)[::-1]
            # In a halt longer than a window there is one without a step to read, and without a label.
            traded = np.concatenate([[0], series[which].traded.cumsum()])
            last = last[traded[last + 1] > traded[np.maximum(last + 1 - context_length, 0)]]
            ends.append(np.stack([np.full_like(last, which), last], axis=1))
    if not ends:
        raise ValueError(
            f"no step between {within.start.date()} and {within.end.date()} has a label {horizons[-1]} bars ahead"
        )
    return WindowDataset(series, np.concatenate(ends), context_length, labels, stride if score_once else None)


class ForecastWindows(Dataset):
    """What is to be forecast from.

    Args:
        series: encoded tickers.
        spans: (W, 3) integers, series index, first and last step of each window.
        origins: (N,) rows `ticker, cutoff, scale, window, back`: the window that a cutoff lies in, and how many of
            its steps are later ones.
    """

    def __init__(self, series: list[EncodedSeries], spans: np.ndarray, origins: pd.DataFrame):
        self.series, self.spans, self.origins = series, spans, origins

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return network_inputs(*self.history(index))

    def history(self, index: int) -> tuple[EncodedSeries, slice]:
        which, first, last = self.spans[index]
        return self.series[which], slice(first, last + 1)


def forecast_windows(
    series: list[EncodedSeries], context_length: int, within: DateRange, stride: int = 1
) -> ForecastWindows:
    """Windows with every (ticker, cutoff) of a date range that has a bar and a whole context behind it.

    A network that forecasts at every step needs no window for each: with a stride, `stride` neighbouring cutoffs share
    one, and see the last context_length - stride + 1 to context_length steps. Which do is settled by their distance
    from the first bar of the ticker, so that neither the range nor what comes later changes a forecast.

    Raises:
        ValueError: there is no such cutoff, or the stride is not from 1 to context_length.
    """
    if not 1 <= stride <= context_length:
        raise ValueError(f"stride must be from 1 to the context_length of {context_length}, got {stride}")
    spans, origins, count = [], [], 0
    for which, one in enumerate(series):
        inside = (one.dates >= within.start.to_datetime64()) & (one.dates <= within.end.to_datetime64()) & one.traded
        steps = np.flatnonzero(inside & (np.arange(len(one.dates)) >= context_length - 1))
        blocks, window = np.unique(steps // stride, return_inverse=True)
        last = steps[np.flatnonzero(np.diff(window, append=len(blocks)))]  # of each block
        spans.append(np.stack([np.full_like(last, which), (blocks + 1) * stride - context_length, last], axis=1))
        known = {"ticker": one.ticker, "cutoff": one.dates[steps], "scale": one.scale[steps]}
        origins.append(pd.DataFrame({**known, "window": count + window, "back": last[window] - steps}))
        count += len(blocks)
    if not count:
        raise ValueError(
            f"no ticker has {context_length} bars of context at any date between "
            f"{within.start.date()} and {within.end.date()}"
        )
    return ForecastWindows(series, np.concatenate(spans), pd.concat(origins, ignore_index=True))
