"""Another domain: the same network, without stock features, on the long-horizon benchmark files.

    python scripts/benchmark_ltsf.py --data-dir DIR [--dataset ETTh1 weather] [--horizons 96 192 336 720]
        [--context 96] [--epochs 10] [--seed 0] [--model-config recipes/tiny/config.json] [--output results.json]

Trains a `SpaceExploreForRegression` for every dataset and horizon, and prints its MSE and MAE on the test rows beside
two naive forecasts. docs/ltsf.md says what is measured, and how.
"""

import json
import sys
import tempfile
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.files import write_atomically
from spaceexploreai.data.windows import IGNORE_INDEX
from spaceexploreai.evaluation.ltsf import (
    BENCHMARKS,
    Parts,
    check_lengths,
    daily_period,
    find_file,
    naive_scores,
    origins,
    read_channels,
    split,
    standardise,
)
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.train.arguments import bare_parser, command
from spaceexploreai.train.memory import keep_freed_memory

# Shapes: N rows, C channels, W windows, T rows of a context, H horizons, Q quantiles

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny" / "config.json"
# A mean and three quantiles of 720 horizons at every step is what fits a small machine. The extractor teaches nothing
# unless it was trained.
FIELDS = {"num_features": 2, "quantile_levels": [0.1, 0.5, 0.9], "t2t_num_hidden_layers": 0}
TRAINING = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
}
WINDOWS = 1000  # of each channel at least, in an epoch's training and in its validation
PATIENCE = 3
FORECASTS = ("network", "last value", "last day")
DASH = "\N{EN DASH}"


# --- the task as the head sees it ---


class Series(NamedTuple):
    """A dataset, ready to be learned; `period` is the rows of a day, None without a daily forecast."""

    name: str
    values: np.ndarray  # (N, C), standardised
    scale: np.ndarray  # (C,) typical move of one row in training, the unit of what is predicted
    parts: Parts
    period: int | None
    context: int
    horizons: list[int]


def open_series(name: str, options: Namespace) -> Series:
    table = read_channels(find_file(name, options.data_dir))
    parts = split(name, len(table))
    context = BENCHMARKS[name].context if options.context is None else options.context
    horizons = list(BENCHMARKS[name].horizons) if options.horizons is None else options.horizons
    for horizon in horizons:
        check_lengths(name, parts, context, horizon)
    limit = read_config(options.model_config, [1]).max_position_embeddings
    if context > limit:
        raise ValueError(f"context {context} is longer than the {limit} positions of {options.model_config}")
    values = standardise(table.to_numpy(), parts.train)
    period = daily_period(table.index, parts.test.start)
    return Series(name, values, typical_step(values[: parts.train.stop]), parts, period, context, horizons)


def typical_step(known: np.ndarray) -> np.ndarray:
    """(C,) root mean square of the moves of (N, C) values; of a constant channel, one."""
    step = np.sqrt(np.square(np.diff(known, axis=0)).mean(axis=0))
    return np.where(step > 0, step, 1.0)


