"""Prices to a published dataset: windows for training, preference pairs for alignment, and a card that explains them.

    python scripts/build_dataset.py --prices FILE_OR_DIR [--tickers AAPL,MSFT] [--config sft|dpo|all] [--num-proc N]
        [--universe nasdaq100] [--output-dir DIR] [--push-to-hub REPO --private]
        [--cluster ADDRESS|local:N]

Writes DIR/{series,sft,dpo}/*.parquet, README.md, preprocessor_config.json and stocks.json, whole or not at all.
`load_dataset(DIR, "sft")` reads it where this package is not installed. What was computed is kept in the cache of
`datasets` and used again until an option, the code or the prices change. With `--cluster` the same folder is made by
the workers of a Dask cluster, a few tickers at a time, without that cache: see `data/cluster.py`.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml
from datasets import Dataset

from spaceexploreai.data.cleaning import CleaningReport
from spaceexploreai.data.cluster import build_folder, connect, write_file
from spaceexploreai.data.download import universe_tickers
from spaceexploreai.data.files import whole_folder
from spaceexploreai.data.stocks import (
    HISTORY,
    METADATA_NAME,
    READS,
    TICKERS_PER_BATCH,
    Stocks,
    StocksConfig,
)
from spaceexploreai.data.windows import Split
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.scripts.hub import check_push, push
from spaceexploreai.train.arguments import command, make_parser

# A file of series of 20 years and 64 features then has some 60 MB, and one of windows the windows of its tickers.
TICKERS_PER_FILE = 64
SIMPLE_OPTIONS = (
    *("feature_groups", "normalization", "calendar", "context_length", "validation_fraction", "test_fraction"),
    *("stride", "target", "margin", "seed"),
)
SPLITS = {"series": (HISTORY,), "sft": Split._fields, "dpo": Split._fields}
PARQUET_FILES = tuple(f"{name}/*.parquet" for name in SPLITS)
SAMPLE_LICENCE = "The prices are the embedded sample, which is in the public domain."
UNKNOWN_LICENCE = (
    "The prices keep the licence of their source, which is not recorded here. Most vendors, Yahoo among them, permit "
    "no redistribution: keep this dataset private unless yours does."
)
CONTENTS = {
    "series": "one row per ticker: `dates`, `close`, `scale` (daily volatility), `values`, the normalised features, "
    "and `labels`, -100 where unknown. A step without a bar has a NaN close. The one split reaches over all dates, "
    "those of the test included: read it through the indices of the others",
    "sft": "windows: steps `first` to `last` of the history in row `series`; those from `supervised` on have labels. "
    "In validation and test every step is labelled in one window alone",
    "dpo": "`prompt`, `chosen`, `rejected` as text for TRL, and where their numeric context lies: steps `first` to "
    "`last` of row `series`. `scale` is the volatility at the origin `date`, `margin` the distance of the two "
    "cumulative returns over scale·√H. All three splits lie within the training range",
}
PITFALLS = """\
- **Survivorship.** Tickers that were delisted before the prices were collected are missing, and an index's members of
  today were chosen by what happened since. Average returns are too high; report no backtest from them.
- **The purge.** Validation and test begin the day after the range before them ends, and no label crosses a border. A
  shuffled split of these windows would put neighbours, which share labels, on both sides.
- **One day is one example.** Tickers move together: windows of one date are far from independent, however many.
- **Overlapping windows** repeat steps in training (stride below the context length); that is intended.
- **The realised path is one draw.** It won over the rejected one by luck as much as by merit: returns are nearly
  noise, and preference labels with them. Use `label_smoothing` or `loss_type="robust"` / `"ipo"`.
- **beta sharpens.** The optimum is reference · (realised/rejected)^(1/beta): at TRL's default of 0.1 the forecast
  becomes far too narrow even for perfect pairs. Take beta 0.5 to 1, or keep a supervised term:
  `loss_type=["sigmoid", "sft"]`.
- **What is preferred.** {pairs}.
  Never prefer anything to the worst of several, which teaches a model to be narrow.
- **The margin filter** drops pairs whose ends lie close, so days with large moves are over-represented.
- **Rising reward margins and accuracies are no forecast quality.** Choose by CRPS, coverage and rank correlation on
  the validation range of `sft`, beside supervised training for as many steps and pairs with randomised labels.
- **Placeholders need their numbers.** `<ts>` stands for a numeric step. Train with `remove_unused_columns=False`, a
  collator that looks up the context, `max_length=None`, and without `set_format`."""
CARD = """\
# Stocks: windows and preference pairs

Made by `scripts/{script}` of SpaceExploreAI from {source}.

| configuration | split | rows | dates |
|---|---|---|---|
{table}

{contents}

{tickers} tickers; {features} features, normalised ({normalization}) by statistics of the training range, which
`preprocessor_config.json` holds; a model trained from this dataset must be saved with it. Labels are the target
`{target}` {horizons} steps ahead, not yet over `scale`; the longest is the purge. {dpo}

