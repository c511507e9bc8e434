"""Walk-forward: folds that never know their test block, and the command that trains and scores one after the other."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_market, tiny_run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.model_selection import TimeSeriesSplit

from spaceexploreai.data.prices import read_prices, write_table
from spaceexploreai.data.windows import IGNORE_INDEX, DateRange, chronological_split, make_labels
from spaceexploreai.evaluation.walk_forward import WINDOWS, cut_blocks, join_folds, plan_folds
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries
from spaceexploreai.scripts import walk_forward
from spaceexploreai.scripts.evaluate import forecast_range
from spaceexploreai.scripts.forecasters import load_checkpoint

RESULTS = ("forecasts.parquet", "metrics.json", "metrics_by_fold.json")


def make_dates(count: int) -> pd.Series:
    return pd.Series(pd.bdate_range("2001-01-01", periods=count))


@st.composite
def plans(draw):
    """Dates, what the network looks at, and options that fit them."""
    dates, horizon, context = make_dates(draw(st.integers(60, 400))), draw(st.integers(1, 5)), draw(st.integers(1, 20))
    options = {
        "window": draw(st.sampled_from(WINDOWS)),
        "embargo": draw(st.integers(0, 20)),
        "train_sessions": draw(st.none() | st.integers(30, 200)),
        "validation_fraction": draw(st.floats(0.1, 0.5)),
        draw(st.sampled_from(["folds", "every"])): draw(st.integers(6, 12)),
    }
    try:
        plan_folds(dates, horizon, context, **options)
    except ValueError:
        assume(False)
    return dates, horizon, context, options


def places(dates: pd.Series, fold) -> list[tuple[int, int]]:
    """First and last session of each range of a fold."""
    return [tuple(int(np.flatnonzero(dates == day)[0]) for day in span) for span in fold]


# --- folds ---


@settings(max_examples=25, deadline=None)
@given(plan=plans(), seed=st.integers(0, 100))
def test_blocks_follow_each_other_and_leave_nothing_out(plan, seed):
    dates, horizon, context, options = plan
    shuffled = pd.concat([dates, dates]).sample(frac=1, random_state=seed)
    folds = plan_folds(shuffled, horizon, context, **options)
    blocks = [places(dates, fold)[2] for fold in folds]
    first = (options["train_sessions"] or len(dates) // 2) + options["embargo"]
    assert [day for start, end in blocks for day in range(start, end + 1)] == list(range(first, len(dates)))
    lengths = [end + 1 - start for start, end in blocks]
    assert min(lengths) > horizon
    if "folds" in options:
        assert len(folds) == options["folds"]
        assert max(lengths) - min(lengths) <= 1
    else:
        assert set(lengths[:-1]) <= {options["every"]}
        assert lengths[-1] <= options["every"] + horizon


@settings(max_examples=25, deadline=None)
@given(plan=plans())
def test_training_ends_before_the_embargo_and_keeps_its_window(plan):
    dates, horizon, context, options = plan
    ranges = [places(dates, fold) for fold in plan_folds(dates, horizon, context, **options)]
    for (_, trained), (chosen, last), (tested, _) in ranges:
        assert chosen == trained + 1
        assert tested - last - 1 == options["embargo"]
    starts, ends = ([ranges_[which][side] for ranges_ in ranges] for which, side in ((0, 0), (1, 1)))
    if options["window"] == "rolling":
        assert {end + 1 - start for start, end in zip(starts, ends, strict=True)} == {ends[0] + 1}
    else:
        assert set(starts) == {0}
    assert ends == sorted(set(ends))
    assert starts == sorted(starts)
    assert all(train[1] + 1 - train[0] >= context + horizon for train, *_ in ranges)


@settings(max_examples=25, deadline=None)
@given(plan=plans(), absent=st.sets(st.integers(0, 399), max_size=40))
def test_no_label_of_training_reaches_its_own_end_and_none_of_validation_the_test(plan, absent):
    """Also of a ticker that was not traded on every session."""
    dates, horizon, context, options = plan
    own = dates[[place for place in range(len(dates)) if place not in absent]].to_numpy()
    count = len(own)
    series = EncodedSeries("T", own, np.arange(1.0, count + 1), np.zeros((count, 1), np.float32), np.ones(count))
    for fold in plan_folds(dates, horizon, context, **options):
        for name, first_unknown in (("train", fold.validation[0]), ("validation", fold.test[0])):
            labels = make_labels(series, [horizon], DateRange(*getattr(fold, name)))[:, 0]
            supervised = np.flatnonzero(labels != IGNORE_INDEX)
            assert (own[supervised + horizon] < first_unknown.to_datetime64()).all()
            assert (own[supervised] >= getattr(fold, name)[0].to_datetime64()).all()


@settings(max_examples=25, deadline=None)
@given(plan=plans())
def test_the_split_of_the_training_is_the_fold(plan):
    """Fractions are the only way to tell train/sft.py where to cut; they must not round to another session."""
    dates, horizon, context, options = plan
    repeated = pd.concat([dates, dates])
    for fold in plan_folds(dates, horizon, context, **options):
        split = chronological_split(repeated, horizon, **walk_forward.split_options(fold, repeated))
        assert tuple(split.train) == fold.train
        assert tuple(split.validation) == fold.validation
        assert split.test == (dates[dates > fold.validation[1]].min(), dates.max())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("embargo", [0, 7])
def test_folds_are_those_of_scikit_learn(window, embargo):
    dates, folds, every = make_dates(300), 4, 30
    first = len(dates) - embargo - folds * every
    planned = plan_folds(dates, 5, 10, window=window, every=every, train_sessions=first, embargo=embargo)
    limit = first if window == "rolling" else None
    splitter = TimeSeriesSplit(folds, test_size=every, gap=embargo, max_train_size=limit)
    for fold, (train, test) in zip(planned, splitter.split(dates), strict=True):
        (begin, _), (_, end), (start, stop) = places(dates, fold)
        np.testing.assert_array_equal(np.arange(begin, end + 1), train)
        np.testing.assert_array_equal(np.arange(start, stop + 1), test)


def refusal(count: int, options: dict) -> str:
    try:
        plan_folds(make_dates(count), 2, 1, validation_fraction=0.3, **options)
    except ValueError as error:
        return str(error)
    return ""


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 58),
    trained=st.none() | st.integers(30, 100),
    embargo=st.integers(0, 30),
    folds=st.integers(10, 30),
)
def test_too_few_sessions_are_told_how_many_are_needed(count, trained, embargo, folds):
    """As many are enough, and one less is not."""
    options = {"folds": folds, "train_sessions": trained, "embargo": embargo}
    said = refusal(count, options)
    assert f"{count} sessions are too few for {folds} folds of more than 2 sessions" in said
    needed = int(re.search(r": (\d+) are needed$", said)[1])
    assert refusal(needed, options) == ""
    assert "too few" in refusal(needed - 1, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 3, "window": "sliding"}, "window must be expanding or rolling, got 'sliding'"),
        ({}, "give one of folds and every, got None and None"),
        ({"folds": 3, "every": 30}, "give one of folds and every, got 3 and 30"),
        ({"folds": 0}, "folds must be at least 1, got 0"),
        ({"folds": 3, "embargo": -1}, "embargo must be at least 0, got -1"),
        ({"folds": 3, "train_sessions": 0}, "train_sessions must be at least 1, got 0"),
        ({"every": 10}, "every 10 sessions is too often: the longest horizon, 10"),
        ({"folds": 3, "train_sessions": 80}, "a training range of 72 sessions is too short: a context of 64"),
        ({"folds": 3, "train_sessions": 100}, "a validation range of 10 sessions is too short"),
        ({"folds": 30}, "300 sessions are too few for 30 folds .* after 150 to train on"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_folds(make_dates(300), 10, 64, **options)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 300), every=st.integers(1, 60))
def test_blocks_of_a_finished_checkpoint_are_of_all_sessions(count, every):
    dates = make_dates(count)
    if every <= 10 or count <= 10:
        with pytest.raises(ValueError, match=r"too often|too few"):
            cut_blocks(dates, 10, every)
        return
    blocks = cut_blocks(dates.sample(frac=1, random_state=0), 10, every)
    lengths = [dates.between(*block).sum() for block in blocks]
    assert sum(lengths) == count
    assert lengths[:-1] == [every] * (len(blocks) - 1)
    assert 10 < lengths[-1] <= every + 10


def test_joined_forecasts_know_their_fold():
    tables = [pd.DataFrame({"mean": values}, index=[7] * len(values)) for values in ([1.0, 2.0], [3.0])]
    joined = join_folds(tables)
    pd.testing.assert_frame_equal(joined, pd.DataFrame({"mean": [1.0, 2.0, 3.0], "fold": [1, 1, 2]}))


# --- the command ---


def command_line(folder: Path, prices: Path, *options: str, blocks: tuple = ("--folds", "2")) -> list[str]:
    """Of features that are known from the beginning."""
    fixed = ("--prices", str(prices), "--feature_groups", "lag", "--validation_fraction", "0.15")
    return tiny_run(folder, *fixed, "--max_steps", "2", *blocks, *options)


@pytest.fixture(scope="module")
def walked(tmp_path_factory, market) -> Path:
    """A finished run of two folds, of which nothing may be changed."""
    folder = tmp_path_factory.mktemp("walked") / "run"
    walk_forward.main(command_line(folder, market, "--embargo", "5"))
    return folder


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of the folders of checkpoints, as they are trained."""
    names, train = [], walk_forward.train_and_report
    monkeypatch.setattr(
        walk_forward, "train_and_report", lambda run, folder: names.append(folder.name) or train(run, folder)
    )
    return names


