"""Distillation: a student learns what a teacher says of every day, beside what happened (Hinton et al., 2015, arXiv
1503.02531).

    accelerate launch train/distill.py --config recipes/tiny/distill.yaml --teacher DIR
        [--task regression|classification|causal_lm] [--dataset DIR | --prices FILE_OR_DIR --tickers AAPL,MSFT]
        [--teacher_cache DIR] [--output_dir DIR] [--resume_from_checkpoint true]

The teacher is a checkpoint of the same head. It decides the columns, their statistics and the context; the student may
be smaller in everything else. The output folder is a model repository of the student, as that of train/sft.py.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, TrainingArguments, set_seed
from trl.models import prepare_fsdp

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.files import whole_folder
from spaceexploreai.data.stocks import StockData
from spaceexploreai.data.windows import IGNORE_INDEX
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import typical_move
from spaceexploreai.train.arguments import ObjectiveArguments, Run, command, parse_run
from spaceexploreai.train.report import write_report
from spaceexploreai.train.sft import (
    check_bins,
    check_machine,
    check_statistics,
    end_processes,
    fit,
    make_config,
    make_extractor,
    make_trainer,
    save_checkpoint,
    share_data,
)
from spaceexploreai.train.tasks import TASKS, Task
from spaceexploreai.train.trainer import SpaceExploreTrainer

# Shapes: B windows, T steps, H horizons (of a causal language model one, the next day), C numbers that are compared,
# K tokens of V

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_TEMPERATURE = 2.0
# Windows of a file of the cache, and the list of its files.
SHARD_WINDOWS = 256
INDEX = "index.json"


@dataclass
class DistillArguments(ObjectiveArguments):
    teacher: str | None = field(default=None, metadata={"help": "checkpoint of the same head to learn from"})
    alpha: float = field(default=0.5, metadata={"help": "weight of the teacher; the rest is that of the data"})
    temperature: float | None = field(
        default=None, metadata={"help": f"that logits are divided by, {DEFAULT_TEMPERATURE} by default"}
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "weight of the distance between the similarities of hidden states"}
    )
    teacher_dtype: str = field(default="auto", metadata={"help": f"{', '.join(DTYPES)}: the checkpoint's own"})
    teacher_cache: str | None = field(
        default=None, metadata={"help": "folder for what the teacher says of the training windows, asked once"}
    )
    teacher_top_k: int | None = field(
        default=None,
        metadata={"help": "likeliest tokens of a day to keep in the cache of a causal_lm; all by default"},
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be within [0, 1], got {self.alpha}")
        if not self.hidden_weight >= 0:
            raise ValueError(f"hidden_weight must be at least 0, got {self.hidden_weight}")
        if self.teacher_dtype not in DTYPES:
            raise ValueError(f"teacher_dtype must be one of {', '.join(DTYPES)}, got {self.teacher_dtype!r}")
        self.check_temperature()
        self.check_top_k()

    def check_temperature(self):
        if self.task == "regression":
            if self.temperature is not None:
                raise ValueError(f"temperature {self.temperature} divides logits; a regression has none")
            return
        self.temperature = DEFAULT_TEMPERATURE if self.temperature is None else self.temperature
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def check_top_k(self):
        if self.teacher_top_k is None:
            return
        if self.task != "causal_lm" or self.teacher_cache is None:
            raise ValueError(f"teacher_top_k {self.teacher_top_k} is of the teacher_cache of a causal_lm")
        bins = TASKS[self.task].tokenizer.num_bins
        if not 1 <= self.teacher_top_k < bins:
            raise ValueError(f"teacher_top_k must be at least 1 and below the {bins} bins, got {self.teacher_top_k}")


def parse_distillation(argv: list[str] | None = None) -> Run:
    run = parse_run(argv, DistillArguments)
    if run.objective.teacher is None:
        raise ValueError("distillation needs a teacher: the folder of a checkpoint of the same head")
    return run


# --- what is compared, and how: one class for each head ---


class ForecastMatch:
    """Regression: mean and quantiles in units of the typical move, as the data's errors are and with their weights.

    The squared 2-Wasserstein distance of two distributions of a number is the integral over the levels of the squared
    difference of their quantile functions (Peyré and Cuturi, 2019, arXiv 1803.00567, remark 2.30); here it is the mean
    over the predicted levels. The squared difference of the means is added.
    """

    shared = ("horizons", "target", "quantile_levels")

    def __init__(self, config: SpaceExploreConfig, objective: DistillArguments):
        self.config = config

    def read(self, outputs, scale: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, H, C) what a network says of each step; with a scale it is in log-returns."""
        said = torch.cat([outputs.mean.unsqueeze(-1), outputs.quantiles], dim=-1)
        move = typical_move(scale, None, self.config.horizons)
        return said if move is None else said / move.unsqueeze(-1)

    def known(self, labels: torch.Tensor) -> torch.Tensor:
        """(B, T, H) where there is a label."""
        return labels != IGNORE_INDEX

    def keep(self, said: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a student needs of what the teacher says, each (B, T, H, C)."""
        return {"said": said}

    def distance(self, said: torch.Tensor, soft: dict[str, torch.Tensor]) -> torch.Tensor:
        """(N,) of what the student says, (N, C), from what was kept."""
        errors = (said - soft["said"]).square()
        config = self.config
        return config.mean_loss_weight * errors[:, 0] + config.quantile_loss_weight * errors[:, 1:].mean(-1)


class ClassMatch:
    """Classification: T²·KL(teacher ‖ student) at temperature T, whose gradient does not shrink with T."""

    shared = ("horizons", "target", "flat_band")

    def __init__(self, config: SpaceExploreConfig, objective: DistillArguments):
        self.temperature = objective.temperature

    def read(self, outputs, scale: torch.Tensor | None = None) -> torch.Tensor:
        return outputs.logits.float()

    def known(self, labels: torch.Tensor) -> torch.Tensor:
        return labels != IGNORE_INDEX

    def keep(self, said: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"said": said - said.amax(-1, keepdim=True)}  # half precision is finest around zero

    def soften(self, said: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(said / self.temperature, dim=-1)

    def distance(self, said: torch.Tensor, soft: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.temperature**2 * divergence(self.soften(soft["said"]), self.soften(said))


class TokenMatch(ClassMatch):
    """Causal language model: the same where the next token is a label, which is a return.

    Over all tokens: over those of returns alone nobody would tell the student, with alpha 1, that none else follows.
    """

    shared = ("target", "vocab_size", "ts_token_id")

    def read(self, outputs, scale: torch.Tensor | None = None) -> torch.Tensor:
        return outputs.logits[:, :-1, None].float()

    def known(self, labels: torch.Tensor) -> torch.Tensor:
        return labels[:, 1:, None] != IGNORE_INDEX


class TopTokenMatch(TokenMatch):
    """Of the K likeliest tokens, and all others together: without those the student's would be too likely."""

    def __init__(self, config: SpaceExploreConfig, objective: DistillArguments):
        super().__init__(config, objective)
        self.count = objective.teacher_top_k

    def keep(self, said: torch.Tensor) -> dict[str, torch.Tensor]:
        softened = self.soften(said)
        tokens = softened.topk(self.count, dim=-1).indices
        return {"said": with_others(softened, tokens), "tokens": tokens.int()}

    def distance(self, said: torch.Tensor, soft: dict[str, torch.Tensor]) -> torch.Tensor:
        student = with_others(self.soften(said), soft["tokens"].long())
        return self.temperature**2 * divergence(F.log_softmax(soft["said"], dim=-1), student)


MATCHES = {"regression": ForecastMatch, "classification": ClassMatch, "causal_lm": TokenMatch}
Match = ForecastMatch | ClassMatch


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) of (..., C) log-probabilities."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def with_others(log_probabilities: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(..., K + 1) log-probabilities of some tokens, (..., K) of V, and of all others together."""
    others = log_probabilities.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probabilities.gather(-1, tokens), others], dim=-1)


