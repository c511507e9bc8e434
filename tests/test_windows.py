"""Windows: chronological splits that no label crosses, labels, lazy index pairs."""

import textwrap
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spaceexploreai.data import windows
from spaceexploreai.data.windows import (
    IGNORE_INDEX,
    DateRange,
    Split,
    WindowDataset,
    chronological_split,
    forecast_windows,
    make_labels,
    supervised_windows,
)
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries, SpaceExploreFeatureExtractor

DAYS = pd.bdate_range("2020-01-01", periods=160)
EVER = DateRange(DAYS[0], DAYS[-1])


def make_series(ticker: str, days: list[int], seed: int = 0, masked: float = 0.0) -> EncodedSeries:
    """A ticker of the given days of the calendar, of which it does not trade on a share of `masked`."""
    rng = np.random.default_rng([seed, *ticker.encode()])
    steps = len(days)
    series = EncodedSeries(
        ticker,
        DAYS[list(days)].to_numpy("datetime64[ns]"),
        100 * np.exp(np.cumsum(rng.normal(0, 0.02, steps))),
        rng.normal(size=(steps, 3)).astype(np.float32),
        rng.uniform(0.005, 0.05, steps).astype(np.float32),
    )
    halted = rng.random(steps) < masked
    halted[[0, -1]] = False  # between bars alone
    series.close[halted] = series.values[halted] = np.nan
    return series


@st.composite
def gappy_days(draw) -> list[int]:
    """Days of one ticker: listed late, delisted early, and a part of the days in between missing."""
    first = draw(st.integers(0, 120))
    last = draw(st.integers(first + 1, 160))
    keep = draw(st.sampled_from([1.0, 0.9, 0.5]))
    drawn = np.random.default_rng(draw(st.integers(0, 1000))).random(last - first) < keep
    return [day for day, kept in zip(range(first, last), drawn, strict=True) if kept]


@st.composite
def markets(draw) -> list[EncodedSeries]:
    """Some tickers of their own days, one of them of all days."""
    days = draw(st.lists(gappy_days().filter(len), max_size=3))
    masked = draw(st.sampled_from([0.0, 0.05, 0.5]))
    return [
        make_series(f"T{i}", list(each), masked=masked if i else 0.0) for i, each in enumerate([range(160), *days])
    ]


HORIZONS = st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True).map(sorted)
FRACTIONS = st.sampled_from([0.1, 0.15, 0.25])


def all_dates(series: list[EncodedSeries]) -> pd.Series:
    return pd.Series(np.concatenate([one.dates for one in series]))


def supervised_steps(dataset: WindowDataset) -> list[tuple[int, int, np.ndarray]]:
    """Every (series, step, labels) that the windows supervise, window by window, as the loss sees them."""
    found = []
    for (which, end), example in zip(dataset.ends, dataset, strict=True):
        first = end + 1 - len(example["labels"])
        for row in np.flatnonzero((example["labels"] != IGNORE_INDEX).any(axis=1)):
            found.append((int(which), int(first + row), example["labels"][row]))
    return found


# --- the split ---


