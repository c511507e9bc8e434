"""Alignment and its controls over several seeds: what of a difference is the seed of the training run.

    python benchmarks/alignment.py --config recipes/5m/dpo.yaml --dataset DIR [--seeds 3] [options of train/dpo.py]

Prints, for the metrics of `train/dpo.py`'s report, the difference from the model before alignment: its mean over seeds
± the standard error of that mean, and in brackets the standard error by date of a single seed.
"""

import argparse
from tempfile import TemporaryDirectory

import pandas as pd

from spaceexploreai.evaluation.paths import compare
from spaceexploreai.train.alignment_report import ALIGNED, BEFORE
from spaceexploreai.train.arguments import command
from spaceexploreai.train.dpo import measure_all, parse_dpo, train, train_controls


def differences(argv: list[str], seed: int) -> pd.DataFrame:
    """`metric, model, mean, error, difference, difference_error` of one seed."""
    with TemporaryDirectory() as folder:
        own = ["--seed", str(seed), "--output_dir", folder, "--save_strategy", "no", "--report_to", "none"]
        run = parse_dpo([*argv, *own, "--disable_tqdm", "true"])
        trainer, data, config = train(run)
        trainers = {ALIGNED: trainer} | train_controls(run, data, config)
        return compare(measure_all(run, trainers, data).scores)


def format_seeds(tables: list[pd.DataFrame]) -> str:
    every = pd.concat(tables)
    groups = every[every["model"] != BEFORE].dropna(subset="difference").groupby(["metric", "model"], sort=False)
    cells = groups.apply(
        lambda rows: (
            f"{rows['difference'].mean():+.4f} ± {rows['difference'].sem():.4f} "
            f"({rows['difference_error'].mean():.4f})"
        )
    ).unstack(sort=False)
    lines = [f"| metric | {' | '.join(cells.columns)} |", f"|---|{'---:|' * len(cells.columns)}"]
    return "\n".join([*lines, *(f"| {metric} | {' | '.join(row)} |" for metric, row in cells.iterrows())])


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    args, argv = parser.parse_known_args()
    if args.seeds < 2:
        raise ValueError(f"an error over seeds needs at least 2, got --seeds {args.seeds}")
    print(format_seeds([differences(argv, seed) for seed in range(args.seeds)]))


if __name__ == "__main__":
    main()
