"""Downloads from a stand-in for Yahoo on 127.0.0.1: what they write, and how they meet its troubles."""

import json
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
import yahoo_server
import yfinance.cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yahoo_server import Listing, YahooServer, cut_off, fine, hanging, redirect, status, truncated

from spaceexploreai.data import download as module
from spaceexploreai.data.download import (
    PROVIDERS,
    Order,
    Patience,
    TryAgainError,
    calendar_of,
    clean,
    download,
    newest_session,
    provider,
    read_tickers_file,
    read_universe,
)
from spaceexploreai.data.prices import TICKER_PATTERN, read_prices, read_sample
from spaceexploreai.feature_extraction_spaceexplore import PRICE_COLUMNS, TABLE_COLUMNS
from spaceexploreai.scripts.download import main

pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning:yfinance")
SESSIONS = exchange_calendars.get_calendar("XNYS", start="2024-01-02", end="2024-08-30").sessions.as_unit("ns")
TODAY = pd.Timestamp("2024-06-28")  # a Friday
START = pd.Timestamp("2024-01-02")
FAST = Patience(rate=1000, backoff=0.01, batch_size=3)


def make_bars(seed: int = 0, days: pd.DatetimeIndex = SESSIONS) -> pd.DataFrame:
    """A random walk with a close or an open at the day's edge on most days, where rounding shows."""
    generator = np.random.default_rng(seed)
    close = 100 * np.exp(generator.normal(0, 0.02, len(days)).cumsum())
    open_ = close * np.exp(generator.normal(0, 0.01, len(days)))
    edge = generator.choice([1.0, 1.01], (2, len(days)))
    bars = {"open": open_, "high": np.maximum(open_, close) * edge[0], "low": np.minimum(open_, close) / edge[1]}
    return pd.DataFrame({**bars, "close": close, "volume": generator.integers(1e5, 1e6, len(days))}, index=days)


def after_close(day: pd.Timestamp) -> pd.Timestamp:
    """Five in the afternoon in New York."""
    return (day + pd.Timedelta(hours=17)).tz_localize("America/New_York").tz_convert("UTC")


@pytest.fixture(scope="module")
def server():
    server = YahooServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def yahoo(server, monkeypatch):
    """The stand-in, with two shares; it is the evening of its last day, and yfinance keeps nothing on disk."""
    server.reset()
    server.today = TODAY
    server.listings = {
        "AAA": Listing(make_bars(1), {SESSIONS[40]: 0.7}, {SESSIONS[70]: 4.0}),
        "BBB": Listing(make_bars(2)),
    }
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    redirect(server.server_port, monkeypatch.setattr)
    monkeypatch.setattr(yfinance.cache._TzCacheManager, "_tz_cache", yfinance.cache._TzCacheDummy())
    monkeypatch.setattr(yfinance.cache._CookieCacheManager, "_Cookie_cache", yfinance.cache._CookieCacheDummy())
    monkeypatch.setattr(module, "utc_now", lambda: after_close(server.today))
    yield server
    server.released.set()


@pytest.fixture
def sources(monkeypatch):
    """The registry, put back afterwards."""
    monkeypatch.setattr(module, "PROVIDERS", dict(PROVIDERS))
    return module.PROVIDERS


def run(folder: Path, *options: str, tickers: str = "AAA,BBB") -> int:
    """Exit code of the command line."""
    fast = ["--rate", "1000", "--backoff", "0.01", "--start-date", "2024-01-02", "--output-dir", str(folder)]
    try:
        main(["--tickers", tickers, *fast, *options])
    except SystemExit as exit_:
        return exit_.code
    return 0


def get(folder: Path, *tickers: str, source: str = "yahoo", **options):
    """A run without the command line."""
    patience = options.pop("patience", FAST)
    return download(tickers, folder, Order(source, START), patience=patience, progress=False, **options)


def files(folder: Path) -> dict[str, bytes]:
    """Contents of the tickers' files."""
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("price_history/*/*"))}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def noted(folder: Path) -> list[str]:
    """Tickers of the manifest, if there is one."""
    return list(manifest(folder)["tickers"]) if (folder / "manifest.json").exists() else []


def as_quoted(listing: Listing, today: pd.Timestamp) -> pd.DataFrame:
    """Bars adjusted for splits and dividends."""
    bars = listing.as_of(today)
    factor = bars["adj_close"] / bars["close"]
    return bars.assign(**{column: bars[column] * factor for column in PRICE_COLUMNS})[[*PRICE_COLUMNS, "volume"]]


# --- what is written ---