@settings(deadline=None, max_examples=25)
@given(markets(), HORIZONS, FRACTIONS, FRACTIONS, st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_no_label_crosses_into_another_range(series, horizons, validation, test, context, stride, score_once):
    stride = min(stride, context)
    split = chronological_split(all_dates(series), horizons[-1], validation, test)
    for within in split:
        dataset = supervised_windows(series, horizons, within, context, stride, score_once)
        for which, step, labels in supervised_steps(dataset):
            for horizon in np.array(horizons)[labels != IGNORE_INDEX]:
                origin, target = series[which].dates[[step, step + horizon]]
                assert within.start <= origin < target <= within.end


@settings(deadline=None, max_examples=25)
@given(markets(), st.integers(1, 12), FRACTIONS, FRACTIONS)
def test_ranges_cover_the_calendar_of_all_tickers_together(series, horizon, validation, test):
    dates = all_dates(series)
    split = chronological_split(dates.sample(frac=1, random_state=0), horizon, validation, test)
    calendar = sorted(set(dates))
    bounds = [(calendar.index(within.start), calendar.index(within.end)) for within in split]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == len(calendar) - 1
    assert [after[0] - before[1] for before, after in pairwise(bounds)] == [1, 1]
    lengths = [last - first + 1 for first, last in bounds]
    assert lengths[1:] == [round(len(calendar) * validation), round(len(calendar) * test)]


def test_default_fractions():
    split = chronological_split(pd.Series(DAYS), 5)
    assert split == Split(
        DateRange(DAYS[0], DAYS[127]), DateRange(DAYS[128], DAYS[143]), DateRange(DAYS[144], DAYS[159])
    )


def test_one_calendar_for_all_tickers():
    """A ticker listed late has no range of its own: its days fall where those of the others do."""
    series = [make_series("OLD", range(160)), make_series("NEW", range(130, 160))]
    split = chronological_split(all_dates(series), 2)
    assert split.train.end == DAYS[127]
    labels = make_labels(series[1], [1, 2], split.train)
    assert (labels == IGNORE_INDEX).all()
    assert (make_labels(series[1], [1, 2], split.validation) != IGNORE_INDEX).any()


@pytest.mark.parametrize(
    ("days", "horizon", "fractions", "message"),
    [
        (
            160,
            16,
            (0.1, 0.2),
            "the validation range has 16 of 160 trading days; a horizon of 16 days needs more than 16",
        ),
        (160, 16, (0.2, 0.1), "the test range has 16 of 160 trading days; a horizon of 16 "),
        (160, 10, (0.5, 0.45), "the train range has 8 of 160 trading days; a horizon of 10 "),
        (160, 10, (0.9, 0.9), "the train range has 0 of 160 trading days; a horizon of 10 "),
        (160, 1, (0.0, 0.1), "the validation range has 0 of 160 trading days; a horizon of 1 "),
        (160, 1, (0.1, 0.0), "the test range has 0 of 160 trading days; a horizon of 1 "),
        (5, 1, (0.1, 0.1), "range has 0 of 5 trading days; a horizon of 1 "),
    ],
)
def test_fractions_that_leave_too_little_are_refused(days, horizon, fractions, message):
    with pytest.raises(ValueError, match=message) as error:
        chronological_split(pd.Series(DAYS[:days]), horizon, *fractions)
    assert "\n" not in str(error.value)
    assert chronological_split(pd.Series(DAYS), 15, 0.1, 0.1)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 120))
def test_training_may_start_later_and_nothing_else_moves(start):
    """On the day after a bar, be it without one, or from the next bar on."""
    whole = chronological_split(pd.Series(DAYS), 5, train_start="2000-01-01")
    assert whole == chronological_split(pd.Series(DAYS), 5)
    split = chronological_split(pd.Series(DAYS), 5, train_start=f"{DAYS[start - 1] + pd.Timedelta(days=1):%Y-%m-%d}")
    assert split.train == (DAYS[start], whole.train.end)
    assert split[1:] == whole[1:]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (DAYS[126], "the train range has 2 of 160"),
        ("2100-01-01", "the train range has 0 of 160"),
        ("later", "'later' is no"),
    ],
)
def test_a_start_that_leaves_too_little_is_refused(start, message):
    with pytest.raises(ValueError, match=message):
        chronological_split(pd.Series(DAYS), 2, train_start=start)


# --- labels ---


