"""A page for those who write no code: prices in, forecast beside naive ones out (the form of a Hugging Face Space).

    python app.py [--model DIR_OR_REPO] [--host 127.0.0.1] [--port 7860]

Without --model it is the environment's SPACEEXPLORE_MODEL, or the one that lies beside this file. English and Chinese;
once the checkpoint is there it needs no network, and the page asks nobody but this server for anything.
"""

import os
from base64 import b64encode
from datetime import date
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import gradio as gr
import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from transformers.utils import logging

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.cleaning import KINDS, CleaningReport, clean, read_clean
from spaceexploreai.data.prices import TICKER_PATTERN
from spaceexploreai.evaluation.baselines import BASELINES, quantile_columns
from spaceexploreai.evaluation.internals import words_of
from spaceexploreai.evaluation.plots import FAN_LEVELS, plot_forecast, stamp
from spaceexploreai.feature_extraction_spaceexplore import TABLE_COLUMNS, check_columns
from spaceexploreai.modeling_spaceexplore import SpaceExploreForCausalLM, SpaceExploreForRegression
from spaceexploreai.pipeline_spaceexplore import ONE_SERIES, SpaceExplorePipeline
from spaceexploreai.scripts.evaluate import notice_of
from spaceexploreai.scripts.forecast import forecast_newest
from spaceexploreai.scripts.forecasters import head_name, load_pipeline
from spaceexploreai.train.arguments import bare_parser, command

SHIPPED = Path(__file__).resolve().parent
HEADS = [one.__name__ for one in (SpaceExploreForRegression, SpaceExploreForCausalLM)]
LANGUAGES = [("English", "en"), ("中文", "zh")]
MAX_BYTES = 5_000_000  # of an upload: 80,000 daily bars
SHOWN_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
COIN = 0.05  # a probability no further from a half, or from the naive one, says nothing
LONGEST_SENTENCE, LONGEST_NAME = 300, 40  # letters that a complaint repeats
PHONE = 700  # pixels of width, below which the narrow picture is shown
SESSIONS = 200  # whose uploads and pictures are kept; the oldest go

# --- what the page says ----------------------------------------------------------------------------------------------

