"""What a run did, for people: `report.md` with its curves, and the model card, which is the report under a head."""

import json
import resource
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure
from transformers import TrainingArguments

from spaceexploreai.data.files import write_atomically
from spaceexploreai.data.stocks import SeriesStore, StockData
from spaceexploreai.evaluation.baselines import add_baselines
from spaceexploreai.evaluation.scores import format_scores, score
from spaceexploreai.modeling_spaceexplore import (
    SpaceExploreExperts,
    SpaceExploreForTimeToText,
    SpaceExplorePreTrainedModel,
)
from spaceexploreai.train.arguments import Run
from spaceexploreai.train.lora import merged
from spaceexploreai.train.tasks import Regression, Task
from spaceexploreai.train.trainer import SpaceExploreTrainer

REPORT, CARD, CURVES = "report.md", "README.md", "training.png"
EXPERTS = {"share of the experts, 1 is balance": ("expert_load_max", "expert_load_min")}
LIBRARIES = ("torch", "transformers", "accelerate", "datasets")
# Forecasts that are laid out beside the baselines. Of more, evenly spaced tickers, and all dates: on one of them all
# tickers share a market.
MAX_ORIGINS = 50_000
REPORT_TEMPLATE = """\
# {title}

{head} of {parameters:,} parameters ({active:,} a token), trained by `{command}`.
{reading}

## Data

{data}

## Validation

Dates on which the checkpoint was chosen: {validation}. They flatter it; what it is worth is measured on later ones, by
`scripts/evaluate.py`.

{scores}
{teacher}
## Training

{effort}

![Loss, learning rate, gradient norm and load of the experts by step]({curves})

## Options

```yaml
{options}```

Versions: {versions}.
"""
READING = (
    "Daily equities are nearly efficient: a forecast of them is a width, and hardly a direction. It is no advice to "
    "buy or sell anything."
)