def test_files_have_the_adjusted_bars_in_the_layout(yahoo, tmp_path):
    assert run(tmp_path) == 0
    for ticker in ("AAA", "BBB"):
        frame = pd.read_csv(tmp_path / "price_history" / ticker / f"{ticker}_yahoo_20240628.csv")
        assert list(frame.columns) == ["Date", "Close", "High", "Low", "Open", "Volume", "ticker"]
        assert set(frame["ticker"]) == {ticker}
        assert frame["Volume"].dtype == "int64"
        expected = as_quoted(yahoo.listings[ticker], TODAY)
        assert frame["Date"].tolist() == expected.index.strftime("%Y-%m-%d").tolist()
        for column in expected:
            np.testing.assert_allclose(frame[column.capitalize()], expected[column], rtol=1e-12)


def test_every_other_command_reads_the_folder_and_the_table(yahoo, tmp_path):
    run(tmp_path)
    folder, table = read_prices(tmp_path), read_prices(tmp_path / "prices.parquet")
    pd.testing.assert_frame_equal(folder, table, check_exact=True)
    assert folder["ticker"].value_counts().to_dict() == {"AAA": 124, "BBB": 124}
    assert list(folder.columns) == TABLE_COLUMNS


def test_manifest_says_what_was_asked_and_what_came(yahoo, tmp_path):
    run(tmp_path, "--end-date", "2024-03-28", tickers="BBB,ZZZ")
    content = manifest(tmp_path)
    asked = {"source": "yahoo", "start": "2024-01-02", "end": "2024-03-28"}
    moment = "2024-06-28T21:00:00Z"
    assert content["run"] == {**asked, "calendar": "XNYS", "update": False, "time": moment, "universe": None}
    file = "price_history/BBB/BBB_yahoo_20240628.csv"
    came = {"time": moment, "file": file, "rows": 61, "first": "2024-01-02", "last": "2024-03-28", "dropped": {}}
    assert content["tickers"] == {"BBB": {**asked, **came}}
    assert list(content["failures"]) == ["ZZZ"]


def test_a_mixed_outcome_exits_with_the_list_and_keeps_what_came(yahoo, tmp_path, capsys):
    assert run(tmp_path, tickers="AAA,ZZZ,BBB") == 1
    shown = capsys.readouterr()
    assert "2 written, 0 left as they were, 1 failed" in shown.out
    assert shown.err.endswith("failed: ZZZ: HTTP 404, No data found, symbol may be delisted\n")
    assert set(files(tmp_path)) == set(read_prices(tmp_path / "prices.parquet")["ticker"]) == {"AAA", "BBB"}
    yahoo.listings["ZZZ"] = Listing(make_bars(3))
    assert run(tmp_path, tickers="AAA,ZZZ,BBB") == 0
    assert manifest(tmp_path)["failures"] == {}
    assert set(read_prices(tmp_path / "prices.parquet")["ticker"]) == {"AAA", "BBB", "ZZZ"}


# --- which days are finished ---


@pytest.mark.parametrize(
    ("moment", "newest"),
    [
        ("2024-07-02 19:59", "2024-07-01"),
        ("2024-07-02 20:29", "2024-07-01"),
        ("2024-07-02 20:31", "2024-07-02"),
        ("2024-07-03 17:31", "2024-07-03"),  # closes at one
        ("2024-07-04 23:59", "2024-07-03"),  # a holiday
        ("2024-07-07 12:00", "2024-07-05"),  # a Sunday
    ],
)
def test_a_day_is_finished_half_an_hour_after_its_close(moment, newest):
    assert newest_session("XNYS", pd.Timestamp(moment, tz="UTC")) == pd.Timestamp(newest)


def test_a_day_of_another_exchange_is_finished_by_its_own_clock():
    moment = pd.Timestamp("2024-07-02 08:00", tz="UTC")
    assert newest_session("XTKS", moment) == pd.Timestamp("2024-07-02")
    assert newest_session("24/7", moment) == pd.Timestamp("2024-07-01")


@pytest.mark.parametrize("ticker", ["BTC-USD", "ETH-EUR", "SHIB-USDT", "EURUSD=X", "ES=F"])
def test_what_trades_all_day_has_another_calendar(ticker):
    assert calendar_of(ticker, "XNYS") == "24/7"


@pytest.mark.parametrize("ticker", ["AAPL", "BRK-B", "BAC-PL", "^GSPC", "7203.T", "RDS-A"])
def test_what_trades_on_an_exchange_has_its_calendar(ticker):
    assert calendar_of(ticker, "XLON") == "XLON"


def test_the_bar_of_today_is_not_written_before_the_close(yahoo, tmp_path, monkeypatch):
    """Yahoo sends the last price of an open day as if it were a bar."""
    monkeypatch.setattr(module, "utc_now", lambda: pd.Timestamp("2024-06-28 18:00", tz="UTC"))
    assert run(tmp_path) == 0
    assert read_prices(tmp_path)["date"].max() == pd.Timestamp("2024-06-27")
    monkeypatch.setattr(module, "utc_now", lambda: after_close(TODAY))
    assert run(tmp_path, "--update") == 0
    assert read_prices(tmp_path)["date"].max() == TODAY


# --- going on ---


