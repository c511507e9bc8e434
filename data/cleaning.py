"""Raw daily bars to bars that can be trusted: what cannot be right is repaired or dropped, all of it counted.

The steps of `clean`, in order, and what each does. Kinds are the keys of `KINDS`.

1. Tickers lose the spaces around them; rows without a ticker go.
2. A date is the exchange's day. A moment with an offset is converted to the exchange's time zone, unless its clock
   stands at midnight: vendors label days so, and the day is the one written. Rows without a date, or of a day to come,
   go.
3. A row without any price is no bar and goes. A price that is missing, no number, or not positive takes its
   row with it: what the price was is not known. An unknown volume is zero.
4. Exchanged high and low change places. An open or close outside high and low by no more than `OHLC_TOLERANCE` widens
   them; a row further out has a wrong price, nobody can say which, and goes.
5. The table is sorted. Of rows of one ticker and day the last of the file stays, whether they agree or not.
6. Days on which the exchange was closed go; a table full of them has another calendar and is refused.
7. Bad prints, events and suspicions are reported and left alone. Returns are of `adj_close` where the table has it.
8. Bars of a halt go: they repeat a price that nobody traded at.
9. A table with `adj_close` is adjusted; see `prices.adjust`.
10. Sessions without a bar, inside the life of a ticker, are counted. A session that has no row is a masked step to
    `SpaceExploreFeatureExtractor.encode`; only `fill` invents a bar for it.

Nothing done to a row depends on later days, except by `drop_bad_prints`, which says so.
"""

import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from spaceexploreai.data.prices import SAMPLE_PATH, adjust, parse_tickers, read_raw
from spaceexploreai.feature_extraction_spaceexplore import (
    PRICE_COLUMNS,
    TABLE_COLUMNS,
    check_columns,
    exchange_calendar,
    parse_date,
    parse_dates,
    sessions_of_years,
)

OHLC_TOLERANCE = 0.005  # of the price; a vendor's rounding or a late correction, not another day's price
LARGE_RETURN, HUGE_RETURN = 0.5, 1.0  # absolute log-returns
REVERSAL = 0.1  # share of the smaller leg that a bad print's two legs may differ by
ROUND_RATIOS = np.array([1.5, 2.0, 3.0, 4.0, 5.0, 10.0])
RATIO_TOLERANCE = 0.02
LONG_GAP = pd.Timedelta(days=10)  # calendar days
STALE_CLOSES = 10  # equal closes in a row
CLOSED_DAYS = 10  # as many a table may have, or a tenth of its rows, before its calendar is in doubt

KINDS = {
    "no_ticker": "no ticker",
    "ticker_spaces": "ticker with spaces around it",
    "no_date": "not a date (YYYY-MM-DD)",
    "time_zone": "at the exchange the day is another than the one written",
    "future": "dated after today",
    "empty_bar": "row without any price",
    "no_price": "a price is missing or not a finite number",
    "non_positive_price": "a price is not positive",
    "bad_volume": "volume is missing, negative or not a finite number",
    "ohlc_violation": "high and low do not contain open and close",
    "unsorted": "comes after a later date",
    "duplicate": "the same bar again",
    "conflict": "another bar of the same ticker and day",
    "non_session": "the exchange was closed",
    "zero_volume": "no share was traded",
    "halt": "no volume, where there has been some, and the close of the bar before",
    "large_return": f"absolute log-return above {LARGE_RETURN:g}",
    "huge_return": f"absolute log-return above {HUGE_RETURN:g}",
    "bad_print": f"a return above {LARGE_RETURN:g} that the next bar takes back",
    "split_like": "the price moved by a round ratio: an unadjusted split?",
    "adjusted_split": "close over adj_close moved by a round ratio: a split, adjusted",
    "gap": f"more than {LONG_GAP.days} days after the bar before",
    "stale": f"{STALE_CLOSES} equal closes in a row",
    "delisted": f"last bar more than {LONG_GAP.days} days before the end of the table",
    "lost_ticker": "ticker without a usable bar",
    "missing_session": "session without a row",
    "lost_session": "session whose row went",
}
REMOVALS = ("dropped", "merged", "masked")
REFUSED = ("dropped", "merged", "repaired", "filled")