TEXTS = {
    "en": {
        "intro": "What the next trading days may bring: a range of prices, not one number, beside what a plain "
        "estimate of volatility says. How far a price may move can be forecast; which way, hardly.",
        "ticker": "Ticker",
        "as_of": "From the close of (empty: the newest)",
        "days": "Trading days ahead",
        "upload": "Upload prices (CSV)",
        "sample": "Back to the sample",
        "go": "Forecast",
        "source_sample": "Prices: the embedded sample, five stocks chosen in hindsight, to {end}.",
        "source_upload": "Prices: {name}, {rows:,} bars, tickers: {tickers:,}, {start} to {end}.",
        "columns": "A CSV needs the columns date, open, high, low, close, volume; ticker and adj_close are optional.",
        "found": "What cleaning found in the file: {count:,}",
        "finding": "{count:,} × {kind} ({action})",
        "title": "{ticker}: {days} trading days from the close of {cutoff}, {close}",
        "odds": "Probability that the close of {date} is higher:",
        "coin": "hardly better than a coin.",
        "naive_odds": "no more than what the naive forecast says, which knows volatility alone.",
        "up": "leans up. Even if the model knows its odds, this is wrong {wrong} times in 100.",
        "down": "leans down. Even if the model knows its odds, this is wrong {wrong} times in 100.",
        "naive": "Naive forecast (EWMA): {p}.",
        "undated": "The model does not say to which date it was trained; it may have learned what came.",
        "in_sample": "In sample: the model was trained on dates to {day}, and may have learned what came.",
        "chosen": "Not unseen: the model was chosen by dates to {day}, which flatter it.",
        "picture": "Candles and forecast of {ticker}",
        "caption": "Candles: the days behind, white if the price rose, grey if it fell. Areas: where the model "
        "expects 50, 80 and 90 of 100 prices. Blue: the median. Dashed red: 90 % interval of the EWMA baseline. "
        "Circles: what came, where it is known.",
        "words_title": "Words for the days behind",
        "words_note": "What the time-to-text extractor calls them. They say nothing of the days ahead.",
        "table_title": "Prices: the forecast and the naive ones",
        "table_note": "Each column is the price that the close stays below with that probability. Prices are "
        "adjusted for splits and dividends, where the data name an adjusted close.",
        "who": "forecast",
        "p_up": "up",
        "day": "{date}, day {day}",
        "realised": "close: {price}",
        "download": "Download the table (CSV)",
        "disclaimer": "Research software, not investment advice. Forecasts of stock prices are mostly noise, past "
        "performance says little about the future, and you alone are responsible for what you do with them. The model "
        "was trained on prices to {train} and chosen by prices to {selection}.",
        "unknown": "(not recorded)",
        "refused": "This does not work: {reason}",
        "too_large": "{name} has {size:.1f} MB; at most {limit:.0f} MB can be read.",
        "no_table": "{name} cannot be read: it is no CSV table in UTF-8 with commas.",
        "empty": "{name} is empty.",
        "no_column": "{name} has no column {column!r}; it has {columns}.",
        "no_ticker": "{name!r} is no ticker: at most 15 of the characters A-Z 0-9 . ^ = - without spaces.",
        "too_short": "{ticker} has {bars:,} usable bars; a forecast needs {needed:,}.",
        "bad_date": "{value!r} is no date (YYYY-MM-DD).",
        "forecasts": {
            "model": "model",
            "zero": "random walk",
            "drift": "drift",
            "last": "last return",
            "ewma": "EWMA",
        },
        "words": {
            "surge": "surge",
            "rise": "rise",
            "drift": "drift",
            "slip": "slip",
            "drop": "drop",
            "plunge": "plunge",
            "rebound": "rebound",
            "fade": "fade",
            "fluctuate": "fluctuate",
            "flat": "flat",
            "hover": "hover",
        },
        "actions": {
            "dropped": "dropped",
            "merged": "merged",
            "repaired": "repaired",
            "masked": "left out",
            "filled": "filled",
            "converted": "converted",
            "reported": "kept",
        },
        "kinds": KINDS,
    },
    "zh": {
        "intro": "未来几个交易日可能怎样：给出价格的区间而不是一个数字，并与单纯的波动率估计并列。"
        "价格可能波动多大可以预测，涨还是跌则几乎不能。",
        "ticker": "股票代码",
        "as_of": "从哪天收盘起（留空：最新）",
        "days": "预测的交易日数",
        "upload": "上传价格（CSV）",
        "sample": "返回内置样本",
        "go": "预测",
        "source_sample": "价格：内置样本，五只事后挑选的股票，截至 {end}。",
        "source_upload": "价格：{name}，{rows:,} 根日线，股票数：{tickers:,}，{start} 至 {end}。",
        "columns": "CSV 需要 date, open, high, low, close, volume 各列；ticker 和 adj_close 可选。",
        "found": "清洗文件时的发现：{count:,}",
        "finding": "{count:,} × {kind}（{action}）",
        "title": "{ticker}：从 {cutoff} 的收盘价 {close} 起 {days} 个交易日",
        "odds": "{date} 收盘价更高的概率：",
        "coin": "比抛硬币好不了多少。",
        "naive_odds": "并不比只知道波动率的朴素预测说得更多。",
        "up": "偏向上涨。即使模型对概率的估计正确，100 次中仍会错 {wrong} 次。",
        "down": "偏向下跌。即使模型对概率的估计正确，100 次中仍会错 {wrong} 次。",
        "naive": "朴素预测（EWMA）：{p}。",
        "undated": "模型没有说明训练截至哪一天；它可能已经学到了后来的走势。",
        "in_sample": "样本内：模型的训练用到了截至 {day} 的日期，可能已经学到了后来的走势。",
        "chosen": "并非未见：模型是用截至 {day} 的日期挑选的，在这些日期上显得更好。",
        "picture": "{ticker} 的 K 线与预测",
        "caption": "图中文字为英文。K 线：最近的交易日，白色为涨，灰色为跌。"
        "灰色区域：模型预期 100 个价格中有 50、80、90 个落入其中。蓝线：中位数。"
        "红色虚线：EWMA 基线的 90% 区间。圆圈：已知的实际收盘价。",
        "words_title": "对过去这些天的描述",
        "words_note": "由“时间到文本”提取器给出，与未来的走势无关。",
        "table_title": "价格：模型预测与朴素预测",
        "table_note": "每一列是收盘价以该概率不会超过的价格。数据中有复权收盘价时，价格已按拆股和分红复权。",
        "who": "预测",
        "p_up": "上涨",
        "day": "{date}，第 {day} 天",
        "realised": "收盘价：{price}",
        "download": "下载表格（CSV）",
        "disclaimer": "本软件用于研究，不构成投资建议。股票价格的预测大多是噪声，过往表现几乎不能说明未来，"
        "如何使用由您自己负责。模型用截至 {train} 的价格训练，用截至 {selection} 的价格挑选。",
        "unknown": "（未记录）",
        "refused": "无法处理：{reason}",
        "too_large": "{name} 有 {size:.1f} MB；最多可读取 {limit:.0f} MB。",
        "no_table": "无法读取 {name}：它不是以逗号分隔、UTF-8 编码的 CSV 表格。",
        "empty": "{name} 是空文件。",
        "no_column": "{name} 没有 {column!r} 列；它有 {columns}。",
        "no_ticker": "{name!r} 不是股票代码：最多 15 个字符，只能用 A-Z 0-9 . ^ = -，不含空格。",
        "too_short": "{ticker} 只有 {bars:,} 根可用的日线；预测需要 {needed:,} 根。",
        "bad_date": "{value!r} 不是日期（YYYY-MM-DD）。",
        "forecasts": {
            "model": "模型",
            "zero": "随机游走",
            "drift": "漂移",
            "last": "上次收益",
            "ewma": "EWMA",
        },
        "words": {
            "surge": "急涨",
            "rise": "上涨",
            "drift": "缓涨",
            "slip": "缓跌",
            "drop": "下跌",
            "plunge": "急跌",
            "rebound": "反弹",
            "fade": "回落",
            "fluctuate": "震荡",
            "flat": "平静",
            "hover": "盘整",
        },
        "actions": {
            "dropped": "已删除",
            "merged": "已合并",
            "repaired": "已修复",
            "masked": "已略去",
            "filled": "已填补",
            "converted": "已换算",
            "reported": "已保留",
        },
        "kinds": {
            "no_ticker": "没有股票代码",
            "ticker_spaces": "股票代码前后有空格",
            "no_date": "不是日期（YYYY-MM-DD）",
            "time_zone": "按交易所当地时间是另一天",
            "future": "日期晚于今天",
            "empty_bar": "没有任何价格的行",
            "no_price": "价格缺失或不是有限的数",
            "non_positive_price": "价格不是正数",
            "bad_volume": "成交量缺失、为负或不是有限的数",
            "ohlc_violation": "最高价和最低价没有包含开盘价和收盘价",
            "unsorted": "排在更晚的日期之后",
            "duplicate": "同一根日线重复出现",
            "conflict": "同一股票同一天另有一根不同的日线",
            "non_session": "当天交易所休市",
            "zero_volume": "没有成交",
            "halt": "停牌：没有成交量，收盘价与前一天相同",
            "large_return": "对数收益率绝对值大于 0.5",
            "huge_return": "对数收益率绝对值大于 1",
            "bad_print": "大于 0.5 的收益率随即被下一天抵消",
            "split_like": "价格按整数比变动：未复权的拆股？",
            "adjusted_split": "已复权的拆股",
            "gap": "与前一根日线相隔超过 10 天",
            "stale": "连续 10 个相同的收盘价",
            "delisted": "最后一根日线早于表格末尾 10 天以上",
            "lost_ticker": "没有可用日线的股票",
            "missing_session": "缺少日线的交易日",
            "lost_session": "日线已被删除的交易日",
        },
    },
}


