"""Forecasts the days after the newest bar of each ticker.

    python scripts/forecast.py --model DIR (--tickers AAPL | --prices FILE_OR_DIR) [--as-of DATE] [--output FILE]
        [--prediction-length DAYS] [--num-samples N --paths FILE]

Prints, and with --output writes, the forecast table of the pipeline (docs/pipeline.md): log-returns from the close at
`cutoff`, or of a classification probabilities, naive forecasts beside the model's. Without --prices the tickers are
those of the embedded sample.
"""

import argparse

import pandas as pd

from spaceexploreai.data.cleaning import load_prices
from spaceexploreai.data.files import check_suffix, write_atomically
from spaceexploreai.data.prices import write_table
from spaceexploreai.evaluation.baselines import add_baselines
from spaceexploreai.evaluation.classes import CLASSES, probabilities_of
from spaceexploreai.evaluation.plots import plot_forecast
from spaceexploreai.evaluation.scores import add_outcomes
from spaceexploreai.pipeline_spaceexplore import CLASSIFICATION, Forecast, SpaceExplorePipeline
from spaceexploreai.scripts.forecasters import load_pipeline
from spaceexploreai.train.arguments import command, make_parser
from spaceexploreai.train.memory import keep_freed_memory

TABLES = (".parquet", ".csv")


def forecast_newest(pipe: SpaceExplorePipeline, prices: pd.DataFrame, as_of: str | None = None, **options) -> Forecast:
    """Forecast table of each ticker's newest bar, or its newest up to `as_of`, with baselines and, where they are
    known, outcomes; paths where `num_samples` is among the options, those of the pipeline."""
    unit = {} if pipe.head == CLASSIFICATION else {"unit": "log_return"}
    answer = pipe(prices, as_of=as_of, **unit, **options)
    forecast = answer if isinstance(answer, Forecast) else Forecast(answer, None)
    return forecast._replace(table=add_baselines(add_outcomes(forecast.table, prices), prices))


def summarize(forecasts: pd.DataFrame) -> str:
    """The model's median and 90 % interval, or its classes, beside the EWMA baseline's, for a terminal."""
    shown = forecasts[["ticker", "cutoff", "date", "horizon"]].copy()
    for column in ("cutoff", "date"):
        shown[column] = shown[column].dt.date
    return shown.assign(**(_classes(forecasts) if "band" in forecasts else _returns(forecasts))).to_string(index=False)


def _returns(forecasts: pd.DataFrame) -> dict[str, pd.Series]:
    columns = {
        "5 %": "q0.05",
        "median": "q0.5",
        "95 %": "q0.95",
        "naive 5 %": "ewma_q0.05",
        "naive 95 %": "ewma_q0.95",
    }
    shown = {name: (100 * forecasts[column]).map("{:+.2f} %".format) for name, column in columns.items()}
    return shown | {"P(up)": forecasts["p_up"].map("{:.2f}".format)}


def _classes(forecasts: pd.DataFrame) -> dict[str, list[str]]:
    shown = {"flat within": (100 * forecasts["band"]).map("±{:.2f} %".format)}
    for prefix, name in (("", "model"), ("naive ", "ewma")):
        columns = zip(CLASSES, probabilities_of(forecasts, name).T, strict=True)
        shown |= {f"{prefix}P({one})": [f"{chance:.2f}" for chance in column] for one, column in columns}
    return shown


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub repository")
    parser.add_argument("--as-of", help="forecast as if this date (YYYY-MM-DD) were the newest")
    parser.add_argument("--prediction-length", type=int, help="every trading day up to this, not the model's horizons")
    parser.add_argument("--num-samples", type=int, help="paths of each ticker")
    parser.add_argument("--seed", type=int, default=0, help="of the paths")
    parser.add_argument("--device", help="where to compute; an accelerator by default, if there is one")
    parser.add_argument("--output", help="write the forecast table here, .parquet or .csv")
    parser.add_argument("--paths", help="write the closes of the paths here, .parquet or .csv")
    parser.add_argument("--plot", help="draw the first ticker's fan chart here, .png")
    args = parser.parse_args(argv)
    if args.tickers is None and args.prices is None:
        raise ValueError("give --tickers, --prices or both")
    if args.paths and args.num_samples is None:
        raise ValueError(f"--paths {args.paths} needs --num-samples")
    for path, suffixes in ((args.output, TABLES), (args.paths, TABLES), (args.plot, (".png",))):
        if path:
            check_suffix(path, *suffixes)
    return args


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    keep_freed_memory()
    pipe = load_pipeline(args.model, args.device)
    if args.plot and pipe.head == CLASSIFICATION:
        raise ValueError(f"--plot {args.plot}: a classification forecasts no range of prices to draw")
    prices = load_prices(args.prices, args.tickers, pipe.feature_extractor.calendar, args.strict, args.fill)
    given = {"prediction_length": args.prediction_length, "num_samples": args.num_samples}
    options = {name: value for name, value in given.items() if value is not None}
    forecasts, paths = forecast_newest(pipe, prices, args.as_of, seed=args.seed, **options)
    print(summarize(forecasts))
    for path, table in ((args.output, forecasts), (args.paths, paths)):
        if path:
            write_table(table, path)
            print(f"wrote {path}")
    if args.plot:
        write_atomically(args.plot, plot_forecast(forecasts, prices, forecasts["ticker"].iloc[0]).savefig)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
