"""Supervised training of the forecaster on one or many tickers.

    accelerate launch train/sft.py --config recipes/tiny/sft.yaml [--tickers AAPL,MSFT] [--output_dir DIR]

The output folder is a model repository: it loads with `trust_remote_code=True` where this package is not installed.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainingArguments, set_seed

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.prices import load_prices
from spaceexploreai.data.windows import Split, WindowDataset, chronological_split, supervised_windows
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.train.arguments import DataArguments, ModelArguments, command, parse_run


def make_config(model_args: ModelArguments, extractor: SpaceExploreFeatureExtractor) -> SpaceExploreConfig:
    """Reads the network's configuration: of the checkpoint to continue from, or of the recipe."""
    if model_args.model_name_or_path is not None:
        config = SpaceExploreConfig.from_pretrained(model_args.model_name_or_path)
    else:
        with open(model_args.model_config) as file:
            config = SpaceExploreConfig(**{"num_features": len(extractor.feature_names), **json.load(file)})
    if config.num_features != len(extractor.feature_names):
        raise ValueError(
            f"the network takes {config.num_features} features, the data have {len(extractor.feature_names)}"
        )
    if extractor.context_length > config.max_position_embeddings:
        raise ValueError(
            f"context_length {extractor.context_length} is longer than "
            f"max_position_embeddings {config.max_position_embeddings}"
        )
    return config


def make_extractor(model_args: ModelArguments, data_args: DataArguments) -> SpaceExploreFeatureExtractor:
    """A checkpoint keeps its columns and their statistics; otherwise all columns, to be fitted."""
    if model_args.model_name_or_path is not None:
        return SpaceExploreFeatureExtractor.from_pretrained(model_args.model_name_or_path)
    return SpaceExploreFeatureExtractor(normalization=data_args.normalization, context_length=data_args.context_length)


def make_model(
    model_args: ModelArguments, config: SpaceExploreConfig, windows: WindowDataset
) -> SpaceExploreForRegression:
    """The checkpoint to continue from, or a new network that starts from the marginal distribution of its targets."""
    if model_args.model_name_or_path is not None:
        model = SpaceExploreForRegression.from_pretrained(model_args.model_name_or_path, config=config)
    else:
        model = SpaceExploreForRegression(config)
        targets = windows.scaled_targets(list(config.horizons))
        quantiles = np.quantile(targets, config.quantile_levels, axis=0).T.astype(np.float32)
        model.start_from_marginal(torch.from_numpy(targets.mean(axis=0)), torch.from_numpy(quantiles))
    if config.t2t_loss_weight and not model.model.t2t.num_batches_tracked:
        raise ValueError(
            f"t2t_loss_weight={config.t2t_loss_weight} needs a trained time-to-text extractor; this one never was"
        )
    return model


def make_datasets(
    data_args: DataArguments, extractor: SpaceExploreFeatureExtractor, horizons: list[int], target: str = "log_return"
):
    """Prices to the split and its training and validation windows; fits the extractor on training dates alone."""
    prices = load_prices(data_args.prices, data_args.tickers)
    split = chronological_split(prices["date"], horizons[-1], data_args.validation_fraction, data_args.test_fraction)
    features = extractor.compute_features(prices)
    if extractor.center is None:
        extractor.fit(features[features["date"] <= split.train.end])
    series = extractor.encode(prices, features)
    windows = [
        supervised_windows(series, horizons, dates, extractor.context_length, data_args.stride, score_once, target)
        for dates, score_once in ((split.train, False), (split.validation, True))
    ]
    return split, *windows


def record_cutoffs(config: SpaceExploreConfig, split: Split) -> None:
    """Notes the last dates seen. What a checkpoint saw before stays seen, also when it goes on with older data."""
    for name, dates in (("train_cutoff", split.train), ("selection_cutoff", split.validation)):
        setattr(config, name, max(getattr(config, name) or "", dates.end.date().isoformat()))


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Trainer:
    """Trains; `training_args.output_dir` receives the intermediate checkpoints."""
    set_seed(training_args.seed)
    extractor = make_extractor(model_args, data_args)
    config = make_config(model_args, extractor)
    split, train_windows, validation_windows = make_datasets(
        data_args, extractor, list(config.horizons), config.target
    )
    record_cutoffs(config, split)
    trainer = Trainer(
        model=make_model(model_args, config, train_windows),
        args=training_args,
        data_collator=collate_windows,
        train_dataset=train_windows,
        eval_dataset=validation_windows,
        processing_class=extractor,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    return trainer


def save_checkpoint(trainer: Trainer, folder: str | Path) -> None:
    """Writes the model repository: weights, configurations and code."""
    # Not trainer.save_model, which adds a pickle of the arguments.
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)


@command
def main(argv: list[str] | None = None) -> None:
    model_args, data_args, training_args = parse_run(argv)
    trainer = train(model_args, data_args, training_args)
    save_checkpoint(trainer, training_args.output_dir)


if __name__ == "__main__":
    main()
