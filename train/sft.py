"""Supervised training of a forecaster on one or many tickers.

    accelerate launch train/sft.py --config recipes/tiny/sft.yaml [--task regression|classification|causal_lm]
        [--dataset DIR | --prices FILE_OR_DIR --tickers AAPL,MSFT] [--output_dir DIR] [--resume_from_checkpoint true]

The output folder is a model repository: it loads with `trust_remote_code=True` where this package is not installed.
"""

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import distributed as dist
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import sort_checkpoints

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.files import files_into
from spaceexploreai.data.stocks import StockData, StocksConfig, build_stocks, open_extractor, open_stocks
from spaceexploreai.data.windows import Split
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.pipeline_spaceexplore import add_pipeline
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer
from spaceexploreai.train.arguments import (
    SIZES,
    CommonArguments,
    DataArguments,
    ModelArguments,
    Run,
    command,
    parse_run,
)
from spaceexploreai.train.lora import ADAPTER, add_adapter, has_adapter, merged
from spaceexploreai.train.memory import keep_freed_memory
from spaceexploreai.train.report import write_report
from spaceexploreai.train.tasks import TASKS, Task
from spaceexploreai.train.trainer import SpaceExploreTrainer, balanced_weights

# What makes the numbers that a network sees: another model must not be fed with them.
STATISTICS = ("feature_names", "center", "spread", "clip")

# --- the network's configuration ---


def make_config(
    model_args: ModelArguments, objective: CommonArguments, extractor: SpaceExploreFeatureExtractor
) -> SpaceExploreConfig:
    """The configuration of the checkpoint to continue from, or of the recipe, with what the run sets in its place."""
    own = {name: getattr(model_args, name) for name in (*SIZES, "t2t_loss_weight")} | {"horizons": objective.horizons}
    fields = {name: value for name, value in own.items() if value is not None} | TASKS[objective.task].fields()
    if model_args.model_name_or_path is not None:
        config = SpaceExploreConfig.from_pretrained(model_args.model_name_or_path, **fields)
        config.validate()  # it was before the fields were set
        check_head(config, objective, model_args.model_name_or_path)
    else:
        with open(model_args.model_config) as file:
            config = SpaceExploreConfig(**{"num_features": len(extractor.feature_names), **json.load(file), **fields})
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


def check_head(config: SpaceExploreConfig, objective: CommonArguments, checkpoint: str) -> None:
    """Refuses another number of horizons than a trained head has."""
    trained = len(SpaceExploreConfig.from_pretrained(checkpoint).horizons)
    if config.architectures == [TASKS[objective.task].head.__name__] and len(config.horizons) != trained:
        raise ValueError(f"horizons {list(config.horizons)} are {len(config.horizons)}, {checkpoint} has {trained}")


# --- the data ---


# `origin` is a checkpoint that keeps its columns and their statistics, if there is one.


def stocks_options(origin: str | None, data_args: DataArguments) -> dict:
    """Options of the dataset, of `StocksConfig`."""
    options = {name: value for name, value in vars(data_args).items() if name != "dataset"}
    return {"extractor": origin, **options}


def make_extractor(origin: str | None, data_args: DataArguments) -> SpaceExploreFeatureExtractor:
    """The columns of the data; their statistics need not be known yet."""
    if data_args.dataset is not None:
        return open_extractor(data_args.dataset)
    return StocksConfig(**stocks_options(origin, data_args)).make_extractor()


def open_data(origin: str | None, data_args: DataArguments, config: SpaceExploreConfig) -> StockData:
    """The windows to train on, built from prices or as somebody built them before."""
    if data_args.dataset is None:
        labels = {"horizons": list(config.horizons), "target": config.target}
        return build_stocks(**stocks_options(origin, data_args), **labels)
    data = open_stocks(data_args.dataset)
    if (data.horizons, data.target) != (list(config.horizons), config.target):
        raise ValueError(
            f"the network predicts {config.target} {list(config.horizons)} steps ahead, "
            f"{data_args.dataset} has {data.target} {data.horizons} steps ahead"
        )
    if origin is not None:
        check_statistics(data.extractor, origin, f"{data_args.dataset}: build it with --extractor {origin}")
    return data


def check_statistics(extractor: SpaceExploreFeatureExtractor, checkpoint: str, other: str) -> None:
    """Refuses data that look other to the network than what it was trained on."""
    own = SpaceExploreFeatureExtractor.from_pretrained(checkpoint)
    for name in STATISTICS:
        if getattr(extractor, name) != getattr(own, name):
            raise ValueError(f"{name} of the checkpoint {checkpoint} is not that of {other}")


