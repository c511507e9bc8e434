"""Baselines beside the model: random walk, drift, the last return again, EWMA volatility with empirical quantiles;
with `baselines="all"` those that are fitted too."""

import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pandas as pd

from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries
from spaceexploreai.indicators_spaceexplore import ewma_volatility

BASELINES = ("zero", "drift", "last", "ewma")
FITTED = ("garch", "ridge", "lightgbm", "dlinear", "patchtst")
_UNIT_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 1000) for i in range(1000)])
LEVELS = tuple(step / 20 for step in range(1, 20))
MIN_POOL = 100  # fewer leave the 5 % and 95 % quantiles to a handful of days


class Training(NamedTuple):
    """What baselines are fitted to, and what they read at a cutoff: the network's own inputs.

    Attributes:
        end: last date of the training range.
        series: histories as the extractor encodes them, to the newest cutoff.
        labels: of each a (T, H) array of log-returns to the horizons, those of `make_labels`, but NaN where a step is
            not in the training range.
        horizons: (H,) steps ahead, those of the forecasts.
        context_length: steps of a window.
    """

    end: pd.Timestamp
    series: Sequence[EncodedSeries]
    labels: Sequence[np.ndarray]
    horizons: list[int]
    context_length: int


def add_baselines(
    forecasts: pd.DataFrame, prices: pd.DataFrame, baselines: str = "fast", training: Training | None = None
) -> pd.DataFrame:
    """Puts the columns of every baseline beside the model's (`zero_mean, zero_q0.05, …, ewma_p_up`), and
    `naive_error`, the mean size of the ticker's daily log-returns so far, by which MASE divides.

    A row sees its ticker's bars up to its cutoff. Of the fast ones only "ewma" fits anything: the standardised returns
    pooled over the tickers of `prices` that were known at the first cutoff of the table, or of the fold if the table
    has a column `fold`.

    - zero: the naive method. Hyndman & Athanasopoulos, FPP3, sections 5.2 and 5.5: Gaussian around 0 with
      sd = s·sqrt(h), s the root mean square of all daily log-returns so far; p_up is 0.5.
    - drift: FPP3's drift method: Gaussian around h·m with sd = s·sqrt(h·(1 + h/n)), m and s the mean and the standard
      deviation (n - 1 degrees of freedom) of the n daily log-returns so far.
    - last: the return of the last h days once more, Gaussian with sd = s·sqrt(2h), that of the difference between two
      returns of h days, s as of zero. Before h returns are known, h times their mean.
    - ewma: `ewma_volatility`·sqrt(h) times the empirical quantiles and mean of the pooled h-day log-returns, each
      divided by its own such scale; p_up is the pool's share above 0. In the spirit of filtered historical simulation
      (Barone-Adesi, Giannopoulos & Vosper, 1999), without its resampling of daily returns. A pool of fewer than
      `MIN_POOL` returns, as before a short history, gives way to the unit normal.

    With "ewma" that one stands alone. With "all" those of `FITTED` follow, which see the training range and their own
    cutoff: `garch.py`, and ridge, lightgbm, dlinear and patchtst of the network's own inputs, `learned.py` and
    `neural.py`.

    Args:
        forecasts: forecast table; row order and index are kept, baseline columns already there are replaced.
        prices: validated price table with the history of every ticker forecast.
        baselines: "ewma", "fast" or "all".
        training: what "all" are fitted to.

    Returns:
        The forecast table with `Q + 2` more columns of each baseline, in log-returns.

    Raises:
        ValueError: a cutoff without a bar or with less history than `ewma_volatility` needs, a missing or malformed
            column; of "all", no training or a package that is not installed.
    """
    if baselines not in ("ewma", "fast", "all"):
        raise ValueError(f"baselines must be ewma, fast or all, got {baselines!r}")
    require_columns(forecasts, ["ticker", "cutoff", "horizon"])
    names = ("ewma",) if baselines == "ewma" else BASELINES
    rows = forecasts.reset_index(drop=True)
    folds = [fold for _, fold in rows.groupby("fold")] if "fold" in rows else [rows]
    naive = pd.concat([_fast(fold, prices, names) for fold in folds]).sort_index()
    if baselines == "all":
        naive = pd.concat([naive, *_fitted(rows, prices, naive, training)], axis=1)
    naive.index = forecasts.index
    return pd.concat([forecasts.drop(columns=naive.columns, errors="ignore"), naive], axis=1)


