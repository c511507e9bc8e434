"""A forecast table in the forms of other libraries: qlib's signal, GluonTS' quantile forecasts, a task of fev."""

import numpy as np
import pandas as pd

from spaceexploreai.evaluation.backtest import signals_of
from spaceexploreai.evaluation.baselines import quantile_columns, quantile_levels, require_columns

POINT = "predictions"  # fev's name of the point forecast


def qlib_signal(forecasts: pd.DataFrame, horizon: int, signal: str = "mean") -> pd.DataFrame:
    """Table `datetime, instrument, score`, one row for each cutoff and ticker; the first two are qlib's index.

    `datetime` is the cutoff, after whose close the score is known. It must not be moved: qlib's strategies decide on
    a day by the scores of the one before (`TopkDropoutStrategy.generate_trade_decision`: `shift=1`).

    Args:
        forecasts: forecast table.
        horizon: whose rows of the table are the signal.
        signal: as of `backtest`.
    """
    names = {"cutoff": "datetime", "ticker": "instrument", "signal": "score"}
    rows = signals_of(forecasts, horizon, signal).rename(columns=names)
    return rows[[*names.values()]].sort_values(["datetime", "instrument"], ignore_index=True)


def price_forecasts(forecasts: pd.DataFrame, prices: pd.DataFrame, horizon: int) -> pd.DataFrame:
    """Forecasts of prices for every step from 1 to `horizon`, which GluonTS and fev score together.

    The quantiles are exact, being monotone; `mean` is the price of the mean log-return. A step that was never forecast
    is refused and not interpolated: its score would not be the model's.

    Args:
        forecasts: forecast table with quantiles.
        prices: validated price table that it was made of.
        horizon: H.

    Returns:
        One row for each cutoff and ticker: `item_id, cutoff`, and as lists of H `date`, `target` (the close then, NaN
        while unknown), `mean, 0.05 … 0.95`.
    """
    levels = quantile_levels(forecasts)
    columns = ["mean", *quantile_columns(levels)]
    require_columns(forecasts, ["ticker", "cutoff", "horizon", "date", "mean"])
    rows = _every_step(forecasts, horizon)
    close = prices.set_index(["ticker", "date"])["close"]
    origin, target = (
        close.reindex(pd.MultiIndex.from_frame(rows[["ticker", day]])).to_numpy() for day in ("cutoff", "date")
    )
    _refuse(rows, np.isnan(origin), "has no bar in the price table")
    values = origin[:, None] * np.exp(rows[columns].to_numpy())
    _refuse(rows, ~np.isfinite(values).all(axis=1), "has a forecast that is not finite")
    lists = {"date": rows["date"].to_numpy(), "target": target}
    lists |= dict(zip(["mean", *map(str, levels)], values.T, strict=True))
    table = rows[["ticker", "cutoff"]].rename(columns={"ticker": "item_id"}).iloc[::horizon].reset_index(drop=True)
    return table.assign(**{name: list(column.reshape(-1, horizon)) for name, column in lists.items()})


