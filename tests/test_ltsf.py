"""The long-horizon benchmarks: published numbers of windows, other people's scaler, scalar loops, and no leak."""

import json
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from spaceexploreai.evaluation.ltsf import (
    Parts,
    daily_period,
    naive_scores,
    origins,
    read_channels,
    split,
    standardise,
)
from spaceexploreai.scripts import benchmark_ltsf
from spaceexploreai.scripts.benchmark_ltsf import (
    compare,
    features,
    make_network,
    make_trainer,
    make_windows,
    open_series,
    thin,
    train,
)

NETWORK = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "mscnn_num_blocks": 1,
    "max_position_embeddings": 64,
}
ROWS = 300  # of which 210 are for training, 30 for validation and 60 for testing


def make_table(rows: int = ROWS, noise: float = 0.1) -> pd.DataFrame:
    """Weeks of two waves of 16 rows upon a trend."""
    generator, steps = np.random.default_rng(0), np.arange(rows)
    waves = [np.sin(2 * np.pi * (steps + shift) / 16) + 0.002 * steps for shift in (0, 5)]
    channels = np.stack(waves, axis=1) + generator.normal(0, noise, (rows, 2))
    table = pd.DataFrame(channels * [3, 0.2] + [5, -1], columns=["flu", "OT"])
    table.insert(0, "date", pd.date_range("2002-01-01", periods=rows, freq="7D"))
    return table


@pytest.fixture
def options(tmp_path) -> Namespace:
    """Those of the command, for the file of `make_table` as ILI."""
    (tmp_path / "config.json").write_text(json.dumps(NETWORK), encoding="utf-8")
    make_table().to_csv(tmp_path / "national_illness.csv", index=False)
    return Namespace(
        data_dir=tmp_path, model_config=tmp_path / "config.json", context=12, horizons=[5], epochs=1, seed=0
    )


def command_line(options: Namespace, *more: str) -> list[str]:
    folder = ["--data-dir", str(options.data_dir), "--model-config", str(options.model_config), "--dataset", "ILI"]
    return [*folder, "--context", "12", "--horizons", "5", "--epochs", "1", *more]


# --- splits and scaling ---


@pytest.mark.parametrize(
    ("name", "rows", "context", "horizon", "windows"),
    [
        ("ETTh1", 17420, 96, 0, (8545, 2881, 2881)),
        ("ETTh2", 17420, 96, 0, (8545, 2881, 2881)),
        ("ETTm1", 69680, 96, 0, (34465, 11521, 11521)),
        ("ETTm2", 69680, 96, 0, (34465, 11521, 11521)),
        ("weather", 52696, 96, 0, (36792, 5271, 10540)),
        ("exchange", 7588, 96, 96, (5120, 665, 1422)),
        ("ILI", 966, 36, 24, (617, 74, 170)),
    ],
)
def test_there_are_as_many_windows_as_published(name, rows, context, horizon, windows):
    """Table of the datasets of TimesNet (arXiv 2210.02186), which counts those of some without a horizon."""
    assert tuple(len(origins(part, context, horizon)) for part in split(name, rows)) == windows


