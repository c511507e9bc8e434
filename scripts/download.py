"""Downloads daily prices into a folder that every other command reads with --prices.

    python scripts/download.py --tickers AAPL,MSFT,GOOGL --start-date 2010-01-01 --output-dir prices
    python scripts/download.py --universe sp500 --output-dir prices
    python scripts/download.py --tickers-file mine.txt --source csv:my_prices.parquet --output-dir prices
    python scripts/download.py --universe sp500 --output-dir prices --update

Writes price_history/TICKER/TICKER_yahoo_YYYYMMDD.csv, adjusted for splits and dividends, prices.parquet with all of
them, and manifest.json. Finished tickers are skipped: run the same command again after an interruption or a failure.
The bar of a day is written once its session has been closed for half an hour; see --calendar.

A universe is an index's membership on one day, see data/universes.json. Its companies are in the index because they
did well, and those that failed are missing: what is measured on their history has survivorship bias.

Exits with 0 if all tickers are there, 1 if some failed (listed on standard error), 2 for a mistake in the command.
"""

import argparse
import sys

import pandas as pd

from spaceexploreai.data.download import PROVIDERS, Order, Patience, Report, download, read_tickers_file, read_universe
from spaceexploreai.data.prices import parse_tickers
from spaceexploreai.feature_extraction_spaceexplore import parse_dates
from spaceexploreai.train.arguments import bare_parser, command


def make_parser() -> argparse.ArgumentParser:
    parser = bare_parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tickers", help="comma-separated, as the source writes them")
    which.add_argument("--universe", help="dow30, nasdaq100 or sp500; see above")
    which.add_argument("--tickers-file", help="text file, one ticker a line or comma-separated; # begins a comment")
    parser.add_argument("--start-date", default="2010-01-01", help="first day (YYYY-MM-DD); default: %(default)s")
    parser.add_argument("--end-date", help="last day (YYYY-MM-DD); default: the newest that is finished")
    parser.add_argument("--source", default="yahoo", help=f"one of {', '.join(PROVIDERS)}; csv:PATH reads your files")
    parser.add_argument("--output-dir", required=True, help="folder to write")
    parser.add_argument("--update", action="store_true", help="append the days since to files that are there")
    parser.add_argument("--calendar", default="XNYS", help="exchange_calendars code; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=Patience.batch_size, help="tickers at a time, %(default)s")
    parser.add_argument("--rate", type=float, default=Patience.rate, help="requests a second, %(default)s")
    parser.add_argument("--tries", type=int, default=Patience.tries, help="tries of a ticker, %(default)s")
    parser.add_argument("--backoff", type=float, default=Patience.backoff, help="seconds before a second try, doubled")
    return parser


def choose_tickers(args: argparse.Namespace) -> tuple[list[str], dict | None]:
    """The tickers, and the universe if they are one."""
    if args.universe is None:
        return read_tickers_file(args.tickers_file) if args.tickers is None else parse_tickers(args.tickers), None
    universe = read_universe(args.universe)
    print(f"{args.universe}: members of {universe['as_of']}, so that their history has survivorship bias")
    return universe["tickers"], universe


def read_day(text: str) -> pd.Timestamp:
    day = parse_dates(pd.Series([text]))[0]
    if pd.isna(day):
        raise ValueError(f"{text!r} is not a date (YYYY-MM-DD)")
    return day


def summarize(report: Report, updated: bool) -> str:
    """What became of the tickers, for a terminal."""
    counts = f"{len(report.written)} written, {len(report.unchanged)} left as they were, {len(report.failures)} failed"
    hint = ["--update appends newer days"] if report.unchanged and not updated else []
    return "\n".join([counts, *hint, *(f"left out {bar}" for bar in report.dropped)])


@command
def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    start, end = read_day(args.start_date), None if args.end_date is None else read_day(args.end_date)
    order = Order(args.source, start, end, args.calendar)
    patience = Patience(args.rate, args.tries, args.backoff, args.batch_size)
    tickers, universe = choose_tickers(args)

    report = download(tickers, args.output_dir, order, update=args.update, patience=patience, universe=universe)
    print(summarize(report, args.update))
    if report.failures:
        failures = [f"failed: {ticker}: {why}" for ticker, why in sorted(report.failures.items())]
        print(*failures, sep="\n", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
