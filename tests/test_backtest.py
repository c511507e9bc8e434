"""The engine against a scalar loop, against bt, and against what must hold of any account; the command line."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import make_market
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from spaceexploreai.data.prices import write_table
from spaceexploreai.evaluation.backtest import Costs, backtest, target_weights
from spaceexploreai.scripts import backtest as script

FREE, DEAR = Costs(0, 0, 0), Costs()
FEW = settings(max_examples=10, deadline=None)


def days(count: int) -> pd.DatetimeIndex:
    return pd.bdate_range("2020-01-01", periods=count)


def to_long(values: np.ndarray, name: str) -> pd.Series:
    names = pd.Index([f"T{column}" for column in range(values.shape[1])], name="ticker")
    return pd.DataFrame(values, days(len(values)).rename("date"), names).stack().rename(name)


def make_prices(open_: np.ndarray, close: np.ndarray, volume: np.ndarray | None = None) -> pd.DataFrame:
    """Price table of (T, N) opens and closes; NaN is no bar."""
    volume = np.ones_like(close) if volume is None else volume
    table = pd.concat(
        [to_long(open_, "open"), to_long(close, "close"), to_long(volume, "volume")], axis=1
    ).reset_index()
    table = table.dropna().assign(high=table[["open", "close"]].max(axis=1), low=table[["open", "close"]].min(axis=1))
    return table.sort_values(["ticker", "date"], ignore_index=True)


def make_forecasts(signal: np.ndarray, horizon: int = 1) -> pd.DataFrame:
    """Forecast table of (T, N) means; NaN is no forecast."""
    table = to_long(signal, "mean").dropna().reset_index().rename(columns={"date": "cutoff"})
    return table.assign(horizon=horizon)


def random_market(seed: int, count: int = 30, tickers: int = 8, holes: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(T, N) opens and closes. With holes, bars are missing and the last two tickers are delisted; T0 is whole."""
    generator = np.random.default_rng(seed)
    close = 50 * np.exp(generator.normal(0, 0.03, (count, tickers)).cumsum(axis=0))
    open_ = close * np.exp(generator.normal(0, 0.01, (count, tickers)))
    missing = generator.random((count, tickers)) < holes
    if holes:
        missing[count // 2 :, -1] = missing[count // 3 :, -2] = True
    missing[0] = missing[:, 0] = False
    return np.where(missing, np.nan, open_), np.where(missing, np.nan, close)


def random_signal(seed: int, shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed + 1).normal(size=shape)


CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "hold": st.integers(1, 7),
        "top_k": st.integers(1, 4),
        "side": st.sampled_from(["long", "long-short"]),
        "turnover_limit": st.sampled_from([None, 0.1, 0.3]),
    }
)


def run(case: dict, open_: np.ndarray, close: np.ndarray, costs: Costs = DEAR, volume=None, signal=None):
    """Ledgers of a case, its signal random unless given."""
    options = {name: value for name, value in case.items() if name != "seed"}
    signal = random_signal(case["seed"], close.shape) if signal is None else signal
    return backtest(make_forecasts(signal), make_prices(open_, close, volume), 1, costs=costs, **options)


# --- against others ---


