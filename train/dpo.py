"""Alignment of a causal language model of returns with preference pairs, by TRL's own trainer.

    accelerate launch train/dpo.py --config recipes/tiny/dpo.yaml --model_name_or_path CHECKPOINT
        [--dataset DIR | --prices FILE_OR_DIR --universe nasdaq100|sp500|dow30|FILE|all]
        [--beta 0.5 --loss_type sigmoid sft] [--output_dir DIR] [--resume_from_checkpoint true]

DIR is a folder of `scripts/build_preferences.py`, whose pairs are the model's own samples, or of
`scripts/build_dataset.py`. Every other option is one of TRL's `DPOConfig`. The output folder is a model repository
with a report: the model before and after, and what else would have done it, on dates that no pair knows.
"""

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import PreferenceCollator
from spaceexploreai.data.download import universe_tickers
from spaceexploreai.data.stocks import PairData, build_pairs, open_pairs
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForCausalLM
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer
from spaceexploreai.train.alignment_report import (
    ALIGNED,
    BEFORE,
    CONTINUED,
    RANDOMISED,
    Measured,
    held_back_origins,
    measure,
    write_report,
)
from spaceexploreai.train.arguments import Run, command, parse_run
from spaceexploreai.train.lora import adapter_config, merged
from spaceexploreai.train.sampling import check_dates, language_config
from spaceexploreai.train.sft import (
    check_machine,
    check_statistics,
    end_processes,
    fit,
    record_cutoffs,
    refuse_sharded_adapter,
    save_checkpoint,
    stocks_options,
)


@dataclass
class PreferenceArguments:
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to stay near; by default the one that is aligned"}
    )
    universe: str = field(
        default="nasdaq100",
        metadata={"help": "make pairs of nasdaq100, sp500, dow30, the tickers of a text file, or all, of the prices"},
    )
    controls: bool = field(
        default=False, metadata={"help": "train on randomised labels, and supervised, for as many steps, to compare"}
    )
    num_samples: int = field(default=64, metadata={"help": "paths that a forecast of the report consists of"})

    def __post_init__(self):
        if self.num_samples < 20:
            raise ValueError(f"a 90 % interval needs num_samples of at least 20, got {self.num_samples}")


def parse_dpo(argv: list[str] | None = None) -> Run:
    run = parse_run(argv, PreferenceArguments, DPOConfig)
    checkpoint, training = run.model.model_name_or_path, run.training
    if checkpoint is None:
        raise ValueError(f"alignment changes a trained network: give model_name_or_path, not {run.model.model_config}")
    if run.model.t2t_loss_weight is not None:
        raise ValueError(f"t2t_loss_weight {run.model.t2t_loss_weight} is of supervised training")
    if training.remove_unused_columns:
        raise ValueError("remove_unused_columns true removes the columns that tell a pair's numeric context")
    return run


# --- the data ---


def open_data(run: Run, config: SpaceExploreConfig) -> PairData:
    """The pairs to align with, of dates that the model was trained on."""
    checkpoint = run.model.model_name_or_path
    if run.data.dataset is not None:
        data = open_pairs(run.data.dataset)
        remedy = f"build it with --extractor {checkpoint}"
        check_statistics(data.extractor, checkpoint, f"{run.data.dataset}: {remedy}")
    else:
        universe = run.objective.universe
        tickers = None if universe == "all" else universe_tickers(universe)
        options = stocks_options(checkpoint, run.data)
        data = build_pairs(**options, horizons=list(config.horizons), pair_tickers=tickers)
    check_dates(config, data.split, checkpoint)
    longest = data.extractor.context_length + 1 + data.horizons[-1]
    if run.training.max_length is not None and run.training.max_length < longest:
        raise ValueError(
            f"max_length {run.training.max_length} would cut the {longest} tokens of a context and a path"
        )
    return data


def randomised(pairs: Dataset, seed: int) -> Dataset:
    """The pairs with chosen and rejected exchanged by the toss of a coin."""
    tossed = np.random.default_rng(seed).random(len(pairs)) < 0.5

    def exchange(row: dict, index: int) -> dict:
        return {"chosen": row["rejected"], "rejected": row["chosen"]} if tossed[index] else {}

    return pairs.map(exchange, with_indices=True)


# --- the models ---


def load_config(checkpoint: str) -> SpaceExploreConfig:
    config = language_config(checkpoint)
    # The extractor teaches in supervised training alone; here its projection would have no gradient.
    config.t2t_loss_weight = 0.0
    return config


def load_tokenizer(checkpoint: str) -> SpaceExploreTokenizer:
    tokenizer = SpaceExploreTokenizer.from_pretrained(checkpoint)
    if tokenizer.edges != SpaceExploreTokenizer().edges:
        raise ValueError(f"{checkpoint} has bins of its own, pairs are in the default ones")
    return tokenizer


def load_model(checkpoint: str, config: SpaceExploreConfig, dropout: bool) -> SpaceExploreForCausalLM:
    model = SpaceExploreForCausalLM.from_pretrained(checkpoint, config=config)
    for module in model.modules():
        # TRL switches the layers off, but not the probability that attention is given, nor the noise.
        for name in ("attention_dropout", "input_noise"):
            if not dropout and hasattr(module, name):
                setattr(module, name, 0.0)
    return model


