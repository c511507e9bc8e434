"""What a daily equity curve is worth: return, risk, Sharpe ratio with its error, and how much of it is luck.

Cash earns nothing here, so a Sharpe ratio is of returns, not of returns above an interest rate.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import pandas as pd

from spaceexploreai.evaluation.inference import standard_error, t_value

SESSIONS_PER_YEAR = 252
LEAST_ERROR = 1e-12  # what rounding leaves of the market's own alpha
FIGURES = {
    "total_return": ("total return", "{:+z.1%}"),
    "cagr": ("return a year (CAGR)", "{:+z.2%}"),
    "volatility": ("volatility a year", "{:.2%}"),
    "sharpe": ("Sharpe ratio", "{:+z.2f}"),
    "sharpe_se": ("  its standard error", "{:.2f}"),
    "probabilistic_sharpe": ("  probability that it is above 0", "{:.1%}"),
    "deflated_sharpe": ("  and above the best of all trials", "{:.1%}"),
    "max_drawdown": ("deepest drawdown", "{:.1%}"),
    "calmar": ("Calmar ratio", "{:+z.2f}"),
    "hit_rate": ("days with a gain", "{:.1%}"),
    "turnover": ("turnover a year (one-way)", "{:.1f}"),
    "cost_drag": ("costs a year, of the equity", "{:.2%}"),
    "beta": ("beta to equal weight", "{:+z.2f}"),
    "alpha": ("alpha a year", "{:+z.2%}"),
    "alpha_t": ("  its t statistic", "{:+z.2f}"),
}

# Shapes: D daily returns


def sharpe_with_error(returns: np.ndarray) -> tuple[float, float]:
    """Sharpe ratio a year of (D,) daily returns, and its standard error: Lo, 2002, whose method of moments allows for
    autocorrelation and fat tails; of independent normal returns sqrt((1 + s²/2) / D), s the ratio a day."""
    centred, deviation = returns - returns.mean(), _deviation(returns)
    if not deviation > 0:
        return math.nan, math.nan
    daily = returns.mean() / deviation
    influence = centred / deviation - daily / 2 * ((centred / deviation) ** 2 - 1)
    return daily * math.sqrt(SESSIONS_PER_YEAR), standard_error(influence) * math.sqrt(SESSIONS_PER_YEAR)


def probabilistic_sharpe(sharpe: float, reference: float, count: int, skewness: float, kurtosis: float) -> float:
    """Probability that the true Sharpe ratio is above a reference (Bailey & López de Prado, 2012), both a day, from as
    many independent returns; the kurtosis of a normal distribution is 3."""
    error = math.sqrt((1 - skewness * sharpe + (kurtosis - 1) / 4 * sharpe**2) / (count - 1))
    return NormalDist().cdf((sharpe - reference) / error)


def best_by_chance(trials: int, variance: float) -> float:
    """Expected highest Sharpe ratio of that many independent trials without skill, whose ratios have that variance:
    Bailey & López de Prado, 2014."""
    if trials == 1:
        return 0.0
    quantile = NormalDist().inv_cdf
    highest = (1 - np.euler_gamma) * quantile(1 - 1 / trials) + np.euler_gamma * quantile(1 - 1 / (trials * math.e))
    return math.sqrt(variance) * highest


def deflated_sharpe(returns: np.ndarray, trials: int) -> tuple[float, float]:
    """The Sharpe ratio a year that the best of `trials` shows by chance, and the probability that the true one of (D,)
    returns is above it.

    The variance among trials is taken to be 1 / (D - 1), that of one without skill. Trials that are alike count for
    fewer, those that were forgotten for as many as there were.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    deviation = _deviation(returns)
    best = best_by_chance(trials, 1 / (len(returns) - 1)) if len(returns) > 1 else math.nan
    if not deviation > 0:
        return best * math.sqrt(SESSIONS_PER_YEAR), math.nan
    standard = (returns - returns.mean()) / returns.std()
    skewness, kurtosis = np.mean(standard**3), np.mean(standard**4)
    probability = probabilistic_sharpe(returns.mean() / deviation, best, len(returns), skewness, kurtosis)
    return best * math.sqrt(SESSIONS_PER_YEAR), probability


