"""What each part of the network is worth on real data: the full network, others without one of its parts, with the
alignment of the time-to-text extractor, and with averaged weights.

    python benchmarks/ablation.py --dataset DIR [--steps 500] [--seeds 0 1 2] [--variants full "dense for moe"]
        [--decays 0.99 0.995] [--scheduler constant_with_warmup] [--extractor DIR --variants full t2t]

Every variant gets the same windows in the same order for the same number of steps and is scored once, at the end, on
the validation dates; the test dates are not touched. `--decays` scores, beside the weights of the last step, their
exponential moving averages of the same run. Figures are the share by which the pinball loss lies below that of the
quantiles of the training targets, the EWMA-volatility baseline: returns are in units of that volatility.
"""

import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.stocks import open_stocks
from spaceexploreai.data.windows import IGNORE_INDEX
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression, pinball_loss
from spaceexploreai.train.arguments import bare_parser, command

# One dense layer and two with experts. Without an extractor, which teaches nothing unless it was trained: `t2t` alone
# has one.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 64,
    "mscnn_num_blocks": 2,
    "t2t_num_hidden_layers": 0,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
# `dense` is as wide as the experts that a token sees: one shared and two routed.
VARIANTS = {
    "full": {},
    "no mscnn": {"mscnn_num_blocks": 0},
    "no wavelet": {"wavelet_levels": 0},
    "mha for mla": {"attention_type": "mha"},
    "dense for moe": {"first_k_dense_replace": SMALL["num_hidden_layers"]},
    "last position only": {},
    "t2t": {"t2t_loss_weight": 0.1},
}


class LastPositionOnly(Dataset):
    def __init__(self, windows: Dataset):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self.windows[index]
        labels = np.full_like(example["labels"], IGNORE_INDEX)
        labels[-1] = example["labels"][-1]
        return {**example, "labels": labels}


class Averages(TrainerCallback):
    """Exponential moving averages of the weights (Polyak & Juditsky, 1992, with decay)."""

    def __init__(self, model: SpaceExploreForRegression, decays: list[float]):
        self.models = {
            decay: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) for decay in decays
        }

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for average in self.models.values():
            average.update_parameters(model)


def make_network(name: str, extractor: str | None, windows: Dataset, marginal: torch.Tensor, mean: torch.Tensor):
    fields = {"num_features": windows[0]["past_values"].shape[1], **SMALL | VARIANTS[name]}
    if name != "t2t":
        model = SpaceExploreForRegression(SpaceExploreConfig(**fields))
    else:
        trained = SpaceExploreConfig.from_pretrained(extractor)
        t2t = {field: getattr(trained, field) for field in SpaceExploreConfig.__annotations__ if field[:3] == "t2t"}
        model = SpaceExploreForRegression(SpaceExploreConfig(**{**t2t, **fields}))
        model.model.t2t.load_state_dict(SpaceExploreForRegression.from_pretrained(extractor).model.t2t.state_dict())
        model.finish_loading()
    model.start_from_marginal(mean, marginal)
    return model


def train_variant(name: str, seed: int, model: SpaceExploreForRegression, windows: Dataset, options: Namespace):
    """Trains the model; yields names and networks to score, its averages among them."""
    averages = Averages(model, options.decays)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type=options.scheduler,
            warmup_steps=options.steps // 20,
            weight_decay=0.1,
            seed=seed,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            logging_strategy="no",
        )
        if name == "last position only":
            windows = LastPositionOnly(windows)
        Trainer(model, arguments, collate_windows, windows, callbacks=[averages]).train()
    yield name, model.eval()
    for decay, average in averages.models.items():
        yield f"{name}, average {decay}", average.module.eval()


