# Copyright 2026 The SpaceExploreAI contributors. Licensed under the MIT License.
"""Raw OHLCV bars to model inputs and forecasts back to prices: the only door in and out of the network."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from huggingface_hub.utils import tqdm
from transformers import BatchFeature, FeatureExtractionMixin

from .indicators_spaceexplore import FEATURE_PRESETS, compute_indicators, compute_panel, ewma_volatility

try:  # optional: only the dates of a forecast need it
    import exchange_calendars
except ImportError:
    exchange_calendars = None

PRICE_COLUMNS = ["open", "high", "low", "close"]
TABLE_COLUMNS = ["ticker", "date", *PRICE_COLUMNS, "volume"]
_YEAR = r"(?:1[89]|20)\d{2}"
# Year first only: 01/02/2020 is January in New York and February in London.
_DATE = rf"^({_YEAR}-\d{{2}}-\d{{2}}|{_YEAR}/\d{{2}}/\d{{2}}|{_YEAR}\d{{4}})(?:[T ]\d{{2}}:\d{{2}}.*)?$"
VOLATILITY_BARS = 20  # bars before `ewma_volatility`, and with it `scale`, is known


# --- the price table -------------------------------------------------------------------------------------------------


def validate_prices(prices: pd.DataFrame) -> pd.DataFrame:
    """Checks a long table of daily bars and returns it in canonical form.

    Args:
        prices: columns `ticker, date, open, high, low, close, volume`, adjusted for splits and dividends; within a
            ticker oldest first. Other columns are dropped.

    Returns:
        The table sorted by (ticker, date) with string tickers, naive midnight dates and float64 numbers.

    Raises:
        ValueError: missing column, empty table, or a value that cannot be a daily bar; names ticker, date and value.
    """
    check_columns(prices)
    table = prices[TABLE_COLUMNS].reset_index(drop=True)
    nameless = table["ticker"].isna() | table["ticker"].astype(str).str.strip().eq("")
    if nameless.any():
        raise ValueError(f"row {int(nameless.idxmax())} of the price table has no ticker")
    table["ticker"] = table["ticker"].astype(str)
    table["date"] = _dates(table)
    table = table.sort_values("ticker", kind="stable", ignore_index=True)
    for column in [*PRICE_COLUMNS, "volume"]:
        table[column] = _numbers(table, column)
    _check_order(table)
    _check_bars(table)
    return table


def check_columns(prices: pd.DataFrame) -> None:
    """Refuses a table without the columns of bars, with one of them twice, or without rows."""
    missing = [column for column in TABLE_COLUMNS if column not in prices.columns]
    if missing:
        raise ValueError(f"the price table has no column {missing[0]!r}; it has {', '.join(map(str, prices.columns))}")
    twice = prices.columns[prices.columns.duplicated()].intersection([*TABLE_COLUMNS, "adj_close"])
    if len(twice):
        raise ValueError(f"the price table has column {twice[0]!r} twice")
    if prices.empty:
        raise ValueError("the price table is empty")


def parse_dates(dates: pd.Series) -> pd.Series:
    """Naive midnight of each day as written: an offset is the exchange's own, so its local day is the trading day.

    Args:
        dates: timestamps, or text or integers that begin with the year (2020-01-31, 2020/01/31, 20200131).

    Returns:
        datetime64[ns], NaT for what is no date.
    """
    if pd.api.types.is_datetime64_any_dtype(dates):
        days = dates.dt.tz_localize(None).dt.normalize()
    else:
        text = dates.astype(str).str.strip().str.extract(_DATE, expand=False).str.replace("/", "-")
        days = pd.to_datetime(text, format="ISO8601", errors="coerce")
    # What nanoseconds since 1970 can hold.
    return days.where(days.between(pd.Timestamp.min, pd.Timestamp.max)).astype("datetime64[ns]")


def _dates(table: pd.DataFrame) -> pd.Series:
    dates = parse_dates(table["date"])
    if dates.isna().any():
        row = table.loc[dates.isna().idxmax()]
        raise ValueError(f"{row['ticker']}: {str(row['date'])!r} is not a date")
    return dates


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    numbers = pd.to_numeric(table[column], errors="coerce").astype("float64")
    _refuse(table, ~np.isfinite(numbers), column, "is not a finite number")
    return numbers


def _check_order(table: pd.DataFrame) -> None:
    same_ticker = table["ticker"].eq(table["ticker"].shift())
    step = table["date"].diff()
    _refuse(table, same_ticker & (step == pd.Timedelta(0)), "date", "appears twice")
    _refuse(table, same_ticker & (step < pd.Timedelta(0)), "date", "comes after a later date; sort the table by date")


def _check_bars(table: pd.DataFrame) -> None:
    for column in PRICE_COLUMNS:
        _refuse(table, table[column] <= 0, column, "is not a positive price")
    _refuse(table, table["volume"] < 0, "volume", "is negative")
    _refuse(table, table["high"] < table["low"], "high", "is below the low of {low:.10g}")
    for column in ("open", "close"):
        _refuse(table, table[column] > table["high"], column, "is above the high of {high:.10g}")
        _refuse(table, table[column] < table["low"], column, "is below the low of {low:.10g}")


def _refuse(table: pd.DataFrame, bad: pd.Series, column: str, complaint: str) -> None:
    if not bad.any():
        return
    row = table.loc[bad.idxmax()]
    value = row[column].date() if column == "date" else row[column]
    value = f"{value:.10g}" if isinstance(value, float) else str(value)
    raise ValueError(f"{row['ticker']} {row['date'].date()}: {column} {value} {complaint.format(**row)}")


# --- the calendar ----------------------------------------------------------------------------------------------------


_CALENDARS = {}  # by name, of all years that were asked for: making one takes a quarter of a second


def exchange_calendar(calendar: str, first_year: int, last_year: int):
    """The `exchange_calendars` calendar of these years and maybe more."""
    if exchange_calendars is None:
        raise ImportError("dates of a forecast need the trading calendar: pip install exchange_calendars")
    known = _CALENDARS.get(calendar)
    if known is not None:
        if known.first_session.year <= first_year and last_year <= known.last_session.year:
            return known
        first_year, last_year = min(first_year, known.first_session.year), max(last_year, known.last_session.year)
    try:
        known = exchange_calendars.get_calendar(calendar, start=f"{first_year}-01-01", end=f"{last_year}-12-31")
    except exchange_calendars.errors.InvalidCalendarName as error:
        raise ValueError(f"calendar {calendar!r} is not known to exchange_calendars") from error
    _CALENDARS[calendar] = known
    return known


def sessions_of_years(calendar: str, first: pd.Timestamp, last: pd.Timestamp) -> np.ndarray:
    """All sessions of the years from that of `first` to that of `last`, datetime64[ns]."""
    years = pd.Timestamp(first).year, pd.Timestamp(last).year
    sessions = exchange_calendar(calendar, *years).sessions
    return sessions[sessions.slice_indexer(*map(str, years))].to_numpy("datetime64[ns]")


def following_sessions(calendar: str, cutoffs: pd.Series, horizons: list[int]) -> np.ndarray:
    """Trading days after each cutoff.

    Args:
        calendar: exchange_calendars code, such as "XNYS" for the NYSE.
        cutoffs: (N,) dates.
        horizons: (H,) sessions ahead, from 1.

    Returns:
        (N, H) datetime64[ns].
    """
    # 2.5 calendar days a session and two weeks hold the horizon on any exchange (the NYSE averages 1.45).
    reach = pd.Timedelta(days=int(2.5 * max(horizons)) + 14)
    sessions = sessions_of_years(calendar, cutoffs.min() - pd.Timedelta(days=14), cutoffs.max() + reach)
    first = np.searchsorted(sessions, cutoffs.to_numpy("datetime64[ns]"), side="right")
    return sessions[first[:, None] + np.asarray(horizons)[None, :] - 1]


# --- the extractor ---------------------------------------------------------------------------------------------------


class EncodedSeries(NamedTuple):
    """One ticker as the network sees it, without the bars before its volatility is known.

    A step is a session of the calendar, or a bar outside of it. A session that the ticker has no bar of, be it halted
    or missing from the data, is a masked step: nothing is known of it but the volatility of the bar before.
    """

    ticker: str
    dates: np.ndarray  # (T,) datetime64[ns]
    close: np.ndarray  # (T,) float64, in the currency of the prices, NaN at masked steps
    values: np.ndarray  # (T, F) float32, NaN where undefined
    scale: np.ndarray  # (T,) float32, daily volatility

    @property
    def traded(self) -> np.ndarray:
        """(T,) False at masked steps."""
        return np.isfinite(self.close)


def with_missing_sessions(series: EncodedSeries, calendar: str) -> EncodedSeries:
    """Gives a ticker a masked step for every session of the calendar between its bars that it has no bar of."""
    first, last = series.dates[0], series.dates[-1]
    sessions = sessions_of_years(calendar, first, last)
    dates = np.union1d(series.dates, sessions[(sessions > first) & (sessions < last)])
    if len(dates) == len(series.dates):
        return series
    latest = np.searchsorted(series.dates, dates, side="right") - 1  # the newest bar at each step
    missing = series.dates[latest] != dates
    close, values = series.close[latest], series.values[latest]
    close[missing] = values[missing] = np.nan
    return EncodedSeries(series.ticker, dates, close, values, series.scale[latest])


class SpaceExploreFeatureExtractor(FeatureExtractionMixin):
    r"""
    Turns daily bars into normalised causal features, and forecasts into dates and prices.

    Each column is centred and scaled by statistics of the training split, then clipped; they are kept in
    `preprocessor_config.json`. Prices never leave this class: what the network sees does not change when all prices
    are multiplied by a constant.

    Args:
        feature_names (`list[str]`, *optional*): registered indicators, in the order of the columns; by default the
            preset of 64, which knows one ticker at a time. Those of the group "relation" compare a ticker with the
            others of the price table and are undefined where these are few, as for a ticker that is forecast alone.
        normalization (`str`, defaults to `"robust"`): statistics that `fit` takes, as scikit-learn's scalers do:
            `"robust"` (median; interquartile range over that of a unit normal), `"standard"` (mean; standard
            deviation), `"minmax"` (to [-1, 1]).
        center (`list[float]`, *optional*): (F,) fitted; subtracted.
        spread (`list[float]`, *optional*): (F,) fitted; divided by.
        fitted_until (`str`, *optional*): last date (YYYY-MM-DD) that both are of.
        clip (`float`, defaults to 5.0): bound of the normalised values, in spreads.
        context_length (`int`, defaults to 64): bars T that `__call__` gives the network.
        calendar (`str`, defaults to `"XNYS"`): exchange_calendars code of the sessions that horizons count.
    """

    model_input_names = ["past_values", "attention_mask", "scale"]

    def __init__(
        self,
        feature_names: list[str] | None = None,
        normalization: str = "robust",
        center: list[float] | None = None,
        spread: list[float] | None = None,
        fitted_until: str | None = None,
        clip: float = 5.0,
        context_length: int = 64,
        calendar: str = "XNYS",
        **kwargs,
    ):
        if normalization not in _STATISTICS:
            raise ValueError(f"normalization must be one of {', '.join(_STATISTICS)}, got {normalization!r}")
        if context_length < 1:
            raise ValueError(f"context_length must be at least 1, got {context_length}")
        self.feature_names = list(FEATURE_PRESETS["default"] if feature_names is None else feature_names)
        self.normalization = normalization
        self.center, self.spread, self.fitted_until = center, spread, fitted_until
        self.clip = clip
        self.context_length = context_length
        self.calendar = calendar
        super().__init__(**kwargs)

    @property
    def min_history(self) -> int:
        """Bars a ticker needs before it can be forecast."""
        return self.context_length + VOLATILITY_BARS

    def compute_features(self, prices: pd.DataFrame) -> pd.DataFrame:
        """Computes the columns, before normalisation.

        Args:
            prices: the price table (see `validate_prices`).

        Returns:
            One row per bar: `ticker, date, <feature_names>`, float32, NaN where undefined.
        """
        prices = validate_prices(prices)
        # As pandas keeps a table: column by column.
        values = np.empty((len(self.feature_names), len(prices)), dtype=np.float32)
        tickers = prices.groupby("ticker", sort=False)
        for _, bars in tqdm(tickers, desc="features", unit="ticker", leave=False, delay=1):
            values[:, bars.index[0] : bars.index[-1] + 1] = compute_indicators(bars, self.feature_names).T
        for name, column in compute_panel(prices, self.feature_names):
            values[self.feature_names.index(name)] = column
        features = pd.DataFrame(values.T, columns=self.feature_names, copy=False)
        features.insert(0, "ticker", prices["ticker"])
        features.insert(1, "date", prices["date"])
        return features

    def fit(self, features: pd.DataFrame) -> "SpaceExploreFeatureExtractor":
        """Takes the statistics of normalisation from `compute_features` rows, which must be those of the training
        split alone. Undefined values are left out; a column without any spread is only centred."""
        return self.fit_columns((features[name].to_numpy() for name in self.feature_names), features["date"].max())

    def fit_columns(self, columns: Iterable[np.ndarray], until=None) -> "SpaceExploreFeatureExtractor":
        """As `fit`, one column after the other in the order of `feature_names`; `until` is the last date of all."""
        center, spread = [], []
        for name, values in zip(self.feature_names, columns, strict=True):
            if np.isnan(values).all():
                raise ValueError(f"feature {name!r} has no value in the training split")
            middle, width = _STATISTICS[self.normalization](values.astype(np.float64))
            center.append(float(middle))
            # The standard deviation of a constant is a rounding error, not zero.
            spread.append(float(width) if width > 1e-12 * max(abs(middle), 1.0) else 1.0)
        self.center, self.spread, self.fitted_until = center, spread, until and f"{until:%Y-%m-%d}"
        return self

    def encode(self, prices: pd.DataFrame, features: pd.DataFrame | None = None) -> list[EncodedSeries]:
        """Prepares whole histories, from which windows are cut.

        Args:
            prices: the price table.
            features: what `compute_features(prices)` gave, to spare its second computation.

        Returns:
            One series per ticker, in the order of the table; tickers whose volatility is never known are left out.
        """
        prices = validate_prices(prices)
        return self._encode(prices, self.compute_features(prices) if features is None else features)

    def _encode(self, prices: pd.DataFrame, features: pd.DataFrame) -> list[EncodedSeries]:
        if self.center is None:
            raise ValueError("the feature extractor has no statistics yet: call fit on the training split first")
        center, spread = np.array(self.center), np.array(self.spread)
        series = []
        for ticker, bars in prices.groupby("ticker", sort=False):
            known = bars.iloc[VOLATILITY_BARS:]
            if len(known):
                scale = ewma_volatility(bars["close"], min_periods=VOLATILITY_BARS).to_numpy(np.float32)
                dates, close = known["date"].to_numpy(), known["close"].to_numpy()
                values = features[known.index[0] : known.index[-1] + 1][self.feature_names].to_numpy()
                rows = ((values - center) / spread).clip(-self.clip, self.clip).astype(np.float32, order="C")
                encoded = EncodedSeries(ticker, dates, close, rows, scale[VOLATILITY_BARS:])
                series.append(with_missing_sessions(encoded, self.calendar))
        return series

    def __call__(
        self, prices: pd.DataFrame, as_of: str | pd.Timestamp | None = None, return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Cuts each ticker's newest context.

        Args:
            prices: the price table; every ticker needs `min_history` bars.
            as_of: newest date to use; the end of the table by default.
            return_tensors: "pt" or "np".

        Returns:
            `past_values` (B, T, F), `attention_mask` (B, T), `scale` (B, T); B tickers in sorted order.
        """
        return self.newest_contexts(self.history(prices, as_of), return_tensors)

    def newest_contexts(self, history: pd.DataFrame, return_tensors: str | None = "pt") -> BatchFeature:
        """As `__call__`, of what `history` gave."""
        series = self._encode(history, self.compute_features(history))
        batch = {
            "past_values": np.stack([one.values[-self.context_length :] for one in series]),
            "attention_mask": np.stack([one.traded[-self.context_length :] for one in series]).astype(np.int64),
            "scale": np.stack([one.scale[-self.context_length :] for one in series]),
        }
        return BatchFeature(batch, tensor_type=return_tensors)

    def history(self, prices: pd.DataFrame, as_of: str | pd.Timestamp | None = None) -> pd.DataFrame:
        """The price table up to `as_of`, every ticker of it long enough to be forecast, else a ValueError."""
        prices = validate_prices(prices)
        tickers = prices["ticker"].unique()
        if as_of is not None:
            prices = prices[prices["date"] <= parse_date(as_of)]
        bars = prices.groupby("ticker").size().reindex(tickers, fill_value=0)
        if (bars < self.min_history).any():
            ticker = bars.index[bars < self.min_history][0]
            until = "" if as_of is None else f" up to {parse_date(as_of).date()}"
            raise ValueError(
                f"{ticker} has {bars[ticker]} bars{until}; a forecast needs {self.min_history} "
                f"({self.context_length} of context and {VOLATILITY_BARS} to know the volatility)"
            )
        return prices.reset_index(drop=True)

    def decode(
        self, outputs, prices: pd.DataFrame, config, as_of: str | pd.Timestamp | None = None, unit: str = "price"
    ) -> pd.DataFrame:
        """Turns the network's outputs for `self(prices, as_of)` into a dated forecast table.

        Args:
            outputs: with `mean` (B, T, H) and `quantiles` (B, T, H, Q), log-returns.
            prices: the price table that was encoded.
            config: the model's configuration, for `horizons` and `quantile_levels`.
            as_of: as given to `__call__`.
            unit: "price", in the currency of `prices`, or "log_return", from the close at `cutoff`.

        Returns:
            `ticker, cutoff, date, horizon, mean, q0.05 … q0.95, p_up`. In prices the quantiles are exact, being
            monotone; `mean` is then the price of the mean log-return.
        """
        if unit not in ("price", "log_return"):
            raise ValueError(f"unit must be 'price' or 'log_return', got {unit!r}")
        newest = self.history(prices, as_of).groupby("ticker", sort=False).tail(1)
        origins = newest.rename(columns={"date": "cutoff"})[["ticker", "cutoff", "close"]].reset_index(drop=True)
        table = self.forecast_table(origins, outputs.mean[:, -1], outputs.quantiles[:, -1], config)
        if unit == "price":
            return in_prices(table, origins["close"])
        return table

    def forecast_table(self, origins: pd.DataFrame, mean, quantiles, config) -> pd.DataFrame:
        """Lays forecasts out as the long table `ticker, cutoff, date, horizon, mean, q0.05 … q0.95, p_up`.

        Args:
            origins: (N,) rows `ticker, cutoff`.
            mean: (N, H) log-returns from the close at the cutoff.
            quantiles: (N, H, Q) log-returns, increasing in Q.
            config: the model's configuration, for `horizons` and `quantile_levels`.
        """
        table, levels = _empty_table(origins, self.calendar, config), list(config.quantile_levels)
        mean, quantiles = (torch.as_tensor(x).detach().cpu().double().numpy() for x in (mean, quantiles))
        table["mean"] = mean.reshape(-1)
        flat = quantiles.reshape(-1, len(levels))
        table[quantile_columns(levels)] = flat
        table["p_up"] = 1 - cumulative_probability(flat, levels, 0.0)
        return table

    def class_table(self, origins: pd.DataFrame, probabilities, config) -> pd.DataFrame:
        """Lays forecasts of classes out as the long table `ticker, cutoff, date, horizon, p_down, p_flat, p_up, band`.

        Args:
            origins: (N,) rows `ticker, cutoff, scale`, the last the daily volatility known at the cutoff.
            probabilities: (N, H, 3) of down, flat and up.
            config: the model's configuration, for `horizons` and `flat_band`; a log-return within ±band is flat.
        """
        table = _empty_table(origins, self.calendar, config)
        flat = torch.as_tensor(probabilities).detach().cpu().double().numpy().reshape(-1, 3)
        table[["p_down", "p_flat", "p_up"]] = flat
        scale = origins["scale"].to_numpy(dtype=np.float64)
        table["band"] = config.flat_band * np.outer(scale, np.sqrt(config.horizons)).reshape(-1)
        return table