def drawdown(equity: pd.Series) -> pd.Series:
    """Share of the highest equity so far that is lost, as a negative number."""
    return equity / equity.cummax() - 1


def beta_alpha(returns: np.ndarray, market: np.ndarray) -> tuple[float, float, float]:
    """Slope of (D,) returns on (D,) returns of a market, the intercept a year, and its t statistic."""
    centred = market - market.mean()
    variance = np.mean(centred**2)
    if not variance > 0:
        return math.nan, math.nan, math.nan
    beta = np.mean(centred * returns) / variance
    alpha = returns.mean() - beta * market.mean()
    residuals = returns - alpha - beta * market
    error = standard_error(residuals * (1 - market.mean() * centred / variance))
    t = t_value(alpha, error) if error > LEAST_ERROR else math.nan
    return float(beta), float(alpha * SESSIONS_PER_YEAR), t


def performance(daily: pd.DataFrame, market: pd.DataFrame, trials: int | None = None) -> dict[str, float]:
    """Figures of a ledger's `daily` (see `backtest.Ledger`), keys as in `FIGURES`; NaN where undefined.

    Args:
        daily: of the portfolio.
        market: of the one that beta and alpha are against.
        trials: of which it is the best; without, nothing is deflated.
    """
    equity, returns = daily["equity"], returns_of(daily)
    years = len(returns) / SESSIONS_PER_YEAR
    sharpe, error = sharpe_with_error(returns)
    cagr = (equity.iloc[-1] / equity.iloc[0]) ** (1 / years) - 1
    deepest = drawdown(equity).min()
    beta, alpha, alpha_t = beta_alpha(returns, returns_of(market))
    costs = (daily["cost"] + daily["borrow"]) / equity.shift(1)
    figures = {
        "total_return": equity.iloc[-1] / equity.iloc[0] - 1,
        "cagr": cagr,
        "volatility": _deviation(returns) * math.sqrt(SESSIONS_PER_YEAR),
        "sharpe": sharpe,
        "sharpe_se": error,
        "probabilistic_sharpe": deflated_sharpe(returns, 1)[1],
        "deflated_sharpe": math.nan if trials is None else deflated_sharpe(returns, trials)[1],
        "max_drawdown": deepest,
        "calmar": cagr / -deepest if deepest < 0 else math.nan,
        "hit_rate": np.mean(returns[returns != 0] > 0) if returns.any() else math.nan,
        "turnover": daily["turnover"].sum() / years,
        "cost_drag": costs.sum() / years,
        "beta": beta,
        "alpha": alpha,
        "alpha_t": alpha_t,
    }
    return {name: float(value) for name, value in figures.items()}


def _deviation(returns: np.ndarray) -> float:
    """Of a sample; NaN of a single return."""
    return returns.std(ddof=1) if len(returns) > 1 else math.nan


def returns_of(daily: pd.DataFrame) -> np.ndarray:
    return daily["equity"].pct_change().to_numpy()[1:]


def tear_sheet(dailies: Mapping[str, pd.DataFrame], trials: int) -> pd.DataFrame:
    """Figures of several portfolios, among them "strategy", the best of `trials`, and "equal_weight".

    Returns:
        Table of `FIGURES` by portfolio.
    """
    market = dailies["equal_weight"]
    columns = {
        name: performance(daily, market, trials if name == "strategy" else None) for name, daily in dailies.items()
    }
    return pd.DataFrame(columns, index=list(FIGURES))


def format_tear_sheet(sheet: pd.DataFrame) -> str:
    """The table for a terminal."""
    shown = sheet.apply(lambda column: [FIGURES[name][1].format(value) for name, value in column.items()])
    shown = shown.replace(r"^[+-]?nan%?$", "", regex=True)
    shown.index = [label for label, _ in FIGURES.values()]
    return shown.rename(columns=lambda name: name.replace("_", " ")).to_string()
