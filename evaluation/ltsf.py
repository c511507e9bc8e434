"""The protocol of the long-horizon benchmarks: files, splits, scaling and naive forecasts.

Files have the layout of Autoformer (arXiv 2106.13008): a column `date`, then one for each channel. Borders, scaling
and windows are those of its loaders, but no test window is dropped: leaving out those that fill no batch, as many
published figures do, lets results depend on the batch size (Qiu et al., TFB, arXiv 2403.20150).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

# Shapes: N rows, C channels, W windows

MONTH = 30 * 24  # hours
HORIZONS = (96, 192, 336, 720)


class Benchmark(NamedTuple):
    """A file, where it lies, and what it is usually scored on.

    `rows_per_hour` is of the ETT files, which are split by months, and `context` that of Autoformer.
    """

    file: str
    folder: str
    rows_per_hour: int | None = None
    horizons: tuple[int, ...] = HORIZONS
    context: int = 96


BENCHMARKS = {
    "ETTh1": Benchmark("ETTh1.csv", "ETT-small", 1),
    "ETTh2": Benchmark("ETTh2.csv", "ETT-small", 1),
    "ETTm1": Benchmark("ETTm1.csv", "ETT-small", 4),
    "ETTm2": Benchmark("ETTm2.csv", "ETT-small", 4),
    "weather": Benchmark("weather.csv", "weather"),
    "exchange": Benchmark("exchange_rate.csv", "exchange_rate"),
    "ILI": Benchmark("national_illness.csv", "illness", horizons=(24, 36, 48, 60), context=36),
}


class Parts(NamedTuple):
    """Rows whose values are forecast. The contexts of validation and test begin before their first row."""

    train: range
    validation: range
    test: range


# --- files ---


def find_file(name: str, folder: str | Path) -> Path:
    if name not in BENCHMARKS:
        raise ValueError(f"datasets are {', '.join(BENCHMARKS)}, got {name!r}")
    benchmark = BENCHMARKS[name]
    places = [Path(folder, benchmark.file), Path(folder, benchmark.folder, benchmark.file)]
    for path in places:
        if path.is_file():
            return path
    raise ValueError(f"no file of {name}; looked for {' and '.join(map(str, places))}")


def read_channels(path: Path) -> pd.DataFrame:
    """(N, C) values, float64, with their dates as index."""
    try:
        table = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV: {error}") from None
    if table.columns[0] != "date" or table.shape[1] < 2:
        raise ValueError(f"{path} must have a column date and channels after it, has {', '.join(table.columns)}")
    dates = pd.to_datetime(table.pop("date"), errors="coerce")
    values = table.apply(pd.to_numeric, errors="coerce").astype(np.float64).set_axis(dates)
    unknown = np.argwhere(~np.isfinite(values.to_numpy()) | dates.isna().to_numpy()[:, None])
    if len(unknown):
        row, column = unknown[0]
        raise ValueError(f"{path} has no date or number in line {row + 2}, column {table.columns[column]!r}")
    return values


# --- splits ---


def split(name: str, rows: int) -> Parts:
    """12, 4 and 4 months of 30 days of the ETT files, whose other rows nobody uses; 70, 10 and 20 % of the others."""
    per_hour = BENCHMARKS[name].rows_per_hour
    if per_hour is None:
        borders = [0, int(0.7 * rows), rows - int(0.2 * rows), rows]
    else:
        borders = [months * MONTH * per_hour for months in (0, 12, 16, 20)]
    if rows < borders[-1]:
        raise ValueError(f"{name} has {rows} rows, its standard split needs {borders[-1]}")
    return Parts(*map(range, borders[:-1], borders[1:]))


def origins(part: range, context: int, horizon: int) -> range:
    """Last known row of each window: the horizon lies within the part, as does the context of the first part."""
    return range(max(part.start, context) - 1, part.stop - horizon)


def check_lengths(name: str, parts: Parts, context: int, horizon: int) -> None:
    for part, rows in parts._asdict().items():
        if not origins(rows, context, horizon):
            raise ValueError(
                f"horizon {horizon} with context {context} does not fit the {len(rows)} {part} rows of {name}"
            )


def standardise(values: np.ndarray, train: range) -> np.ndarray:
    """(N, C) less the mean of the training rows, over their standard deviation; a constant channel over one."""
    known = values[train.start : train.stop]
    deviation = known.std(axis=0)
    return (values - known.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)


# --- naive forecasts ---


def daily_period(dates: pd.DatetimeIndex, known: int) -> int | None:
    """Rows of a day; None where that is one, or more than are known at the first origin."""
    interval = dates.to_series().diff().median()
    if not interval > pd.Timedelta(0):
        raise ValueError(f"dates must increase, the median step is {interval}")
    period = round(pd.Timedelta(days=1) / interval)
    return period if 1 < period <= known else None


def naive_scores(values: np.ndarray, origins: range, horizon: int, period: int = 1) -> dict[str, float]:
    """MSE and MAE of the values of the newest period, repeated: of the last value with a period of one row.

    It may look further back than the context.

    Args:
        values: (N, C).
        origins: last known row of each window.
        horizon: rows ahead, all of which are scored.
        period: rows that are repeated.
    """
    last, squared, absolute = np.array(origins), 0.0, 0.0
    for ahead in range(1, horizon + 1):
        back = -ahead % period
        error = values[last + ahead] - values[last - back]  # (W, C)
        squared += np.square(error).mean()
        absolute += np.abs(error).mean()
    return {"mse": squared / horizon, "mae": absolute / horizon}