@settings(deadline=None, max_examples=25)
@given(gappy_days().filter(len), st.sampled_from([0.0, 0.3]), HORIZONS, st.integers(0, 159), st.integers(0, 159))
def test_labels_equal_a_plain_loop(days, masked, horizons, one_day, other_day):
    series = make_series("AAA", days, masked=masked)
    within = DateRange(*sorted([DAYS[one_day], DAYS[other_day]]))
    labels = make_labels(series, horizons, within)
    assert labels.dtype == np.float32
    assert labels.shape == (len(days), len(horizons))
    for step in range(len(days)):
        last = step + horizons[-1]
        known = last < len(days) and within.start <= series.dates[step] and series.dates[last] <= within.end
        returns = [np.log(series.close[step + h] / series.close[step]) if known else np.nan for h in horizons]
        expected = [IGNORE_INDEX if np.isnan(value) else value for value in returns]
        np.testing.assert_allclose(labels[step], expected, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=50)
@given(gappy_days().filter(len), st.sampled_from([0.0, 0.3]), HORIZONS)
def test_volatility_equals_a_plain_loop(days, masked, horizons):
    series = make_series("AAA", days, masked=masked)
    labels = make_labels(series, horizons, EVER, "volatility")
    for step in range(len(days)):
        for horizon, label in zip(horizons, labels[step], strict=True):
            path = np.log(series.close[step : step + horizon + 1])
            known = step + horizons[-1] < len(days) and not np.isnan(path).any()
            expected = (
                sum((path[day + 1] - path[day]) ** 2 for day in range(horizon)) ** 0.5 if known else IGNORE_INDEX
            )
            assert label == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_the_target_in_the_documentation_can_be_registered(monkeypatch):
    """The example of the docstring, as it stands there."""
    monkeypatch.setattr(windows, "TARGETS", dict(windows.TARGETS))
    example = textwrap.dedent(windows.target.__doc__.split("square root of the horizon.")[1].split("Raises:")[0])
    exec(example, {"target": windows.target, "sliding_window_view": np.lib.stride_tricks.sliding_window_view})
    series = make_series("AAA", range(30))
    labels = make_labels(series, [3], EVER, "drawdown")
    closes = np.log(series.close)
    assert labels[5, 0] == pytest.approx(closes[5:9].min() - closes[5], rel=1e-5)
    with pytest.raises(ValueError, match="target 'drawdown' is registered already"):
        exec(example, {"target": windows.target, "sliding_window_view": np.lib.stride_tricks.sliding_window_view})


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target must be one of log_return, volatility, got 'sharpe'"):
        supervised_windows([make_series("AAA", range(30))], [1], EVER, 10, 5, target="sharpe")


def test_labels_of_a_small_history():
    series = make_series("AAA", range(5))._replace(close=np.exp([0.0, 0.1, 0.3, 0.6, 1.0]))
    expected = [[0.1, 0.3], [0.2, 0.5], [0.3, 0.7], [-100, -100], [-100, -100]]
    np.testing.assert_allclose(make_labels(series, [1, 2], EVER), expected, rtol=1e-6)
    expected[0] = expected[2] = [-100, -100]
    np.testing.assert_allclose(make_labels(series, [1, 2], DateRange(DAYS[1], DAYS[3])), expected, rtol=1e-6)
    assert (make_labels(series, [1, 5], EVER) == IGNORE_INDEX).all()


# --- nothing of later ranges enters training ---


def make_prices(*tickers: str) -> pd.DataFrame:
    tables = []
    for seed, ticker in enumerate(tickers):
        rng = np.random.default_rng(seed)
        close = 50 * np.exp(np.cumsum(rng.normal(0, 0.02, len(DAYS))))
        bars = pd.DataFrame({"ticker": ticker, "date": DAYS, "open": close, "high": close * 1.01, "low": close * 0.98})
        tables.append(bars.assign(close=close, volume=rng.integers(1, 10**6, len(DAYS)).astype(float)))
    return pd.concat(tables, ignore_index=True)


def training_examples(prices: pd.DataFrame, horizons: list[int]) -> list[dict[str, np.ndarray]]:
    split = chronological_split(prices["date"], horizons[-1], 0.2, 0.2)
    extractor = SpaceExploreFeatureExtractor(["gap", "rsi_14", "relative_volume_5"])
    features = extractor.compute_features(prices)
    extractor.fit(features[features["date"] <= split.train.end])
    return list(supervised_windows(extractor.encode(prices, features), horizons, split.train, 30, 7))


