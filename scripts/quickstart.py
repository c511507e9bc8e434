"""From prices to an honest forecast in one command: trains a tiny model on real prices, judges it, and puts the
shipped network's forecast beside its own.

    python scripts/quickstart.py [--tickers AAPL,MSFT] [--prices FILE_OR_DIR] [--num-train-epochs N]

Without --prices it uses the embedded sample and needs no network. Writes outputs/quickstart/{model/, report.html,
report.md, forecasts.parquet, metrics.json, forecast.png, forecast_shipped.png, predicted_vs_actual.png}.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from matplotlib.figure import Figure
from transformers.utils import logging

from spaceexploreai.data.cleaning import read_clean
from spaceexploreai.data.files import write_atomically
from spaceexploreai.evaluation.plots import plot_forecast, plot_predicted_vs_actual
from spaceexploreai.evaluation.report import Picture, Report, pictures_of
from spaceexploreai.evaluation.scores import format_scores, score
from spaceexploreai.scripts.evaluate import (
    facts_of,
    forecast_range,
    inside_of,
    notices_of,
    scored_range,
    write_evaluation,
)
from spaceexploreai.scripts.forecast import forecast_newest, summarize
from spaceexploreai.scripts.forecasters import load_pipeline
from spaceexploreai.train.arguments import command, make_parser, parse_run
from spaceexploreai.train.sft import train_and_report

ROOT = Path(__file__).parents[1]  # where the shipped checkpoint lies
RECIPE = ROOT / "recipes" / "tiny"


def train_tiny(args: argparse.Namespace, folder: Path) -> None:
    """Runs the tiny recipe; its checkpoints are scratch, only the best is kept in the folder."""
    options = {name: getattr(args, name) for name in ("prices", "tickers", "strict", "fill", "num_train_epochs")}
    argv = ["--config", str(RECIPE / "sft.yaml"), "--model_config", str(RECIPE / "config.json")]
    argv += ["--disable_tqdm", "false"]  # which would follow the library's verbosity
    for name, value in options.items():
        argv += [] if value is None else [f"--{name}", str(value)]
    with TemporaryDirectory() as scratch:
        train_and_report(parse_run([*argv, "--output_dir", scratch]), folder)


def forecast_shipped(prices: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The newest forecast of the shipped network, and what must be known about it."""
    pipe = load_pipeline(ROOT, "cpu")
    table, cutoff = forecast_newest(pipe, prices).table, pipe.model.config.train_cutoff
    known = f"{table['cutoff'].min():%Y-%m-%d}" <= cutoff
    of_training = "these days are among them: see its form, not its skill" if known else "these days are later"
    return f"The shipped 27M network was trained on days to {cutoff}; {of_training}.", table


def write_results(folder: Path, forecasts: pd.DataFrame, report: Report, figures: dict[str, Figure]) -> list[Path]:
    tables = write_evaluation(folder / "forecasts.parquet", forecasts, report)
    for name, figure in figures.items():
        write_atomically(folder / name, figure.savefig)
    return [*tables, *(folder / name for name in figures)]


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--num-train-epochs", type=float, help="default: as recipes/tiny/sft.yaml says")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    args = parser.parse_args(argv)
    # The tiny network's matrices are too small to share: on a busy machine a second thread makes it wait fivefold.
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of weights being read and written, thousands a second

    prices, _ = read_clean(args.prices, args.tickers, strict=args.strict, fill=args.fill)
    print(f"[1/4] training recipes/tiny on {', '.join(prices['ticker'].unique()[:8])}", flush=True)
    train_tiny(args, args.output_dir / "model")

    pipe = load_pipeline(args.output_dir / "model", "cpu")
    model, extractor = pipe.model, pipe.feature_extractor
    within = scored_range(model.config, prices, start=None, end=None)
    print(f"[2/4] evaluating on {within.start.date()} to {within.end.date()}, which training never saw", flush=True)
    series = extractor.encode(prices)
    forecasts = forecast_range(model, extractor, prices, within, series=series)
    scores = score(forecasts)
    facts = facts_of("recipes/tiny", args.prices, model.config, within, forecasts)
    pictures = pictures_of(forecasts, prices, **inside_of(model, extractor, series, within, forecasts))
    report = Report("Forecasts of the quickstart", facts, scores, notices_of(within, model.config), pictures)

    print("[3/4] forecasting the days after the newest bar", flush=True)
    newest = forecast_newest(pipe, prices).table
    print("[4/4] forecasting them by the shipped network", flush=True)
    notice, shipped = forecast_shipped(prices)
    ticker = newest["ticker"].iloc[0]
    figures = {
        "forecast.png": plot_forecast(newest, prices, ticker),
        "forecast_shipped.png": plot_forecast(shipped, prices, ticker),
        "predicted_vs_actual.png": plot_predicted_vs_actual(forecasts),
    }
    pictures.append(Picture("The shipped network", notice, figures["forecast_shipped.png"]))
    paths = write_results(args.output_dir, forecasts, report, figures)

    print(f"\n{format_scores(scores)}\n\n{summarize(newest)}\n\n{notice}\n\n{summarize(shipped)}\n")
    for path in (args.output_dir / "model", *paths):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