def load_reference(run: Run, model: PreTrainedModel) -> PreTrainedModel | None:
    """What the aligned model is to stay near. Without one, TRL takes the model with its adapter off, or what it said
    before the first step (`precompute_ref_log_probs`)."""
    other = run.objective.ref_model_name_or_path
    if other is None:
        given = run.model.peft is not None or run.training.precompute_ref_log_probs
        return None if given else copy.deepcopy(model)
    check_statistics(
        SpaceExploreFeatureExtractor.from_pretrained(run.model.model_name_or_path), other, run.model.model_name_or_path
    )
    load_tokenizer(other)
    return load_model(other, load_config(other), dropout=False)


def aligned_model(trainer: DPOTrainer) -> PreTrainedModel:
    """The trained network by itself."""
    model = merged(trainer.accelerator.unwrap_model(trainer.model))
    vars(model).pop("forward", None)  # TRL's, of the network that it was put on
    return model


# --- training ---


class SaveExtractor(TrainerCallback):
    """Puts the extractor into intermediate checkpoints: without its statistics a network is no model."""

    def __init__(self, extractor: SpaceExploreFeatureExtractor):
        self.extractor = extractor

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.extractor.save_pretrained(Path(args.output_dir, f"checkpoint-{state.global_step}"))


def make_trainer(run: Run, data: PairData, config: SpaceExploreConfig, pairs: Dataset) -> DPOTrainer:
    set_seed(run.training.seed)
    checkpoint = run.model.model_name_or_path
    model = load_model(checkpoint, copy.deepcopy(config), dropout=not run.training.disable_dropout)
    tokenizer = load_tokenizer(checkpoint)
    trainer = DPOTrainer(
        model=model,
        ref_model=load_reference(run, model),
        args=run.training,
        data_collator=PreferenceCollator(data.series, tokenizer),
        train_dataset=pairs,
        eval_dataset=data.pairs["validation"],
        processing_class=tokenizer,
        peft_config=None if run.model.peft is None else adapter_config(model, run.model.peft),
        callbacks=[SaveExtractor(data.extractor)],
    )
    refuse_sharded_adapter(trainer, run)
    return trainer


def prepare(run: Run) -> tuple[DPOTrainer, PairData, SpaceExploreConfig]:
    check_machine(run.training)
    config = load_config(run.model.model_name_or_path)
    load_tokenizer(run.model.model_name_or_path)
    with run.training.main_process_first(desc="the pairs"):  # the others find them in the cache
        data = open_data(run, config)
    if run.training.process_index == 0:
        print(data.cleaning, file=sys.stderr)
    held_back_origins(data)  # none would be found out after training
    record_cutoffs(config, data.split, data.extractor.fitted_until)
    return make_trainer(run, data, config, data.pairs["train"]), data, config


def train(run: Run) -> tuple[DPOTrainer, PairData, SpaceExploreConfig]:
    trainer, data, config = prepare(run)
    fit(trainer, data, run)
    return trainer, data, config


def train_controls(run: Run, data: PairData, config: SpaceExploreConfig) -> dict[str, DPOTrainer]:
    """What else would do as much: the same steps with labels that say nothing, and without labels."""
    trainers = {}
    for name, loss_type in ((RANDOMISED, None), (CONTINUED, ["sft"])):
        training = copy.copy(run.training)
        training.save_strategy, training.load_best_model_at_end = "no", False
        pairs = randomised(data.pairs["train"], training.seed) if name == RANDOMISED else data.pairs["train"]
        if loss_type is not None:
            training.loss_type, training.loss_weights = loss_type, None
        trainers[name] = make_trainer(run._replace(training=training), data, config, pairs)
        trainers[name].train()
    return trainers


def align(run: Run, folder: str | Path) -> None:
    """Trains, and leaves a model repository with its report in a folder."""
    trainer, data, config = train(run)
    save_checkpoint(trainer, folder, data.extractor, trainer.processing_class)
    trainers = {ALIGNED: trainer} | (train_controls(run, data, config) if run.objective.controls else {})
    if not trainer.is_world_process_zero():
        return
    measured = measure_all(run, trainers, data)
    print(write_report(trainers, measured, data, run, aligned_model(trainer), Path(folder)))


def measure_all(run: Run, trainers: dict[str, DPOTrainer], data: PairData) -> Measured:
    """The model before alignment beside the trained ones, on held-back dates."""
    before = SpaceExploreForCausalLM.from_pretrained(run.model.model_name_or_path).to(run.training.device)
    models = {BEFORE: before} | {name: aligned_model(trainer) for name, trainer in trainers.items()}
    tokenizer = trainers[ALIGNED].processing_class
    return measure(models, tokenizer, data, run.objective.num_samples, run.training.seed)


@command
def main(argv: list[str] | None = None) -> None:
    run = parse_dpo(argv)
    align(run, run.training.output_dir)
    end_processes()


if __name__ == "__main__":
    main()
