"""Naive forecasts beside the model's: random walk, with drift, EWMA volatility with empirical quantiles."""

import math
import re
from collections.abc import Iterable
from statistics import NormalDist

import numpy as np
import pandas as pd

from spaceexploreai.indicators_spaceexplore import ewma_volatility

BASELINES = ("zero", "drift", "ewma")
_UNIT_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 1000) for i in range(1000)])
MIN_POOL = 100  # fewer leave the 5 % and 95 % quantiles to a handful of days


def add_baselines(forecasts: pd.DataFrame, prices: pd.DataFrame) -> pd.DataFrame:
    """Puts the columns of every baseline beside the model's (`zero_mean, zero_q0.05, …, ewma_p_up`).

    A row sees its ticker's bars up to its cutoff. Only "ewma" fits anything: the standardised returns pooled over the
    tickers of `prices` that were known at the first cutoff of the table.

    - zero: the naive method. Hyndman & Athanasopoulos, FPP3, sections 5.2 and 5.5: Gaussian around 0 with
      sd = s·sqrt(h), s the root mean square of all daily log-returns so far; p_up is 0.5.
    - drift: FPP3's drift method: Gaussian around h·m with sd = s·sqrt(h·(1 + h/n)), m and s the mean and the standard
      deviation (n - 1 degrees of freedom) of the n daily log-returns so far.
    - ewma: `ewma_volatility`·sqrt(h) times the empirical quantiles and mean of the pooled h-day log-returns, each
      divided by its own such scale; p_up is the pool's share above 0. In the spirit of filtered historical simulation
      (Barone-Adesi, Giannopoulos & Vosper, 1999), without its resampling of daily returns. A pool of fewer than
      `MIN_POOL` returns, as before a short history, gives way to the unit normal.

    Args:
        forecasts: forecast table; row order and index are kept, baseline columns already there are replaced.
        prices: validated price table with the history of every ticker forecast.

    Returns:
        The forecast table with `len(BASELINES) * (Q + 2)` more columns, in log-returns.

    Raises:
        ValueError: a cutoff without a bar or with less history than `ewma_volatility` needs, a missing or malformed
            column.
    """
    require_columns(forecasts, ["ticker", "cutoff", "horizon"])
    levels = np.array(quantile_levels(forecasts))
    horizons = forecasts["horizon"].to_numpy()
    bars = _running_statistics(prices)
    known = _known_at_cutoff(forecasts, bars)
    past = bars[bars["date"] <= forecasts["cutoff"].min()]
    pools = {horizon: _standardised_returns(past, horizon) for horizon in np.unique(horizons)}
    naive = pd.concat(
        [
            _zero(known, horizons, levels).add_prefix("zero_"),
            _drift(known, horizons, levels).add_prefix("drift_"),
            _ewma(known, horizons, levels, pools).add_prefix("ewma_"),
        ],
        axis=1,
    ).set_axis(forecasts.index)
    return pd.concat([forecasts.drop(columns=naive.columns, errors="ignore"), naive], axis=1)


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
    """Per bar, over its ticker's daily log-returns up to and including it: `count, mean, sd, rms, volatility`."""
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


def _ewma(known: pd.DataFrame, horizons: np.ndarray, levels: np.ndarray, pools: dict[int, np.ndarray]) -> pd.DataFrame:
    unique, which = np.unique(horizons, return_inverse=True)
    scale = known["volatility"].to_numpy() * np.sqrt(horizons)
    mean = np.array([pools[h].mean() for h in unique])[which]
    quantiles = np.array([np.quantile(pools[h], levels) for h in unique])[which]
    p_up = np.array([(pools[h] > 0).mean() for h in unique])[which]
    return _distribution(mean * scale, quantiles * scale[:, None], p_up, levels)


def _gaussian(mean: np.ndarray, sd: np.ndarray, levels: np.ndarray) -> pd.DataFrame:
    z = np.array([NormalDist().inv_cdf(level) for level in levels])
    # A price that never moved has sd 0: the floor turns its 0/0 into p_up 0.5.
    ratio = mean / np.maximum(sd, np.finfo(float).tiny)
    p_up = 0.5 * np.vectorize(math.erfc, otypes=[float])(-ratio / math.sqrt(2))
    return _distribution(mean, mean[:, None] + sd[:, None] * z, p_up, levels)


def _distribution(mean: np.ndarray, quantiles: np.ndarray, p_up: np.ndarray, levels: np.ndarray) -> pd.DataFrame:
    """Columns `mean, q…, p_up` from (R,), (R, Q) and (R,) arrays."""
    table = pd.DataFrame(quantiles, columns=quantile_columns(levels))
    table.insert(0, "mean", mean)
    table["p_up"] = p_up
    return table
