"""Learned baselines: what they find in planted signals, what they never see, and the benchmark that scores them."""

import re
from types import SimpleNamespace

import lightgbm
import numpy as np
import pandas as pd
import pytest
from conftest import make_market, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, spearmanr
from sklearn.linear_model import Ridge

from spaceexploreai.benchmarks import learned_baselines as benchmark
from spaceexploreai.data.prices import write_table
from spaceexploreai.data.stocks import open_stocks
from spaceexploreai.evaluation import learned
from spaceexploreai.evaluation.baselines import add_baselines
from spaceexploreai.evaluation.inference import standard_error
from spaceexploreai.evaluation.learned import LEARNED, evenly_spaced, split_tail
from spaceexploreai.scripts import build_dataset
from spaceexploreai.train.arguments import parse_run
from spaceexploreai.train.sft import prepare, save_checkpoint

HORIZONS = [1, 4]
LEVELS = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
BOTH = pytest.mark.parametrize("name", list(LEARNED))


def make_steps(count=6000, num_features=4, slope=0.0, stretch=0.0, seed=0):
    """Steps of 20 tickers whose first feature moves the mean, and whose second the logarithm of the spread."""
    generator = np.random.default_rng(seed)
    days = np.datetime64("2010-01-04") + np.arange(count) % (count // 20)
    features = generator.normal(size=(count, num_features)).astype(np.float32)
    shocks = generator.normal(size=(count, len(HORIZONS)))
    targets = slope * features[:, :1] + np.exp(stretch * features[:, 1:2]) * shocks
    return days, features, targets.astype(np.float32)


def forecast(fitted, features, scale=1.0):
    """Forecasts in units of scale·sqrt(horizon)."""
    mean, quantiles = fitted.forecast(features, np.full(len(features), scale, dtype=np.float32), LEVELS)
    unit = np.sqrt(HORIZONS)
    return mean / unit, quantiles / unit[:, None]


# --- fits ---


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_ridge_is_its_closed_form(penalty, monkeypatch):
    """Hoerl & Kennard, 1970, with an intercept that is not penalised."""
    monkeypatch.setattr(learned, "PENALTIES", np.array([penalty]))
    days, features, targets = make_steps(slope=0.5)
    features[::7, 2] = np.nan
    fitted = LEARNED["ridge"](days, features, targets, HORIZONS)
    known = np.nan_to_num(features.astype(np.float64))
    x, y = known - known.mean(axis=0), targets - targets.mean(axis=0, dtype=np.float64)
    slopes = np.linalg.inv(x.T @ x + penalty * len(x) * np.eye(x.shape[1])) @ x.T @ y
    expected = targets.mean(axis=0) + x @ slopes
    mean, quantiles = forecast(fitted, features)
    np.testing.assert_allclose(mean, expected, atol=2e-5)
    shape = np.quantile(targets - expected, LEVELS, axis=0).T
    np.testing.assert_allclose(quantiles, expected[..., None] + shape, atol=1e-4)


@BOTH
def test_a_planted_slope_is_found_with_its_size(name):
    fitted = LEARNED[name](*make_steps(count=20_000, slope=1.0), HORIZONS)
    new = make_steps(count=5000, seed=1)[1]
    new = new[np.abs(new[:, 0]) < 1.5]  # trees flatten out where there were few rows
    mean, quantiles = forecast(fitted, new)
    for column in range(len(HORIZONS)):
        slope, intercept = np.polyfit(new[:, 0], mean[:, column], 1)
        assert slope == pytest.approx(1.0, abs=0.06)
        assert intercept == pytest.approx(0, abs=0.03)
        assert np.corrcoef(new[:, 0], mean[:, column])[0, 1] > 0.98
    median = norm.ppf(LEVELS) + mean[..., None]
    assert np.abs(quantiles - median).mean() < 0.05


def test_a_planted_volatility_is_found_with_its_size():
    fitted = LEARNED["lightgbm"](*make_steps(count=20_000, stretch=0.4), HORIZONS)
    _, new, outcomes = make_steps(count=20_000, stretch=0.4, seed=1)
    mean, quantiles = forecast(fitted, new)
    assert np.abs(mean).mean() < 0.05
    middle = np.abs(new[:, 1]) < 1.5
    width = np.log((quantiles[..., -1] - quantiles[..., 0]) / (2 * norm.ppf(0.95)))
    for column in range(len(HORIZONS)):
        slope, intercept = np.polyfit(new[middle, 1], width[middle, column], 1)
        assert slope == pytest.approx(0.4, abs=0.04)
        assert intercept == pytest.approx(0, abs=0.03)
    inside = (outcomes >= quantiles[..., 0]) & (outcomes <= quantiles[..., -1])
    for side in (new[:, 1] < -0.5, new[:, 1] > 0.5):
        assert inside[side].mean() == pytest.approx(0.9, abs=0.015)


def test_ridge_knows_no_spread():
    fitted = LEARNED["ridge"](*make_steps(stretch=0.4), HORIZONS)
    _, quantiles = forecast(fitted, make_steps(seed=1)[1])
    width = quantiles[..., -1] - quantiles[..., 0]
    np.testing.assert_allclose(width, np.broadcast_to(width[0], width.shape), rtol=1e-5)


@BOTH
def test_noise_teaches_nearly_nothing(name):
    """A constant is the best forecast there is; one spread of size 1 is what all rows have in common."""
    fitted = LEARNED[name](*make_steps(), HORIZONS)
    mean, quantiles = forecast(fitted, make_steps(seed=1)[1])
    assert np.abs(mean).mean() < 0.05
    assert np.abs(quantiles - norm.ppf(LEVELS)).mean() < 0.1


@BOTH
def test_quantiles_are_those_of_the_training_residuals(name):
    days, features, targets = make_steps(slope=0.5, stretch=0.3)
    _, quantiles = forecast(LEARNED[name](days, features, targets, HORIZONS), features)
    np.testing.assert_allclose((targets[..., None] <= quantiles).mean(axis=0), [LEVELS] * 2, atol=1e-3)


@BOTH
@pytest.mark.parametrize("horizons", [[3], [1, 2, 7]])
def test_shapes_and_undefined_features(name, horizons):
    days, features, _ = make_steps(count=2000)
    features[np.random.default_rng(0).random(features.shape) < 0.3] = np.nan
    targets = np.random.default_rng(1).normal(size=(2000, len(horizons)))
    fitted = LEARNED[name](days, features, targets, horizons)
    features[5] = np.nan
    for count in (1, 40):
        mean, quantiles = fitted.forecast(features[5 : 5 + count], np.full(count, 0.02, np.float32), LEVELS)
        assert (mean.shape, mean.dtype) == ((count, len(horizons)), np.float32)
        assert (quantiles.shape, quantiles.dtype) == ((count, len(horizons), len(LEVELS)), np.float32)
        assert np.isfinite(mean).all()
        assert (np.diff(quantiles, axis=-1) > 0).all()


def test_lightgbm_sees_that_a_feature_is_missing():
    days, features, targets = make_steps(count=10_000)
    missing = np.arange(len(features)) % 2 == 0
    features[missing, 3] = np.nan
    targets[missing] += 1.0
    mean, _ = forecast(LEARNED["lightgbm"](days, features, targets, HORIZONS), features)
    assert (mean[missing] - mean[~missing]).mean() == pytest.approx(1.0, abs=0.05)


@pytest.fixture(scope="module", params=list(LEARNED))
def fitted(request):
    return LEARNED[request.param](*make_steps(count=2000, slope=0.5), HORIZONS)


@settings(max_examples=10, deadline=None)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_forecasts_have_the_unit_of_the_scale(fitted, factor, seed):
    features = make_steps(count=40, seed=seed)[1]
    for one, other in zip(forecast(fitted, features), forecast(fitted, features, scale=factor), strict=True):
        np.testing.assert_allclose(other, factor * one, rtol=1e-5, atol=1e-6 * factor)


@BOTH
def test_a_fit_is_reproducible_whatever_the_threads(name, monkeypatch):
    monkeypatch.setattr(learned, "MAX_TREES", 20)  # where cores are busy, two threads are slow
    steps, new = make_steps(count=2000, slope=0.3, stretch=0.3), make_steps(count=200, seed=1)[1]
    threads = [{"num_threads": count} for count in (1, 1, 2)] if name == "lightgbm" else [{}, {}]
    first, *others = (forecast(LEARNED[name](*steps, HORIZONS, **one), new) for one in threads)
    for other in others:
        np.testing.assert_array_equal(other[0], first[0])
        np.testing.assert_array_equal(other[1], first[1])


# --- what is chosen on the tail ---


@settings(max_examples=25, deadline=None)
@given(dates=st.integers(150, 400), purge=st.integers(1, 20), seed=st.integers(0, 1000))
def test_no_label_of_what_is_fitted_touches_the_tail(dates, purge, seed):
    generator = np.random.default_rng(seed)
    index = np.concatenate([np.arange(dates), generator.integers(0, dates, size=20 * dates)])
    days = np.datetime64("2010-01-04") + 3 * generator.permutation(index)
    fit, tail = split_tail(days, purge)
    position = (days - days.min()).astype(int) // 3
    begins = position[tail].min()
    assert position[fit].max() + purge == begins - 1
    np.testing.assert_array_equal(tail, position >= begins)
    np.testing.assert_array_equal(fit, position < begins - purge)
    assert dates - begins == pytest.approx(0.15 * dates, abs=0.51)


@pytest.fixture
def seen(monkeypatch):
    """Rows that each fit got, and the first of them."""
    calls = []
    fit, train = Ridge.fit, lightgbm.train

    def spy_on_ridge(model, features, targets):
        calls.append((len(features), features[0]))
        return fit(model, features, targets)

    def spy_on_trees(options, dataset, rounds, valid_sets=(), **others):
        booster = train(options, dataset, rounds, valid_sets=valid_sets, **others)
        calls.append((dataset.num_data(), *(one.num_data() for one in valid_sets)))
        return booster

    monkeypatch.setattr(Ridge, "fit", spy_on_ridge)
    monkeypatch.setattr(lightgbm, "train", spy_on_trees)
    return calls


@BOTH
def test_choices_are_made_without_the_tail_and_the_purged_days(name, seen):
    """300 days of 20 rows: the tail has 45 of them, and the 4 days before it reach into it."""
    LEARNED[name](*make_steps(), HORIZONS)
    if name == "ridge":
        assert [rows for rows, _ in seen] == [251 * 20] * len(learned.PENALTIES) + [6000]
    else:
        assert seen == [(251 * 20, 45 * 20), (6000,)] * 4


def test_penalty_of_each_horizon_is_what_serves_the_tail():
    days, features, targets = make_steps(count=20_000, slope=1.0)
    late = days >= np.unique(days)[850]
    targets[late, 1] -= 2 * features[late, 0]  # there the second horizon turns round
    mean, _ = forecast(LEARNED["ridge"](days, features, targets, HORIZONS), features)
    assert np.polyfit(features[:, 0], mean[:, 0], 1)[0] == pytest.approx(1.0, abs=0.02)
    assert np.polyfit(features[:, 0], mean[:, 1], 1)[0] == pytest.approx(0.0, abs=0.001)


def test_trees_stop_where_the_tail_says_so(seen):
    days, features, targets = make_steps(count=20_000, slope=0.5)
    late = days >= np.unique(days)[850]
    targets[late] -= 2 * 0.5 * features[late, :1]
    mean, _ = forecast(LEARNED["lightgbm"](days, features, targets, HORIZONS), features)
    assert np.abs(mean).mean() < 0.1  # the slope would make 0.4


# --- rows ---


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 5000), limit=st.integers(1, 700))
def test_rows_are_evenly_spaced(count, limit):
    rows = evenly_spaced(count, limit)
    if count <= limit:
        assert rows.tolist() == list(range(count))
        return
    assert (np.diff(rows) > 0).all()
    assert 0.55 * limit - 5 <= len(rows) <= limit
    assert rows[0] >= 0
    assert rows[-1] < count
    assert np.diff([-1, *rows, count]).max() <= 2 * count / limit + 1


