"""Malformed bars, each an error or a counted repair; what cleaning must never do, as properties."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spaceexploreai.data.cleaning import KINDS, REFUSED, CleaningReport, clean, load_prices
from spaceexploreai.data.prices import SAMPLE_PATH, adjust, read_sample
from spaceexploreai.feature_extraction_spaceexplore import PRICE_COLUMNS, TABLE_COLUMNS, validate_prices

# The first sixteen sessions of 2020 at the NYSE: closed on New Year, weekends and the 20th (Martin Luther King Day).
DAYS = [f"2020-01-{day:02}" for day in (2, 3, 6, 7, 8, 9, 10, 13, 14, 15, 16, 17, 21, 22, 23, 24)]
LEVELS = {"AAA": 10.0, "BBB": 50.0}
ROW = 2  # of AAA, on 2020-01-06, that most cases change
HERE = ("AAA", "2020-01-06")

Rows = list[dict[str, Any]]


def good_rows() -> Rows:
    rows = []
    for ticker, level in LEVELS.items():
        for step, day in enumerate(DAYS):
            close = level * (1 + step / 100)
            prices = {"open": close * 0.99, "high": close * 1.02, "low": close * 0.97, "close": close}
            rows.append({"ticker": ticker, "date": day, **prices, "volume": 100.0 + step})
    return rows


def canonical(rows: Rows) -> pd.DataFrame:
    return pd.DataFrame(rows).astype({"date": "datetime64[ns]"})[TABLE_COLUMNS]


def keyed(table: pd.DataFrame) -> dict[tuple[str, str], dict[str, float]]:
    days = table["date"].dt.strftime("%Y-%m-%d")
    return dict(zip(zip(table["ticker"], days, strict=True), table[TABLE_COLUMNS[2:]].to_dict("records"), strict=True))


def found(report) -> dict[tuple[str, str], int]:
    return {(one.kind, one.action): one.count for one in report.findings}


# --- malformed rows: every one a counted repair, removal or report ---------------------------------------------------


@dataclass
class Case:
    name: str
    edit: Callable[[Rows], Rows | None]
    found: dict[tuple[str, str], int]
    gone: list[tuple[str, str]] = field(default_factory=list)
    now: dict[str, float] = field(default_factory=dict)  # of HERE
    absent: list[tuple[str, str]] = field(default_factory=list)  # the input has no row


def put(**values) -> Callable[[Rows], None]:
    return lambda rows: rows[ROW].update(values)


def rejects(name: str, kind: str, **values) -> Case:
    return Case(name, put(**values), {(kind, "dropped"): 1}, [HERE])


def masks(name: str, kind: str, **values) -> Case:
    return Case(name, put(**values), {(kind, "masked"): 1}, [HERE])


def displaces(name: str, kind: str, **values) -> Case:
    """A row that nobody can tell to be that of HERE."""
    return Case(name, put(**values), {(kind, "dropped"): 1, ("missing_session", "reported"): 1}, [HERE])


def unpriced(value) -> dict[str, Any]:
    return dict.fromkeys(PRICE_COLUMNS, value)


def with_adjusted(value) -> Callable[[Rows], None]:
    def edit(rows):
        for row in rows:
            row["adj_close"] = row["close"]
        rows[ROW]["adj_close"] = value

    return edit


def append(*copies: dict[str, Any]) -> Callable[[Rows], None]:
    """Repeats the row of HERE at the end of the table, changed; the end is out of order."""
    return lambda rows: rows.extend({**rows[ROW], **changes} for changes in copies)


def after(*copies: dict[str, Any]) -> Callable[[Rows], None]:
    def edit(rows):
        rows[ROW + 1 : ROW + 1] = [{**rows[ROW], **changes} for changes in copies]

    return edit


def remove(*steps: int, ticker: str = "AAA") -> Callable[[Rows], Rows]:
    lost = {(ticker, DAYS[step]) for step in steps}
    return lambda rows: [row for row in rows if (row["ticker"], row["date"]) not in lost]


def lost_keys(*steps: int, ticker: str = "AAA") -> list[tuple[str, str]]:
    return [(ticker, DAYS[step]) for step in steps]


CLOSE = 10.0 * 1.02  # of HERE; open 10.098, high 10.404, low 9.894
UNSORTED = ("unsorted", "repaired")

CASES = [
    # prices that are no numbers
    rejects("close NaN", "no_price", close=float("nan")),
    rejects("close None", "no_price", close=None),
    rejects("close NA", "no_price", close=pd.NA),
    rejects("close infinite", "no_price", close=float("inf")),
    rejects("close minus infinite", "no_price", close=float("-inf")),
    rejects("close text", "no_price", close="abc"),
    rejects("close empty text", "no_price", close=""),
    rejects("close with a thousands comma", "no_price", close="10,20"),
    rejects("close with a currency", "no_price", close="$10.2"),
    rejects("open missing", "no_price", open=None),
    rejects("high missing", "no_price", high=float("nan")),
    rejects("low is n/a", "no_price", low="n/a"),
    rejects("open infinite", "no_price", open=float("inf")),
    rejects("open, high, low missing", "no_price", open=None, high=None, low=None),
    # prices that are not positive
    rejects("close zero", "non_positive_price", close=0.0),
    rejects("close negative", "non_positive_price", close=-10.2),
    rejects("open zero, as old Yahoo files", "non_positive_price", open=0),
    rejects("low minus zero", "non_positive_price", low=-0.0),
    rejects("high negative", "non_positive_price", high=-1),
    rejects("all zero", "non_positive_price", **unpriced(0.0)),
    # no price at all
    masks("all NaN", "empty_bar", **unpriced(float("nan"))),
    masks("all null, as Yahoo writes holidays", "empty_bar", **unpriced("null"), volume="null"),
    masks("all empty", "empty_bar", **unpriced(""), volume=0),
    # the adjusted close is a price
    Case("adj_close missing", with_adjusted(None), {("no_price", "dropped"): 1}, [HERE]),
    Case("adj_close text", with_adjusted("-"), {("no_price", "dropped"): 1}, [HERE]),
    Case("adj_close zero", with_adjusted(0.0), {("non_positive_price", "dropped"): 1}, [HERE]),
    Case("adj_close negative", with_adjusted(-1.0), {("non_positive_price", "dropped"): 1}, [HERE]),
    # volume: unknown is zero, and zero is reported
    *(
        Case(
            f"volume {value!r}",
            put(volume=value),
            {("bad_volume", "repaired"): 1, ("zero_volume", "reported"): 1},
            now={"volume": 0.0},
        )
        for value in (float("nan"), None, -1, -(2**31), float("inf"), "lots", "")
    ),
    Case("volume zero", put(volume=0), {("zero_volume", "reported"): 1}, now={"volume": 0.0}),
    # high and low
    Case(
        "close just above high",
        put(high=CLOSE * 0.9951),
        {("ohlc_violation", "repaired"): 1},
        now={"high": CLOSE},
    ),
    Case(
        "open just below low",
        put(low=10.098 * 1.0049),
        {("ohlc_violation", "repaired"): 1},
        now={"low": 10.098},
    ),
    Case(
        "high and low between open and close",
        put(open=10.0, high=10.03, low=10.02, close=10.04),
        {("ohlc_violation", "repaired"): 1},
        now={"open": 10.0, "high": 10.04, "low": 10.0, "close": 10.04},
    ),
    Case(
        "high and low exchanged",
        put(high=CLOSE * 0.97, low=CLOSE * 1.02),
        {("ohlc_violation", "repaired"): 1},
    ),
    rejects("close above high by 0.6 %", "ohlc_violation", high=CLOSE * 0.994),
    rejects("open below low by 0.6 %", "ohlc_violation", open=CLOSE * 0.97 / 1.006),
    rejects("high below low and within", "ohlc_violation", high=10.15, low=10.3),
    rejects("close unadjusted, as LNT 2016-05-19", "ohlc_violation", close=CLOSE / 2),
    rejects("open unadjusted, as CHD 2014-05-19", "ohlc_violation", open=CLOSE / 2),
    rejects("high a cent", "ohlc_violation", high=0.01),
    # dates
    *(
        displaces(f"date {value!r}", "no_date", date=value)
        for value in (
            *("soon", "", None, float("nan"), pd.NaT, "2020-13-01", "2020-02-30", "01/06/2020", "6.1.2020", "2020-01"),
            *(5, 20200132, 1578268800, 43836.0, "1677-01-01", "2999-01-04"),
        )
    ),
    displaces("a day of the next century", "future", date="2099-01-05"),
    displaces("the day after today", "future", date="2020-02-01"),
    displaces("Saturday", "non_session", date="2020-01-04"),
    Case(
        "New Year",
        put(date="2020-01-01"),
        {("non_session", "dropped"): 1, ("missing_session", "reported"): 1, ("unsorted", "repaired"): 1},
        [HERE],
    ),
    Case("date with slashes", put(date="2020/01/06"), {}),
    Case("date without dashes", put(date=20200106), {}),
    Case("midnight in London is a label", put(date="2020-01-06 00:00:00+00:00"), {}),
    Case("midnight in Tokyo is a label", put(date="2020-01-06T00:00+0900"), {}),
    Case("the opening bell in London's time", put(date="2020-01-06T14:30:00Z"), {}),
    Case("a moment of its own offset", put(date="2020-01-06 23:30:00.5-05:00"), {}),
    Case("a moment without an offset", put(date="2020-01-06 23:30:00"), {}),
    Case("evening in New York", put(date="2020-01-07 01:30:00+00:00"), {("time_zone", "converted"): 1}),
    Case("the same with slashes", put(date="2020/01/07 01:30:00Z"), {("time_zone", "converted"): 1}),
    Case(
        "Monday morning in Tokyo",
        put(date="2020-01-06 09:00:00+09:00"),
        {("time_zone", "converted"): 1, ("non_session", "dropped"): 1, ("missing_session", "reported"): 1},
        [HERE],
    ),
    # tickers
    *(displaces(f"ticker {value!r}", "no_ticker", ticker=value) for value in (None, float("nan"), "", "  ")),
    *(
        Case(f"ticker {value!r}", put(ticker=value), {("ticker_spaces", "repaired"): 1})
        for value in (" AAA", "AAA ", "\tAAA\r\n")
    ),
    # the same day again
    Case("a copy", after({}), {("duplicate", "merged"): 1}),
    Case("two copies", after({}, {}), {("duplicate", "merged"): 2}),
    Case("a copy at another place", append({}), {("duplicate", "merged"): 1, UNSORTED: 1}),
    Case("a copy with a time of day", after({"date": "2020-01-06 16:00:00"}), {("duplicate", "merged"): 1}),
    Case(
        "another close",
        after({"close": 10.3}),
        {("conflict", "merged"): 1},
        now={"close": 10.3},
    ),
    Case("another volume", after({"volume": 7}), {("conflict", "merged"): 1}, now={"volume": 7.0}),
    Case(
        "a copy and another close",
        after({}, {"close": 10.3}, {"close": 10.3}),
        {("duplicate", "merged"): 1, ("conflict", "merged"): 2},
        now={"close": 10.3},
    ),
    Case("a copy without a close", after({"close": None}), {("no_price", "dropped"): 1}),
    Case("an empty copy", after(unpriced(None)), {("empty_bar", "masked"): 1}),
    # a halt: what nobody traded at
    Case(
        "no volume at the close of the day before",
        put(**unpriced(10.0 * 1.01), volume=0),
        {("zero_volume", "reported"): 1, ("halt", "masked"): 1},
        [HERE],
    ),
    # order
    Case("newest first", lambda rows: rows[::-1], {UNSORTED: 2 * (len(DAYS) - 1)}),
    Case("one row at the end", lambda rows: [*rows[:ROW], *rows[ROW + 1 :], rows[ROW]], {UNSORTED: 1}),
    Case("by date, then ticker", lambda rows: sorted(rows, key=lambda row: row["date"]), {}),
    # sessions without a row
    Case(
        "a missing session",
        remove(5),
        {("missing_session", "reported"): 1},
        absent=lost_keys(5),
    ),
    Case(
        "a long gap",
        remove(*range(4, 12)),
        {("missing_session", "reported"): 8, ("gap", "reported"): 1},
        absent=lost_keys(*range(4, 12)),
    ),
    # events
    Case(
        "a delisted ticker",
        remove(*range(7, 16), ticker="BBB"),
        {("delisted", "reported"): 1},
        absent=lost_keys(*range(7, 16), ticker="BBB"),
    ),
]


def cleaned(case: Case, **options):
    rows = good_rows()
    rows = case.edit(rows) or rows
    return clean(pd.DataFrame(rows), today="2020-01-31", **options)


def test_there_are_sixty_malformed_inputs():
    assert len({case.name for case in CASES if case.found}) == len([case for case in CASES if case.found]) >= 60


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_malformed_row(case):
    table, report = cleaned(case)
    assert found(report) == case.found
    expected = keyed(canonical(good_rows()))
    expected = {key: bar for key, bar in expected.items() if key not in {*case.gone, *case.absent}}
    if case.now:
        expected[HERE] = expected[HERE] | case.now
    assert list(keyed(table)) == list(expected)
    for key, bar in keyed(table).items():
        assert bar == pytest.approx(expected[key], rel=1e-12), key
    pd.testing.assert_frame_equal(validate_prices(table), table)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_strict_refuses_what_would_be_changed(case):
    refused = [kind for kind, action in case.found if action in REFUSED]
    if not refused:
        pd.testing.assert_frame_equal(cleaned(case, strict=True)[0], cleaned(case)[0])
        return
    with pytest.raises(ValueError, match=r"AAA|BBB|row 2") as error:
        cleaned(case, strict=True)
    assert any(KINDS[kind] in str(error.value) for kind in refused)
    assert "\n" not in str(error.value)


# One case of each outcome that leaves a session without a bar. A bar of a halt is what filling would make of it.
VACANT = {
    str(case.found): case for case in CASES if (case.gone or case.absent) and ("halt", "masked") not in case.found
}
VACANT = list(VACANT.values())


@pytest.mark.parametrize("case", VACANT, ids=[case.name for case in VACANT])
def test_filled_sessions_repeat_the_last_close(case):
    table, report = cleaned(case, fill=True)
    after_its_end = {key for key in case.absent if key[0] == "BBB"}
    vacant = {*case.gone, *case.absent} - after_its_end
    bars = keyed(canonical(good_rows()))
    expected, close = {}, None
    for key, bar in bars.items():
        if key not in after_its_end:
            close = close if key in vacant else bar["close"]
            expected[key] = unpriced(close) | {"volume": 0.0} if key in vacant else bar
    assert keyed(table) == expected
    assert report.added == len(vacant)
    if vacant:
        with pytest.raises(ValueError, match=r"AAA|row 2"):
            cleaned(case, fill=True, strict=True)


def test_an_example_says_what_was_and_what_became():
    _, report = cleaned(next(case for case in CASES if case.name == "close just above high"))
    (row,) = report.to_frame().to_dict("records")
    was = "open 10.098 high 10.15002 low 9.894 close 10.2"
    assert list(row.values()) == ["ohlc_violation", "repaired", 1, *HERE, was, "high 10.2 low 9.894"]
    assert f"AAA 2020-01-06: {was} -> high 10.2 low 9.894" in str(report)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put(close="abc"), "AAA 2020-01-06: close abc: a price is missing or not a finite number"),
        (put(high=-1), "AAA 2020-01-06: high -1.0: a price is not positive"),
        (put(volume=-3), "AAA 2020-01-06: volume -3.0: volume is missing, negative or not a finite number"),
        (put(date="soon"), "AAA soon: date soon: not a date"),
        (put(ticker=None), "row 2 2020-01-06: close 10.2: no ticker"),
        (put(date="2020-01-04"), "AAA 2020-01-04: a Saturday, close 10.2: the exchange was closed"),
        (after({}, {}), r"AAA 2020-01-06: open .*: the same bar again \(and 1 more\)"),
    ],
)
def test_strict_names_ticker_date_and_value(edit, message):
    with pytest.raises(ValueError, match=message):
        cleaned(Case("", edit, {}), strict=True)


# --- malformed tables: errors ----------------------------------------------------------------------------------------


def frame(edit: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    return edit(pd.DataFrame(good_rows()))


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        (frame(lambda bars: bars.drop(columns="volume")), "no column 'volume'; it has ticker, date"),
        (frame(lambda bars: bars.rename(columns={"ticker": "symbol"})), "no column 'ticker'"),
        (frame(lambda bars: pd.concat([bars, bars[["close"]]], axis=1)), "column 'close' twice"),
        (frame(lambda bars: bars.iloc[:0]), "the price table is empty"),
        (frame(lambda bars: bars.assign(close=0)), "no usable bar in 32 rows; .*a price is not positive"),
        (frame(lambda bars: bars.assign(date="soon")), "no usable bar in 32 rows; .*not a date"),
        (frame(lambda bars: bars.assign(ticker=None)), "no usable bar in 32 rows; .*no ticker"),
        (frame(lambda bars: bars.assign(**unpriced(None))), "no usable bar in 32 rows"),
        (frame(lambda bars: bars.assign(high=1.0)), "no usable bar in 32 rows; .*high and low do not contain"),
        (frame(lambda bars: bars.iloc[:1].assign(date="2020-01-04")), "no usable bar in 1 rows; .*was closed"),
        (
            frame(lambda bars: bars.assign(date=[*pd.date_range("2020-01-04", periods=16)] * 2)),
            "12 of 32 bars are of days without a session of XNYS, the first AAA 2020-01-04",
        ),
    ],
)
def test_malformed_table_is_refused(bars, message):
    with pytest.raises(ValueError, match=message) as error:
        clean(bars, today="2020-01-31")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calendar": "NYSE2"}, "'NYSE2' is not known"),
        ({"today": "soon"}, "'soon' is not a date"),
    ],
)
def test_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clean(pd.DataFrame(good_rows()), **options)


# --- time zones and calendars ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["ms", "ns"])
@pytest.mark.parametrize(
    ("calendar", "zone", "clock"),
    [
        ("XNYS", "America/New_York", "00:00"),
        ("XNYS", "America/New_York", "09:30"),
        ("XNYS", "UTC", "00:00"),
        ("XTKS", "Asia/Tokyo", "00:00"),
        ("XTKS", "Asia/Tokyo", "15:00"),
        ("XLON", "Europe/London", "08:00"),
    ],
)
def test_zoned_timestamps(calendar, zone, clock, unit):
    days = exchange_calendars.get_calendar(calendar, start="2020-03-01", end="2020-04-30").sessions.tz_localize(None)
    bars = pd.DataFrame(good_rows()).iloc[:16].assign(date=days[:16])
    expected = validate_prices(bars)
    written = (bars["date"] + pd.Timedelta(f"{clock}:00")).dt.tz_localize(zone)
    for moments in (written, written.dt.tz_convert("UTC")):
        table, report = clean(bars.assign(date=moments.astype(f"datetime64[{unit}, {moments.dt.tz}]")), calendar)
        pd.testing.assert_frame_equal(table, expected)
        assert set(report.counts) == set(KINDS)
        text, _ = clean(bars.assign(date=moments.astype(str)), calendar)
        pd.testing.assert_frame_equal(text, expected)


def test_every_day_has_a_session_around_the_clock():
    bars = pd.DataFrame(good_rows()).iloc[:16].assign(date=pd.date_range("2020-01-01", periods=16))
    table, report = clean(bars, "24/7", strict=True)
    assert (len(table), found(report)) == (16, {})


def test_today_is_the_last_day_of_a_bar():
    bars = pd.DataFrame(good_rows())
    assert clean(bars, today="2020-01-24")[1].removed == 0
    table, report = clean(bars, today="2020-01-23")
    assert (table["date"].max(), report.count("future", "dropped")) == (pd.Timestamp("2020-01-23"), 2)


# --- events and suspicions -------------------------------------------------------------------------------------------


def series(closes: list[float], volumes: list[float] | None = None) -> pd.DataFrame:
    """Flat bars of one ticker on consecutive sessions."""
    volumes = [5.0] * len(closes) if volumes is None else volumes
    flat = dict.fromkeys(PRICE_COLUMNS, closes)
    days = exchange_calendars.get_calendar("XNYS", start="2020-01-02", end="2020-12-31").sessions[: len(closes)]
    return pd.DataFrame({"ticker": "AAA", "date": days, **flat, "volume": volumes})


@pytest.mark.parametrize(
    ("closes", "expected"),
    [
        ([10, 16.4], {}),  # log 1.64 = 0.495
        ([10, 16.6], {"large_return": 1}),
        ([10, 6.0], {"large_return": 1}),
        ([10, 27.0], {"large_return": 1}),
        ([10, 27.4], {"large_return": 1, "huge_return": 1}),
        # a factor of 1.5, 2, 3, 4, 5 or 10 within 2 %, up or down
        ([10, 15.2], {"split_like": 1}),
        ([10, 15.4], {}),
        ([10, 6.6], {"split_like": 1}),
        ([10, 4.95], {"split_like": 1, "large_return": 1}),
        ([10, 4.85], {"large_return": 1}),
        ([10, 20.3], {"split_like": 1, "large_return": 1}),
        ([10, 1.01], {"split_like": 1, "large_return": 1, "huge_return": 1}),
        # there and back again
        ([10, 3.3, 9.9], {"split_like": 2, "large_return": 2, "huge_return": 2, "bad_print": 1}),
        ([10, 5.7, 10.1, 10], {"large_return": 2, "bad_print": 1}),
        ([10, 17.3, 10], {"large_return": 2, "bad_print": 1}),
        ([10, 5.7, 9.5], {"large_return": 2}),  # 0.56 back to 0.51: not by a tenth the same
        ([10, 5.7, 5.7, 10], {"large_return": 2}),
        ([10, 5.7, 10, 5.7, 10], {"large_return": 4}),
        ([5.7, 10], {"large_return": 1}),
        # equal closes
        ([10] * 9, {}),
        ([10] * 10, {"stale": 1}),
        ([9, *[10] * 12, 11], {"stale": 1}),
        ([*[10] * 9, 11, *[10] * 9], {}),
    ],
)
def test_event_is_reported_and_left_alone(closes, expected):
    bars = series(closes)
    table, report = clean(bars, strict=True)
    assert {kind: count for kind, count in report.counts.items() if count} == expected
    assert {action for _, action in found(report)} <= {"reported"}
    pd.testing.assert_frame_equal(table, validate_prices(bars))


def test_bars_of_a_halt_go():
    bars = series([9, 9, 10, 10, 10, 11, 11, 11], volumes=[0, 0, 5, 0, 0, 0, 0, 5])
    table, report = clean(bars, strict=True)
    assert found(report) == {("zero_volume", "reported"): 6, ("halt", "masked"): 3}
    # The second bar has the close of the first, but neither had volume: so do indices, on every day.
    assert table["close"].tolist() == [9, 9, 10, 11, 11]
    table, report = clean(bars, fill=True, strict=True)
    assert found(report) == {("zero_volume", "reported"): 6, ("halt", "reported"): 3}
    pd.testing.assert_frame_equal(table, validate_prices(bars))


@pytest.mark.parametrize(("fill", "closes"), [(False, [10, 9.9, 10, 10.1]), (True, [10, 9.9, 9.9, 10, 10.1])])
def test_bad_print_goes_if_asked_for(fill, closes):
    bars = series([10, 9.9, 3.3, 10, 10.1])
    table, report = clean(bars, fill=fill, drop_bad_prints=True)
    assert report.count("bad_print", "dropped") == 1
    assert report.count("large_return") == 0
    assert table["close"].tolist() == closes
    with pytest.raises(ValueError, match=r"AAA 2020-01-06: close 9\.9 to 3\.3"):
        clean(bars, fill=fill, drop_bad_prints=True, strict=True)
    # It is hindsight: the day before, the same bar stays.
    assert clean(bars.iloc[:3], drop_bad_prints=True)[0]["close"].tolist() == [10, 9.9, 3.3]


def test_events_of_one_ticker_are_not_those_of_the_next():
    bars = pd.concat([series([10, 10.1]), series([90, 91]).assign(ticker="BBB")])
    bars.loc[bars["ticker"] == "BBB", ["close", "volume"]] = [10.1, 0]
    bars["low"] = 5.0
    _, report = clean(bars)
    # Neither a halt at the last close of AAA, nor one of BBB for the volume that AAA had.
    assert found(report) == {("zero_volume", "reported"): 2}


def test_ticker_without_a_usable_bar_is_named():
    bars = pd.concat([series([10, 10.1]), series([0, 0]).assign(ticker="BBB")])
    table, report = clean(bars)
    assert set(table["ticker"]) == {"AAA"}
    assert found(report) == {("non_positive_price", "dropped"): 2, ("lost_ticker", "reported"): 1}
    assert "BBB 2020-01-02: none of its rows was kept" in str(report)


@pytest.mark.parametrize(("fill", "closes"), [(False, [10, 11]), (True, [10, 10, 11])])
def test_rows_without_a_price_do_not_prolong_a_life(fill, closes):
    table, report = clean(series([np.nan, 10, np.nan, 11, np.nan]), fill=fill)
    assert table["close"].tolist() == closes
    assert (report.count("empty_bar"), report.added) == (3, len(closes) - 2)


# --- adjusted closes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw_sample():
    raw = pd.read_csv(SAMPLE_PATH)
    return raw.rename(columns=lambda column: column.lower().replace(" ", "_"))


def test_sample_is_clean_and_comes_out_adjusted(raw_sample):
    table, report = clean(raw_sample, strict=True)
    pd.testing.assert_frame_equal(table, read_sample())
    splits = report.to_frame().query("kind == 'adjusted_split'")
    assert set(zip(splits["ticker"], splits["date"], strict=True)) == {
        ("AAPL", "2000-06-21"),
        ("AAPL", "2005-02-28"),
        ("MSFT", "2003-02-18"),
    }
    assert report.count("split_like") == 0  # none is left once adjusted


def test_without_the_adjusted_close_the_split_is_a_suspicion(raw_sample):
    _, report = clean(raw_sample.drop(columns="adj_close"), examples=20)
    suspected = report.to_frame().query("kind == 'split_like'")
    assert ("AAPL", "2005-02-28") in set(zip(suspected["ticker"], suspected["date"], strict=True))
    assert report.count("adjusted_split") == 0


def test_a_split_on_a_lost_session_is_found(raw_sample):
    """Filling comes after adjustment: the factor of a filled bar would hide it."""
    bars = raw_sample[raw_sample["ticker"] == "AAPL"]
    split = bars["date"] == "2005-02-28"
    table, report = clean(bars.assign(close=bars["close"].mask(split)), fill=True)
    assert report.count("lost_session", "filled") == 1
    expected = adjust(bars[~split].assign(date=lambda table: pd.to_datetime(table["date"])))
    pd.testing.assert_frame_equal(table[table["date"] != "2005-02-28"].reset_index(drop=True), expected)


# --- the report ------------------------------------------------------------------------------------------------------


def test_report_is_json_and_says_everything():
    rows = good_rows()
    rows[3]["close"], rows[5]["volume"], rows[7]["date"] = None, None, "soon"
    _, report = clean(pd.DataFrame(rows), today="2020-01-31")
    read = json.loads(json.dumps(report.to_dict()))
    assert read["counts"] == report.counts
    assert {kind: count for kind, count in read["counts"].items() if count} == dict.fromkeys(
        ["no_date", "no_price", "bad_volume", "zero_volume", "missing_session"], 1
    )
    assert (read["rows_in"], read["rows_out"], read["removed"], read["added"]) == (32, 30, 2, 0)
    lines = str(report).splitlines()
    assert lines[0].startswith("32 rows read, 2 removed, 0 added: 30 rows of 2 tickers, 2020-01-02 to 2020-01-24")
    assert [line.split()[:3] for line in lines[1:]] == [
        [str(one.count), one.action, one.kind] for one in report.findings
    ]


@pytest.mark.parametrize("examples", [0, 2])
def test_examples_are_few_and_counts_are_whole(examples):
    _, report = clean(pd.DataFrame(good_rows()).assign(volume=None), examples=examples)
    assert report.count("bad_volume") == 32
    assert [len(one.examples) for one in report.findings] == [examples, examples]
    assert len(report.to_frame()) == 2 * examples
    assert f"{32:>9,} repaired  bad_volume" in str(report)


def test_report_knows_its_kinds():
    _, report = clean(pd.DataFrame(good_rows()))
    assert str(report).endswith("nothing to report")
    with pytest.raises(ValueError, match="'volumes' is no kind of finding"):
        report.count("volumes")


# --- properties ------------------------------------------------------------------------------------------------------

BAD_NUMBERS = [float("nan"), None, float("inf"), 0.0, -1.0, "x", 1e-3, 1e6]
MESSES = ["cell", "cell", "empty", "date", "drop", "copy", "conflict", "volume", "halt", "spike", "exchange"]


@st.composite
def walks(draw) -> Rows:
    """Valid bars of up to three tickers, whose returns stay below a fifth, too few to be stale."""
    rows = []
    for ticker in ("AAA", "BBB", "CCC")[: draw(st.integers(1, 3))]:
        start = draw(st.integers(0, 4))
        close = draw(st.floats(0.5, 500))
        for day in DAYS[start : start + draw(st.integers(3, 9))]:
            close *= np.exp(draw(st.floats(-0.2, 0.2)))
            top, bottom = (1 + draw(st.floats(0, 0.1)) for _ in range(2))
            open_ = close * np.exp(draw(st.floats(-0.05, 0.05)))
            prices = {
                "open": open_,
                "high": max(open_, close) * top,
                "low": min(open_, close) / bottom,
                "close": close,
            }
            rows.append({"ticker": ticker, "date": day, **prices, "volume": float(draw(st.integers(1, 10**9)))})
    return rows


def spoil(rows: Rows, kind: str, at: int, column: str, value, other: int) -> Rows:
    row = rows[at]
    if kind == "cell":
        row[column] = value
    elif kind == "empty":
        row.update(unpriced(None), volume=None)
    elif kind == "date":
        row["date"] = ["soon", "2020-01-04", DAYS[other % len(DAYS)], "2999-01-01"][other % 4]
    elif kind == "drop" and len(rows) > 1:
        return rows[:at] + rows[at + 1 :]
    elif kind in ("copy", "conflict"):
        copy = dict(row) if kind == "copy" else dict(row, volume=other + 0.5)
        return [*rows[:other], copy, *rows[other:]]
    elif kind == "volume":
        row["volume"] = [0.0, None, -1.0][other % 3]
    elif kind == "halt" and at and rows[at - 1]["ticker"] == row["ticker"]:
        row.update(unpriced(rows[at - 1]["close"]), volume=0.0)
    elif kind == "spike" and all(isinstance(row[name], float) for name in PRICE_COLUMNS):
        row.update({name: row[name] / 3 for name in PRICE_COLUMNS})
    elif kind == "exchange":
        row["high"], row["low"] = row["low"], row["high"]
    return rows


@st.composite
def messes(draw, kinds=MESSES) -> pd.DataFrame:
    rows = draw(walks())
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=8)):
        at, other = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, len(rows) - 1))
        column = draw(st.sampled_from(TABLE_COLUMNS[2:]))
        rows = spoil(rows, kind, at, column, draw(st.sampled_from(BAD_NUMBERS)), other)
    return pd.DataFrame(rows)


def try_clean(bars: pd.DataFrame, **options):
    """Cleans a table of which something is left."""
    try:
        return clean(bars, today="2020-01-31", **options)
    except ValueError as error:
        assume(not re.search("no usable bar|price table is empty", str(error)))
        raise


OPTIONS = st.fixed_dictionaries({"fill": st.booleans(), "drop_bad_prints": st.booleans()})
MANY = settings(max_examples=25, deadline=None)


@MANY
@given(walks(), st.booleans())
def test_clean_table_comes_back_unchanged(rows, fill):
    bars = pd.DataFrame(rows)
    table, report = clean(bars, fill=fill, strict=True)
    pd.testing.assert_frame_equal(table, validate_prices(bars))
    assert set((report.counts | {"delisted": 0}).values()) == {0}  # tickers end on days of their own
    assert (report.removed, report.added) == (0, 0)


@MANY
@given(messes(), OPTIONS)
def test_cleaning_is_idempotent(bars, options):
    table, _ = try_clean(bars, **options)
    again, report = clean(table, today="2020-01-31", strict=True, **options)
    pd.testing.assert_frame_equal(again, table)
    assert (report.removed, report.added) == (0, 0)


@MANY
@given(messes(), OPTIONS)
def test_what_comes_out_is_canonical(bars, options):
    table, _ = try_clean(bars, **options)
    pd.testing.assert_frame_equal(validate_prices(table), table)


@MANY
@given(messes(), OPTIONS)
def test_every_row_is_accounted_for(bars, options):
    table, report = try_clean(bars, examples=10**6, **options)
    told = report.to_frame()
    key = ["ticker", "date"]
    lost = Counter(map(tuple, told[told["action"].isin(["dropped", "merged", "masked"])][key].to_numpy()))
    added = Counter(map(tuple, told[told["action"] == "filled"][key].to_numpy()))
    kept = Counter((ticker, f"{date:%Y-%m-%d}") for ticker, date in table[key].to_numpy())
    assert Counter(map(tuple, bars[key].to_numpy())) + added == kept + lost
    assert report.rows_out == report.rows_in - report.removed + report.added == len(table)
    assert sum(lost.values()) == report.removed
    assert sum(added.values()) == report.added


@MANY
@given(messes([kind for kind in MESSES if kind not in ("conflict", "date")]), OPTIONS, st.randoms())
def test_order_of_rows_does_not_matter(bars, options, random):
    """Except of different bars of one day, of which the last stays."""
    days = bars.groupby(["ticker", "date"])
    assume((days[TABLE_COLUMNS[2:]].nunique(dropna=False) == 1).all(axis=None))
    order = list(range(len(bars)))
    random.shuffle(order)
    table, report = try_clean(bars, **options)
    shuffled, other = try_clean(bars.iloc[order], **options)
    pd.testing.assert_frame_equal(shuffled, table)
    assert other.counts | {"unsorted": 0} == report.counts | {"unsorted": 0}


@MANY
@given(messes(), st.sampled_from(DAYS[2:-1]), st.booleans())
def test_nothing_done_to_a_row_depends_on_later_days(bars, until, fill):
    dated = bars["date"].where(bars["date"].isin(DAYS), "9999")
    earlier, _ = try_clean(bars[dated <= until], fill=fill)
    whole, _ = clean(bars, today="2020-01-31", fill=fill)
    # The life of a ticker goes on to its next bar; whether there is one, only later days know.
    last = earlier.groupby("ticker")["date"].max()
    known = whole[whole["date"] <= whole["ticker"].map(last)].reset_index(drop=True)
    pd.testing.assert_frame_equal(known, earlier)


@MANY
@given(messes())
def test_filled_table_has_every_session_of_each_life(bars):
    table, report = try_clean(bars, fill=True)
    calendar = exchange_calendars.get_calendar("XNYS", start="2020-01-01", end="2020-12-31")
    for _, steps in table.groupby("ticker"):
        expected = calendar.sessions_in_range(steps["date"].min(), steps["date"].max())
        assert steps["date"].tolist() == expected.tolist()
    written = set(zip(bars["ticker"], bars["date"], strict=True))
    assert report.count("missing_session") == sum(key not in written for key in keyed(table))


# --- what a command line names ---------------------------------------------------------------------------------------


def bars_file(folder) -> str:
    path = folder / "bars.csv"
    pd.DataFrame(good_rows()).to_csv(path, index=False)
    return str(path)


def test_without_a_path_it_is_the_sample():
    pd.testing.assert_frame_equal(load_prices(), read_sample())
    pd.testing.assert_frame_equal(load_prices(tickers="msft, aapl"), read_sample(["AAPL", "MSFT"]))


def test_a_file_is_cleaned_and_the_report_printed(tmp_path, capsys):
    path = bars_file(tmp_path)
    pd.testing.assert_frame_equal(load_prices(path), canonical(good_rows()))
    pd.testing.assert_frame_equal(load_prices(path, "aaa,AAA"), canonical(good_rows()[: len(DAYS)]))
    captured = capsys.readouterr()
    assert "32 rows read, 0 removed, 0 added: 32 rows of 2 tickers" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("tickers", "named"),
    [("", "no ticker in ''"), ("AAA,../x", "'../X' is not a ticker"), ("AAA,CCC", "unknown ticker 'CCC'")],
)
def test_tickers_that_are_none_are_refused(tmp_path, tickers, named):
    with pytest.raises(ValueError, match=named) as error:
        load_prices(bars_file(tmp_path), tickers)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        load_prices(str(tmp_path / "none.csv"))


def test_a_report_comes_back_from_json():
    rows = good_rows()
    rows[3]["close"], rows[5]["volume"] = None, None
    _, report = clean(pd.DataFrame(rows))
    assert CleaningReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