def test_every_session_is_forecast_once_by_a_checkpoint_that_never_saw_it(walked, market):
    table = pd.read_parquet(walked / "forecasts.parquet")
    days = read_prices(market)["date"].unique()
    assert not table.duplicated(["ticker", "cutoff", "horizon"]).any()
    assert set(table["cutoff"]) == set(days[205:])
    assert table.groupby("cutoff")["fold"].nunique().eq(1).all()
    for fold, rows in table.groupby("fold"):
        config = json.loads((walked / f"fold-{fold:02d}" / "config.json").read_text())
        known = pd.DatetimeIndex([config["selection_cutoff"], rows["cutoff"].min()])
        last_seen, first = pd.DatetimeIndex(days).get_indexer(known)
        assert first - last_seen == 6
        assert config["train_cutoff"] < config["selection_cutoff"]


def test_a_fold_is_what_its_checkpoint_forecasts(walked, market):
    table = pd.read_parquet(walked / "forecasts.parquet")
    rows = table[table["fold"] == 2].reset_index(drop=True)
    within = DateRange(rows["cutoff"].min(), rows["cutoff"].max())
    again = forecast_range(*load_checkpoint(walked / "fold-02"), read_prices(market), within)
    pd.testing.assert_frame_equal(rows.drop(columns="fold"), again, check_dtype=False)