def fev_task(table: pd.DataFrame, prices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """The price forecasts as a task of fev: its windows are the cutoffs that H sessions of the price table follow.

    fev wants timestamps at a regular distance, which sessions do not have: it gets their numbers, as days from 1970
    on. Tickers without a bar have NaN there, which it leaves out.

    Args:
        table: of `price_forecasts`.
        prices: the same price table; its dates are the sessions.

    Returns:
        The dataset `id, timestamp, target`, a row for each ticker; the predictions `id, cutoff, predictions, 0.05 …
        0.95`, by cutoff and ticker; and arguments of `fev.Task`, without the path of the dataset.

    Raises:
        ValueError: forecasts and prices have other sessions, a ticker has no forecast at some cutoff, or cutoffs are
            at uneven distances.
    """
    sessions, steps = np.unique(prices["date"].to_numpy()), len(table["date"].iloc[0])
    table = table.assign(session=np.searchsorted(sessions, table["cutoff"]))
    table = table[table["session"] + steps < len(sessions)]
    if table.empty:
        raise ValueError(f"the prices end before session {steps} after the first cutoff: nothing can be scored")
    _refuse_other_sessions(table, sessions)
    windows = _windows(table)
    predictions = table.drop(columns=["date", "target", "session"]).rename(columns={"item_id": "id", "mean": POINT})
    closes = prices[prices["ticker"].isin(table["item_id"])].pivot(index="ticker", columns="date", values="close")
    closes = closes.reindex(columns=sessions)
    numbers = np.arange(len(sessions)).astype("datetime64[D]").astype("datetime64[ms]")
    dataset = {"id": closes.index, "timestamp": [numbers] * len(closes), "target": list(closes.to_numpy())}
    levels = [float(name) for name in predictions.columns.drop(["id", "cutoff", POINT])]
    return pd.DataFrame(dataset), predictions, {"horizon": steps, **windows, "quantile_levels": levels}


def _every_step(forecasts: pd.DataFrame, horizon: int) -> pd.DataFrame:
    """The rows of steps 1 to `horizon`, by cutoff, ticker and step."""
    known = sorted(forecasts["horizon"].unique())
    for step in (*range(1, horizon), horizon):
        if step not in known:
            raise ValueError(
                f"the forecast table has no horizon {step}; it has {', '.join(map(str, known)) or 'no row'}, "
                f"and every one from 1 to {horizon} is needed"
            )
    rows = forecasts[forecasts["horizon"] <= horizon].sort_values(["cutoff", "ticker", "horizon"], ignore_index=True)
    windows = rows.groupby(["cutoff", "ticker"])["horizon"]
    other = (rows["horizon"] != windows.cumcount() + 1) | (windows.transform("size") != horizon)
    _refuse(rows, other, f"does not have each step from 1 to {horizon} once")
    return rows


def _refuse(rows: pd.DataFrame, bad: pd.Series | np.ndarray, sentence: str) -> None:
    if bad.any():
        row = rows.iloc[int(np.argmax(bad))]
        raise ValueError(f"{row['ticker']} {sentence} at cutoff {row['cutoff']:%Y-%m-%d}")


def _refuse_other_sessions(table: pd.DataFrame, sessions: np.ndarray) -> None:
    """Step k of a forecast must be session k after its cutoff."""
    dates = np.stack(table["date"].to_numpy())  # (N, H)
    expected = sessions[table["session"].to_numpy()[:, None] + np.arange(1, dates.shape[1] + 1)]
    if (dates != expected).any():
        which, step = np.argwhere(dates != expected)[0]
        row, (there, here) = table.iloc[which], (pd.Timestamp(days[which, step]) for days in (dates, expected))
        raise ValueError(
            f"{row['item_id']}: session {step + 1} after {row['cutoff']:%Y-%m-%d} is {there:%Y-%m-%d} in the "
            f"forecasts and {here:%Y-%m-%d} in the prices: fev needs prices of every session"
        )


def _windows(table: pd.DataFrame) -> dict[str, int]:
    """What `fev.Task` must know of the cutoffs; each has a forecast of every ticker, or an error."""
    known = pd.crosstab(table["item_id"], table["cutoff"]) > 0
    if not known.all(axis=None):
        lacking = known[~known.all(axis=1)]
        raise ValueError(
            f"{lacking.index[0]} has no forecast at cutoff {lacking.iloc[0].idxmin():%Y-%m-%d}, as {len(lacking)} of "
            f"{len(known)} tickers at some; fev scores all at every one: name the others in --tickers"
        )
    places = np.unique(table["session"])
    strides = np.unique(np.diff(places))
    if len(strides) > 1:
        raise ValueError(f"cutoffs are {strides[0]} to {strides[-1]} sessions apart; windows of fev are evenly spaced")
    stride = int(strides[0]) if len(strides) else 1
    return {"num_windows": len(places), "initial_cutoff": int(places[0]) + 1, "window_step_size": stride}