class ChannelWindows(Dataset):
    """Windows of every channel by itself. Labels are moves from a row to each of the rows after it.

    Args:
        series: whose values they are.
        origins: last row of each context.
        horizon: rows ahead that are predicted.
        dense: every row of a context has labels; otherwise the last alone.
    """

    def __init__(self, series: Series, origins: range, horizon: int, dense: bool):
        self.series, self.origins, self.horizon, self.dense = series, origins, horizon, dense

    def __len__(self) -> int:
        return len(self.origins) * self.series.values.shape[1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        channel, window = divmod(index, len(self.origins))
        stop, scale, context = self.origins[window] + 1, self.series.scale[channel], self.series.context
        rows = self.series.values[stop - context : stop + self.horizon, channel]
        future = sliding_window_view(rows, 1 + self.horizon)  # (T, 1 + H)
        labels = future[:, 1:] - future[:, :1]
        if not self.dense:
            labels[:-1] = IGNORE_INDEX
        return {
            "past_values": features(rows[:context], scale),
            "attention_mask": np.ones(context),
            "scale": np.full(context, scale),
            "labels": labels,
        }


def features(known: np.ndarray, scale: float) -> np.ndarray:
    """(T, 2) value and move. Nothing is centred on the window, whose later rows are labels of the earlier ones."""
    return np.stack([known, np.diff(known, prepend=known[0]) / scale], axis=1)


def make_windows(series: Series, horizon: int) -> Parts:
    rows = Parts(*(origins(part, series.context, horizon) for part in series.parts))
    return Parts(
        ChannelWindows(series, thin(rows.train), horizon, dense=True),
        ChannelWindows(series, thin(rows.validation), horizon, dense=False),
        ChannelWindows(series, rows.test, horizon, dense=False),
    )


def thin(origins: range) -> range:
    """Windows that overlap by nearly all their rows add time and little else, the more so with labels at every row."""
    return origins[:: max(1, len(origins) // WINDOWS)]


class Errors:
    """MSE and MAE of all windows, channels and horizons, from one batch after the other."""

    def __init__(self):
        self.squared = self.absolute = self.count = 0

    def reduce(self, outputs: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """(B, H) errors at the last row, the only one with labels."""
        return outputs[0][:, -1] - labels[:, -1]

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        errors = prediction.predictions.double()
        self.squared += errors.square().sum().item()
        self.absolute += errors.abs().sum().item()
        self.count += errors.numel()
        if not compute_result:
            return {}
        scores = {"mse": self.squared / self.count, "mae": self.absolute / self.count}
        self.squared = self.absolute = self.count = 0
        return scores


# --- training ---


class Progress(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if "eval_mse" in metrics:
            print(f"epoch {state.epoch:.0f}: validation MSE {metrics['eval_mse']:.4f}", file=sys.stderr)


def make_network(path: str | Path, series: Series, horizon: int) -> SpaceExploreForRegression:
    """A new network, whose heads start from the marginal distribution of their targets in training."""
    model = SpaceExploreForRegression(read_config(path, list(range(1, horizon + 1))))
    known = series.values[: series.parts.train.stop] / series.scale
    model.start_from_marginal(*marginal(known, horizon, model.config.quantile_levels))
    return model


def read_config(path: str | Path, horizons: list[int]) -> SpaceExploreConfig:
    with open(path) as file:
        return SpaceExploreConfig(**json.load(file) | FIELDS | {"horizons": horizons})


def marginal(known: np.ndarray, horizon: int, levels: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(H,) means and (H, Q) quantiles of the moves of (N, C) values, in units of a random walk's."""
    means, quantiles = [], []
    for ahead in range(1, horizon + 1):
        moves = (known[ahead:] - known[:-ahead]) / np.sqrt(ahead)
        means.append(moves.mean())
        quantiles.append(np.quantile(moves, levels))
    return torch.tensor(means), torch.tensor(np.array(quantiles))


def make_trainer(
    model: SpaceExploreForRegression, windows: Parts, epochs: int, seed: int, folder: str | Path
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="mse",
        greater_is_better=False,
        batch_eval_metrics=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **TRAINING,
    )
    errors = Errors()
    trainer = Trainer(
        model,
        arguments,
        collate_windows,
        windows.train,
        windows.validation,
        compute_metrics=errors,
        preprocess_logits_for_metrics=errors.reduce,
        callbacks=[EarlyStoppingCallback(PATIENCE), Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(series: Series, windows: Parts, options: Namespace) -> Trainer:
    """Holds the network of the epoch that was best on the validation rows."""
    set_seed(options.seed)
    model = make_network(options.model_config, series, windows.train.horizon)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, windows, options.epochs, options.seed, folder)
        trainer.train()
    trainer.remove_callback(EarlyStoppingCallback)  # it would complain of the test rows
    return trainer


# --- results ---


def compare(series: Series, horizon: int, options: Namespace) -> dict:
    windows = make_windows(series, horizon)
    trainer = train(series, windows, options)
    scores = trainer.evaluate(windows.test, metric_key_prefix="test")
    rows = windows.test.origins
    return {
        "dataset": series.name,
        "horizon": horizon,
        "context": series.context,
        "channels": series.values.shape[1],
        "windows": len(rows),
        "seed": options.seed,
        "network": {name: scores[f"test_{name}"] for name in ("mse", "mae")},
        "last value": naive_scores(series.values, rows, horizon),
        "last day": series.period and naive_scores(series.values, rows, horizon, series.period),
    }


def format_result(result: dict) -> str:
    cells = [f"{result['dataset']:10}{result['horizon']:>8}{result['windows']:>9}"]
    for name in FORECASTS:
        scores = result[name]
        cells.append(f"{scores['mse']:>10.3f}{scores['mae']:>8.3f}" if scores else f"{DASH:>10}{DASH:>8}")
    return "".join(cells)


def write_results(results: list[dict], path: str | Path) -> None:
    text = json.dumps(results, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number from 1, got {text}")
    return int(text)


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--data-dir", required=True, help="folder of the files, or of their folders in Autoformer")
    parser.add_argument("--dataset", nargs="+", default=["all"], help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument(
        "--horizons", type=positive, nargs="+", help="rows ahead; default: 96 192 336 720, ILI 24 36 48 60"
    )
    parser.add_argument("--context", type=positive, help="rows of a window; default: 96, ILI 36")
    parser.add_argument("--epochs", type=positive, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-config", default=RECIPE, help="config.json; default: recipes/tiny")
    parser.add_argument("--output", help="JSON file of the results so far, written after every row")
    options = parser.parse_args(argv)
    names = list(BENCHMARKS) if options.dataset == ["all"] else options.dataset
    datasets = [open_series(name, options) for name in names]

    keep_freed_memory()
    disable_progress_bar()
    results = []
    print(f"{'':27}" + "".join(f"{name:>18}" for name in FORECASTS))
    print(f"{'dataset':10}{'horizon':>8}{'windows':>9}" + f"{'MSE':>10}{'MAE':>8}" * len(FORECASTS))
    for series, horizon in [(one, horizon) for one in datasets for horizon in one.horizons]:
        results.append(compare(series, horizon, options))
        print(format_result(results[-1]), flush=True)
        if options.output:
            write_results(results, options.output)


if __name__ == "__main__":
    main()
