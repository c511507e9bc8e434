"""Walk-forward: consecutive test blocks, each forecast from what was known some sessions before it.

    sessions   |---------- train ----------|- validation -|  embargo  |---- test ----|

No label of training or validation reaches past its own range (`make_labels` of `data/windows.py`), which is the purge:
the longest horizon before either border is no origin. The embargo leaves sessions out besides.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

WINDOWS = ("expanding", "rolling")
Span = tuple[pd.Timestamp, pd.Timestamp]  # both ends included


class Fold(NamedTuple):
    train: Span
    validation: Span
    test: Span


def plan_folds(
    dates: pd.Series,
    horizon: int,
    context_length: int,
    *,
    window: str = "expanding",
    folds: int | None = None,
    every: int | None = None,
    train_sessions: int | None = None,
    embargo: int = 0,
    validation_fraction: float = 0.1,
) -> list[Fold]:
    """Cuts the sessions of a price table into folds, whose test blocks are all that follows the first training part.

    Args:
        dates: of the price table, in any order, repeated over tickers.
        horizon: longest horizon, in sessions; every validation and test range is longer.
        context_length: sessions of a window; a training range has as many, and the horizon.
        window: "expanding", trained on from the first session on, or "rolling", on as many as at first.
        folds: number of blocks, of equal length but for one session. Either this or `every`.
        every: sessions of a block; the last is shorter, or longer by no more than the horizon.
        train_sessions: before the first block and its embargo, those of validation included; half by default.
        embargo: sessions left out before each block.
        validation_fraction: share of what lies before the embargo, its end.

    Raises:
        ValueError: an option that makes no sense, or too few sessions; it says how many there must be.
    """
    _check(window, folds, every, train_sessions, embargo, horizon)
    sessions = pd.DatetimeIndex(np.sort(dates.unique()))
    first = len(sessions) // 2 if train_sessions is None else train_sessions
    edges = _edges(len(sessions), first + embargo, horizon, folds, every)
    if edges is None:
        needed = embargo + (folds or 1) * (horizon + 1)
        raise ValueError(
            f"{len(sessions)} sessions are too few for {_count(folds or 1)} of more than {horizon} sessions, the "
            f"longest horizon, after {first} to train on and an embargo of {embargo}: "
            f"{2 * needed - 1 if train_sessions is None else needed + first} are needed"
        )
    planned = []
    for start, stop in pairwise(edges):
        end = start - embargo
        begin = end - first if window == "rolling" else 0
        border = end - round((end - begin) * validation_fraction)
        _check_training(border - begin, end - border, horizon, context_length)
        bounds = ((begin, border), (border, end), (start, stop))
        planned.append(Fold(*((sessions[low], sessions[high - 1]) for low, high in bounds)))
    return planned


def _check(
    window: str, folds: int | None, every: int | None, train_sessions: int | None, embargo: int, horizon: int
) -> None:
    if window not in WINDOWS:
        raise ValueError(f"window must be {' or '.join(WINDOWS)}, got {window!r}")
    if (folds is None) == (every is None):
        raise ValueError(f"give one of folds and every, got {folds} and {every}")
    for name, value, least in (("folds", folds, 1), ("train_sessions", train_sessions, 1), ("embargo", embargo, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if every is not None and every <= horizon:
        raise ValueError(f"every {every} sessions is too often: the longest horizon, {horizon}, must end in a block")


def _edges(count: int, first: int, horizon: int, folds: int | None, every: int | None) -> list[int] | None:
    """Where the blocks of sessions `first` to `count` begin, and where the last ends; None if they are too few."""
    rest = count - first
    if rest < (folds or 1) * (horizon + 1):
        return None
    if folds is not None:
        return [first + rest * number // folds for number in range(folds + 1)]
    # What is left at the end is a block if it has an outcome at every horizon.
    return [*range(first, count - horizon, every), count]


def _check_training(train: int, validation: int, horizon: int, context_length: int) -> None:
    if train < context_length + horizon:
        raise ValueError(
            f"a training range of {train} sessions is too short: a context of {context_length} and a horizon of "
            f"{horizon} need {context_length + horizon}, those of validation not counted"
        )
    if validation <= horizon:
        raise ValueError(
            f"a validation range of {validation} sessions is too short: a horizon of {horizon} needs more than "
            f"{horizon}; give more train_sessions or a larger validation_fraction"
        )


def _count(folds: int) -> str:
    return f"{folds} fold{'s' if folds > 1 else ''}"


def cut_blocks(dates: pd.Series, horizon: int, every: int) -> list[Span]:
    """Blocks of `every` sessions, as those of `plan_folds`, of all the sessions that there are.

    Args:
        dates: in any order, repeated over tickers.
        horizon: longest horizon, in sessions; every block is longer.

    Raises:
        ValueError: blocks that are too short, or too few sessions for one.
    """
    _check(WINDOWS[0], None, every, None, 0, horizon)
    sessions = pd.DatetimeIndex(np.sort(dates.unique()))
    edges = _edges(len(sessions), 0, horizon, None, every)
    if edges is None:
        raise ValueError(f"{len(sessions)} sessions are too few for a block: the longest horizon is {horizon}")
    return [(sessions[start], sessions[stop - 1]) for start, stop in pairwise(edges)]


def join_folds(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Forecast tables of the folds, in order, as one, with a column `fold` that counts from 1."""
    return pd.concat([table.assign(fold=number) for number, table in enumerate(tables, start=1)], ignore_index=True)
