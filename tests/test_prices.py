"""Price files to the canonical table, adjustment, and the writing of tables."""

import gzip
import hashlib
import os
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from conftest import by_failure
from hypothesis import given, settings
from hypothesis import strategies as st

from spaceexploreai.data.prices import (
    SAMPLE_PATH,
    adjust,
    parse_tickers,
    read_prices,
    read_sample,
    write_table,
)
from spaceexploreai.feature_extraction_spaceexplore import PRICE_COLUMNS, TABLE_COLUMNS, validate_prices

HEADER = "ticker,date,open,high,low,close,volume"
ROWS = ["AAA,2020-01-02,10,12,9,11,100", "AAA,2020-01-03,11,13,10,12,200", "BBB,2020-01-02,5,6,4,5.5,300"]


def small_table() -> pd.DataFrame:
    rows = [row.split(",") for row in ROWS]
    table = pd.DataFrame(rows, columns=HEADER.split(","))
    numbers = dict.fromkeys([*PRICE_COLUMNS, "volume"], "float64")
    return table.astype(numbers | {"date": "datetime64[ns]"})


def csv_text(*rows: str, header: str = HEADER) -> str:
    return "\n".join([header, *rows]) + "\n"


def write_yahoo(root, ticker: str, text: str, stamp: str = "20200104", folder: str | None = None):
    path = root / (folder or ticker) / f"{ticker}_yahoo_{stamp}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- the sample ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw():
    """The sample as pandas reads it, an independent reader; in the order of the canonical table."""
    raw = pd.read_csv(SAMPLE_PATH, parse_dates=["Date"])
    return raw.sort_values(["Ticker", "Date"], ignore_index=True)


@pytest.fixture(scope="module")
def sample():
    return read_sample()


