"""Backtests a forecast table: what trading on it would have earned, after costs, beside holding everything.

    python scripts/backtest.py --forecasts forecasts.parquet [--prices FILE_OR_DIR] --horizon 5 [--top-k 10]
        [--side long-short] [--trials N] --output-dir backtest

The table is the one that scripts/evaluate.py writes. A rebalance is decided at the close of a cutoff and filled at the
next open; evaluation/backtest.py says how. Writes backtest.json, equity.parquet, orders.parquet and equity.png.
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from spaceexploreai.data.cleaning import load_prices
from spaceexploreai.data.files import write_atomically
from spaceexploreai.data.prices import parse_tickers, write_table
from spaceexploreai.evaluation.backtest import OUTCOMES, SIDES, SIGNALS, Costs, Ledger, backtest
from spaceexploreai.evaluation.baselines import require_columns
from spaceexploreai.evaluation.performance import deflated_sharpe, format_tear_sheet, returns_of, tear_sheet
from spaceexploreai.evaluation.plots import plot_equity
from spaceexploreai.feature_extraction_spaceexplore import parse_dates
from spaceexploreai.train.arguments import command, make_parser

FILES = ("backtest.json", "equity.parquet", "orders.parquet", "equity.png")
SURVIVORS = (
    "The tickers of a price table are mostly those that survived, picked with hindsight: returns, the benchmarks' "
    "included, are too high and drawdowns too mild."
)


def read_forecasts(path: str, tickers: str | None = None) -> pd.DataFrame:
    """Reads a forecast table, .parquet or .csv; of some tickers alone where they are named."""
    if not path.endswith((".parquet", ".csv")):
        raise ValueError(f"{path} is neither a .parquet nor a .csv file")
    # NA is a ticker.
    text = {"dtype": {"ticker": str}, "keep_default_na": False, "na_values": [""]}
    forecasts = pd.read_parquet(path) if path.endswith(".parquet") else pd.read_csv(path, **text)
    require_columns(forecasts, ["ticker", "cutoff", "horizon"])
    if tickers is not None:
        forecasts = forecasts[forecasts["ticker"].isin(parse_tickers(tickers))]
    cutoffs = parse_dates(forecasts["cutoff"])
    if cutoffs.isna().any():
        raise ValueError(f"{path}: cutoff {forecasts['cutoff'][cutoffs.isna()].iloc[0]!r} is not a date (YYYY-MM-DD)")
    if "in_sample" in forecasts and forecasts["in_sample"].any():
        seen = cutoffs[forecasts["in_sample"].astype(bool)].max()
        raise ValueError(f"{path}: the model was trained on {seen:%Y-%m-%d}; what it earns there says nothing")
    dates = {"date": parse_dates(forecasts["date"])} if "date" in forecasts else {}
    return forecasts.assign(cutoff=cutoffs, **dates)


def notes_to(ledgers: dict[str, Ledger], prices: pd.DataFrame, trials: int) -> list[str]:
    """What a reader of the figures must know."""
    daily = ledgers["strategy"].daily
    best, probability = deflated_sharpe(returns_of(daily), trials)
    lives = prices[prices["date"] >= daily.index[0]].groupby("ticker")["date"].max()
    ended = int((lives < daily.index[-1]).sum())
    return [
        f"survivorship: {SURVIVORS} Here {ended} of {len(lives)} tickers end before the backtest does.",
        f"multiple testing: the best of {trials} strategies without skill would show a Sharpe ratio of {best:.2f}; "
        f"the true one here is above that with probability {probability:.2f} (deflated Sharpe ratio). Every signal, "
        "horizon, side, top-k and period that was looked at is a trial: count them in --trials.",
        "not modelled: market impact, borrow that is recalled or cannot be had, taxes, interest on cash.",
    ]


def write_report(
    folder: Path, options: dict, ledgers: dict[str, Ledger], sheet: pd.DataFrame, notes: list[str]
) -> None:
    """Writes the four files."""
    daily, orders = (
        pd.concat({name: getattr(ledger, table) for name, ledger in ledgers.items()}, names=["portfolio"])
        for table in ("daily", "orders")
    )
    write_table(daily.reset_index(), folder / "equity.parquet")
    write_table(orders.reset_index("portfolio"), folder / "orders.parquet")
    equity = pd.DataFrame({name: ledger.daily["equity"] for name, ledger in ledgers.items()})
    title = "{side}, top {top_k} of {signal}, horizon {horizon}, after costs".format(**options)
    write_atomically(folder / "equity.png", plot_equity(equity, title).savefig)
    figures = {
        portfolio: {name: value if math.isfinite(value) else None for name, value in column.items()}
        for portfolio, column in sheet.items()
    }
    days = {"start": f"{equity.index[0]:%Y-%m-%d}", "end": f"{equity.index[-1]:%Y-%m-%d}"}
    report = {"options": options, **days, "orders": count_orders(ledgers), "figures": figures, "notes": notes}
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "backtest.json", lambda path: Path(path).write_text(text))


def count_orders(ledgers: dict[str, Ledger]) -> dict[str, dict[str, int]]:
    """By portfolio and outcome."""
    outcomes = {name: ledger.orders["outcome"].value_counts() for name, ledger in ledgers.items()}
    return {name: {outcome: int(counts.get(outcome, 0)) for outcome in OUTCOMES} for name, counts in outcomes.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--forecasts", required=True, help="forecast table, .parquet or .csv")
    parser.add_argument(
        "--calendar", default="XNYS", help="exchange_calendars code of the prices; default: %(default)s"
    )
    parser.add_argument("--horizon", type=int, required=True, help="of the forecasts to trade on, in trading days")
    parser.add_argument("--hold", type=int, help="trading days from one rebalance to the next; default: the horizon")
    parser.add_argument(
        "--signal", default="mean", help=f"{', '.join(SIGNALS)}; of a baseline: ewma_mean. Default: mean"
    )
    parser.add_argument("--side", default="long-short", help=f"{' or '.join(SIDES)}; default: %(default)s")
    parser.add_argument("--top-k", type=int, default=10, help="tickers on each side; default: %(default)s")
    for name, what in (("commission", "of a trade"), ("half_spread", "of a trade"), ("borrow", "of shorts, a year")):
        option, default = f"--{name.replace('_', '-')}", getattr(Costs, name)
        parser.add_argument(option, type=float, default=default, help=f"basis points {what}; default: {default:g}")
    parser.add_argument(
        "--turnover-limit", type=float, help="of one rebalance; 0.5 is half of the equity; default: none"
    )
    parser.add_argument(
        "--trials", type=int, default=1, help="strategies tried, this one included; default: %(default)s"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    costs = Costs(args.commission, args.half_spread, args.borrow)
    options = {name: getattr(args, name) for name in ("horizon", "signal", "side", "top_k", "turnover_limit")}
    options["hold"] = args.horizon if args.hold is None else args.hold
    forecasts = read_forecasts(args.forecasts, args.tickers)
    prices = load_prices(args.prices, args.tickers, args.calendar, args.strict, args.fill)
    ledgers = backtest(forecasts, prices, costs=costs, **options)
    sheet = tear_sheet({name: ledger.daily for name, ledger in ledgers.items()}, args.trials)
    notes = notes_to(ledgers, prices, args.trials)
    write_report(args.output_dir, {**options, **asdict(costs), "trials": args.trials}, ledgers, sheet, notes)
    days = ledgers["strategy"].daily.index
    print(
        f"{days[0]:%Y-%m-%d} to {days[-1]:%Y-%m-%d}, {forecasts['ticker'].nunique()} tickers; orders of the strategy: "
        + ", ".join(f"{count} {outcome}" for outcome, count in count_orders(ledgers)["strategy"].items())
    )
    print(format_tear_sheet(sheet), *notes, sep="\n")
    print(f"wrote {', '.join(str(args.output_dir / name) for name in FILES)}")


if __name__ == "__main__":
    main()