def similarities(hidden_states: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """(B, T, T) inner products of a window's centred hidden states at the steps with a label, over their norm.

    Half the squared distance of two networks' is one minus their linear CKA (Kornblith et al., 2019, arXiv 1905.00414;
    in distillation Zhou et al., 2024, arXiv 2401.11824), which knows no width. Of each window by itself, so that a
    step's loss does not depend on how its windows are parted.

    Args:
        hidden_states: (B, T, D), or with more steps at the end.
        known: (B, T, H).
    """
    steps = known.any(-1, keepdim=True)  # (B, T, 1)
    hidden = torch.where(steps, hidden_states[:, : steps.shape[1]].float(), 0.0)
    mean = hidden.sum(1, keepdim=True) / steps.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(steps, hidden - mean, 0.0)
    return F.normalize((centred @ centred.mT).flatten(1), dim=-1).unflatten(-1, (steps.shape[1], -1))


@torch.no_grad()
def ask(teacher: PreTrainedModel, match: Match, batch: dict[str, torch.Tensor], similar: bool) -> dict:
    """What a student needs of what the teacher says of a batch, each (B, T, …).

    Args:
        similar: whether it needs the similarities of hidden states.
    """
    shown = {name: value for name, value in batch.items() if name not in ("labels", "scale", "row")}
    outputs = teacher(**shown, use_cache=False, output_hidden_states=similar)
    soft = match.keep(match.read(outputs))
    if similar:
        soft["similarities"] = similarities(outputs.hidden_states[-1], match.known(batch["labels"]))
    return soft


# --- the cache ---


class SoftTargets:
    """What a teacher says of each training window, in half precision and memory-mapped."""

    def __init__(self, folder: Path):
        self.shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        if not self.shards:
            raise FileNotFoundError(f"there is no cache in {folder}, which all processes must see")

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        places = [divmod(row, SHARD_WINDOWS) for row in rows]
        return {name: torch.stack([self.shards[one][name][row] for one, row in places]) for name in self.shards[0]}


def write_soft_targets(folder: Path, batches: Iterable[dict[str, torch.Tensor]]) -> None:
    """Writes a file for each batch, and which files there are: all of it or nothing."""
    with whole_folder(folder) as whole:
        index = {}
        for number, batch in enumerate(batches):
            path = whole / f"{number:06d}.safetensors"
            save_file({name: halved(values) for name, values in batch.items()}, path)
            index[path.name] = sha256_of(path)
        (whole / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def halved(values: torch.Tensor) -> torch.Tensor:
    return (values.half() if values.is_floating_point() else values).cpu().contiguous()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_undamaged(folder: Path) -> bool:
    try:
        index = json.loads((folder / INDEX).read_bytes())
        return all(sha256_of(folder / name) == digest for name, digest in index.items())
    except (OSError, ValueError):
        return False


def fingerprint(teacher: PreTrainedModel, task: Task, objective: DistillArguments) -> str:
    """Changes with whatever the teacher's words depend on: its weights, its code, the windows, and what is kept."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in (*sorted(root.glob("*_spaceexplore.py")), root / "data" / "collators.py", Path(__file__)):
        digest.update(path.read_bytes())
    for name, weight in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy())
    for which in range(len(task.train.series)):
        history, labels = task.train.series.labelled_steps(which, 0, None)
        for values in (history.values, history.traded, history.scale, labels):
            digest.update(np.ascontiguousarray(values))
    digest.update(np.ascontiguousarray(task.train.rows))
    digest.update(json.dumps(kept(teacher.config, task, objective)).encode())
    return digest.hexdigest()[:16]


def kept(config: SpaceExploreConfig, task: Task, objective: DistillArguments) -> list:
    """Of the options, those that the teacher's words depend on."""
    network = {name: plain(config)[name] for name in SpaceExploreConfig.__annotations__}
    shapes = {name: tuple(value.shape) for name, value in task.collate([task.train[0]]).items()}
    top_k = objective.teacher_top_k and (objective.teacher_top_k, objective.temperature)
    return [network, shapes, objective.task, bool(objective.hidden_weight), top_k]


def plain(config: SpaceExploreConfig) -> dict:
    """Fields by way of JSON, which makes lists of tuples."""
    return json.loads(config.to_json_string(use_diff=False))


def share_soft_targets(run: Run, teacher: PreTrainedModel, match: Match, task: Task) -> SoftTargets:
    """The cache of these windows, which one process makes for all unless it is there."""
    objective = run.objective
    folder = Path(objective.teacher_cache, fingerprint(teacher, task, objective))
    with run.training.main_process_first(local=False, desc="the teacher's cache"):
        if run.training.process_index == 0 and not is_undamaged(folder):
            teacher.to(run.training.device)
            write_soft_targets(folder, ask_all(teacher, match, task, objective, run.training))
            teacher.cpu()
    return SoftTargets(folder)


def ask_all(
    teacher: PreTrainedModel, match: Match, task: Task, objective: DistillArguments, training: TrainingArguments
) -> Iterator[dict[str, torch.Tensor]]:
    workers = training.dataloader_num_workers
    loader = DataLoader(task.train, SHARD_WINDOWS, collate_fn=task.collate, num_workers=workers)
    for batch in tqdm(loader, desc="asking the teacher", unit="batch", disable=training.disable_tqdm):
        on_device = {name: value.to(training.device) for name, value in batch.items()}
        yield ask(teacher, match, on_device, bool(objective.hidden_weight))


# --- training ---


class DistillationTrainer(SpaceExploreTrainer):
    """Trains a student on the data and on what a teacher says of them. Evaluation is of the data alone.

    Args:
        teacher: in evaluation mode; it is not trained, and no part of a checkpoint.
        match: what of the two is compared.
        objective: weights.
        soft_targets: of all training windows; by default the teacher is asked at each step.
    """

    def __init__(
        self,
        *args,
        teacher: PreTrainedModel,
        match: Match,
        objective: DistillArguments,
        soft_targets: SoftTargets | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.teacher, self.match, self.objective, self.soft_targets = teacher, match, objective, soft_targets
        self.distances = []
        if soft_targets is None:
            self.place_teacher()

    def place_teacher(self) -> None:
        """Onto the device, in the precision of the run; in parts where the student is."""
        if self.is_fsdp_enabled:
            self.teacher = prepare_fsdp(self.teacher, self.accelerator)
        else:
            self.teacher = self.accelerator.prepare_model(self.teacher, evaluation_mode=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        soft = self.soften(inputs)
        if self.objective.hidden_weight:
            inputs["output_hidden_states"] = True
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # As the library does with the loss of a network that is given the labels of all processes.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        taught = self.teach(outputs, soft, inputs) * processes / num_items_in_batch
        loss = (1 - self.objective.alpha) * loss + taught
        return (loss, outputs) if return_outputs else loss

    def soften(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the teacher says of a batch."""
        if self.soft_targets is None:
            return ask(self.teacher, self.match, inputs, bool(self.objective.hidden_weight))
        soft = self.soft_targets[inputs["row"].tolist()]
        return {name: values.to(inputs["labels"].device) for name, values in soft.items()}

    def teach(self, outputs, soft: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The teacher's part of the loss, summed over the labels."""
        known = self.match.known(inputs["labels"])
        said = self.match.read(outputs, inputs.get("scale"))[known]
        # As in the network's own loss, what is of a window weighs as its labels.
        labels = known.sum((1, 2))
        there = {name: values[known].float() for name, values in soft.items() if name != "similarities"}
        distance = self.match.distance(said, there).sum()
        self.check(distance)
        self.distances.append(distance.detach() / labels.sum().clamp(min=1))
        total = self.objective.alpha * distance
        if outputs.aux_loss is not None:  # experts are balanced whoever teaches them
            weight = self.objective.alpha * self.model.config.router_aux_loss_coef
            total = total + weight * outputs.aux_loss * labels.sum()
        if self.objective.hidden_weight:
            apart = similarities(outputs.hidden_states[-1], known) - soft["similarities"].float()
            total = total + self.objective.hidden_weight * (apart.square().sum((1, 2)) / 2 * labels).sum()
        return total

    def check(self, distance: torch.Tensor) -> None:
        if not torch.isfinite(distance):
            raise ValueError(
                f"the distance from the teacher {self.objective.teacher} in {self.teacher.dtype} is "
                f"{distance.item()} at step {self.state.global_step + 1}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean distance from the teacher, in the first process, whatever it weighs."""
        if self.distances and "loss" in logs:
            logs["teacher_distance"] = torch.stack(self.distances).mean().item()
            self.distances.clear()
        super().log(logs, start_time)

    def evaluate_teacher(self) -> dict[str, float]:
        """The teacher's own metrics on the windows of validation. Every process must call it."""
        if self.soft_targets is not None:
            self.place_teacher()
        student, self.model = self.model, self.teacher
        try:
            return self.predict(self.eval_dataset, metric_key_prefix="eval").metrics
        finally:
            self.model = student


# --- from the command line ---


def load_teacher(objective: DistillArguments) -> PreTrainedModel:
    """Ready to be asked.

    Raises:
        ValueError: it has another head, or other bins than the student will have.
    """
    head = TASKS[objective.task].head
    try:
        config = SpaceExploreConfig.from_pretrained(objective.teacher)
    except OSError as error:
        raise OSError(f"cannot read the teacher {objective.teacher}: {error}") from error
    if config.architectures != [head.__name__]:
        raise ValueError(
            f"the teacher {objective.teacher} is {' '.join(config.architectures or ['no network'])}, "
            f"task {objective.task} needs {head.__name__}"
        )
    tokenizer = TASKS[objective.task].tokenizer
    if tokenizer is not None:
        check_bins(objective.teacher, tokenizer)
    return head.from_pretrained(objective.teacher, dtype=objective.teacher_dtype).eval().requires_grad_(False)


def check_student(run: Run, config: SpaceExploreConfig, teacher: SpaceExploreConfig) -> None:
    """Refuses a student that predicts something else than the teacher, or was trained to see the data otherwise."""
    ours, theirs = plain(config), plain(teacher)
    for name in MATCHES[run.objective.task].shared:
        if ours[name] != theirs[name]:
            raise ValueError(
                f"{name} of the student is {ours[name]}, that of the teacher {run.objective.teacher} {theirs[name]}"
            )
    if run.model.model_name_or_path is not None:
        extractor = SpaceExploreFeatureExtractor.from_pretrained(run.objective.teacher)
        check_statistics(extractor, run.model.model_name_or_path, f"the teacher {run.objective.teacher}")


def inherit_cutoffs(config: SpaceExploreConfig, teacher: SpaceExploreConfig, run: Run, data: StockData) -> None:
    """What a teacher has seen its student knows of: evaluation must not begin before.

    Raises:
        ValueError: the teacher was trained on dates that the student is to be chosen by.
    """
    begin = data.split.validation.start.date().isoformat()
    if (teacher.train_cutoff or "") >= begin:
        raise ValueError(
            f"the teacher {run.objective.teacher} was trained to {teacher.train_cutoff}, and validation begins on "
            f"{begin}: it would tell the student what it is to forecast"
        )
    for name in ("train_cutoff", "selection_cutoff"):
        setattr(config, name, max(getattr(config, name), getattr(teacher, name) or ""))


def prepare(run: Run) -> tuple[DistillationTrainer, Task, StockData]:
    """The trainer of a run, what it is trained for, and its data."""
    check_machine(run.training)
    objective = run.objective
    teacher = load_teacher(objective)
    config = make_config(run.model, objective, make_extractor(objective.teacher, run.data))
    check_student(run, config, teacher.config)
    data = share_data(run, objective.teacher, config)
    inherit_cutoffs(config, teacher.config, run, data)
    task = TASKS[objective.task](config, data, objective)
    task.script = "train/distill.py"
    match = (TopTokenMatch if objective.teacher_top_k else MATCHES[objective.task])(config, objective)
    soft_targets = None if objective.teacher_cache is None else share_soft_targets(run, teacher, match, task)
    set_seed(run.training.seed)  # as late as this, or a student would begin otherwise where the cache is new
    kind = partial(DistillationTrainer, teacher=teacher, match=match, objective=objective, soft_targets=soft_targets)
    return make_trainer(kind, run, task, data), task, data


def distil(run: Run, folder: str | Path) -> None:
    """Trains, and leaves a model repository with its report in a folder."""
    trainer, task, data = prepare(run)
    fit(trainer, data, run)
    save_checkpoint(trainer, folder)
    write_report(trainer, task, data, run, folder, trainer.evaluate_teacher())


@command
def main(argv: list[str] | None = None) -> None:
    run = parse_distillation(argv)
    distil(run, run.training.output_dir)
    end_processes()


if __name__ == "__main__":
    main()