def test_finished_tickers_are_not_asked_for_again(yahoo, tmp_path, capsys):
    run(tmp_path, tickers="AAA")
    before = files(tmp_path)
    yahoo.asked.clear()
    assert run(tmp_path) == 0
    assert yahoo.charts("AAA") == []
    assert len(yahoo.charts("BBB")) > 0
    assert files(tmp_path)["AAA"] == before["AAA"]
    assert "1 written, 1 left as they were" in capsys.readouterr().out


@pytest.mark.parametrize("change", [["--start-date", "2024-02-01"], ["--end-date", "2024-05-31"]])
def test_another_order_is_downloaded_anew(yahoo, tmp_path, change):
    run(tmp_path)
    assert run(tmp_path, *change) == 0
    dates = read_prices(tmp_path)["date"]
    assert f"{dates.min():%Y-%m-%d}" == (change[1] if "--start-date" in change else "2024-01-02")
    assert f"{dates.max():%Y-%m-%d}" == (change[1] if "--end-date" in change else "2024-06-28")


def test_a_file_that_is_gone_is_downloaded_anew(yahoo, tmp_path):
    run(tmp_path)
    next(tmp_path.glob("price_history/AAA/*")).unlink()
    assert run(tmp_path) == 0
    assert set(files(tmp_path)) == {"AAA", "BBB"}


