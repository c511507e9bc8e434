"""A model's own paths to preference pairs: sampled, ranked by what was realised, and written as a dataset folder.

    python scripts/build_preferences.py --model CLM [--num-samples 8] [--chosen realised|best]
        [--universe nasdaq100|sp500|dow30|FILE|all] [--prices FILE_OR_DIR] [--output-dir DIR]
    accelerate launch train/dpo.py --config recipes/tiny/dpo.yaml --model_name_or_path CLM --dataset DIR

Of the paths that the model samples after each context, the one of median rank is rejected (`data/preferences.py` has
the score) for the realised path, or for the best sample. One pair for every ticker and path that overlaps no other,
all of them within the dates that the model was trained on. The folder is that of `scripts/build_dataset.py`.
"""

import argparse
from functools import partial
from pathlib import Path

from spaceexploreai.data.download import universe_tickers
from spaceexploreai.data.preferences import CHOICES, check_samples
from spaceexploreai.data.stocks import Stocks, StocksConfig, date_ranges, sampled_pairs
from spaceexploreai.scripts.build_dataset import check_folder, write_beside, write_folder, write_splits
from spaceexploreai.train.arguments import command, make_parser
from spaceexploreai.train.sampling import ModelPaths, check_dates, language_config

OF_STOCKS = ("margin", "seed", "validation_fraction", "test_fraction")


def make_preferences_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint of a causal language model, folder or on the Hub")
    parser.add_argument("--num-samples", type=int, default=8, help="paths of a context; default: %(default)s")
    parser.add_argument("--chosen", choices=CHOICES, default="realised", help="default: %(default)s")
    parser.add_argument(
        "--universe", default="nasdaq100", help="nasdaq100, sp500, dow30, a text file of tickers, or all of the prices"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/preferences"), help="default: %(default)s")
    for name in OF_STOCKS:
        default = getattr(StocksConfig, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="%(default)s")
    parser.add_argument("--licence", help="sentence of the card about the prices' licence")
    return parser


def make_builder(args: argparse.Namespace, horizons: list[int]) -> Stocks:
    """Of the pairs, which look to the model as what it was trained on."""
    options = {name: getattr(args, name) for name in ("prices", "tickers", "strict", "fill", *OF_STOCKS)}
    tickers = None if args.universe == "all" else universe_tickers(args.universe)
    return Stocks(config_name="dpo", extractor=args.model, horizons=horizons, pair_tickers=tickers, **options)


def fill_with_pairs(builder: Stocks, paths: ModelPaths, sampling: dict, folder: Path) -> None:
    series, count = builder.earlier("series"), len(builder.series)
    write_splits(series.as_dataset(), folder / "series", count)
    write_splits(sampled_pairs(builder, paths, sampling["chosen"]), folder / "dpo", count)
    write_beside(series, folder, sampling=sampling)


@command
def main(argv: list[str] | None = None) -> None:
    args = make_preferences_parser().parse_args(argv)
    check_folder(args.output_dir)
    check_samples(args.num_samples, args.chosen)
    config = language_config(args.model)
    builder = make_builder(args, list(config.horizons))
    builder.earlier("series").download_and_prepare()
    check_dates(config, date_ranges(builder.metadata), args.model)
    paths = ModelPaths.from_pretrained(args.model, builder.extractor.context_length, args.num_samples, args.seed)
    sampling = {name: getattr(args, name) for name in ("model", "num_samples", "chosen", "seed")}
    write_folder(args.output_dir, partial(fill_with_pairs, builder, paths, sampling), builder.config, args.licence)


if __name__ == "__main__":
    main()