PRICES = make_prices("AAA", "BBB")
EXAMPLES = training_examples(PRICES, [1, 3])
TRAIN_DAYS = 96


@settings(deadline=None, max_examples=8)
@given(st.integers(TRAIN_DAYS, 159), st.sampled_from(["AAA", "BBB", None]), st.floats(0.01, 100))
def test_prices_after_the_train_range_leave_training_alone(day, ticker, factor):
    changed = PRICES.copy()
    rows = (changed["date"] >= DAYS[day]) & (changed["ticker"] == ticker if ticker else True)
    changed.loc[rows, ["open", "high", "low", "close"]] *= factor
    for example, same in zip(EXAMPLES, training_examples(changed, [1, 3]), strict=True):
        for name in ("past_values", "scale", "labels"):
            np.testing.assert_array_equal(example[name], same[name], err_msg=name)


def test_prices_at_the_end_of_the_train_range_reach_training():
    changed = PRICES.copy()
    changed.loc[changed["date"] == DAYS[TRAIN_DAYS - 1], ["open", "high", "low", "close"]] *= 2
    examples = training_examples(changed, [1, 3])
    assert any((one["labels"] != other["labels"]).any() for one, other in zip(EXAMPLES, examples, strict=True))


# --- windows ---


@settings(deadline=None, max_examples=25)
@given(markets(), st.integers(1, 40), st.integers(1, 50), st.booleans())
def test_windows_are_views_within_the_histories(series, context, stride, score_once):
    dataset = supervised_windows(series, [1, 2], EVER, context, min(stride, context), score_once)
    assert len(dataset) == len(dataset.ends)
    for index, (which, end) in enumerate(dataset.ends):
        assert 0 <= which < len(series)
        assert 0 <= end < len(series[which].dates)
        example = dataset[index]
        steps = slice(max(end + 1 - context, 0), end + 1)
        for name, array in [("past_values", series[which].values), ("scale", series[which].scale)]:
            assert np.shares_memory(example[name], array)
            np.testing.assert_array_equal(example[name], array[steps])
        assert len(example["labels"]) == len(example["past_values"]) == min(context, end + 1)


@settings(deadline=None, max_examples=25)
@given(markets(), HORIZONS, st.integers(1, 40), st.integers(1, 40), st.integers(0, 50), st.integers(100, 159))
def test_every_label_is_supervised_and_validation_scores_it_once(series, horizons, context, stride, first, last):
    within = DateRange(DAYS[first], DAYS[last])
    labels = {
        (which, step): row
        for which, one in enumerate(series)
        for step, row in enumerate(make_labels(one, horizons, within))
        if (row != IGNORE_INDEX).any()
    }
    stride = min(stride, context)
    for score_once in (False, True):
        found = supervised_steps(supervised_windows(series, horizons, within, context, stride, score_once))
        assert {(which, step) for which, step, _ in found} == set(labels)
        assert not score_once or len(found) == len(labels)
        for which, step, row in found:
            np.testing.assert_array_equal(row, labels[which, step])


@pytest.mark.parametrize("score_once", [False, True])
def test_stride_that_would_leave_labels_out_is_refused(score_once):
    with pytest.raises(ValueError, match=r"stride.* 31 .*30"):
        supervised_windows([make_series("AAA", range(100))], [1], EVER, 30, 31, score_once)


def test_scoring_once_leaves_the_labels_alone():
    dataset = supervised_windows([make_series("AAA", range(100))], [1], EVER, 30, 10, score_once=True)
    before = dataset.labels[0].copy()
    masked = [(example["labels"] == IGNORE_INDEX).sum() for example in dataset]
    assert masked[-1] == 20
    np.testing.assert_array_equal(dataset.labels[0], before)


