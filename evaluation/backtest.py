"""Backtest of a forecast table: signals at the close of a cutoff, fills at the next open, costs, halts, limits.

The accounting is our own, as no library's fits: bt (MIT) fills and values at one price a bar and fails on a position
without one, zipline-reloaded needs pandas 2, vectorbt is under the Commons Clause and backtesting.py under the AGPL.

- Prices are adjusted, open and close by the same factor: dividends are earned by longs and owed by shorts.
- An order is for a value, the weight times the equity at that open, and fills whole at the open, without impact. Costs
  come out of cash, so a fully invested book owes them; cash earns nothing and debt is free.
- A ticker without a bar, or without volume where it has had some, is halted: its order is cancelled and its position
  stays, valued at the last close; other orders shrink until the gross exposure is as intended.
- A position in a ticker that has no bar any more is paid out at its last close, at the next rebalance.
- The book is valued at every close. At the last one it is not sold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from spaceexploreai.evaluation.baselines import quantile_columns, require_columns
from spaceexploreai.evaluation.performance import SESSIONS_PER_YEAR
from spaceexploreai.evaluation.ranking import places_within

BASIS_POINT = 1e-4
SIDES = {"long": 1, "long-short": 2}  # how many books of top_k tickers
SIGNALS = ("mean", "p_up", "ratio")
LEAST_TRADE = 1e-12  # of equity; what rounding leaves between a target and a position is no order
OUTCOMES = ("filled", "cancelled", "delisted")
DAILY = ["equity", "long", "short", "cost", "borrow", "turnover"]

# Shapes: T sessions from the first cutoff on, N tickers, R rebalances


@dataclass(frozen=True)
class Costs:
    """In basis points. The sum of the first two is paid on the value of each trade: for small orders in large American
    stocks six are no low estimate, for small stocks, before 2001, or for size they are (Frazzini, Israel & Moskowitz,
    2018). Nine in ten stocks lend for less than a hundred a year, large ones for 39 on average (D'Avolio, 2002; Cohen,
    Diether & Malloy, 2007); a stock that is hard to borrow costs many times that."""

    commission: float = 1.0
    half_spread: float = 5.0
    borrow: float = 50.0  # a year, on the value of shorts at each close

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} must be a number of basis points, zero or more, got {value}")

    @property
    def trade(self) -> float:
        """Share of the value of a trade."""
        return (self.commission + self.half_spread) * BASIS_POINT

    @property
    def overnight(self) -> float:
        """Share of the value of a short, each session."""
        return self.borrow * BASIS_POINT / SESSIONS_PER_YEAR


@dataclass(frozen=True)
class Market:
    """Prices as arrays. `close` is carried forward over sessions without a bar, and 0 before a ticker's first."""

    sessions: pd.DatetimeIndex
    tickers: pd.Index
    open: np.ndarray  # (T, N)
    close: np.ndarray  # (T, N)
    tradable: np.ndarray  # (T, N)
    last: np.ndarray  # (N,) session of the last bar

    @classmethod
    def of(cls, prices: pd.DataFrame, tickers: Sequence[str], first: pd.Timestamp) -> "Market":
        before, prices = prices[prices["date"] < first], prices[prices["date"] >= first]
        sessions, tickers = pd.DatetimeIndex(np.unique(prices["date"])), pd.Index(sorted(set(tickers)))
        bars = prices[prices["ticker"].isin(tickers)]
        absent = tickers.difference(bars["ticker"].unique())
        if len(absent):
            raise ValueError(f"the price table has no bar of {absent[0]} from {first:%Y-%m-%d} on")
        at = sessions.get_indexer(bars["date"]), tickers.get_indexer(bars["ticker"])
        last = np.zeros(len(tickers), dtype=int)
        np.maximum.at(last, at[1], at[0])
        open_, close, volume = (_grid(bars[name], at, sessions, tickers) for name in ("open", "close", "volume"))
        # An index never had any volume, and has no halts by it.
        had = np.maximum.accumulate(volume > 0, axis=0) | tickers.isin(before.loc[before["volume"] > 0, "ticker"])
        tradable = (volume > 0) | (~had & np.isfinite(close))
        return cls(sessions, tickers, open_, pd.DataFrame(close).ffill().fillna(0.0).to_numpy(), tradable, last)


