"""Forecasts the days after the newest bar of each ticker.

    python scripts/forecast.py --model DIR (--tickers AAPL | --prices FILE_OR_DIR) [--as-of DATE] [--output FILE]

Prints, and with --output writes, the forecast table: log-returns from the close at `cutoff`, naive forecasts beside
the model's. Without --prices the tickers are those of the embedded sample.
"""

import pandas as pd
import torch

from spaceexploreai.data.cleaning import load_prices
from spaceexploreai.data.prices import check_suffix, write_atomically, write_table
from spaceexploreai.evaluation.baselines import add_baselines
from spaceexploreai.evaluation.plots import plot_forecast
from spaceexploreai.evaluation.scores import add_outcomes
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.scripts.forecasters import load_checkpoint
from spaceexploreai.train.arguments import command, make_parser


@torch.inference_mode()
def forecast_newest(
    model: SpaceExploreForRegression,
    extractor: SpaceExploreFeatureExtractor,
    prices: pd.DataFrame,
    as_of: str | None = None,
) -> pd.DataFrame:
    """Forecast table of each ticker's newest bar, or its newest up to `as_of`, with outcomes where they are known."""
    inputs = extractor(prices, as_of=as_of).to(model.device)
    table = extractor.decode(model(**inputs), prices, model.config, as_of=as_of, unit="log_return")
    return add_baselines(add_outcomes(table, prices), prices)


def summarize(forecasts: pd.DataFrame) -> str:
    """The model's median and 90 % interval beside the EWMA baseline's, in percent, for a terminal."""
    shown = forecasts[["ticker", "cutoff", "date", "horizon"]].copy()
    for column in ("cutoff", "date"):
        shown[column] = shown[column].dt.date
    for name, column in (("5 %", "q0.05"), ("median", "q0.5"), ("95 %", "q0.95")):
        shown[name] = (100 * forecasts[column]).map("{:+.2f} %".format)
    shown["P(up)"] = forecasts["p_up"].map("{:.2f}".format)
    for name, column in (("naive 5 %", "ewma_q0.05"), ("naive 95 %", "ewma_q0.95")):
        shown[name] = (100 * forecasts[column]).map("{:+.2f} %".format)
    return shown.to_string(index=False)


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub repository")
    parser.add_argument("--as-of", help="forecast as if this date (YYYY-MM-DD) were the newest")
    parser.add_argument("--output", help="write the forecast table here, .parquet or .csv")
    parser.add_argument("--plot", help="draw the first ticker's fan chart here, .png")
    args = parser.parse_args(argv)
    if args.tickers is None and args.prices is None:
        raise ValueError("give --tickers, --prices or both")
    if args.output:
        check_suffix(args.output, ".parquet", ".csv")
    if args.plot:
        check_suffix(args.plot, ".png")

    model, extractor = load_checkpoint(args.model)
    prices = load_prices(args.prices, args.tickers, extractor.calendar, args.strict, args.fill)
    forecasts = forecast_newest(model, extractor, prices, args.as_of)
    print(summarize(forecasts))
    if args.output:
        write_table(forecasts, args.output)
        print(f"wrote {args.output}")
    if args.plot:
        write_atomically(args.plot, plot_forecast(forecasts, prices, forecasts["ticker"].iloc[0]).savefig)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
