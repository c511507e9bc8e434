"""Supervised training of the forecaster on one or many tickers.

    accelerate launch train/sft.py --config recipes/tiny/sft.yaml [--tickers AAPL,MSFT] [--output_dir DIR]

The output folder is a model repository: it loads with `trust_remote_code=True` where this package is not installed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainingArguments, set_seed

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.stocks import StockData, StocksConfig, StoredWindows, build_stocks, open_extractor, open_stocks
from spaceexploreai.data.windows import Split
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.train.arguments import DataArguments, ModelArguments, command, parse_run


def stocks_options(model_args: ModelArguments, data_args: DataArguments) -> dict:
    """Options of the dataset, of `StocksConfig`. A checkpoint keeps its columns and their statistics."""
    options = {name: value for name, value in vars(data_args).items() if name != "dataset"}
    return {"extractor": model_args.model_name_or_path, **options}


def make_extractor(model_args: ModelArguments, data_args: DataArguments) -> SpaceExploreFeatureExtractor:
    """The columns of the data; their statistics need not be known yet."""
    if data_args.dataset is not None:
        return open_extractor(data_args.dataset)
    return StocksConfig(**stocks_options(model_args, data_args)).make_extractor()


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


def open_data(model_args: ModelArguments, data_args: DataArguments, config: SpaceExploreConfig) -> StockData:
    """The windows to train on, built from prices or as somebody built them before."""
    if data_args.dataset is None:
        labels = {"horizons": list(config.horizons), "target": config.target}
        return build_stocks(**stocks_options(model_args, data_args), **labels)
    data = open_stocks(data_args.dataset)
    if (data.horizons, data.target) != (list(config.horizons), config.target):
        raise ValueError(
            f"the network predicts {config.target} {list(config.horizons)} steps ahead, "
            f"{data_args.dataset} has {data.target} {data.horizons} steps ahead"
        )
    if model_args.model_name_or_path is not None:
        check_statistics(data.extractor, model_args.model_name_or_path, data_args.dataset)
    return data


def check_statistics(extractor: SpaceExploreFeatureExtractor, checkpoint: str, dataset: str) -> None:
    """Refuses a dataset that looks other to the network than what it was trained on."""
    own = SpaceExploreFeatureExtractor.from_pretrained(checkpoint)
    for name in ("feature_names", "center", "spread", "clip"):
        if getattr(extractor, name) != getattr(own, name):
            raise ValueError(
                f"{name} of {dataset} is not that of {checkpoint}: build it with --extractor {checkpoint}"
            )


def make_model(
    model_args: ModelArguments, config: SpaceExploreConfig, windows: StoredWindows
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


def record_cutoffs(config: SpaceExploreConfig, split: Split) -> None:
    """Notes the last dates seen. What a checkpoint saw before stays seen, also when it goes on with older data."""
    for name, dates in (("train_cutoff", split.train), ("selection_cutoff", split.validation)):
        setattr(config, name, max(getattr(config, name) or "", dates.end.date().isoformat()))


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Trainer:
    """Trains; `training_args.output_dir` receives the intermediate checkpoints."""
    set_seed(training_args.seed)
    config = make_config(model_args, make_extractor(model_args, data_args))
    with training_args.main_process_first(desc="the dataset"):  # the others find it in the cache
        data = open_data(model_args, data_args, config)
    if training_args.process_index == 0:
        print(data.cleaning, file=sys.stderr)
    record_cutoffs(config, data.split)
    trainer = Trainer(
        model=make_model(model_args, config, data.train),
        args=training_args,
        data_collator=collate_windows,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.extractor,
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
