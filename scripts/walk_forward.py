"""Trains a recipe again and again as time goes on, and scores what each checkpoint says of the days that follow.

    python scripts/walk_forward.py --config recipes/tiny/sft.yaml (--folds N | --every SESSIONS)
        [--window expanding|rolling] [--train_sessions N] [--embargo N] [--baselines all]
        [--prices FILE_OR_DIR] [--tickers AAPL,MSFT] [--output_dir DIR]

Every option of train/sft.py works besides. Each fold leaves a checkpoint, DIR/fold-01/, and its forecasts,
DIR/fold-01.parquet; all together make forecasts.parquet, metrics.json, metrics_by_fold.json and report.html. The same
command goes on with a run that was interrupted.
"""

import gc
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from transformers.utils import logging

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.cleaning import load_prices
from spaceexploreai.data.prices import write_table
from spaceexploreai.data.stocks import fingerprint
from spaceexploreai.data.windows import DateRange, forecast_windows
from spaceexploreai.evaluation.report import Report, pictures_of
from spaceexploreai.evaluation.scores import format_scores, score_by, score_table
from spaceexploreai.evaluation.walk_forward import Fold, join_folds, plan_folds
from spaceexploreai.scripts.evaluate import forecast_range, refuse_leaks, write_evaluation, write_json
from spaceexploreai.scripts.forecasters import load_forecaster
from spaceexploreai.train.arguments import ObjectiveArguments, Run, command, parse_run
from spaceexploreai.train.report import own_options
from spaceexploreai.train.sft import make_config, make_extractor, train_and_report

SETTINGS = "walk_forward.json"
SCRATCH = "scratch"  # of the fold that is being trained
BASELINE_SETS = ("fast", "all")


@dataclass
class WalkForwardArguments(ObjectiveArguments):
    window: str = field(default="expanding", metadata={"help": "expanding: train on all before; rolling: on the last"})
    folds: int | None = field(default=None, metadata={"help": "number of test blocks"})
    every: int | None = field(default=None, metadata={"help": "sessions of a test block, in place of folds"})
    train_sessions: int | None = field(
        default=None, metadata={"help": "sessions before the first block, and of a rolling window; half by default"}
    )
    embargo: int = field(default=0, metadata={"help": "sessions left out before a block, besides the purge"})
    baselines: str = field(default="fast", metadata={"help": "all: the fitted ones too, fitted to each fold"})

    def __post_init__(self):
        super().__post_init__()
        if self.baselines not in BASELINE_SETS:
            raise ValueError(f"baselines must be {' or '.join(BASELINE_SETS)}, got {self.baselines!r}")


class Walk(NamedTuple):
    """A run of this command, ready to start."""

    argv: list[str]
    run: Run
    prices: pd.DataFrame
    folds: list[Fold]
    settings: dict

    @property
    def folder(self) -> Path:
        return Path(self.run.training.output_dir)

    def checkpoint(self, number: int) -> Path:
        return self.folder / f"fold-{number:02d}"

    def forecasts(self, number: int) -> Path:
        """Written last: where it is, the fold is done."""
        return self.folder / f"fold-{number:02d}.parquet"


# --- the plan ---