# --- the model ---


def make_model(model_args: ModelArguments, config: SpaceExploreConfig, task: Task) -> PreTrainedModel:
    """The checkpoint to continue from, by an adapter alone if told so, or a new network; a head that is new starts
    from the marginal distribution."""
    if model_args.model_name_or_path is None:
        model, new = task.head(config), True
    else:
        model, info = task.head.from_pretrained(model_args.model_name_or_path, config=config, output_loading_info=True)
        new = any(not name.startswith("model.") for name in info["missing_keys"])
        if task.tokenizer is not None and not new:
            check_bins(model_args.model_name_or_path, task.tokenizer)
    if new:
        task.start(model)
    if config.t2t_loss_weight and not model.model.t2t.num_batches_tracked:
        raise ValueError(
            f"t2t_loss_weight={config.t2t_loss_weight} needs a trained time-to-text extractor; this one never was"
        )
    if model_args.peft is None:
        return model
    if new and task.tokenizer is not None:
        raise ValueError(f"{model_args.model_name_or_path} has no vocabulary, and an adapter cannot learn one")
    return add_adapter(model, model_args.peft)


def check_bins(checkpoint: str, tokenizer: SpaceExploreTokenizer) -> None:
    """Refuses a language model that stands for other returns than the tokenizer."""
    theirs = SpaceExploreTokenizer.from_pretrained(checkpoint)
    for name in ("edges", "centers"):
        if not np.array_equal(getattr(theirs, name), getattr(tokenizer, name)):
            raise ValueError(f"the bins of {checkpoint} have other {name} than those of this training")


def record_cutoffs(config: SpaceExploreConfig, split: Split, fitted_until: str | None) -> None:
    """Notes the last dates seen, by the statistics of the features too. What a checkpoint saw before stays seen, also
    when it goes on with older data."""
    for name, dates in (("train_cutoff", split.train), ("selection_cutoff", split.validation)):
        setattr(config, name, max(getattr(config, name) or "", dates.end.date().isoformat()))
    config.train_cutoff = max(config.train_cutoff, fitted_until or "")


# --- training ---


def check_machine(training: TrainingArguments) -> None:
    """Refuses what accelerate ignores, or what would go wrong without its notice: processes that do not know of each
    other would each train alone, and write the same files."""
    if training.fp16 and training.device.type == "cpu":
        raise ValueError("fp16 true needs a GPU, a CPU would go on in float32; bf16 works on both")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != training.world_size:
        raise ValueError(
            f"of {started} processes each would train alone; those on a CPU find each other with --use_cpu true"
        )


def stop_early(patience: int | None, training: TrainingArguments) -> list[EarlyStoppingCallback]:
    if patience is None:
        return []
    if training.eval_strategy == "no" or training.metric_for_best_model is None:
        raise ValueError(f"early_stopping_patience {patience} needs an eval_strategy and a metric_for_best_model")
    training.restore_callback_states_from_checkpoint = True  # a resumed run has the patience that was left
    return [EarlyStoppingCallback(patience)]


def prepare(run: Run) -> tuple[SpaceExploreTrainer, Task, StockData]:
    """The trainer of a run, what it is trained for, and its data."""
    check_machine(run.training)
    set_seed(run.training.seed)
    origin = run.model.model_name_or_path
    config = make_config(run.model, run.objective, make_extractor(origin, run.data))
    data = share_data(run, origin, config)
    task = TASKS[run.objective.task](config, data, run.objective)
    return make_trainer(task.trainer, run, task, data), task, data


def share_data(run: Run, origin: str | None, config: SpaceExploreConfig) -> StockData:
    """The data, which one process prepares for all; the configuration notes their dates."""
    with run.training.main_process_first(desc="the dataset"):  # the others find it in the cache
        data = open_data(origin, run.data, config)
    if run.training.process_index == 0:
        print(data.cleaning, file=sys.stderr)
    record_cutoffs(config, data.split, data.extractor.fitted_until)
    return data


def make_trainer(
    kind: Callable[..., SpaceExploreTrainer], run: Run, task: Task, data: StockData
) -> SpaceExploreTrainer:
    trainer = kind(
        model=make_model(run.model, task.config, task),
        args=run.training,
        data_collator=task.collate,
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=data.extractor,
        compute_metrics=task.score,
        preprocess_logits_for_metrics=task.reduce,
        callbacks=stop_early(run.objective.early_stopping_patience, run.training),
        tokenizer=task.tokenizer,
        weights=balanced_weights(task.train, run.objective.balance) if run.objective.balance else None,
    )
    refuse_sharded_adapter(trainer, run)
    return trainer


