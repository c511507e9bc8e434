"""The page, by a real server on loopback and a real browser: what it shows, refuses and asks the network for."""

import shutil
import socket
import string
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import RECIPE, make_market
from playwright.sync_api import Page as Tab
from playwright.sync_api import expect, sync_playwright

from spaceexploreai import app
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.cleaning import KINDS, REFUSED
from spaceexploreai.data.prices import read_sample
from spaceexploreai.evaluation.baselines import BASELINES
from spaceexploreai.modeling_spaceexplore import SpaceExploreForClassification, SpaceExploreForRegression
from spaceexploreai.scripts.forecast import forecast_newest
from spaceexploreai.scripts.forecasters import load_pipeline
from spaceexploreai.t2t_spaceexplore import WORDS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120_000  # milliseconds, of a machine that does other things, too
WIDE, PHONE = {"width": 1280, "height": 844}, {"width": 390, "height": 844}
expect.set_options(timeout=PATIENCE)
BARS = make_market(tickers=1, days=120)


# --- texts ---


def leaves(texts: dict, path: tuple = ()) -> dict[tuple, str]:
    found = {}
    for key, text in texts.items():
        found |= leaves(text, (*path, key)) if isinstance(text, dict) else {(*path, key): text}
    return found


def fields(text: str) -> set[tuple]:
    return {(name, form) for _, name, form, _ in string.Formatter().parse(text) if name}


def test_both_languages_say_the_same_things_with_the_same_facts():
    english, chinese = leaves(app.TEXTS["en"]), leaves(app.TEXTS["zh"])
    assert english.keys() == chinese.keys()
    assert {key: fields(text) for key, text in english.items()} == {key: fields(text) for key, text in chinese.items()}


def test_chinese_is_chinese():
    untranslated = {key for key, text in leaves(app.TEXTS["zh"]).items() if text.isascii()}
    assert untranslated == {("forecasts", "ewma")}


def test_there_is_a_text_for_whatever_is_found():
    texts = app.TEXTS["en"]
    assert set(texts["words"]) == set(WORDS)
    assert set(texts["kinds"]) == set(KINDS)
    assert set(texts["actions"]) == {*REFUSED, "masked", "converted", "reported"}
    assert list(texts["forecasts"]) == ["model", *sorted(BASELINES, key=list(texts["forecasts"]).index)]


@pytest.mark.parametrize(
    ("p_up", "naive", "said"),
    [
        (0.51, 0.51, "hardly better than a coin."),
        (0.46, 0.6, "hardly better than a coin."),
        (0.58, 0.57, "no more than what the naive forecast says, which knows volatility alone."),
        (0.66, 0.57, "leans up. Even if the model knows its odds, this is wrong 34 times in 100."),
        (0.3, 0.5, "leans down. Even if the model knows its odds, this is wrong 30 times in 100."),
    ],
)
def test_a_probability_is_not_oversold(p_up, naive, said):
    assert app.odds(p_up, naive, "en") == said


# --- the forecast ---


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory) -> Path:
    """A checkpoint whose time-to-text extractor counts as trained."""
    folder = tmp_path_factory.mktemp("words")
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    trained = SpaceExploreConfig.from_pretrained(checkpoint)
    config = SpaceExploreConfig.from_json_file(RECIPE / "t2t.json")
    config.num_features, config.train_cutoff, config.selection_cutoff = (
        trained.num_features,
        "2012-06-29",
        "2013-01-31",
    )
    torch.manual_seed(0)
    model = SpaceExploreForRegression(config)
    model.base_model.t2t.num_batches_tracked += 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return app.load(str(folder))


def test_prices_are_those_of_the_command_line(pipe, folder):
    prices = read_sample(["IBM"])
    outcome = app.make_forecast(pipe, prices, "IBM", "2013-02-01", 10)
    other = forecast_newest(load_pipeline(folder), prices, "2013-02-01").table
    close = prices.set_index("date")["close"]
    rows = outcome.table.set_index("horizon").loc[other["horizon"]]
    for column in ("q0.05", "q0.5", "q0.95", "zero_q0.1", "ewma_q0.75", "drift_q0.05", "last_q0.9"):
        np.testing.assert_allclose(rows[column], close["2013-02-01"] * np.exp(other[column]), rtol=1e-5)
    for column in ("p_up", "ewma_p_up"):
        np.testing.assert_allclose(rows[column], other[column], atol=1e-5)
    np.testing.assert_allclose(rows["close"], close[rows["date"]])


