"""What a rule of choosing pairs teaches in the limit: the optimum of DPO, for the return of one day.

    python benchmarks/preferences.py [--num-samples 8]

The truth and the reference are normal distributions of one number, on a grid. Pairs are drawn and chosen by
`data/preferences.py`, which makes the joint distribution of chosen and rejected values; the loss of the whole
distribution is then minimised, directly, over all distributions. What it says of the width is what a network that can
learn anything would come to; one that is stopped early is on its way there.
"""

import argparse

import numpy as np
import torch
from scipy.stats import norm
from torch.nn import functional as F

from spaceexploreai.data.preferences import choose_pairs, score_paths

GRID = np.linspace(-6, 6, 121)
STEP = GRID[1] - GRID[0]
DRAWS = 200_000
MARGIN = 0.5
# Name, mean and standard deviation of the truth, standard deviation of the reference around zero.
CASES = (("the reference is right", 0.0, 1.0, 1.0), ("it is too wide and off", 0.5, 1.0, 1.5))


def draw_pairs(rule: str, count: int, case: tuple) -> np.ndarray:
    """(G, G) joint distribution of the chosen and the rejected value."""
    _, mean, deviation, reference = case
    generator = np.random.default_rng(0)
    realised = generator.normal(mean, deviation, (DRAWS, 1))
    samples = generator.normal(0, reference, (DRAWS, 1 if rule == "one sample" else count, 1))
    scale = np.ones(DRAWS)
    chosen, rejected, margin = choose_pairs(samples, realised, scale, "best" if rule == "best" else "realised")
    if rule == "worst":
        worst = score_paths(samples, realised, scale).argmin(axis=1)
        rejected = samples[np.arange(DRAWS), worst]
        margin = np.abs(realised - rejected)[:, 0]
    pairs = np.concatenate([chosen, rejected], axis=1)[margin >= MARGIN].clip(GRID[0], GRID[-1])
    edges = np.append(GRID - STEP / 2, GRID[-1] + STEP / 2)
    joint, *_ = np.histogram2d(*pairs.T, bins=[edges, edges])
    return joint / joint.sum()


def optimum(joint: np.ndarray, reference: float, beta: float, sft_weight: float) -> np.ndarray:
    """(G,) the distribution of the smallest loss."""
    pairs, start = torch.from_numpy(joint), torch.from_numpy(norm.logpdf(GRID, 0, reference)).log_softmax(0)
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-13)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        log_p = logits.log_softmax(0)
        rewards = beta * (log_p - start)
        value = -(pairs * F.logsigmoid(rewards[:, None] - rewards)).sum() - sft_weight * pairs.sum(1) @ log_p
        value = value + 1e-7 * (logits - start).square().sum()  # where there are no pairs nothing else decides
        value.backward()
        return value

    optimizer.step(loss)
    return logits.detach().softmax(0).numpy()


def describe(p: np.ndarray, case: tuple) -> str:
    """Standard deviation, CRPS and coverage of the central 90 % under the truth."""
    _, mean, deviation, _ = case
    truth = norm.pdf(GRID, mean, deviation)
    truth /= truth.sum()
    cumulative, centre = p.cumsum(), p @ GRID
    crps = truth @ [((cumulative - (value <= GRID)) ** 2).sum() * STEP for value in GRID]
    lower, upper = np.interp([0.05, 0.95], cumulative, GRID + STEP / 2)
    covered = norm.cdf(upper, mean, deviation) - norm.cdf(lower, mean, deviation)
    return f"{np.sqrt(p @ (GRID - centre) ** 2):.2f} | {crps:.3f} | {covered:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=8)
    args = parser.parse_args()
    rules = {
        "one sample": "realised, one sample",
        "median": f"realised, median of {args.num_samples}",
        "best": f"best, median of {args.num_samples}",
        "worst": f"realised, worst of {args.num_samples}",
    }
    for case in CASES:
        print(f"\n{case[0]}: {describe(norm.pdf(GRID, 0, case[3]) / norm.pdf(GRID, 0, case[3]).sum(), case)}\n")
        print("| chosen, rejected | beta | SFT | sd | CRPS | coverage of 90 % |\n|---|---:|---:|---:|---:|---:|")
        for rule, name in rules.items():
            joint = draw_pairs(rule, args.num_samples, case)
            for beta, sft_weight in ((0.1, 0.0), (0.5, 0.0), (0.5, 1.0), (1.0, 0.0)):
                found = describe(optimum(joint, case[3], beta, sft_weight), case)
                print(f"| {name} | {beta:g} | {sft_weight:g} | {found} |", flush=True)


if __name__ == "__main__":
    main()