def _grid(values: pd.Series, at: tuple[np.ndarray, np.ndarray], sessions, tickers) -> np.ndarray:
    grid = np.full((len(sessions), len(tickers)), np.nan)
    grid[at] = values.to_numpy(dtype=float)
    return grid


@dataclass(frozen=True)
class Ledger:
    """What became of an account of 1.

    Attributes:
        daily: by session, at its close, from the first cutoff on: `equity`; `long` and `short`, what positions are
            worth (shorts are negative); `cost`, `borrow` and `turnover` of that session, the last as half the value of
            all trades over the equity at its open.
        orders: `date, ticker, shares, price, cost, outcome`, the last "filled", "cancelled" (halted; shares are those
            that were asked for) or "delisted" (paid out at the last close).
    """

    daily: pd.DataFrame
    orders: pd.DataFrame


def backtest(
    forecasts: pd.DataFrame,
    prices: pd.DataFrame,
    horizon: int,
    signal: str = "mean",
    side: str = "long-short",
    top_k: int = 10,
    hold: int | None = None,
    costs: Costs = Costs(),
    turnover_limit: float | None = None,
) -> dict[str, Ledger]:
    """Trades on a forecast table, and beside it holds all of its tickers.

    Every `hold` sessions the `top_k` tickers with the highest signals are bought in equal parts: for all of the
    equity, or for half of it while as many with the lowest are sold short for the other half. Tickers with equal
    signals share the places left for them.

    Args:
        forecasts: forecast table.
        prices: validated price table; its dates are the sessions.
        horizon: whose rows of the table are the signal.
        signal: "mean", "p_up", or "ratio", the mean over the width of the 90 % interval; of a baseline as "ewma_mean".
        side: "long" or "long-short".
        top_k: tickers on each side.
        hold: sessions from one rebalance to the next; the horizon by default.
        costs: of every portfolio.
        turnover_limit: most that one rebalance of the strategy, the first included, may turn over (see `Ledger`); all
            of its trades shrink alike.

    Returns:
        Ledgers of "strategy", "equal_weight" (all tickers that have a forecast, at the same rebalances and costs) and
        "buy_and_hold" (those of the first rebalance, never traded again).

    Raises:
        ValueError: a column, horizon, option, price or cutoff is missing or wrong, tickers are too few, or the account
            is ruined.
    """
    hold = horizon if hold is None else hold
    _check_options(side, top_k, hold, turnover_limit)
    rows = signals_of(forecasts, horizon, signal)
    market = Market.of(prices, rows["ticker"].unique(), rows["cutoff"].min())
    decided, end = _schedule(rows["cutoff"], market.sessions, hold)
    signals = rows.pivot(index="cutoff", columns="ticker", values="signal")
    signals = signals.reindex(index=market.sessions[decided], columns=market.tickers)
    _refuse_too_few(signals, SIDES[side] * top_k, side)
    weights = target_weights(signals.to_numpy(), top_k, side)
    known = signals.notna().to_numpy()
    equal = known / known.sum(axis=1, keepdims=True)
    return {
        "strategy": simulate(market, decided, weights, end, costs, turnover_limit),
        "equal_weight": simulate(market, decided, equal, end, costs),
        "buy_and_hold": simulate(market, decided[:1], equal[:1], end, costs),
    }


# --- from forecasts to weights ---------------------------------------------------------------------------------------