def _empty_table(origins: pd.DataFrame, calendar: str, config) -> pd.DataFrame:
    """`ticker, cutoff, date, horizon`: a row for each of the H horizons of each of the N origins."""
    if config.target != "log_return":
        raise ValueError(f"a forecast of prices needs a network of log-returns, this one predicts {config.target!r}")
    horizons = list(config.horizons)
    table = origins[["ticker", "cutoff"]].loc[origins.index.repeat(len(horizons))].reset_index(drop=True)
    table["date"] = following_sessions(calendar, origins["cutoff"], horizons).reshape(-1)
    table["horizon"] = np.tile(horizons, len(origins))
    return table


def in_prices(table: pd.DataFrame, close: pd.Series) -> pd.DataFrame:
    """A forecast table with its returns as prices.

    Args:
        table: rows of the (N,) origins one after the other, as many of each, in log-returns.
        close: (N,) at the cutoffs.
    """
    columns = [name for name in table if name == "mean" or name.startswith("q")]
    start = np.repeat(close.to_numpy(), len(table) // len(close))
    return table.assign(**np.exp(table[columns]).mul(start, axis=0))


def quantile_columns(levels: list[float]) -> list[str]:
    """Column names of quantile levels in a forecast table."""
    return [f"q{level:g}" for level in levels]


def cumulative_probability(quantiles: np.ndarray, levels: list[float], value: float) -> np.ndarray:
    """Distribution function at `value`, linear between quantiles and flat beyond the outermost.

    Args:
        quantiles: (N, Q) increasing in Q.
        levels: (Q,) increasing.
        value: in the unit of the quantiles.

    Returns:
        (N,) probabilities within [levels[0], levels[-1]].
    """
    return np.array([np.interp(value, row, levels) for row in quantiles])


def parse_date(value: str | pd.Timestamp) -> pd.Timestamp:
    """One day as written, also one of the far future; of days and months alone nobody knows which is which."""
    date = pd.to_datetime(str(value).strip().replace("/", "-"), format="ISO8601", errors="coerce")
    if pd.isna(date):
        raise ValueError(f"{value!r} is not a date (YYYY-MM-DD)")
    return date.tz_localize(None).normalize()


def _robust(values: np.ndarray) -> tuple[float, float]:
    low, median, high = np.nanquantile(values, [0.25, 0.5, 0.75])
    return median, (high - low) / 1.3489795  # interquartile range of a unit normal


def _standard(values: np.ndarray) -> tuple[float, float]:
    return np.nanmean(values), np.nanstd(values)


def _minmax(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanmin(values), np.nanmax(values)
    return (high + low) / 2, (high - low) / 2


_STATISTICS = {"robust": _robust, "standard": _standard, "minmax": _minmax}

SpaceExploreFeatureExtractor.register_for_auto_class()