def test_a_killed_run_leaves_whole_files_and_goes_on(yahoo, tmp_path):
    """A process of its own, with yfinance's own caches: they go where XDG says and nowhere else."""
    names = [f"T{number:02}" for number in range(16)]
    yahoo.listings = {name: Listing(make_bars(seed)) for seed, name in enumerate(names)}
    yahoo.delay = 0.1
    folder, home, cache = (tmp_path / name for name in ("out", "home", "cache"))
    home.mkdir()
    code = (
        "import sys, yahoo_server; yahoo_server.redirect(int(sys.argv.pop(1)));"
        "from spaceexploreai.scripts.download import main; main()"
    )
    paths = [str(Path(yahoo_server.__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    options = [
        "--tickers",
        ",".join(names),
        "--output-dir",
        str(folder),
        "--start-date",
        "2024-01-02",
        "--rate",
        "1000",
    ]
    with subprocess.Popen([sys.executable, "-c", code, str(yahoo.server_port), *options], env=env) as process:
        deadline = time.monotonic() + 120
        while len(noted(folder)) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    whole = {path.parent.name: len(read_prices(path)) for path in folder.glob("price_history/*/[!.]*")}
    assert 3 <= len(whole) < len(names)
    assert set(whole.values()) == {124}
    assert set(noted(folder)) <= set(whole)
    assert list(home.iterdir()) == []
    assert {path.name for path in (cache / "py-yfinance").glob("*.db")} == {"tkr-tz.db", "cookies.db"}

    finished = noted(folder)
    half = folder / "price_history" / "T15" / f".{'0f' * 16}.T15_yahoo_20240628.csv"
    half.parent.mkdir(exist_ok=True)
    half.write_text("Date,Cl")
    yahoo.asked.clear()
    assert run(folder, tickers=",".join(names)) == 0
    assert [name for name in finished if yahoo.charts(name)] == []
    assert not half.exists()
    assert read_prices(folder)["ticker"].value_counts().to_dict() == dict.fromkeys(names, 124)


# --- updates ---


def test_update_asks_only_for_the_days_since_and_replaces_the_file(yahoo, tmp_path):
    yahoo.today = TODAY - pd.Timedelta(days=28)
    run(tmp_path)
    spied = []
    yahoo.rewrite = lambda rows: spied.append(len(rows)) or rows
    yahoo.today = TODAY
    yahoo.asked.clear()
    assert run(tmp_path, "--update") == 0
    assert len(yahoo.charts()) == 4  # of each ticker the time zone and the bars
    assert max(spied) == 24  # 5 that are known and 19 that are new
    assert sorted(path.name for path in tmp_path.glob("*/*/*")) == ["AAA_yahoo_20240628.csv", "BBB_yahoo_20240628.csv"]
    fresh = tmp_path / "fresh"
    run(fresh)
    assert files(tmp_path) == files(fresh)


def test_update_with_nothing_new_changes_nothing(yahoo, tmp_path, capsys):
    run(tmp_path)
    before = files(tmp_path)
    yahoo.asked.clear()
    assert run(tmp_path, "--update") == 0
    assert yahoo.charts() == []  # no session has closed since
    yahoo.listings["AAA"].bars = yahoo.listings["AAA"].bars.loc[:TODAY]  # delisted
    yahoo.today = TODAY + pd.Timedelta(days=4)
    assert run(tmp_path, "--update", tickers="AAA") == 0
    assert len(yahoo.charts()) == 2
    assert files(tmp_path) == before
    assert "0 written, 1 left as they were" in capsys.readouterr().out


def test_update_downloads_what_is_not_there(yahoo, tmp_path, capsys):
    run(tmp_path, tickers="AAA")
    assert run(tmp_path, "--update") == 0
    assert set(files(tmp_path)) == {"AAA", "BBB"}
    assert "1 written, 1 left as they were" in capsys.readouterr().out


def test_update_keeps_the_file_of_a_ticker_that_fails(yahoo, tmp_path):
    run(tmp_path)
    before = files(tmp_path)
    del yahoo.listings["AAA"]
    yahoo.today = SESSIONS[-1]
    assert run(tmp_path, "--update") == 1
    assert files(tmp_path)["AAA"] == before["AAA"]
    table = read_prices(tmp_path / "prices.parquet")
    assert table.groupby("ticker")["date"].max().to_dict() == {"AAA": TODAY, "BBB": SESSIONS[-1]}


def test_update_leaves_files_alone_that_are_not_its_own(yahoo, tmp_path):
    yahoo.today = TODAY - pd.Timedelta(days=7)
    run(tmp_path, tickers="AAA")
    foreign = tmp_path / "price_history" / "AAA" / "AAA_yahoo_20200101.csv"
    foreign.write_text("mine")
    yahoo.today = TODAY
    run(tmp_path, "--update", tickers="AAA")
    assert {path.name for path in foreign.parent.iterdir()} == {foreign.name, "AAA_yahoo_20240628.csv"}
    assert foreign.read_text() == "mine"


def test_a_damaged_file_is_named_and_update_downloads_it_anew(yahoo, tmp_path, capsys):
    run(tmp_path)
    path = next(tmp_path.glob("price_history/AAA/*"))
    path.write_text(path.read_text()[:-400].replace("AAA\n", "\n"))
    assert run(tmp_path) == 2
    assert path.name in capsys.readouterr().err
    yahoo.today = SESSIONS[-1]
    assert run(tmp_path, "--update") == 0
    fresh = tmp_path / "fresh"
    run(fresh)
    assert files(tmp_path) == files(fresh)


def test_noise_of_the_provider_is_no_moved_base(yahoo, tmp_path):
    """Yahoo answers one question differently, by up to 4e-7 of the price."""
    yahoo.today = TODAY - pd.Timedelta(days=14)
    run(tmp_path, tickers="BBB")
    yahoo.rewrite = lambda rows: rows.assign(adj_close=rows["adj_close"] * (1 + 4e-7))
    yahoo.today = TODAY
    yahoo.asked.clear()
    run(tmp_path, "--update", tickers="BBB")
    assert len(yahoo.charts()) == 2
    assert len(read_prices(tmp_path)) == 124


@pytest.mark.parametrize(
    ("event", "value"), [("dividends", 0.01), ("dividends", 3.0), ("splits", 3.0), ("splits", 0.1)]
)
def test_a_moved_base_downloads_the_file_anew(yahoo, tmp_path, event, value):
    """A cent on a share of 150 dollars is the smallest dividend of today's large companies."""
    bars = make_bars(7)
    bars[PRICE_COLUMNS] *= 150 / bars["close"].loc[:TODAY].iloc[-6]
    yahoo.listings = {"CCC": Listing(bars, **{event: {TODAY - pd.Timedelta(days=2): value}})}
    yahoo.today = TODAY - pd.Timedelta(days=7)
    run(tmp_path, tickers="CCC")
    before = read_prices(tmp_path)
    yahoo.today = TODAY
    assert run(tmp_path, "--update", tickers="CCC") == 0
    after = read_prices(tmp_path).iloc[: len(before)]
    factor = 1 / value if event == "splits" else 1 - value / bars["close"].loc[: TODAY - pd.Timedelta(days=3)].iloc[-1]
    np.testing.assert_allclose(after[PRICE_COLUMNS], factor * before[PRICE_COLUMNS], rtol=2e-7)
    np.testing.assert_allclose(after["volume"], before["volume"] * (value if event == "splits" else 1), atol=0.5)
    fresh = tmp_path / "fresh"
    run(fresh, tickers="CCC")
    assert files(tmp_path) == files(fresh)


EVENTS = st.one_of(
    st.tuples(st.just("dividend"), st.floats(0.005, 20)),
    st.tuples(st.just("split"), st.sampled_from([0.1, 1.5, 2, 7])),
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 99),
    known=st.integers(5, 60),
    new=st.integers(0, 12),
    events=st.dictionaries(st.integers(1, 75), EVENTS, max_size=4),
    recent=st.tuples(st.integers(0, 11), EVENTS),
    empty=st.sets(st.integers(1, 75), max_size=4),
)
def test_an_updated_file_is_a_fresh_one(yahoo, tmp_path_factory, seed, known, new, events, recent, empty):
    """Whatever happened before and since, byte for byte: splits, dividends of a cent, days without prices."""
    folder, fresh = (tmp_path_factory.mktemp(name) for name in ("updated", "fresh"))
    events = {**events, known + recent[0]: recent[1]}
    dividends, splits = (
        {SESSIONS[at]: value for at, (event, value) in events.items() if event == kind}
        for kind in ("dividend", "split")
    )
    yahoo.listings = {"CCC": Listing(make_bars(seed), dividends, splits)}
    days = SESSIONS[list(empty)]
    yahoo.rewrite = lambda rows: rows.mask(rows["day"].isin(days), rows[["day", "timestamp"]])
    yahoo.today = SESSIONS[known]
    assert get(folder, "CCC").failures == {}
    yahoo.today = SESSIONS[known + new]
    assert get(folder, "CCC", update=True).failures == {}
    assert get(fresh, "CCC").failures == {}
    assert files(folder) == files(fresh)
    pd.testing.assert_frame_equal(read_prices(folder / "prices.parquet"), read_prices(fresh), check_exact=True)


# --- troubles ---

CRUMB = '{"finance":{"result":null,"error":{"code":"Unauthorized","description":"Invalid Crumb"}}}'
TROUBLES = {
    "429": status(429, "Too Many Requests"),
    "500": status(500, "oops"),
    "502 of a proxy": status(502, "<html>Bad Gateway</html>"),
    "a page instead of JSON": status(200, "<html>Will be right back</html>"),
    "truncated JSON": truncated,
    "connection cut off": cut_off,
    "timeout": hanging,
}


@pytest.mark.parametrize("before", [[], [fine]], ids=["time zone", "bars"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_may_pass_is_tried_again(yahoo, tmp_path, monkeypatch, trouble, before):
    if trouble == "timeout":
        monkeypatch.setattr(module, "TIMEOUT", 1.0)
    yahoo.troubles["AAA"].extend([*before, TROUBLES[trouble]])
    assert run(tmp_path) == 0
    assert set(read_prices(tmp_path)["ticker"]) == {"AAA", "BBB"}
    assert not yahoo.troubles["AAA"]
    asked = yahoo.charts("AAA")
    assert len(asked) == 3 + len(before)
    assert np.diff(asked).max() < 6  # of the timeout, the server's patience is 10 seconds


@pytest.mark.parametrize("before", [[], [fine]], ids=["time zone", "bars"])
@pytest.mark.parametrize("refusal", [status(401, CRUMB), status(403, "<html>Forbidden</html>")], ids=["401", "403"])
def test_what_is_refused_is_tried_with_new_cookies_and_again(yahoo, tmp_path, refusal, before):
    yahoo.troubles["AAA"].extend([*before, refusal])
    assert run(tmp_path, "--tries", "1", tickers="AAA") == 0
    yahoo.troubles["BBB"].extend([*before, refusal, refusal])
    assert run(tmp_path / "second", tickers="BBB") == 0
    yahoo.troubles["BBB"].extend([refusal] * 9)
    assert run(tmp_path / "third", "--tries", "2", tickers="BBB") == 1
    assert manifest(tmp_path / "third")["failures"]["BBB"].endswith("refused; gave up after 2 tries")


@pytest.mark.parametrize("trouble", ["429", "500", "truncated JSON"])
def test_what_does_not_pass_is_a_failure_after_so_many_tries(yahoo, tmp_path, trouble, capsys):
    yahoo.troubles["AAA"].extend([TROUBLES[trouble]] * 99)
    assert run(tmp_path, "--tries", "3") == 1
    assert len(yahoo.charts("AAA")) == 3
    assert set(files(tmp_path)) == {"BBB"}
    said = manifest(tmp_path)["failures"]["AAA"]
    assert {"429": "429", "500": "500", "truncated JSON": "JSON"}[trouble] in said
    assert said.endswith("gave up after 3 tries")
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (status(404), "HTTP 404, not found"),
        (status(404, "<html>Not found</html>"), "HTTP 404, not found"),
        (status(400, '{"chart":{"error":{"description":"Data doesn\'t exist"}}}'), "HTTP 400, Data doesn't exist"),
    ],
)
def test_an_unknown_ticker_is_asked_for_once(yahoo, tmp_path, trouble, said):
    yahoo.troubles["ZZZ"].append(trouble)
    assert run(tmp_path, tickers="ZZZ") == 1
    assert len(yahoo.charts("ZZZ")) == 1
    assert manifest(tmp_path)["failures"] == {"ZZZ": said}
    assert {path.name for path in tmp_path.rglob("*")} == {"manifest.json"}


def test_no_bars_in_the_range_is_a_failure(yahoo, tmp_path):
    yahoo.rewrite = lambda rows: rows.iloc[:0] if len(rows) > 1 else rows
    assert run(tmp_path, tickers="AAA") == 1
    assert "no price data found" in manifest(tmp_path)["failures"]["AAA"]


def test_other_tickers_wait_too_when_the_provider_asks_for_it(yahoo, tmp_path):
    yahoo.troubles["AAA"].append(status(429, Retry_After="1"))
    order = Order("yahoo", START)
    download(["AAA", "BBB"], tmp_path, order, patience=Patience(rate=4, backoff=0.01), progress=False)
    first, *others = yahoo.charts()
    assert len(others) == 4
    assert min(others) >= first + 1


def test_a_date_to_come_back_at_is_kept(yahoo, tmp_path):
    back = int(time.time()) + 2
    yahoo.troubles["AAA"].append(status(503, Retry_After=formatdate(back, usegmt=True)))
    assert run(tmp_path, tickers="AAA") == 0
    early = time.time() - time.monotonic()  # from one clock to the other
    assert yahoo.charts("AAA")[1] + early >= back - 0.01


def test_a_rest_of_hours_is_left_to_the_next_run(yahoo, tmp_path):
    yahoo.troubles["AAA"].extend([status(429, Retry_After="7200")] * 9)
    assert run(tmp_path) == 1
    assert len(yahoo.charts("AAA")) == 1
    assert "7200 s" in manifest(tmp_path)["failures"]["AAA"]
    assert set(files(tmp_path)) == {"BBB"}


def test_a_provider_that_is_down_is_not_asked_for_every_ticker(sources, tmp_path):
    asked = []

    @provider("down")
    def down(ticker, start, end):
        asked.append(ticker)
        raise ConnectionError("no route")

    tickers = [f"T{number}" for number in range(40)]
    report = get(tmp_path, *tickers, source="down", patience=Patience(rate=1e6, tries=2, backoff=0.001, batch_size=5))
    assert sorted(asked) == sorted(2 * tickers[:10])
    assert sorted(report.failures) == sorted(tickers)
    assert report.failures["T0"] == "ConnectionError: no route; gave up after 2 tries"
    assert report.failures["T39"].startswith("not tried")


def test_back_off_doubles(sources, tmp_path):
    asked = []

    @provider("flaky")
    def flaky(ticker, start, end):
        asked.append(time.monotonic())
        raise TryAgainError("not now")

    get(tmp_path, "AAA", source="flaky", patience=Patience(rate=1e6, tries=5, backoff=0.1))
    gaps = np.diff(asked)
    assert (gaps >= 0.5 * 0.1 * 2 ** np.arange(4)).all()
    assert (gaps <= 0.1 * 2 ** np.arange(4) + 0.7).all()


def test_requests_keep_the_rate(sources, tmp_path):
    asked = []

    @provider("slow", requests=2)
    def slow(ticker, start, end):
        asked.append(time.monotonic())
        return make_bars().reset_index(names="date")

    get(tmp_path, *"ABCDEF", source="slow", patience=Patience(rate=20, batch_size=6))
    assert np.diff(sorted(asked)).min() >= 0.099


def test_a_call_of_yahoo_is_worth_its_requests(yahoo, tmp_path):
    run(tmp_path, tickers="AAA")
    assert len(yahoo.charts("AAA")) == PROVIDERS["yahoo"].requests


# --- cleaning ---


def shuffled(bars: pd.DataFrame, seed: int = 5) -> pd.DataFrame:
    return bars.sample(frac=1, random_state=seed)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), factor=st.floats(1e-3, 1e3), empty=st.sets(st.integers(0, 150)), text=st.booleans())