@torch.inference_mode()
def pinball(
    model: SpaceExploreForRegression | torch.Tensor, windows: Dataset, config: SpaceExploreConfig
) -> np.ndarray:
    """Mean pinball loss at each horizon, (H,), of a network or of (H, Q) constant quantiles."""
    horizons, levels = list(config.horizons), torch.tensor(config.quantile_levels)
    total, count = torch.zeros(len(horizons)), torch.zeros(len(horizons))
    for batch in DataLoader(windows, batch_size=128, collate_fn=collate_windows):
        labels, scale = batch.pop("labels"), batch.pop("scale")
        quantiles = model if isinstance(model, torch.Tensor) else model(**batch).quantiles
        known = labels != IGNORE_INDEX
        targets = torch.where(known, labels / (scale[..., None] * torch.tensor(horizons).sqrt()), 0.0)
        losses = pinball_loss(targets, quantiles.expand(*targets.shape, -1), levels)
        total += torch.where(known, losses, 0.0).sum(dim=(0, 1))
        count += known.sum(dim=(0, 1))
    return (total / count).numpy()


def compare(options: Namespace) -> Iterator[dict]:
    """The skills of every variant and seed, one after the other."""
    data, config = open_stocks(options.dataset), SpaceExploreConfig(**SMALL)
    horizons, dates = list(config.horizons), data.split.validation
    if data.horizons != horizons:
        raise ValueError(f"the networks predict {horizons} steps ahead, {options.dataset} has {data.horizons}")
    print(f"train to {data.split.train.end.date()}, validation {dates.start.date()} to {dates.end.date()}")
    targets = data.train.scaled_targets(horizons)
    marginal = torch.from_numpy(np.quantile(targets, config.quantile_levels, axis=0).T.astype(np.float32))
    baseline = pinball(marginal, data.validation, config)
    for seed, variant in product(options.seeds, options.variants):
        set_seed(seed)
        model = make_network(variant, options.extractor, data.train, marginal, torch.from_numpy(targets.mean(axis=0)))
        for name, network in train_variant(variant, seed, model, data.train, options):
            skill = 100 * (1 - pinball(network, data.validation, config) / baseline)
            days = {f"{horizon} d (%)": float(value) for horizon, value in zip(horizons, skill, strict=True)}
            yield {"variant": name, "seed": seed, "parameters": network.num_parameters(), **days}


def report(runs: pd.DataFrame) -> str:
    """Mean skill over the seeds, and its difference from the full network's, seed by seed, with its standard error."""
    skills = runs.drop(columns=["variant", "seed", "parameters"])
    full = runs[runs["variant"] == "full"].set_index("seed")[skills.columns]
    rows = []
    for variant, group in runs.groupby("variant", sort=False):
        difference = group.set_index("seed")[skills.columns] - full
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        cells = [
            f"{group[name].mean():+.2f} ({difference[name].mean():+.2f} ± {error[name]:.2f})"
            for name in skills.columns
        ]
        rows.append([variant, f"{group['parameters'].iloc[0]:,}", *cells])
    return pd.DataFrame(rows, columns=["variant", "parameters", *skills.columns]).to_string(index=False)


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="folder of scripts/build_dataset.py")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--scheduler", default="cosine", help="lr_scheduler_type of TrainingArguments")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=[name for name in VARIANTS if name != "t2t"])
    parser.add_argument("--decays", type=float, nargs="*", default=[], help="of averaged weights")
    parser.add_argument("--extractor", help="checkpoint of train/t2t.py, for the variant t2t")
    parser.add_argument("--output", help="JSON lines of the single runs, to which this one's are added")
    options = parser.parse_args(argv)
    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown:
        raise ValueError(f"variants are {', '.join(VARIANTS)}, got {unknown[0]!r}")
    if "t2t" in options.variants and options.extractor is None:
        raise ValueError("the variant t2t needs an --extractor")
    torch.set_num_threads(1)
    runs = []
    for run in compare(options):
        runs.append(run)
        print(json.dumps(run), flush=True)
        if options.output:
            with open(options.output, "a") as file:
                file.write(json.dumps(run) + "\n")
    print(report(pd.DataFrame(runs)))


if __name__ == "__main__":
    main()