def of(table: pd.DataFrame, raw: pd.DataFrame, ticker: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    return table[table["ticker"] == ticker].set_index("date"), raw[raw["Ticker"] == ticker].set_index("Date")


def test_sample_is_the_published_file():
    content = SAMPLE_PATH.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert digest == "5abadf99b2d394f920120a27de6f0df129859d71d4cfb0bf661bcc99446ab1fd"
    assert digest in (SAMPLE_PATH.parent / "README.md").read_text()


def test_sample_is_canonical(sample):
    assert list(sample.columns) == TABLE_COLUMNS
    pd.testing.assert_frame_equal(validate_prices(sample), sample)
    pd.testing.assert_index_equal(sample.index, pd.RangeIndex(len(sample)), exact=True)
    assert sample["ticker"].value_counts().to_dict() == {
        "AAPL": 3270,
        "FB": 196,
        "GOOG": 2148,
        "IBM": 3270,
        "MSFT": 3270,
    }
    first = sample.groupby("ticker")["date"].min().dt.strftime("%Y-%m-%d").to_dict()
    assert (first["FB"], first["GOOG"], first["IBM"]) == ("2012-05-18", "2004-08-19", "2000-03-01")


def test_sample_selection(sample):
    selected = read_sample(["MSFT", "AAPL"])
    expected = sample[sample["ticker"].isin(["AAPL", "MSFT"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(selected, expected)


def test_sample_close_is_the_adjusted_close(sample, raw):
    np.testing.assert_allclose(sample["close"], raw["Adj Close"], rtol=1e-12)
    by_close = np.log(sample["close"]).groupby(sample["ticker"]).diff()
    by_adjusted_close = np.log(raw["Adj Close"]).groupby(raw["Ticker"]).diff()
    np.testing.assert_allclose(by_close, by_adjusted_close, atol=1e-12)


def test_sample_keeps_the_shape_of_every_bar(sample, raw):
    for column in ("open", "high", "low"):
        np.testing.assert_allclose(sample[column] / sample["close"], raw[column.title()] / raw["Close"], rtol=1e-12)
    assert (sample["low"] <= sample[["open", "close"]].min(axis=1)).all()
    assert (sample["high"] >= sample[["open", "close"]].max(axis=1)).all()


def test_split_of_2005_leaves_no_jump(sample, raw):
    adjusted, unadjusted = of(sample, raw, "AAPL")
    near = slice("2005-02-01", "2005-03-31")
    assert np.log(unadjusted["Close"]).diff().loc[near].min() < -0.68
    assert np.log(adjusted["close"]).diff().loc[near].abs().max() < 0.12
    gap = np.log(adjusted["open"] / adjusted["close"].shift())
    assert gap.loc[near].abs().max() < 0.12


def test_only_splits_change_volume(sample, raw):
    ratio = sample["volume"] / raw["Volume"]
    step = ratio.groupby(sample["ticker"]).shift() / ratio
    found = sample[step.notna() & (step != 1)].assign(step=step)
    found = [(ticker, f"{date:%Y-%m-%d}", step) for ticker, date, step in found[["ticker", "date", "step"]].to_numpy()]
    assert found == [("AAPL", "2000-06-21", 2.0), ("AAPL", "2005-02-28", 2.0), ("MSFT", "2003-02-18", 2.0)]
    assert (ratio.groupby(sample["ticker"]).last() == 1).all()


def test_dollar_volume_survives_up_to_the_dividend_factor(sample, raw):
    dollars = (sample["close"] * sample["volume"]) / (raw["Close"] * raw["Volume"])
    dollars = dollars.groupby(sample["ticker"]).transform(lambda ratio: ratio / ratio.iloc[-1])
    dividends = dollars.groupby(sample["ticker"]).shift() / dollars
    # No dividend exceeds MSFT's special one of 2004-11-15, $3.08 on $29.97; a missed split would show as 2.
    assert sample.loc[dividends.idxmin(), ["ticker", "date"]].tolist() == ["MSFT", pd.Timestamp("2004-11-15")]
    assert dividends.min() == pytest.approx(1 - 3.08 / 29.97, rel=0.01)
    assert dividends.max() < 1 + 1e-9
    apple = dollars[(sample["ticker"] == "AAPL") & (sample["date"] < "2012-08-09")]  # first dividend in the sample
    np.testing.assert_allclose(apple, apple.iloc[0], rtol=1e-12)


# --- tickers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tickers"),
    [
        ("AAPL,MSFT", ["AAPL", "MSFT"]),
        (" msft , aapl,MSFT,", ["MSFT", "AAPL"]),
        ("^GSPC,BRK-B,BF.B,EURUSD=X,600519.SS", ["^GSPC", "BRK-B", "BF.B", "EURUSD=X", "600519.SS"]),
    ],
)
def test_parse_tickers(text, tickers):
    assert parse_tickers(text) == tickers


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("../../x", "'../../X'"),
        ("AAPL,/etc/passwd", "'/ETC/PASSWD'"),
        ("C:\\x", r"'C:\\\\X'"),
        ("AAPL MSFT", "'AAPL MSFT'"),
        ("AAPL\nMSFT", r"'AAPL\\nMSFT'"),
        (".AAPL", "'.AAPL'"),
        ("A" * 16, "'A{16}'"),
        ("ÄPFEL", "'ÄPFEL'"),
        ("", "no ticker in ''"),
        (" , ", "no ticker in ' , '"),
    ],
)
def test_parse_tickers_refuses(text, named):
    with pytest.raises(ValueError, match=named) as error:
        parse_tickers(text)
    assert "\n" not in str(error.value)


# --- validation ------------------------------------------------------------------------------------------------------


def with_date(date) -> pd.DataFrame:
    """One bar of AAPL on `date`, whose type decides that of the column."""
    return small_table().iloc[:1].assign(ticker="AAPL", date=[date])


@pytest.mark.parametrize("nameless", ["", None, float("nan")])
def test_a_row_without_a_ticker_is_refused(nameless):
    table = small_table().assign(ticker=["AAA", nameless, "BBB"])
    with pytest.raises(ValueError, match="row 1 of the price table has no ticker"):
        validate_prices(table)


@pytest.mark.parametrize("number", [5, 0, 43832, 1577923200, 1577923200_000_000_000, 5.0, 20200101.5])
def test_a_number_is_no_date(number):
    """pandas would take it for nanoseconds since 1970."""
    with pytest.raises(ValueError, match=rf"^AAPL: '{number}' is not a date$"):
        validate_prices(with_date(number))


@pytest.mark.parametrize("date", [20200101, np.int32(20200101), "20200101", "2020-01-01", np.datetime64("2020-01-01")])
def test_an_integer_of_eight_digits_is_that_day(date):
    validated = validate_prices(with_date(date))
    assert validated["date"].tolist() == [pd.Timestamp("2020-01-01")]
    assert validated["date"].dtype == "datetime64[ns]"


# --- long tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bars.parquet", "bars.csv"])
def test_written_table_reads_back_bit_for_bit(tmp_path, sample, name):
    write_table(sample, tmp_path / name)
    pd.testing.assert_frame_equal(read_prices(tmp_path / name), sample)


@pytest.mark.parametrize("adj_close", ["Adj Close", "adj close", "adj_close", "ADJ CLOSE"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_columns_in_any_case_and_order(tmp_path, suffix, adj_close):
    table = small_table()
    table[adj_close] = table["close"] / 2
    table["dividends"] = "none"
    table = table[table.columns[::-1]].rename(columns=lambda column: column if column == adj_close else column.title())
    path = tmp_path / f"bars{suffix}"
    table.to_parquet(path) if suffix == ".parquet" else table.to_csv(path, index=False)
    expected = small_table()
    expected[PRICE_COLUMNS] /= 2
    pd.testing.assert_frame_equal(read_prices(path), expected)


def test_rows_may_be_ordered_by_date_first(tmp_path):
    small_table().sort_values(["date", "ticker"]).to_csv(tmp_path / "bars.csv", index=False)
    pd.testing.assert_frame_equal(read_prices(tmp_path / "bars.csv"), small_table())


def test_tickers_that_csv_readers_take_for_missing_or_boolean(tmp_path):
    for ticker in ("NA", "TRUE", "NAN", "1810"):
        (tmp_path / "bars.csv").write_text(csv_text(ROWS[0].replace("AAA", ticker)))
        assert read_prices(tmp_path / "bars.csv", [ticker])["ticker"].tolist() == [ticker]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "bars.csv").write_bytes(b"\xef\xbb\xbf" + csv_text(*ROWS).replace("\n", "\r\n").encode())
    pd.testing.assert_frame_equal(read_prices(tmp_path / "bars.csv"), small_table())


def test_parquet_with_the_keys_as_pandas_index(tmp_path):
    small_table().set_index(["ticker", "date"]).to_parquet(tmp_path / "bars.parquet")
    pd.testing.assert_frame_equal(read_prices(tmp_path / "bars.parquet", ["AAA", "BBB"]), small_table())


def test_categorical_ticker_keeps_rows_aligned(tmp_path):
    table = small_table().assign(adj_close=[11.0, 12.0, 55.0])
    table["ticker"] = pd.Categorical(table["ticker"], categories=["BBB", "AAA"])
    table.to_parquet(tmp_path / "bars.parquet")
    expected = small_table()
    expected.loc[2, PRICE_COLUMNS] *= 10
    pd.testing.assert_frame_equal(read_prices(tmp_path / "bars.parquet"), expected)
    pd.testing.assert_frame_equal(adjust(table), expected)


def test_single_precision_is_widened_before_arithmetic(tmp_path):
    narrow = small_table().assign(adj_close=lambda table: table["close"] * 0.3)
    narrow = narrow.astype(dict.fromkeys([*PRICE_COLUMNS, "adj_close"], "float32"))
    narrow.to_parquet(tmp_path / "bars.parquet")
    factor = narrow["adj_close"].astype("float64") / narrow["close"].astype("float64")
    read = read_prices(tmp_path / "bars.parquet")
    np.testing.assert_array_equal(read["open"], narrow["open"].astype("float64") * factor)


@pytest.mark.parametrize(
    "written",
    [
        "2020-01-02",
        "2020/01/02",
        "20200102",
        "2020-01-02 00:00:00",
        "2020-01-02T16:00:00Z",
        "2020-01-02 00:00:00-05:00",
        "2020-01-02 00:00:00+09:00",
        "2020-01-02 23:30:00.123456-0500",
        " 2020-01-02 ",
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_text_date_is_the_day_as_written(tmp_path, suffix, written):
    path = tmp_path / f"bars{suffix}"
    write_table(small_table().iloc[:1].assign(date=written), path)
    assert read_prices(path)["date"].tolist() == [pd.Timestamp("2020-01-02")]


@pytest.mark.parametrize("zone", [None, "America/New_York", "Asia/Tokyo", "UTC"])
@pytest.mark.parametrize("unit", ["ms", "ns"])
def test_timestamp_is_its_local_day(tmp_path, zone, unit):
    table = small_table()
    table["date"] = table["date"].dt.tz_localize(zone).astype(f"datetime64[{unit}, {zone}]" if zone else f"M8[{unit}]")
    table.to_parquet(tmp_path / "bars.parquet")
    pd.testing.assert_frame_equal(read_prices(tmp_path / "bars.parquet"), small_table())


def test_dates_across_a_change_of_offset(tmp_path):
    winter, summer = "2020-03-06 00:00:00-05:00", "2020-03-09 00:00:00-04:00"
    table = small_table().iloc[:2].assign(date=[winter, summer])
    table.to_csv(tmp_path / "bars.csv", index=False)
    assert read_prices(tmp_path / "bars.csv")["date"].dt.strftime("%m-%d").tolist() == ["03-06", "03-09"]


def test_date_and_integer_types(tmp_path):
    table = small_table()
    for date in (table["date"].dt.date, table["date"].dt.strftime("%Y%m%d").astype(int)):
        table.assign(date=date, volume=table["volume"].astype(int)).to_parquet(tmp_path / "bars.parquet")
        pd.testing.assert_frame_equal(read_prices(tmp_path / "bars.parquet"), small_table())


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_only_the_wanted_tickers_are_looked_at(tmp_path, suffix):
    table = small_table()
    table.loc[table["ticker"] == "BBB", "close"] = -1
    write_table(table, tmp_path / f"bars{suffix}")
    assert read_prices(tmp_path / f"bars{suffix}", ["AAA", "AAA"])["ticker"].tolist() == ["AAA", "AAA"]
    with pytest.raises(ValueError, match="BBB 2020-01-02: close -1"):
        read_prices(tmp_path / f"bars{suffix}")


# --- folders of Yahoo files ------------------------------------------------------------------------------------------

YAHOO = "Date,Close,High,Low,Open,Volume,ticker"


def test_yahoo_folder_in_three_forms(tmp_path, monkeypatch):
    root = tmp_path / "price_history"
    write_yahoo(root, "BBB", csv_text("2020-01-02,5.5,6,4,5,300,BBB", header=YAHOO))
    apple = ["2020-01-02 00:00:00-05:00,11,12,9,10,100,AAA", "2020-01-03 00:00:00-05:00,12,13,10,11,200,AAA"]
    write_yahoo(root, "AAA", csv_text(*apple, header=YAHOO))
    (root / "AAA" / "notes.csv").write_text("not prices")
    (root / "empty").mkdir()
    for path in (tmp_path, root, str(root)):
        pd.testing.assert_frame_equal(read_prices(path), small_table())
    alone = small_table().iloc[:2]
    pd.testing.assert_frame_equal(read_prices(root / "AAA"), alone)
    pd.testing.assert_frame_equal(read_prices(tmp_path, ["AAA"]), alone)
    monkeypatch.chdir(root / "AAA")
    pd.testing.assert_frame_equal(read_prices("."), alone)


def test_newest_yahoo_file_wins(tmp_path):
    header = HEADER.removeprefix("ticker,")
    for stamp, volume in (("20200131", 2), ("20200201", 3), ("20191231", 1)):
        write_yahoo(tmp_path, "AAA", csv_text(f"2020-01-02,10,12,9,11,{volume}", header=header), stamp)
    assert read_prices(tmp_path)["volume"].tolist() == [3.0]


def test_only_wanted_folders_are_read(tmp_path):
    write_yahoo(tmp_path, "BBB", "no prices at all\n")
    write_yahoo(tmp_path, "AAA", csv_text("2020-01-02,11,12,9,10,100,AAA", header=YAHOO))
    assert len(read_prices(tmp_path, ["AAA"])) == 1
    with pytest.raises(ValueError, match=r"BBB_yahoo_20200104\.csv has no column 'date'"):
        read_prices(tmp_path)


def test_adjusted_close_in_one_yahoo_file_alone(tmp_path):
    header = "Date,Open,High,Low,Close,Adj Close,Volume"
    write_yahoo(tmp_path, "AAA", csv_text("2020-01-02,10,12,9,11,5.5,100", header=header))
    write_yahoo(tmp_path, "BBB", csv_text("2020-01-02,5.5,6,4,5,300,BBB", header=YAHOO))
    assert read_prices(tmp_path)["close"].tolist() == [5.5, 5.5]


# --- malformed input -------------------------------------------------------------------------------------------------

ADJUSTED = HEADER + ",Adj Close"
MALFORMED_CSV = {
    "empty": ("", "bars.csv: Empty CSV file"),
    "header only": (csv_text(), "bars.csv has no rows"),
    "no ticker column": (
        csv_text("2020-01-02,1,1,1,1,1", header=HEADER.removeprefix("ticker,")),
        "no column 'ticker'",
    ),
    "no volume column": (
        csv_text("A,2020-01-02,1,1,1,1", header=HEADER.removesuffix(",volume")),
        "no column 'volume'",
    ),
    "only adjusted close": (csv_text(ROWS[0], header=HEADER.replace("close", "adj close")), "no column 'close'"),
    "column twice": (csv_text(ROWS[0] + ",1", header=HEADER + ",Close"), "column 'close' twice"),
    "adjusted close twice": (csv_text(ROWS[0] + ",1,1", header=ADJUSTED + ",adj_close"), "column 'adj_close' twice"),
    "semicolons": (csv_text(*ROWS).replace(",", ";"), "no column 'ticker'; it has ticker;date"),
    "extra field": (csv_text(ROWS[0], ROWS[1] + ",7"), "Expected 7 columns, got 8: AAA,2020-01-03"),
    "missing field": (csv_text(ROWS[0], "AAA,2020-01-03,1"), "Expected 7 columns, got 3: AAA,2020-01-03"),
    "no ticker": (csv_text(ROWS[0], ",2020-01-03,11,13,10,12,200"), "without a ticker, dated '2020-01-03'"),
    "American date": (csv_text("AAA,01/02/2020,10,12,9,11,100"), "AAA: '01/02/2020' is not a date"),
    "no such day": (csv_text("AAA,2020-02-30,10,12,9,11,100"), "AAA: '2020-02-30' is not a date"),
    "no date": (csv_text("AAA,,10,12,9,11,100"), "AAA: '' is not a date"),
    "word for a date": (csv_text("AAA,today,10,12,9,11,100"), "AAA: 'today' is not a date"),
    "epoch seconds": (csv_text("AAA,1577923200,10,12,9,11,100"), "AAA: '1577923200' is not a date"),
    "spreadsheet day": (csv_text("AAA,43832,10,12,9,11,100"), "AAA: '43832' is not a date"),
    "far year": (csv_text("AAA,9999-12-31,10,12,9,11,100"), "AAA: '9999-12-31' is not a date"),
    "trailing text": (csv_text("AAA,2020-01-02 x,10,12,9,11,100"), "AAA: '2020-01-02 x' is not a date"),
    "duplicate": (csv_text(ROWS[0], ROWS[0]), "AAA 2020-01-02: date 2020-01-02 appears twice"),
    "duplicate within the day": (
        csv_text("AAA,2020-01-02 09:30,10,12,9,11,100", "AAA,2020-01-02 16:00,10,12,9,11,100"),
        "AAA 2020-01-02: date 2020-01-02 appears twice",
    ),
    "newest first": (csv_text(ROWS[1], ROWS[0]), "AAA 2020-01-02: date 2020-01-02 comes after a later date"),
    "text price": (csv_text(ROWS[0], "AAA,2020-01-03,11,abc,10,12,200"), "AAA 2020-01-03: high abc "),
    "text volume": (csv_text("AAA,2020-01-02,10,12,9,11,1.2M"), "AAA 2020-01-02: volume 1.2M "),
    "thousands separator": (csv_text('AAA,2020-01-02,"1,010",12,9,11,100'), "AAA 2020-01-02: open 1,010 "),
    "decimal comma": (csv_text('AAA,2020-01-02,10,12,9,"11,5",100'), "AAA 2020-01-02: close 11,5 "),
    "missing price": (csv_text("AAA,2020-01-02,,12,9,11,100"), "AAA 2020-01-02: open nan "),
    "infinite price": (csv_text("AAA,2020-01-02,10,inf,9,11,100"), "AAA 2020-01-02: high inf "),
    "zero price": (csv_text("AAA,2020-01-02,10,12,0,11,100"), "AAA 2020-01-02: low 0 "),
    "negative price": (csv_text("AAA,2020-01-02,10,12,9,-11,100"), "AAA 2020-01-02: close -11 "),
    "negative volume": (csv_text("AAA,2020-01-02,10,12,9,11,-100"), "AAA 2020-01-02: volume -100 "),
    "high below low": (csv_text("AAA,2020-01-02,10,8,9,8.5,100"), "AAA 2020-01-02: high 8 "),
    "close above high": (csv_text("AAA,2020-01-02,10,12,9,13,100"), "AAA 2020-01-02: close 13 "),
    "open below low": (csv_text("AAA,2020-01-02,8,12,9,11,100"), "AAA 2020-01-02: open 8 "),
    "zero adjusted close": (csv_text(ROWS[0] + ",0", header=ADJUSTED), "AAA 2020-01-02: adj_close 0.0 "),
    "negative adjusted close": (csv_text(ROWS[0] + ",-1.5", header=ADJUSTED), "AAA 2020-01-02: adj_close -1.5 "),
    "missing adjusted close": (csv_text(ROWS[0] + ",", header=ADJUSTED), "AAA 2020-01-02: adj_close nan "),
    "infinite adjusted close": (csv_text(ROWS[0] + ",inf", header=ADJUSTED), "AAA 2020-01-02: adj_close inf "),
    "text adjusted close": (csv_text(ROWS[0] + ",n.a.", header=ADJUSTED), "AAA 2020-01-02: adj_close n.a. "),
    "adjusted close beside text": (
        csv_text("AAA,2020-01-02,ten,12,9,11,100,11", header=ADJUSTED),
        "AAA 2020-01-02: open ten ",
    ),
}


def refused(path, named: str, tickers=None, kind=ValueError):
    with pytest.raises(kind) as error:
        read_prices(path, tickers)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "named"), MALFORMED_CSV.values(), ids=MALFORMED_CSV)
def test_malformed_csv(tmp_path, text, named):
    (tmp_path / "bars.csv").write_text(text)
    refused(tmp_path / "bars.csv", named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"date": [None, pd.Timestamp("2020-01-03"), pd.Timestamp("2020-01-02")]}, "AAA: 'NaT' is not a date"),
        ({"date": [43831.0, 43832.0, 43831.0]}, "AAA: '43831.0' is not a date"),
        ({"ticker": ["AAA", None, "BBB"]}, "without a ticker, dated '2020-01-03"),
        ({"open": ["10", "ten", "5"]}, "AAA 2020-01-03: open ten "),
        ({"close": [11.0, 12.0, float("nan")]}, "BBB 2020-01-02: close nan "),
        ({"volume": pd.array([100, None, 300], dtype="Int64")}, "AAA 2020-01-03: volume nan "),
        ({"adj_close": ["11", "12", "-"]}, "BBB 2020-01-02: adj_close - "),
    ],
)
def test_malformed_parquet(tmp_path, change, named):
    small_table().assign(**change).to_parquet(tmp_path / "bars.parquet")
    refused(tmp_path / "bars.parquet", named)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("bars.parquet", b"ticker,date\n", "cannot read"),
        ("bars.parquet", b"PAR1" + bytes(64) + b"PAR1", "cannot read"),
        ("bars.parquet", b"", "cannot read"),
        ("bars.csv.gz", csv_text(*ROWS).encode(), "cannot read"),
        ("bars.csv.gz", gzip.compress(csv_text(*ROWS).encode(), mtime=0)[:-20], "cannot read"),
        ("bars.csv", csv_text(ROWS[0].replace("AAA", "\xc4")).encode("latin-1"), "cannot read"),
        ("bars.csv", csv_text(*ROWS).encode("utf-16"), "cannot read"),
        ("bars.xlsx", b"PK", "neither a folder nor a .parquet, .csv or .csv.gz file"),
        ("bars", b"", "neither a folder nor a .parquet, .csv or .csv.gz file"),
    ],
)
def test_unreadable_file(tmp_path, name, content, named):
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, named)
    refused(path, str(path), tickers=["AAA"])


