"""What alignment did to the forecast: models beside each other on dates that are later than every pair."""

from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer

from spaceexploreai.data.stocks import PairData, non_overlapping_paths
from spaceexploreai.evaluation.paths import LEVEL, Outcomes, compare, format_comparison, score_samples
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer
from spaceexploreai.train.arguments import Run
from spaceexploreai.train.report import (
    CURVES,
    LIBRARIES,
    READING,
    count,
    own_options,
    peak_memory,
    plot_curves,
    write_files,
)
from spaceexploreai.train.sampling import ModelPaths, fit_temperature

BEFORE, RECALIBRATED, ALIGNED, RANDOMISED, CONTINUED = (
    "before",
    "temperature alone",
    "aligned",
    "randomised labels",
    "SFT continued",
)
REWARDS = {"reward margin": ("rewards/margins", "eval_rewards/margins")}
TEMPLATE = """\
# {title}

{head} of {parameters:,} parameters, aligned with `{before}` by `accelerate launch train/dpo.py`.
{reading}

## Pairs

{pairs}

## On held-back dates

{origins} origins on {days} dates from {first} to {last}, later than every pair: the validation dates of supervised
training, on which nothing was fitted but, on the {earlier} dates before them, the temperature {temperature:.3f} of the
second column. CRPS is that of {samples} samples, of cumulative log-returns in units of volatility · √days. Errors are
standard errors clustered by date.

{comparison}

{calibration}

## Training

{effort}

Rewards of pairs that were not trained on, which say nothing of the forecast:

{rewards}

![Loss, learning rate, gradient norm and reward margin by step]({curves})

## Options

```yaml
{options}```

Versions: {versions}.
"""


class Origins(NamedTuple):
    """Where forecasts begin: histories that end there, and what followed."""

    histories: list[EncodedSeries]
    outcomes: Outcomes

    def part(self, kept: np.ndarray) -> "Origins":
        histories = [one for one, keep in zip(self.histories, kept, strict=True) if keep]
        return Origins(histories, Outcomes(*(column[kept] for column in self.outcomes)))