def test_cleaning_gives_back_what_was_muddled(seed, factor, empty, text):
    """Unsorted, repeated, with days without prices, unknown volumes, factors that round, and numbers as text."""
    bars = make_bars(seed).reset_index(names="date")
    rounded = bars.assign(**{column: (bars[column] / factor * np.float32(factor)) for column in ("open", "close")})
    rounded["volume"] = rounded["volume"].astype("float64").where(rounded.index % 9 > 0)
    rounded.loc[list(empty), PRICE_COLUMNS] = np.nan
    stale = rounded.sample(20, random_state=seed).assign(close=lambda rows: rows["low"])
    muddled = pd.concat([stale, shuffled(rounded, seed)], ignore_index=True)
    muddled["date"] = muddled["date"].dt.tz_localize("America/New_York")
    muddled = muddled.astype({"close": str}) if text else muddled
    table, wrong = clean(muddled, "AAA", START, TODAY)
    expected = bars[(bars["date"] <= TODAY) & ~bars.index.isin(empty)].reset_index(drop=True)
    assert wrong == {}
    assert (table["date"] == expected["date"]).all()
    np.testing.assert_allclose(table[PRICE_COLUMNS], expected[PRICE_COLUMNS], rtol=1e-6)
    assert (
        table["volume"] == expected["volume"].where(expected["date"].isin(bars["date"][bars.index % 9 > 0]), 0)
    ).all()