def test_metrics_are_those_of_the_rows(walked):
    table = pd.read_parquet(walked / "forecasts.parquet").dropna(subset="y")
    metrics, by_fold = (json.loads((walked / name).read_text()) for name in RESULTS[1:])
    assert set(by_fold) == {"1", "2"}
    for report, rows in ((metrics, table), *((by_fold[str(fold)], rows) for fold, rows in table.groupby("fold"))):
        own = rows[rows["horizon"] == 5]
        assert report["5"]["n"]["model"] == len(own)
        assert report["5"]["mse"]["model"] == pytest.approx(((own["mean"] - own["y"]) ** 2).mean())
        assert report["5"]["mse"]["ewma"] == pytest.approx(((own["ewma_mean"] - own["y"]) ** 2).mean())


def test_a_run_that_was_interrupted_goes_on_with_the_fold_that_is_missing(tmp_path, walked, market, trained):
    folder = tmp_path / "run"
    shutil.copytree(walked, folder)
    for name in ("fold-02.parquet", "fold-02/config.json", *RESULTS):
        (folder / name).unlink()
    (folder / "fold-02" / "leftover.json").touch()
    (folder / "scratch").mkdir()
    walk_forward.main(command_line(folder, market, "--embargo", "5"))
    assert trained == ["fold-02"]
    for name in RESULTS:
        assert (folder / name).read_bytes() == (walked / name).read_bytes()
    assert not (folder / "fold-02" / "leftover.json").exists()
    assert {path.name for path in folder.iterdir()} == {path.name for path in walked.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--embargo", "6"), "is of a run with embargo 5, not 6"),
        (("--embargo", "5", "--learning_rate", "0.1"), "is of a run with learning_rate 0.0002, not 0.1"),
        (("--embargo", "5", "--num_hidden_layers", "1"), "is of a run with num_hidden_layers"),
    ],
)
def test_the_folder_of_another_run_is_refused(walked, market, trained, capsys, options, message):
    before = {path: path.stat().st_mtime_ns for path in walked.rglob("*")}
    with pytest.raises(SystemExit):
        walk_forward.main(command_line(walked, market, *options))
    assert message in capsys.readouterr().err
    assert trained == []
    assert {path: path.stat().st_mtime_ns for path in walked.rglob("*")} == before