def test_a_forecast_from_a_past_day_knows_nothing_later(pipe):
    prices = read_sample(["IBM"])
    whole = app.make_forecast(pipe, prices, "IBM", "2012-06-29", 5)
    cut = app.make_forecast(pipe, prices[prices["date"] <= "2012-06-29"], "IBM", "", 5)
    assert cut.table["close"].isna().all()
    assert whole.table["close"].notna().all()
    pd.testing.assert_frame_equal(whole.table.drop(columns="close"), cut.table.drop(columns="close"))
    assert whole.words == cut.words != []


@pytest.mark.parametrize(
    ("cutoff", "notice"),
    [
        ("2012-06-29", ("in_sample", "2012-06-29")),
        ("2012-07-02", ("chosen", "2013-01-31")),
        ("2013-01-31", ("chosen", "2013-01-31")),
        ("2013-02-01", None),
    ],
)
def test_what_training_has_seen_is_said(pipe, cutoff, notice):
    assert app.notice_of(pipe.model.config, cutoff) == notice


# --- what is refused ---


def csv_of(bars: pd.DataFrame) -> bytes:
    return bars.to_csv(index=False).encode()


def with_ticker(name: str) -> bytes:
    return csv_of(BARS.assign(ticker=name))


REFUSED_FILES = {
    "nothing": (b"", "prices.csv is empty."),
    "blank lines": (b"\n\n\n", "it is no CSV table"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40, "it is no CSV table"),
    "zeros": (b"\x00" * 5000, "prices.csv has no column 'date'"),
    "prose": (b"Dear sir, no table here", "prices.csv has no column 'date'; it has dear_sir, no_table_here."),
    "ragged rows": (b"date,close\n1,2\n1,2,3,4\n", "it is no CSV table"),
    "another column": (csv_of(BARS.rename(columns={"close": "last"})), "no column 'close'; it has ticker, date, open"),
    "a column twice": (csv_of(BARS.assign(Close=1.0)), "column 'close' twice"),
    "tickers twice": (csv_of(BARS.assign(Ticker="T1")), "column 'ticker' twice"),
    "one row": (csv_of(BARS[:1]), "T0 has 1 usable bars; a forecast needs 84."),
    "no rows": (csv_of(BARS[:0]), "the price table is empty"),
    "negative prices": (csv_of(BARS.assign(close=-5.0)), "close -5.0 a price is not positive"),
    "text for prices": (csv_of(BARS.assign(low="<b>low</b>")), "low <b>low</b> a price is missing"),
    "days of weekends": (csv_of(BARS.assign(date=pd.date_range("2005-01-01", periods=120))), "is it the calendar"),
    "a ticker of HTML": (with_ticker("<img src=x onerror=alert(1)>"), "'<IMG SRC=X ONERROR=ALERT(1)>' is no ticker"),
    "a ticker of a template": (with_ticker("${alert(1)}{{7*7}}"), "'${ALERT(1)}{{7*7}}' is no ticker"),
    "a long ticker": (with_ticker("A" * 5000), f"'{'A' * 40}' is no ticker"),
    "too much": (b"a" * (app.MAX_BYTES + 1), "prices.csv has 5.0 MB; at most 5 MB can be read."),
}
REPAIRED_FILES = {
    "unsorted": (BARS[::-1], "119 × comes after a later date (repaired)"),
    "duplicate dates": (pd.concat([BARS, BARS[:3]]), "3 × the same bar again (merged)"),
    "some negative prices": (BARS.assign(open=BARS["open"].where(BARS.index > 1, -1)), "2 × a price is not positive"),
}


# --- the browser ---


@pytest.fixture(scope="module")
def url(pipe):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    demo = app.build(pipe)
    app.serve(demo, "127.0.0.1", port, prevent_thread_lock=True)
    yield f"http://127.0.0.1:{port}/"
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, BROWSERS)), playwright.chromium.executable_path)
        if not Path(installed).exists():
            pytest.skip("no Chromium: apt-get install chromium, or .venv/bin/python -m playwright install chromium")
        browser = playwright.chromium.launch(executable_path=installed)
        yield browser
        browser.close()