def held_back_origins(data: PairData) -> tuple[Origins, Origins]:
    """The origins of the validation dates with non-overlapping paths, of the tickers that there are pairs of: those
    whose paths end before the middle date, and those from there on.

    Raises:
        ValueError: there are not two such dates.
    """
    length, context_length = data.horizons[-1], data.extractor.context_length
    histories, realised, ends = [], [], []
    for which in sorted(set(data.pairs["train"]["series"])):
        one = data.series[which]
        origins, paths = non_overlapping_paths(one, length, data.split.validation, context_length)
        histories += [data.series.steps(which, end + 1 - context_length, end + 1) for end in origins.tolist()]
        realised.append(paths)
        ends.append(one.dates[origins + length])
    dates = np.array([one.dates[-1] for one in histories], dtype="datetime64[D]")
    days = np.unique(dates)
    is_earlier = np.concatenate(ends) <= days[len(days) // 2] if len(days) else np.zeros(0, dtype=bool)
    if not is_earlier.any():
        first, last = (f"{day:%Y-%m-%d}" for day in data.split.validation)
        raise ValueError(f"{len(days)} dates of validation, {first} to {last}, begin a path of {length} days: too few")
    scale = np.array([one.scale[-1] for one in histories], dtype=np.float64)
    every = Origins(histories, Outcomes(dates, scale, np.concatenate(realised)))
    return every.part(is_earlier), every.part(dates >= days[len(days) // 2])


class Measured(NamedTuple):
    """Scores of each model on the later origins, and the temperature that was fitted on the earlier ones."""

    scores: dict[str, pd.DataFrame]
    temperature: float
    earlier: Origins
    later: Origins


def measure(
    models: dict[str, PreTrainedModel], tokenizer: SpaceExploreTokenizer, data: PairData, samples: int, seed: int = 0
) -> Measured:
    """Scores the models, of which the first is the one before alignment and is scored at its best temperature too."""
    earlier, later = held_back_origins(data)

    def paths_of(model: PreTrainedModel, temperature: float = 1.0) -> ModelPaths:
        return ModelPaths(model, tokenizer, data.extractor.context_length, samples, seed, temperature)

    before, *others = models
    temperature = fit_temperature(*paths_of(models[before]).logits(earlier.histories, earlier.outcomes.realised))
    forecasters = {before: paths_of(models[before]), RECALIBRATED: paths_of(models[before], temperature)}
    forecasters |= {name: paths_of(models[name]) for name in others}
    scores = {name: score_paths_of(paths, later, data.horizons) for name, paths in forecasters.items()}
    return Measured(scores, temperature, earlier, later)


def score_paths_of(paths: ModelPaths, origins: Origins, horizons: list[int]) -> pd.DataFrame:
    realised = origins.outcomes.realised
    logits, tokens = paths.logits(origins.histories, realised)
    log_likelihood = -F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(dim=1)
    samples = paths(origins.histories, realised.shape[1])
    return score_samples(origins.outcomes, samples, log_likelihood.double().numpy(), horizons)


def calibration(table: pd.DataFrame) -> str:
    """A sentence about the coverage of the longest horizon: a collapse must not pass unnoticed."""
    metric = table["metric"][table["metric"].str.startswith("coverage")].iloc[-1]
    rows = table[table["metric"] == metric].set_index("model")
    before, after = rows.loc[BEFORE], rows.loc[ALIGNED]
    worse = abs(after["mean"] - LEVEL) - abs(before["mean"] - LEVEL)
    said = f"The {metric.replace(', ', ' at ')} went from {before['mean']:.1%} to {after['mean']:.1%}"
    if worse > 2 * after["difference_error"]:
        remedies = "fewer steps, a lower learning rate, a larger beta or more of the SFT term"
        return f"**Calibration was lost.** {said}: take {remedies}."
    return f"{said}."


def write_report(
    trainers: dict[str, Trainer], measured: Measured, data: PairData, run: Run, model: PreTrainedModel, folder: Path
) -> str:
    """Writes the report, its curves and the card to the folder; returns the comparison."""
    trainer, table, dates = trainers[ALIGNED], compare(measured.scores), np.unique(measured.later.outcomes.date)
    fields = {
        "title": run.training.run_name or folder.name,
        "head": type(model).__name__,
        "parameters": count(model),
        "before": run.model.model_name_or_path,
        "reading": READING,
        "pairs": describe_pairs(data),
        "origins": len(measured.later.histories),
        "days": len(dates),
        "first": dates[0],
        "last": dates[-1],
        "earlier": len(np.unique(measured.earlier.outcomes.date)),
        "temperature": measured.temperature,
        "samples": run.objective.num_samples,
        "comparison": format_comparison(table),
        "calibration": calibration(table),
        "effort": describe_effort(trainer),
        "rewards": format_rewards(trainers),
        "curves": CURVES,
        "options": yaml.safe_dump(own_options(run), sort_keys=False),
        "versions": ", ".join(f"{name} {version(name)}" for name in (*LIBRARIES, "trl")),
    }
    text = TEMPLATE.format(**fields)
    write_files(folder, text, plot_curves(trainer.state.log_history, REWARDS), model)
    return f"{fields['comparison']}\n\n{fields['calibration']}"


def describe_pairs(data: PairData) -> str:
    train = data.pairs["train"]
    counts = ", ".join(f"{len(pairs):,} of {name}" for name, pairs in data.pairs.items())
    lines = [
        f"- {counts}, of {len(set(train['ticker']))} tickers; fingerprint `{data.fingerprint}`",
        f"- paths of {data.horizons[-1]} days; their ends are {np.mean(train['margin']):.2f} volatilities · √days "
        "apart on average",
        f"- from {min(train['date'])}; no path ends after {data.split.train.end:%Y-%m-%d}",
    ]
    return "\n".join(lines)


def describe_effort(trainer: Trainer) -> str:
    state, args = trainer.state, trainer.args
    pairs = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    summary = next(entry for entry in reversed(state.log_history) if "train_runtime" in entry)
    return (
        f"- {state.global_step:,} steps of {pairs} pairs, {state.epoch:.2f} epochs, "
        f"{summary['train_runtime']:.0f} s on {args.world_size} {args.device.type}\n"
        f"- peak memory of the first process: {peak_memory():.2f} GB"
    )


def format_rewards(trainers: dict[str, Trainer]) -> str:
    """The last evaluation of each trainer on the pairs of validation."""
    names = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "logps/chosen": "log p(chosen)"}
    lines = [f"| model | {' | '.join(names.values())} |", f"|---|{'---:|' * len(names)}"]
    for model, trainer in trainers.items():
        last = next((one for one in reversed(trainer.state.log_history) if "eval_rewards/margins" in one), None)
        cells = ["\N{EN DASH}" if last is None else f"{last[f'eval_{name}']:.4g}" for name in names]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)