def test_no_weekday_is_left_out():
    """Every fifth row of one ticker would be the same weekday."""
    shares = np.bincount(evenly_spaced(50_000, 10_000) % 5) / 10_000
    np.testing.assert_allclose(shares, 0.2, atol=0.02)


@BOTH
def test_memory_is_bounded(name, seen, monkeypatch):
    monkeypatch.setattr(learned, "evenly_spaced", lambda count: evenly_spaced(count, 1000))
    fitted = LEARNED[name](*make_steps(), HORIZONS)
    assert max(call[0] for call in seen) == len(fitted.residuals) <= 1000


def test_the_limit_is_the_one_that_is_stated():
    assert len(evenly_spaced(10 * learned.MAX_ROWS)) == learned.MAX_ROWS == 500_000


@BOTH
def test_too_few_steps_are_refused(name):
    days, features, targets = make_steps(count=800)
    LEARNED[name](days, features, targets, [1, 3])  # 40 days of 20 steps, 6 of them in the tail
    with pytest.raises(ValueError, match=r"need 100 steps in the last 15% of the training dates .* got 60 and 280 of"):
        LEARNED[name](days[::2], features[::2], targets[::2], [1, 3])
    with pytest.raises(ValueError, match="got 120 and 0 of 40 dates"):
        LEARNED[name](days, features, targets, [1, 40])
    with pytest.raises(ValueError, match="got 0 and 0 of 0 dates"):
        LEARNED[name](days[:0], features[:0], targets[:0], [1, 3])


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_target_that_is_not_known_is_refused(name, value):
    days, features, targets = make_steps()
    targets[17, 1] = value
    with pytest.raises(ValueError, match=f"target {value} in row 17, column 1"):
        LEARNED[name](days, features, targets, HORIZONS)


