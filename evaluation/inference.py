"""How sure an average over forecasts is: standard errors, intervals and tests.

N rows are not N observations: the tickers of one date share a market, and forecasts of neighbouring dates overlap. So
every error here is that of a series with one number for each date, after Newey & West (1987), with Bartlett weights on
`bandwidth` lags. These are many, and t statistics have fatter tails than a normal distribution: intervals take the
`critical_value` that goes with them.
"""

import math

import numpy as np

# Shapes: N rows, D dates in ascending order


def bandwidth(count: int, horizon: int = 1) -> int:
    """Lags of a series of D dates: 1.3·sqrt(D) (Lazarus, Lewis, Stock & Watson, 2018), and no fewer than horizon - 1,
    over which forecasts overlap."""
    return min(max(math.ceil(1.3 * math.sqrt(count)), horizon - 1), count - 1)


def standard_error(values: np.ndarray, horizon: int = 1) -> float:
    """Of the mean of a (D,) autocorrelated series: Newey & West, 1987. Zero of a single date."""
    lags = bandwidth(len(values), horizon)
    weights = [1.0, *(2 * (1 - lag / (lags + 1)) for lag in range(1, lags + 1))]
    return math.sqrt(max(np.dot(weights, autocovariances(values, lags)), 0.0) / len(values))


def autocovariances(values: np.ndarray, lags: int) -> list[float]:
    """Of lag 0 to `lags`, each a sum over the dates that have it divided by D."""
    centred = values - values.mean()
    return [centred[lag:] @ centred[: len(values) - lag] / len(values) for lag in range(lags + 1)]


def critical_value(count: int, horizon: int = 1) -> float:
    """What a t statistic of `standard_error` exceeds by chance in 5 % of the cases, on both sides together: Kiefer &
    Vogelsang, 2005, table 1, Bartlett kernel. 1.96 if lags were few beside dates."""
    share = (bandwidth(count, horizon) + 1) / count
    return 1.9600 + 2.9694 * share + 0.4160 * share**2 - 0.5324 * share**3


def t_value(value: float, error: float) -> float:
    """NaN where the error is zero, as it is of a single date, or not known."""
    return value / error if error > 0 else math.nan


def ratio_with_error(numerator: np.ndarray, denominator: np.ndarray, horizon: int = 1) -> tuple[float, float]:
    """Ratio of the sums of two (D,) series and its standard error, to first order."""
    value = float(numerator.sum() / denominator.sum())
    return value, standard_error(numerator - value * denominator, horizon) / abs(denominator.mean())


def sums_by_date(values: np.ndarray, dates: np.ndarray) -> np.ndarray:
    """(D,) sums of (N,) values; `dates` are (N,) integers 0 to D - 1, as of `date_codes`."""
    return np.bincount(dates, weights=values)


def date_codes(dates: np.ndarray) -> np.ndarray:
    """(N,) positions among the distinct dates, ascending."""
    return np.unique(dates, return_inverse=True)[1]


def mean_with_error(values: np.ndarray, dates: np.ndarray, horizon: int = 1) -> tuple[float, float]:
    """Mean over (N,) rows and its standard error; dates as of `date_codes`."""
    return ratio_with_error(sums_by_date(values, dates), np.bincount(dates).astype(float), horizon)


def skill_with_error(
    loss: np.ndarray, reference: np.ndarray, dates: np.ndarray, horizon: int = 1
) -> tuple[float, float]:
    """Share of the reference's loss that the forecast saves, and its standard error; all (N,). NaN if nothing could be
    saved."""
    saved, whole = sums_by_date(reference - loss, dates), sums_by_date(reference, dates)
    return ratio_with_error(saved, whole, horizon) if whole.any() else (math.nan, math.nan)


def diebold_mariano(loss: np.ndarray, other: np.ndarray, dates: np.ndarray, horizon: int = 1) -> tuple[float, float]:
    """Test of equal accuracy (Diebold & Mariano, 1995) with the correction of Harvey, Leybourne & Newbold (1997).

    The (N,) losses of one date are summed before anything else. The variance is that of the paper, of horizon - 1 lags
    with equal weights: right if neither forecast could know the other's errors to come. Where losses are wrong for
    months, as of a width that lags behind, the t statistic of a skill, with more lags, is the safer one. An estimate
    that is not positive gives way to Bartlett weights.

    Returns:
        The statistic, positive where `loss` is the smaller, and its two-sided p value (Student's t with D - 1 degrees
        of freedom); NaN where the dates are too few for the horizon or the losses are equal.
    """
    difference = sums_by_date(other - loss, dates)
    count = len(difference)
    correction = (count + 1 - 2 * horizon + horizon * (horizon - 1) / count) / count
    if count <= horizon or correction <= 0 or not difference.any():
        return math.nan, math.nan
    variance, *products = autocovariances(difference, horizon - 1)
    long_run = variance + 2 * sum(products)
    if long_run <= 0:
        long_run = variance + 2 * sum(product * (1 - lag / horizon) for lag, product in enumerate(products, 1))
    t = t_value(float(difference.mean()), math.sqrt(max(long_run, 0.0) / count)) * math.sqrt(correction)
    return t, two_sided(t, count - 1)


def two_sided(t: float, freedom: int) -> float:
    """p value of a t statistic by Wallace's (1959) normal deviate: from 5 degrees of freedom on, right to 0.001."""
    deviate = math.sqrt(freedom * math.log1p(t * t / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return math.erfc(deviate / math.sqrt(2))


def direction_t(y: np.ndarray, mean: np.ndarray, dates: np.ndarray, horizon: int = 1) -> float:
    """t statistic of the covariance between the signs of forecasts and outcomes, all (N,).

    The test of Pesaran & Timmermann (1992, 2009): a forecast that always says up knows nothing, however often it is
    right; for that one NaN.
    """
    up, said = np.sign(y), np.sign(mean)
    if np.ptp(said) == 0 or np.ptp(up) == 0:
        return math.nan
    return t_value(*mean_with_error((up - up.mean()) * (said - said.mean()), dates, horizon))


def effective_count(share: float, error: float, rows: int) -> float:
    """As many independent rows would know a share as well as its standard error says; Kish's (1965) design effect."""
    return min(max(share * (1 - share) / error**2, 1.0), rows) if error > 0 else math.nan


def wilson_interval(share: float, count: float, critical: float) -> tuple[float, float]:
    """Interval of a binomial share of `count` independent rows, `critical` standard errors to either side: Wilson,
    1927."""
    extra = critical**2 / count
    centre = (share + extra / 2) / (1 + extra)
    half = critical * math.sqrt(share * (1 - share) / count + extra / (4 * count)) / (1 + extra)
    return centre - half, centre + half