def _check_options(side: str, top_k: int, hold: int, turnover_limit: float | None) -> None:
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
    for name, value in (("top_k", top_k), ("hold", hold)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if turnover_limit is not None and not turnover_limit > 0:
        raise ValueError(f"turnover_limit must be above 0, got {turnover_limit}")


def signals_of(forecasts: pd.DataFrame, horizon: int, signal: str) -> pd.DataFrame:
    """Table `ticker, cutoff, signal` of one horizon, finite and without repetition."""
    require_columns(forecasts, ["ticker", "cutoff", "horizon"])
    rows = forecasts[forecasts["horizon"] == horizon]
    if rows.empty:
        known = ", ".join(map(str, sorted(forecasts["horizon"].unique())))
        raise ValueError(f"the forecast table has no horizon {horizon}; it has {known or 'no row'}")
    rows = rows[["ticker", "cutoff"]].assign(signal=_signal(rows, signal))
    wrong = ~np.isfinite(rows["signal"])
    twice = rows.duplicated(["ticker", "cutoff"])
    for bad, sentence in ((wrong, f"has no finite {signal}"), (twice, "is there twice")):
        if bad.any():
            row = rows.loc[bad.idxmax()]
            raise ValueError(f"{row['ticker']} {sentence} at cutoff {row['cutoff']:%Y-%m-%d}, horizon {horizon}")
    return rows


def _signal(rows: pd.DataFrame, signal: str) -> pd.Series:
    name = next((name for name in SIGNALS if signal == name or signal.endswith(f"_{name}")), None)
    if name is None:  # y, above all, is no signal
        raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, or one of a baseline's, got {signal!r}")
    prefix = signal.removesuffix(name)
    lower, upper = quantile_columns([0.05, 0.95], prefix)
    require_columns(rows, [f"{prefix}mean", lower, upper] if name == "ratio" else [signal])
    return rows[f"{prefix}mean"] / (rows[upper] - rows[lower]) if name == "ratio" else rows[signal]


def _schedule(cutoffs: pd.Series, sessions: pd.DatetimeIndex, hold: int) -> tuple[np.ndarray, int]:
    """(R,) sessions after whose close a rebalance is decided, at least `hold` apart, and the last one to be valued."""
    unique = np.unique(cutoffs)
    places = sessions.get_indexer(unique)
    if (places < 0).any():
        raise ValueError(f"the price table has no bar on the cutoff {pd.Timestamp(unique[places.argmin()]):%Y-%m-%d}")
    decided = []
    for place in places[places < len(sessions) - 1]:
        if not decided or place - decided[-1] >= hold:
            decided.append(place)
    if not decided:
        raise ValueError(f"the prices end at the only cutoff, {sessions[-1]:%Y-%m-%d}: nothing can be traded")
    return np.array(decided), int(min(decided[-1] + hold, len(sessions) - 1))


def _refuse_too_few(signals: pd.DataFrame, needed: int, side: str) -> None:
    counts = signals.notna().sum(axis=1)
    if counts.min() < needed:
        cutoff = counts.idxmin()
        raise ValueError(
            f"side {side!r} needs {needed} tickers, only {counts[cutoff]} have a forecast at cutoff {cutoff:%Y-%m-%d}"
        )


def target_weights(signals: np.ndarray, top_k: int, side: str) -> np.ndarray:
    """(R, N) shares of equity from (R, N) signals, NaN where a ticker has none; |weights| are 1 in sum."""
    which, column = np.nonzero(np.isfinite(signals))
    less, upto = places_within(signals[which, column], which)
    ties, size = upto - less, np.bincount(which, minlength=len(signals))[which]
    longs = (upto - (size - top_k)).clip(0, ties) / ties / top_k
    shorts = (top_k - less).clip(0, ties) / ties / top_k
    weights = np.zeros(signals.shape)
    weights[which, column] = longs if side == "long" else (longs - shorts) / 2
    return weights


# --- from weights to equity ------------------------------------------------------------------------------------------


def simulate(
    market: Market,
    decided: np.ndarray,
    targets: np.ndarray,
    end: int,
    costs: Costs,
    turnover_limit: float | None = None,
) -> Ledger:
    """Holds (R, N) target weights, decided after the close of (R,) sessions and filled at the next open.

    Returns:
        The ledger of sessions decided[0] to `end`.
    """
    account = _Account(market, costs)
    for weights, fill, stop in zip(targets, decided + 1, [*(decided[1:] + 1), end + 1], strict=True):
        cost, turnover = account.rebalance(fill, weights, turnover_limit)
        account.hold(fill, stop, cost, turnover)
    daily = pd.DataFrame(np.concatenate(account.days), market.sessions[decided[0] : end + 1], DAILY)
    return Ledger(daily.rename_axis("date"), account.all_orders())


class _Account:
    """Positions and cash, and the record of what happened to them."""

    def __init__(self, market: Market, costs: Costs):
        self.market, self.costs = market, costs
        self.shares, self.cash = np.zeros(len(market.tickers)), 1.0
        self.days = [np.array([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])]
        self.orders: list[dict[str, np.ndarray]] = []

    def rebalance(self, fill: int, weights: np.ndarray, turnover_limit: float | None) -> tuple[float, float]:
        """Trades towards (N,) weights at the open of session `fill`; returns the cost and the turnover."""
        free = self.market.tradable[fill]
        price = np.where(free, self.market.open[fill], self.market.close[fill - 1])
        equity = self.cash + self.shares @ price
        self._refuse_ruin(fill, equity)
        self._pay_out(fill, price, equity)
        values = self.shares * price
        trades = _trades(weights, values, equity, free, turnover_limit)
        paid = self.costs.trade * np.abs(trades)
        self.shares = self.shares + self._record(fill, "filled", trades, price, paid)
        missed = np.where(free, 0.0, _without_rounding(weights * equity - values, equity))
        self._record(fill, "cancelled", missed, price, np.zeros_like(paid))
        self.cash -= trades.sum() + paid.sum()
        return paid.sum(), _turnover(trades, equity)

    def hold(self, fill: int, stop: int, cost: float, turnover: float) -> None:
        """Values the account at the closes of sessions `fill` to `stop` - 1; the cost and turnover are the first's."""
        values = self.shares * self.market.close[fill:stop]
        long, short = values.clip(min=0).sum(axis=1), values.clip(max=0).sum(axis=1)
        borrow = -short * self.costs.overnight
        day = np.zeros((stop - fill, len(DAILY)))
        day[:, :3] = np.stack([self.cash + long + short - borrow.cumsum(), long, short], axis=1)
        day[:, 4] = borrow
        day[0, [3, 5]] = cost, turnover
        self._refuse_ruin(fill + int(day[:, 0].argmin()), day[:, 0].min())
        self.cash -= borrow.sum()
        self.days.append(day)

    def all_orders(self) -> pd.DataFrame:
        columns = {name: np.concatenate([one[name] for one in self.orders]) for name in self.orders[0]}
        session, ticker = columns.pop("session"), columns.pop("ticker")
        return pd.DataFrame({"date": self.market.sessions[session], "ticker": self.market.tickers[ticker], **columns})

    def _pay_out(self, fill: int, price: np.ndarray, equity: float) -> None:
        gone = self.market.last < fill
        paid = np.where(gone, _without_rounding(self.shares * price, equity), 0.0)
        self._record(fill, "delisted", -paid, price, np.zeros_like(paid))
        self.shares = np.where(gone, 0.0, self.shares)
        self.cash += paid.sum()

    def _record(self, fill: int, outcome: str, values: np.ndarray, price: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Notes the orders of those (N,) values that are not 0; returns their shares."""
        (ticker,) = np.nonzero(values)
        shares = np.divide(values, price, out=np.zeros_like(values), where=price > 0)
        order = {"session": np.full(len(ticker), fill), "ticker": ticker, "shares": shares[ticker]}
        outcomes = np.full(len(ticker), outcome, dtype=object)
        self.orders.append(order | {"price": price[ticker], "cost": cost[ticker], "outcome": outcomes})
        return shares

    def _refuse_ruin(self, session: int, equity: float) -> None:
        if equity <= 0:
            raise ValueError(f"ruined on {self.market.sessions[session]:%Y-%m-%d}: an equity of 1 became {equity:.3g}")


def _trades(
    weights: np.ndarray, values: np.ndarray, equity: float, free: np.ndarray, limit: float | None
) -> np.ndarray:
    """(N,) values to trade from (N,) values held towards (N,) weights, where `free`."""
    gross, asked = np.abs(weights).sum() * equity, np.abs(weights[free]).sum() * equity
    room = max(gross - np.abs(values[~free]).sum(), 0.0)  # what cannot be sold must not be financed by debt
    shrink = min(room / asked, 1.0) if asked > 0 else 0.0
    trades = np.where(free, _without_rounding(shrink * weights * equity - values, equity), 0.0)
    turnover = _turnover(trades, equity)
    return trades * (limit / turnover) if limit is not None and turnover > limit else trades


def _turnover(trades: np.ndarray, equity: float) -> float:
    return np.abs(trades).sum() / 2 / equity


def _without_rounding(trades: np.ndarray, equity: float) -> np.ndarray:
    return np.where(np.abs(trades) > LEAST_TRADE * equity, trades, 0.0)