def test_missing_file(tmp_path):
    refused(tmp_path / "none.csv", str(tmp_path / "none.csv"), kind=FileNotFoundError)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_unknown_ticker(tmp_path, suffix):
    path = tmp_path / f"bars{suffix}"
    many = pd.concat([small_table().iloc[:1].assign(ticker=f"T{i:02}") for i in range(13)])
    write_table(many, path)
    refused(path, "unknown ticker 'ZZZ'; ", ["T03", "ZZZ"])
    refused(path, "has T00, T01, T02, T03, T04, T05, T06, T07, T08, T09 and 3 more", ["ZZZ"])
    refused(path, "unknown ticker '../../x'", ["../../x"])
    refused(path, "the list of tickers is empty", [])


def test_header_without_rows_and_a_ticker(tmp_path):
    write_table(small_table().iloc[:0], tmp_path / "bars.csv")
    refused(tmp_path / "bars.csv", "unknown ticker 'AAA'; ", ["AAA"])
    refused(tmp_path / "bars.csv", "has none", ["AAA"])


def test_malformed_folders(tmp_path):
    refused(tmp_path, "has no TICKER/TICKER_yahoo_YYYYMMDD.csv file")
    good = csv_text("2020-01-02,11,12,9,10,100,AAA", header=YAHOO)
    write_yahoo(tmp_path / "a", "AAA", good)
    refused(tmp_path / "a", "unknown ticker '../a/AAA'", ["../a/AAA"])
    refused(tmp_path / "a", "has AAA", ["BBB"])
    write_yahoo(tmp_path / "b", "BBB", good)
    refused(tmp_path / "b", "has rows of 'AAA' in the folder of 'BBB'")
    write_yahoo(tmp_path / "c", "AAA", good, folder="CCC")
    refused(tmp_path / "c", "is a file of 'AAA' in the folder of 'CCC'")
    write_yahoo(tmp_path / "d", "AAA", good.replace("12,9", "12,x"))
    refused(tmp_path / "d", "AAA 2020-01-02: low x ")
    write_yahoo(tmp_path / "e", "AAA", good.replace("2020-01-02", "Jan 2"))
    refused(tmp_path / "e", "AAA: 'Jan 2' is not a date")
    write_yahoo(tmp_path / "f", "AAA", YAHOO + "\n")
    refused(tmp_path / "f", "AAA_yahoo_20200104.csv has no rows")