_MOMENT = r"[T ](\d{2}:\d{2}[\d:.]*)(?:Z|[+-]\d{2}:?\d{2})$"
_MIDNIGHT = r"00:00(?::00(?:\.0+)?)?"
_MOVE = "close {before:.7g} to {close:.7g}, log-return {returns:+.3f}"
_BAR = "open {open:.7g} high {high:.7g} low {low:.7g} close {close:.7g}"


# --- the report ------------------------------------------------------------------------------------------------------


@dataclass
class Finding:
    """All cases of one kind that met the same end, with the first of them as examples."""

    kind: str
    action: str  # of REFUSED, or not refused by strict: masked, converted, reported
    count: int
    examples: list[dict[str, str]]  # ticker, date, was, became

    def __str__(self) -> str:
        first = self.examples[0] if self.examples else None
        example = "" if first is None else f", e.g. {_case(first)}"
        return f"{self.count:>9,} {self.action:<9} {self.kind:<18} {KINDS[self.kind]}{example}"


@dataclass
class CleaningReport:
    """What cleaning found and did. `print(report)` is for people, `to_dict()` for JSON, `to_frame()` for tables."""

    calendar: str
    rows_in: int
    rows_out: int = 0
    tickers: int = 0
    start: str = ""
    end: str = ""
    findings: list[Finding] = field(default_factory=list)

    def count(self, kind: str, *actions: str) -> int:
        """Cases of a kind; of some actions only, where they are given."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of finding; there are {', '.join(KINDS)}")
        return sum(one.count for one in self.findings if one.kind == kind and (not actions or one.action in actions))

    @property
    def counts(self) -> dict[str, int]:
        return {kind: self.count(kind) for kind in KINDS}

    @property
    def removed(self) -> int:
        """Rows of the input that have no row in the output."""
        return sum(one.count for one in self.findings if one.action in REMOVALS)

    @property
    def added(self) -> int:
        """Rows of the output that have no row in the input."""
        return sum(self.count(kind, "filled") for kind in ("missing_session", "lost_session"))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"counts": self.counts, "removed": self.removed, "added": self.added}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "CleaningReport":
        """What `to_dict` wrote."""
        known = {name: fields[name] for name in cls.__dataclass_fields__}
        return cls(**known | {"findings": [Finding(**one) for one in fields["findings"]]})

    def to_frame(self) -> pd.DataFrame:
        """One row per example: `kind, action, count, ticker, date, was, became`."""
        columns = ["kind", "action", "count", "ticker", "date", "was", "became"]
        rows = [asdict(one) | example for one in self.findings for example in one.examples]
        return pd.DataFrame(rows, columns=columns)

    def __str__(self) -> str:
        lines = [
            f"{self.rows_in:,} rows read, {self.removed:,} removed, {self.added:,} added: {self.rows_out:,} rows of "
            f"{self.tickers:,} tickers, {self.start} to {self.end}, sessions of {self.calendar}"
        ]
        return "\n".join([*lines, *map(str, self.findings)] if self.findings else [*lines, "nothing to report"])


def _case(example: dict[str, str]) -> str:
    became = f" -> {example['became']}" if example["became"] else ""
    return f"{example['ticker']} {example['date']}: {example['was']}{became}".removesuffix(": ")


class _Notes:
    """Writes a report; in strict mode the first repair is an error instead."""

    def __init__(self, report: CleaningReport, strict: bool, examples: int):
        self.report, self.strict, self.examples = report, strict, examples

    def add(self, kind: str, action: str, rows: pd.DataFrame, was: str = "", became: str = "") -> None:
        """Records all of `rows`; `was` and `became` are formats over their columns."""
        if rows.empty:
            return
        first = [_example(row, was, became) for row in rows.head(max(self.examples, 1)).to_dict("records")]
        if self.strict and action in REFUSED:
            more = f" (and {len(rows) - 1:,} more)" if len(rows) > 1 else ""
            raise ValueError(f"{_case(first[0] | {'became': ''})}: {KINDS[kind]}{more}")
        self.report.findings.append(Finding(kind, action, len(rows), first[: self.examples]))


def _example(row: dict[str, Any], was: str, became: str) -> dict[str, str]:
    date = row["date"]
    date = f"{date:%Y-%m-%d}" if isinstance(date, pd.Timestamp) else str(date)
    return {"ticker": str(row["ticker"]), "date": date, "was": was.format(**row), "became": became.format(**row)}


# --- cleaning --------------------------------------------------------------------------------------------------------


def clean(
    bars: pd.DataFrame,
    calendar: str = "XNYS",
    strict: bool = False,
    fill: bool = False,
    drop_bad_prints: bool = False,
    today: str | pd.Timestamp | None = None,
    examples: int = 5,
) -> tuple[pd.DataFrame, CleaningReport]:
    """Cleans a table of raw daily bars; the steps are at the top of this file.

    Args:
        bars: columns `ticker, date, open, high, low, close, volume[, adj_close]` as a file has them: text, missing
            values and repeated rows included. Other columns are ignored.
        calendar: exchange_calendars code of the exchange; `24/7` has no closed days.
        strict: refuse a table of which a row would be dropped, merged, repaired or filled. Events, suspicions, masked
            steps (bars of a halt, rows without a price, sessions without a row) and converted time zones pass.
        fill: give sessions without a bar, inside the life of a ticker, the last close and no volume: prices that were
            never made.
        drop_bad_prints: treat bars that the next bar takes back as missing. This is hindsight: on the day itself
            nobody could know.
        today: the last day that can have a bar; the exchange's own today by default.
        examples: cases that the report shows of each kind.

    Returns:
        The canonical table (see `validate_prices`), adjusted, and the report.

    Raises:
        ValueError: a missing column, an empty table, no usable bar, a table of another calendar; when strict, the
            first defect. Names ticker, date and value.
    """
    check_columns(bars)
    bars = bars.reset_index(drop=True)
    report = CleaningReport(calendar, len(bars))
    notes = _Notes(report, strict, examples)
    seen = _read_dates(_read_tickers(bars, notes), bars, calendar, today, notes)
    table = _read_numbers(_refuse_nothing_left(seen, notes), bars, fill, notes)
    table = _one_a_day(_sort(_contain(table, notes), notes), notes)
    sessions = sessions_of_years(calendar, seen["date"].min(), seen["date"].max())
    table = _drop_closed_days(table, sessions, calendar, notes)
    table = _handle_bad_prints(table, drop_bad_prints, notes)
    table = _handle_events(_refuse_nothing_left(table, notes), fill, notes)
    _report_lost_tickers(seen, table, notes)
    grid = _Grid(table, sessions)
    places = grid.places(table)
    _report_missing(grid, places, seen, fill, notes)
    table = _finish(table)
    if fill:
        table = _fill(table, grid, places)
    report.rows_out, report.tickers = len(table), table["ticker"].nunique()
    report.start, report.end = (f"{day:%Y-%m-%d}" for day in (table["date"].min(), table["date"].max()))
    return table, report


def read_clean(
    path: str | None = None,
    tickers: str | None = None,
    calendar: str = "XNYS",
    strict: bool = False,
    fill: bool = False,
) -> tuple[pd.DataFrame, CleaningReport]:
    """Reads and cleans what a command line names.

    Args:
        path: file or folder, see `prices.read_raw`; the embedded sample by default.
        tickers: comma-separated, see `prices.parse_tickers`; all by default.
        calendar, strict, fill: of `clean`.
    """
    names = None if tickers is None else parse_tickers(tickers)
    return clean(read_raw(SAMPLE_PATH if path is None else path, names), calendar, strict, fill)


def load_prices(*args, **options) -> pd.DataFrame:
    """`read_clean` for the command lines: prints the report to standard error, returns the table."""
    table, report = read_clean(*args, **options)
    print(report, file=sys.stderr)
    return table


# --- tickers and dates ---


def _read_tickers(bars: pd.DataFrame, notes: _Notes) -> pd.DataFrame:
    codes, written = pd.factorize(bars["ticker"])
    written = [str(name) for name in written]
    names = [name.strip() for name in written]
    nameless = np.array([*(name == "" for name in names), True])[codes]  # code -1 is a missing value
    rows = bars[nameless]
    notes.add("no_ticker", "dropped", rows.assign(ticker=[f"row {row}" for row in rows.index]), "close {close}")
    spaced = np.array([*(name != plain for name, plain in zip(written, names, strict=True)), False])[codes]
    spaced &= ~nameless
    categories = sorted(set(names) - {""})
    renumbered = np.array([*(categories.index(name) if name else -1 for name in names), -1])
    tickers = pd.Series(pd.Categorical.from_codes(renumbered[codes], categories), name="ticker")
    rows = bars.loc[spaced, ["date"]].assign(ticker=tickers[spaced], written=bars["ticker"][spaced])
    notes.add("ticker_spaces", "repaired", rows, "{written!r}", "{ticker}")
    return tickers[~nameless].to_frame()


def _read_dates(table: pd.DataFrame, bars: pd.DataFrame, calendar: str, today, notes: _Notes) -> pd.DataFrame:
    zone = exchange_calendar(calendar, 2020, 2020).tz
    today = pd.Timestamp.now(zone).tz_localize(None) if today is None else parse_date(today)
    raw = bars["date"].loc[table.index]
    written, days = _trading_days(raw, zone)
    table = table.assign(date=days)
    dateless = days.isna()
    notes.add("no_date", "dropped", table[dateless].assign(date=raw[dateless]), "date {date}")
    moved = ~dateless & (written != days)
    notes.add("time_zone", "converted", table[moved].assign(raw=raw[moved]), "{raw}", "{date:%Y-%m-%d}")
    future = days > today
    notes.add("future", "dropped", table[future], f"today is {today:%Y-%m-%d}")
    return table[~dateless & ~future]


def _trading_days(raw: pd.Series, zone) -> tuple[pd.Series, pd.Series]:
    """The day as written, and the exchange's day."""
    if not pd.api.types.is_datetime64_any_dtype(raw):
        codes, unique = pd.factorize(raw.astype(str).str.strip())
        written, days = _days_of_text(pd.Series(unique, dtype=str), zone)
        at = [pd.Series(one.to_numpy()[codes], raw.index) for one in (written, days)]
        return at[0].where(codes >= 0), at[1].where(codes >= 0)
    written = parse_dates(raw)
    if raw.dt.tz is None:
        return written, written
    labelled = raw.dt.tz_localize(None) == raw.dt.tz_localize(None).dt.normalize()
    return written, written.where(labelled, _local_day(raw, zone))