```python
import numpy as np
from datasets import load_dataset

series = load_dataset(folder, "series", split="history")  # with_format("numpy") would round the closes to float32
windows = load_dataset(folder, "sft", split="train")
window = windows[0]
one = series[window["series"]]
steps = slice(window["first"], window["last"] + 1)
past_values, scale, labels = (np.array(one[name][steps], np.float32) for name in ("values", "scale", "labels"))
attention_mask = np.isfinite(one["close"][steps])
labels[: window["supervised"] - window["first"]] = -100
```

With the package, `spaceexploreai.data.stocks.open_windows` reads the same without copying, and `stream_windows`
holds {batch} tickers in memory at a time. Shuffle the index, not a stream: a stream's buffer mixes neighbours only,
and is not restored exactly when training resumes.

## Pitfalls

{pitfalls}

## Licence

{licence}
"""


# --- the options -----------------------------------------------------------------------------------------------------


def make_build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--config", choices=("sft", "dpo", "all"), default="all", help="default: %(default)s")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/stocks"), help="default: %(default)s")
    parser.add_argument("--extractor", help="checkpoint whose features and statistics to keep; default: new ones")
    parser.add_argument("--universe", help="make pairs of nasdaq100, sp500, dow30 or the tickers of a text file alone")
    parser.add_argument("--horizons", help="comma-separated steps ahead; default: 1,2,5,10")
    for name in SIMPLE_OPTIONS:
        default = getattr(StocksConfig, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help=f"default: {default}")
    parser.add_argument("--train-start", help="first date (YYYY-MM-DD) to train on; default: the first of all")
    machines = parser.add_mutually_exclusive_group()
    machines.add_argument("--num-proc", type=int, help="processes; one by default")
    machines.add_argument("--cluster", metavar="ADDRESS", help="of a Dask scheduler, or local[:N] for N workers here")
    parser.add_argument("--licence", help="sentence of the card about the prices' licence")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the folder to this dataset repository")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    return parser


def dataset_options(args: argparse.Namespace) -> dict:
    """What was given on the command line, as fields of `StocksConfig`."""
    options = {name: getattr(args, name) for name in READS["sft"] + READS["dpo"] if name != "pair_tickers"}
    if args.horizons is not None:
        options["horizons"] = parse_horizons(args.horizons)
    if args.universe is not None:
        options["pair_tickers"] = universe_tickers(args.universe)
    return {name: value for name, value in options.items() if value is not None}


def parse_horizons(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"horizons must be integers separated by commas, got {text!r}") from None


# --- the folder ------------------------------------------------------------------------------------------------------


def build(names: tuple[str, ...], options: dict, num_proc: int | None = None) -> dict[str, Stocks]:
    """Builders of the configurations, prepared."""
    builders = {}
    for name in names:
        given = {key: value for key, value in options.items() if key in READS[name]}
        builders[name] = Stocks(config_name=name, **given)
        builders[name].download_and_prepare(num_proc=num_proc)
        print(f"prepared {name} in {builders[name].cache_dir}", flush=True)
    return builders


def write_folder(folder: Path, fill: Callable[[Path], None], config: StocksConfig, licence: str | None) -> None:
    """Writes all files of a published dataset, whole or not at all, and prints what they hold.

    Args:
        fill: writes all but the card into a folder.
        config: with the options of all configurations.
        licence: sentence about that of the prices.
    """
    licence = licence or (SAMPLE_LICENCE if config.prices is None else UNKNOWN_LICENCE)
    check_folder(folder)
    with whole_folder(folder) as temporary:
        fill(temporary)
        metadata = {**read_metadata(temporary), "fingerprint": fingerprint_of(temporary)}
        (temporary / METADATA_NAME).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(write_card(temporary, config, licence), encoding="utf-8")
    print(CleaningReport.from_dict(metadata["cleaning"]), file=sys.stderr)
    for line in count_rows(folder):
        print(line.strip("| ").replace(" | ", "  "))
    print(f"wrote {folder}")


def fill_by_cluster(cluster: str, config: StocksConfig, names: tuple[str, ...], folder: Path) -> None:
    with connect(cluster) as client:
        build_folder(client, config, names, folder, TICKERS_PER_FILE)


def fill_from_cache(builders: dict[str, Stocks], folder: Path) -> None:
    series = builders["series"]
    for name, builder in builders.items():
        write_splits(builder.as_dataset(), folder / name, len(series.series))
    write_beside(series, folder)


def write_splits(datasets: dict[str, Dataset], folder: Path, tickers: int) -> None:
    for split, dataset in datasets.items():
        write_shards(dataset, folder, split, tickers)


def write_beside(series: Stocks, folder: Path, **metadata) -> None:
    """What a folder says of its datasets, and the statistics that they were normalised by."""
    content = {**series.metadata, **metadata}
    (folder / METADATA_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    series.extractor.to_json_file(folder / "preprocessor_config.json")


def fingerprint_of(folder: Path) -> str:
    """Changes with every byte of the dataset."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*.parquet")):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def check_folder(folder: Path) -> None:
    """Refuses to replace what is not a dataset of ours; for the command line, before the work that would fill it."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / METADATA_NAME).exists())):
        raise ValueError(f"{folder} exists and is no dataset of this command; choose another --output-dir")


def write_shards(dataset: Dataset, folder: Path, split: str, tickers: int) -> None:
    """Writes one file per `TICKERS_PER_FILE` tickers, the same ones in file n of every configuration."""
    count = -(-tickers // TICKERS_PER_FILE)
    bounds = np.searchsorted(dataset.data["series"].to_numpy(), np.arange(count + 1) * TICKERS_PER_FILE)
    arrow = dataset.with_format("arrow")
    for shard, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        # With the metadata that tells `load_dataset` the lengths of lists.
        table = arrow[start:stop].replace_schema_metadata(dataset.features.arrow_schema.metadata)
        write_file(table, folder, split, shard, count)


# --- the card --------------------------------------------------------------------------------------------------------


def write_card(folder: Path, config: StocksConfig, licence: str) -> str:
    extractor = SpaceExploreFeatureExtractor.from_pretrained(folder)
    names = tuple(name for name in SPLITS if (folder / name).is_dir())
    sampling = read_metadata(folder).get("sampling")
    body = CARD.format(
        script="build_dataset.py" if sampling is None else "build_preferences.py",
        source="the embedded sample" if config.prices is None else f"`{Path(config.prices).name}`",
        table="\n".join(count_rows(folder)),
        contents="\n".join(f"- `{name}`: {CONTENTS[name]}." for name in names),
        tickers=rows_of_files(folder, "series", HISTORY),
        features=len(extractor.feature_names),
        normalization=extractor.normalization,
        horizons=list(config.horizons),
        target=config.target,
        dpo=f"Pairs are at least {config.margin:g}·scale·√H apart." if "dpo" in names else "",
        batch=TICKERS_PER_BATCH,
        pitfalls=PITFALLS.format(pairs=describe_pairs(sampling)),
        licence=licence,
    )
    head = yaml.safe_dump(card_metadata(names, read_metadata(folder)["fingerprint"]), sort_keys=False)
    return f"---\n{head}---\n\n{body}"


def describe_pairs(sampling: dict | None) -> str:
    """What is preferred to what; `sampling` is of `scripts/build_preferences.py`."""
    if sampling is None:
        return (
            "The realised path is preferred to one that is resampled from the same ticker's earlier days, in\n"
            "  weekly blocks: a model learns what its context adds to those. The samples of\n"
            "  `scripts/build_preferences.py` are a model's own, and closer to it"
        )
    preferred = {"realised": "The realised path", "best": "The best sample"}[sampling["chosen"]]
    return (
        f"{preferred} is preferred to the sample of median rank\n"
        f"  among {sampling['num_samples']} of the causal language model `{sampling['model']}`, seed "
        f"{sampling['seed']}, by the score of\n  `data/preferences.py`"
    )


def count_rows(folder: Path) -> Iterator[str]:
    dates = read_metadata(folder)["splits"]
    for name in SPLITS:
        for split in SPLITS[name] if (folder / name).is_dir() else ():
            within = "training range" if name == "dpo" else " to ".join(dates.get(split, ["all"]))
            yield f"| {name} | {split} | {rows_of_files(folder, name, split):,} | {within} |"


def rows_of_files(folder: Path, name: str, split: str) -> int:
    return sum(pq.read_metadata(file).num_rows for file in (folder / name).glob(f"{split}-*.parquet"))


def read_metadata(folder: Path) -> dict:
    return json.loads((folder / METADATA_NAME).read_text(encoding="utf-8"))


def card_metadata(names: tuple[str, ...], fingerprint: str) -> dict:
    """What `load_dataset` and the Hub read at the top of the card.

    `load_dataset` caches a local folder by its name and what is written here, whatever its files hold: without the
    fingerprint it would go on giving the former dataset after a new one has been built.
    """
    configs = []
    for name in names:
        files = [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in SPLITS[name]]
        configs.append({"config_name": name, "description": fingerprint, "data_files": files})
    configs[names.index("sft" if "sft" in names else "dpo")]["default"] = True
    return {
        "license": "other",
        "task_categories": ["time-series-forecasting"],
        "tags": ["finance"],
        "configs": configs,
    }


# --- the command -----------------------------------------------------------------------------------------------------


@command
def main(argv: list[str] | None = None) -> None:
    args = make_build_parser().parse_args(argv)
    check_folder(args.output_dir)
    if args.push_to_hub is not None:
        check_push(args.push_to_hub, "dataset")
    elif args.private:
        raise ValueError("--private is about the repository of --push-to-hub, which is not given")
    names = ("series", *(("sft", "dpo") if args.config == "all" else (args.config,)))
    options = dataset_options(args)
    config = StocksConfig(**options)
    if args.cluster is not None:
        fill = partial(fill_by_cluster, args.cluster, config, names[1:])
    else:
        fill = partial(fill_from_cache, build(names, options, args.num_proc))
    write_folder(args.output_dir, fill, config, args.licence)
    if args.push_to_hub is not None:
        commit = push(args.output_dir, args.push_to_hub, "dataset", args.private, PARQUET_FILES)
        print(f"pushed to {commit.repo_url}")


if __name__ == "__main__":
    main()
