"""The data path from bars to batches: speed of the columns beside df.ta, cost of a build, windows a second.

    python benchmarks/data.py [--prices market.parquet] [--tickers AAPL,MSFT] [--sample 40] [--num-proc N]

First the default columns of some tickers by `compute_indicators` and as a user of pandas-ta-classic writes them: df.ta
where it has the indicator, pandas where it has not. Seconds are CPU time of one thread, the sides take turns ticker
by ticker, and exit code 1 says that their values differ. Then a fresh cache is built in a process of its own, whose
memory is read from /proc (Linux), and opened by another, which draws batches of windows at random.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
import pandas_ta_classic as ta
import psutil
import torch
from huggingface_hub.utils import disable_progress_bars

from spaceexploreai.data.cleaning import read_clean
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.stocks import Stocks, StoredWindows, build_stocks
from spaceexploreai.indicators_spaceexplore import FEATURE_PRESETS, compute_indicators
from spaceexploreai.train.arguments import command, make_parser

COLUMNS = list(FEATURE_PRESETS["default"])
TOLERANCE = 1e-6  # relative, or absolute below one
LEAST_BARS = 300  # the longest window has 250 volatilities, each of 20 returns
STAGES = ("indicators", "series", "sft")
BATCH_SIZE, DRAWN_WINDOWS, DRAWS = 64, 16_384, 10


# --- the columns, as a user of pandas-ta-classic writes them ---------------------------------------------------------


class Ticker(NamedTuple):
    """One ticker's bars, and what many columns need of them."""

    bars: pd.DataFrame
    returns: pd.Series
    volatility: pd.Series
    talib: bool  # of df.ta, which asks TA-Lib only when told to

    def scaled(self, values: pd.Series, window: int = 1) -> pd.Series:
        return values / (self.volatility * window**0.5)


def library_columns(bars: pd.DataFrame, talib: bool) -> dict[str, pd.Series]:
    """The default columns of one ticker."""
    returns = np.log(bars["close"]).diff()
    volatility = np.sqrt((returns**2).ewm(alpha=0.06, min_periods=20).mean()).clip(lower=1e-4)
    ticker = Ticker(bars, returns, volatility, talib)
    with np.errstate(divide="ignore", invalid="ignore"):
        groups = (price, past_returns, trend, momentum, volatilities, volume, regimes, signals, seasons)
        return {name: column for group in groups for name, column in group(ticker).items()}


def price(ticker: Ticker) -> dict[str, pd.Series]:
    open_, high, low, close = (ticker.bars[name] for name in ("open", "high", "low", "close"))
    previous, scaled = close.shift(), ticker.scaled
    return {
        "gap": scaled(np.log(open_ / previous)),
        "body": scaled(np.log(close / open_)),
        "true_range": scaled(np.log(np.maximum(high, previous) / np.minimum(low, previous))),
        "close_location": (2 * close - low - high) / (high - low),
        "upper_shadow": scaled(np.log(high / np.maximum(open_, close))),
        "lower_shadow": scaled(np.log(np.minimum(open_, close) / low)),
        **{f"high_distance_{n}": scaled(np.log(close / high.rolling(n).max()), n) for n in (60, 250)},
        "low_distance_60": scaled(np.log(close / low.rolling(60).min()), 60),
    }


def past_returns(ticker: Ticker) -> dict[str, pd.Series]:
    bars, scaled = ticker.bars, ticker.scaled
    windows = (1, 3, 5, 10, 20, 60, 120, 250)
    nights = np.log(bars["open"] / bars["close"].shift())
    return {
        **{f"scaled_return_{n}": scaled(bars.ta.log_return(length=n), n) for n in windows},
        "overnight_return_20": scaled(nights.rolling(20).sum(), 20),
    }


def trend(ticker: Ticker) -> dict[str, pd.Series]:
    bars, scaled, talib = ticker.bars, ticker.scaled, ticker.talib
    close = bars["close"]
    long, short = bars.ta.psar(talib=talib)[["PSARl_0.02_0.2", "PSARs_0.02_0.2"]].to_numpy().T
    stop = bars.ta.supertrend(length=10, multiplier=3.0).iloc[:, 0]
    spans = bars.ta.ichimoku(lookahead=False)[["ISA_9", "ISB_26"]]
    cloud = close.clip(spans.min(axis=1, skipna=False), spans.max(axis=1, skipna=False))
    vortex = bars.ta.vortex(length=14)
    return {
        **{f"close_to_sma_{n}": scaled(np.log(close / bars.ta.sma(length=n, talib=talib)), n) for n in (10, 50, 200)},
        "macd_histogram": scaled(bars.ta.macd(talib=talib)["MACDh_12_26_9"] / close),
        "adx_14": bars.ta.adx(length=14, talib=talib)["ADX_14"] / 50 - 1,
        "aroon_25": bars.ta.aroon(length=25, talib=talib)["AROONOSC_25"] / 100,
        "psar_distance": scaled(np.log(close / np.where(np.isnan(long), short, long)), 10),
        "supertrend_distance": scaled(np.log(close / stop.where(stop > 0)), 10),
        "ichimoku_cloud": scaled(np.log(close / cloud).where(spans["ISB_26"].notna()), 52),
        "vortex_14": vortex["VTXP_14"] - vortex["VTXM_14"],
    }