def open_walk(argv: Sequence[str]) -> Walk:
    """Reads all options and prices, and refuses what would fail; nothing is written."""
    run = parse_run(argv, objective=WalkForwardArguments)
    if run.data.dataset is not None:
        raise ValueError(f"the dataset {run.data.dataset} has splits of its own: give the prices that it is made of")
    if run.data.train_start is not None:
        raise ValueError(f"train_start {run.data.train_start} is what folds have of their own: leave it out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"folds are trained in one process, not in {os.environ['WORLD_SIZE']}")
    origin = run.model.model_name_or_path
    extractor = make_extractor(origin, run.data)
    config = make_config(run.model, run.objective, extractor)
    data, walk = run.data, run.objective
    prices = load_prices(data.prices, data.tickers, extractor.calendar, data.strict, data.fill)
    folds = plan_folds(
        prices["date"],
        config.horizons[-1],
        extractor.context_length,
        window=walk.window,
        folds=walk.folds,
        every=walk.every,
        train_sessions=walk.train_sessions,
        embargo=walk.embargo,
        validation_fraction=data.validation_fraction,
    )
    refuse_seen(config, folds[0], origin)
    return Walk(list(argv), run, prices, folds, describe(run, config, folds))


def refuse_seen(config: SpaceExploreConfig, first: Fold, origin: str | None) -> None:
    """A checkpoint that training goes on from must not know more than the first fold's own training range."""
    seen = max(config.train_cutoff or "", config.selection_cutoff or "")
    if seen > iso(first.train[1]):
        raise ValueError(f"{origin} has seen dates to {seen}, the first fold is trained to {iso(first.train[1])}")


def describe(run: Run, config: SpaceExploreConfig, folds: list[Fold]) -> dict:
    """What decides the results, as JSON: with other settings a folder is that of another run."""
    options = {name: value for name, value in own_options(run).items() if name != "output_dir"}
    dates = [{name: [iso(day) for day in span] for name, span in fold._asdict().items()} for fold in folds]
    settings = {"options": options, "network": json.loads(config.to_json_string(use_diff=False))}
    return {**settings, "data": fingerprint(run.data.prices, run.model.model_name_or_path), "dates": dates}


def iso(day: pd.Timestamp) -> str:
    return day.date().isoformat()


def open_folder(folder: Path, settings: dict) -> None:
    """Notes the settings in a folder that is new, or whose run has come to nothing, or finds the same ones."""
    path = folder / SETTINGS
    if any(folder.glob("fold-*.parquet")) and path.is_file():
        refuse_others(json.loads(path.read_text()), settings, folder)
    elif folder.is_dir() and any(folder.iterdir()) and not path.is_file():
        raise ValueError(f"{folder} holds other files than those of a walk-forward: choose another output_dir")
    else:
        write_json(settings, path)


def refuse_others(former: dict, settings: dict, folder: Path) -> None:
    before, now = map(flatten, (former, settings))
    for name in [*before, *now]:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{folder} is of a run with {name} {before.get(name)}, not {now.get(name)}: choose another output_dir"
            )


def flatten(settings: dict) -> dict:
    """By name, what a user sets first."""
    return {**settings["options"], **settings["network"], "data": settings["data"], "dates": settings["dates"]}


# --- a fold ---


def fold_run(walk: Walk, fold: Fold, scratch: Path) -> Run:
    """The recipe as train/sft.py reads it, on the dates of the fold."""
    run = parse_run([*walk.argv, "--output_dir", str(scratch)], objective=WalkForwardArguments)
    plain = {one.name: getattr(run.objective, one.name) for one in fields(ObjectiveArguments)}
    data = replace(run.data, **split_options(fold, walk.prices["date"]))
    return run._replace(data=data, objective=ObjectiveArguments(**plain))


def split_options(fold: Fold, dates: pd.Series) -> dict[str, float | str]:
    """What `chronological_split` makes the fold of. Its test range is all that follows, the embargo included."""
    sessions = pd.Series(dates.unique())
    counts = {
        "validation_fraction": sessions.between(*fold.validation).sum(),
        "test_fraction": (sessions > fold.validation[1]).sum(),
    }
    shares = {name: float(count / len(sessions)) for name, count in counts.items()}
    return shares if fold.train[0] == sessions.min() else {"train_start": iso(fold.train[0]), **shares}


def train_fold(walk: Walk, number: int) -> None:
    """Leaves a checkpoint. What an interrupted run has left of it is no use."""
    scratch, folder = walk.folder / SCRATCH, walk.checkpoint(number)
    for path in (scratch, folder):
        shutil.rmtree(path, ignore_errors=True)
    train_and_report(fold_run(walk, walk.folds[number - 1], scratch), folder)
    shutil.rmtree(scratch)
    gc.collect()  # the trainer and its network, which refer to each other, before the next ones