# --- adjustment ------------------------------------------------------------------------------------------------------

RATIOS = [Fraction(*ratio) for ratio in [(2, 1), (3, 1), (3, 2), (4, 3), (5, 4), (5, 2), (7, 1), (10, 1), (20, 1)]]
RATIOS += [1 / ratio for ratio in RATIOS] + [Fraction(1, 5), Fraction(1, 50)]


def clean_bars(ticker: str, rows: int, seed: int) -> pd.DataFrame:
    """Adjusted bars with daily moves of at most 5 %, the close often the high or the low."""
    rng = np.random.default_rng(seed)
    close = rng.uniform(0.5, 500) * np.exp(np.cumsum(rng.uniform(-0.05, 0.05, rows)))
    bars = pd.DataFrame({"ticker": ticker, "date": pd.bdate_range("2020-01-01", periods=rows), "close": close})
    bars["open"] = close * np.exp(rng.uniform(-0.05, 0.05, rows))
    bars["high"] = bars[["open", "close"]].max(axis=1) * rng.choice([1, 1.02], rows)
    bars["low"] = bars[["open", "close"]].min(axis=1) * rng.choice([1, 0.98], rows)
    bars["volume"] = rng.integers(0, 10**9, rows)
    return validate_prices(bars)


def unadjust(bars: pd.DataFrame, splits: dict, dividends: dict, last_factor: float) -> pd.DataFrame:
    """Plants splits {row: ratio} and dividends {row: part of the price}, bar by bar from the last to the first."""
    factors, shares = [last_factor], [Fraction(1)]
    for row in reversed(range(1, len(bars))):
        factors.insert(0, factors[0] * (1 - dividends.get(row, 0)) / float(splits.get(row, 1)))
        shares.insert(0, shares[0] * splits.get(row, 1))
    raw = bars.assign(adj_close=bars["close"], volume=bars["volume"] / np.array(shares, dtype=float))
    raw[PRICE_COLUMNS] = bars[PRICE_COLUMNS].div(factors, axis=0)
    return raw


