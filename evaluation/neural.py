"""Baselines that learn from windows: DLinear and PatchTST, trained by quantile loss on the network's own inputs.

Both begin as `ewma`: the quantiles of all training targets, whatever the window says. They are small, and stop where
the tail of the training dates says so; a network that is not ahead of them needs no more than they have.
"""

from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PatchTSTConfig, PatchTSTForRegression, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from spaceexploreai.evaluation.learned import evenly_spaced, refuse_not_finite, split_tail
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries

# Shapes: N windows, T steps, F features, H horizons, Q quantile levels, B batch

MAX_WINDOWS = 20_000  # trained on, evenly spaced of more
MAX_EPOCHS, PATIENCE = 5, 2
BATCH_SIZE = 256
# Never tuned on the dates that baselines are scored on.
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
SEED = 0  # of the first weights and the order of windows
TREND_STEPS = 25  # moving average of DLinear, as in the paper
PATCH_STEPS = 16  # at most, side by side; the paper's overlap by half, at twice the cost
# A tenth of the paper's widths: of a return little can be known. Statistics of a window are not taken out of it: the
# features are normalised already, and how wild a stock is stands in their level.
PATCHTST = {
    "d_model": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "ffn_dim": 32,
    "attention_dropout": 0.2,
    "ff_dropout": 0.2,
    "head_dropout": 0.2,
    "scaling": None,
    "loss": "mse",
}


class Contexts(Sequence):
    """Windows that end at (N, 2) places, series and step: (T, F) float32, zero where a feature is undefined and before
    a history begins."""

    def __init__(self, series: Sequence[EncodedSeries], places: np.ndarray, length: int):
        self.series, self.places, self.length = series, places, length

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> np.ndarray:
        which, step = self.places[index].tolist()
        window = self.series[which].values[max(step + 1 - self.length, 0) : step + 1]
        return np.pad(np.nan_to_num(window), ((self.length - len(window), 0), (0, 0)))