# --- the benchmark ---


def days_of(crps, tickers):
    return pd.DataFrame({"crps": crps, "tickers": tickers})


def test_error_of_a_lead_is_that_of_resampled_days():
    generator = np.random.default_rng(0)
    tickers = generator.integers(5, 50, size=400)
    reference = generator.gamma(4, size=400)  # calm and wild days
    better, worse = (reference * (share + 0.05 * generator.normal(size=400)) for share in (0.6, 0.99))
    tables = [days_of(crps, tickers) for crps in (better, worse, reference)]
    value, error = benchmark.lead(*tables)

    def skill(sums):
        return (sums[1].sum() - sums[0].sum()) / sums[2].sum()

    sums = np.stack([better, worse, reference]) * tickers
    draws = [skill(sums[:, generator.integers(0, 400, size=400)]) for _ in range(2000)]
    assert value == pytest.approx(skill(sums))
    assert value == pytest.approx(0.39, abs=3 * error)
    assert error == pytest.approx(np.std(draws), rel=0.2)
    assert benchmark.lead(tables[2], tables[2], tables[2]) == (0, 0)


@pytest.fixture(scope="module")
def market():
    """Twelve tickers, one listed late, one halted for two days."""
    prices = make_market(tickers=12, days=400)
    days = prices["date"].unique()
    late = (prices["ticker"] == "T11") & (prices["date"] < days[330])
    halted = (prices["ticker"] == "T3") & prices["date"].isin(days[[150, 151, 345]])
    return prices[~late & ~halted].reset_index(drop=True)


