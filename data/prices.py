"""Readers from price files to the canonical table of adjusted daily bars, and the writer of tables."""

import os
import re
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from spaceexploreai.data.files import check_suffix, write_atomically
from spaceexploreai.feature_extraction_spaceexplore import PRICE_COLUMNS, TABLE_COLUMNS, parse_dates, validate_prices

SAMPLE_PATH = Path(__file__).parent / "sample" / "stocks.csv.gz"
TICKER_PATTERN = re.compile(r"[A-Z0-9^][A-Z0-9.^=-]{0,14}")
YAHOO_PATTERN = re.compile(r"(?P<ticker>.+)_yahoo_(?P<stamp>\d{8})\.csv")
FORWARD_SPLITS = np.array([5 / 4, 4 / 3, 3 / 2, 5 / 3, 5 / 2, *range(2, 101)])
SPLIT_RATIOS = np.concatenate([1 / FORWARD_SPLITS, FORWARD_SPLITS])
# Wide enough for an adjusted close rounded to cents and for a quarterly dividend on the day of the split.
SPLIT_TOLERANCE = 0.01


# --- tickers ---------------------------------------------------------------------------------------------------------


def parse_tickers(text: str) -> list[str]:
    """Splits a comma-separated list such as `"AAPL,msft"` into upper-case tickers, in order and without duplicates.

    Raises:
        ValueError: no ticker at all, or one that is not a ticker (a path, for instance); names it.
    """
    tickers = [part.strip().upper() for part in text.split(",") if part.strip()]
    if not tickers:
        raise ValueError(f"no ticker in {text!r}")
    for ticker in tickers:
        if not TICKER_PATTERN.fullmatch(ticker):
            raise ValueError(f"{ticker!r} is not a ticker")
    return list(dict.fromkeys(tickers))


def _check_known(tickers: Sequence[str] | None, available: Sequence[str], path: Path) -> None:
    names = sorted(available)
    unknown = [ticker for ticker in tickers or () if ticker not in names]
    if unknown:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise ValueError(f"unknown ticker {unknown[0]!r}; {path} has {', '.join(names[:10]) or 'none'}{more}")


# --- reading ---------------------------------------------------------------------------------------------------------


def read_sample(tickers: Sequence[str] | None = None) -> pd.DataFrame:
    """Reads the embedded sample (AAPL, FB, GOOG, IBM, MSFT, 2000-03-01 to 2013-03-01), adjusted; see `read_prices`."""
    return read_prices(SAMPLE_PATH, tickers)


def read_prices(path: str | os.PathLike, tickers: Sequence[str] | None = None) -> pd.DataFrame:
    """Reads faultless daily bars into the canonical table, adjusted where the file has an adjusted close.

    Args:
        path: see `read_raw`.
        tickers: the tickers to read; all by default.

    Returns:
        DataFrame `ticker, date, open, high, low, close, volume` as `validate_prices` gives it; see `adjust`.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: as `read_raw`, or a value that cannot be a daily bar; `cleaning.clean` repairs those.
    """
    bars = read_raw(path, tickers)
    nameless = bars["ticker"].isna() | (bars["ticker"] == "")
    if nameless.any():
        raise ValueError(f"{path} has a row without a ticker, dated {str(bars['date'][nameless.idxmax()])!r}")
    bars["date"] = _parse_dates(bars, path)
    return adjust(bars) if "adj_close" in bars else validate_prices(bars)


