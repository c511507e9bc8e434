"""What the command lines have in common: our arguments of a run, and how a user's mistake is reported."""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import TrainingArguments
from trl import TrlParser

# Fields of the network's configuration that a run may set in place of its config.json.
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)
TASK_NAMES = ("regression", "classification", "causal_lm")
BALANCES = ("ticker", "year")


@dataclass
class ModelArguments:
    model_config: str | None = field(default=None, metadata={"help": "config.json of a network to train from scratch"})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint, of any head, to continue from"}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "in place of config.json's"})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "in place of config.json's"})
    num_attention_heads: int | None = field(default=None, metadata={"help": "in place of config.json's"})
    n_routed_experts: int | None = field(default=None, metadata={"help": "experts, in place of config.json's"})
    num_experts_per_tok: int | None = field(
        default=None, metadata={"help": "experts per token, in place of config.json's"}
    )
    moe_intermediate_size: int | None = field(
        default=None, metadata={"help": "width of an expert, in place of config.json's"}
    )
    t2t_loss_weight: float | None = field(
        default=None, metadata={"help": "weight of the alignment with the time-to-text extractor"}
    )
    peft: dict | str | None = field(
        default=None, metadata={"help": "fields of peft's LoraConfig: train an adapter alone"}
    )


@dataclass
class CommonArguments:
    """Of every run, whatever it trains."""

    horizons: list[int] | None = field(
        default=None, metadata={"help": "trading days ahead, in place of config.json's"}
    )
    balance: list[str] | None = field(
        default=None, metadata={"help": f"let each weigh the same: {', '.join(BALANCES)}, or both"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "evaluations without a better metric_for_best_model"}
    )

    def __post_init__(self):
        unknown = [name for name in self.balance or () if name not in BALANCES]
        if unknown:
            raise ValueError(f"balance must be of {', '.join(BALANCES)}, got {unknown[0]!r}")


@dataclass
class ObjectiveArguments(CommonArguments):
    task: str = field(default="regression", metadata={"help": f"head to train: {', '.join(TASK_NAMES)}"})
    path_length: int = field(default=10, metadata={"help": "days after the context that causal_lm continues with"})

    def __post_init__(self):
        super().__post_init__()
        if self.task not in TASK_NAMES:
            raise ValueError(f"task must be one of {', '.join(TASK_NAMES)}, got {self.task!r}")
        if self.path_length < 1:
            raise ValueError(f"path_length must be at least 1, got {self.path_length}")


@dataclass
class DataArguments:
    dataset: str | None = field(
        default=None,
        metadata={"help": "folder of scripts/build_dataset.py, in which all that follows was decided"},
    )
    prices: str | None = field(
        default=None,
        metadata={"help": "folder of Yahoo-style CSVs, .parquet or .csv table; the embedded sample by default"},
    )
    tickers: str | None = field(default=None, metadata={"help": "comma-separated tickers; all by default"})
    context_length: int = field(default=64, metadata={"help": "bars of a window"})
    calendar: str = field(default="XNYS", metadata={"help": "exchange_calendars code of the exchange"})
    strict: bool = field(default=False, metadata={"help": "refuse prices that would need a repair"})
    fill: bool = field(default=False, metadata={"help": "invent bars for missing sessions instead of masking them"})
    feature_groups: str = field(
        default="default", metadata={"help": "comma-separated groups of docs/indicators.md, or all"}
    )
    stride: int = field(default=16, metadata={"help": "bars between windows"})
    normalization: str = field(default="robust", metadata={"help": "robust, standard or minmax"})
    validation_fraction: float = field(default=0.1, metadata={"help": "share of the dates for choosing"})
    test_fraction: float = field(default=0.1, metadata={"help": "share of the dates, the last, never touched here"})
    train_start: str | None = field(
        default=None, metadata={"help": "first date (YYYY-MM-DD) to train on; those before it are context alone"}
    )

    def __post_init__(self):
        for name in ("context_length", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be within (0, 1), got {getattr(self, name)}")
        if self.dataset is not None and (self.prices or self.tickers):
            raise ValueError(f"prices and tickers are those of the dataset {self.dataset}: give one or the other")


class Run(NamedTuple):
    """All options of a training run."""

    model: ModelArguments
    data: DataArguments
    objective: CommonArguments
    training: TrainingArguments


# Options of transformers that are not for these networks, and why.
UNSUITABLE = {
    "label_smoothing_factor": "transformers would compare a prediction with the day that was given, not the next",
    "neftune_noise_alpha": "time steps are no token embeddings; noise on the features is the network's input_noise",
    "prediction_loss_only": "the report is of the predictions",
}


def parse_run(
    argv: Sequence[str] | None = None,
    objective: type = ObjectiveArguments,
    training: type[TrainingArguments] = TrainingArguments,
) -> Run:
    """Reads `--config run.yaml` and the command line, which wins; a key that nobody reads is an error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[-1:] == ["--config"]:
        raise ValueError("--config needs the path of a YAML file")
    parser = TrlParser((ModelArguments, DataArguments, objective, training))
    parser.error = _refuse
    run = Run(*parser.parse_args_and_config(argv))
    check_weights(run.model)
    check_options(run.training)
    return run


def check_options(training: TrainingArguments) -> None:
    """Refuses options of transformers that would silently train something else here, or end in a stack trace."""
    for name, reason in UNSUITABLE.items():
        if getattr(training, name):
            raise ValueError(f"{name} {getattr(training, name)}: {reason}")
    given = training.gradient_checkpointing_kwargs
    if given is not None and given.get("use_reentrant", True):
        raise ValueError(f"gradient_checkpointing_kwargs {given}: reentrant, the experts' balance has no gradient")


def check_weights(args: ModelArguments) -> None:
    """Refuses two networks or none; after the parsing, which finds an unknown key."""
    if (args.model_config is None) == (args.model_name_or_path is None):
        raise ValueError(
            "give one of model_config (to train from scratch) and model_name_or_path (to continue), "
            f"got {args.model_config} and {args.model_name_or_path}"
        )
    given = [name for name in SIZES if getattr(args, name) is not None]
    if given and args.model_name_or_path is not None:
        raise ValueError(f"{given[0]} is that of the checkpoint {args.model_name_or_path}")
    if args.peft is not None and args.model_name_or_path is None:
        raise ValueError("peft needs a model_name_or_path: an adapter changes a trained network")


def bare_parser(description: str) -> argparse.ArgumentParser:
    """A parser without options, whose errors are a user's mistakes as all others."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = _refuse
    return parser


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser for the scripts, with the two options that name the data."""
    parser = bare_parser(description)
    parser.add_argument("--prices", help="folder of Yahoo-style CSVs, .parquet or .csv table; default: the sample")
    parser.add_argument("--tickers", help="comma-separated; all of the prices by default")
    parser.add_argument("--strict", action="store_true", help="refuse prices that would need a repair")
    parser.add_argument("--fill", action="store_true", help="invent bars for missing sessions, do not mask them")
    return parser


def _refuse(message: str):
    """Stands in for argparse's `error`, which would print the usage of all options too."""
    raise ValueError(message)


def command(main: Callable) -> Callable:
    """Reports a user's mistake as one line `error: …` on standard error, with exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (ValueError, OSError, StrictDataclassError, SafetensorError, yaml.YAMLError) as error:
            # The strict configuration wraps the sentence that says what is wrong.
            cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
            print(f"error: {' '.join(str(cause).split())}", file=sys.stderr)
            raise SystemExit(2) from None

    return run
