"""Does what is known at a date change with what comes after it? Then it is no forecast."""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

TOLERANCE = 1e-4  # of the number, or of the spread of its column: what other batches and sums may make of a float32
OUTCOMES = {"y", "date"}  # of a forecast table: what lies ahead on purpose


def check_leaks(
    make: Callable[[pd.DataFrame], pd.DataFrame],
    prices: pd.DataFrame,
    table: pd.DataFrame | None = None,
    dates: int = 3,
    seed: int = 0,
) -> int:
    """Makes the rows of a few dates again, from prices without their future and from prices with another one.

        check_leaks(extractor.compute_features, prices)
        check_leaks(lambda prices: forecast_range(model, extractor, prices, within), prices, forecasts)

    Args:
        make: of a price table features by `ticker, date`, or forecasts by `ticker, cutoff, horizon`.
        prices: validated price table.
        table: what `make` gave of these prices, if that is known already.
        dates: number of dates, drawn evenly from those of the table.
        seed: of the other future.

    Returns:
        How many rows were compared.

    Raises:
        ValueError: a number up to one of the dates changes, or a row comes or goes; it names the first.
    """
    table = make(prices) if table is None else table
    day = "cutoff" if "cutoff" in table else "date"
    known = np.unique(table[day])
    known = known[known < prices["date"].max()]
    if not len(known):
        raise ValueError(f"no {day} of the table has a future in the prices that could leak")
    compared = 0
    for date in known[np.linspace(0, len(known) - 1, dates).round().astype(int)]:
        before = _keyed(table, day, date)
        for name, other in _other_futures(prices, date, seed):
            _refuse_differences(before, _keyed(make(other), day, date), f"{name} after {pd.Timestamp(date):%Y-%m-%d}")
            compared += len(before)
    return compared


def _other_futures(prices: pd.DataFrame, date: np.datetime64, seed: int) -> Iterator[tuple[str, pd.DataFrame]]:
    later = prices["date"] > date
    yield "without prices", prices[~later].reset_index(drop=True)
    generator, torn = np.random.default_rng(seed), prices.copy()
    factors = np.exp(generator.normal(scale=0.3, size=later.sum()))
    for column in ("open", "high", "low", "close"):
        torn.loc[later, column] *= factors
    torn.loc[later, "volume"] = generator.permutation(torn.loc[later, "volume"].to_numpy())
    yield "with other prices", torn


def _keyed(table: pd.DataFrame, day: str, date: np.datetime64) -> pd.DataFrame:
    keys = [key for key in ("ticker", day, "horizon") if key in table]
    numbers = table[table[day] <= date].drop(columns=[name for name in OUTCOMES - {day} if name in table])
    return numbers.set_index(keys).sort_index()


def _refuse_differences(before: pd.DataFrame, after: pd.DataFrame, where: str) -> None:
    changed = before.index.symmetric_difference(after.index)
    if len(changed):
        raise ValueError(f"leak: {_name(changed[0])} comes or goes {where}")
    columns = [column for column in before if column in after]
    one, other = (table[columns].to_numpy(dtype=np.float64) for table in (before, after))
    with np.errstate(invalid="ignore"):
        tolerance = TOLERANCE * np.maximum(np.abs(one), before[columns].std().fillna(0).to_numpy())
        same = np.isclose(one, other, rtol=0, atol=0, equal_nan=True) | (np.abs(one - other) <= tolerance)
    if not same.all():
        row, column = np.argwhere(~same)[0]
        raise ValueError(
            f"leak: {columns[column]} of {_name(before.index[row])} is {one[row, column]:.6g}, "
            f"but {other[row, column]:.6g} {where}"
        )


def _name(key: tuple) -> str:
    ticker, day, *horizon = key
    return f"{ticker} at {day:%Y-%m-%d}" + (f", horizon {horizon[0]}" if horizon else "")
