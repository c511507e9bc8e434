"""Training of the time-to-text extractor, which then teaches a forecaster and describes charts.

    accelerate launch train/t2t.py --config recipes/tiny/t2t.yaml
        [--dataset DIR | --prices FILE_OR_DIR --tickers AAPL,MSFT] [--output_dir DIR] [--resume_from_checkpoint true]
    accelerate launch train/sft.py --config recipes/tiny/sft_t2t.yaml

The output folder is a model repository, whose backbone is untrained but for the extractor. Supervised training that
starts from it learns from the extractor where `t2t_loss_weight` is set.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from spaceexploreai.train.arguments import CommonArguments, Run, command, parse_run
from spaceexploreai.train.sft import train_and_report


@dataclass
class TimeToTextArguments(CommonArguments):
    task: ClassVar[str] = "time_to_text"

    word_embeddings: str | None = field(
        default=None, metadata={"help": "folder of a text model whose embeddings the words start from"}
    )


def parse_t2t(argv: list[str] | None = None) -> Run:
    run = parse_run(argv, TimeToTextArguments)
    if run.objective.word_embeddings and run.model.model_name_or_path:
        raise ValueError(
            f"word_embeddings {run.objective.word_embeddings} are for a new extractor; "
            f"{run.model.model_name_or_path} has words of its own"
        )
    return run


@command
def main(argv: list[str] | None = None) -> None:
    run = parse_t2t(argv)
    train_and_report(run, run.training.output_dir)


if __name__ == "__main__":
    main()
