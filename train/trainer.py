"""Trainer with what it has no option for: balanced windows, the experts' load, and a name for what broke a loss."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer

from spaceexploreai.data.stocks import StoredWindows
from spaceexploreai.pipeline_spaceexplore import add_pipeline


class SpaceExploreTrainer(Trainer):
    """Trains one of the heads on windows.

    Args:
        weights: (N,) relative frequency of each training window; all alike by default.
        tokenizer: of a language model, saved with it.
    """

    def __init__(self, *args, weights=None, tokenizer=None, train_dataset=None, data_collator=None, **kwargs):
        self.weights, self.tokenizer = weights, tokenizer
        self.loads = []
        super().__init__(
            *args, train_dataset=Numbered(train_dataset), data_collator=NumberedCollator(data_collator), **kwargs
        )
        self.args.remove_unused_columns = False  # transformers' default; a collator here takes what it needs

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        if self.weights is None:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return BalancedSampler(self.weights, seed)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self.weights is not None:
            # accelerate does this with samplers of its own; else several processes resume an epoch in another's order.
            loader.set_sampler(self._get_train_sampler())
        return loader

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs) -> DataLoader:
        """Training alone may drop the windows that fill no batch: metrics are those of all."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        self.args.dataloader_drop_last = drop_last
        return loader

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            # Sharding makes the class anew, as one of torch's: the library would put torch's code beside the weights.
            sharded = type(self.model)
            original = sharded.__mro__[2]
            sharded.__module__, sharded.__name__ = original.__module__, original.__name__
        return prepared

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows = inputs.pop("row", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            if not torch.isfinite(loss):
                raise ValueError(self.explain(model, inputs, rows, loss))
            self.record_load(model, inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def explain(self, model, inputs: dict[str, torch.Tensor], rows: torch.Tensor, loss: torch.Tensor) -> str:
        """Which windows of the batch have a loss that is no number, each by itself."""
        broken, network = [], self.accelerator.unwrap_model(model)  # wrapped, it would wait for the other processes
        if not self.is_fsdp_enabled:  # and so it would in parts
            batch = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
            with torch.no_grad():
                alone = [
                    network(**{name: value[[one]] for name, value in batch.items()}).loss for one in range(len(rows))
                ]
            broken = [row for row, one in zip(rows.tolist(), alone, strict=True) if not torch.isfinite(one)]
        windows = ", ".join(self.train_dataset.name(row) for row in (broken or rows.tolist())[:5])
        return f"the loss is {loss.item()} at step {self.state.global_step + 1}, of the windows {windows}"

    def record_load(self, model, inputs: dict[str, torch.Tensor], outputs) -> None:
        if outputs.get("router_logits"):
            head = self.accelerator.unwrap_model(model)
            self.loads.append(head.expert_load(outputs["router_logits"], inputs.get("attention_mask")))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds how far the experts are from balance, where their share of the choices would be 1 of this."""
        if self.loads and "loss" in logs:
            load = torch.stack(self.loads).mean(dim=0) * self.loads[0].shape[-1]
            logs |= {"expert_load_max": load.max().item(), "expert_load_min": load.min().item()}
            self.loads.clear()
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics, trial):
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:  # it names those that there are
            raise ValueError(error.args[0]) from None

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        try:
            with told("write", folder):
                super()._save_checkpoint(model, trial)
        except OSError:
            # A half-written one would be taken for the newest when training is resumed.
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save(self, output_dir=None, state_dict=None):
        model, folder = self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir)
        if self.args.should_save and isinstance(model, PreTrainedModel):  # and no adapter
            folder.mkdir(parents=True, exist_ok=True)
            add_pipeline(model, folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
        super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # What is written next says that the checkpoint is whole.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with told("read", resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with told("read", checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with told("read", checkpoint):
            super()._load_rng_state(checkpoint)


class TimeToTextTrainer(SpaceExploreTrainer):
    """Trains the time-to-text extractor. What its metrics need of a batch is not in the outputs alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.label_names = ["returns"]  # without a label by name, evaluation would have no loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The outputs, then the values of all patches (B, P, L, F), and which steps (B, P, L) are real and hidden."""
        loss, outputs, returns = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        inputs, head = self._prepare_inputs(inputs), self.accelerator.unwrap_model(model)
        patches, real = head.model.t2t.cut(inputs["past_values"], inputs["attention_mask"])
        _, _, visible = outputs
        hidden = head.decoder.hidden_steps(real, visible, head.model.t2t.stride)
        return loss, (*outputs, patches, real, hidden), returns


@contextmanager
def told(what: str, folder: str | Path | None) -> Iterator[None]:
    """What torch and safetensors raise at a damaged file or a full disk, as an error that names the folder."""
    try:
        yield
    except Exception as error:  # torch alone has half a dozen kinds
        raise OSError(f"cannot {what} {folder}: {error}") from error


class Numbered(Dataset):
    """Windows with their numbers."""

    def __init__(self, windows: Dataset):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[int, dict]:
        return index, self.windows[index]

    def name(self, index: int) -> str:
        which, first, last, _ = self.windows.rows[index].tolist()
        history = self.windows.series.steps(which, first, last + 1)
        first, last = (np.datetime_as_string(day, unit="D") for day in history.dates[[0, -1]])
        return f"{history.ticker} {first} to {last}"


class NumberedCollator:
    def __init__(self, collate):
        self.collate = collate

    def __call__(self, examples: list) -> dict[str, torch.Tensor]:
        if not isinstance(examples[0], tuple):  # of evaluation
            return self.collate(examples)
        rows, examples = zip(*examples, strict=True)
        return {**self.collate(list(examples)), "row": torch.tensor(rows)}


class BalancedSampler(Sampler):
    """As many draws an epoch as there are windows, each as often as its weight says, in a random order.

    Systematic sampling: a window comes floor or ceil of its expected number of times. The order depends on seed and
    epoch alone, so that all processes share it and a resumed run goes on with it.
    """

    def __init__(self, weights: np.ndarray, seed: int):
        self.shares = np.cumsum(weights / weights.sum()) * len(weights)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        points = generator.random() + np.arange(len(self))
        drawn = np.searchsorted(self.shares, points, side="right").clip(max=len(self) - 1)
        return iter(generator.permutation(drawn).tolist())


def balanced_weights(windows: StoredWindows, balance: list[str]) -> np.ndarray:
    """(N,) weights that let each ticker, or each year, weigh the same; of both, the product."""
    groups = {"ticker": windows.rows[:, 0], "year": years_of(windows)}
    weights = np.ones(len(windows))
    for name in balance:
        _, group, counts = np.unique(groups[name], return_inverse=True, return_counts=True)
        weights /= counts[group]
    return weights


def years_of(windows: StoredWindows) -> np.ndarray:
    """(N,) year of each window's last step."""
    years = np.empty(len(windows), dtype=int)
    for which in np.unique(windows.rows[:, 0]).tolist():
        rows = windows.rows[:, 0] == which
        years[rows] = windows.series[which].dates[windows.rows[rows, 2]].astype("datetime64[Y]").astype(int)
    return years
