"""Tries one's own indicators, and writes the table of all.

    python scripts/indicators.py --check FILE
    python scripts/indicators.py --write docs/indicators.md

FILE registers columns, as `indicators_spaceexplore.py` does, and begins with an import of what it needs from there:
`from spaceexploreai.indicators_spaceexplore import daily_return, indicator, volatility`. A column passes if no later
bar changes a value, not by its last bit, and none depends on the currency.
"""

import importlib.util
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from spaceexploreai.indicators_spaceexplore import (
    FEATURE_PRESETS,
    INDICATORS,
    MIN_TICKERS,
    compute_indicators,
    compute_panel,
)
from spaceexploreai.train.arguments import bare_parser, command

PRICES = ["open", "high", "low", "close"]
DAYS = 330  # more than the longest window
MARKER = "<!-- What follows is written by: python scripts/indicators.py --write docs/indicators.md -->\n"


# --- a random market ---


def random_bars(days: int, generator: np.random.Generator) -> pd.DataFrame:
    """A random walk with a halt, bars without range and bars without volume."""
    size = generator.choice([0.003, 0.02, 0.1])
    close = generator.uniform(0.5, 500) * np.exp(np.cumsum(size * generator.standard_t(4, days)))
    bars = pd.DataFrame({"date": pd.bdate_range("2020-01-01", periods=days)})
    bars["open"] = close * np.exp(generator.normal(0, size / 2, days))
    bars["high"] = np.maximum(bars["open"], close) * np.exp(np.abs(generator.normal(0, size / 2, days)))
    bars["low"] = np.minimum(bars["open"], close) * np.exp(-np.abs(generator.normal(0, size / 2, days)))
    bars["close"] = close
    bars["volume"] = generator.integers(0, 10 ** generator.integers(1, 9, days)).astype(float)
    halt = int(generator.integers(0, days - 25))
    bars.loc[halt : halt + 24, [*PRICES, "volume"]] = [close[halt]] * 4 + [0.0]
    flat = generator.random(days) < 0.05
    bars.loc[flat, PRICES] = bars.loc[flat, ["close"] * 4].to_numpy()
    return bars


def random_market(tickers: int, seed: int) -> pd.DataFrame:
    """A price table whose tickers were listed on different days."""
    generator = np.random.default_rng(seed)
    bars = [random_bars(DAYS, generator).iloc[3 * number :] for number in range(tickers)]
    return pd.concat([one.assign(ticker=f"T{number:02}") for number, one in enumerate(bars)], ignore_index=True)


# --- causality ---


def times(table: pd.DataFrame, factor: float, columns: list[str] = PRICES) -> pd.DataFrame:
    return table.assign(**{column: table[column] * factor for column in columns})


def _surge(future: pd.DataFrame, where: pd.Series) -> pd.DataFrame:
    return pd.concat([future[~where], times(future[where], 1e6)])


def _listing(future: pd.DataFrame) -> pd.DataFrame:
    # Before all others in the order of the tickers, so that each stands elsewhere in a matrix.
    return pd.concat([future, future[future["ticker"] == "T00"].assign(ticker="A")])


