"""What an evaluation found, for people: one self-contained HTML page, and a Markdown summary with its pictures.

The page needs no network and no script, and prints. Whatever a reader must know first, such as that dates are in
sample, stands on top of it, under every picture, and in every picture.
"""

import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from spaceexploreai.evaluation.baselines import quantile_columns
from spaceexploreai.evaluation.diagnostics import (
    plot_calibration,
    plot_confusion,
    plot_expert_usage,
    plot_rank_ic,
    ranks_of_model,
)
from spaceexploreai.evaluation.inference import critical_value
from spaceexploreai.evaluation.plots import (
    FAN_LEVELS,
    days,
    plot_equity,
    plot_forecast,
    plot_predicted_vs_actual,
    stamp,
)
from spaceexploreai.evaluation.ranking import MIN_TICKERS
from spaceexploreai.evaluation.scores import NOTE, tabulate

FOLDER = "report_files"  # of the pictures of the Markdown summary
LARGEST_SVG = 600_000  # bytes; pictures of more lines and points are pixels
FEW_ROWS = 60  # a longer table is folded up
NONE = "\N{EN DASH}"
READING = (
    "± is one standard error and t a t statistic, both of the series by date and wide enough for forecasts that "
    "overlap (Newey-West). **Bold**: chance alone gets that far from zero in fewer than one case of twenty (by the "
    "critical values of Kiefer and Vogelsang), so among twenty numbers without any skill one is bold all the same. "
    "A skill is the share of ewma's loss that is saved; an accuracy means something beside its base rate, what always "
    "saying the more frequent outcome would have got."
)
LIMITS = (
    "**Survivors.** The tickers of a price table are mostly those that still exist, picked with hindsight: returns in "
    "it are too high, and rank correlations flattered.",
    "**Costs.** Nothing here was traded. What trading on these forecasts would have earned, filled at the next open "
    "and after costs, says `scripts/backtest.py`.",
    "**Luck of the draw.** One checkpoint, one training seed, one stretch of time. Errors are those of the dates, not "
    "of the choice of the model.",
    "**No advice.** Daily equities are nearly efficient: a forecast of them is a width, and hardly a direction.",
)
NO_RANKS = f"**Ranks.** A rank correlation needs a date with {MIN_TICKERS} tickers that differ; there is none."


class Picture(NamedTuple):
    title: str
    caption: str  # how to read it
    figure: Figure


class Cell(NamedTuple):
    text: str
    sure: bool = False  # further from none than chance explains


class Block(NamedTuple):
    """Rows under a heading of their own."""

    title: str
    rows: list[list[Cell]]


class Table(NamedTuple):
    header: list[str]
    blocks: list[Block]

    @property
    def rows(self) -> int:
        return sum(len(block.rows) for block in self.blocks)

    @property
    def long(self) -> bool:
        return self.rows > FEW_ROWS


@dataclass
class Report:
    """
    Attributes:
        title: of the page.
        facts: what was evaluated: checkpoint, dates, tickers, data, command.
        scores: of `scores.score_table`.
        notices: what a reader must know before anything else, such as "IN SAMPLE: …".
        pictures: as of `pictures_of`.
        groups: scores by "year", "regime" or "ticker", which is their first column, as of `scores.score_by`.
    """

    title: str
    facts: dict[str, str]
    scores: pd.DataFrame
    notices: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    groups: dict[str, pd.DataFrame] = field(default_factory=dict)


def report_files(report: Report) -> dict[str, bytes]:
    """Content of each file by its path: the pictures, report.md, and report.html, which holds them all itself.

    The notices are written into the figures.
    """
    encoded = {}
    for place, picture in enumerate(report.pictures, 1):
        content, suffix = encode(stamp(picture.figure, report.notices))
        name = re.sub("[^a-z0-9]+", "-", picture.title.lower()).strip("-")
        encoded[f"{FOLDER}/{place}-{name}.{suffix}"] = content
    fields = {
        "report": report,
        "headline": headline(report.scores),
        "groups": {by: by_group(scores, by) for by, scores in report.groups.items()},
        "everything": all_metrics(report.scores),
        "note": NOTE,
        "reading": READING,
        "limits": limits_of(report.scores),
        "pictures": list(zip(report.pictures, encoded.items(), strict=True)),
    }
    pages = {name: TEMPLATES.get_template(f"{name}.j2").render(fields) for name in ("report.md", "report.html")}
    return encoded | {name: re.sub("\n{3,}", "\n\n", page).encode() for name, page in pages.items()}


def limits_of(scores: pd.DataFrame) -> list[str]:
    ranks = scores[scores["metric"] == "rank_ic"]["model"]
    return [*LIMITS, *([NO_RANKS] if len(ranks) and ranks.isna().all() else [])]