def read_raw(path: str | os.PathLike, tickers: Sequence[str] | None = None) -> pd.DataFrame:
    """Reads daily bars as a file has them.

    Args:
        path: a long table (`.parquet`, `.csv` or `.csv.gz`) with columns `ticker, date, open, high, low, close,
            volume[, adj_close]`, or a folder of `TICKER/TICKER_yahoo_YYYYMMDD.csv` files: `price_history` itself, the
            folder above it, or the folder of one ticker. Column names match in any case and order, `Adj Close` is
            `adj_close`, other columns are ignored. Of several files of one ticker the newest by its stamp is read.
        tickers: the tickers to read; all by default.

    Returns:
        DataFrame `ticker, date, open, high, low, close, volume[, adj_close]`, values and order of the file.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: an unreadable or empty file, an unknown ticker, a missing column.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or directory: {path}")
    if tickers is not None and len(tickers) == 0:
        raise ValueError("the list of tickers is empty")
    if path.is_dir():
        return _read_yahoo(path, tickers)
    return _read_file(path, TABLE_COLUMNS, tickers)


def list_tickers(path: Path) -> list[str | None]:
    """Tickers as a folder or file names them; nothing else is read of a parquet file."""
    if not path.exists():
        raise FileNotFoundError(f"no such file or directory: {path}")
    if path.is_dir():
        return list(_yahoo_files(path))
    if path.suffix.lower() != ".parquet":
        return read_raw(path)["ticker"].unique().tolist()
    with pq.ParquetFile(path) as file:
        known = _known_columns(file.schema_arrow.names, ["ticker"], path)
        columns = [column for column, name in known.items() if name == "ticker"]
        groups = (file.read_row_group(group, columns)[0].unique() for group in range(file.num_row_groups))
        return list(dict.fromkeys(chain(*(group.to_pylist() for group in groups))))


def _read_file(path: Path, required: Sequence[str], tickers: Sequence[str] | None = None) -> pd.DataFrame:
    """Known columns of one file under their canonical names, values as the file has them."""
    name = path.name.lower()
    if not name.endswith((".parquet", ".csv", ".csv.gz")):
        raise ValueError(f"{path} is neither a folder nor a .parquet, .csv or .csv.gz file")
    read = _read_parquet if name.endswith(".parquet") else _read_csv
    try:
        table = read(path, required, tickers)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    bars = table.to_pandas(date_as_object=False)
    if bars.empty:
        raise ValueError(f"{path} has no rows")
    return bars


def _known_columns(header: Sequence[str], required: Sequence[str], path: Path) -> dict[str, str]:
    """Maps a file's own column names to the canonical ones, in the file's order."""
    known = {}
    for column in header:
        name = column.strip().lower().replace(" ", "_")
        if name not in {*TABLE_COLUMNS, "adj_close"}:
            continue
        if name in known.values():
            raise ValueError(f"{path} has column {name!r} twice")
        known[column] = name
    missing = [name for name in required if name not in known.values()]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(header)}")
    return known


def _read_parquet(path: Path, required: Sequence[str], tickers: Sequence[str] | None) -> pa.Table:
    known = _known_columns(pq.read_schema(path).names, required, path)
    ticker = next((column for column, name in known.items() if name == "ticker"), None)
    filters = [(ticker, "in", list(tickers))] if tickers else None
    table = pq.read_table(path, columns=list(known), filters=filters)
    if tickers and len(pc.unique(table[ticker])) < len(set(tickers)):
        every = pq.read_table(path, columns=[ticker])[ticker]
        _check_known(tickers, every.drop_null().unique().to_pylist(), path)
    return table.rename_columns(known)


def _read_csv(path: Path, required: Sequence[str], tickers: Sequence[str] | None) -> pa.Table:
    with pa_csv.open_csv(path) as reader:
        known = _known_columns(reader.schema.names, required, path)
    # Types are given, not inferred: NA and TRUE are tickers.
    types = {column: pa.string() if name in ("ticker", "date") else pa.float64() for column, name in known.items()}
    options = pa_csv.ConvertOptions(include_columns=list(known), column_types=types)
    try:
        table = pa_csv.read_csv(path, convert_options=options)
    except pa.ArrowInvalid:
        # Text among the numbers: keep it, so that validation can say whose and which.
        options.column_types = dict.fromkeys(known, pa.string())
        table = pa_csv.read_csv(path, convert_options=options)
    table = table.rename_columns(known)
    if tickers:
        _check_known(tickers, table["ticker"].unique().to_pylist(), path)
        table = table.filter(pc.is_in(table["ticker"], pa.array(tickers)))
    return table


def _parse_dates(bars: pd.DataFrame, path: Path) -> pd.Series:
    days = parse_dates(bars["date"])
    if days.isna().any():
        row = days.isna().idxmax()
        raise ValueError(f"{path}, {bars['ticker'][row]}: {str(bars['date'][row])!r} is not a date (YYYY-MM-DD)")
    return days


# --- folders of Yahoo files ------------------------------------------------------------------------------------------


def _read_yahoo(path: Path, tickers: Sequence[str] | None) -> pd.DataFrame:
    files = _yahoo_files(path)
    _check_known(tickers, list(files), path)
    wanted = sorted(files if tickers is None else set(tickers))
    tables = [_read_yahoo_file(files[ticker], ticker) for ticker in wanted]
    if any("adj_close" in bars for bars in tables):
        # A file without it is adjusted already.
        tables = [bars if "adj_close" in bars else bars.assign(adj_close=bars["close"]) for bars in tables]
    return pd.concat(tables, ignore_index=True)


def _yahoo_files(path: Path) -> dict[str, Path]:
    """Newest file of every ticker, found by listing alone: no path is ever built from a ticker."""
    root = Path(os.path.abspath(path))  # "." has no name
    root = root / "price_history" if (root / "price_history").is_dir() else root
    newest = {}
    for file in sorted([*root.glob("*.csv"), *root.glob("*/*.csv")], key=lambda file: file.name):
        match = YAHOO_PATTERN.fullmatch(file.name)
        ticker = file.parent.name
        if match is None:
            continue
        if match["ticker"] != ticker:
            raise ValueError(f"{file} is a file of {match['ticker']!r} in the folder of {ticker!r}")
        newest[ticker] = file  # names of one ticker differ in the stamp alone, so the last in order is the newest
    if not newest:
        raise ValueError(f"{path} has no TICKER/TICKER_yahoo_YYYYMMDD.csv file")
    return newest


def _read_yahoo_file(path: Path, ticker: str) -> pd.DataFrame:
    bars = _read_file(path, [column for column in TABLE_COLUMNS if column != "ticker"])
    if "ticker" in bars and (bars["ticker"] != ticker).any():
        other = bars["ticker"][bars["ticker"] != ticker].iloc[0]
        raise ValueError(f"{path} has rows of {other!r} in the folder of {ticker!r}")
    return bars.assign(ticker=ticker)


# --- adjustment ------------------------------------------------------------------------------------------------------


def adjust(table: pd.DataFrame) -> pd.DataFrame:
    """Adjusts raw bars: open, high, low and close for splits and dividends, volume for splits alone, as Yahoo does.

    The factor is `adj_close / close`. A split is a step of the factor by a simple ratio that the close takes the other
    way; volumes before it are multiplied by the ratio, so they count shares as of the ticker's last bar. A spin-off or
    special dividend of just such a size cannot be told from a split by these columns.

    Args:
        table: columns `ticker, date, open, high, low, close, volume, adj_close`, within a ticker oldest first.

    Returns:
        The canonical table, without `adj_close`.

    Raises:
        ValueError: a value that cannot be a daily bar, an adjusted close that is not a positive number; names ticker,
            date and value.
    """
    # The order of validate_prices, so that its rows stay those of adj_close; a categorical would sort otherwise.
    table = table.sort_values("ticker", kind="stable", ignore_index=True, key=lambda ticker: ticker.astype(str))
    bars = validate_prices(table)
    factor = _adjusted_close(table, bars) / bars["close"]
    volume = bars["volume"].to_numpy(copy=True)
    for start, row, ratio in _splits(bars, factor):
        volume[start:row] *= ratio
    # The close takes the same multiplication as the others instead of adj_close itself: multiplying by a positive
    # number is monotone in floating point, so low <= open, close <= high survives the rounding.
    bars[PRICE_COLUMNS] = bars[PRICE_COLUMNS].mul(factor, axis=0)
    bars["volume"] = volume
    return bars


def _adjusted_close(table: pd.DataFrame, bars: pd.DataFrame) -> pd.Series:
    adj_close = pd.to_numeric(table["adj_close"], errors="coerce").astype("float64")
    bad = ~(np.isfinite(adj_close) & (adj_close > 0))
    if bad.any():
        row = bad.idxmax()
        day = bars["date"][row].date()
        raise ValueError(f"{bars['ticker'][row]} {day}: adj_close {table['adj_close'][row]} is not a positive price")
    return adj_close


def _splits(bars: pd.DataFrame, factor: pd.Series) -> list[tuple[int, int, float]]:
    """Splits of all tickers as (first row of the ticker, first row after the split, ratio)."""
    first = (bars["ticker"] != bars["ticker"].shift()).to_numpy()
    factor_step = np.log(factor).diff().to_numpy()
    rows = np.flatnonzero(~first & (np.abs(factor_step) > np.log(1.2)))
    close_step = np.log(bars["close"].to_numpy()[rows] / bars["close"].to_numpy()[rows - 1])
    ratios = SPLIT_RATIOS[np.abs(factor_step[rows, None] - np.log(SPLIT_RATIOS)).argmin(axis=1)]
    is_ratio = np.abs(np.exp(factor_step[rows]) / ratios - 1) < SPLIT_TOLERANCE
    # Half the way is enough, since the day's own return comes on top. A close that did not move was adjusted already.
    close_followed = -close_step / np.log(ratios) > 0.5
    found = is_ratio & close_followed
    starts = np.flatnonzero(first)
    starts = starts[np.searchsorted(starts, rows[found], side="right") - 1]
    return list(zip(starts.tolist(), rows[found].tolist(), ratios[found].tolist(), strict=True))


# --- writing ---------------------------------------------------------------------------------------------------------


def write_table(frame: pd.DataFrame, path: str | os.PathLike) -> None:
    """Writes a table as `.parquet` or `.csv`; see `write_atomically`.

    Raises:
        ValueError: another suffix.
        OSError: the target cannot be written.
    """
    check_suffix(path, ".parquet", ".csv")
    write = frame.to_parquet if Path(path).suffix == ".parquet" else frame.to_csv
    write_atomically(path, partial(write, index=False))
