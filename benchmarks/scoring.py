"""How long an evaluation takes, part by part, and what sharing windows between days is worth.

    python benchmarks/scoring.py [--recipe 5m] [--tickers 500] [--years 1] [--threads 2]

An untrained network of the recipe forecasts random walks from every trading day of the last years; every part is the
one that scripts/evaluate.py calls. The forecasts of a few tickers are made again with a window for each day.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spaceexploreai.benchmarks.stream import make_prices
from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.windows import DateRange
from spaceexploreai.evaluation.baselines import add_baselines
from spaceexploreai.evaluation.report import Report, pictures_of, report_files
from spaceexploreai.evaluation.scores import add_outcomes, score
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.scripts.forecasters import forecast_between
from spaceexploreai.train.arguments import bare_parser, command

RECIPES = Path(__file__).parents[1] / "recipes"
SESSIONS = 252
HISTORY = 600  # sessions before the scored ones, of which indicators need some
FEW = 20  # tickers that are forecast again


def make_network(recipe: str) -> tuple[SpaceExploreForRegression, SpaceExploreFeatureExtractor]:
    extractor = SpaceExploreFeatureExtractor()
    fields = json.loads((RECIPES / recipe / "config.json").read_text(encoding="utf-8"))
    config = SpaceExploreConfig(**{**fields, "num_features": len(extractor.feature_names)})
    return SpaceExploreForRegression(config).eval(), extractor


def timed(seconds: dict[str, float], part: str, function: Callable, *args) -> Any:
    start = time.perf_counter()
    result = function(*args)
    seconds[part] = time.perf_counter() - start
    return result


def evaluate(recipe: str, tickers: int, years: float) -> tuple[dict[str, float], int]:
    """Seconds of each part, and how many forecasts they were."""
    sessions = round(years * SESSIONS)
    prices = make_prices(tickers, HISTORY + sessions)
    dates = np.unique(prices["date"])
    within = DateRange(prices["date"].iloc[-sessions], prices["date"].iloc[-1])
    model, extractor = make_network(recipe)
    seconds: dict[str, float] = {}
    features = timed(seconds, "features", extractor.compute_features, prices)
    extractor.fit(features[features["date"] <= dates[HISTORY]])
    series = timed(seconds, "encoding", extractor.encode, prices, features)
    table = timed(seconds, "forecasts", forecast_between, model, extractor, series, within)
    table = timed(seconds, "outcomes and baselines", lambda: add_baselines(add_outcomes(table, prices), prices))
    scores = timed(seconds, "scores", score, table)
    report = timed(seconds, "pictures", lambda: Report("", {}, scores, [], pictures_of(table, prices)))
    timed(seconds, "report", report_files, report)
    few: dict[str, float] = {}
    for stride in (None, 1):
        timed(few, str(stride), forecast_between, model, extractor, series[:FEW], within, stride)
    return {**seconds, "ratio": few["1"] / few["None"]}, len(table)


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    recipes = sorted(path.parent.name for path in RECIPES.glob("*/config.json"))
    parser.add_argument("--recipe", choices=recipes, default="5m", help="default: %(default)s")
    parser.add_argument("--tickers", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--years", type=float, default=1, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    args: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    seconds, forecasts = evaluate(args.recipe, args.tickers, args.years)
    ratio, total = seconds.pop("ratio"), sum(seconds.values())
    print(f"{args.recipe}, {args.tickers} tickers, {forecasts:,} forecasts, {args.threads} threads\n")
    print("| part | seconds | share |\n|---|---:|---:|")
    for part, value in {**seconds, "all": total}.items():
        print(f"| {part} | {value:.1f} | {value / total:.0%} |")
    print(f"\na window for each day would take {ratio:.1f} times as long to forecast")


if __name__ == "__main__":
    main()