def scalar_loop(open_, close, signal, hold, top_k, side, turnover_limit, costs) -> list[float]:
    """Equity at each close, one ticker and one day at a time."""
    count, names = len(close), range(close.shape[1])
    decided = list(range(0, count - 1, hold))
    shares, cash, last = dict.fromkeys(names, 0.0), 1.0, dict.fromkeys(names, 0.0)
    equities = [1.0]
    for ticker in names:
        last[ticker] = close[0, ticker]
    for day in range(1, min(decided[-1] + hold, count - 1) + 1):
        if day - 1 in decided:
            has = {ticker: not math.isnan(close[day, ticker]) for ticker in names}
            price = {ticker: open_[day, ticker] if has[ticker] else last[ticker] for ticker in names}
            for ticker in names:
                if all(math.isnan(close[later, ticker]) for later in range(day, count)):
                    cash += shares[ticker] * price[ticker]
                    shares[ticker] = 0.0
            equity = cash + sum(shares[ticker] * price[ticker] for ticker in names)
            ranked = sorted(names, key=lambda ticker: signal[day - 1, ticker])
            weight = dict.fromkeys(names, 0.0)
            for ticker in ranked[-top_k:]:
                weight[ticker] += 1 / top_k / (2 if side == "long-short" else 1)
            for ticker in ranked[:top_k] if side == "long-short" else []:
                weight[ticker] -= 1 / top_k / 2
            stuck = sum(abs(shares[ticker] * price[ticker]) for ticker in names if not has[ticker])
            wanted = sum(abs(weight[ticker]) for ticker in names if has[ticker]) * equity
            smaller = 0.0 if wanted == 0 else min(1.0, max(equity - stuck, 0.0) / wanted)
            trade = {
                ticker: smaller * weight[ticker] * equity - shares[ticker] * price[ticker] if has[ticker] else 0.0
                for ticker in names
            }
            turnover = sum(abs(value) for value in trade.values()) / 2 / equity
            if turnover_limit is not None and turnover > turnover_limit:
                trade = {ticker: value * turnover_limit / turnover for ticker, value in trade.items()}
            for ticker in names:
                shares[ticker] += trade[ticker] / price[ticker]
                cash -= trade[ticker] + abs(trade[ticker]) * (costs.commission + costs.half_spread) / 10_000
        for ticker in names:
            last[ticker] = last[ticker] if math.isnan(close[day, ticker]) else close[day, ticker]
            if shares[ticker] < 0:
                cash -= -shares[ticker] * last[ticker] * costs.borrow / 10_000 / 252
        equities.append(cash + sum(shares[ticker] * last[ticker] for ticker in names))
    return equities


@FEW
@given(case=CASES, costs=st.builds(Costs, *[st.floats(0, 300)] * 3))
def test_equity_is_that_of_a_scalar_loop(case, costs):
    open_, close = random_market(case["seed"], holes=0.2)
    signal = random_signal(case["seed"], close.shape)
    ledger = run(case, open_, close, costs, signal=signal)["strategy"]
    options = {name: value for name, value in case.items() if name != "seed"}
    assert_allclose(ledger.daily["equity"], scalar_loop(open_, close, signal, costs=costs, **options), rtol=1e-10)


@pytest.mark.parametrize(
    ("side", "hold", "expected"),
    [
        ("long", 4, [0.934918709, 0.909347534, 0.912582229, 0.914469902]),
        ("long-short", 3, [1.007854309, 1.010493543, 0.877433184, 0.827593328]),
    ],
)
def test_equity_is_that_of_bt(side, hold, expected):
    """bt 1.4.1, with WeighTarget and Rebalance over two bars a day: one at the open to trade at, one at the close."""
    time, ticker = np.arange(30)[:, None], np.arange(6)[None]
    close = (
        50
        * (1 + ticker)
        * np.exp(0.05 * np.sin(0.7 * time + 1.3 * ticker) + 0.03 * np.sin(0.31 * time * (ticker + 1)))
    )
    open_ = close * np.exp(0.01 * np.cos(1.1 * time + 0.9 * ticker))
    signal = np.cos(0.9 * (time + 1) * (ticker + 1))
    forecasts = make_forecasts(signal)
    ledger = backtest(forecasts, make_prices(open_, close), 1, side=side, top_k=2, hold=hold, costs=FREE)["strategy"]
    assert_allclose(ledger.daily["equity"].to_numpy()[[5, 12, 20, -1]], expected, rtol=1e-8)