def encode(figure: Figure) -> tuple[bytes, str]:
    """A picture and its suffix: lines that print sharply, or pixels where there are very many of them."""
    for suffix in ("svg", "png"):
        file = BytesIO()
        figure.savefig(file, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
        if file.tell() <= LARGEST_SVG:
            break
    return file.getvalue(), suffix


# --- pictures --------------------------------------------------------------------------------------------------------


def example_of(forecasts: pd.DataFrame) -> pd.DataFrame:
    """The newest forecast of the first ticker of which all outcomes are known, or the newest of all."""
    rows = forecasts[forecasts["ticker"] == forecasts["ticker"].iloc[0]]
    whole = np.isfinite(rows["y"]).groupby(rows["cutoff"]).all()
    return rows[rows["cutoff"] == (whole[whole].index if whole.any() else whole.index).max()]


def pictures_of(
    forecasts: pd.DataFrame,
    prices: pd.DataFrame,
    words: Sequence[dict] = (),
    load: np.ndarray | None = None,
    equity: pd.DataFrame | None = None,
) -> list[Picture]:
    """Those that a forecast table with outcomes and baselines, of returns or of classes, allows.

    Args:
        words: of the days to the cutoff of `example_of(forecasts)`, as of `internals.words_of`.
        load: of the experts, as of `internals.expert_load`.
        equity: curves, as for `plot_equity`.
    """
    pictures = []
    if set(quantile_columns(FAN_LEVELS)) <= set(forecasts):
        rows = example_of(forecasts)
        fan = plot_forecast(rows, prices, rows["ticker"].iloc[0], words=words)
        pictures.append(Picture("One forecast", ONE_FORECAST + (WORDS_BENEATH if words else ""), fan))
        pictures.append(Picture("Predicted and realised", PREDICTED, plot_predicted_vs_actual(forecasts)))
    if "mean" in forecasts:
        pictures.append(Picture("Calibration", CALIBRATION, plot_calibration(forecasts)))
    if "band" in forecasts:
        pictures.append(Picture("Classes", CONFUSION, plot_confusion(forecasts)))
    if len(ranks_of_model(forecasts)):
        pictures.append(Picture("Ranks through time", RANKS, plot_rank_ic(forecasts)))
    if equity is not None:
        pictures.append(Picture("Equity", EQUITY, plot_equity(equity)))
    if load is not None:
        pictures.append(Picture("Experts", EXPERTS, plot_expert_usage(load)))
    return pictures


ONE_FORECAST = (
    "Candles of the days before (white rose, grey fell), then the fan: in half of all cases the price should end in "
    "the darkest part. Dashed lines bound 90 % by ewma, which knows nothing but volatility. One forecast shows what "
    "is forecast, not how well."
)
WORDS_BENEATH = " Beneath stand the words that the time-to-text extractor has for stretches of the past."
PREDICTED = (
    "Left: what was forecast, by the day it is of. A realised line that leaves the grey area much more or less often "
    "than one day in ten means a wrong width. Right: a forecast that knew direction would lie along the dashed line."
)
CALIBRATION = (
    "Left: the share of outcomes below each quantile, on the diagonal if calibrated; the grey band is the error of "
    "the model's line. Right: the same between neighbouring quantiles, over what is expected. A hump means intervals "
    "too wide, a bowl too narrow, a slope a shifted centre."
)
CONFUSION = (
    "A row for each class that came true, a column for the one held most probable; in each the share of its row and "
    "the count. Rows that are alike mean that forecasts know nothing of the outcome."
)
RANKS = (
    "Does the order of the forecasts across tickers agree with that of the outcomes? Above the mean of the dates "
    "before, below the sum: a straight rise is skill that lasts, a single step is one event. The baselines beside it "
    "are the strongest of all, picked with hindsight."
)
EQUITY = "What trading on the forecasts would have earned after costs, beside holding the same tickers."
EXPERTS = "Shares of the choices of the router. An expert far below the dashed line is hardly used."


# --- tables ----------------------------------------------------------------------------------------------------------


def headline(scores: pd.DataFrame) -> Table:
    """For each horizon a row for the model and every baseline."""
    names = list(scores.columns.drop(["horizon", "metric"]))
    blocks = []
    for horizon, rows in scores.groupby("horizon"):
        values = rows.set_index("metric")[names]
        title = (
            f"{days(horizon)} ({values.at['n', 'model']:,.0f} forecasts from {values.at['dates', 'model']:,.0f} dates)"
        )
        blocks.append(Block(title, [[Cell(name), *_cells(values[name], horizon)] for name in names]))
    return _without_empty(Table(["forecaster", *_columns(scores)], blocks))


def by_group(scores: pd.DataFrame, by: str) -> Table:
    """For each horizon a row for every group, of the model; ewma stands beside it in skill and coverage."""
    blocks = []
    for horizon, rows in scores.groupby("horizon"):
        found = []
        for group, part in rows.groupby(by, observed=True):
            values = part.set_index("metric")
            beside = [_coverage(values["ewma"])] if "coverage_90" in values.index else []
            found.append(
                [
                    Cell(str(group)),
                    Cell(f"{values.at['dates', 'model']:,.0f}"),
                    *_cells(values["model"], horizon),
                    *beside,
                ]
            )
        blocks.append(Block(days(horizon), found))
    header = [by, "dates", *_columns(scores)]
    if "coverage_90" in set(scores["metric"]):
        header.append(f"{COVERAGE}, ewma")
    return _without_empty(Table(header, blocks))


def all_metrics(scores: pd.DataFrame) -> Table:
    """What the terminal shows."""
    tables = tabulate(scores)
    blocks = [Block(title, [[Cell(cell) for cell in row] for row in rows]) for title, (_, *rows) in tables]
    return Table(tables[0][1][0], blocks)


def _critical(values: pd.Series, horizon: int, dates: str = "dates") -> float:
    return critical_value(max(int(values[dates]), 1), horizon)


def _skill(values: pd.Series, loss: str, horizon: int) -> Cell:
    skill, error = values[f"{loss}_skill"], values[f"{loss}_skill_se"]
    if error == 0:  # ewma's own
        return Cell("reference")
    return Cell(f"{100 * skill:+.2f} ± {100 * error:.2f}", abs(skill) > _critical(values, horizon) * error)


def _rank_ic(values: pd.Series, horizon: int) -> Cell:
    t = values["rank_ic_t"]
    return Cell(f"{values['rank_ic']:+.3f} ({t:+.1f})", abs(t) > _critical(values, horizon, "rank_ic_dates"))


def _direction(values: pd.Series, horizon: int) -> Cell:
    right, low, high = (100 * values[f"direction_{name}"] for name in ("accuracy", "low", "high"))
    sure = abs(values["direction_accuracy_t"]) > _critical(values, horizon)
    return Cell(f"{right:.1f} [{low:.1f}, {high:.1f}]", sure)


def _percent(values: pd.Series, metric: str) -> Cell:
    return Cell(f"{100 * values[metric]:.1f}")


def _coverage(values: pd.Series) -> Cell:
    return Cell(f"{100 * values['coverage_90']:.1f} ± {100 * values['coverage_90_se']:.1f}")


COVERAGE = "in the 90 % interval (%)"
# Name of a column -> its cell, of the metrics of one forecaster at a horizon.
RETURNS: dict[str, Callable[[pd.Series, int], Cell]] = {
    "CRPS skill over ewma (%)": lambda values, horizon: _skill(values, "crps", horizon),
    "RankIC (t)": _rank_ic,
    "direction right (%) [95 %]": _direction,
    "base rate (%)": lambda values, _: _percent(values, "direction_base_rate"),
    COVERAGE: lambda values, _: _coverage(values),
}
CLASSES: dict[str, Callable[[pd.Series, int], Cell]] = {
    "log-loss skill over ewma (%)": lambda values, horizon: _skill(values, "log_loss", horizon),
    "log-loss (nats)": lambda values, _: Cell(f"{values['log_loss']:.4f}"),
    "class right (%)": lambda values, _: _percent(values, "accuracy"),
    "base rate (%)": lambda values, _: _percent(values, "base_rate"),
}


def _columns(scores: pd.DataFrame) -> dict[str, Callable[[pd.Series, int], Cell]]:
    return CLASSES if "log_loss" in set(scores["metric"]) else RETURNS


def _cells(values: pd.Series, horizon: int) -> list[Cell]:
    columns = CLASSES if "log_loss" in values.index else RETURNS
    return [_defined(make(values, horizon)) for make in columns.values()]


def _defined(cell: Cell) -> Cell:
    return Cell(NONE) if cell.text.startswith(("nan", "+nan")) else cell


def _without_empty(table: Table) -> Table:
    """Leaves out columns that say nothing anywhere, as ranks of a few tickers."""
    rows = [row for block in table.blocks for row in block.rows]
    kept = [place for place in range(len(table.header)) if any(row[place].text != NONE for row in rows)]
    blocks = [Block(block.title, [[row[place] for place in kept] for row in block.rows]) for block in table.blocks]
    return Table([table.header[place] for place in kept], blocks)


# --- templates -------------------------------------------------------------------------------------------------------


def markdown(text: str) -> str:
    """Text of others, such as tickers, that stays in its line and its cell, and is neither tag nor link."""
    return re.sub(r"[\\`<>|]|(?<=\])\(", r"\\\g<0>", " ".join(str(text).split()))


def rich(text: str) -> Markup:
    """Our own words, with their **bold** and `code`, in HTML."""
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)))


def data_uri(name: str, content: bytes) -> str:
    kind = {".svg": "image/svg+xml", ".png": "image/png"}[Path(name).suffix]
    return f"data:{kind};base64,{b64encode(content).decode()}"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html.j2"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"markdown": markdown, "rich": rich, "data_uri": lambda picture: data_uri(*picture)}