def _fast(forecasts: pd.DataFrame, prices: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Columns of the baselines that need no training."""
    levels = np.array(levels_of(forecasts))
    horizons = forecasts["horizon"].to_numpy()
    bars = _running_statistics(prices)
    for horizon in np.unique(horizons) if "last" in names else ():
        bars[f"move_{horizon}"] = bars["log_close"] - bars.groupby("ticker")["log_close"].shift(horizon)
    known = _known_at_cutoff(forecasts, bars)
    past = bars[bars["date"] <= forecasts["cutoff"].min()]
    pools = {horizon: _standardised_returns(past, horizon) for horizon in np.unique(horizons)}
    makers = {"zero": _zero, "drift": _drift, "last": _last, "ewma": partial(_ewma, pools=pools)}
    tables = [makers[name](known, horizons, levels).add_prefix(f"{name}_") for name in names]
    return pd.concat([known["naive_error"], *tables], axis=1).set_axis(forecasts.index)


def _fitted(
    forecasts: pd.DataFrame, prices: pd.DataFrame, naive: pd.DataFrame, training: Training | None
) -> list[pd.DataFrame]:
    """Columns of the baselines that are fitted. Imported here, since most who forecast need none of their packages."""
    if training is None:
        raise ValueError("baselines 'all' are fitted: they need the histories and labels of a training range")
    require_package("arch", "lightgbm", "sklearn")
    from spaceexploreai.evaluation.fitted import forecast_learned
    from spaceexploreai.evaluation.garch import forecast_garch

    found = {"garch": forecast_garch(forecasts, prices, training.end, naive.filter(regex="^ewma_"))}
    found |= forecast_learned(forecasts, training, FITTED[1:])
    return [table.add_prefix(f"{name}_") for name, table in found.items()]


def require_package(*names: str) -> None:
    """Raises a ValueError that says how to install the first of the packages that is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"this baseline needs the package {name}: pip install 'spaceexploreai[baselines]'")


def baselines_of(forecasts: pd.DataFrame) -> list[str]:
    """The baselines of a forecast table: those that always stand there, and those of `FITTED` that do."""
    return [*BASELINES, *(name for name in FITTED if f"{name}_mean" in forecasts)]


def quantile_levels(forecasts: pd.DataFrame) -> list[float]:
    """Levels of the model's quantile columns (`q0.05` is 0.05), ascending.

    Raises:
        ValueError: the table has no quantile column.
    """
    matches = (re.fullmatch(r"q(0\.\d+)", str(column)) for column in forecasts.columns)
    levels = sorted(float(match[1]) for match in matches if match)
    if not levels:
        raise ValueError(f"forecast table has no quantile column like 'q0.5' among {list(forecasts.columns)}")
    return levels


def levels_of(forecasts: pd.DataFrame) -> list[float]:
    """Levels of the baselines' quantiles: the model's own, or `LEVELS` where it forecasts classes alone."""
    return list(LEVELS) if "p_down" in forecasts else quantile_levels(forecasts)


def quantile_columns(levels: Iterable[float], prefix: str = "") -> list[str]:
    """Names of the quantile columns, `prefix` being "" for the model and e.g. "ewma_" for a baseline."""
    return [f"{prefix}q{level:g}" for level in levels]


def require_columns(forecasts: pd.DataFrame, columns: Iterable[str]) -> None:
    """Raises a ValueError naming the first of `columns` that the table lacks."""
    for column in columns:
        if column not in forecasts:
            raise ValueError(f"forecast table has no column {column!r}")


def _known_at_cutoff(forecasts: pd.DataFrame, bars: pd.DataFrame) -> pd.DataFrame:
    """The row of `bars` at the cutoff of each row of `forecasts`, in their order."""
    keys = forecasts[["ticker", "cutoff"]]
    known = keys.merge(bars, how="left", left_on=["ticker", "cutoff"], right_on=["ticker", "date"], validate="m:1")
    absent, short = known["date"].isna(), known["volatility"].isna()
    if absent.any():
        row = known.loc[absent.idxmax()]
        raise ValueError(f"{row['ticker']} has no bar in the price table on its cutoff {row['cutoff']:%Y-%m-%d}")
    if short.any():
        row = known.loc[short.idxmax()]
        raise ValueError(
            f"{row['ticker']} has only {row['count']:.0f} daily returns up to its cutoff {row['cutoff']:%Y-%m-%d}, "
            "too few for a volatility"
        )
    return known