def test_benchmarks_have_closed_forms():
    """Equal weight, rebalanced daily, earns the average return from open to open; buy and hold that of the prices."""
    open_, close = random_market(3)
    signal = random_signal(3, close.shape)
    ledgers = backtest(make_forecasts(signal), make_prices(open_, close), 1, top_k=2, costs=FREE)
    by_open = (open_[2:] / open_[1:-1]).mean(axis=1).prod() * (close[-1] / open_[-1]).mean()
    assert ledgers["equal_weight"].daily["equity"].iloc[-1] == pytest.approx(by_open, rel=1e-12)
    ledgers = backtest(make_forecasts(signal), make_prices(open_, close), 1, top_k=2, costs=Costs(3, 4, 500))
    held = ledgers["buy_and_hold"].daily
    assert_allclose(held["equity"].iloc[1:], (close[1:] / open_[1]).mean(axis=1) - 7e-4, rtol=1e-12)
    assert held["turnover"].tolist() == [0, 0.5, *[0] * (len(held) - 2)]


def test_equal_weight_is_a_long_book_of_all_that_have_a_forecast():
    """At the same costs, but under no limit."""
    open_, close = random_market(8)
    early = np.arange(30)[:, None] < 15
    forecasts = make_forecasts(np.where(early == (np.arange(8) < 4), random_signal(8, close.shape), np.nan))
    options = {
        "prices": make_prices(open_, close),
        "horizon": 1,
        "side": "long",
        "top_k": 4,
        "costs": Costs(3, 4, 500),
    }
    ledgers = backtest(forecasts, **options)
    limited = backtest(forecasts, **options, turnover_limit=0.1)
    for name in ("daily", "orders"):
        expected = getattr(ledgers["strategy"], name)
        pd.testing.assert_frame_equal(getattr(ledgers["equal_weight"], name), expected)
        pd.testing.assert_frame_equal(getattr(limited["equal_weight"], name), expected)
    assert limited["strategy"].daily["turnover"].max() < ledgers["strategy"].daily["turnover"].max()


# --- what holds of any account ---


@FEW
@given(case=CASES, day=st.integers(1, 28))
def test_nothing_is_known_before_its_time(case, day):
    """Later prices and forecasts change no order and no equity up to a day."""
    open_, close = random_market(case["seed"], holes=0.1)
    signal = random_signal(case["seed"], close.shape)
    factors = np.exp(random_signal(case["seed"] + 9, close.shape) / 20)  # wilder ones ruin a short now and then
    later = np.arange(len(close))[:, None] > day
    changed_signal = np.where(np.arange(len(close))[:, None] >= day, -signal, signal)  # at `day` for the next open
    before = run(case, open_, close, signal=signal)
    after = run(
        case, np.where(later, open_ * factors, open_), np.where(later, close * factors, close), signal=changed_signal
    )
    for name, ledger in before.items():
        for table in (ledger.daily.reset_index(), ledger.orders):
            own = after[name].daily.reset_index() if "equity" in table else after[name].orders
            cut = [one[one["date"] <= days(30)[day]].reset_index(drop=True) for one in (table, own)]
            pd.testing.assert_frame_equal(*cut, check_exact=True)


@FEW
@given(case=CASES)
def test_equity_changes_by_gains_less_costs(case):
    """With the positions that the orders add up to."""
    open_, close = random_market(case["seed"], holes=0.2)
    marks = pd.DataFrame(close, days(30), [f"T{i}" for i in range(8)]).ffill()
    for ledger in run(case, open_, close).values():
        daily, orders = ledger.daily, ledger.orders[ledger.orders["outcome"] != "cancelled"]
        traded = orders.pivot_table(index="date", columns="ticker", values="shares", aggfunc="sum")
        traded = traded.reindex(index=marks.index, columns=marks.columns).fillna(0.0)
        overnight = (traded.cumsum().shift(1) * marks.diff()).sum(axis=1)
        paid = orders["shares"] * orders["price"] + orders["cost"]
        intraday = (traded * marks).sum(axis=1).sub(paid.groupby(orders["date"]).sum(), fill_value=0.0)
        gains = (overnight + intraday).loc[daily.index] - daily["borrow"]
        assert_allclose(daily["equity"].diff().iloc[1:], gains.iloc[1:], atol=1e-9)
        assert_allclose(daily["cost"].sum(), orders["cost"].sum(), atol=1e-12)
        short = (traded.cumsum().clip(upper=0) * marks).sum(axis=1).loc[daily.index]
        assert_allclose(daily["short"], short, atol=1e-9)
        assert_allclose(daily["borrow"], -short * 0.005 / 252, atol=1e-12)


