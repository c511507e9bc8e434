"""Scores of a forecast table: composed of the metrics, right on planted signals and on none."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from spaceexploreai.evaluation import metrics, ranking
from spaceexploreai.evaluation.baselines import BASELINES, quantile_columns
from spaceexploreai.evaluation.inference import (
    critical_value,
    date_codes,
    diebold_mariano,
    direction_t,
    effective_count,
    mean_with_error,
    skill_with_error,
    standard_error,
    wilson_interval,
)
from spaceexploreai.evaluation.scores import add_outcomes, format_scores, score, score_by

LEVELS = np.arange(1, 20) / 20


def make_table(tickers: int = 12, cutoffs: int = 6, horizons=(1, 5), seed: int = 0) -> pd.DataFrame:
    index = pd.MultiIndex.from_product(
        [[f"T{i:02}" for i in range(tickers)], pd.bdate_range("2024-01-01", periods=cutoffs), horizons],
        names=["ticker", "cutoff", "horizon"],
    )
    table = index.to_frame(index=False)
    rng = np.random.default_rng(seed)
    columns = {"date": table["cutoff"] + pd.offsets.BDay(5), "y": rng.normal(scale=0.02, size=len(table))}
    for prefix in ("", *(f"{name}_" for name in BASELINES)):
        mean = np.zeros(len(table)) if prefix == "zero_" else rng.normal(scale=0.01, size=len(table))
        quantiles = mean[:, None] + rng.uniform(0.01, 0.03, size=(len(table), 1)) * norm.ppf(LEVELS)
        columns[f"{prefix}mean"] = mean
        columns.update(zip(quantile_columns(LEVELS, prefix), quantiles.T, strict=True))
        columns[f"{prefix}p_up"] = 0.5
    return pd.concat([table, pd.DataFrame(columns)], axis=1).assign(naive_error=0.015)


def value(scores: pd.DataFrame, horizon: int, metric: str, column: str = "model") -> float:
    return scores.set_index(["horizon", "metric"]).at[(horizon, metric), column]


PRICE_DATES = pd.bdate_range("2024-01-01", periods=12)


def make_prices(tickers=("AAA", "BBB")) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    frames = []
    for ticker in tickers:
        close = rng.uniform(10, 20, size=len(PRICE_DATES))
        bars = {"date": PRICE_DATES, "open": 15.0, "high": 21.0, "low": 9.0, "close": close, "volume": 1.0}
        frames.append(pd.DataFrame({"ticker": ticker, **bars}))
    return pd.concat(frames, ignore_index=True)


def make_forecasts(tickers=("AAA", "BBB"), horizons=(1, 3)) -> pd.DataFrame:
    """A forecast from every bar of `make_prices`, so that the newest have no outcome yet."""
    following = pd.bdate_range(PRICE_DATES[0], periods=len(PRICE_DATES) + max(horizons))
    rows = [
        {"ticker": ticker, "cutoff": following[i], "date": following[i + horizon], "horizon": horizon}
        for ticker in tickers
        for i in range(len(PRICE_DATES))
        for horizon in horizons
    ]
    return pd.DataFrame(rows)


def outcome(prices: pd.DataFrame, row) -> float:
    """The scalar twin of `add_outcomes`."""
    closes = {(bar.ticker, bar.date): bar.close for bar in prices.itertuples()}
    start, end = closes.get((row.ticker, row.cutoff)), closes.get((row.ticker, row.date))
    return math.nan if start is None or end is None else math.log(end / start)


def test_add_outcomes_is_the_log_return_from_close_to_close():
    prices, forecasts = make_prices(), make_forecasts()
    table = add_outcomes(forecasts, prices)
    expected = [outcome(prices, row) for row in forecasts.itertuples()]
    np.testing.assert_allclose(table["y"], expected, rtol=1e-12, atol=1e-15)
    assert list(table.columns) == [*forecasts.columns, "y"]
    assert table["y"].dtype == np.float64


def test_add_outcomes_knows_nothing_of_days_to_come():
    table = add_outcomes(make_forecasts(), make_prices())
    unknown = table["date"] > PRICE_DATES[-1]
    assert unknown.sum() == 2 * (1 + 3)
    np.testing.assert_array_equal(table["y"].isna(), unknown)


def test_add_outcomes_needs_both_closes():
    holed = make_prices()
    holed = holed[(holed["ticker"] == "AAA") | (holed["date"] != PRICE_DATES[5])]
    table = add_outcomes(make_forecasts(), holed)
    at_hole = (table["cutoff"] == PRICE_DATES[5]) | (table["date"] == PRICE_DATES[5])
    expected = (table["date"] > PRICE_DATES[-1]) | (at_hole & (table["ticker"] == "BBB"))
    np.testing.assert_array_equal(table["y"].isna(), expected)


def test_add_outcomes_of_an_unknown_ticker_are_unknown():
    table = add_outcomes(make_forecasts(["AAA", "ZZZ"]), make_prices())
    assert table[table["ticker"] == "ZZZ"]["y"].isna().all()
    assert table[(table["ticker"] == "AAA") & (table["date"] <= PRICE_DATES[-1])]["y"].notna().all()


def test_add_outcomes_keeps_rows_and_replaces_an_old_y():
    prices, forecasts = make_prices(), make_forecasts()
    table = add_outcomes(forecasts, prices)
    shuffled = forecasts.sample(frac=1, random_state=0)
    before = shuffled.copy(deep=True)
    again = add_outcomes(shuffled, prices.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(again, table.loc[shuffled.index], check_exact=True)
    pd.testing.assert_frame_equal(shuffled, before)
    pd.testing.assert_frame_equal(add_outcomes(table.assign(y=7.0), prices), table, check_exact=True)


@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_add_outcomes_matches_days_across_resolutions(unit):
    forecasts = make_forecasts()
    coarse = forecasts.assign(**{day: forecasts[day].astype(f"datetime64[{unit}]") for day in ("cutoff", "date")})
    prices = make_prices().astype({"date": "datetime64[ns]"})
    expected = add_outcomes(forecasts, prices)["y"]
    pd.testing.assert_series_equal(add_outcomes(coarse, prices)["y"], expected)
    assert expected.notna().any()


def test_score_composes_the_metrics():
    table = make_table(cutoffs=20)
    scores = score(table)
    assert list(scores.columns) == ["horizon", "metric", "model", *BASELINES]
    rows = table[table["horizon"] == 5]
    y, mean, cutoff = (rows[column].to_numpy() for column in ("y", "drift_mean", "cutoff"))
    quantiles = rows[quantile_columns(LEVELS, "drift_")].to_numpy()
    other = {name: rows[quantile_columns(LEVELS, name)].to_numpy() for name in ("ewma_", "")}
    dates, ranks = date_codes(cutoff), ranking.ic_by_date(y, mean, cutoff)
    losses = {name: 2 * metrics.pinball_of_rows(y, one, LEVELS) for name, one in other.items()}
    loss = 2 * metrics.pinball_of_rows(y, quantiles, LEVELS)
    spread, inside = ranking.decile_spread_by_date(y, mean, cutoff), (y >= quantiles[:, 0]) & (y <= quantiles[:, -1])
    hits, error = mean_with_error((np.sign(mean) == np.sign(y)).astype(float), dates, 5)
    count = effective_count(hits, error, 240)
    low, high = wilson_interval(hits, count, critical_value(20, 5))
    dm = diebold_mariano(losses[""], loss, dates, 5)
    squares = diebold_mariano((y - rows["mean"].to_numpy()) ** 2, (y - mean) ** 2, dates, 5)
    expected = {
        "n": 240,
        "dates": 20,
        "mse": metrics.mse(y, mean),
        "rmse": metrics.rmse(y, mean),
        "mae": metrics.mae(y, mean),
        "mase": metrics.mae(y, mean) / 0.015,
        "direction_accuracy": metrics.direction_accuracy(y, mean),
        "direction_base_rate": metrics.direction_base_rate(y),
        "direction_up_rate": np.mean(y > 0),
        "direction_n": count,
        "direction_low": low,
        "direction_high": high,
        "direction_accuracy_t": direction_t(y, mean, dates, 5),
        "pinball": metrics.pinball(y, quantiles, LEVELS),
        "crps": metrics.crps(y, quantiles, LEVELS),
        "wis": metrics.weighted_interval_score(y, quantiles, LEVELS),
        "coverage_50": metrics.coverage(y, quantiles[:, 4], quantiles[:, -5]),
        "coverage_80": metrics.coverage(y, quantiles[:, 1], quantiles[:, -2]),
        "coverage_90": metrics.coverage(y, quantiles[:, 0], quantiles[:, -1]),
        "coverage_90_se": mean_with_error(inside.astype(float), dates, 5)[1],
        "ic": ranking.ic_by_date(y, mean, cutoff, ranks=False).mean(),
        "ic_t": mean_t(ranking.ic_by_date(y, mean, cutoff, ranks=False)),
        "rank_ic": ranking.rank_ic(y, mean, cutoff),
        "rank_ic_t": mean_t(ranks),
        "rank_ic_dates": 20,
        "icir": ranks.mean() / ranks.std(),
        "decile_spread": spread.mean(),
        "decile_spread_t": mean_t(spread),
        "turnover": ranking.turnover(mean, cutoff, rows["ticker"].to_numpy()),
        "mse_skill": 1 - value(scores, 5, "mse", "drift") / value(scores, 5, "mse", "zero"),
        "mse_skill_se": skill_with_error((y - mean) ** 2, y**2, dates, 5)[1],
        "dm_mse_t": squares[0],
        "dm_mse_p": squares[1],
        "crps_skill": 1 - value(scores, 5, "crps", "drift") / value(scores, 5, "crps", "ewma"),
        "crps_skill_se": skill_with_error(loss, losses["ewma_"], dates, 5)[1],
        "dm_crps_t": dm[0],
        "dm_crps_p": dm[1],
    }
    assert scores[scores["horizon"] == 5].set_index("metric")["drift"].to_dict() == pytest.approx(expected)


def mean_t(values: pd.Series) -> float:
    return values.mean() / standard_error(values.to_numpy(), 5)


def test_fitted_baselines_are_scored_where_they_are():
    table = make_table()
    table = table.assign(**{f"garch{column[4:]}": table[column] for column in table if column.startswith("ewma_")})
    scores = score(table)
    assert list(scores.columns) == ["horizon", "metric", "model", *BASELINES, "garch"]
    pd.testing.assert_series_equal(scores["garch"], scores["ewma"], check_names=False)


# --- groups ---


def test_a_year_is_scored_by_itself():
    table = make_table(cutoffs=6)
    table["cutoff"] += pd.to_timedelta(np.where(table["cutoff"].dt.day > 4, 366, 0), unit="D")
    scores = score_by(table, "year")
    assert list(scores.columns) == ["year", "horizon", "metric", "model", *BASELINES]
    assert scores["year"].unique().tolist() == [2024, 2025]
    for year, own in scores.groupby("year"):
        expected = score(table[table["cutoff"].dt.year == year])
        pd.testing.assert_frame_equal(own.drop(columns="year").reset_index(drop=True), expected)


def test_a_ticker_is_scored_by_itself_and_has_no_ranking():
    scores = score_by(make_table(tickers=3), "ticker")
    assert scores["ticker"].unique().tolist() == ["T00", "T01", "T02"]
    one = scores[scores["ticker"] == "T01"].drop(columns="ticker").reset_index(drop=True)
    table = make_table(tickers=3)
    pd.testing.assert_frame_equal(one, score(table[table["ticker"] == "T01"]))
    assert one.loc[one["metric"] == "rank_ic", "model"].isna().all()
    assert one.loc[one["metric"] == "crps_skill_se", "model"].gt(0).all()


def test_regimes_are_thirds_of_the_dates_by_the_width_that_was_known():
    table = make_table(cutoffs=9)
    width = table["cutoff"].map(dict(zip(sorted(table["cutoff"].unique()), [5, 1, 9, 2, 8, 3, 7, 4, 6], strict=True)))
    for level in ("0.05", "0.95"):
        table[f"ewma_q{level}"] = width * (float(level) - 0.5)
    far = table["horizon"] == 5
    table.loc[far, ["ewma_q0.05", "ewma_q0.95"]] /= 100  # the shortest horizon decides for all
    scores = score_by(table, "regime")
    assert scores["regime"].unique().tolist() == ["calm", "normal", "wild"]
    for regime, least in (("calm", 1), ("normal", 4), ("wild", 7)):
        own = scores[scores["regime"] == regime].drop(columns="regime").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, score(table[(width >= least) & (width < least + 3)]))


def test_days_of_which_only_later_outcomes_are_known_are_in_a_regime():
    table = make_table(cutoffs=9)
    table.loc[(table["horizon"] == 1) & (table["cutoff"] == table["cutoff"].min()), "y"] = np.nan
    far = score_by(table, "regime").query("horizon == 5 and metric == 'n'")
    assert far["model"].sum() == score(table).query("horizon == 5 and metric == 'n'")["model"].item()


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match="by must be one of year, regime, ticker, fold, got 'month'"):
        score_by(make_table(), "month")


# --- what there is, and what there is not ---


def walk_table(seed: int, signal: float = 0.0, dates: int = 250, tickers: int = 20) -> pd.DataFrame:
    """Forecasts of five days of a market in which all tickers share half of the variance. The model's mean is a share
    of the return, or a guess; all widths are the true one, and all other means zero."""
    generator = np.random.default_rng(seed)
    market, own = generator.normal(size=(dates + 4, 1)), generator.normal(size=(dates + 4, tickers))
    returns = np.lib.stride_tricks.sliding_window_view(0.01 * (market + own), 5, axis=0).sum(axis=-1).ravel()
    scale, guess = 0.01 * np.sqrt(10), generator.normal(size=dates * tickers)
    index = pd.MultiIndex.from_product(
        [pd.bdate_range("2020-01-01", periods=dates), [f"T{i}" for i in range(tickers)]]
    )
    table = index.to_frame(index=False, name=["cutoff", "ticker"]).assign(horizon=5, naive_error=0.01)
    means = dict.fromkeys((f"{name}_" for name in BASELINES), np.zeros(dates * tickers))
    # A guess so small costs less than can be told.
    columns = {"y": returns + signal * scale * guess}
    for prefix, mean in (means | {"": (signal or 0.01) * scale * guess}).items():
        columns[f"{prefix}mean"] = mean
        quantiles = mean + scale * norm.ppf(LEVELS)[:, None]
        columns |= dict(zip(quantile_columns(LEVELS, prefix), quantiles, strict=True))
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


SKILLS = ("ic", "rank_ic", "decile_spread", "direction_accuracy")


def test_on_a_random_walk_every_skill_is_zero_within_its_interval():
    """Thirty markets: the share of intervals without a zero in them is 5 %, and none much above."""
    exceeded = []
    for seed in range(30):
        rows = score(walk_table(seed)).set_index("metric")["model"]
        skills = [rows[f"{name}_skill"] / rows[f"{name}_skill_se"] for name in ("mse", "crps")]
        exceeded.append(np.abs([*skills, *(rows[f"{name}_t"] for name in SKILLS)]) > critical_value(250, 5))
    assert (np.mean(exceeded, axis=0) < 0.21).all()  # four standard errors above 5 %
    assert np.mean(exceeded) < 0.12


def test_a_planted_signal_is_found_with_its_sign_and_size():
    """A mean that explains 0.2²/(1 + 0.2²) of the variance, whose correlation is its root."""
    scores = score(walk_table(0, signal=0.2)).set_index("metric")["model"]
    share = 0.2**2 / (1 + 0.2**2)
    assert scores["mse_skill"] == pytest.approx(share, abs=3 * scores["mse_skill_se"])
    assert scores["mse_skill"] > 2.5 * scores["mse_skill_se"]
    # Across tickers the market drops out: half of the variance.
    correlation = 0.2 / math.sqrt(0.5 + 0.2**2)
    assert scores["ic"] == pytest.approx(correlation, abs=0.04)
    assert scores["rank_ic"] == pytest.approx(6 / np.pi * np.arcsin(correlation / 2), abs=0.04)
    assert scores["direction_accuracy"] == pytest.approx(0.5 + np.arctan(0.2) / np.pi, abs=0.02)
    assert scores["direction_low"] < scores["direction_accuracy"] < scores["direction_high"]
    assert min(scores[f"{name}_t"] for name in SKILLS) > 4
    against = score(walk_table(0, signal=0.2).assign(mean=lambda table: -table["mean"]))
    against = against.set_index("metric")["model"]
    assert against["mse_skill"] < -2 * against["mse_skill_se"]
    assert against["rank_ic"] == -scores["rank_ic"]


def test_the_interval_of_a_direction_is_wider_than_that_of_its_rows():
    """Twenty tickers of a date share half of what they do, and five days overlap: 5000 rows are worth few."""
    guesses, up = (walk_table(1), walk_table(1).assign(mean=0.01))
    guesses, up = (score(table).set_index("metric")["model"] for table in (guesses, up))
    assert up["direction_n"] < 600
    assert up["direction_high"] - up["direction_low"] > 0.08
    assert guesses["direction_n"] > 2000  # right or wrong by themselves


def test_score_leaves_undefined_what_zero_cannot_have():
    scores = score(make_table())
    assert math.isnan(value(scores, 1, "direction_accuracy", "zero"))
    assert math.isnan(value(scores, 1, "rank_ic", "zero"))
    assert value(scores, 1, "direction_base_rate", "zero") == value(scores, 1, "direction_base_rate")


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 10.0))
def test_score_of_a_copy_of_ewma_has_exactly_no_skill(seed, scale):
    table = make_table(cutoffs=2, seed=seed)
    table["y"] *= scale
    copies = {"mean": table["ewma_mean"], **{c: table[f"ewma_{c}"] for c in quantile_columns(LEVELS)}}
    scores = score(table.assign(**copies))
    skill = scores[scores["metric"] == "crps_skill"]
    assert (skill["model"] == 0).all()
    assert (skill["ewma"] == 0).all()
    assert (skill["drift"] != 0).all()
    pd.testing.assert_series_equal(scores["model"], scores["ewma"], check_names=False, check_exact=True)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_score_does_not_see_the_row_order(seed):
    table = make_table(cutoffs=3, seed=seed)
    shuffled = table.sample(frac=1, random_state=seed)
    first, second = (score(one) for one in (shuffled, table))
    numbers = first.select_dtypes("number").columns
    for one in (first, second):
        one[numbers] = one[numbers].clip(-1e9, 1e9)  # a difference over a variance of nothing but rounding
    pd.testing.assert_frame_equal(first, second, rtol=1e-12)


def test_score_uses_known_outcomes_only():
    table = make_table()
    unknown = table["cutoff"] == table["cutoff"].max()
    with_unknown = table.assign(y=table["y"].mask(unknown))
    with_unknown.loc[unknown, "mean"] = np.nan  # not scored, so not refused
    pd.testing.assert_frame_equal(score(with_unknown), score(table[~unknown]))


def test_score_without_the_outer_levels_has_no_coverage():
    prefixes = ["", *(f"{name}_" for name in BASELINES)]
    outer = [f"{prefix}q{level}" for prefix in prefixes for level in (0.05, 0.95)]
    scores = score(make_table().drop(columns=outer))
    assert scores[scores["metric"] == "coverage_90"][["model", *BASELINES]].isna().all(axis=None)
    assert scores[scores["metric"] == "crps"]["model"].notna().all()


def test_score_without_outcomes_is_refused():
    table = make_table(cutoffs=1).assign(y=np.nan)
    with pytest.raises(ValueError, match="nothing to score: none of the 24 forecasts has a realised return y yet"):
        score(table)


def test_score_without_baselines_is_refused():
    with pytest.raises(ValueError, match="no column 'zero_mean'"):
        score(make_table().drop(columns="zero_mean"))


def test_score_refuses_a_forecast_that_is_not_finite():
    table = make_table()
    table.loc[7, "drift_q0.25"] = np.nan
    message = r"T00 has drift_q0\.25 = nan at cutoff 2024-01-04, horizon 5"
    with pytest.raises(ValueError, match=message):
        score(table)


def test_format_scores_is_an_aligned_markdown_table_with_units():
    scores = score(make_table())
    text = format_scores(scores)
    lines = text.splitlines()
    assert "1e-4" in lines[0]
    assert "Horizon 1 trading day (72 forecasts from 6 dates)" in lines
    assert "Horizon 5 trading days (72 forecasts from 6 dates)" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in tables[: len(tables) // 2]}) == 1
    assert {line.count("|") for line in tables} == {7}
    cells = [cell.strip() for cell in tables[2].strip("|").split("|")]
    assert cells[0] == "MSE (1e-4)"
    assert float(cells[1]) == pytest.approx(value(scores, 1, "mse") * 1e4, abs=5e-4)
    accuracy = next(line for line in tables if "direction accuracy" in line)
    assert accuracy.split("|")[3].strip() == "\N{EN DASH}"
    skill = next(line for line in tables if "CRPS skill" in line).split("|")[2].strip()
    error = 100 * value(scores, 1, "crps_skill_se")
    assert skill == f"{100 * value(scores, 1, 'crps_skill'):+.2f} ± {error:.2f}"
    ic = next(line for line in tables if line.startswith("| rank IC")).split("|")[2].strip()
    assert ic == f"{value(scores, 1, 'rank_ic'):+.3f} ({value(scores, 1, 'rank_ic_t'):+.1f})"