def refuse_sharded_adapter(trainer: Trainer, run: Run) -> None:
    if trainer.is_fsdp_enabled and run.model.peft is not None:
        raise ValueError(f"peft {run.model.peft}: an adapter is not trained in parts (FSDP)")


def is_whole(checkpoint: str) -> bool:
    """Whether a checkpoint was written to its end, which is the state of the trainer."""
    try:
        return bool(json.loads(Path(checkpoint, "trainer_state.json").read_bytes()))
    except (OSError, ValueError):
        return False


def newest_checkpoint(folder: str) -> str | None:
    """That of the most steps. A process that is killed while it writes leaves a part of one."""
    checkpoints = sort_checkpoints(folder) if os.path.isdir(folder) else []
    return next(filter(is_whole, reversed(checkpoints)), None)


def checkpoint_to_resume(run: Run, extractor: SpaceExploreFeatureExtractor, config: SpaceExploreConfig) -> str | None:
    """The folder that training goes on from, of the same data and network; `true` names the newest in `output_dir`."""
    given = run.training.resume_from_checkpoint
    if given in (None, False, "false"):
        return None
    output = run.training.output_dir
    folder = newest_checkpoint(output) if given in (True, "true") else given
    if folder is None or not is_whole(folder):
        raise ValueError(f"there is no checkpoint to resume from in {folder or output}")
    if not Path(folder, "scheduler.pt").is_file():
        raise ValueError(f"{folder} has weights alone (save_only_model): continue from it by model_name_or_path")
    check_statistics(extractor, folder, "the data it is to be trained on")
    if not Path(folder, "config.json").is_file():  # of an adapter
        return folder
    # By way of JSON, which makes lists of tuples.
    ours, theirs = (
        json.loads(one.to_json_string(use_diff=False)) for one in (config, type(config).from_pretrained(folder))
    )
    for name in SpaceExploreConfig.__annotations__:  # the network's own, not what the library adds
        if ours[name] != theirs[name]:
            raise ValueError(f"{name} is {ours[name]}, that of the checkpoint {folder} {theirs[name]}")
    return folder


def check_writable(folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder):
        pass


def train(run: Run) -> SpaceExploreTrainer:
    """Trains; `output_dir` receives the intermediate checkpoints."""
    trainer, _, data = prepare(run)
    fit(trainer, data, run)
    return trainer


def fit(trainer: SpaceExploreTrainer, data: StockData, run: Run) -> None:
    checkpoint = checkpoint_to_resume(run, data.extractor, trainer.model.config)
    check_writable(run.training.output_dir)
    if run.training.device.type == "cpu":
        keep_freed_memory()
    trainer.train(resume_from_checkpoint=checkpoint)


def save_checkpoint(trainer: Trainer, folder: str | Path, *beside) -> None:
    """Writes the model repository: weights, configurations and code, each file whole or not at all.

    An adapter is merged into the weights, and written by itself into the folder `adapter`.

    Args:
        beside: what else belongs to the model; by default the trainer's extractor and tokenizer.
    """
    # Every process has a part of a sharded network, and gives it.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    plain = merged(model)
    beside = beside or (trainer.processing_class, trainer.tokenizer)
    # Not trainer.save_model, which adds a pickle of the arguments.
    with files_into(Path(folder)) as temporary:
        add_pipeline(plain, temporary)
        plain.save_pretrained(temporary, state_dict=weights)
        for part in beside:
            if part is not None:
                part.save_pretrained(temporary)
        if has_adapter(model):
            model.save_pretrained(temporary / ADAPTER)
            shutil.rmtree(Path(folder, ADAPTER), ignore_errors=True)


def train_and_report(run: Run, folder: str | Path) -> None:
    """Trains, and leaves a model repository with its report in a folder."""
    _train_and_report(run, folder)
    end_processes()


def end_processes() -> None:
    """After everything that belongs to a trainer was left behind."""
    if dist.is_initialized():
        # The wrapped network first: as the last owner of the group it would, now and then, wait for ever for the
        # group's threads, which wait for it.
        gc.collect()
        # Without it some processes are gone before others are done with them.
        dist.barrier()
        dist.destroy_process_group()


def _train_and_report(run: Run, folder: str | Path) -> None:
    trainer, task, data = prepare(run)
    fit(trainer, data, run)
    save_checkpoint(trainer, folder)
    write_report(trainer, task, data, run, folder)


@command
def main(argv: list[str] | None = None) -> None:
    run = parse_run(argv)
    train_and_report(run, run.training.output_dir)


if __name__ == "__main__":
    main()