def momentum(ticker: Ticker) -> dict[str, pd.Series]:
    own, talib = ticker.bars.ta, ticker.talib
    return {
        **{f"rsi_{n}": own.rsi(length=n, talib=talib) / 50 - 1 for n in (7, 14)},
        "stochastic_k": own.stoch(k=14, d=3, smooth_k=3, talib=talib)["STOCHk_14_3_3"] / 50 - 1,
        "williams_r_14": own.willr(length=14, talib=talib) / 50 + 1,
        "trix_15": ticker.scaled(own.trix(length=15, talib=talib)["TRIX_15_9"] / 100),
        "ultimate_oscillator": own.uo(talib=talib) / 50 - 1,
    }


def volatilities(ticker: Ticker) -> dict[str, pd.Series]:
    bars, scaled, talib = ticker.bars, ticker.scaled, ticker.talib
    close, squares = bars["close"], ticker.returns**2
    ranges = np.log(bars["high"] / bars["low"]) ** 2
    lower, middle, upper = bars.ta.bbands(length=20, std=2, ddof=0, talib=talib).iloc[:, :3].to_numpy().T
    channel = bars.ta.donchian(lower_length=20, upper_length=20)
    falls = squares.where(~(ticker.returns > 0), 0.0).rolling(20).sum()
    nights = (np.log(bars["open"] / close.shift()) ** 2).rolling(20).sum()
    days = (np.log(close / bars["open"]) ** 2).rolling(20).sum()
    estimates = {f"realized_volatility_{n}": squares.rolling(n).mean() for n in (5, 20, 60)}
    estimates["parkinson_volatility_20"] = ranges.rolling(20).mean() / (4 * np.log(2))
    return {
        **{name: np.log(np.sqrt(variance) / ticker.volatility) for name, variance in estimates.items()},
        "atr_14": np.log(scaled(bars.ta.atr(length=14, talib=talib) / close)),
        "bollinger_position_20": (close - middle) / (upper - middle),
        "bollinger_width_20": np.log((upper - lower) / middle / ticker.volatility),
        "donchian_width_20": np.log(scaled(np.log(channel["DCU_20_20"] / channel["DCL_20_20"]), 20)),
        "downside_share_20": 2 * falls / squares.rolling(20).sum() - 1,
        "overnight_share_20": (nights - days) / (nights + days),
    }


def volume(ticker: Ticker) -> dict[str, pd.Series]:
    bars, talib = ticker.bars, ticker.talib
    sold, total = bars["volume"], bars["volume"].rolling(20).sum()
    means = {n: bars.ta.sma(close="volume", length=n, talib=talib) for n in (5, 20, 60)}
    return {
        **{f"relative_volume_{n}": np.log((sold + 1) / (mean + 1)) for n, mean in means.items()},
        "volume_change": np.log(sold + 1).diff(),
        "mfi_14": bars.ta.mfi(length=14, talib=talib) / 50 - 1,
        "cmf_20": bars.ta.cmf(length=20),
        "obv_20": bars.ta.obv(talib=talib).diff(20) / total,
        "force_index_13": ticker.scaled(bars.ta.efi(length=13) / (total / 20) / bars["close"]),
    }


def regimes(ticker: Ticker) -> dict[str, pd.Series]:
    bars, close = ticker.bars, ticker.bars["close"]
    top, bottom = bars["high"].rolling(100).max(), bars["low"].rolling(100).min()
    ratios = (0, 0.236, 0.382, 0.5, 0.618, 0.786, 1)
    levels = np.stack([top - ratio * (top - bottom) for ratio in ratios])
    nearest = np.take_along_axis(levels, np.abs(levels - close.to_numpy()).argmin(axis=0)[None], axis=0)[0]
    phase = 2 * np.pi * bars["date"].dt.dayofweek / 7
    return {
        "fibonacci_position": (2 * close - top - bottom) / (top - bottom),
        "fibonacci_nearest": ticker.scaled(np.log(close / nearest), 5),
        "day_of_week_sin": np.sin(phase),
        "day_of_week_cos": np.cos(phase),
        "volatility_level_250": np.log(ticker.volatility / ticker.volatility.rolling(250).mean()),
        "return_skew_60": ticker.returns.rolling(60).skew(),
        "price_volume_correlation_20": ticker.returns.rolling(20).corr(np.log(bars["volume"] + 1).diff()),
    }