IMPOSSIBLE = {
    "close": (0.0, "close 0 is not a positive price"),
    "open": (np.inf, "open inf is not a finite number"),
    "low": (1e6, "high"),
    "high": (1.0, "high 1 is below the low"),
    "volume": (-3.0, "volume -3 is negative"),
    "adj_close": (np.nan, "adj_close nan"),
}


@pytest.mark.parametrize("column", IMPOSSIBLE)
def test_a_bar_that_cannot_be_is_left_out_and_said(sources, tmp_path, column, capsys):
    value, said = IMPOSSIBLE[column]
    bars = make_bars().reset_index(names="date").assign(adj_close=lambda bars: bars["close"])
    bars[column] = bars[column].astype("float64").where(bars.index != 50, value)
    provider("broken")(lambda ticker, start, end: bars)
    assert run(tmp_path, "--source", "broken", tickers="AAA") == 0
    assert len(read_prices(tmp_path)) == (bars["date"] <= module.utc_now().tz_localize(None)).sum() - 1
    (day,) = manifest(tmp_path)["tickers"]["AAA"]["dropped"]
    assert day == f"{SESSIONS[50]:%Y-%m-%d}"
    assert said in manifest(tmp_path)["tickers"]["AAA"]["dropped"][day]
    assert f"left out AAA {day}: " in capsys.readouterr().out