@FEW
@given(case=CASES)
def test_orders_fill_at_the_open_of_a_bar_or_not_at_all(case):
    open_, close = random_market(case["seed"], holes=0.2)
    volume = np.where(np.random.default_rng(case["seed"]).random(close.shape) < 0.1, 0.0, 1.0)
    volume[0] = 1  # who never had any is not halted without
    opens = make_prices(open_, close, volume).set_index(["date", "ticker"])
    for ledger in run(case, open_, close, volume=volume).values():
        orders = ledger.orders.merge(opens[["open", "volume"]].reset_index(), "left", on=["date", "ticker"])
        halted = ~(orders["volume"] > 0)
        assert_allclose(
            orders.loc[orders["outcome"] == "filled", "open"], orders.loc[orders["outcome"] == "filled", "price"]
        )
        assert (orders.loc[halted, "outcome"] != "filled").all()
        assert (orders.loc[~halted, "outcome"] == "filled").all()
        assert not orders.duplicated(["date", "ticker", "outcome"]).any()


@FEW
@given(case=CASES)
def test_long_short_is_dollar_neutral_at_its_fills(case):
    open_, close = random_market(case["seed"])
    case = case | {"side": "long-short", "turnover_limit": None}
    orders = run(case, open_, close, FREE)["strategy"].orders
    traded = orders.pivot(index="date", columns="ticker", values="shares").fillna(0.0)
    opens = pd.DataFrame(open_, days(30), [f"T{i}" for i in range(8)])
    values = traded.cumsum() * opens.loc[traded.index, traded.columns]
    assert_allclose(values.sum(axis=1), 0, atol=1e-12)
    assert (values.abs().sum(axis=1) > 0.5).all()


@FEW
@given(case=CASES)
def test_a_halt_makes_no_debt(case):
    """The long book never owes more than what trading cost it, however many orders were cancelled."""
    open_, close = random_market(case["seed"], holes=0.4)
    daily = run(case | {"side": "long"}, open_, close)["strategy"].daily
    assert (daily["long"] <= daily["equity"] + daily["cost"].cumsum() + 1e-12).all()


@FEW
@given(case=CASES, limit=st.floats(0.02, 0.6))
def test_turnover_stays_within_its_limit(case, limit):
    """All trades of a rebalance shrink alike."""
    open_, close = random_market(case["seed"])
    limited, free = (run(case | {"turnover_limit": most}, open_, close)["strategy"] for most in (limit, None))
    assert (limited.daily["turnover"] <= limit * (1 + 1e-12)).all()
    first = [one.orders[one.orders["date"] == days(2)[1]]["shares"].to_numpy() for one in (limited, free)]
    assert_allclose(first[0] / first[1], min(1.0, limit / free.daily["turnover"].iloc[1]), rtol=1e-9)


@FEW
@given(case=CASES, name=st.sampled_from(["commission", "half_spread", "borrow"]), more=st.floats(1, 100))
def test_costs_only_cost(case, name, more):
    open_, close = random_market(case["seed"], holes=0.1)
    dear = replace(DEAR, **{name: getattr(DEAR, name) + more})
    cheaper, dearer = (run(case, open_, close, costs)["strategy"].daily["equity"] for costs in (DEAR, dear))
    assert (dearer <= cheaper + 1e-12).all()
    changes = name != "borrow" or case["side"] == "long-short"
    assert (dearer.iloc[-1] < cheaper.iloc[-1]) == changes


@FEW
@given(case=CASES, seed=st.integers(0, 99))
def test_the_order_of_rows_means_nothing(case, seed):
    open_, close = random_market(case["seed"], holes=0.1)
    signal = random_signal(case["seed"], close.shape).round(0)  # with ties
    prices, forecasts = make_prices(open_, close), make_forecasts(signal)
    options = {name: value for name, value in case.items() if name != "seed"}
    plain = backtest(forecasts, prices, 1, **options)["strategy"].daily
    mixed = backtest(
        forecasts.sample(frac=1, random_state=seed), prices.sample(frac=1, random_state=seed), 1, **options
    )
    pd.testing.assert_frame_equal(plain, mixed["strategy"].daily)