@pytest.mark.parametrize(("name", "hours"), [("ETTh1", 1), ("ETTm1", 4)])
def test_ett_is_split_by_months(name, hours):
    borders = [part.stop // hours for part in split(name, 69680)]
    assert borders == [8640, 11520, 14400]


@pytest.mark.parametrize("part", Parts._fields)
def test_a_part_is_forecast_from_its_first_row_to_its_last(part):
    rows = getattr(split("exchange", 7588), part)
    first, *_, last = origins(rows, 96, 24)
    assert first + 1 == (rows.start or 96)
    assert last + 24 == rows.stop - 1


def test_the_scaler_is_that_of_scikit_learn():
    values = np.random.default_rng(0).normal(3, 7, (50, 4)).cumsum(axis=0)
    values[:30, 2] = 2.5
    scaler = StandardScaler().fit(values[:30])
    np.testing.assert_allclose(standardise(values, range(30)), scaler.transform(values), rtol=1e-12)


@pytest.mark.parametrize(
    ("step", "period"), [("1h", 24), ("15min", 96), ("10min", 144), ("1D", None), ("7D", None), ("1min", None)]
)
def test_a_day_has_as_many_rows_as_its_dates_say(step, period):
    dates = pd.date_range("2020-01-01", periods=400, freq=step).delete([7, 8, 30])
    assert daily_period(dates, known=200) == period


# --- naive forecasts ---


@settings(max_examples=15, deadline=None)
@given(horizon=st.integers(1, 9), period=st.integers(1, 6), seed=st.integers(0, 99))
def test_naive_scores_are_those_of_a_loop(horizon, period, seed):
    values = np.random.default_rng(seed).normal(size=(40, 2))
    rows = origins(range(20, 40), 8, horizon)
    squared, absolute = [], []
    for last in range(19, 40 - horizon):
        for channel in range(2):
            history, future = values[: last + 1, channel], values[last + 1 : last + 1 + horizon, channel]
            forecast = np.resize(history[-period:], horizon)  # repeats
            squared.append(np.mean((future - forecast) ** 2))
            absolute.append(np.mean(np.abs(future - forecast)))
    found = naive_scores(values, rows, horizon, period)
    assert found == {"mse": pytest.approx(np.mean(squared)), "mae": pytest.approx(np.mean(absolute))}


# --- the network's task ---


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_no_window_is_dropped_whatever_the_batch(options, batch_size, monkeypatch):
    """A head without weights forecasts the last value: every window counts as much as in the loop over rows."""

    def forecast_last_value(series, windows, options):
        model = make_network(options.model_config, series, 5)
        torch.nn.init.zeros_(model.mean_head.weight)
        torch.nn.init.zeros_(model.mean_head.bias)
        trainer = make_trainer(model, windows, 1, 0, options.data_dir)
        trainer.evaluate()  # of the validation rows, as in training
        return trainer

    monkeypatch.setattr(benchmark_ltsf, "train", forecast_last_value)
    monkeypatch.setitem(benchmark_ltsf.TRAINING, "per_device_eval_batch_size", batch_size)
    series = open_series("ILI", options)
    result = compare(series, 5, options)
    assert result["windows"] == 60 - 5 + 1
    assert result["network"] == pytest.approx(naive_scores(series.values, range(239, 295), 5), rel=1e-5)


def test_scores_are_those_of_forecasts_made_by_hand(options, tmp_path):
    """The newest row's mean, in units of the channel's random walk, is added to its value."""
    torch.manual_seed(0)
    series = open_series("ILI", options)
    model = make_network(options.model_config, series, 5)
    torch.nn.init.normal_(model.mean_head.weight)
    scores = make_trainer(model, make_windows(series, 5), 1, 0, tmp_path).evaluate(make_windows(series, 5).test)
    errors = []
    for values in series.values.T:
        step = np.sqrt(np.mean((values[1:210] - values[:209]) ** 2))
        for last in range(239, 295):
            known = values[last - 11 : last + 1]
            moves = [0, *(known[1:] - known[:-1]) / step]
            with torch.no_grad():
                mean = model(torch.tensor(np.stack([known, moves], axis=1)[None]).float()).mean[0, -1].numpy()
            forecast = known[-1] + mean * step * np.sqrt(range(1, 6))
            errors.append(values[last + 1 : last + 6] - forecast)
    assert scores["eval_mse"] == pytest.approx(np.square(errors).mean(), rel=1e-4)
    assert scores["eval_mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-4)


def test_a_new_network_forecasts_the_mean_move_of_its_training(options):
    series = open_series("ILI", options)
    known = series.values[:210]
    model = make_network(options.model_config, series, 5)
    bias = model.mean_head.bias.detach().double().numpy()
    steps = np.sqrt(np.mean((known[1:] - known[:-1]) ** 2, axis=0))
    moves = [np.mean([(known[t + h] - known[t]) / steps for t in range(210 - h)]) for h in range(1, 6)]
    np.testing.assert_allclose(bias * np.sqrt(range(1, 6)), moves, rtol=1e-5)


@pytest.mark.parametrize(("rows", "kept"), [(5, 5), (1000, 1000), (1999, 1999), (2000, 1000), (34465, 1014)])
def test_an_epoch_has_a_thousand_windows_of_a_channel_at_least(rows, kept):
    origins = thin(range(95, 95 + rows))
    assert len(origins) == kept
    assert origins[0] == 95


def test_labels_are_the_moves_from_every_row(options):
    """In training; of the rows that are scored, the last alone has labels."""
    series = open_series("ILI", options)
    windows = make_windows(series, 5)
    for part, first, known in ((windows.train, 0, range(12)), (windows.test, 240 - 12, [11])):
        start = first + 7
        labels = part[len(part) // 2 + 7]["labels"]  # the second channel
        for row in range(12):
            values = series.values[start + row : start + row + 6, 1]
            expected = values[1:] - values[0] if row in known else np.full(5, -100.0)
            np.testing.assert_array_equal(labels[row], expected)


# --- nothing leaks ---


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=20), data=st.data())
def test_features_know_nothing_of_later_rows(values, data):
    """A window that is centred on its last value would tell every row before it what its label is."""
    row = data.draw(st.integers(1, len(values) - 1))
    changed = np.array(values)
    changed[row:] += 1
    np.testing.assert_array_equal(features(changed, 0.3)[:row], features(np.array(values), 0.3)[:row])


@pytest.mark.parametrize(("part", "border"), [("train", 210), ("validation", 240), ("test", 300)])
def test_windows_end_where_their_part_does(options, part, border):
    series = open_series("ILI", options)
    values = np.concatenate([series.values, np.zeros((9, 2))])
    values[border:] = np.nan
    windows = getattr(make_windows(series._replace(values=values), 5), part)
    assert all(np.isfinite(windows[index]["labels"]).all() for index in range(len(windows)))
    values[border - 1] = np.nan
    assert not all(np.isfinite(windows[index]["labels"]).all() for index in range(len(windows)))


def trained_weights(options: Namespace, table: pd.DataFrame) -> dict[str, torch.Tensor]:
    table.to_csv(options.data_dir / "national_illness.csv", index=False)
    series = open_series("ILI", options)
    return train(series, make_windows(series, 5), options).model.state_dict()


def test_weights_know_nothing_of_what_comes_after_the_training(options):
    """One epoch: which of several is kept depends on the validation rows."""
    weights = trained_weights(options, make_table())
    for row, same in ((210, True), (209, False)):
        changed = make_table()
        changed.loc[row:, ["flu", "OT"]] = np.random.default_rng(1).normal(50, 9, (ROWS - row, 2))
        again = trained_weights(options, changed)
        assert all(torch.equal(weights[name], again[name]) for name in weights) == same


def test_the_kept_epoch_knows_nothing_of_the_test(options, capsys):
    options.epochs = 2
    weights = trained_weights(options, make_table())
    changed = make_table()
    changed.loc[240:, ["flu", "OT"]] = 0.0
    again = trained_weights(options, changed)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert capsys.readouterr().err.count("validation MSE") == 4


# --- the command ---


def test_a_wave_upon_a_trend_is_learned(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(benchmark_ltsf.TRAINING, "learning_rate", 5e-3)
    output = tmp_path / "new" / "results.json"
    arguments = command_line(options, "--epochs", "4", "--horizons", "4", "8", "--output", str(output))
    benchmark_ltsf.main(arguments)
    results = json.loads(output.read_text(encoding="utf-8"))
    values = standardise(make_table()[["flu", "OT"]].to_numpy(), range(210))
    assert [(one["dataset"], one["horizon"], one["windows"]) for one in results] == [("ILI", 4, 57), ("ILI", 8, 53)]
    for one in results:
        last = naive_scores(values, range(239, 300 - one["horizon"]), one["horizon"])
        assert one["last value"] == pytest.approx(last)
        assert one["network"]["mse"] < 0.5 * last["mse"]
        assert one["network"]["mae"] < 0.7 * last["mae"]
        assert one["last day"] is None
    rows = capsys.readouterr().out.splitlines()
    cells = [f"{results[-1][name][metric]:.3f}" for name in ("network", "last value") for metric in ("mse", "mae")]
    assert rows[-1].split() == ["ILI", "8", "53", *cells, *2 * [benchmark_ltsf.DASH]]


def test_files_may_lie_in_the_folders_of_autoformer(options):
    (options.data_dir / "illness").mkdir()
    (options.data_dir / "national_illness.csv").rename(options.data_dir / "illness" / "national_illness.csv")
    assert open_series("ILI", options).values.shape == (ROWS, 2)


def test_usual_contexts_and_horizons_are_the_default(options):
    make_table(400).to_csv(options.data_dir / "exchange_rate.csv", index=False)
    make_table(966).to_csv(options.data_dir / "national_illness.csv", index=False)
    options.horizons = options.context = None
    options.model_config = benchmark_ltsf.RECIPE
    series = open_series("ILI", options)
    assert (series.context, series.horizons) == (36, [24, 36, 48, 60])
    with pytest.raises(ValueError, match="horizon 96 with context 96 does not fit the 40 validation rows of exchange"):
        open_series("exchange", options)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--dataset", "ETTh3"], "datasets are ETTh1, ETTh2, ETTm1, ETTm2, weather, exchange, ILI, got 'ETTh3'"),
        (["--dataset", "ILI", "weather"], "weather.csv and "),
        (["--horizons", "5", "31"], "horizon 31 with context 12 does not fit the 30 validation rows of ILI"),
        (["--horizons", "0"], "must be a whole number from 1, got 0"),
        (["--epochs", "1.5"], "must be a whole number from 1, got 1.5"),
        (["--context", "65"], "context 65 is longer than the 64 positions"),
        (["--context", "250"], "horizon 5 with context 250 does not fit the 210 train rows of ILI"),
    ],
)
def test_the_command_refuses(options, more, complaint, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark_ltsf.main(command_line(options, "--output", str(tmp_path / "results.json"), *more))
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_a_missing_file_is_said_to_be_missing_in_both_places(options):
    with pytest.raises(ValueError, match=r"no file of ETTm2; looked for .*ETTm2.csv and .*ETT-small.ETTm2.csv"):
        open_series("ETTm2", options)


def test_a_short_file_is_refused(options):
    make_table(500).to_csv(options.data_dir / "ETTh1.csv", index=False)
    with pytest.raises(ValueError, match="ETTh1 has 500 rows, its standard split needs 14400"):
        open_series("ETTh1", options)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("date,OT\n2020-01-01,1\n2020-01-02,\n", "no date or number in line 3, column 'OT'"),
        ("date,a,OT\n2020-01-01,1,2\n2020-01-02,x,2\n", "no date or number in line 3, column 'a'"),
        ("date,OT\n2020-01-01,inf\n", "no date or number in line 2, column 'OT'"),
        ("date,OT\nyesterday,1\n", "no date or number in line 2"),
        ("time,OT\n2020-01-01,1\n", "must have a column date and channels after it, has time, OT"),
        ("date\n2020-01-01\n", "must have a column date and channels after it, has date"),
        ("", "is no CSV"),
        ("date,OT\n2020-01-01,1,2,3\n2020-01-01,1\n1,2,3,4,5\n", "is no CSV"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, text, complaint):
    (tmp_path / "weather.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        read_channels(tmp_path / "weather.csv")


def test_dates_that_do_not_increase_are_refused():
    with pytest.raises(ValueError, match="dates must increase, the median step is -1 days"):
        daily_period(pd.date_range("2020-01-01", periods=9, freq="-1D"), known=5)
