"""What test_distill.py runs in processes of their own, beside `workers.py`."""

import workers

from spaceexploreai.train import distill


def distil(argv: list[str]) -> None:
    """The command without the report that it ends with, which takes longer than a few steps."""
    distill.write_report = lambda *_: None
    distill.main(argv)


def distil_sharded(argv: list[str], environment: dict[str, str]) -> None:
    """As `distil`, with student and teacher in parts."""
    workers.train = distil
    workers.train_sharded(argv, environment)