def signals(ticker: Ticker) -> dict[str, pd.Series]:
    bars, close = ticker.bars, ticker.bars["close"]
    channel = bars.ta.donchian(lower_length=55, upper_length=55).shift()
    sides = [close > channel["DCU_55_55"], close < channel["DCL_55_55"]]
    return {"channel_breakout_55": pd.Series(np.select(sides, [1.0, -1.0], np.nan)).ffill()}


def seasons(ticker: Ticker) -> dict[str, pd.Series]:
    sold = ticker.bars["volume"]
    volume = (sold + 1) / (ticker.bars.ta.sma(close="volume", length=20, talib=ticker.talib) + 1)
    activity = (ticker.returns.abs() / ticker.volatility.shift()).clip(upper=6) * np.sqrt(volume.clip(lower=1))
    smooth = (activity + 2 * activity.shift() + activity.shift(2)) / 4
    columns = {}
    for name, quarters in {"quarter_season": range(1, 13), "year_season": (4, 8, 12)}.items():
        for days in (1, 5):
            peaks = smooth.rolling(days).max()
            past = [peaks.shift(round(62.9 * quarter) - days - 1) for quarter in quarters]
            columns[f"{name}_{days}"] = np.log(pd.concat(past, axis=1).mean(axis=1))
    return columns


# --- their speed -----------------------------------------------------------------------------------------------------


def sides() -> dict[str, Callable[[pd.DataFrame], object]]:
    """What is compared: functions of one ticker's bars. The first is ours, the second gives the same values."""
    found = {
        "compute_indicators": lambda bars: compute_indicators(bars, COLUMNS),
        "df.ta": lambda bars: library_columns(bars, talib=False),
    }
    if ta.Imports["talib"]:
        found[f"df.ta, TA-Lib {version('TA-Lib')} where it can"] = lambda bars: library_columns(bars, talib=True)
    return found


def evenly_spaced(prices: pd.DataFrame, count: int) -> list[pd.DataFrame]:
    """The bars of some tickers; of short ones df.ta gives no column but the whole frame."""
    long = [bars for _, bars in prices.groupby("ticker", sort=False) if len(bars) >= LEAST_BARS]
    if not long:
        raise ValueError(f"no ticker has {LEAST_BARS} bars, which the columns need")
    rows = np.unique(np.linspace(0, len(long) - 1, count).round().astype(int))
    return [long[row].reset_index(drop=True) for row in rows]


def compare_columns(sample: list[pd.DataFrame]) -> dict[str, float]:
    """CPU seconds of each side."""
    seconds = dict.fromkeys(sides(), 0.0)
    for side in sides().values():
        side(sample[0])  # what is imported or compiled at the first call
    for bars in sample:
        values = []
        for name, side in sides().items():
            start = time.process_time()
            values.append(side(bars))
            seconds[name] += time.process_time() - start
        refuse_differences(bars["ticker"][0], *values[:2])
    return seconds


def refuse_differences(ticker: str, ours: np.ndarray, theirs: dict[str, pd.Series]) -> None:
    """Where both know a value; a library may begin a bar earlier or later."""
    for name, column in zip(COLUMNS, ours.T, strict=True):
        other = np.asarray(theirs[name], dtype=np.float64)
        difference = np.abs(column - other) / np.maximum(np.abs(other), 1)
        known = np.isfinite(difference)
        if np.isfinite(column).any() and not known.any():
            raise SystemExit(f"{ticker}: {name} of df.ta has no value to compare")
        if (difference[known] > TOLERANCE).any():
            raise SystemExit(f"{ticker}: {name} of df.ta is another, by up to {difference[known].max():.2g}")


def format_columns(seconds: dict[str, float], sample: list[pd.DataFrame]) -> str:
    bars, ours = sum(map(len, sample)), seconds["compute_indicators"]
    lines = [f"| {len(COLUMNS)} columns of {len(sample)} tickers | CPU seconds | bars/s | times ours |"]
    lines += ["|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {spent:.2f} | {bars / spent:,.0f} | {spent / ours:.2f} |" for name, spent in seconds.items()
    ]
    return "\n".join([*lines, "", f"the first two agree within {TOLERANCE:g} in all columns, where both have a value"])


# --- the build -------------------------------------------------------------------------------------------------------


def build(options: dict, num_proc: int | None) -> tuple[list[tuple[str, float, float, float]], float]:
    """Seconds, CPU seconds and MiB on disk of each stage, and the most MiB of memory that this process had."""
    quiet()
    stages = []
    for name in STAGES:
        start, spent = time.perf_counter(), cpu_seconds()
        builder = Stocks(config_name=name, **options)
        builder.download_and_prepare(num_proc=num_proc)
        size = builder.info.dataset_size / 2**20
        stages.append((name, time.perf_counter() - start, cpu_seconds() - spent, size))
    # Not getrusage, which begins with the size of the process that started this one.
    return stages, kibibytes("/proc/self/status")["VmHWM"] / 1024