def write_report(
    trainer: SpaceExploreTrainer,
    task: Task,
    data: StockData,
    run: Run,
    folder: Path,
    teacher: dict[str, float] | None = None,
) -> None:
    """Scores the trained model on the validation windows; writes the report, its curves and the card to the folder.

    Every process must call it, since all of them take part in the scoring; the first one writes.

    Args:
        teacher: its metrics on the same windows, if there was one.
    """
    prediction = trainer.predict(task.validation, metric_key_prefix="eval")
    if not trainer.is_world_process_zero():
        return
    folder = Path(folder)
    model = merged(trainer.accelerator.unwrap_model(trainer.model))
    fields = {
        "title": run.training.run_name or folder.name,
        "head": type(model).__name__,
        "parameters": count(model),
        "active": count_active(model),
        "command": f"accelerate launch {task.script}",
        "reading": READING,
        "data": describe_data(data),
        "validation": " to ".join(f"{day:%Y-%m-%d}" for day in data.split.validation),
        "scores": beside_baselines(task, prediction, data) or listed({"value": prediction.metrics}),
        "teacher": "" if teacher is None else beside_teacher(run, prediction.metrics, teacher),
        "effort": describe_effort(trainer),
        "curves": CURVES,
        "options": yaml.safe_dump(own_options(run), sort_keys=False),
        "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    }
    text = REPORT_TEMPLATE.format(**fields)
    write_files(folder, text, plot_curves(trainer.state.log_history), model)


def write_files(folder: Path, text: str, curves: Figure, model) -> None:
    """The report, its curves, and the card, which is the report under a head."""
    write_atomically(folder / CURVES, curves.savefig)
    write_atomically(folder / REPORT, lambda path: path.write_text(text, encoding="utf-8"))
    card = f"---\n{yaml.safe_dump(card_head(model), sort_keys=False)}---\n\n{text}"
    write_atomically(folder / CARD, lambda path: path.write_text(card, encoding="utf-8"))


def card_head(model) -> dict:
    """What the Hub reads at the top of a model card."""
    task = {} if isinstance(model, SpaceExploreForTimeToText) else {"pipeline_tag": "time-series-forecasting"}
    tags = ["finance", "stocks", model.config.model_type]
    return {"library_name": "transformers", "license": "mit", **task, "tags": tags}


def count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def count_active(model: SpaceExplorePreTrainedModel) -> int:
    """Parameters that a forecast of one time step passes through: without idle experts and the extractor."""
    config = model.config
    experts = sum(count(module) for module in model.modules() if isinstance(module, SpaceExploreExperts))
    idle = experts // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
    return count(model) - count(model.model.t2t) - idle


def describe_data(data: StockData) -> str:
    names = data.extractor.feature_names
    lines = [
        f"- {len(data.train.series):,} tickers, {len(data.train):,} windows of {data.extractor.context_length} days "
        f"and {len(names)} features; fingerprint `{data.fingerprint}`",
        f"- training {data.split.train.start:%Y-%m-%d} to {data.split.train.end:%Y-%m-%d}; no label reaches beyond it",
        f"- target {data.target}, {', '.join(map(str, data.horizons))} days ahead",
    ]
    return "\n".join([*lines, "", "```text", str(data.cleaning), "```"])


# --- scores ----------------------------------------------------------------------------------------------------------


def beside_baselines(task: Task, prediction, data: StockData) -> str | None:
    """Scores of a regression of log-returns beside the naive forecasts; the metrics of other heads have base rates."""
    if not isinstance(task, Regression) or data.target != "log_return":
        return None
    table = forecast_table(task, prediction, data)
    return format_scores(score(add_baselines(table, closes(data.validation.series, table["ticker"].unique()))))


def forecast_table(task: Regression, prediction, data: StockData) -> pd.DataFrame:
    """The forecasts of the validation windows, of as many tickers as `MAX_ORIGINS` allows, with their outcomes."""
    labels = prediction.label_ids[:, -task.steps :]
    known = (labels != -100).any(axis=-1)
    which = data.validation.rows[:, 0]
    kept = np.unique(which)[:: -(-known.sum() // MAX_ORIGINS)]
    rows, steps = np.nonzero(known & np.isin(which, kept)[:, None])
    tickers = np.array(data.validation.series.tickers)[which[rows]]
    origins = pd.DataFrame({"ticker": tickers, "cutoff": task.dates[rows, steps]})
    mean, quantiles = (output[rows, steps] for output in prediction.predictions)
    table = data.extractor.forecast_table(origins, mean, quantiles, task.config)
    outcomes = labels[rows, steps].reshape(-1).astype(np.float64)
    return table.assign(y=np.where(outcomes == -100, np.nan, outcomes))


def closes(series: SeriesStore, tickers) -> pd.DataFrame:
    """`ticker, date, close` of the days with a bar, from the first whose volatility is known."""
    histories = [one for one in series if one.ticker in set(tickers)]
    return pd.concat(
        [pd.DataFrame({"ticker": one.ticker, "date": one.dates, "close": one.close})[one.traded] for one in histories],
        ignore_index=True,
    )


def listed(columns: dict[str, dict[str, float]]) -> str:
    """A column for each set of metrics, by its title."""
    first, rows = next(iter(columns.values())), []
    for name in (name for name in first if not any(part in name for part in ("second", "runtime", "preparation"))):
        values = " | ".join(f"{metrics.get(name, np.nan):.4g}" for metrics in columns.values())
        rows.append(f"| {name.removeprefix('eval_')} | {values} |")
    return "\n".join([f"| metric | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|", *rows])


def beside_teacher(run: Run, student: dict[str, float], teacher: dict[str, float]) -> str:
    taught = run.objective
    heat = "" if taught.temperature is None else f" and temperature {taught.temperature:g}"
    table = listed({"student": student, "teacher": teacher})
    return f"\nTaught by `{taught.teacher}` with alpha {taught.alpha:g}{heat}. Its own metrics:\n\n{table}\n"


# --- training --------------------------------------------------------------------------------------------------------


def describe_effort(trainer: SpaceExploreTrainer) -> str:
    state, args = trainer.state, trainer.args
    windows = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    summary = next(entry for entry in reversed(state.log_history) if "train_runtime" in entry)
    best = f", best at step {state.best_global_step}" if state.best_global_step else ""
    return "\n".join(
        [
            f"- {state.global_step:,} steps of {windows} windows, {state.epoch:.2f} epochs{best}",
            f"- {summary['train_runtime']:.0f} s on {args.world_size} {args.device.type}, "
            f"{summary['train_samples_per_second']:.1f} windows a second, evaluation included",
            f"- peak memory of the first process: {peak_memory():.2f} GB",
        ]
    )


def peak_memory() -> float:
    """GB of the accelerator where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def own_options(run: Run) -> dict:
    """What differs from the defaults, by the names that the YAML and the command line have."""
    default = TrainingArguments(output_dir=run.training.output_dir, report_to="none").to_dict()
    plain = {one.name: one.default for one in fields(TrainingArguments)}
    for one in fields(run.training):  # TRL's are more, and others
        if one.name not in plain or one.default != plain[one.name]:
            default[one.name] = one.default if one.default_factory is MISSING else one.default_factory()
    training = {name: value for name, value in run.training.to_dict().items() if default.get(name) != value}
    ours = {}
    for part in (run.model, run.data, run.objective):
        defaults = {name: field.default for name, field in type(part).__dataclass_fields__.items()}
        ours |= {name: value for name, value in vars(part).items() if value != defaults[name]}
    return json.loads(json.dumps({**ours, **training}, default=str))


def plot_curves(history: list[dict], last: dict[str, tuple[str, ...]] = EXPERTS) -> Figure:
    """Loss, learning rate, gradient norm and a last panel by step; titles and the names of what is logged."""
    panels = {
        "loss": ("loss", "eval_loss"),
        "learning rate": ("learning_rate",),
        "gradient norm": ("grad_norm",),
        **last,
    }
    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, label=name)
        axes.set_title(title)
        axes.set_xlabel("step")
        if len(names) > 1 and axes.lines:
            axes.legend()
    return figure