def _days_of_text(text: pd.Series, zone) -> tuple[pd.Series, pd.Series]:
    written = parse_dates(text)
    clock = text.str.extract(_MOMENT, expand=False)
    moves = written.notna() & clock.notna() & ~clock.str.fullmatch(_MIDNIGHT).eq(True)
    moments = pd.to_datetime(text.where(moves).str.replace("/", "-"), utc=True, format="ISO8601", errors="coerce")
    return written, _local_day(moments, zone).fillna(written)


def _local_day(moments: pd.Series, zone) -> pd.Series:
    return moments.dt.tz_convert(zone).dt.tz_localize(None).dt.normalize().astype("datetime64[ns]")


# --- numbers ---


def _read_numbers(table: pd.DataFrame, bars: pd.DataFrame, fill: bool, notes: _Notes) -> pd.DataFrame:
    """The bars whose prices can be read."""
    prices = [*PRICE_COLUMNS, *({"adj_close"} & set(bars.columns))]
    numbers = {name: _numbers(bars[name].loc[table.index]) for name in [*prices, "volume"]}
    unknown = {name: ~np.isfinite(numbers[name]) for name in prices}
    empty = np.logical_and.reduce([np.isnan(numbers[name]) for name in PRICE_COLUMNS])
    notes.add("empty_bar", "dropped" if fill else "masked", table[empty])
    bad = np.logical_or.reduce(list(unknown.values())) & ~empty
    notes.add("no_price", "dropped", _named(table, bars, unknown, bad), "{column} {value}")
    negative = {name: numbers[name] <= 0 for name in prices}
    bad_sign = np.logical_or.reduce(list(negative.values())) & ~bad & ~empty
    notes.add("non_positive_price", "dropped", _named(table, bars, negative, bad_sign), "{column} {value}")
    kept = ~(bad | bad_sign | empty)
    no_volume = {"volume": ~np.isfinite(numbers["volume"]) | (numbers["volume"] < 0)}
    repaired = no_volume["volume"] & kept
    notes.add("bad_volume", "repaired", _named(table, bars, no_volume, repaired), "volume {value}", "volume 0")
    numbers["volume"] = np.where(repaired, 0.0, numbers["volume"])
    columns = {name: values[kept] for name, values in numbers.items()}
    return table[kept].assign(**columns)