def visit(browser, url: str, size: dict) -> tuple[Tab, list[str], list[str]]:
    """A visitor of their own: the tab, the addresses that it asked for, and what went wrong in it."""
    tab = browser.new_context(viewport=size, reduced_motion="reduce").new_page()
    tab.set_default_timeout(PATIENCE)
    asked, wrong = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("websocket", lambda socket: asked.append(socket.url))
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: wrong.append(dialog.message))
    tab.goto(url)
    expect(tab.locator("#go")).to_be_visible()
    return tab, asked, wrong


@pytest.fixture(scope="module")
def reader(browser, url):
    """A visitor that looks at one thing after another."""
    tab, _, wrong = visit(browser, url, WIDE)
    yield tab
    tab.context.close()
    assert wrong == []


def upload(tab: Tab, name: str, content: bytes) -> None:
    with tab.expect_file_chooser() as chooser:
        tab.locator("#upload").click()
    with tab.expect_response(lambda response: "/queue/data" in response.url):
        chooser.value.set_files({"name": name, "mimeType": "text/csv", "buffer": content})


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["desktop", "phone"])
def test_a_visitor_gets_a_forecast_of_the_sample_in_both_languages(browser, url, size):
    tab, asked, wrong = visit(browser, url, size)
    tab.locator("#go").click()
    expect(tab.locator("#result h2")).to_contain_text("AAPL: 10 trading days from the close of 2013-03-01")
    for language, texts in app.TEXTS.items():
        tab.locator("#language").get_by_text("English" if language == "en" else "中文").click()
        expect(tab.locator(f"#result section[lang={language}]")).to_be_visible()
        seen = tab.locator("body").inner_text()
        for key in (
            "intro",
            "ticker",
            "as_of",
            "days",
            "upload",
            "go",
            "columns",
            "caption",
            "download",
            "table_note",
        ):
            assert texts[key] in seen
        assert texts["disclaimer"].format(train="2012-06-29", selection="2013-01-31") in seen
        assert [word for word in texts["words"].values() if word in seen]
        assert tab.evaluate("document.documentElement.scrollWidth") == size["width"]
        picture = tab.locator("#result img")
        assert size["width"] * 0.6 < picture.bounding_box()["width"] < size["width"]
        assert picture.evaluate("image => image.naturalWidth") == (1500 if size is WIDE else 750)
        table = tab.locator("#result .wide")
        assert table.evaluate("box => box.scrollWidth <= box.clientWidth")
    others = app.TEXTS["en"]
    assert not [key for key in ("intro", "ticker", "as_of", "days", "upload", "go", "caption") if others[key] in seen]
    assert wrong == []
    assert [one for one in asked if not one.startswith((url, url.replace("http", "ws"), "data:", "blob:"))] == []
    tab.context.close()


def test_the_table_can_be_taken_home(reader):
    reader.locator("#go").click()
    with reader.expect_download() as download:
        reader.locator("#result .download").click()
    assert download.value.suggested_filename == "AAPL_2013-03-01.csv"
    table = pd.read_csv(download.value.path())
    assert list(table["horizon"]) == list(range(1, 11))
    shown = reader.locator("#result tr.model").last.locator("td").all_inner_texts()
    last = table.iloc[-1]
    assert shown[:5] == [f"{last[column]:,.2f}" for column in ("q0.05", "q0.25", "q0.5", "q0.75", "q0.95")]
    assert shown[5] == reader.locator("#result .odds strong").inner_text()
    assert shown[5].split() == [f"{100 * last['p_up']:.0f}", "%"]