def test_windows_without_scoring_once_share_the_labels():
    dataset = supervised_windows([make_series("AAA", range(100))], [1], EVER, 30, 10)
    assert all(np.shares_memory(example["labels"], dataset.labels[0]) for example in dataset)


def test_windows_end_at_the_newest_label_and_step_back():
    series = [make_series("AAA", range(100)), make_series("BBB", range(50))]
    dataset = supervised_windows(series, [1, 5], DateRange(DAYS[20], DAYS[79]), 30, 20)
    assert dataset.ends.tolist() == [[0, 34], [0, 54], [0, 74], [1, 24], [1, 44]]
    assert len(dataset[3]["scale"]) == 25


def test_contexts_reach_back_before_the_range():
    dataset = supervised_windows([make_series("AAA", range(100))], [1], DateRange(DAYS[60], DAYS[65]), 30, 10)
    assert len(dataset) == 1
    assert len(dataset[0]["past_values"]) == 30
    assert (dataset[0]["labels"][:25] == IGNORE_INDEX).all()
    assert (dataset[0]["labels"][25:] != IGNORE_INDEX).all()


def test_range_without_a_label_is_refused():
    series = [make_series("AAA", range(100)), make_series("BBB", range(20))]
    for within in (DateRange(DAYS[120], DAYS[130]), DateRange(DAYS[50], DAYS[55])):
        message = f"no step between {within.start.date()} and {within.end.date()} has a label 10 bars ahead"
        with pytest.raises(ValueError, match=message):
            supervised_windows(series, [1, 10], within, 30, 10)


def test_tickers_without_a_label_are_left_out():
    series = [make_series("OLD", range(40)), make_series("ALL", range(160)), make_series("NEW", range(155, 160))]
    dataset = supervised_windows(series, [1, 10], DateRange(DAYS[100], DAYS[159]), 30, 10)
    assert set(dataset.ends[:, 0]) == {1}


@settings(deadline=None, max_examples=20)
@given(markets(), HORIZONS)
def test_scaled_targets_equal_a_plain_loop(series, horizons):
    within = DateRange(DAYS[10], DAYS[149])
    targets = supervised_windows(series, horizons, within, 30, 10).scaled_targets(horizons)
    expected = [
        [np.log(one.close[step + h] / one.close[step]) / (one.scale[step] * h**0.5) for h in horizons]
        for one in series
        for step in range(len(one.dates) - horizons[-1])
        if one.dates[step] >= within.start
        and one.dates[step + horizons[-1]] <= within.end
        and np.isfinite(one.close[[step, *(step + h for h in horizons)]]).all()
    ]
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets, expected, rtol=1e-4, atol=1e-6)


def test_dataset_crosses_to_another_process():
    """As a spawned worker of a DataLoader receives it."""
    dataset = supervised_windows([make_series("AAA", range(100))], [1, 2], EVER, 30, 10, score_once=True)
    received = ForkingPickler.loads(ForkingPickler.dumps(dataset))
    assert len(received) == len(dataset)
    for example, same in zip(received, dataset, strict=True):
        for name in ("past_values", "scale", "labels"):
            np.testing.assert_array_equal(example[name], same[name])


# --- windows to forecast from ---


