"""Pushes a checkpoint folder, or a dataset folder, to the Hugging Face Hub.

    python scripts/push_to_hub.py --model DIR --repo-id NEOAI/NAME [--evaluation DIR] [--private] [--revision BRANCH]
        [--dry-run]
    python scripts/push_to_hub.py --dataset DIR --repo-id NEOAI/Stocks [--private] [--revision BRANCH] [--dry-run]

A checkpoint is loaded before, and goes as one commit: configuration, weights, code and its report as the model card.
--evaluation, a folder that scripts/evaluate.py has written to, puts its metrics into the card and its report beside
it. --dry-run prints what would go, and asks the Hub nothing. Optimizer states and logs stay here.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.utils import validate_repo_id

from spaceexploreai import modeling_spaceexplore
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.stocks import METADATA_NAME
from spaceexploreai.pipeline_spaceexplore import HEADS, TASK
from spaceexploreai.scripts.build_dataset import PARQUET_FILES
from spaceexploreai.scripts.forecasters import head_name
from spaceexploreai.scripts.hub import check_push, push
from spaceexploreai.train.arguments import bare_parser, command
from spaceexploreai.train.report import CARD

# Of a checkpoint folder; the folders of a run (checkpoint-200, runs) are of no use to others.
MODEL_FILES = ("*.json", "*.safetensors", "*_spaceexplore.py", CARD, "*.png", "adapter/*")
DATASET_FILES = ("*.json", CARD, *PARQUET_FILES)
EVALUATION, EVALUATION_FILES = "evaluation", ("metrics*.json", "report.*", "report_files/*")
# What an earlier push may have had more of.
STALE = {"model": ("*.safetensors", f"{EVALUATION}/*"), "dataset": PARQUET_FILES}
USAGE = """
## Use

