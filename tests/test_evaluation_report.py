"""The report of an evaluation: in one file, with the numbers of the scores, and safe with names of others."""

import re
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot, rcParams
from test_plots import FORECASTS, PRICES, words_to

from spaceexploreai.evaluation import report as module
from spaceexploreai.evaluation.classes import score_classes
from spaceexploreai.evaluation.inference import critical_value
from spaceexploreai.evaluation.report import Report, example_of, pictures_of, report_files
from spaceexploreai.evaluation.scores import score, score_by

NOTICE = "IN SAMPLE: the model was trained to 2022-12-31; this is no evaluation."
HOSTILE = '<script>alert("1")</script>|](http://evil.example/x)`\n# T'
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Every tag with its attributes, the text outside of the style, and what is still open."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open, self.style, self.captions, self.rows = [], "", [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]
        self.captions += [""] if tag == "figcaption" else []
        self.rows += [[]] if tag == "tr" else []
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
        else:
            self.text += data
        if "figcaption" in self.open:
            self.captions[-1] += data
        if self.open[-1:] in (["th"], ["td"]) or self.open[-2:-1] == ["td"]:
            self.rows[-1][-1] += data

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def scores():
    return score(FORECASTS)


@pytest.fixture(scope="module")
def files(scores):
    load, equity = (
        np.array([[0.75, 0.25]]),
        pd.DataFrame({"strategy": [1, 1.1]}, pd.bdate_range("2022-01-03", periods=2)),
    )
    pictures = pictures_of(FORECASTS.assign(band=0.01), PRICES, words_to(129), load, equity)
    groups = {by: score_by(FORECASTS, by) for by in ("year", "ticker")}
    facts = {"checkpoint": "outputs/tiny", "tickers": HOSTILE}
    return report_files(Report(HOSTILE, facts, scores, [NOTICE, HOSTILE], pictures, groups))


@pytest.fixture(scope="module")
def page(files):
    return Page(files["report.html"].decode())


