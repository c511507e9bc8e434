"""The baseline GARCH(1,1) (Bollerslev, 1986): one model for each ticker, fitted to the training range, with empirical
quantiles as of `ewma`."""

import logging
import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd

from spaceexploreai.evaluation.baselines import MIN_POOL, distribution, levels_of

logger = logging.getLogger(__name__)
MIN_RETURNS = 250  # a year: a persistence cannot be told from fewer
PERCENT = 100.0  # the optimiser wants variances of about 1


class Garch(NamedTuple):
    """s²(t+1) = omega + alpha·r²(t) + beta·s²(t), of daily log-returns r with mean zero."""

    omega: float
    alpha: float
    beta: float

    def variances(self, returns: np.ndarray) -> np.ndarray:
        """(T,) variances of the day after each of (T,) returns; before the first it is that in the long run."""
        variance, found = self.omega / max(1 - self.alpha - self.beta, 1e-3), np.empty(len(returns))
        for day, square in enumerate((returns**2).tolist()):
            found[day] = variance = self.omega + self.alpha * square + self.beta * variance
        return found

    def ahead(self, variance: np.ndarray, horizon: int) -> np.ndarray:
        """Variance of the sum of the next `horizon` returns, of (N,) variances of the next day."""
        total = np.zeros_like(variance)
        for _ in range(horizon):
            total, variance = total + variance, self.omega + (self.alpha + self.beta) * variance
        return total


def fit_garch(returns: np.ndarray) -> Garch | None:
    """By quasi-maximum likelihood (the package `arch`), of (T,) daily log-returns; None if it cannot be fitted: fewer
    than `MIN_RETURNS`, a price that hardly moves, an optimiser that does not converge."""
    from arch import arch_model

    if len(returns) < MIN_RETURNS or np.median(np.abs(returns)) == 0:
        return None
    model = arch_model(PERCENT * returns, mean="Zero", vol="GARCH", p=1, q=1, rescale=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the optimiser, whose flag is read below
        fit = model.fit(disp="off", show_warning=False)
    omega, alpha, beta = fit.params[["omega", "alpha[1]", "beta[1]"]]
    converged = fit.convergence_flag == 0 and np.isfinite(fit.params).all() and omega > 0
    return Garch(omega / PERCENT**2, alpha, beta) if converged else None


def forecast_garch(
    forecasts: pd.DataFrame, prices: pd.DataFrame, train_end: pd.Timestamp, ewma: pd.DataFrame
) -> pd.DataFrame:
    """Columns `mean, q…, p_up` of a forecast table.

    Parameters and the pool of standardised returns of h days know the bars up to `train_end`, the variance those up to
    the cutoff. A ticker that cannot be fitted is forecast by ewma; a warning says how many there are.

    Args:
        forecasts: forecast table, no cutoff of which the price table lacks.
        prices: validated price table.
        train_end: last date of the training range.
        ewma: columns `ewma_…` of the same rows.
    """
    known = prices[prices["ticker"].isin(forecasts["ticker"].unique())]
    tickers = dict(iter(known.groupby("ticker")))
    models = {ticker: fit_garch(_returns(bars[bars["date"] <= train_end])) for ticker, bars in tickers.items()}
    failed = sorted(ticker for ticker, model in models.items() if model is None)
    if failed:
        logger.warning("garch: %d of %d tickers are forecast by ewma: %s", len(failed), len(models), _some(failed))
    rows, levels = ewma.rename(columns=lambda name: name.removeprefix("ewma_")), levels_of(forecasts)
    for horizon, those in forecasts.groupby("horizon"):
        scales = {ticker: _scales(tickers[ticker], model, horizon) for ticker, model in models.items() if model}
        pool = _pool(tickers, scales, train_end, horizon)
        if len(pool) < MIN_POOL:
            continue
        scale = _at_cutoff(those, scales)
        fitted = np.isfinite(scale)
        rows.loc[those.index[fitted]] = _forecast(scale[fitted], pool, levels).to_numpy()
    return rows


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _returns(bars: pd.DataFrame) -> np.ndarray:
    return np.diff(np.log(bars["close"].to_numpy()))


def _scales(bars: pd.DataFrame, model: Garch, horizon: int) -> pd.Series:
    """By date: standard deviation of the return over the next `horizon` bars. Of the first bar nothing is known."""
    variances = model.variances(_returns(bars))
    return pd.Series(np.sqrt(model.ahead(variances, horizon)), bars["date"].iloc[1:])


def _pool(tickers: dict, scales: dict[str, pd.Series], train_end: pd.Timestamp, horizon: int) -> np.ndarray:
    """(P,) standardised returns of which origin and target are in the training range."""
    pool = [np.zeros(0)]
    for ticker, scale in scales.items():
        log_close = np.log(tickers[ticker].set_index("date")["close"])
        log_close = log_close[log_close.index <= train_end].to_numpy()
        origin = scale.to_numpy()[: max(len(log_close) - 1 - horizon, 0)]  # from the second bar on
        pool.append((log_close[1 + horizon :] - log_close[1 : 1 + len(origin)]) / origin)
    return np.concatenate(pool)


def _at_cutoff(forecasts: pd.DataFrame, scales: dict[str, pd.Series]) -> np.ndarray:
    known = [
        scales[ticker].reindex(rows["cutoff"]).set_axis(rows.index)
        for ticker, rows in forecasts.groupby("ticker")
        if ticker in scales
    ]
    return (pd.concat(known) if known else pd.Series(dtype=float)).reindex(forecasts.index).to_numpy()


def _forecast(scale: np.ndarray, pool: np.ndarray, levels: list[float]) -> pd.DataFrame:
    p_up = np.full(len(scale), (pool > 0).mean())
    return distribution(pool.mean() * scale, np.outer(scale, np.quantile(pool, levels)), p_up, levels)
