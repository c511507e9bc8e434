"""Whether a change made something slower or larger: the benchmarks' ratios beside the committed ones.

    python benchmarks/check.py [--update]

Few rounds of each comparison, minutes altogether. Ratios hold on another machine where times do not, though not to the
last percent: benchmarks/expected.json has beside each how much of it may be lost. Higher is better in all. Exit code 1
where more was lost; `--update` writes what was measured instead.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch

from spaceexploreai.benchmarks import data, kv_cache, peers, scoring, train_step
from spaceexploreai.data.prices import read_sample
from spaceexploreai.train.arguments import bare_parser, command
from spaceexploreai.train.memory import keep_freed_memory

EXPECTED = Path(__file__).with_name("expected.json")
TOLERANCE = 0.1  # of a ratio that is new
DECIMALS = 3  # of the ratios in the file
RECIPE, TOKENS, CONTEXT, ROUNDS = train_step.RECIPE, 2048, 64, 5
TICKERS, YEARS = 20, 0.25  # that are forecast with windows of their own


def utilisation() -> float:
    training = train_step.Training(train_step.read_config(RECIPE), TOKENS, CONTEXT)
    return train_step.utilisation(train_step.measure(training, ROUNDS), training.count_flops())


@cache
def rounds_beside_peers() -> dict[str, list[peers.Round]]:
    config = train_step.read_config(RECIPE)
    names = (peers.OURS, peers.EQUAL, "DeepSeek-V3", "Mixtral")
    trainings = {name: train_step.Training(config, TOKENS, CONTEXT, peers.NETWORKS[name]) for name in names}
    return peers.measure(trainings, ROUNDS)


def over_ours(name: str, part: str, ours: str = peers.EQUAL) -> float:
    return median(peers.ratios(rounds_beside_peers(), name, ours, part))


def cache_saving() -> float:
    sizes = kv_cache.compare_sizes(json.loads(RECIPE.read_text(encoding="utf-8")))
    return sizes["mha"] / sizes["mla"]


def absorbed_speed() -> float:
    pairs = kv_cache.compare_speeds(json.loads(RECIPE.read_text(encoding="utf-8")))
    return median(absorbed / expanded for absorbed, expanded in pairs)


def indicator_speed() -> float:
    seconds = data.compare_columns(data.evenly_spaced(read_sample(), 3))
    return seconds["df.ta"] / seconds["compute_indicators"]


def shared_windows() -> float:
    return scoring.evaluate("5m", TICKERS, YEARS)[0]["ratio"]


RATIOS: dict[str, Callable[[], float]] = {
    "utilisation of a 27m step": utilisation,
    "step, DeepSeek-V3 over our decoder": partial(over_ours, "DeepSeek-V3", "step"),
    "step, Mixtral over our decoder": partial(over_ours, "Mixtral", "step"),
    "step, our decoder over all of ours": partial(over_ours, peers.EQUAL, "step", peers.OURS),
    "forward, DeepSeek-V3 over our decoder": partial(over_ours, "DeepSeek-V3", "forward"),
    "forward, Mixtral over our decoder": partial(over_ours, "Mixtral", "forward"),
    "bytes cached, mha over mla": cache_saving,
    "decoding speed, absorbed over expanded": absorbed_speed,
    "indicators, df.ta over ours": indicator_speed,
    "forecasts, a window each day over shared ones": shared_windows,
}


def format_ratio(name: str, committed: dict[str, float] | None, now: float) -> str:
    if committed is None:
        return f"| {name} | new | {now:.3f} | | |"
    ratio, tolerance = committed["ratio"], committed["tolerance"]
    verdict = ", and did more" if too_low(committed, now) else ""
    return f"| {name} | {ratio:.3f} | {now:.3f} | {now / ratio - 1:+.1%} | {tolerance:.0%}{verdict} |"


def too_low(committed: dict[str, float] | None, now: float) -> bool:
    if committed is None:
        return False
    return round(now, DECIMALS) < committed["ratio"] * (1 - committed["tolerance"])


def write(expected: dict[str, dict[str, float]], now: dict[str, float]) -> None:
    written = {}
    for name, ratio in now.items():
        tolerance = expected.get(name, {"tolerance": TOLERANCE})["tolerance"]
        written[name] = {"ratio": round(ratio, DECIMALS), "tolerance": tolerance}
    EXPECTED.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--update", action="store_true", help="write what is measured to benchmarks/expected.json")
    args = parser.parse_args(argv)
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    keep_freed_memory()
    now = {}
    print("| ratio | committed | now | moved by | may fall by |\n|---|---:|---:|---:|---:|", flush=True)
    for name, measure in RATIOS.items():
        now[name] = measure()
        print(format_ratio(name, expected.get(name), now[name]), flush=True)
    if args.update:
        write(expected, now)
    elif lower := [name for name in now if too_low(expected.get(name), now[name])]:
        raise SystemExit(f"lower than committed: {'; '.join(lower)}")  # on standard error, with exit code 1


if __name__ == "__main__":
    main()