class RefusedError(ValueError):
    """A user's mistake that the page can name in both languages; those of the library are in English alone."""

    def __init__(self, key: str, **facts):
        super().__init__(TEXTS["en"][key].format(**facts))
        self.key, self.facts = key, facts


def sentence(error: ValueError, language: str) -> str:
    texts = TEXTS[language]
    reason = texts[error.key].format(**error.facts) if isinstance(error, RefusedError) else str(error)
    return texts["refused"].format(reason=shorten(reason, LONGEST_SENTENCE, placeholder=" …"))


# --- prices ----------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Clean prices, and those of their tickers that are long enough to be forecast; `name` is None of the sample."""

    name: str | None
    prices: pd.DataFrame
    report: CleaningReport
    tickers: list[str]


def make_source(name: str | None, prices: pd.DataFrame, report: CleaningReport, needed: int) -> Source:
    bars = prices.groupby("ticker").size()
    if bars.max() < needed:
        raise RefusedError("too_short", ticker=bars.idxmax(), bars=bars.max(), needed=needed)
    return Source(name, prices, report, bars.index[bars >= needed].tolist())


def read_upload(path: str, calendar: str, needed: int) -> Source:
    """A CSV table as people have it; without a column `ticker` it is one series, named like its file."""
    bars, name = read_text(Path(path)), Path(path).name
    bars.columns = bars.columns.str.strip().str.lower().str.replace(" ", "_")
    for column in TABLE_COLUMNS[1:]:
        if column not in bars:
            raise RefusedError("no_column", name=name, column=column, columns=", ".join(bars.columns))
    if "ticker" not in bars:
        stem = Path(path).stem.split("_")[0].upper()
        bars["ticker"] = stem if TICKER_PATTERN.fullmatch(stem) else ONE_SERIES
    check_columns(bars)
    bars["ticker"] = bars["ticker"].str.strip().str.upper()
    for ticker in bars["ticker"].unique():  # pictures have letters for no others
        if ticker and not TICKER_PATTERN.fullmatch(ticker):
            raise RefusedError("no_ticker", name=ticker[:LONGEST_NAME])
    return make_source(name, *clean(bars, calendar), needed)