def _numbers(column: pd.Series) -> np.ndarray:
    if not pd.api.types.is_numeric_dtype(column):
        column = pd.to_numeric(column.astype(str), errors="coerce")
    return column.to_numpy("float64", na_value=np.nan)


def _named(table: pd.DataFrame, bars: pd.DataFrame, bad: dict[str, np.ndarray], rows: np.ndarray) -> pd.DataFrame:
    """Rows with the name of the first column that is bad there, and its value as the file has it."""
    if not rows.any():
        return table.iloc[:0]
    first = np.stack([column[rows] for column in bad.values()], axis=1).argmax(axis=1)
    found = table[rows]
    values = bars[list(bad)].loc[found.index].astype(object).to_numpy()
    return found.assign(column=np.array(list(bad))[first], value=values[np.arange(len(found)), first])


def _contain(table: pd.DataFrame, notes: _Notes) -> pd.DataFrame:
    """Repairs or drops bars whose high and low do not contain open and close."""
    top, bottom = table[["open", "close"]].max(axis=1), table[["open", "close"]].min(axis=1)
    high, low = table["high"], table["low"]
    violated = (high < top) | (low > bottom)
    exchanged = violated & (low >= top) & (high <= bottom)
    excess = np.maximum(top / high, low / bottom) - 1
    small = violated & ~exchanged & (excess <= OHLC_TOLERANCE)
    new_high = high.mask(exchanged, low).mask(small, np.maximum(high, top))
    new_low = low.mask(exchanged, high).mask(small, np.minimum(low, bottom))
    repaired = exchanged | small
    rows = table[repaired].assign(new_high=new_high[repaired], new_low=new_low[repaired])
    notes.add("ohlc_violation", "repaired", rows, _BAR, "high {new_high:.7g} low {new_low:.7g}")
    rejected = violated & ~exchanged & ~small
    notes.add("ohlc_violation", "dropped", table[rejected], _BAR)
    return table.assign(high=new_high, low=new_low)[~rejected]