def cpu_seconds() -> float:
    """Of this process and of the workers that have ended."""
    return sum(os.times()[:4])


def quiet() -> None:
    datasets.disable_progress_bars()
    disable_progress_bars()
    torch.set_num_threads(1)


def kibibytes(path: str) -> dict[str, int]:
    """Sizes in a table of /proc."""
    rows = (line.split() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if row[-1] == "kB"}


def in_new_process(function: Callable, *arguments) -> tuple[object, np.ndarray]:
    """What a function gives, and the most memory that its process and its workers had; see `memory`."""
    peak = np.zeros(2)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        process = psutil.Process(pool.submit(os.getpid).result())
        result = pool.submit(function, *arguments)
        while not result.done():
            peak = np.maximum(peak, memory(process))
            time.sleep(0.2)  # a look holds the process up
    return result.result(), peak


def memory(process: psutil.Process) -> np.ndarray:
    """(2,) MiB of a process and those it started: resident, shared pages once; and what of it is in no file.

    The difference is of memory-mapped files, which the kernel drops when it needs the space.
    """
    total = np.zeros(2)
    for one in (process, *process.children(recursive=True)):
        with suppress(OSError):  # it has just ended
            sizes = kibibytes(f"/proc/{one.pid}/smaps_rollup")
            total += sizes["Pss"], sizes["Pss_Anon"]
    return total / 1024


def format_build(stages: list[tuple[str, float, float, float]], largest: float, peak: np.ndarray) -> str:
    lines = ["| stage | seconds | CPU seconds | MiB on disk |", "|---|---:|---:|---:|"]
    total = ("together", *(sum(column) for column in list(zip(*stages, strict=True))[1:]))
    lines += [f"| {name} | {wall:.1f} | {cpu:.1f} | {size:,.0f} |" for name, wall, cpu, size in [*stages, total]]
    resident, anonymous = peak
    return "\n".join(lines) + (
        f"\n\nmost memory: the builder {largest:,.0f} MiB; with its workers, shared pages once, {resident:,.0f} MiB, "
        f"of which {anonymous:,.0f} MiB in no file"
    )


# --- the windows -----------------------------------------------------------------------------------------------------


def reload(options: dict) -> tuple[float, int, tuple[float, float]]:
    """Seconds from an existing cache to the first batch, how many windows there are, and how fast they are drawn."""
    quiet()
    start = time.perf_counter()
    windows = build_stocks(**options).train
    collate_windows([windows[0]])
    seconds = time.perf_counter() - start
    return seconds, len(windows), max(draw(windows, seed) for seed in range(DRAWS))


def draw(windows: StoredWindows, seed: int) -> tuple[float, float]:
    """Windows a second and a second of CPU time, at random and in batches."""
    order = np.random.default_rng(seed).permutation(len(windows))[:DRAWN_WINDOWS].tolist()
    start, spent = time.perf_counter(), time.process_time()
    for first in range(0, len(order), BATCH_SIZE):
        collate_windows([windows[index] for index in order[first : first + BATCH_SIZE]])
    return len(order) / (time.perf_counter() - start), len(order) / (time.process_time() - spent)


# --- the command -----------------------------------------------------------------------------------------------------


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sample", type=int, default=40, help="tickers to compare the columns of; default: 40")
    parser.add_argument("--num-proc", type=int, help="processes of the build; one by default")
    args = parser.parse_args(argv)
    if args.sample < 1:
        raise ValueError(f"sample must be at least 1, got {args.sample}")
    options = {name: getattr(args, name) for name in ("prices", "tickers", "strict", "fill")}
    quiet()
    prices, report = read_clean(args.prices, args.tickers, strict=args.strict, fill=args.fill)
    print(f"{report.tickers:,} tickers, {len(prices):,} bars, {len(COLUMNS)} columns\n", flush=True)
    sample = evenly_spaced(prices, args.sample)
    del prices
    print(format_columns(compare_columns(sample), sample), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (stages, largest), peak = in_new_process(build, {**options, "cache_dir": folder}, args.num_proc)
        print(format_build(stages, largest, peak), flush=True)
        (seconds, windows, speeds), _ = in_new_process(reload, {**options, "cache_dir": folder})
    print(f"reload: {seconds:.2f} s to the first of {windows:,} windows")
    print("in batches, best of {}: {:,.0f} windows/s, {:,.0f} a second of CPU time".format(DRAWS, *speeds))


if __name__ == "__main__":
    main()