def read_text(path: Path) -> pd.DataFrame:
    size = path.stat().st_size
    if not size:
        raise RefusedError("empty", name=path.name)
    if size > MAX_BYTES:
        raise RefusedError("too_large", name=path.name, size=size / 1e6, limit=MAX_BYTES / 1e6)
    as_written = {"dtype": str, "keep_default_na": False, "index_col": False}  # NA is a ticker
    try:
        return pd.read_csv(path, encoding="utf-8-sig", compression=None, **as_written)
    except ValueError as error:
        raise RefusedError("no_table", name=path.name) from error


# --- the forecast ----------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """One forecast in prices: `table` has a row for each day, with the naive forecasts' columns and `close`."""

    ticker: str
    cutoff: str
    close: float
    table: pd.DataFrame
    words: list[dict]
    notice: tuple[str, str] | None  # key of a text, and its date
    wide: str  # pictures as data URIs
    narrow: str


def load(folder: str) -> SpaceExplorePipeline:
    """A checkpoint folder or Hub repository whose head forecasts a distribution; none of its code is run."""
    name = head_name(SpaceExploreConfig.from_pretrained(folder))
    if name not in HEADS:
        raise ValueError(f"{folder} forecasts no range of prices: it holds {name}, not one of {', '.join(HEADS)}")
    return load_pipeline(folder)