def _another_history(future: pd.DataFrame) -> pd.DataFrame:
    other = random_bars(DAYS, np.random.default_rng(len(future))).tail(len(future))
    other = pd.concat([other] * (len(future) // len(other) + 1)).head(len(future))
    return future.assign(**{column: other[column].to_numpy() for column in [*PRICES, "volume"]})


# Each takes the bars after a day and gives other ones, by much: a leak into the last bit of a column counts.
CHANGES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "crash": lambda future: times(future, 1e-6),
    "surge": lambda future: times(future, 1e6),
    "surge on the next day": lambda future: _surge(future, future["date"] == future["date"].min()),
    "surge on the last day": lambda future: _surge(future, future["date"] == future["date"].max()),
    "surge of one ticker": lambda future: _surge(future, future["ticker"] == "T00"),
    "halt": lambda future: future.assign(**dict.fromkeys(PRICES, 7.0), volume=0.0),
    "turnover": lambda future: times(future, 1e9, ["volume"]),
    "another history": _another_history,
    "other days": lambda future: future.assign(date=future["date"] + pd.Timedelta(days=400)),
    "listing": _listing,
    "end of the data": lambda future: future.iloc[:0],
}


def compute_table(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Columns of a price table in float64, by (ticker, date)."""
    table = table.sort_values(["ticker", "date"], ignore_index=True)
    values = [compute_indicators(bars, names) for _, bars in table.groupby("ticker")]
    columns = pd.DataFrame(np.concatenate(values), columns=names).assign(**dict(compute_panel(table, names)))
    return columns.set_index(pd.MultiIndex.from_frame(table[["ticker", "date"]]))


def check_change(names: list[str], change: str, seed: int) -> None:
    """Changes what comes after a day of a random market.

    Raises:
        ValueError: a column that gives another value on that day or before, or that has none to be tried.
    """
    table = _market_for(names, seed)
    day = _some_day(table, np.random.default_rng([seed, *change.encode()]))
    future = table["date"] > day
    whole = compute_table(table, names)
    known = whole.loc[pd.IndexSlice[:, :day], :]
    changed = compute_table(pd.concat([table[~future], CHANGES[change](table[future])]), names).loc[known.index]
    # Of a shorter array the last numbers may be rounded otherwise.
    tolerance = 1e-9 if change == "end of the data" else 0.0
    for name in names:
        if whole[name].isna().all():
            raise ValueError(f"{name} has no value in {DAYS} days: nothing was tried")
        if not np.allclose(known[name], changed[name], tolerance, tolerance, equal_nan=True):
            raise ValueError(f"{name} until {day.date()} knows what comes after it: {change} (seed {seed})")


def _some_day(table: pd.DataFrame, generator: np.random.Generator) -> pd.Timestamp:
    """Of the first days, where windows begin, of the last, where the longest ones are full, or between."""
    days = table["date"].drop_duplicates().sort_values()
    part = generator.integers(3)
    return days.iloc[generator.integers([1, 40, 270][part], [40, 270, DAYS - 1][part])]


def _market_for(names: list[str], seed: int) -> pd.DataFrame:
    return random_market(MIN_TICKERS + 2 if any(INDICATORS[name].panel for name in names) else 1, seed)


def check_causality(names: list[str], seeds: int = 3) -> None:
    """Tries every change on several random markets.

    Raises:
        ValueError: a column that knows a later bar, be it of another ticker.
    """
    for seed in range(seeds):
        for change in CHANGES:
            check_change(names, change, seed)


def check_units(names: list[str], seed: int = 0) -> None:
    """Prices in another currency.

    Raises:
        ValueError: a column that gives another value for them.
    """
    table = _market_for(names, seed)
    # A power of two scales without rounding, so that zero over zero stays that.
    known, scaled = compute_table(table, names), compute_table(times(table, 2.0**7), names)
    for name in names:
        if not np.allclose(known[name], scaled[name], 1e-6, 1e-6, equal_nan=True):
            raise ValueError(f"{name} depends on the currency: another one gives other values")


def check_file(file: str) -> list[str]:
    """Runs a file and tries the columns that it registers.

    Returns:
        Their names.

    Raises:
        ValueError: it registers none, or one that does not pass.
    """
    before = set(INDICATORS)
    spec = importlib.util.spec_from_file_location("indicators_to_check", file)
    if spec is None or not Path(file).is_file():
        raise ValueError(f"{file} is no Python file")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    names = [name for name in INDICATORS if name not in before]
    if not names:
        raise ValueError(f"{file} registers no indicator")
    check_causality(names)
    check_units(names)
    return names


# --- the table ---


def rows_of_table(group: str) -> Iterator[str]:
    """One row per function: its columns, those of the default preset in bold, and what they say."""
    columns = [column for column in INDICATORS.values() if column.group == group]
    for summary, variants in groupby(columns, key=lambda column: column.summary):
        names = [f"**`{name}`**" if name in FEATURE_PRESETS["default"] else f"`{name}`" for name, *_ in variants]
        yield f"| {' '.join(names)} | {summary} |"


def write_table(file: str) -> None:
    """Rewrites what follows the marker in a file."""
    head, marker, _ = Path(file).read_text(encoding="utf-8").partition(MARKER)
    if not marker:
        raise ValueError(f"{file} has no line {MARKER.strip()!r}")
    Path(file).write_text(head + marker + tables(), encoding="utf-8")


def tables() -> str:
    text = ""
    for group in dict.fromkeys(column.group for column in INDICATORS.values()):
        text += "\n".join([f"\n### {group}\n", "| columns | |", "|---|---|", *rows_of_table(group), ""])
    return text


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--check", metavar="FILE", help="try the columns that this file registers")
    parser.add_argument("--write", metavar="FILE", help="write the table of all columns into this file")
    args = parser.parse_args(argv)
    if (args.check is None) == (args.write is None):
        raise ValueError("give one of --check and --write")
    if args.check is not None:
        for name in check_file(args.check):
            print(f"{name} ({INDICATORS[name].group}): causal, free of the currency")
    else:
        write_table(args.write)


if __name__ == "__main__":
    main()