```python
from transformers import pipeline

pipe = pipeline("{task}", model="{repository}", trust_remote_code=True)  # revision=COMMIT pins what was checked
table = pipe(prices)  # a DataFrame: ticker, date, open, high, low, close, volume
```
"""
# Metric of metrics.json -> type and name in the card's metadata.
CARD_METRICS = {
    "crps_skill": ("crps_skill", "CRPS skill over EWMA volatility"),
    "log_loss_skill": ("log_loss_skill", "log-loss skill over EWMA volatility"),
    "coverage_90": ("coverage", "coverage of the 90 % interval"),
    "rank_ic": ("rank_ic", "RankIC"),
    "direction_accuracy": ("accuracy", "direction accuracy"),
    "accuracy": ("accuracy", "accuracy of the class"),
}


# --- what goes -------------------------------------------------------------------------------------------------------


def files_of(folder: Path, patterns: Iterable[str], prefix: str = "") -> dict[str, Path]:
    """Path in the repository -> file."""
    found = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {f"{prefix}{path.relative_to(folder).as_posix()}": path for path in found}


def check_model(folder: Path) -> SpaceExploreConfig:
    """Loads the checkpoint, and refuses what others could not load."""
    config = SpaceExploreConfig.from_pretrained(folder)
    name = head_name(config)
    head = getattr(modeling_spaceexplore, name, None)
    if head is None:
        raise ValueError(f"{folder} holds {name}, which is no network of this project")
    _, info = head.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder} is not whole: its weights have no {min(info['missing_keys'])}")
    pipelines = (getattr(config, "custom_pipelines", None) or {}).values()
    references = [*(getattr(config, "auto_map", None) or {}).values(), *(one["impl"] for one in pipelines)]
    code = {f"{reference.split('.')[0]}.py" for reference in references}
    missing = sorted(one for one in code if not (folder / one).is_file())
    if not code or missing:
        raise ValueError(f"{folder} does not carry its code{': ' + missing[0] if missing else ''}; save it again")
    return config


def check_dataset(folder: Path) -> None:
    if not (folder / METADATA_NAME).is_file():
        raise ValueError(f"{folder} is no dataset of scripts/build_dataset.py: it has no {METADATA_NAME}")


def model_card(folder: Path, evaluation: Path | None, repository: str) -> str:
    """The card of the folder, how to load it, and with the metrics of an evaluation in its head."""
    path = folder / CARD
    if not path.is_file():
        raise ValueError(f"{folder} has no {CARD}: its training wrote no report")
    card = ModelCard.load(path)
    if head_name(SpaceExploreConfig.from_pretrained(folder)) in HEADS:
        card.text += USAGE.format(task=TASK, repository=repository)
    if evaluation is not None:
        card.data.model_name = repository.split("/")[-1]
        facts = read_facts(evaluation)
        metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
        card.data.eval_results = list(card_results(metrics, facts["dates"]))
        said = "".join(f"- {name}: {value}\n" for name, value in facts.items())
        card.text += f"\n## Evaluation\n\n{said}- [report]({EVALUATION}/report.md)\n"
    return str(card)


def read_facts(evaluation: Path) -> dict[str, str]:
    """What was evaluated; refused unless it was on dates that the model had never seen."""
    for name in ("report.json", "metrics.json"):
        if not (evaluation / name).is_file():
            raise ValueError(f"{evaluation} has no {name}: give the folder that scripts/evaluate.py wrote to")
    report = json.loads((evaluation / "report.json").read_text(encoding="utf-8"))
    if report["notices"]:
        raise ValueError(f"{evaluation} is not for a model card. {report['notices'][0]}")
    return report["facts"]


def card_results(metrics: dict, dates: str) -> Iterator[EvalResult]:
    for horizon, values in metrics.items():
        for metric, (kind, name) in CARD_METRICS.items():
            value = values.get(metric, {}).get("model")
            if value is not None:
                yield EvalResult(
                    task_type=TASK,
                    dataset_type="stocks",
                    dataset_name=f"daily stocks, {horizon} trading days ahead, {dates}",
                    dataset_split="test",
                    metric_type=kind,
                    metric_name=f"{name}, {horizon} d",
                    metric_value=value,
                )


@contextmanager
def laid_out(files: dict[str, Path], card: str | None) -> Iterator[Path]:
    """A folder of links to the files, and a card of its own."""
    with TemporaryDirectory() as parent:
        folder = Path(parent)
        for name, path in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name != CARD or card is None:
                os.symlink(path.absolute(), target)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        yield folder


# --- the command -----------------------------------------------------------------------------------------------------


def describe(folder: Path, repository: str, private: bool, revision: str | None) -> str:
    """What a push of the folder would do."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    lines = [f"{size:>14,}  {name}" for name, size in sorted(files.items())]
    where = f"{repository}{f' at {revision}' if revision else ''}{', private' if private else ''}"
    return "\n".join([*lines, f"{sum(files.values()):>14,}  bytes in {len(files)} files would go to {where}"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = bare_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="checkpoint folder")
    what.add_argument("--dataset", type=Path, help="folder of scripts/build_dataset.py")
    parser.add_argument("--repo-id", required=True, help="OWNER/NAME, or NAME of one's own")
    parser.add_argument("--evaluation", type=Path, help="folder of scripts/evaluate.py, for the card of the model")
    parser.add_argument("--private", action="store_true", help="nobody else may see it")
    parser.add_argument("--revision", help="branch, which is created if it is not there; default: main")
    parser.add_argument("--dry-run", action="store_true", help="print what would go")
    args = parser.parse_args(argv)
    if args.evaluation is not None and args.model is None:
        raise ValueError(f"--evaluation {args.evaluation} is of a model, and no --model is given")
    return args


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    validate_repo_id(args.repo_id)
    folder, repo_type, card = (args.model or args.dataset), ("model" if args.model else "dataset"), None
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    if args.model is not None:
        check_model(folder)
        card = model_card(folder, args.evaluation, args.repo_id)
        files = files_of(folder, MODEL_FILES)
        if args.evaluation is not None:
            files |= files_of(args.evaluation, EVALUATION_FILES, f"{EVALUATION}/")
    else:
        check_dataset(folder)
        files = files_of(folder, DATASET_FILES)
    with laid_out(files, card) as ready:
        if args.dry_run:
            print(describe(ready, args.repo_id, args.private, args.revision))
            if card is not None:
                print(f"\n{card.split('---')[1].strip()}")
            return
        check_push(args.repo_id, repo_type)
        commit = push(ready, args.repo_id, repo_type, args.private, STALE[repo_type], args.revision)
        print(f"pushed {len(files)} files: {commit.commit_url}")


if __name__ == "__main__":
    main()
