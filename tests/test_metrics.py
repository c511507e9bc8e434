"""Every metric against a scalar twin in plain Python and, where one exists, a foreign implementation."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import norm, spearmanr
from sklearn.metrics import mean_absolute_error, mean_pinball_loss, mean_squared_error, root_mean_squared_error

from spaceexploreai.evaluation import metrics
from spaceexploreai.evaluation.baselines import BASELINES, quantile_columns

LEVELS = np.arange(1, 20) / 20
RNG = np.random.default_rng(7)
Y = RNG.normal(scale=0.02, size=300)
Y[::50] = 0.0
MEAN = 0.2 * Y + RNG.normal(scale=0.01, size=300)
QUANTILES = MEAN[:, None] + 0.02 * norm.ppf(LEVELS)

returns = arrays(float, st.integers(1, 20), elements=st.floats(-0.5, 0.5, allow_subnormal=False))


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
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def value(scores: pd.DataFrame, horizon: int, metric: str, column: str = "model") -> float:
    return scores.set_index(["horizon", "metric"]).at[(horizon, metric), column]


def test_mse_rmse_mae():
    total_square = total_abs = 0.0
    for y, mean in zip(Y, MEAN, strict=True):
        total_square += (y - mean) ** 2
        total_abs += abs(y - mean)
    assert metrics.mse(Y, MEAN) == pytest.approx(total_square / len(Y)) == mean_squared_error(Y, MEAN)
    assert metrics.rmse(Y, MEAN) == pytest.approx(math.sqrt(total_square / len(Y)))
    assert metrics.rmse(Y, MEAN) == pytest.approx(root_mean_squared_error(Y, MEAN))
    assert metrics.mae(Y, MEAN) == pytest.approx(total_abs / len(Y)) == mean_absolute_error(Y, MEAN)


def test_direction_accuracy():
    hits = total = 0
    for y, mean in zip(Y, MEAN, strict=True):
        hits += y * mean > 0
        total += y != 0
    assert total < len(Y)
    assert metrics.direction_accuracy(Y, MEAN) == pytest.approx(hits / total)


def test_direction_accuracy_of_no_direction_is_undefined():
    assert math.isnan(metrics.direction_accuracy(Y, np.zeros_like(Y)))
    assert math.isnan(metrics.direction_accuracy(np.zeros(3), np.ones(3)))
    # A single zero among the means is a miss, not a way to drop the row.
    assert metrics.direction_accuracy(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == 0.5


def test_direction_base_rate():
    up = down = 0
    for y in Y:
        up += y > 0
        down += y < 0
    assert metrics.direction_base_rate(Y) == pytest.approx(max(up, down) / (up + down))
    assert metrics.direction_base_rate(np.array([-1.0, -2.0, 3.0, 0.0])) == pytest.approx(2 / 3)
    assert math.isnan(metrics.direction_base_rate(np.zeros(3)))


def test_pinball():
    total = 0.0
    for y, row in zip(Y, QUANTILES, strict=True):
        for level, quantile in zip(LEVELS, row, strict=True):
            total += level * (y - quantile) if y >= quantile else (1 - level) * (quantile - y)
    assert metrics.pinball(Y, QUANTILES, LEVELS) == pytest.approx(total / QUANTILES.size)
    by_level = [mean_pinball_loss(Y, q, alpha=a) for a, q in zip(LEVELS, QUANTILES.T, strict=True)]
    assert metrics.pinball(Y, QUANTILES, LEVELS) == pytest.approx(np.mean(by_level))


def test_crps_approaches_the_closed_form_of_the_gaussian():
    """Gneiting & Raftery, 2007, equation 21."""
    levels = (np.arange(2000) + 0.5) / 2000
    z = (Y - MEAN) / 0.02
    exact = 0.02 * np.mean(z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    quantiles = MEAN[:, None] + 0.02 * norm.ppf(levels)
    assert metrics.crps(Y, quantiles, levels) == pytest.approx(exact, rel=1e-3)


@given(y=returns, seed=st.integers(0, 1000))
def test_crps_of_a_point_mass_is_its_absolute_error(y, seed):
    point = np.random.default_rng(seed).normal(size=len(y))
    quantiles = np.repeat(point[:, None], len(LEVELS), axis=1)
    assert metrics.crps(y, quantiles, LEVELS) == pytest.approx(metrics.mae(y, point))


@given(y=returns)
def test_crps_is_zero_only_for_the_outcome_itself(y):
    quantiles = np.repeat(y[:, None], len(LEVELS), axis=1)
    assert metrics.crps(y, quantiles, LEVELS) == 0
    assert metrics.crps(y, quantiles + 0.01, LEVELS) > 0


def test_crps_skill():
    assert metrics.crps_skill(0.9, 1.0) == pytest.approx(0.1)
    assert metrics.crps_skill(1.5, 1.0) == pytest.approx(-0.5)
    assert math.isnan(metrics.crps_skill(0.0, 0.0))


def test_coverage():
    lower, upper = QUANTILES[:, 0].copy(), QUANTILES[:, -1]
    lower[3] = Y[3]  # the border counts as inside
    inside = 0
    for y, low, high in zip(Y, lower, upper, strict=True):
        inside += low <= y <= high
    assert 0 < inside < len(Y)
    assert metrics.coverage(Y, lower, upper) == inside / len(Y)


def test_coverage_of_the_true_quantiles_is_their_level():
    scale = np.random.default_rng(1).uniform(0.01, 0.05, size=20_000)
    y = np.random.default_rng(2).normal(scale=scale)
    # Four standard errors: sqrt(0.9 * 0.1 / 20000) = 0.0021.
    assert metrics.coverage(y, *(scale * norm.ppf([[0.05], [0.95]]))) == pytest.approx(0.9, abs=0.0085)


def test_rank_ic():
    table = make_table(cutoffs=8)
    table = table[(table["cutoff"] != table["cutoff"].max()) | (table["ticker"] < "T09")]  # one with 9 tickers only
    table["mean"] = table["mean"].round(2)  # ties
    rows = table[table["horizon"] == 1]
    correlations = []
    for _, cross_section in rows.groupby("cutoff"):
        if len(cross_section) >= 10:
            correlations.append(spearmanr(cross_section["mean"], cross_section["y"]).statistic)
    assert len(correlations) == 7
    result = metrics.rank_ic(rows["y"].to_numpy(), rows["mean"].to_numpy(), rows["cutoff"].to_numpy())
    assert result == pytest.approx(np.mean(correlations))


def test_rank_ic_is_undefined_without_a_ranking():
    y, cutoff = RNG.normal(size=20), np.repeat([1, 2], 10)
    assert math.isnan(metrics.rank_ic(y, np.full(20, 0.1), cutoff))
    assert math.isnan(metrics.rank_ic(y[:18], y[:18], np.repeat([1, 2], 9)))
    half = np.where(cutoff == 1, 0.3, y)  # the constant cross-section has no say
    assert metrics.rank_ic(y, half, cutoff) == pytest.approx(1.0)


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
    table = metrics.add_outcomes(forecasts, prices)
    expected = [outcome(prices, row) for row in forecasts.itertuples()]
    np.testing.assert_allclose(table["y"], expected, rtol=1e-12, atol=1e-15)
    assert list(table.columns) == [*forecasts.columns, "y"]
    assert table["y"].dtype == np.float64


def test_add_outcomes_knows_nothing_of_days_to_come():
    table = metrics.add_outcomes(make_forecasts(), make_prices())
    unknown = table["date"] > PRICE_DATES[-1]
    assert unknown.sum() == 2 * (1 + 3)
    np.testing.assert_array_equal(table["y"].isna(), unknown)


def test_add_outcomes_needs_both_closes():
    holed = make_prices()
    holed = holed[(holed["ticker"] == "AAA") | (holed["date"] != PRICE_DATES[5])]
    table = metrics.add_outcomes(make_forecasts(), holed)
    at_hole = (table["cutoff"] == PRICE_DATES[5]) | (table["date"] == PRICE_DATES[5])
    expected = (table["date"] > PRICE_DATES[-1]) | (at_hole & (table["ticker"] == "BBB"))
    np.testing.assert_array_equal(table["y"].isna(), expected)


def test_add_outcomes_of_an_unknown_ticker_are_unknown():
    table = metrics.add_outcomes(make_forecasts(["AAA", "ZZZ"]), make_prices())
    assert table[table["ticker"] == "ZZZ"]["y"].isna().all()
    assert table[(table["ticker"] == "AAA") & (table["date"] <= PRICE_DATES[-1])]["y"].notna().all()


def test_add_outcomes_keeps_rows_and_replaces_an_old_y():
    prices, forecasts = make_prices(), make_forecasts()
    table = metrics.add_outcomes(forecasts, prices)
    shuffled = forecasts.sample(frac=1, random_state=0)
    before = shuffled.copy(deep=True)
    again = metrics.add_outcomes(shuffled, prices.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(again, table.loc[shuffled.index], check_exact=True)
    pd.testing.assert_frame_equal(shuffled, before)
    pd.testing.assert_frame_equal(metrics.add_outcomes(table.assign(y=7.0), prices), table, check_exact=True)


@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_add_outcomes_matches_days_across_resolutions(unit):
    forecasts = make_forecasts()
    coarse = forecasts.assign(**{day: forecasts[day].astype(f"datetime64[{unit}]") for day in ("cutoff", "date")})
    prices = make_prices().astype({"date": "datetime64[ns]"})
    expected = metrics.add_outcomes(forecasts, prices)["y"]
    pd.testing.assert_series_equal(metrics.add_outcomes(coarse, prices)["y"], expected)
    assert expected.notna().any()


def test_score_composes_the_metrics():
    table = make_table()
    scores = metrics.score(table)
    assert list(scores.columns) == ["horizon", "metric", "model", *BASELINES]
    assert scores.groupby("horizon").size().to_dict() == {1: 11, 5: 11}
    rows = table[table["horizon"] == 5]
    y, mean = rows["y"].to_numpy(), rows["drift_mean"].to_numpy()
    quantiles = rows[quantile_columns(LEVELS, "drift_")].to_numpy()
    expected = {
        "n": 72,
        "mse": metrics.mse(y, mean),
        "rmse": metrics.rmse(y, mean),
        "mae": metrics.mae(y, mean),
        "direction_accuracy": metrics.direction_accuracy(y, mean),
        "direction_base_rate": metrics.direction_base_rate(y),
        "pinball": metrics.pinball(y, quantiles, LEVELS),
        "crps": metrics.crps(y, quantiles, LEVELS),
        "coverage_90": metrics.coverage(y, quantiles[:, 0], quantiles[:, -1]),
        "rank_ic": metrics.rank_ic(y, mean, rows["cutoff"].to_numpy()),
        "crps_skill": 1 - value(scores, 5, "crps", "drift") / value(scores, 5, "crps", "ewma"),
    }
    assert scores[scores["horizon"] == 5].set_index("metric")["drift"].to_dict() == pytest.approx(expected)


def test_score_leaves_undefined_what_zero_cannot_have():
    scores = metrics.score(make_table())
    assert math.isnan(value(scores, 1, "direction_accuracy", "zero"))
    assert math.isnan(value(scores, 1, "rank_ic", "zero"))
    assert value(scores, 1, "direction_base_rate", "zero") == value(scores, 1, "direction_base_rate")


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 10.0))
def test_score_of_a_copy_of_ewma_has_exactly_no_skill(seed, scale):
    table = make_table(cutoffs=2, seed=seed)
    table["y"] *= scale
    copies = {"mean": table["ewma_mean"], **{c: table[f"ewma_{c}"] for c in quantile_columns(LEVELS)}}
    scores = metrics.score(table.assign(**copies))
    skill = scores[scores["metric"] == "crps_skill"]
    assert (skill["model"] == 0).all()
    assert (skill["ewma"] == 0).all()
    assert (skill["drift"] != 0).all()
    pd.testing.assert_series_equal(scores["model"], scores["ewma"], check_names=False, check_exact=True)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_score_does_not_see_the_row_order(seed):
    table = make_table(cutoffs=3, seed=seed)
    shuffled = table.sample(frac=1, random_state=seed)
    pd.testing.assert_frame_equal(metrics.score(shuffled), metrics.score(table), rtol=1e-12)


def test_score_uses_known_outcomes_only():
    table = make_table()
    unknown = table["cutoff"] == table["cutoff"].max()
    with_unknown = table.assign(y=table["y"].mask(unknown))
    with_unknown.loc[unknown, "mean"] = np.nan  # not scored, so not refused
    pd.testing.assert_frame_equal(metrics.score(with_unknown), metrics.score(table[~unknown]))


def test_score_without_the_outer_levels_has_no_coverage():
    outer = [f"{prefix}q{level}" for prefix in ("", "zero_", "drift_", "ewma_") for level in (0.05, 0.95)]
    scores = metrics.score(make_table().drop(columns=outer))
    assert scores[scores["metric"] == "coverage_90"][["model", *BASELINES]].isna().all(axis=None)
    assert scores[scores["metric"] == "crps"]["model"].notna().all()


def test_score_without_outcomes_is_refused():
    table = make_table(cutoffs=1).assign(y=np.nan)
    with pytest.raises(ValueError, match="nothing to score: none of the 24 forecasts has a realised return y yet"):
        metrics.score(table)


def test_score_without_baselines_is_refused():
    with pytest.raises(ValueError, match="no column 'zero_mean'"):
        metrics.score(make_table().drop(columns="zero_mean"))


def test_score_refuses_a_forecast_that_is_not_finite():
    table = make_table()
    table.loc[7, "drift_q0.25"] = np.nan
    message = r"T00 has drift_q0\.25 = nan at cutoff 2024-01-04, horizon 5"
    with pytest.raises(ValueError, match=message):
        metrics.score(table)


def test_format_scores_is_an_aligned_markdown_table_with_units():
    scores = metrics.score(make_table())
    text = metrics.format_scores(scores)
    lines = text.splitlines()
    assert "1e-4" in lines[0]
    assert "Horizon 1 trading day (72 forecasts)" in lines
    assert "Horizon 5 trading days (72 forecasts)" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 2 * 12
    assert len({len(line) for line in tables[:12]}) == 1
    assert {line.count("|") for line in tables} == {6}
    cells = [cell.strip() for cell in tables[2].strip("|").split("|")]
    assert cells[0] == "MSE (1e-4)"
    assert float(cells[1]) == pytest.approx(value(scores, 1, "mse") * 1e4, abs=5e-4)
    accuracy = next(line for line in tables if "direction accuracy" in line)
    assert accuracy.split("|")[3].strip() == "\N{EN DASH}"