def make_forecast(pipe: SpaceExplorePipeline, prices: pd.DataFrame, ticker: str, as_of: str, days: int) -> Outcome:
    bars = prices[prices["ticker"] == ticker].reset_index(drop=True)
    options = {"prediction_length": int(days), "quantile_levels": list(FAN_LEVELS)}
    table = forecast_newest(pipe, bars, parse_as_of(as_of), **options).table
    cutoff = table["cutoff"].iloc[0]
    (series,) = pipe.feature_extractor.encode(bars[bars["date"] <= cutoff])
    words = words_of(pipe.model, series, cutoff, pipe.feature_extractor.context_length)
    notice = notice_of(pipe.model.config, f"{cutoff:%Y-%m-%d}")
    close = bars["close"][bars["date"] == cutoff].item()
    pictures = [draw(table, bars, ticker, words, notice, narrow) for narrow in (False, True)]
    return Outcome(ticker, f"{cutoff:%Y-%m-%d}", close, in_prices(table, close), words, notice, *pictures)


def parse_as_of(text: str) -> str | None:
    try:
        return date.fromisoformat(text.strip()).isoformat() if text.strip() else None
    except ValueError:
        raise RefusedError("bad_date", value=text[:LONGEST_NAME]) from None


def in_prices(table: pd.DataFrame, close: float) -> pd.DataFrame:
    """Quantiles as prices, of the model and of each naive forecast; `close` is what came, where it is known."""
    found = table[["ticker", "cutoff", "date", "horizon"]].assign(close=close * np.exp(table["y"]))
    for prefix in ("", *(f"{name}_" for name in BASELINES)):
        columns = quantile_columns(FAN_LEVELS, prefix)
        found[columns] = close * np.exp(table[columns])
        found[f"{prefix}p_up"] = table[f"{prefix}p_up"]
    return found


def draw(
    table: pd.DataFrame,
    bars: pd.DataFrame,
    ticker: str,
    words: list[dict],
    notice: tuple[str, str] | None,
    narrow: bool,
) -> str:
    figure = plot_forecast(table, bars, ticker, words=words)
    if narrow:
        figure.set_size_inches(5, figure.get_figheight())
        lowest = figure.axes[-1]
        lowest.set_xlabel("trading day")
        lowest.set_xticks([], minor=True)
        for text in lowest.texts:
            text.set_fontsize(7)
        figure.legends[0].remove()
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return as_uri(stamp(figure, [TEXTS["en"][key].format(day=day) for key, day in filter(None, [notice])]))


def as_uri(figure: Figure) -> str:
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return f"data:image/png;base64,{b64encode(picture.getvalue()).decode()}"


# --- HTML ------------------------------------------------------------------------------------------------------------