def test_a_signal_that_says_nothing_trades_nothing():
    open_, close = random_market(1)
    ledger = backtest(make_forecasts(np.zeros(close.shape)), make_prices(open_, close), 1, top_k=2)["strategy"]
    assert ledger.daily["equity"].eq(1).all()
    assert ledger.orders.empty


# --- what a signal earns ---


def test_tomorrow_earns_and_the_gap_before_the_fill_does_not():
    """The return from the next open on is worth all; what happens between close and next open is lost to the fill."""
    steps = np.random.default_rng(4).normal(0, 0.01, (2 * 250, 20)).cumsum(axis=0)
    open_, close = 50 * np.exp(steps[::2]), 50 * np.exp(steps[1::2])
    ahead, gap = np.log(open_[2:] / open_[1:-1]), np.log(open_[1:] / close[:-1])
    shuffled = np.random.default_rng(0).permuted(ahead, axis=1)
    prices, t, total = make_prices(open_, close), {}, {}
    for name, signal in (("ahead", ahead), ("gap", gap), ("shuffled", shuffled)):
        equity = backtest(make_forecasts(signal), prices, 1, top_k=4, costs=FREE)["strategy"].daily["equity"]
        returns, total[name] = equity.pct_change(), equity.iloc[-1]
        t[name] = returns.mean() / returns.std() * np.sqrt(len(returns))
    assert t["ahead"] > 20
    assert total["ahead"] > 20
    assert abs(t["gap"]) < 3
    assert abs(t["shuffled"]) < 3


def test_a_shuffled_signal_loses_what_trading_costs():
    open_, close = np.full((2, 60, 12), 50.0)
    daily = backtest(make_forecasts(random_signal(0, close.shape)), make_prices(open_, close), 1, top_k=3)[
        "strategy"
    ].daily
    assert daily["equity"].iloc[-1] == pytest.approx(1 - daily[["cost", "borrow"]].sum().sum(), abs=1e-12)
    rate = (2 * 6e-4 * daily["turnover"].iloc[1:] + 0.5 * 0.005 / 252).mean()
    assert daily["equity"].pct_change().mean() == pytest.approx(-rate, rel=1e-2)


# --- weights, days, ends ---


def test_equal_signals_share_the_places():
    signals = np.array([[1.0, 3.0, 3.0, 3.0, 0.0, np.nan], [2.0, 1.0, 5.0, 4.0, 3.0, 0.0]])
    long = target_weights(signals, 2, "long")
    assert_allclose(long, [[0, 1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 0.5, 0.5, 0, 0]])
    both = target_weights(signals, 2, "long-short")
    assert_allclose(both, [[-1 / 4, 1 / 6, 1 / 6, 1 / 6, -1 / 4, 0], [0, -1 / 4, 1 / 4, 1 / 4, 0, -1 / 4]])


def test_rebalances_are_as_far_apart_as_asked():
    open_, close = random_market(2)
    forecasts, prices = make_forecasts(random_signal(2, close.shape), horizon=4), make_prices(open_, close)
    cutoffs = days(30)[[0, 1, 3, 4, 9, 12, 13]]
    forecasts = forecasts[forecasts["cutoff"].isin(cutoffs)]
    for hold, filled, end in ((None, [1, 5, 10, 14], 17), (5, [1, 10], 14), (1, [1, 2, 4, 5, 10, 13, 14], 14)):
        ledger = backtest(forecasts, prices, 4, top_k=2, hold=hold)["strategy"]
        assert ledger.orders["date"].unique().tolist() == days(30)[filled].tolist()
        assert ledger.daily.index.tolist() == days(30)[: end + 1].tolist()
        assert ledger.daily["equity"].iloc[0] == 1