def build(prices, folder):
    write_table(prices, folder / "market.parquet")
    target = folder / "dataset"
    options = ["--config", "sft", "--feature-groups", "price,volatility", "--stride", "16"]
    build_dataset.main(["--prices", str(folder / "market.parquet"), "--output-dir", str(target), *options])
    return str(target)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, market):
    return build(market, tmp_path_factory.mktemp("market"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset):
    """A checkpoint, and the metrics that its training saw."""
    folder = tmp_path_factory.mktemp("checkpoint")
    trainer, *_ = prepare(parse_run(tiny_run(folder, "--dataset", dataset, "--learning_rate", "0.01")))
    trainer.train()
    save_checkpoint(trainer, folder)
    return str(folder), trainer.evaluate()


def read_tables(text):
    """{horizon: table} of the printed Markdown."""
    tables = {}
    for block in text.split("\n\n"):
        if match := re.match(r"(\d+) days? ahead", block):
            continue_at = text.index(block)
            lines = [line.strip("| ").split(" | ") for line in text[continue_at:].split("\n\n")[1].splitlines()]
            tables[int(match[1])] = pd.DataFrame(lines[2:], columns=lines[0]).set_index("forecast")
    return tables


@pytest.fixture(scope="module")
def tables(dataset, trained):
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        benchmark.main(["--dataset", dataset, "--model", trained[0]])
    return read_tables("\n".join(printed))


def number(cell):
    return float(cell.split()[0])


def test_the_model_scores_as_in_its_training(tables, trained):
    """So the steps, the outcomes and the ewma baseline are the same."""
    for horizon, table in tables.items():
        model, metrics = table.loc["model"], trained[1]
        assert number(model["CRPS (1e-4)"]) == pytest.approx(1e4 * metrics[f"eval_crps_{horizon}d"], abs=0.006)
        skill = 100 * metrics[f"eval_crps_skill_{horizon}d"]
        assert number(model["skill over ewma (%)"]) == pytest.approx(skill, abs=0.006)
        assert number(model["rank IC (t)"]) == pytest.approx(metrics[f"eval_rank_ic_{horizon}d"], abs=6e-4)


def test_every_forecaster_is_on_the_table(tables):
    assert list(tables) == [1, 2, 5, 10]
    for table in tables.values():
        assert list(table.index) == ["zero", "ewma", "ridge", "lightgbm", "model"]
        assert table.loc["zero", "rank IC (t)"] == table.loc["ewma", "skill over ewma (%)"] == benchmark.DASH
        assert table.loc["model", "model's lead (points of skill)"] == benchmark.DASH
        leads = table["model's lead (points of skill)"].drop("model").map(number)
        skills = table["skill over ewma (%)"].replace(benchmark.DASH, "0").map(number)
        np.testing.assert_allclose(leads, skills["model"] - skills.drop("model"), atol=0.011)
        assert table["coverage of 90% (%)"].map(number).between(80, 99).all()


def test_zero_is_that_of_the_baselines(dataset, market):
    """But for the bars before a series begins, and they are few late in the history."""
    data = open_stocks(dataset)
    steps = benchmark.read_steps(data.validation.series, benchmark.scored_places(data.validation))
    _, quantiles = benchmark.naive_forecasts(steps, np.zeros((9, 4)), data.horizons, LEVELS)["zero"]()
    places = benchmark.scored_places(data.validation)
    tickers = np.array(data.validation.series.tickers)[places[:, 0]]
    origins = pd.DataFrame({"ticker": tickers, "cutoff": steps.days, "horizon": 5, "q0.95": 0.0})
    known = np.isfinite(steps.returns[:, 2]) & (tickers != "T11")
    expected = add_baselines(origins[known], market)["zero_q0.95"].to_numpy()
    np.testing.assert_allclose(quantiles[known, 2, -1], expected, rtol=0.05)
    assert np.abs(quantiles[known, 2, -1] / expected - 1).mean() < 0.02


def test_ewma_is_the_shape_of_all_training_targets():
    """A step of volatility 2 % expects at each horizon what the whole pool was, stretched."""
    pool = np.random.default_rng(0).gamma(2, size=(1001, 2))
    steps = benchmark.Steps(None, None, np.float32([0.02, 0.03]), None, None)
    mean, quantiles = benchmark.naive_forecasts(steps, pool, [1, 4], LEVELS)["ewma"]()
    assert mean[0, 1] == pytest.approx(0.02 * 2 * pool[:, 1].mean())
    assert mean[1, 0] == pytest.approx(0.03 * pool[:, 0].mean())
    assert quantiles[0, 1, 2] == pytest.approx(0.02 * 2 * np.median(pool[:, 1]))
    assert quantiles[1, 0, 0] == pytest.approx(0.03 * np.sort(pool[:, 0])[50])


def test_rank_ic_has_its_t():
    generator = np.random.default_rng(0)
    days = np.repeat(np.arange("2020-01-01", "2020-02-20", dtype="datetime64[D]"), 12).astype("datetime64[ns]")
    y = generator.normal(size=(len(days), 1))
    mean = 0.3 * y + generator.normal(size=y.shape)
    mixed = generator.permutation(len(days))
    steps = benchmark.Steps(days[mixed], None, None, None, y[mixed])
    forecasts = mean[mixed], np.stack([mean - 1, mean + 1], axis=-1)[mixed]
    table = benchmark.score_days(forecasts, steps, 0, np.array([0.05, 0.95]))
    each = [spearmanr(*pair.T).statistic for pair in np.split(np.hstack([y, mean]), 50)]
    np.testing.assert_allclose(table["rank_ic"], each)
    value, t = benchmark.rank_ic_with_t(table)
    assert value == pytest.approx(np.mean(each))
    assert t == pytest.approx(np.mean(each) / standard_error(np.array(each)))


def test_nothing_after_the_training_range_changes_a_fit(dataset, market, tmp_path):
    end = open_stocks(dataset).split.train.end
    torn = market.copy()
    later = torn["date"] > end
    noise = np.exp(np.random.default_rng(0).normal(size=later.sum()))
    columns = ["open", "high", "low", "close"]
    torn.loc[later, columns] = torn.loc[later, columns].mul(noise, axis=0)
    (original, places), (other, torn_places) = (training_steps(one) for one in (dataset, build(torn, tmp_path)))
    np.testing.assert_array_equal(places, torn_places)
    for one, two in zip(original, other, strict=True):
        np.testing.assert_array_equal(one, two)
    assert original.days.max() == market["date"].unique()[market["date"].unique() <= end][-11]  # 10 days ahead


def training_steps(folder):
    windows = open_stocks(folder).train
    places = benchmark.training_places(windows)
    return benchmark.read_steps(windows.series, places), places


def test_training_steps_are_those_of_the_marginal(dataset):
    data = open_stocks(dataset)
    steps, places = training_steps(dataset)
    targets = steps.returns / (steps.scale[:, None] * np.sqrt(data.horizons))
    np.testing.assert_allclose(targets, data.train.scaled_targets(data.horizons), rtol=1e-5)
    assert len(np.unique(places, axis=0)) == len(places)
    assert len(places) < sum(data.train.rows[:, 2] + 1 - data.train.rows[:, 1])  # windows overlap


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_is_scored_once_and_within_itself(dataset, split):
    data = open_stocks(dataset)
    windows = benchmark.open_split(dataset, split, data.train.series)
    places = benchmark.scored_places(windows)
    steps = benchmark.read_steps(windows.series, places)
    assert len(np.unique(places, axis=0)) == len(places)
    known = np.isfinite(steps.returns).any(axis=1)
    start, end = getattr(data.split, split)
    assert steps.days[known].min() == start
    assert steps.days[known].max() < end
    if split == "validation":
        np.testing.assert_array_equal(windows.rows, data.validation.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "train"], "error: argument --split: invalid choice: 'train'"),
        (["--dataset", "missing"], "error: missing is no dataset of scripts/build_dataset.py"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(options, message, dataset, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--dataset", dataset, *options])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizons": [1, 2]}, r"predicts log_return \[1, 2, 5, 10\] steps ahead, .* has log_return \[1, 2\] steps"),
        ({"target": "volatility"}, "has volatility"),
    ],
)
def test_a_model_of_something_else_is_refused(change, message, dataset, trained):
    data = open_stocks(dataset)._replace(**change)
    args = SimpleNamespace(model=trained[0], dataset=dataset, split="validation")
    with pytest.raises(ValueError, match=message):
        benchmark.open_model(args, data, data.split.validation.start)


def test_a_model_of_other_statistics_is_refused(dataset, trained):
    data = open_stocks(dataset)
    data.extractor.center = [*data.extractor.center[:-1], 7.0]
    args = SimpleNamespace(model=trained[0], dataset=dataset, split="validation")
    with pytest.raises(ValueError, match=f"^center of the checkpoint .* is not that of {dataset}$"):
        benchmark.open_model(args, data, data.split.validation.start)


def test_a_model_that_saw_the_split_is_refused(dataset, trained):
    data = open_stocks(dataset)
    args = SimpleNamespace(model=trained[0], dataset=dataset, split="validation")
    benchmark.open_model(args, data, data.split.train.end + pd.Timedelta(days=1))
    with pytest.raises(ValueError, match=f"was trained to {data.split.train.end.date()}, validation begins"):
        benchmark.open_model(args, data, data.split.train.end)