def test_the_page_needs_nothing_from_outside(page):
    assert page.open == []  # every tag is closed
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on") or name in ("href", "srcset", "background")}
        assert attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"url\(|@import|expression", page.style)
    (policy,) = (one["content"] for one in page.of("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'")


def test_pictures_are_in_the_page_and_beside_the_summary(files, page):
    beside = {name: content for name, content in files.items() if name.startswith("report_files/")}
    names = ["one-forecast", "predicted-and-realised", "calibration", "classes", "equity", "experts"]
    assert [re.sub(r"report_files/\d-|\..*", "", name) for name in beside] == names  # five tickers have no ranks
    inside = [b64decode(one["src"].split("base64,")[1]) for one in page.of("img")]
    assert inside == list(beside.values())
    for name, content in beside.items():
        assert f"]({name})" in files["report.md"].decode()
        if name.endswith(".svg"):
            assert ElementTree.fromstring(content).tag.endswith("svg")
        else:
            assert content.startswith(b"\x89PNG")
    assert all(one["alt"] for one in page.of("img"))


def test_every_picture_and_every_table_says_what_must_be_known_first(files, page):
    assert len(page.captions) == len(page.of("img")) == 6
    assert all(NOTICE in caption for caption in page.captions)
    sections = re.split("<h[12]", files["report.html"].decode())[1:]
    with_numbers = [section for section in sections if "<table" in section or "<img" in section]
    assert [NOTICE in section for section in with_numbers[1:]] == [True] * (len(with_numbers) - 1)
    assert files["report.html"].decode().index(NOTICE) < files["report.html"].decode().index("<table")
    pictures = files["report.md"].decode().split("\n![")[1:]
    assert len(pictures) == 6
    assert all(NOTICE in picture.split("\n#")[0] for picture in pictures)


def test_notices_are_written_into_the_figures(scores):
    pictures = pictures_of(FORECASTS, PRICES)
    report_files(Report("title", {}, scores, [NOTICE], pictures))
    assert all(" ".join(picture.figure.get_suptitle().split("\n")).startswith(NOTICE) for picture in pictures)


def test_without_a_notice_nothing_is_noticed(scores):
    files = report_files(Report("title", {}, scores, [], pictures_of(FORECASTS, PRICES)[:1]))
    assert 'class="notice"' not in files["report.html"].decode()
    assert "\n> " not in files["report.md"].decode()


def test_names_of_others_are_text(files, page):
    assert HOSTILE.split()[0] in page.text
    assert "evil.example" not in "".join(str(attributes) for _, attributes in page.tags)
    markdown = files["report.md"].decode()
    assert "<script" not in re.sub(r"\\<", "", markdown)
    assert not re.search(r"(?<!\\)\]\((?!report_files/)", markdown)
    assert [line for line in markdown.splitlines() if line.startswith("# ")] == [markdown.splitlines()[0]]


def test_a_hostile_ticker_in_a_table_keeps_its_cell():
    names = {"AAA": HOSTILE, "BBB": "$A$"}
    forecasts, prices = (table.replace({"ticker": names}) for table in (FORECASTS, PRICES))
    groups = {"ticker": score_by(forecasts, "ticker")}
    files = report_files(Report("title", {}, score(forecasts), [], pictures_of(forecasts, prices), groups))
    assert "<script" not in files["report.html"].decode()
    rows = [line for line in files["report.md"].decode().splitlines() if "alert" in line and line.startswith("|")]
    assert len(rows) == 4  # of each horizon one
    header = next(line for line in files["report.md"].decode().splitlines() if line.startswith("| ticker"))
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == header.count("|")
    for name, content in files.items():
        if name.endswith(".svg"):
            ElementTree.fromstring(content)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


def test_the_headline_has_the_numbers_of_the_scores(page, scores):
    """Read back from the page, row by row."""
    start = next(place for place, row in enumerate(page.rows) if row[0] == "forecaster")
    assert page.rows[start] == [  # five tickers have no ranks
        "forecaster",
        "CRPS skill over ewma (%)",
        "direction right (%) [95 %]",
        "base rate (%)",
        "in the 90 % interval (%)",
    ]
    rows = iter(page.rows[start + 1 :])
    for horizon in (1, 2, 5, 10):
        found = scores[scores["horizon"] == horizon].set_index("metric")
        days = f"{horizon} trading day{'s' if horizon > 1 else ''}"
        assert next(rows) == [f"{days} (150 forecasts from 30 dates)"]
        for name in ("model", "zero", "drift", "last", "ewma"):
            of = found[name]
            title, skill, direction, base, coverage = next(rows)
            assert title == name
            expected = [] if name == "ewma" else [of["crps_skill"], of["crps_skill_se"]]
            assert numbers(skill) == pytest.approx([100 * value for value in expected], abs=0.006)
            expected = [] if name == "zero" else [of[f"direction_{one}"] for one in ("accuracy", "low", "high")]
            assert numbers(direction) == pytest.approx([100 * value for value in expected], abs=0.06)
            assert numbers(base) == pytest.approx([100 * of["direction_base_rate"]], abs=0.06)
            assert numbers(coverage) == pytest.approx([100 * of["coverage_90"], 100 * of["coverage_90_se"]], abs=0.06)


def test_the_summary_has_the_headline_of_the_page(files, page):
    headline = module.headline(score(FORECASTS))
    for block in headline.blocks:
        for row in block.rows:
            cells = [f"**{cell.text}**" if cell.sure else cell.text for cell in row]
            assert f"| {' | '.join(cells)} |" in files["report.md"].decode()
            assert [cell.text for cell in row] in page.rows


@pytest.mark.parametrize(("times", "bold"), [(0.99, False), (1.01, True)])
def test_bold_is_what_chance_does_not_explain(scores, times, bold):
    changed = scores.copy()
    critical = critical_value(30, 5)

    def put(metric, value):
        changed.loc[(changed["horizon"] == 5) & (changed["metric"] == metric), "model"] = value

    put("crps_skill", -0.02)
    put("crps_skill_se", 0.02 / critical / times)
    put("rank_ic", 0.1)
    put("rank_ic_dates", 30)
    put("rank_ic_t", critical * times)
    put("direction_accuracy_t", -critical * times)
    block = next(block for block in module.headline(changed).blocks if block.title.startswith("5 "))
    name, skill, ranks, direction, *others = block.rows[0]
    assert name.text == "model"
    assert [cell.sure for cell in (skill, ranks, direction)] == [bold] * 3
    assert not any(cell.sure for cell in others)


def test_groups_stand_by_horizon_with_ewma_beside(page):
    start = next(place for place, row in enumerate(page.rows) if row[0] == "ticker")
    assert page.rows[start][-1] == "in the 90 % interval (%), ewma"
    found = score_by(FORECASTS, "ticker")
    ours = found[(found["ticker"] == "CCC") & (found["horizon"] == 1)].set_index("metric")
    row = next(row for row in page.rows[start:] if row[0] == "CCC")
    assert row[1] == "30"
    assert numbers(row[2])[0] == pytest.approx(100 * ours.at["crps_skill", "model"], abs=0.006)
    assert numbers(row[-1])[0] == pytest.approx(100 * ours.at["coverage_90", "ewma"], abs=0.06)


def test_a_long_table_is_folded(scores, monkeypatch):
    groups = {"ticker": score_by(FORECASTS, "ticker")}  # 20 rows
    assert "<details" not in report_files(Report("t", {}, scores, groups=groups))["report.html"].decode()
    monkeypatch.setattr(module, "FEW_ROWS", 19)
    files = report_files(Report("t", {}, scores, groups=groups))
    for name in ("report.html", "report.md"):
        assert "<summary>All 20 rows</summary>" in files[name].decode()
    assert Page(files["report.html"].decode()).open == []


def test_all_metrics_are_those_of_the_terminal(page, scores):
    text = [row for row in page.rows if row[0] == "MASE"]
    expected = scores[scores["metric"] == "mase"].drop(columns=["horizon", "metric"]).to_numpy()
    np.testing.assert_allclose([[float(cell) for cell in row[1:]] for row in text], expected, atol=6e-4)


def test_classes_have_a_report_of_their_own():
    p_up = FORECASTS["mean"].rank(pct=True)
    levels = [column for column in FORECASTS if re.match(r"q0|mean|p_up", column)]
    table = FORECASTS.drop(columns=levels).assign(p_down=0.6 - p_up / 2, p_flat=0.4, p_up=p_up / 2, band=0.01)
    scores = score_classes(table)
    pictures = pictures_of(table, PRICES)
    assert [picture.title for picture in pictures] == ["Classes"]
    groups = {"year": score_by(table, "year")}
    page = Page(report_files(Report("t", {}, scores, [], pictures, groups))["report.html"].decode())
    start = next(place for place, row in enumerate(page.rows) if row[0] == "forecaster")
    assert page.rows[start][1:] == [
        "log-loss skill over ewma (%)",
        "log-loss (nats)",
        "class right (%)",
        "base rate (%)",
    ]
    found = scores[scores["horizon"] == 1].set_index("metric")["model"]
    expected = [found["log_loss"], 100 * found["accuracy"], 100 * found["base_rate"]]
    assert numbers(" ".join(page.rows[start + 2][2:])) == pytest.approx(expected, abs=0.06)


def test_ranks_are_drawn_where_tickers_are_enough_and_their_lack_is_said(files):
    assert "A rank correlation needs a date with 10 tickers" in files["report.html"].decode()
    more = [FORECASTS, FORECASTS.assign(ticker=FORECASTS["ticker"] + "2")]
    table = pd.concat(more, ignore_index=True)
    prices = pd.concat([PRICES, PRICES.assign(ticker=PRICES["ticker"] + "2")], ignore_index=True)
    pictures = pictures_of(table, prices)
    assert "Ranks through time" in [picture.title for picture in pictures]
    scores = score(table)
    text = report_files(Report("t", {}, scores, [], pictures[-1:]))["report.html"].decode()
    assert "A rank correlation needs" not in text
    row = next(row for row in Page(text).rows if row[0] == "last")
    of = scores[scores["horizon"] == 1].set_index("metric")["last"]
    value, t = numbers(row[2])
    assert (value, t) == (pytest.approx(of["rank_ic"], abs=6e-4), pytest.approx(of["rank_ic_t"], abs=0.06))


def test_equal_forecasts_of_many_tickers_have_no_ranks():
    table = pd.concat([FORECASTS.assign(ticker=FORECASTS["ticker"] + str(copy)) for copy in range(2)])
    prices = pd.concat([PRICES.assign(ticker=PRICES["ticker"] + str(copy)) for copy in range(2)])
    titles = [picture.title for picture in pictures_of(table.assign(mean=0.0), prices)]
    assert titles == ["One forecast", "Predicted and realised", "Calibration"]


def test_other_quantiles_have_no_fan():
    titles = [picture.title for picture in pictures_of(FORECASTS.drop(columns="q0.95"), PRICES)]
    assert titles == ["Calibration"]


def test_the_example_is_the_newest_whose_outcomes_are_known():
    known = FORECASTS.assign(y=FORECASTS["y"].mask(FORECASTS["date"] > "2022-06-20"))
    rows = example_of(known)
    assert set(rows["ticker"]) == {"AAA"}
    assert rows["horizon"].to_list() == [1, 2, 5, 10]
    assert rows["date"].max() == pd.Timestamp("2022-06-20")
    assert example_of(FORECASTS.assign(y=np.nan))["cutoff"].unique() == FORECASTS["cutoff"].max()


def test_a_picture_of_very_many_lines_is_pixels(monkeypatch):
    figure = pictures_of(FORECASTS, PRICES)[0].figure
    content, suffix = module.encode(figure)
    assert (suffix, content[:5]) == ("svg", b"<?xml")
    monkeypatch.setattr(module, "LARGEST_SVG", len(content) - 1)
    content, suffix = module.encode(figure)
    assert (suffix, content[:4]) == ("png", b"\x89PNG")


def test_nothing_global_is_touched_and_nothing_written(tmp_path, monkeypatch, scores):
    monkeypatch.chdir(tmp_path)
    settings = dict(rcParams)
    report_files(Report("t", {}, scores, [NOTICE], pictures_of(FORECASTS, PRICES)[:1]))
    assert pyplot.get_fignums() == []
    assert dict(rcParams) == settings
    assert not any(tmp_path.iterdir())
