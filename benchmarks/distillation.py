"""What a teacher is worth: the same student taught by the data alone (alpha 0), and by the teacher besides.

    python benchmarks/distillation.py --config recipes/5m/distill.yaml --teacher DIR [--dataset DIR | --prices FILE]
        [--alphas 0 0.5 1] [--seeds 0 1 2] [any option of train/distill.py]

All students of a seed begin with the same weights and see the same windows in the same order. Figures are of the
validation dates, on which each run chose its checkpoint: they flatter all rows, the teacher's too. `teacher_distance`
is how far from the teacher the last steps were.
"""

import tempfile
from collections.abc import Iterator

import numpy as np
import pandas as pd

from spaceexploreai.train.arguments import bare_parser, command
from spaceexploreai.train.distill import DistillationTrainer, parse_distillation, prepare

SHOWN = ("skill", "rank_ic", "correlation")


def shown(metrics: dict[str, float]) -> dict[str, float]:
    return {
        name.removeprefix("eval_"): value for name, value in metrics.items() if any(part in name for part in SHOWN)
    }


def last_distance(trainer: DistillationTrainer) -> float:
    return [entry["teacher_distance"] for entry in trainer.state.log_history if "teacher_distance" in entry][-1]


def measure(argv: list[str], alphas: list[float], seeds: list[int]) -> Iterator[dict]:
    """A row for each student, and at last one for the teacher."""
    for seed in seeds:
        for alpha in alphas:
            with tempfile.TemporaryDirectory() as folder:
                own = ["--alpha", str(alpha), "--seed", str(seed), "--output_dir", folder]
                trainer, *_ = prepare(parse_distillation([*argv, *own]))
                trainer.train()
                distance = {"teacher_distance": last_distance(trainer)}
                yield {"alpha": f"{alpha:g}", "seed": seed} | shown(trainer.evaluate()) | distance
    yield {"alpha": "teacher", "seed": seeds[0]} | shown(trainer.evaluate_teacher())


def report(runs: pd.DataFrame) -> str:
    """Means over the seeds; behind them the difference from the first alpha, seed by seed, with its standard error."""
    names = runs.columns.drop(["alpha", "seed"])
    groups = {alpha: group.set_index("seed")[names] for alpha, group in runs.groupby("alpha", sort=False)}
    first, rows = next(iter(groups.values())), []
    for alpha, group in groups.items():
        cells = [f"{value:.4f}" if np.isfinite(value) else "" for value in group.mean()]
        if alpha != "teacher" and group is not first:
            difference = group - first
            errors = difference.std(ddof=1) / np.sqrt(len(difference))
            pairs = zip(cells, difference.mean(), errors, strict=True)
            cells = [f"{cell} ({mean:+.4f} ± {error:.4f})" for cell, mean, error in pairs]
        rows.append([alpha, *cells])
    lines = [["alpha", *names], ["---"] * (len(names) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, rest = parser.parse_known_args(argv)
    print(report(pd.DataFrame(measure(rest, options.alphas, options.seeds))))


if __name__ == "__main__":
    main()
