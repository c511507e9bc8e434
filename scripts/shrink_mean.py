"""Shrinks a checkpoint's mean towards zero, by as much as the dates tell that it was chosen by.

    python scripts/shrink_mean.py --model outputs/27m --prices FILE_OR_DIR --output-dir outputs/27m-shrunk

Means fitted to the squared errors of daily returns are too large on later dates (docs/LOG.md). The slope of realised
on forecast returns over the validation dates (Mincer and Zarnowitz, 1969, without their constant), kept within 0 and
1, is multiplied into the head, one for each horizon. Ranks of forecasts and all quantiles stay as they are.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers.utils import logging

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.cleaning import load_prices
from spaceexploreai.data.files import check_new_folder, whole_folder
from spaceexploreai.data.windows import DateRange
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.scripts.evaluate import forecast_range
from spaceexploreai.scripts.forecasters import load_checkpoint
from spaceexploreai.train.arguments import command, make_parser
from spaceexploreai.train.report import CARD, REPORT


def selection_range(config: SpaceExploreConfig) -> DateRange:
    """The dates after those of training, up to the last that a choice was made by."""
    if config.train_cutoff is None or (config.selection_cutoff or "") <= config.train_cutoff:
        raise ValueError(
            f"there are no dates that the checkpoint was chosen by: train_cutoff {config.train_cutoff}, "
            f"selection_cutoff {config.selection_cutoff}"
        )
    return DateRange(pd.Timestamp(config.train_cutoff) + pd.Timedelta(days=1), pd.Timestamp(config.selection_cutoff))


def slopes(forecasts: pd.DataFrame, within: DateRange) -> dict[int, float]:
    """Least-squares slope through zero of realised on forecast returns for each horizon, within 0 and 1; of what was
    realised by the end of the range. 0 where every forecast is."""
    known = forecasts[np.isfinite(forecasts["y"]) & (forecasts["date"] <= within.end)]
    unknown = sorted(set(forecasts["horizon"]) - set(known["horizon"]))
    if unknown:
        raise ValueError(
            f"the prices end before any return over {unknown[0]} days of {within.start.date()} to {within.end.date()} "
            "is known"
        )
    products = known.assign(both=known["mean"] * known["y"], square=known["mean"] ** 2)
    sums = products.groupby("horizon")[["both", "square"]].sum()
    return (sums["both"] / sums["square"]).fillna(0.0).clip(0, 1).to_dict()


@torch.no_grad()
def shrink(model: SpaceExploreForRegression, factors: dict[int, float]) -> None:
    """Multiplies the mean of each horizon by its factor."""
    by_horizon = torch.tensor([factors[horizon] for horizon in model.config.horizons])
    model.mean_head.weight *= by_horizon.unsqueeze(-1)
    model.mean_head.bias *= by_horizon


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder of a regression")
    parser.add_argument("--stride", type=int, help="days forecast from one window; default: a quarter of the context")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_new_folder(args.output_dir)
    model, extractor = load_checkpoint(str(args.model))
    within = selection_range(model.config)
    prices = load_prices(args.prices, args.tickers, extractor.calendar, args.strict, args.fill)
    factors = slopes(forecast_range(model, extractor, prices, within, stride=args.stride), within)
    shrink(model, factors)
    with whole_folder(args.output_dir) as whole:
        shutil.copytree(args.model, whole, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*"))
        model.save_pretrained(whole)
        said = f"means times {factors}, the slopes of {within.start.date()} to {within.end.date()}"
        for report in filter(Path.is_file, (whole / REPORT, whole / CARD)):
            with report.open("a", encoding="utf-8") as file:
                file.write(f"\n## Afterwards\n\n`scripts/shrink_mean.py`: {said}. The tables above are from before.\n")
    print(f"{said}: {args.output_dir}")


if __name__ == "__main__":
    main()
