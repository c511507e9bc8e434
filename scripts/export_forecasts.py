"""Writes a forecast table in the form of another library.

    python scripts/export_forecasts.py --forecasts forecasts.parquet --format qlib --horizon 5 [--signal p_up]
        --output signal.parquet
    python scripts/export_forecasts.py --forecasts forecasts.parquet --format gluonts|fev --horizon 2
        [--prices FILE_OR_DIR] --output FILE_OR_DIR

The table is the one that scripts/evaluate.py writes, and the prices are those that it was made of. Of qlib's signal
--horizon is the one to trade on; GluonTS and fev get forecasts of prices for every trading day from 1 to --horizon.
docs/forecast_exports.md says what the files mean and how each library loads them.
"""

import argparse
import json
from pathlib import Path

from spaceexploreai.data.cleaning import load_prices
from spaceexploreai.data.files import check_suffix, write_atomically
from spaceexploreai.data.prices import write_table
from spaceexploreai.evaluation.backtest import SIGNALS
from spaceexploreai.evaluation.exports import fev_task, price_forecasts, qlib_signal
from spaceexploreai.scripts.backtest import read_forecasts
from spaceexploreai.train.arguments import command, make_parser

SUFFIXES = {"qlib": (".parquet", ".csv"), "gluonts": (".parquet",)}  # fev gets a folder


def export_signal(args: argparse.Namespace) -> None:
    signal = qlib_signal(read_forecasts(args.forecasts, args.tickers), args.horizon, args.signal)
    write_table(signal, args.output)
    print(f"{args.signal} of horizon {args.horizon}: {len(signal):,} scores of {signal['datetime'].nunique():,} days")


def export_prices(args: argparse.Namespace) -> None:
    forecasts = read_forecasts(args.forecasts, args.tickers)
    prices = load_prices(args.prices, args.tickers, args.calendar, args.strict, args.fill)
    table = price_forecasts(forecasts, prices, args.horizon)
    if args.format == "gluonts":
        write_table(table, args.output)
        print(f"{len(table):,} forecasts of {args.horizon} steps")
        return
    dataset, predictions, task = fev_task(table, prices)
    write_table(dataset, args.output / "dataset.parquet")
    write_table(predictions, args.output / "predictions.parquet")
    write_atomically(args.output / "task.json", lambda path: path.write_text(json.dumps(task, indent=2) + "\n"))
    print(
        f"{task['num_windows']:,} windows of {len(dataset):,} tickers; left out: "
        f"{len(table) - len(predictions):,} forecasts that reach beyond the prices"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--forecasts", required=True, help="forecast table, .parquet or .csv")
    parser.add_argument("--format", choices=(*SUFFIXES, "fev"), required=True, help="library to write for")
    parser.add_argument("--horizon", type=int, required=True, help="in trading days; of GluonTS and fev the last step")
    parser.add_argument(
        "--signal", default="mean", help=f"qlib's score: {', '.join(SIGNALS)}; of a baseline: ewma_mean. Default: mean"
    )
    parser.add_argument(
        "--calendar", default="XNYS", help="exchange_calendars code of the prices; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, required=True, help="file, or folder of fev, to write")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.format in SUFFIXES:
        check_suffix(args.output, *SUFFIXES[args.format])
    (export_signal if args.format == "qlib" else export_prices)(args)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