# --- order, duplicates, closed days ---


def _keys(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return table["ticker"].cat.codes.to_numpy("int64"), table["date"].to_numpy("datetime64[ns]").astype("int64")


def _sort(table: pd.DataFrame, notes: _Notes) -> pd.DataFrame:
    tickers, days = _keys(table)
    order = np.argsort(tickers, kind="stable")
    back = (np.diff(tickers[order]) == 0) & (np.diff(days[order]) < 0)
    rows = table.iloc[order[1:][back]].assign(later=table["date"].to_numpy()[order[:-1][back]])
    notes.add("unsorted", "repaired", rows, "after {later:%Y-%m-%d}", "sorted")
    return table.iloc[np.lexsort((days, tickers))]


def _one_a_day(table: pd.DataFrame, notes: _Notes) -> pd.DataFrame:
    """Of the rows of one ticker and day, which stand in the order of the file, the last."""
    tickers, days = _keys(table)
    again = (np.diff(tickers) == 0) & (np.diff(days) == 0)
    last = np.append(~again, True)[: len(table)]
    stays = np.flatnonzero(last)
    lost = np.flatnonzero(~last)
    values = table.drop(columns=["ticker", "date"])
    kept = values.iloc[stays[np.searchsorted(stays, lost)]]
    differs = (values.iloc[lost].to_numpy() != kept.to_numpy()).any(axis=1)
    notes.add("duplicate", "merged", table.iloc[lost[~differs]], _BAR)
    rows = table.iloc[lost[differs]].assign(kept=kept["close"].to_numpy()[differs])
    notes.add("conflict", "merged", rows, _BAR, "the last one, close {kept:.7g}")
    return table.iloc[stays]


def _refuse_nothing_left(table: pd.DataFrame, notes: _Notes) -> pd.DataFrame:
    if table.empty:
        first = next((one for one in notes.report.findings if one.action in REMOVALS), None)
        why = (
            ""
            if first is None
            else f"; the first lost: {' '.join(map(_case, first.examples[:1]))} {KINDS[first.kind]}"
        )
        raise ValueError(f"no usable bar in {notes.report.rows_in:,} rows{why}")
    return table


def _drop_closed_days(table: pd.DataFrame, sessions: np.ndarray, calendar: str, notes: _Notes) -> pd.DataFrame:
    closed = ~table["date"].isin(sessions).to_numpy()
    if closed.sum() > max(CLOSED_DAYS, len(table) / 10):
        row = table[closed].iloc[0]
        raise ValueError(
            f"{closed.sum():,} of {len(table):,} bars are of days without a session of {calendar}, the first "
            f"{row['ticker']} {row['date'].date()}: is it the calendar of this table?"
        )
    notes.add("non_session", "dropped", table[closed], "a {date:%A}, close {close:.7g}")
    return table[~closed]


# --- events and suspicions -------------------------------------------------------------------------------------------


def _starts(table: pd.DataFrame) -> np.ndarray:
    """Which rows are the first of their ticker."""
    return np.append(True, np.diff(_keys(table)[0]) != 0)[: len(table)]


def _before(table: pd.DataFrame, column: str) -> np.ndarray:
    """Value of the bar before, NaN at the first."""
    return np.where(_starts(table), np.nan, np.append(np.nan, table[column].to_numpy()[:-1])[: len(table)])


def _log_returns(table: pd.DataFrame, column: str) -> np.ndarray:
    return np.log(table[column].to_numpy()) - np.log(_before(table, column))


def _handle_bad_prints(table: pd.DataFrame, drop: bool, notes: _Notes) -> pd.DataFrame:
    returns = _log_returns(table, "adj_close" if "adj_close" in table else "close")
    found = _taken_back(returns)
    rows = table[found].assign(before=_before(table, "close")[found], returns=returns[found])
    notes.add("bad_print", "dropped" if drop else "reported", rows, _MOVE)
    return table[~found] if drop else table


def _taken_back(returns: np.ndarray) -> np.ndarray:
    """Large moves whose opposite follows, and no other beside the two: what goes to and fro is no misprint."""
    large = np.append(np.abs(returns) > LARGE_RETURN, False)
    rows = np.flatnonzero(large[:-2] & large[1:-1])  # never the first, which has no return
    there, back = returns[rows], returns[rows + 1]
    reverts = np.abs(there + back) < REVERSAL * np.minimum(np.abs(there), np.abs(back))
    found = np.zeros(len(returns), dtype=bool)
    found[rows[reverts & ~large[rows - 1] & ~large[rows + 2]]] = True
    return found


def _handle_events(table: pd.DataFrame, fill: bool, notes: _Notes) -> pd.DataFrame:
    """The table without the bars of halts, which a filled one would have again."""
    before = _before(table, "close")
    no_volume = (table["volume"] == 0).to_numpy()
    halted = no_volume & (table["close"] == before).to_numpy() & _has_had_volume(table)
    notes.add("zero_volume", "reported", table[no_volume], "close {close:.7g}")
    notes.add("halt", "reported" if fill else "masked", table[halted], "close {close:.7g}")
    _report_returns(table, before, notes)
    _report_gaps(table, notes)
    _report_stale(table, before, notes)
    _report_delisted(table, notes)
    return table if fill else table[~halted]


def _has_had_volume(table: pd.DataFrame) -> np.ndarray:
    """Indices and currencies never have: a close that stands still is no halt of theirs."""
    row = np.arange(len(table))
    first = np.maximum.accumulate(np.where(_starts(table), row, 0))
    traded = np.maximum.accumulate(np.where(table["volume"] > 0, row, -1))
    return traded >= first


def _report_returns(table: pd.DataFrame, before: np.ndarray, notes: _Notes) -> None:
    of_close = _log_returns(table, "close")
    returns = _log_returns(table, "adj_close") if "adj_close" in table else of_close
    size = np.abs(returns)

    def add(kind: str, found: np.ndarray, ratio: np.ndarray, text: str) -> None:
        if not found.any():
            return
        rows = table[found].assign(before=before[found], returns=returns[found], ratio=ratio[found])
        notes.add(kind, "reported", rows.sort_values("returns", key=np.abs, ascending=False, kind="stable"), text)

    add("large_return", size > LARGE_RETURN, size, _MOVE)
    add("huge_return", size > HUGE_RETURN, size, _MOVE)
    ratio = _round_ratio(returns)
    add("split_like", ratio > 0, ratio, _MOVE + ", ratio {ratio:g}")
    ratio = _round_ratio(of_close - returns)
    add("adjusted_split", (ratio > 0) & (size < np.abs(of_close) / 2), ratio, _MOVE + " adjusted, ratio {ratio:g}")


def _round_ratio(returns: np.ndarray) -> np.ndarray:
    """The round ratio that each price moved by, up or down; 0 where there is none."""
    move = np.exp(np.abs(returns))
    rows = np.flatnonzero(move > ROUND_RATIOS[0] * (1 - RATIO_TOLERANCE))
    distance = np.abs(move[rows, None] / ROUND_RATIOS - 1)
    ratios = np.zeros(len(returns))
    ratios[rows] = np.where(distance.min(axis=1) < RATIO_TOLERANCE, ROUND_RATIOS[distance.argmin(axis=1)], 0)
    return ratios


def _report_gaps(table: pd.DataFrame, notes: _Notes) -> None:
    gap = table["date"].diff().to_numpy()
    rows = np.flatnonzero(~_starts(table) & (gap > LONG_GAP))
    found = table.iloc[rows].assign(previous=table["date"].to_numpy()[rows - 1], gap=gap[rows])
    notes.add("gap", "reported", found, "{gap.days} days after {previous:%Y-%m-%d}")


def _report_stale(table: pd.DataFrame, before: np.ndarray, notes: _Notes) -> None:
    row = np.arange(len(table))
    since = np.maximum.accumulate(np.where(table["close"].to_numpy() == before, 0, row))
    rows = np.flatnonzero(row - since == STALE_CLOSES - 1)
    found = table.iloc[rows].assign(since=table["date"].to_numpy()[since[rows]])
    notes.add("stale", "reported", found, "close {close:.7g} since {since:%Y-%m-%d}")


def _report_delisted(table: pd.DataFrame, notes: _Notes) -> None:
    end = table["date"].max()
    last = table[np.append(_starts(table)[1:], True)]
    rows = last[last["date"] < end - LONG_GAP]
    notes.add("delisted", "reported", rows, f"last bar; the table ends {end:%Y-%m-%d}")


def _report_lost_tickers(seen: pd.DataFrame, table: pd.DataFrame, notes: _Notes) -> None:
    lost = seen[~seen["ticker"].isin(table["ticker"].unique())]
    notes.add("lost_ticker", "reported", lost.drop_duplicates("ticker"), "none of its rows was kept")


# --- sessions without a bar ------------------------------------------------------------------------------------------


class _Grid:
    """Every session from the first bar of each ticker to its last.

    Args:
        table: sorted bars, all on sessions.
        sessions: (S,) days of the exchange.
    """

    def __init__(self, table: pd.DataFrame, sessions: np.ndarray):
        self.tickers = table["ticker"].cat.categories
        self.sessions = sessions
        codes, session = self._locate(table)
        starts = np.flatnonzero(_starts(table))
        self.first = np.full(len(self.tickers), len(sessions))
        self.last = np.full(len(self.tickers), -1)
        self.first[codes[starts]] = session[starts]
        self.last[codes] = session  # of a ticker's bars the last is written last
        length = np.maximum(self.last - self.first + 1, 0)
        self.shift = np.cumsum(length) - length - self.first
        self.codes = np.repeat(np.arange(len(self.tickers)), length)
        self.numbers = np.arange(len(self.codes)) - self.shift[self.codes]

    def _locate(self, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Codes of the tickers and numbers of the sessions, -1 for a closed day."""
        codes, days = _keys(rows)
        sessions = self.sessions.astype("int64")
        number = np.searchsorted(sessions, days).clip(max=len(sessions) - 1)
        return codes, np.where(sessions[number] == days, number, -1)

    def places(self, rows: pd.DataFrame) -> np.ndarray:
        """Where in the grid each row is, -1 for outside of it."""
        codes, session = self._locate(rows)
        inside = (session >= self.first[codes]) & (session <= self.last[codes])
        return np.where(inside, session + self.shift[codes], -1)

    def frame(self, where: np.ndarray | slice) -> pd.DataFrame:
        tickers = pd.Categorical.from_codes(self.codes[where], self.tickers)
        return pd.DataFrame({"ticker": tickers, "date": self.sessions[self.numbers[where]]})


def _report_missing(grid: _Grid, places: np.ndarray, seen: pd.DataFrame, fill: bool, notes: _Notes) -> None:
    vacant = np.ones(len(grid.codes) + 1, dtype=bool)  # the last stands for all that is outside
    vacant[places] = vacant[-1] = False
    lost = np.zeros_like(vacant)
    lost[grid.places(seen)] = True
    if fill:
        notes.add("lost_session", "filled", grid.frame((vacant & lost)[:-1]))
    notes.add("missing_session", "filled" if fill else "reported", grid.frame((vacant & ~lost)[:-1]))


def _finish(table: pd.DataFrame) -> pd.DataFrame:
    table = table.astype({"ticker": str}).reset_index(drop=True)
    return adjust(table) if "adj_close" in table else table[TABLE_COLUMNS]


def _fill(table: pd.DataFrame, grid: _Grid, places: np.ndarray) -> pd.DataFrame:
    vacant = np.ones(len(grid.codes), dtype=bool)
    vacant[places] = False
    # Each ticker begins with a bar, so the newest up to a vacant session is its own.
    newest = np.cumsum(~vacant) - 1
    filled = table.iloc[newest].reset_index(drop=True)
    filled["date"] = grid.sessions[grid.numbers]
    filled.loc[vacant, "volume"] = 0.0
    for column in PRICE_COLUMNS:
        filled[column] = filled[column].mask(vacant, filled["close"])
    return filled