@settings(deadline=None, max_examples=25)
@given(st.data(), markets(), st.integers(1, 60), st.tuples(st.integers(0, 159), st.integers(0, 159)).map(sorted))
def test_every_day_with_a_whole_context_is_forecast_once(data, series, context, bounds):
    stride = data.draw(st.integers(1, context))
    within = DateRange(DAYS[bounds[0]], DAYS[bounds[1]])
    expected = [
        (one.ticker, date)
        for one in series
        for step, date in enumerate(one.dates)
        if step + 1 >= context and within.start <= date <= within.end and not np.isnan(one.close[step])
    ]
    if not expected:
        with pytest.raises(ValueError, match=f"no ticker has {context} bars of context"):
            forecast_windows(series, context, within, stride)
        return
    dataset = forecast_windows(series, context, within, stride)
    origins = dataset.origins
    assert list(zip(origins["ticker"], origins["cutoff"].to_numpy(), strict=True)) == expected
    pd.testing.assert_index_equal(origins.index, pd.RangeIndex(len(expected)), exact=True)
    by_ticker = {one.ticker: one for one in series}
    for row in origins.itertuples():
        one, example = by_ticker[row.ticker], dataset[row.window]
        step = np.searchsorted(one.dates, row.cutoff.to_datetime64())
        first = len(example["scale"]) - 1 - row.back
        seen = slice(step - first, step + 1)
        assert context - stride < first + 1 <= context
        assert row.scale == one.scale[step]
        shown = {name: array[: first + 1] for name, array in example.items()}
        assert sorted(shown) == ["attention_mask", "past_values", "scale"]
        np.testing.assert_array_equal(shown["attention_mask"], ~np.isnan(one.close[seen]))
        np.testing.assert_array_equal(shown["past_values"], one.values[seen])
        np.testing.assert_array_equal(shown["scale"], one.scale[seen])
        assert np.shares_memory(example["past_values"], one.values)


@settings(deadline=None, max_examples=25)
@given(st.data(), markets(), st.integers(1, 60), st.integers(0, 159), st.integers(0, 159))
def test_a_cutoff_sees_the_same_steps_whatever_the_range_and_the_future(data, series, context, first, last):
    """Else the forecast of a day would change with the days that are scored, or with what came after it."""
    stride = data.draw(st.integers(1, context))
    within = DateRange(DAYS[min(first, last)], DAYS[max(first, last)])
    try:
        narrow = forecast_windows(series, context, within, stride)
    except ValueError:
        return
    known = [EncodedSeries(one.ticker, *(c[one.dates <= within.end] for c in one[1:])) for one in series]
    for other in (forecast_windows(series, context, EVER, stride), forecast_windows(known, context, within, stride)):
        same = narrow.origins[["ticker", "cutoff"]].merge(other.origins, validate="1:1")
        for wanted, found in zip(narrow.origins.itertuples(), same.itertuples(), strict=True):
            seen, expected = other[found.window]["past_values"], narrow[wanted.window]["past_values"]
            np.testing.assert_array_equal(seen[: len(seen) - found.back], expected[: len(expected) - wanted.back])


@pytest.mark.parametrize("stride", [0, -1, 31])
def test_a_stride_that_leaves_days_without_context_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride must be from 1 to the context_length of 30, got {stride}"):
        forecast_windows([make_series("AAA", range(160))], 30, EVER, stride)


def test_the_newest_day_is_forecast():
    series = [make_series("AAA", range(160)), make_series("BBB", range(90))]
    origins = forecast_windows(series, 30, EVER).origins
    assert origins.groupby("ticker")["cutoff"].max().to_dict() == {"AAA": DAYS[159], "BBB": DAYS[89]}
    assert origins["cutoff"].dtype == "datetime64[ns]"


def test_no_window_lies_in_a_halt():
    """One without a step to read is no window; the labels around the halt are all there."""
    series = make_series("AAA", range(160))
    series.close[40:90] = series.values[40:90] = np.nan
    dataset = supervised_windows([series], [1, 2], EVER, context_length=10, stride=7)
    assert all(example["attention_mask"].any() for example in dataset)
    labels = make_labels(series, [1, 2], EVER)
    found = {step for _, step, _ in supervised_steps(dataset)}
    assert found == set(np.flatnonzero((labels != IGNORE_INDEX).any(axis=1)))


def test_range_without_a_whole_context_is_refused():
    within = DateRange(DAYS[0], DAYS[28])
    message = f"no ticker has 30 bars of context at any date between {DAYS[0].date()} and {DAYS[28].date()}"
    with pytest.raises(ValueError, match=message):
        forecast_windows([make_series("AAA", range(160))], 30, within)
    with pytest.raises(ValueError, match="no ticker has 30 bars"):
        forecast_windows([], 30, EVER)