TEMPLATES = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
MESSAGE = TEMPLATES.from_string(
    '<p lang="{{ language }}" class="{{ kind }}" {% if kind == "refused" %}role="alert"{% endif %}>{{ text }}</p>'
)
SOURCE = TEMPLATES.from_string("""
<div lang="{{ language }}"><p>{{ text }} {{ t.columns }}</p>
{% if findings %}
<details><summary>{{ t.found.format(count=findings | length) }}</summary><ul>
{% for one in findings %}
<li>{{ t.finding.format(count=one.count, kind=t.kinds[one.kind], action=t.actions[one.action]) }}</li>
{% endfor %}
</ul></details>
{% endif %}
</div>""")
FORECAST = TEMPLATES.from_string("""
<section lang="{{ language }}" class="forecast">
<h2>{{ title }}</h2>
{% if notice %}<p class="notice">{{ notice }}</p>{% endif %}
<p class="odds">{{ t.odds.format(date=last) }} <strong>{{ p_up }}</strong> – {{ odds }}
{{ t.naive.format(p=naive_p_up) }}</p>
<picture><source media="(max-width: {{ phone }}px)" srcset="{{ outcome.narrow }}">
<img src="{{ outcome.wide }}" alt="{{ t.picture.format(ticker=outcome.ticker) }}"></picture>
<p class="note">{{ t.caption }}</p>
{% if outcome.words %}
<h3>{{ t.words_title }}</h3>
<ul>{% for one in outcome.words %}
<li>{{ one.start.date() }} – {{ one.end.date() }}: <strong>{{ t.words[one.word] }}</strong>
{{ percent(one.probability) }}</li>
{% endfor %}</ul>
<p class="note">{{ t.words_note }}</p>
{% endif %}
<h3>{{ t.table_title }}</h3>
<p class="note">{{ t.table_note }}</p>
<div class="wide"><table>
<thead><tr><th>{{ t.who }}</th>
{% for level in levels %}<th>{{ percent(level) }}</th>{% endfor %}<th>{{ t.p_up }}</th></tr></thead>
{% for block in blocks %}
<tbody><tr><th colspan="{{ levels | length + 2 }}" class="block">{{ block.title }}</th></tr>
{% for name, cells in block.rows %}
<tr class="{{ name }}"><th>{{ t.forecasts[name] }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
{% endfor %}
</table></div>
<p><a class="download" href="{{ csv }}" download="{{ outcome.ticker }}_{{ outcome.cutoff }}.csv">
{{- t.download }}</a></p>
</section>""")
CSS = """
.gradio-container { max-width: min(60rem, 100vw) !important; margin: 0 auto !important; }
.main.app { padding: 1rem min(2rem, 3vw) !important; }
.forecast h2 { font-size: 1.3rem; margin: 1rem 0 .5rem; }
.forecast h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; }
.forecast picture, .forecast img { display: block; width: 100%; height: auto; margin: .5rem 0; background: white; }
.forecast .odds { font-size: 1.1rem; }
.forecast .note { font-size: .85rem; opacity: .8; }
.forecast .wide { overflow-x: auto; }
.forecast table { width: 100%; border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
.forecast table, .forecast tr, .forecast th, .forecast td { border: 0 !important; }
.forecast th, .forecast td { padding: .15rem .3rem; text-align: right; white-space: nowrap; }
.forecast th:first-child { text-align: left; font-weight: 400; }
.forecast thead th { border-bottom: 1.5px solid currentColor !important; }
.forecast .block { padding-top: .7rem; opacity: .8; border-bottom: 1px solid var(--border-color-primary) !important; }
.forecast .model { background: var(--background-fill-secondary); }
.forecast .model th, .forecast .model td { font-weight: 600; }
.refused, .notice { padding: .5rem .8rem; border: 2px solid; border-left-width: .6rem; overflow-wrap: anywhere; }
.refused { border-color: #b00020; }
.download { padding: 0; text-decoration: underline; }
.progress-text { display: none; }
@media (max-width: 500px) {
  .forecast table { font-size: .7rem; }
  .forecast th, .forecast td { padding: .15rem; }
}
"""


def percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def money(price: float) -> str:
    return f"{price:,.2f}" if price >= 1 else f"{price:.4g}"


def odds(p_up: float, naive: float, language: str) -> str:
    """What a probability is worth, in words."""
    if abs(p_up - 0.5) <= COIN:
        key = "coin"
    elif abs(p_up - naive) <= COIN:
        key = "naive_odds"
    else:
        key = "up" if p_up > 0.5 else "down"
    return TEXTS[language][key].format(wrong=round(100 * min(p_up, 1 - p_up)))


def show_source(source: Source | ValueError, language: str) -> str:
    if isinstance(source, ValueError):
        return MESSAGE.render(language=language, kind="refused", text=sentence(source, language))
    texts, report = TEXTS[language], source.report
    which = "source_sample" if source.name is None else "source_upload"
    facts = {"name": source.name, "rows": report.rows_out, "tickers": report.tickers}
    text = texts[which].format(**facts, start=report.start, end=report.end)
    findings = [] if source.name is None else report.findings
    return SOURCE.render(language=language, t=texts, text=text, findings=findings)


