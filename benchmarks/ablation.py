"""What each part of the network is worth on real data: the full network and five without one of its parts.

    python benchmarks/ablation.py --prices market.parquet [--steps 500] [--seeds 0 1 2] [--variants full dense]

Every variant gets the same windows in the same order for the same number of steps and is scored once, at the end, on
the validation dates; the test dates are not touched. Figures are the share by which the pinball loss lies below that
of the quantiles of the training targets, the EWMA-volatility baseline: returns are in units of that volatility.
"""

import json
import tempfile
from argparse import Namespace
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.windows import WindowDataset
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression, pinball_loss
from spaceexploreai.train.arguments import DataArguments, ModelArguments, command, make_parser
from spaceexploreai.train.sft import make_datasets, make_model

# One dense layer and two with experts. No extractor: it would teach nothing without a training of its own.
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
}


def last_position_only(windows: WindowDataset) -> WindowDataset:
    return WindowDataset(windows.series, windows.ends, windows.context_length, windows.labels, supervised_steps=1)


def train_variant(name: str, seed: int, windows: WindowDataset, options: Namespace) -> SpaceExploreForRegression:
    set_seed(seed)
    config = SpaceExploreConfig(num_features=windows.series[0].values.shape[1], **SMALL | VARIANTS[name])
    model = make_model(ModelArguments(), config, windows)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
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
            windows = last_position_only(windows)
        Trainer(model, arguments, data_collator=collate_windows, train_dataset=windows).train()
    return model.eval()


@torch.inference_mode()
def pinball(model: SpaceExploreForRegression | torch.Tensor, windows: WindowDataset, config) -> np.ndarray:
    """Mean pinball loss at each horizon, (H,), of a network or of (H, Q) constant quantiles."""
    horizons, levels = list(config.horizons), torch.tensor(config.quantile_levels)
    total, count = torch.zeros(len(horizons)), torch.zeros(len(horizons))
    for batch in DataLoader(windows, batch_size=128, collate_fn=collate_windows):
        labels, scale = batch.pop("labels"), batch.pop("scale")
        quantiles = model if isinstance(model, torch.Tensor) else model(**batch).quantiles
        known = labels != -100
        targets = torch.where(known, labels / (scale[..., None] * torch.tensor(horizons).sqrt()), 0.0)
        losses = pinball_loss(targets, quantiles.expand(*targets.shape, -1), levels)
        total += torch.where(known, losses, 0.0).sum(dim=(0, 1))
        count += known.sum(dim=(0, 1))
    return (total / count).numpy()


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
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", help="JSON lines of the single runs, to which this one's are added")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)

    data_args = DataArguments(prices=options.prices, tickers=options.tickers, stride=64)
    config, extractor = SpaceExploreConfig(**SMALL), SpaceExploreFeatureExtractor()
    split, train_windows, validation_windows = make_datasets(data_args, extractor, list(config.horizons))
    dates = split.validation
    print(f"train to {split.train.end.date()}, validation {dates.start.date()} to {dates.end.date()}")
    targets = train_windows.scaled_targets(list(config.horizons))
    marginal = torch.from_numpy(np.quantile(targets, config.quantile_levels, axis=0).T.astype(np.float32))
    baseline = pinball(marginal, validation_windows, config)
    runs = []
    for seed, name in product(options.seeds, options.variants):
        model = train_variant(name, seed, train_windows, options)
        skill = 100 * (1 - pinball(model, validation_windows, config) / baseline)
        days = {f"{horizon} d (%)": float(value) for horizon, value in zip(config.horizons, skill, strict=True)}
        runs.append({"variant": name, "seed": seed, "parameters": model.num_parameters(), **days})
        print(json.dumps(runs[-1]), flush=True)
        if options.output:
            with open(options.output, "a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    print(report(pd.DataFrame(runs)))


if __name__ == "__main__":
    main()