def _running_statistics(prices: pd.DataFrame) -> pd.DataFrame:
    """Per bar, over its ticker's daily log-returns up to and including it: `count, mean, sd, rms, volatility` and
    `naive_error`, the mean of their sizes."""
    by_ticker = prices["ticker"]
    log_close = np.log(prices["close"])
    returns = log_close.groupby(by_ticker).diff()
    count = returns.groupby(by_ticker).cumcount()  # bars before this one, so returns so far
    total = returns.fillna(0.0).groupby(by_ticker).cumsum()
    squares = (returns.fillna(0.0) ** 2).groupby(by_ticker).cumsum()
    # 0/0 on a ticker's first bars is refused later, as too little history.
    variance = (squares - total**2 / count) / (count - 1)
    return pd.DataFrame(
        {
            "ticker": by_ticker,
            "date": prices["date"],
            "log_close": log_close,
            "count": count,
            "mean": total / count,
            "sd": np.sqrt(variance.clip(lower=0.0)),
            "rms": np.sqrt(squares / count),
            "naive_error": returns.abs().fillna(0.0).groupby(by_ticker).cumsum() / count,
            "volatility": prices.groupby("ticker")["close"].transform(ewma_volatility),
        }
    )


def _standardised_returns(past: pd.DataFrame, horizon: int) -> np.ndarray:
    """(P,) h-day log-returns in units of volatility·sqrt(h), of which origin and target lie in `past`."""
    origin = past.groupby("ticker")[["log_close", "volatility"]].shift(horizon)
    pool = (
        ((past["log_close"] - origin["log_close"]) / (origin["volatility"] * math.sqrt(horizon))).dropna().to_numpy()
    )
    return pool if len(pool) >= MIN_POOL else _UNIT_NORMAL


def _zero(known: pd.DataFrame, horizons: np.ndarray, levels: np.ndarray) -> pd.DataFrame:
    return _gaussian(np.zeros(len(known)), known["rms"].to_numpy() * np.sqrt(horizons), levels)


def _drift(known: pd.DataFrame, horizons: np.ndarray, levels: np.ndarray) -> pd.DataFrame:
    sd = known["sd"].to_numpy() * np.sqrt(horizons * (1 + horizons / known["count"].to_numpy()))
    return _gaussian(horizons * known["mean"].to_numpy(), sd, levels)


def _last(known: pd.DataFrame, horizons: np.ndarray, levels: np.ndarray) -> pd.DataFrame:
    mean = horizons * known["mean"].to_numpy()
    for horizon in np.unique(horizons):
        moved = known[f"move_{horizon}"].to_numpy()
        mean = np.where((horizons == horizon) & np.isfinite(moved), moved, mean)
    return _gaussian(mean, known["rms"].to_numpy() * np.sqrt(2 * horizons), levels)


def _ewma(known: pd.DataFrame, horizons: np.ndarray, levels: np.ndarray, pools: dict[int, np.ndarray]) -> pd.DataFrame:
    unique, which = np.unique(horizons, return_inverse=True)
    scale = known["volatility"].to_numpy() * np.sqrt(horizons)
    mean = np.array([pools[h].mean() for h in unique])[which]
    quantiles = np.array([np.quantile(pools[h], levels) for h in unique])[which]
    p_up = np.array([(pools[h] > 0).mean() for h in unique])[which]
    return distribution(mean * scale, quantiles * scale[:, None], p_up, levels)


def _gaussian(mean: np.ndarray, sd: np.ndarray, levels: np.ndarray) -> pd.DataFrame:
    z = np.array([NormalDist().inv_cdf(level) for level in levels])
    # A price that never moved has sd 0: the floor turns its 0/0 into p_up 0.5.
    ratio = mean / np.maximum(sd, np.finfo(float).tiny)
    p_up = 0.5 * np.vectorize(math.erfc, otypes=[float])(-ratio / math.sqrt(2))
    return distribution(mean, mean[:, None] + sd[:, None] * z, p_up, levels)


def distribution(mean: np.ndarray, quantiles: np.ndarray, p_up: np.ndarray, levels: np.ndarray) -> pd.DataFrame:
    """Columns `mean, q…, p_up` from (R,), (R, Q) and (R,) arrays."""
    table = pd.DataFrame(quantiles, columns=quantile_columns(levels))
    table.insert(0, "mean", mean)
    table["p_up"] = p_up
    return table