def show_forecast(outcome: Outcome | ValueError | None, language: str) -> str:
    if outcome is None:
        return ""
    if isinstance(outcome, ValueError):
        return MESSAGE.render(language=language, kind="refused", text=sentence(outcome, language))
    texts, last = TEXTS[language], outcome.table.iloc[-1]
    facts = {"ticker": outcome.ticker, "cutoff": outcome.cutoff, "close": money(outcome.close)}
    key, day = outcome.notice or (None, None)
    table = outcome.table.to_csv(index=False)
    return FORECAST.render(
        language=language,
        t=texts,
        outcome=outcome,
        title=texts["title"].format(**facts, days=last["horizon"]),
        notice=key and texts[key].format(day=day),
        last=f"{last['date']:%Y-%m-%d}",
        p_up=percent(last["p_up"]),
        odds=odds(last["p_up"], last["ewma_p_up"], language),
        naive_p_up=percent(last["ewma_p_up"]),
        levels=SHOWN_LEVELS,
        blocks=blocks_of(outcome.table, texts),
        csv=f"data:text/csv;base64,{b64encode(table.encode()).decode()}",
        percent=percent,
        phone=PHONE,
    )


def blocks_of(table: pd.DataFrame, texts: dict) -> list[dict]:
    """A block for each day: the model beside EWMA, on the last day beside every naive forecast."""
    blocks = []
    for place, day in enumerate(table.to_dict("records"), 1):
        title = texts["day"].format(date=f"{day['date']:%Y-%m-%d}", day=day["horizon"])
        if np.isfinite(day["close"]):
            title += f" · {texts['realised'].format(price=money(day['close']))}"
        names = ("ewma",) if place < len(table) else BASELINES[::-1]
        rows = [("model", cells_of(day, "")), *((name, cells_of(day, f"{name}_")) for name in names)]
        blocks.append({"title": title, "rows": rows})
    return blocks


def cells_of(day: dict, prefix: str) -> list[str]:
    quantiles = [money(day[column]) for column in quantile_columns(SHOWN_LEVELS, prefix)]
    return [*quantiles, percent(day[f"{prefix}p_up"])]


# --- the page --------------------------------------------------------------------------------------------------------


class Page:
    """What happens on the page. Its state is in the arguments, so that visitors share the model alone."""

    def __init__(self, pipe: SpaceExplorePipeline):
        self.pipe = pipe
        self.needed = pipe.feature_extractor.min_history
        self.sample = make_source(None, *read_clean(), self.needed)

    def about(self, language: str) -> tuple[str, str]:
        """The first and the last lines of the page."""
        texts, config = TEXTS[language], self.pipe.model.config
        known = {"train": config.train_cutoff, "selection": config.selection_cutoff}
        text = texts["disclaimer"].format(**{name: day or texts["unknown"] for name, day in known.items()})
        return tuple(MESSAGE.render(language=language, kind="about", text=one) for one in (texts["intro"], text))

    def upload(self, path: str, source: Source, language: str):
        try:
            source = shown = read_upload(path, self.pipe.feature_extractor.calendar, self.needed)
        except ValueError as error:
            shown = error
        tickers = gr.skip() if shown is not source else gr.update(choices=source.tickers, value=source.tickers[0])
        return source, shown, show_source(shown, language), tickers, gr.update(visible=source.name is not None)

    def back(self, language: str):
        tickers = gr.update(choices=self.sample.tickers, value=self.sample.tickers[0])
        return self.sample, self.sample, show_source(self.sample, language), tickers, gr.update(visible=False)

    def forecast(self, source: Source, ticker: str, as_of: str, days: int, language: str):
        try:
            outcome = make_forecast(self.pipe, source.prices, ticker, as_of, days)
        except ValueError as error:
            outcome = error
        return outcome, show_forecast(outcome, language)

    def translate(self, shown: Source | ValueError, outcome: Outcome | ValueError | None, language: str):
        """Everything again in another language, in the order of `build`."""
        labels = [gr.update(**one) for one in labels_of(language).values()]
        return *self.about(language), show_source(shown, language), show_forecast(outcome, language), *labels