def forecast_fold(walk: Walk, number: int) -> pd.DataFrame:
    """Forecast table of the test block, by the checkpoint of the fold."""
    fold = walk.folds[number - 1]
    model, extractor = load_forecaster(str(walk.checkpoint(number)))
    cutoffs = (model.config.train_cutoff, model.config.selection_cutoff)
    planned = (iso(fold.train[1]), iso(fold.validation[1]))
    if cutoffs != planned:
        raise ValueError(f"{walk.checkpoint(number)} has seen {cutoffs}, not {planned}: have the prices changed?")
    within = DateRange(*fold.test)
    series = extractor.encode(walk.prices)
    refuse_leaks(model, extractor, walk.prices, forecast_windows(series, extractor.context_length, within).origins)
    return forecast_range(model, extractor, walk.prices, within, walk.run.objective.baselines, series=series)


def complete(walk: Walk, number: int) -> None:
    fold, count = walk.folds[number - 1], len(walk.folds)
    spans = [f"{name} {iso(start)} to {iso(end)}" for name, (start, end) in fold._asdict().items()]
    found = walk.forecasts(number).is_file()
    print(f"[{number}/{count}] {', '.join(spans)}{': found' if found else ''}", flush=True)
    if not found:
        train_fold(walk, number)
        write_table(forecast_fold(walk, number), walk.forecasts(number))


# --- all folds ---


def write_results(walk: Walk) -> str:
    """Joins and scores the folds; returns what a terminal shows."""
    numbers = range(1, len(walk.folds) + 1)
    forecasts = join_folds(pd.read_parquet(walk.forecasts(number)) for number in numbers)
    scores, by_fold = score_table(forecasts), score_by(forecasts, "fold")
    pictures = pictures_of(forecasts, walk.prices)
    report = Report("Walk-forward", facts_of(walk), scores, [], pictures, {"fold": by_fold})
    paths = write_evaluation(walk.folder / "forecasts.parquet", forecasts, report)
    skills = format_folds(by_fold, "log_loss_skill" if "band" in forecasts else "crps_skill")
    return f"\n{format_scores(scores)}\n\n{skills}\n\nwrote {', '.join(map(str, paths))}"


def facts_of(walk: Walk) -> dict[str, str]:
    first, last = walk.folds[0], walk.folds[-1]
    return {
        "recipe": f"{' '.join(walk.argv)}; trained anew for each of {len(walk.folds)} blocks",
        "dates": f"cutoffs {iso(first.test[0])} to {iso(last.test[1])}",
        "training": f"to {iso(first.train[1])} for the first block, to {iso(last.train[1])} for the last",
        "tickers": f"{walk.prices['ticker'].nunique()}",
    }


def format_folds(by_fold: pd.DataFrame, metric: str) -> str:
    """The model's skill over ewma: a row for each fold, a column for each horizon."""
    rows = by_fold.set_index(["fold", "horizon", "metric"])["model"].unstack("metric")
    cells = (100 * rows[metric]).map("{:+.2f}".format) + (100 * rows[f"{metric}_se"]).map(" ± {:.2f}".format)
    table = cells.unstack("horizon").rename_axis(columns=None)
    lines = [f"| {' | '.join(map(str, row))} |" for row in table.itertuples()]
    head = f"| fold | {' | '.join(f'h = {horizon}' for horizon in table.columns)} |"
    title = f"{metric.removesuffix('_skill').replace('_', '-').replace('crps', 'CRPS')} skill over ewma (%), by fold"
    return "\n".join([title, "", head, f"|---|{'---:|' * len(table.columns)}", *lines])


@command
def main(argv: list[str] | None = None) -> None:
    walk = open_walk(sys.argv[1:] if argv is None else argv)
    open_folder(walk.folder, walk.settings)
    logging.disable_progress_bar()  # of weights being read and written
    for number in range(1, len(walk.folds) + 1):
        complete(walk, number)
    print(write_results(walk))


if __name__ == "__main__":
    main()