class DLinear(nn.Module):
    """Zeng, Chen, Zhang & Xu, 2023: trend and remainder of each feature, each through a linear map over time that all
    features share. Theirs then forecasts every feature; here a linear map over features makes one output of it."""

    def __init__(self, length: int, num_features: int, num_outputs: int):
        super().__init__()
        self.trend, self.remainder = nn.Linear(length, num_outputs), nn.Linear(length, num_outputs, bias=False)
        self.features = nn.Parameter(torch.zeros(num_features, num_outputs))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, past_values: torch.Tensor) -> torch.Tensor:
        """(B, T, F) to (B, num_outputs)."""
        series = past_values.transpose(1, 2)
        padded = F.pad(series, (TREND_STEPS // 2, TREND_STEPS // 2), mode="replicate")
        trend = F.avg_pool1d(padded, TREND_STEPS, stride=1)
        through_time = self.trend(trend) + self.remainder(series - trend)  # (B, F, num_outputs)
        return (through_time * self.features).sum(dim=1) + self.bias


class PatchTST(nn.Module):
    """Nie, Nguyen, Sinthong & Kalagnanam, 2023, as transformers has it, with its head for other targets."""

    def __init__(self, length: int, num_features: int, num_outputs: int):
        super().__init__()
        patch = max(min(PATCH_STEPS, length // 4), 1)
        sizes = PATCHTST | {"patch_length": patch, "patch_stride": patch}
        self.network = PatchTSTForRegression(
            PatchTSTConfig(context_length=length, num_input_channels=num_features, num_targets=num_outputs, **sizes)
        )
        nn.init.zeros_(self.network.head.projection.weight)

    @property
    def bias(self) -> nn.Parameter:
        return self.network.head.projection.bias

    def forward(self, past_values: torch.Tensor) -> torch.Tensor:
        """(B, T, F) to (B, num_outputs)."""
        return self.network(past_values).regression_outputs


class QuantileForecaster(nn.Module):
    """Mean and quantiles at each horizon from a network's outputs, and their loss.

    Args:
        network: (B, T, F) to (B, H·(1 + Q)), with its last `bias`.
        targets: (N, H) of the training, in units of scale·sqrt(horizon).
        levels: (Q,) increasing.
    """

    def __init__(self, network: nn.Module, targets: np.ndarray, levels: np.ndarray):
        super().__init__()
        self.network = network
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32))
        marginal = np.concatenate([targets.mean(axis=0)[:, None], np.quantile(targets, levels, axis=0).T], axis=1)
        with torch.no_grad():
            network.bias.copy_(torch.from_numpy(marginal).flatten())

    def forward(self, past_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """(B, T, F) and (B, H) to outputs (B, H, 1 + Q), the mean first, and the loss: squared error and pinball."""
        outputs = self.network(past_values).unflatten(1, (-1, 1 + len(self.levels)))
        if labels is None:
            return {"outputs": outputs}
        error = labels.unsqueeze(-1) - outputs
        pinball = torch.maximum(self.levels * error[..., 1:], (self.levels - 1) * error[..., 1:])
        return {"loss": error[..., 0].square().mean() + pinball.mean(), "outputs": outputs}


class _Examples(Dataset):
    def __init__(self, windows: Sequence[np.ndarray], targets: np.ndarray, rows: np.ndarray):
        self.windows, self.targets, self.rows = windows, targets.astype(np.float32), rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = int(self.rows[index])
        return {"past_values": self.windows[row], "labels": self.targets[row]}


class Trained(NamedTuple):
    """A trained baseline, which forecasts as `Learned` does, from windows and at the levels it was trained at."""

    model: QuantileForecaster
    horizons: list[int]

    @torch.inference_mode()
    def forecast(
        self, windows: Sequence[np.ndarray], scale: np.ndarray, levels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N, H) float32 means and (N, H, Q) float32 quantiles of (N,) windows, in log-returns.

        Quantiles that cross are sorted, which no loss grows by (Chernozhukov, Fernández-Val & Galichon, 2010).
        """
        trained = self.model.levels.cpu().double().numpy().round(6)
        if len(levels) != len(trained) or not np.allclose(trained, levels):
            raise ValueError(f"trained at the levels {trained.tolist()}, not at {list(levels)}")
        device, outputs = self.model.levels.device, []
        for first in range(0, len(windows), BATCH_SIZE):
            batch = [windows[row] for row in range(first, min(first + BATCH_SIZE, len(windows)))]
            outputs.append(self.model(torch.from_numpy(np.stack(batch)).to(device))["outputs"].cpu())
        outputs = torch.cat(outputs).numpy() * (scale[:, None] * np.sqrt(np.float32(self.horizons)))[..., None]
        return outputs[..., 0], np.sort(outputs[..., 1:], axis=-1)


def train_neural(
    network: type[nn.Module],
    days: np.ndarray,
    windows: Sequence[np.ndarray],
    targets: np.ndarray,
    horizons: list[int],
    levels: np.ndarray,
) -> Trained:
    """Trains to the epoch that serves the tail of the training dates best, and never on that tail.

    Args:
        network: its class.
        days: (N,) dates of the windows' last steps, in any order, repeated over tickers.
        windows: (N,) arrays (T, F) float32, normalised, zero where undefined.
        targets: (N, H) log-returns from each last step, in units of scale·sqrt(horizon).
        horizons: (H,) steps ahead.
        levels: (Q,) increasing.

    Raises:
        ValueError: a target that is not finite, or too few windows in the tail of the dates or before it.
    """
    refuse_not_finite(targets)
    rows = evenly_spaced(len(days), MAX_WINDOWS)
    fit, tail = (rows[mask] for mask in split_tail(days[rows], max(horizons)))
    with torch.random.fork_rng(), TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        length, num_features = windows[0].shape
        outputs = network(length, num_features, len(horizons) * (1 + len(levels)))
        model = QuantileForecaster(outputs, targets[fit], levels)
        trainer = Trainer(
            model=model,
            args=_arguments(folder),
            train_dataset=_Examples(windows, targets, fit),
            eval_dataset=_Examples(windows, targets, tail),
            callbacks=[EarlyStoppingCallback(early_stopping_patience=PATIENCE)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Trained(model.eval(), list(horizons))


def _arguments(folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=MAX_EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=SEED,
        report_to="none",
        disable_tqdm=True,
    )


NEURAL = {"dlinear": partial(train_neural, DLinear), "patchtst": partial(train_neural, PatchTST)}