def labels_of(language: str) -> dict[str, dict]:
    """What each control is called."""
    texts = TEXTS[language]
    return {
        "ticker": {"label": texts["ticker"]},
        "as_of": {"label": texts["as_of"]},
        "days": {"label": texts["days"]},
        "upload": {"label": texts["upload"]},
        "sample": {"value": texts["sample"]},
        "go": {"value": texts["go"]},
    }


def build(pipe: SpaceExplorePipeline) -> gr.Blocks:
    page, (first, labels) = Page(pipe), ("en", labels_of("en"))
    about, disclaimer = page.about(first)
    last = pipe.model.config.horizons[-1]
    with gr.Blocks(title="SpaceExploreAI", analytics_enabled=False, delete_cache=(600, 600)) as demo:
        source, shown, outcome = gr.State(page.sample), gr.State(page.sample), gr.State(None)
        language = gr.Radio(LANGUAGES, value=first, label="Language / 语言", container=False, elem_id="language")
        gr.HTML("<h1>SpaceExploreAI</h1>")
        intro = gr.HTML(about)
        with gr.Row():
            upload = gr.UploadButton(elem_id="upload", **labels["upload"])
            back = gr.Button(visible=False, elem_id="sample", **labels["sample"])
        about_source = gr.HTML(show_source(page.sample, first), elem_id="source")
        with gr.Row():
            tickers = page.sample.tickers
            ticker = gr.Dropdown(tickers, value=tickers[0], elem_id="ticker", **labels["ticker"])
            as_of = gr.Textbox(
                "", placeholder="YYYY-MM-DD", max_length=LONGEST_NAME, elem_id="as-of", **labels["as_of"]
            )
            days = gr.Slider(1, last, last, step=1, buttons=[], elem_id="days", **labels["days"])
        go = gr.Button(variant="primary", elem_id="go", **labels["go"])
        result = gr.HTML(elem_id="result")
        foot = gr.HTML(disclaimer, elem_id="disclaimer")

        hidden = {"api_visibility": "private", "show_progress": "full"}
        prices = [source, shown, about_source, ticker, back]
        upload.upload(page.upload, [upload, source, language], prices, **hidden)
        back.click(page.back, [language], prices, **hidden)
        asked = [source, ticker, as_of, days, language]
        gr.on([go.click, as_of.submit], page.forecast, asked, [outcome, result], **hidden)
        named = [intro, foot, about_source, result, ticker, as_of, days, upload, back, go]
        language.change(page.translate, [shown, outcome, language], named, **hidden)
    return demo


def serve(demo: gr.Blocks, host: str, port: int, **options) -> None:
    """Answers on this host and port alone, with no file of the machine and nothing from elsewhere on the page."""
    demo.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        footer_links=[],
        quiet=True,
        max_file_size=4 * MAX_BYTES,  # what is larger is cut off; up to it there is a sentence that says so
        state_session_capacity=SESSIONS,
        theme=gr.themes.Default(font="system-ui", font_mono="monospace"),
        css=CSS,
        **options,
    )


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--model", help="checkpoint folder or Hub repository that forecasts a range of prices")
    # A Space has to be reached from outside its container, and says so in this variable.
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    folder = args.model or os.environ.get("SPACEEXPLORE_MODEL")
    if not folder and not (SHIPPED / "config.json").is_file():
        raise ValueError(f"no model: give --model or set SPACEEXPLORE_MODEL; none lies in {SHIPPED}")
    logging.disable_progress_bar()  # of weights being read
    demo = build(load(folder or str(SHIPPED)))
    print(f"open http://{args.host}:{args.port} in a browser; Ctrl+C ends it", flush=True)
    serve(demo, args.host, args.port)


if __name__ == "__main__":
    main()