def test_a_delisted_position_is_paid_at_its_last_close():
    open_, close = np.full((2, 10, 3), 10.0)
    close[4, 2] = 4.0
    open_[5:, 2] = close[5:, 2] = np.nan
    signal = np.tile([0.0, 1.0, 2.0], (10, 1))
    signal[4:, 2] = -1.0
    options = {"side": "long", "top_k": 1, "hold": 2, "costs": FREE}
    ledger = backtest(make_forecasts(signal), make_prices(open_, close), 1, **options)["strategy"]
    gone = ledger.orders[ledger.orders["outcome"] == "delisted"]
    assert gone[["date", "ticker", "price"]].to_numpy().tolist() == [[days(10)[5], "T2", 4.0]]
    assert ledger.daily["equity"].tolist() == pytest.approx([1, 1, 1, 1, *[0.4] * 6])
    assert ledger.orders["ticker"].iloc[-1] == "T1"


def test_a_ticker_that_never_has_volume_is_not_halted():
    open_, close = random_market(5, tickers=4)
    volume = np.ones_like(close)
    volume[:, 1] = 0
    volume[1, 2] = 0
    orders = run({"seed": 5, "top_k": 2, "side": "long-short", "hold": 1}, open_, close, volume=volume)[
        "equal_weight"
    ].orders
    first = orders[orders["date"] == days(2)[1]].set_index("ticker")["outcome"]
    assert first.to_dict() == {"T0": "filled", "T1": "filled", "T2": "cancelled", "T3": "filled"}


def test_volume_to_come_halts_nothing():
    """An index that becomes tradable is no reason to have called it halted before; volume of the past is."""
    open_, close = random_market(5, tickers=3)
    case, volume = {"seed": 5, "top_k": 1, "side": "long", "hold": 1}, np.ones_like(close)
    volume[:, 1] = 0
    late = volume.copy()
    late[-1, 1] = 1
    one, other = (run(case, open_, close, volume=given)["strategy"].daily["equity"] for given in (volume, late))
    pd.testing.assert_series_equal(one.iloc[:-1], other.iloc[:-1])
    early = volume.copy()
    early[0, 1] = 1
    orders = run(case, open_, close, volume=early)["equal_weight"].orders
    assert (orders.loc[orders["ticker"] == "T1", "outcome"] == "cancelled").all()


# --- signals and mistakes ---


def test_signals_are_columns_or_the_mean_over_the_width():
    open_, close = random_market(6)
    prices, forecasts = make_prices(open_, close), make_forecasts(random_signal(6, close.shape))
    width = np.exp(random_signal(7, close.shape)).T.ravel()
    forecasts = forecasts.sort_values(["ticker", "cutoff"]).assign(p_up=lambda table: -table["mean"], ewma_mean=width)
    forecasts["q0.05"], forecasts["q0.95"] = forecasts["mean"] - width / 3, forecasts["mean"] + width * 2 / 3
    for signal, values in (("p_up", -forecasts["mean"]), ("ewma_mean", width), ("ratio", forecasts["mean"] / width)):
        named = backtest(forecasts, prices, 1, signal=signal, top_k=2)["strategy"].daily
        pd.testing.assert_frame_equal(
            named, backtest(forecasts.assign(mean=values), prices, 1, top_k=2)["strategy"].daily
        )