def test_days_and_date_are_those_asked_for(reader):
    date = reader.locator("#as-of").locator("input, textarea")
    reader.locator("#days input[type=number]").fill("3")
    date.fill("2013-02-01")
    date.press("Enter")
    title = reader.locator("#result h2")
    expect(title).to_contain_text("AAPL: 3 trading days from the close of 2013-02-01")
    close = read_sample(["AAPL"]).set_index("date")["close"]
    assert f"2013-02-06, day 3 · close: {close['2013-02-06']:,.2f}" in reader.locator("#result").inner_text()
    assert reader.locator("#result .notice").count() == 0
    date.fill("2012-06-29")
    reader.locator("#go").click()
    expect(reader.locator("#result .notice")).to_contain_text(
        "In sample: the model was trained on dates to 2012-06-29"
    )
    for wrong in ("yesterday", "2013-13-01", "<b>2013</b>"):
        date.fill(wrong)
        reader.locator("#go").click()
        expect(reader.locator("#result .refused")).to_have_text(
            f"This does not work: '{wrong}' is no date (YYYY-MM-DD)."
        )
    date.fill("2000-04-03")
    reader.locator("#go").click()
    expect(reader.locator("#result .refused")).to_contain_text(
        "AAPL has 24 bars up to 2000-04-03; a forecast needs 84"
    )
    date.fill("")


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_a_file_that_cannot_be_is_one_sentence(reader, case):
    content, complaint = REFUSED_FILES[case]
    upload(reader, "prices.csv", content)
    error = reader.locator("#source .refused")
    expect(error).to_contain_text(complaint)
    assert error.inner_text().startswith("This does not work: ")
    assert len(error.inner_text()) < 350
    assert error.locator("*").count() == 0
    assert "Traceback" not in reader.locator("body").inner_text()
    assert tempfile.gettempdir() not in error.inner_text()


@pytest.mark.parametrize("case", REPAIRED_FILES)
def test_a_file_that_can_be_repaired_is_and_that_is_said(reader, case):
    bars, found = REPAIRED_FILES[case]
    upload(reader, "prices.csv", csv_of(bars))
    expect(reader.locator("#source")).to_contain_text("Prices: prices.csv")
    expect(reader.locator("#source details")).to_contain_text(found)


def test_an_upload_is_forecast_and_is_nobody_elses(browser, url):
    tab, _, wrong = visit(browser, url, PHONE)
    upload(tab, "aapl_2005.csv", csv_of(BARS.drop(columns="ticker")))
    first, last = (f"{day:%Y-%m-%d}" for day in BARS["date"].iloc[[0, -1]])
    expect(tab.locator("#source")).to_contain_text(f"aapl_2005.csv, 120 bars, tickers: 1, {first} to {last}.")
    tab.locator("#go").click()
    expect(tab.locator("#result h2")).to_contain_text(f"AAPL: 10 trading days from the close of {last}")
    upload(tab, "bad.csv", b"")
    expect(tab.locator("#source .refused")).to_contain_text("bad.csv is empty.")
    tab.locator("#language").get_by_text("中文").click()
    expect(tab.locator("#source .refused")).to_have_text("无法处理：bad.csv 是空文件。")
    other, _, _ = visit(browser, url, PHONE)
    expect(other.locator("#source")).to_contain_text("the embedded sample")
    other.context.close()
    tab.locator("#sample").click()
    expect(tab.locator("#source")).to_contain_text("内置样本")
    expect(tab.locator("#sample")).to_be_hidden()
    assert wrong == []
    tab.context.close()


# --- the command ---


def test_the_command_needs_a_model(refused, monkeypatch, tmp_path):
    monkeypatch.delenv("SPACEEXPLORE_MODEL", raising=False)
    monkeypatch.setattr(app, "SHIPPED", tmp_path)
    assert refused(app.main, []).endswith(f"none lies in {tmp_path}")


def test_the_model_of_the_environment_is_loaded_and_one_of_classes_refused(refused, monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    SpaceExploreForClassification(SpaceExploreConfig.from_json_file(RECIPE / "config.json")).save_pretrained(folder)
    monkeypatch.setenv("SPACEEXPLORE_MODEL", str(folder))
    assert f"{folder} forecasts no range of prices: it holds SpaceExploreForClass" in refused(app.main, [])


def test_a_port_that_is_taken_is_one_line(refused, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in refused(app.main, ["--model", str(folder), "--port", port])


def test_only_this_machine_is_answered_by_default(monkeypatch, folder):
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    asked = []
    monkeypatch.setattr(app, "serve", lambda demo, host, port: asked.append((host, port)))
    app.main(["--model", str(folder)])
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")  # as a Space has it
    app.main(["--model", str(folder)])
    assert asked == [("127.0.0.1", 7860), ("0.0.0.0", 7860)]