def test_other_content_of_the_same_files_makes_another_run(tmp_path):
    prices, network, folder = tmp_path / "market.parquet", tmp_path / "config.json", tmp_path / "run"
    options = command_line(folder, prices, "--model_config", str(network))

    def start(seed: int, layers: int) -> None:
        write_table(make_market(seed=seed), prices)
        network.write_text(json.dumps({"num_hidden_layers": layers}))
        walk_forward.open_folder(folder, walk_forward.open_walk(options).settings)

    start(seed=0, layers=1)
    (folder / "fold-01.parquet").touch()
    start(seed=0, layers=1)
    with pytest.raises(ValueError, match="is of a run with data"):
        start(seed=1, layers=1)
    with pytest.raises(ValueError, match="is of a run with num_hidden_layers 1, not 2"):
        start(seed=0, layers=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--window", "sliding"), "window must be expanding or rolling, got 'sliding'"),
        (("--embargo", "-1"), "embargo must be at least 0, got -1"),
        (("--folds", "40"), "400 sessions are too few for 40 folds"),
        (("--baselines", "some"), "baselines must be fast or all, got 'some'"),
        (("--every", "50"), "give one of folds and every, got 2 and 50"),
        (("--tran_sessions", "50"), "tran_sessions"),
        (("--train_start", "2005-03-01"), "train_start 2005-03-01 is what folds have of their own"),
    ],
)
def test_a_mistake_leaves_nothing_behind(tmp_path, market, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        walk_forward.main(command_line(tmp_path / "run", market, *options))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dataset_and_several_processes_are_refused(tmp_path, market, monkeypatch):
    with pytest.raises(ValueError, match="some/dataset has splits of its own"):
        walk_forward.open_walk(tiny_run(tmp_path, "--folds", "2", "--dataset", "some/dataset"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="in one process, not in 2"):
        walk_forward.open_walk(command_line(tmp_path, market))


def test_a_run_that_finished_no_fold_may_change_its_mind(tmp_path, market):
    for options, embargo in (("--embargo", "5"), 5), (("--embargo", "6"), 6):
        walk = walk_forward.open_walk(command_line(tmp_path / "run", market, *options))
        walk_forward.open_folder(walk.folder, walk.settings)
        assert json.loads((tmp_path / "run" / "walk_forward.json").read_text())["options"]["embargo"] == embargo


def test_a_folder_with_other_files_is_refused(tmp_path, market, capsys):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(SystemExit):
        walk_forward.main(command_line(tmp_path, market))
    assert "holds other files than those of a walk-forward" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_that_has_seen_a_fold_is_not_trained_on(tmp_path, checkpoint, market):
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        f"model_name_or_path: {checkpoint}\nprices: {market}\nfolds: 2\noutput_dir: {tmp_path / 'run'}\n"
    )
    with pytest.raises(ValueError, match="has seen dates to 2006-06-"):
        walk_forward.open_walk(["--config", str(recipe)])


# --- why one trains again ---

TURN, DAYS = 250, 770


@pytest.fixture(scope="module")
def turning_market(tmp_path_factory) -> Path:
    """Returns follow those of the day before, and from session `TURN` on they go against them."""
    generator, frames = np.random.default_rng(0), []
    for ticker, walk in make_market(tickers=4, days=DAYS).groupby("ticker"):
        returns = np.zeros(DAYS)
        for day, shock in enumerate(generator.normal(0, 0.02, DAYS - 1), start=1):
            returns[day] = (0.7 if day < TURN else -0.7) * returns[day - 1] + shock
        close = 50 * np.exp(returns.cumsum())
        bars = {"open": close, "high": 1.001 * close, "low": 0.999 * close, "close": close}
        frames.append(walk.assign(ticker=ticker, **bars))
    path = tmp_path_factory.mktemp("turning") / "market.parquet"
    write_table(pd.concat(frames), path)
    return path


def test_a_rolling_window_finds_a_sign_that_turned_and_the_old_checkpoint_does_not(tmp_path, turning_market):
    window = ("--window", "rolling", "--train_sessions", str(TURN), "--embargo", "20")
    steps = ("--max_steps", "40", "--learning_rate", "3e-3", "--stride", "8", "--horizons", "1")
    walk_forward.main(command_line(tmp_path, turning_market, *window, *steps, blocks=("--every", "250")))
    table = pd.read_parquet(tmp_path / "forecasts.parquet")
    assert table["fold"].unique().tolist() == [1, 2]
    before, after = (table[table["fold"] == fold] for fold in (1, 2))
    within = DateRange(after["cutoff"].min(), after["cutoff"].max())
    old = forecast_range(*load_checkpoint(tmp_path / "fold-01"), read_prices(turning_market), within)
    assert before["mean"].corr(before["y"]) < -0.4
    assert old["mean"].corr(old["y"]) < -0.4
    assert after["mean"].corr(after["y"]) > 0.4