MISTAKES = {
    "side": ({"side": "short"}, "side must be one of long, long-short, got 'short'"),
    "top_k": ({"top_k": 0}, "top_k must be at least 1, got 0"),
    "hold": ({"hold": 0}, "hold must be at least 1, got 0"),
    "limit": ({"turnover_limit": 0.0}, "turnover_limit must be above 0, got 0.0"),
    "horizon": ({"horizon": 3}, "no horizon 3; it has 1"),
    "outcome": ({"signal": "y"}, "signal must be one of mean, p_up, ratio, .* got 'y'"),
    "column": ({"signal": "ewma_mean"}, "no column 'ewma_mean'"),
    "width": ({"signal": "ratio"}, "no column 'q0.05'"),
    "tickers": ({"top_k": 5}, "'long-short' needs 10 tickers, only 8 have a forecast at cutoff 2020-01-01"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(options, message):
    open_, close = random_market(0)
    forecasts = make_forecasts(random_signal(0, close.shape)).assign(y=0.0)
    with pytest.raises(ValueError, match=message):
        backtest(forecasts, make_prices(open_, close), **({"horizon": 1, "top_k": 2} | options))


def test_tables_that_do_not_fit_are_refused():
    open_, close = random_market(0)
    forecasts, prices = make_forecasts(random_signal(0, close.shape)), make_prices(open_, close)
    for table, bars, message in (
        (forecasts, prices[prices["ticker"] != "T3"], "no bar of T3 from 2020-01-01"),
        (forecasts, prices[prices["date"] != days(9)[8]], "no bar on the cutoff 2020-01-13"),
        (
            pd.concat([forecasts, forecasts.tail(1)], ignore_index=True),
            prices,
            "T7 is there twice at cutoff 2020-02-11",
        ),
        (
            forecasts.assign(mean=forecasts["mean"].where(forecasts.index != 8)),
            prices,
            "T0 has no finite mean at .*01-02",
        ),
        (forecasts[forecasts["cutoff"] == days(30)[-1]], prices, "prices end at the only cutoff, 2020-02-11"),
    ):
        with pytest.raises(ValueError, match=message):
            backtest(table, bars, 1, top_k=2)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_costs_are_basis_points(value):
    with pytest.raises(ValueError, match=f"borrow must be a number of basis points, zero or more, got {value}"):
        Costs(borrow=value)


def test_ruin_is_the_end():
    open_, close = np.full((2, 6, 2), 10.0)
    close[3, 0] = 50.0
    signal = np.tile([0.0, 1.0], (6, 1))
    with pytest.raises(ValueError, match="ruined on 2020-01-06: an equity of 1 became -1"):
        backtest(make_forecasts(signal), make_prices(open_, close), 1, top_k=1, costs=FREE)


# --- the command line ---


@pytest.fixture
def tables(tmp_path):
    """Files of prices and of forecasts at two horizons from bar 100 on."""
    prices = make_market(tickers=6, days=160)
    forecasts = prices.groupby("ticker").tail(60)[["ticker", "date"]].rename(columns={"date": "cutoff"})
    forecasts["mean"] = np.random.default_rng(1).normal(size=len(forecasts))
    forecasts = pd.concat([forecasts.assign(horizon=horizon) for horizon in (1, 5)])
    write_table(prices, tmp_path / "prices.parquet")
    write_table(forecasts, tmp_path / "forecasts.parquet")
    write_table(forecasts, tmp_path / "forecasts.csv")
    return tmp_path


def command_line(folder, *options: str, forecasts: str = "forecasts.parquet") -> list[str]:
    given = ["--forecasts", str(folder / forecasts), "--prices", str(folder / "prices.parquet"), "--horizon", "5"]
    return [*given, "--top-k", "2", "--output-dir", str(folder / "out"), *options]


def test_the_command_writes_all_it_names(tables, capsys):
    script.main(command_line(tables, "--trials", "7", "--borrow", "80"))
    shown, folder = capsys.readouterr().out, tables / "out"
    assert {path.name for path in folder.iterdir()} == {
        "backtest.json",
        "equity.parquet",
        "orders.parquet",
        "equity.png",
    }
    assert all(
        str(folder / name) in shown for name in ("backtest.json", "equity.parquet", "orders.parquet", "equity.png")
    )
    assert "survivorship" in shown
    assert "the best of 7 strategies without skill" in shown
    report = json.loads((folder / "backtest.json").read_text())
    daily = pd.read_parquet(folder / "equity.parquet")
    assert set(daily["portfolio"]) == {"strategy", "equal_weight", "buy_and_hold"} == set(report["figures"])
    for name, own in daily.groupby("portfolio"):
        assert report["figures"][name]["total_return"] == pytest.approx(own["equity"].iloc[-1] - 1)
    assert report["options"]["borrow"] == 80
    assert report["options"]["hold"] == 5
    assert (report["start"], report["end"]) == tuple(f"{day:%Y-%m-%d}" for day in daily["date"].iloc[[0, -1]])
    orders = pd.read_parquet(folder / "orders.parquet")
    assert report["orders"]["buy_and_hold"] == {"filled": 6, "cancelled": 0, "delisted": 0}
    assert report["orders"]["strategy"]["filled"] == (orders["portfolio"] == "strategy").sum() > 6
    assert report["figures"]["equal_weight"]["deflated_sharpe"] is None
    assert (folder / "equity.png").read_bytes().startswith(b"\x89PNG")


def test_a_csv_of_forecasts_and_some_of_the_tickers(tables):
    script.main(command_line(tables))
    expected = pd.read_parquet(tables / "out" / "equity.parquet")
    script.main(command_line(tables, forecasts="forecasts.csv"))
    pd.testing.assert_frame_equal(pd.read_parquet(tables / "out" / "equity.parquet"), expected)
    script.main(command_line(tables, "--tickers", "t0,t1,T2,T5"))
    assert set(pd.read_parquet(tables / "out" / "orders.parquet")["ticker"]) == {"T0", "T1", "T2", "T5"}


def test_the_command_counts_the_tickers_that_end(tables, capsys):
    prices = pd.read_parquet(tables / "prices.parquet")
    ends = prices["date"].unique()[-30]
    write_table(prices[(prices["ticker"] != "T3") | (prices["date"] <= ends)], tables / "prices.parquet")
    script.main(command_line(tables, "--hold", "10"))
    assert "Here 1 of 6 tickers end before the backtest does" in capsys.readouterr().out
    report = json.loads((tables / "out" / "backtest.json").read_text())
    assert report["options"]["hold"] == 10
    assert report["orders"]["equal_weight"]["delisted"] == 1
    orders = pd.read_parquet(tables / "out" / "orders.parquet")
    assert orders.loc[orders["portfolio"] == "equal_weight", "date"].nunique() == 6


COMMAND_MISTAKES = {
    "no file": (["--forecasts", "absent.parquet"], "absent.parquet"),
    "suffix": (["--forecasts", "table.json"], "table.json is neither a .parquet nor a .csv file"),
    "horizon": (["--horizon", "3"], "no horizon 3; it has 1, 5"),
    "top-k": (["--top-k", "4"], "needs 8 tickers, only 6 have a forecast"),
    "ticker": (["--tickers", "ABC"], "unknown ticker 'ABC'"),
    "side": (["--side", "up"], "got 'up'"),
    "costs": (["--commission", "-1"], "commission must be a number of basis points, zero or more, got -1.0"),
    "trials": (["--trials", "0"], "trials must be at least 1, got 0"),
    "signal": (["--signal", "ewma_p_up"], "no column 'ewma_p_up'"),
}


@pytest.mark.parametrize(("options", "message"), COMMAND_MISTAKES.values(), ids=COMMAND_MISTAKES)
def test_the_command_refuses_and_writes_nothing(tables, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        script.main(command_line(tables, *options))
    assert exit_.value.code == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("error: ")
    assert message in complaint
    assert not (tables / "out").exists()


def test_a_cutoff_that_is_no_date_is_named(tables, capsys):
    text = (tables / "forecasts.csv").read_text()
    (tables / "forecasts.csv").write_text(text.replace("2005-08-01", "soon", 1))
    assert "soon" in (tables / "forecasts.csv").read_text()
    with pytest.raises(SystemExit):
        script.main(command_line(tables, forecasts="forecasts.csv"))
    assert "cutoff 'soon' is not a date" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_dates_of_the_training_are_refused(tables, capsys, suffix):
    forecasts = pd.read_parquet(tables / "forecasts.parquet")
    last = forecasts["cutoff"].unique()[2]
    write_table(forecasts.assign(in_sample=forecasts["cutoff"] <= last), tables / f"marked{suffix}")
    write_table(forecasts.assign(in_sample=False), tables / f"unseen{suffix}")
    with pytest.raises(SystemExit):
        script.main(command_line(tables, forecasts=f"marked{suffix}"))
    assert f"the model was trained on {last:%Y-%m-%d}" in capsys.readouterr().err
    script.main(command_line(tables, forecasts=f"unseen{suffix}"))