def test_many_bars_that_cannot_be_are_a_failure(sources, tmp_path):
    bars = make_bars().reset_index(names="date")
    bars.loc[[20, 40, 60], "high"] = 1.0
    provider("broken")(lambda ticker, start, end: bars)
    assert run(tmp_path, "--source", "broken", tickers="AAA") == 1
    said = manifest(tmp_path)["failures"]["AAA"]
    assert said.startswith(f"3 of {len(bars)} bars are impossible, the first on {SESSIONS[20]:%Y-%m-%d}: high 1")


ANSWERS = {
    "nothing": (lambda bars: None, "NoneType"),
    "no column": (lambda bars: bars.drop(columns="close"), "'close'"),
    "no date": (lambda bars: bars.assign(date="soon"), "'soon'"),
    "no rows": (lambda bars: bars.iloc[:0], "no bars from 2024-01-02"),
    "rows of other years": (lambda bars: bars.assign(date=bars["date"] + pd.Timedelta(days=9999)), "no bars from"),
    "a bug": (lambda bars: bars["no such column"], "KeyError"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_that_is_none_is_this_tickers_failure(sources, tmp_path, case):
    change, said = ANSWERS[case]
    bars = make_bars().reset_index(names="date")
    provider("odd")(lambda ticker, start, end: bars if ticker == "BBB" else change(bars))
    assert run(tmp_path, "--source", "odd") == 1
    assert said in manifest(tmp_path)["failures"]["AAA"]
    assert set(files(tmp_path)) == {"BBB"}


# --- other providers ---


def test_ten_lines_are_a_provider(sources, tmp_path):
    exchange = SimpleNamespace(
        bars=lambda symbol: [("2024-01-03", 11, 12, 10, 11.5, 0.25), ("2024-01-02", 9, 11, 9, 11, 2)]
    )

    @provider("mine")
    def mine(ticker, start, end):
        rows = exchange.bars(ticker)
        return pd.DataFrame(rows, columns=["date", "open", "high", "low", "close", "volume"])

    assert run(tmp_path, "--source", "mine", tickers="BTC-USD") == 0
    table = read_prices(tmp_path)
    assert table.to_numpy().tolist() == [
        ["BTC-USD", pd.Timestamp("2024-01-02"), 9, 11, 9, 11, 2],
        ["BTC-USD", pd.Timestamp("2024-01-03"), 11, 12, 10, 11.5, 0.25],
    ]


def test_csv_reads_the_users_files(tmp_path):
    """Raw bars with an adjusted close, as the embedded sample has them."""
    sample = Path(module.__file__).parent / "sample" / "stocks.csv.gz"
    order = Order(f"csv:{sample}", pd.Timestamp("2005-01-03"), pd.Timestamp("2012-12-31"))
    report = download(["IBM", "AAPL", "TSLA"], tmp_path, order, progress=False)
    assert "TSLA" in report.failures["TSLA"]
    expected = read_sample(["AAPL", "IBM"])
    expected = expected[expected["date"].between(order.start, order.end)].reset_index(drop=True)
    pd.testing.assert_frame_equal(read_prices(tmp_path), expected, check_exact=True)


def test_an_argument_reaches_the_provider(sources, tmp_path):
    given_ = []
    provider("keyed")(lambda ticker, start, end, key: given_.append(key) or make_bars().reset_index(names="date"))
    assert run(tmp_path, "--source", "keyed:a:b", tickers="AAA") == 0
    assert given_ == ["a:b"]


# --- which tickers ---


@pytest.mark.parametrize(
    "text",
    [
        "aapl\nBRK-B\n^GSPC\n",
        "AAPL, BRK-B,^GSPC",
        "# mine\n\nAAPL # Apple\r\nBRK-B,,\n^GSPC,AAPL",
        "\ufeffAAPL,BRK-B\n^GSPC",
    ],
)
def test_tickers_file_forms(tmp_path, text):
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_tickers_file(path) == ["AAPL", "BRK-B", "^GSPC"]


@pytest.mark.parametrize(
    ("name", "count", "member"), [("dow30", 30, "GS"), ("nasdaq100", 101, "NVDA"), ("sp500", 503, "BRK-B")]
)
def test_universes_are_lists_of_tickers_of_a_day(name, count, member):
    universe = read_universe(name)
    assert len(set(universe["tickers"])) == len(universe["tickers"]) == count
    assert all(TICKER_PATTERN.fullmatch(ticker) for ticker in universe["tickers"])
    assert member in universe["tickers"]
    assert pd.Timestamp(universe["as_of"]) > pd.Timestamp("2026-01-01")
    assert "survivorship" in universe["note"]


def test_a_universe_is_downloaded_with_its_warning(sources, tmp_path, capsys):
    provider("quick", requests=0)(lambda ticker, start, end: make_bars().reset_index(names="date"))
    main(["--universe", "dow30", "--source", "quick", "--output-dir", str(tmp_path)])
    assert len(files(tmp_path)) == 30
    universe = manifest(tmp_path)["run"]["universe"]
    assert universe == {key: read_universe("dow30")[key] for key in ("name", "as_of", "note")}
    assert "survivorship" in capsys.readouterr().out


def test_help_warns_of_survivorship(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "survivorship bias" in capsys.readouterr().out


# --- mistakes ---

MISTAKES = {
    "end before start": (["--end-date", "2023-12-29"], "2023-12-29"),
    "start to come": (["--start-date", "2090-01-01"], "2090-01-01"),
    "start no date": (["--start-date", "soon"], "'soon'"),
    "end in another order": (["--end-date", "03/04/2024"], "'03/04/2024'"),
    "unknown source": (["--source", "bloomberg"], "'bloomberg'"),
    "csv without a path": (["--source", "csv"], "csv:PATH"),
    "yahoo with a path": (["--source", "yahoo:here"], "'yahoo:here'"),
    "csv that is not there": (["--source", "csv:nowhere.csv"], "nowhere.csv"),
    "unknown calendar": (["--calendar", "MARS"], "'MARS'"),
    "no rate": (["--rate", "0"], "rate must be a positive number, got 0.0"),
    "no tries": (["--tries", "0"], "tries"),
    "batch no number": (["--batch-size", "many"], "many"),
    "output in a file": (["--source", "quick", "--output-dir", "file/prices"], "file/prices"),
    "manifest of something else": (["--output-dir", "other"], "other/manifest.json"),
    "manifest with a path": (["--output-dir", "evil"], "evil/manifest.json"),
    "two lists of tickers": (["--universe", "dow30"], "--universe"),
}
TICKER_MISTAKES = {
    "none": ([], "--tickers"),
    "a path": (["--tickers", "AAA,../../x"], "'../../X'"),
    "an address": (["--tickers", "AAA/../../v1"], "'AAA/../../V1'"),
    "no ticker": (["--tickers", ","], "','"),
    "a path in a file": (["--tickers-file", "mine.txt"], "mine.txt: '../X'"),
    "missing file": (["--tickers-file", "nowhere.txt"], "nowhere.txt"),
    "unknown universe": (["--universe", "ftse"], "unknown universe 'ftse'; there are dow30, nasdaq100, sp500"),
}


@pytest.fixture
def refused(yahoo, sources, tmp_path, monkeypatch, capsys):
    """Runs the command line among a few odd files and returns its complaint; nothing may be asked for or written."""
    provider("quick")(lambda ticker, start, end: make_bars().reset_index(names="date"))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("mine.txt").write_text("AAA\n../x\n")
    for name, entries in (
        ("other", ["AAA"]),
        ("evil", {"../x": dict.fromkeys(module.Entry.__dataclass_fields__, "a")}),
    ):
        Path(name).mkdir()
        Path(name, "manifest.json").write_text(json.dumps({"tickers": entries}))

    def run(argv: list[str]) -> str:
        before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        with pytest.raises(SystemExit) as exit_:
            main(["--output-dir", "prices", "--rate", "1000", *argv])
        complaint = capsys.readouterr().err.splitlines()[-1]
        assert exit_.value.code == 2
        assert complaint.startswith("error: ")
        assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
        assert yahoo.asked == []
        return complaint

    return run


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_refused(refused, case):
    options, named = MISTAKES[case]
    assert named in refused(["--tickers", "AAA", "--start-date", "2024-01-02", *options])


@pytest.mark.parametrize("case", TICKER_MISTAKES)
def test_what_is_no_ticker_is_refused(refused, case):
    options, named = TICKER_MISTAKES[case]
    assert named in refused(options)