@st.composite
def histories(draw, dividends: st.SearchStrategy) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tickers as (unadjusted bars with adj_close, the bars that were adjusted)."""
    clean, raw = [], []
    for ticker in ("AAA", "BBB"):
        bars = clean_bars(ticker, draw(st.integers(1, 12)), draw(st.integers(0, 10**6)))
        rows = st.integers(0, len(bars) - 1)
        splits = draw(st.dictionaries(rows, st.sampled_from(RATIOS), max_size=4))
        paid = {row: part for row, part in draw(st.dictionaries(rows, dividends)).items() if row not in splits}
        clean.append(bars)
        raw.append(unadjust(bars, splits, paid, last_factor=draw(st.floats(0.01, 1))))
    return pd.concat(raw[::-1]), pd.concat(clean, ignore_index=True)


@settings(deadline=None, max_examples=30)
@given(histories(dividends=st.just(0.0)))
def test_split_history_is_undone(history):
    raw, clean = history
    pd.testing.assert_frame_equal(adjust(raw), clean, rtol=1e-9, atol=0)


@settings(deadline=None, max_examples=30)
@given(histories(dividends=st.floats(0, 0.15)))
def test_dividends_are_undone_and_leave_volume_alone(history):
    raw, clean = history
    pd.testing.assert_frame_equal(adjust(raw), clean, rtol=1e-9, atol=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12))
def test_rounding_keeps_the_order_of_a_bar(seed, adj_close):
    bars = clean_bars("AAA", len(adj_close), seed)
    adjusted = adjust(bars.assign(adj_close=adj_close))
    np.testing.assert_allclose(adjusted["close"], adj_close, rtol=1e-12)
    pd.testing.assert_frame_equal(validate_prices(adjusted), adjusted)


def two_bars(close: tuple[float, float], adj_close: tuple[float, float]) -> pd.DataFrame:
    bars = pd.DataFrame({"ticker": "AAA", "date": pd.to_datetime(["2020-01-02", "2020-01-03"])})
    return bars.assign(**dict.fromkeys(PRICE_COLUMNS, close), volume=[100.0, 300.0], adj_close=adj_close)


@pytest.mark.parametrize(
    ("close", "adj_close", "volume"),
    [
        ((100, 50), (50, 50), 200),  # 2:1
        ((100, 55), (50, 55), 200),  # 2:1 on a day of +10 %
        ((100, 26), (50, 26), 200),  # 2:1 on a day of -48 %
        ((100, 50), (49.75, 50), 200),  # 2:1 and a dividend of 0.5 % on one day
        ((3.0, 2.01), (2.0, 2.01), 150),  # 3:2
        ((1.0, 10.0), (10.0, 10.0), 10),  # reverse 1:10
        ((100, 100), (50, 100), 100),  # the close did not move: adjusted before, volume with it
        ((100, 48), (100, 48), 100),  # a crash
        ((100, 90), (90, 90), 100),  # a dividend of 10 %
        ((29.97, 27.39), (24.6, 25.0), 100),  # a dividend of 11 %
        ((100, 80), (60, 80), 100),  # 1.667 would be 5:3, but the close gave back less than half
        ((100, 53), (53, 53), 100),  # 1.887: a spin-off
        ((100, 85), (85, 85), 100),  # 1.176: below every split
    ],
)
def test_what_counts_as_a_split(close, adj_close, volume):
    adjusted = adjust(two_bars(close, adj_close))
    np.testing.assert_allclose(adjusted["volume"], [volume, 300], rtol=1e-12)
    np.testing.assert_allclose(adjusted["close"], adj_close, rtol=1e-12)


def test_adjust_leaves_its_argument_alone():
    table = two_bars((100, 50), (50, 50))
    before = table.copy(deep=True)
    adjust(table)
    pd.testing.assert_frame_equal(table, before)


def test_a_ticker_does_not_split_into_the_next():
    table = pd.concat([two_bars((100, 100), (100, 100)), two_bars((50, 50), (100, 100)).assign(ticker="BBB")])
    assert adjust(table)["volume"].tolist() == [100, 300, 100, 300]


# --- writing ---------------------------------------------------------------------------------------------------------


@by_failure
@pytest.mark.parametrize("name", ["table.parquet", "table.csv"])
def test_failed_table_leaves_the_old_file(tmp_path, monkeypatch, name, failure):
    path = tmp_path / name
    write_table(small_table(), path)
    old = path.read_bytes()

    def fail_half_way(frame, target, index):
        target.write_bytes(b"half a ta")
        assert target.parent == path.parent
        raise failure

    monkeypatch.setattr(pd.DataFrame, "to_" + path.suffix[1:], fail_half_way)
    with pytest.raises(type(failure)):
        write_table(small_table().iloc[:1], path)
    assert os.listdir(tmp_path) == [name]
    assert path.read_bytes() == old


def test_full_disk_is_one_line_naming_the_target(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"cannot write .*table\.csv: No space left on device$"):
        write_table(small_table(), tmp_path / "table.csv")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_write_makes_folders_and_replaces(tmp_path, suffix):
    path = tmp_path / "new" / "folder" / f"table{suffix}"
    for rows in (3, 1):
        write_table(small_table().iloc[:rows], path)
        assert len(read_prices(path)) == rows
    assert os.listdir(path.parent) == [path.name]


def test_written_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    write_table(small_table(), tmp_path / "table.csv")
    assert (tmp_path / "table.csv").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_unwritable_target(tmp_path, suffix):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/table") as error:
        write_table(small_table(), tmp_path / "file" / f"table{suffix}")
    assert "\n" not in str(error.value)
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*folder"):
        write_table(small_table(), tmp_path / f"folder{suffix}")
    assert sorted(os.listdir(tmp_path)) == ["file", f"folder{suffix}"]
    assert os.listdir(tmp_path / f"folder{suffix}") == []


@pytest.mark.parametrize("name", ["table.xlsx", "table", "table.csv.gz", "table.PKL"])
def test_write_refuses_other_suffixes(tmp_path, name):
    with pytest.raises(ValueError, match=rf"cannot write .*{name}: its name must end in \.parquet or \.csv$"):
        write_table(small_table(), tmp_path / name)
    assert os.listdir(tmp_path) == []
