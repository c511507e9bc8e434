"""The command lines: what they write, what they refuse, and that a refusal writes nothing."""

import json
import re
import shutil
from pathlib import Path

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
from conftest import RECIPE, make_market, tiny_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.prices import read_prices, write_table
from spaceexploreai.data.windows import DateRange, forecast_windows
from spaceexploreai.evaluation.classes import probabilities_of
from spaceexploreai.feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from spaceexploreai.indicators_spaceexplore import FEATURE_PRESETS, INDICATORS
from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression, SpaceExploreModel
from spaceexploreai.scripts import build_dataset, draw_architecture, evaluate, forecast, quickstart
from spaceexploreai.scripts.evaluate import forecast_range
from spaceexploreai.scripts.forecast import forecast_newest
from spaceexploreai.scripts.forecasters import load_checkpoint, load_pipeline
from spaceexploreai.train import sft

ROOT = Path(__file__).resolve().parents[1]
QUANTILES = [f"q{level:g}" for level in np.arange(1, 20) / 20]
TABLE = ["ticker", "cutoff", "date", "horizon", "mean", *QUANTILES, "p_up", "y"]


# --- forecast ---


def test_forecast_writes_the_table_of_the_newest_day(tmp_path, checkpoint, market, capsys):
    output, plot = tmp_path / "new" / "forecast.parquet", tmp_path / "fan.png"
    forecast.main(["--model", str(checkpoint), "--prices", str(market), "--output", str(output), "--plot", str(plot)])
    table = pd.read_parquet(output)
    assert [column for column in table.columns if "_" not in column or column == "p_up"] == TABLE
    assert {"zero_mean", "drift_q0.05", "ewma_q0.95", "ewma_p_up"} <= set(table.columns)
    assert table["cutoff"].eq(read_prices(market)["date"].max()).all()
    assert table["y"].isna().all()
    assert list(table["horizon"]) == [1, 2, 5, 10] * 3
    assert (table[QUANTILES].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "naive 95 %" in capsys.readouterr().out


def test_forecast_as_of_a_past_day_knows_the_outcome_and_nothing_else(tmp_path, checkpoint, market):
    prices = read_prices(market)
    day = prices["date"].unique()[-30]
    output = tmp_path / "forecast.csv"
    run = ["--model", str(checkpoint), "--prices", str(market), "--as-of", f"{day:%Y-%m-%d}", "--tickers", "t1"]
    forecast.main([*run, "--output", str(output)])
    table = pd.read_csv(output, parse_dates=["cutoff", "date"])
    close = prices[prices["ticker"] == "T1"].set_index("date")["close"]
    np.testing.assert_allclose(table["y"], np.log(close[table["date"]].to_numpy() / close[day]))
    cut = forecast_newest(load_pipeline(checkpoint), prices[(prices.date <= day) & (prices.ticker == "T1")]).table
    np.testing.assert_allclose(table[QUANTILES], cut[QUANTILES], rtol=1e-6)


def test_forecast_without_prices_takes_the_sample(checkpoint, capsys):
    forecast.main(["--model", str(checkpoint), "--tickers", "AAPL,MSFT"])
    shown = capsys.readouterr().out
    assert "AAPL 2013-03-01 2013-03-04" in shown
    assert "IBM" not in shown


@pytest.mark.parametrize("kind", ["checkpoint", "language_model"])
def test_forecast_of_every_day_with_paths(tmp_path, kind, market, request):
    """Both tables are those of the pipeline; the paths of a seed are the same again."""
    folder, files = request.getfixturevalue(kind), [tmp_path / "table.parquet", tmp_path / "paths.parquet"]
    run = ["--model", str(folder), "--prices", str(market), "--prediction-length", "3", "--num-samples", "40"]
    forecast.main([*run, "--seed", "5", "--output", str(files[0]), "--paths", str(files[1])])
    table, paths = map(pd.read_parquet, files)
    options = {"unit": "log_return", "prediction_length": 3, "num_samples": 40, "seed": 5}
    expected = load_pipeline(folder, "cpu")(read_prices(market), **options)
    assert list(table["horizon"]) == [1, 2, 3] * 3
    pd.testing.assert_frame_equal(table[expected.table.columns], expected.table, rtol=1e-4, atol=1e-6)
    pd.testing.assert_frame_equal(paths, expected.paths, rtol=1e-4)
    assert paths.groupby("ticker")["sample"].nunique().eq(40).all()


def test_forecast_of_classes_stands_beside_the_naive_one(tmp_path, classifier, market, capsys, refused):
    run = ["--model", str(classifier), "--prices", str(market)]
    assert "a classification forecasts no range of prices" in refused(forecast.main, [*run, "--plot", "fan.png"])
    forecast.main([*run, "--output", "table.parquet"])
    table = pd.read_parquet("table.parquet")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[-8:] == ["P(flat)", "P(up)", *["naive", "P(down)", "naive", "P(flat)", "naive", "P(up)"]]
    naive = probabilities_of(table, "ewma")
    np.testing.assert_allclose(naive.sum(axis=1), 1)
    for line, own, other in zip(shown[1:], table[["p_down", "p_flat", "p_up"]].to_numpy(), naive, strict=False):
        assert line.split()[-6:] == [f"{chance:.2f}" for chance in (*own, *other)]


# --- causality of forecasts ---


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(back=st.integers(1, 60), ticker=st.sampled_from(["T0", "T1", "T2"]), factor=st.floats(0.3, 3.0))
def test_a_bar_changes_no_forecast_at_an_earlier_cutoff(checkpoint, market, back, ticker, factor):
    """Every bar after a day changes; forecasts from that day and those before stay, to the last bit."""
    pipe = load_pipeline(checkpoint, "cpu")
    model, extractor = pipe.model, pipe.feature_extractor
    prices = read_prices(market)
    days = prices["date"].unique()
    day = days[-1 - back]
    changed = prices.copy()
    later = (changed["date"] > day) & (changed["ticker"] == ticker)
    changed.loc[later, ["open", "high", "low", "close"]] *= factor
    changed.loc[later, "volume"] += 12345
    newest = [forecast_newest(pipe, table, as_of=day).table for table in (prices, changed)]
    pd.testing.assert_frame_equal(*(table.drop(columns="y") for table in newest), check_exact=True)
    within = DateRange(days[-66], day)
    ranges = [forecast_range(model, extractor, table, within) for table in (prices, changed)]
    pd.testing.assert_frame_equal(*(table.drop(columns="y") for table in ranges), check_exact=True)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(factor=st.floats(1e-3, 1e4))
def test_forecast_is_proportional_to_the_prices(checkpoint, market, factor):
    """forecast(a * prices) = a * forecast(prices): currency and splits say nothing."""
    model, extractor = load_checkpoint(checkpoint)
    prices = read_prices(market)
    columns = ["open", "high", "low", "close"]
    scaled = prices.assign(**{column: factor * prices[column] for column in columns})
    forecasts = [extractor.decode(model(**extractor(table)), table, model.config) for table in (prices, scaled)]
    for column in ("mean", *QUANTILES):
        np.testing.assert_allclose(forecasts[1][column], factor * forecasts[0][column], rtol=1e-5)


# --- evaluate ---


def test_evaluate_starts_after_everything_the_training_saw(tmp_path, checkpoint, market):
    output = tmp_path / "forecasts.parquet"
    evaluate.main(["--model", str(checkpoint), "--prices", str(market), "--output", str(output)])
    table = pd.read_parquet(output)
    config = json.loads((checkpoint / "config.json").read_text())
    days = read_prices(market)["date"].unique()
    assert set(table["cutoff"]) == set(days[days > pd.Timestamp(config["selection_cutoff"])])
    assert table.loc[table["cutoff"] == days[-1], "y"].isna().all()
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert set(report) == {"1", "2", "5", "10"}
    scored = table[(table["horizon"] == 5) & table["y"].notna()]
    assert report["5"]["n"]["model"] == len(scored)
    assert report["5"]["mse"]["model"] == pytest.approx(((scored["mean"] - scored["y"]) ** 2).mean())
    assert report["5"]["mse"]["zero"] == pytest.approx((scored["y"] ** 2).mean())
    assert report["5"]["rank_ic"]["model"] is None


def test_a_checkpoint_is_scored_block_by_block(tmp_path, checkpoint, market):
    """The same forecasts, beside baselines that have seen more from block to block."""
    run = ["--model", str(checkpoint), "--prices", str(market), "--start", "2006-06-01"]
    evaluate.main([*run, "--output", str(tmp_path / "whole.parquet")])
    evaluate.main([*run, "--walk-forward", "14", "--output", str(tmp_path / "blocks.parquet")])
    whole, blocks = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("whole", "blocks"))
    keys = ["ticker", "cutoff", "horizon"]
    both = whole.merge(blocks, on=keys, suffixes=("", "_again"), validate="1:1")
    assert len(both) == len(whole) == len(blocks)
    np.testing.assert_allclose(both["q0.95"], both["q0.95_again"], rtol=1e-5)
    days = blocks.groupby("fold")["cutoff"].agg(["min", "max", "nunique"])
    assert days["nunique"].tolist()[:-1] == [14] * (len(days) - 1)
    assert (days["min"].iloc[1:].to_numpy() > days["max"].iloc[:-1].to_numpy()).all()
    first = both["fold"] == 1
    np.testing.assert_allclose(both["ewma_q0.95"][first], both["ewma_q0.95_again"][first])
    assert (both["ewma_q0.95"][~first] != both["ewma_q0.95_again"][~first]).any()
    by_fold = json.loads((tmp_path / "metrics_by_fold.json").read_text())
    assert list(by_fold) == [str(fold) for fold in days.index]


def test_evaluate_and_forecast_agree_on_the_newest_day(tmp_path, checkpoint, market):
    output = tmp_path / "forecasts.parquet"
    evaluate.main(["--model", str(checkpoint), "--prices", str(market), "--output", str(output), "--stride", "1"])
    table = pd.read_parquet(output)
    newest = forecast_newest(load_pipeline(checkpoint), read_prices(market)).table
    last = table[table["cutoff"] == table["cutoff"].max()]
    np.testing.assert_allclose(last[["mean", *QUANTILES]], newest[["mean", *QUANTILES]], rtol=1e-4, atol=1e-6)


def test_evaluate_scores_training_dates_only_when_told_to(tmp_path, checkpoint, market, capsys):
    output = tmp_path / "forecasts.parquet"
    run = ["--model", str(checkpoint), "--prices", str(market), "--output", str(output), "--start", "2005-09-01"]
    evaluate.main([*run, "--allow-in-sample"])
    assert pd.read_parquet(output)["cutoff"].min() == pd.Timestamp("2005-09-01")
    assert "IN SAMPLE: the model was trained to" in capsys.readouterr().out
    table, cutoff = pd.read_parquet(output), json.loads((checkpoint / "config.json").read_text())["train_cutoff"]
    assert (table["in_sample"] == (table["cutoff"] <= pd.Timestamp(cutoff))).all()
    assert table["in_sample"].nunique() == 2


def test_evaluate_says_that_a_checkpoint_was_chosen_by_its_dates(tmp_path, checkpoint, market, capsys):
    config = json.loads((checkpoint / "config.json").read_text())
    run = ["--model", str(checkpoint), "--prices", str(market), "--output", str(tmp_path / "forecasts.parquet")]
    evaluate.main([*run, "--start", config["selection_cutoff"]])
    assert f"NOT UNSEEN: the model was chosen by dates to {config['selection_cutoff']}" in capsys.readouterr().out
    evaluate.main(run)
    printed = capsys.readouterr().out
    assert "UNSEEN" not in printed
    assert "IN SAMPLE" not in printed


def test_evaluate_scores_groups_and_fitted_baselines(tmp_path, checkpoint, market):
    run = ["--model", str(checkpoint), "--prices", str(market), "--output", str(tmp_path / "forecasts.parquet")]
    evaluate.main([*run, "--baselines", "all", "--by", "ticker", "regime"])
    table = pd.read_parquet(tmp_path / "forecasts.parquet")
    whole, tickers, regimes = (
        json.loads((tmp_path / f"metrics{name}.json").read_text()) for name in ("", "_by_ticker", "_by_regime")
    )
    assert set(tickers) == {"T0", "T1", "T2"}
    assert set(regimes) == {"calm", "normal", "wild"}
    for column in ("garch", "ridge", "lightgbm", "dlinear", "patchtst"):
        assert table[f"{column}_mean"].notna().all()
        assert np.isfinite(whole["1"]["crps"][column])
    for groups in (tickers, regimes):
        assert sum(one["5"]["n"]["model"] for one in groups.values()) == whole["5"]["n"]["model"]


def test_a_checkpoint_that_does_not_say_what_it_saw_is_refused(tmp_path, checkpoint, market, refused, capsys):
    shutil.copytree(checkpoint, tmp_path / "undated")
    path = tmp_path / "undated" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"train_cutoff": None, "selection_cutoff": None}))
    run = ["--model", str(path.parent), "--prices", str(market), "--output", str(tmp_path / "forecasts.parquet")]
    assert "does not say to which date it was trained" in refused(evaluate.main, run)
    evaluate.main([*run, "--allow-in-sample", "--start", "2006-06-01"])
    assert "UNDATED" in capsys.readouterr().out


def plant_leak(monkeypatch) -> None:
    """A feature with the next day's return in it."""
    original = SpaceExploreFeatureExtractor.compute_features

    def leaking(self, prices):
        features = original(self, prices)
        ahead = np.log(prices.groupby("ticker")["close"].shift(-1) / prices["close"])
        return features.assign(**{self.feature_names[0]: ahead.to_numpy()})

    monkeypatch.setattr(SpaceExploreFeatureExtractor, "compute_features", leaking)


def test_a_leak_is_found_beside_tickers_that_cannot_be_forecast(tmp_path, checkpoint, market, monkeypatch, refused):
    """The first of the alphabet were listed too late for the first cutoff, or delisted before."""
    prices, cutoff = read_prices(market), json.loads((checkpoint / "config.json").read_text())["selection_cutoff"]
    days = prices["date"].unique()
    first = int(days.searchsorted(pd.Timestamp(cutoff), side="right"))
    copy = prices[prices["ticker"] == "T0"]
    late, gone = copy[copy["date"] >= days[first - 10]], copy[copy["date"] < days[first - 5]]
    others = [late.assign(ticker="A0"), late.assign(ticker="A1"), gone.assign(ticker="A2")]
    write_table(pd.concat([*others, prices]), tmp_path / "more.parquet")
    run = ["--model", str(checkpoint), "--prices", str(tmp_path / "more.parquet"), "--output"]
    evaluate.main([*run, str(tmp_path / "forecasts.parquet")])
    plant_leak(monkeypatch)
    assert "leak: " in refused(evaluate.main, [*run, str(tmp_path / "again.parquet")])


def test_a_leak_between_tickers_is_found(monkeypatch):
    """Of a column that is nothing for fewer than ten."""
    prices, name = make_market(tickers=12, days=300), "return_rank_1"
    extractor = SpaceExploreFeatureExtractor([name, FEATURE_PRESETS["default"][0]], context_length=16)
    extractor.fit(extractor.compute_features(prices))
    fields = json.loads((RECIPE / "config.json").read_text()) | {"num_features": 2}
    model = SpaceExploreForRegression(SpaceExploreConfig(**fields)).eval()
    within = DateRange(prices["date"].unique()[250], prices["date"].max())
    origins = forecast_windows(extractor.encode(prices), 16, within).origins
    evaluate.refuse_leaks(model, extractor, prices, origins)
    honest = INDICATORS[name]
    ahead = honest._replace(compute=lambda panel: np.roll(honest.compute(panel), -1, axis=0))
    monkeypatch.setitem(INDICATORS, name, ahead)
    with pytest.raises(ValueError, match="leak"):
        evaluate.refuse_leaks(model, extractor, prices, origins)


def test_evaluate_refuses_a_forecast_that_knows_the_future(tmp_path, checkpoint, market, monkeypatch, refused):
    plant_leak(monkeypatch)
    run = ["--model", str(checkpoint), "--prices", str(market), "--output", str(tmp_path / "forecasts.parquet")]
    assert "leak: " in refused(evaluate.main, run)
    assert not list(tmp_path.iterdir())


# --- quickstart ---


def test_quickstart_writes_all_it_names(tmp_path, market, capsys):
    run = ["--prices", str(market), "--tickers", "T0,T1", "--num-train-epochs", "1"]
    quickstart.main([*run, "--output-dir", str(tmp_path)])
    names = {"model", "report.html", "forecasts.parquet", "metrics.json", "forecast.png", "forecast_shipped.png"}
    names |= {"predicted_vs_actual.png"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"report.md", "report.json", "report_files"}
    assert set(pd.read_parquet(tmp_path / "forecasts.parquet")["ticker"]) == {"T0", "T1"}
    shown = capsys.readouterr().out
    assert all(f"wrote {tmp_path / name}" in shown for name in names)
    assert "shipped 27M network was trained on days to" in shown
    assert "see its form, not its skill" in (tmp_path / "report.md").read_text(encoding="utf-8")
    load_checkpoint(tmp_path / "model")


# --- the picture of the network ---


def test_the_presets_in_the_docs_are_those_of_the_command(capsys):
    draw_architecture.main(["--table"])
    assert capsys.readouterr().out in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", ["tiny", "5m", "27m", "300m"])
def test_no_text_of_the_picture_overlaps_another(recipe):
    figure = draw_architecture.draw(draw_architecture.read_config(ROOT / "recipes" / recipe / "config.json"))
    FigureCanvasAgg(figure).draw()
    extents = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert not [1 for i, one in enumerate(extents) for other in extents[:i] if one.overlaps(other)]


# --- mistakes ---


def csv_with(folder: Path, change) -> str:
    """A price file in which `change` has broken the middle bar of T0."""
    bars = pd.DataFrame(
        {
            "ticker": "T0",
            "date": exchange_calendars.get_calendar("XNYS", start="2020-01-01").sessions[:120].strftime("%Y-%m-%d"),
            "open": 10.0,
            "high": 11.0,
            "low": 9.0,
            "close": 10.5,
            "volume": 1000.0,
        }
    ).astype(dict.fromkeys(("open", "high", "low", "close", "volume"), object))
    path = folder / "broken.csv"
    change(bars).to_csv(path, index=False)
    return str(path)


def with_value(column, value):
    return lambda bars: bars.assign(**{column: bars[column].where(bars.index != 60, value)})


BROKEN_PRICES = {
    "zero price": (with_value("close", 0.0), "T0 2020-03-30: close 0"),
    "negative price": (with_value("low", -9.0), "T0 2020-03-30: low -9"),
    "missing price": (with_value("open", None), "T0 2020-03-30: open nan"),
    "infinite price": (with_value("high", "inf"), "T0 2020-03-30: high inf"),
    "text for a number": (with_value("close", "n/a?"), "n/a?"),
    "high below low": (with_value("high", 8.0), "T0 2020-03-30: open 10 high 8 low 9"),
    "close above high": (with_value("close", 99.0), "T0 2020-03-30: open 10 high 11 low 9 close 99"),
    "open below low": (with_value("open", 1.0), "T0 2020-03-30: open 1 "),
    "negative volume": (with_value("volume", -5.0), "T0 2020-03-30: volume -5"),
    "no date": (with_value("date", "yesterday"), "yesterday"),
    "repeated date": (with_value("date", "2020-03-27"), "2020-03-27"),
    "unsorted dates": (lambda bars: bars.iloc[::-1], "after 2020-06-23"),
}
TOO_FEW_PRICES = {
    "none": (lambda bars: bars.iloc[:0], "broken.csv"),
    "one bar": (lambda bars: bars.iloc[:1], "T0 has 1 bars"),
    "history shorter than the context": (lambda bars: bars.iloc[:83], "T0 has 83 bars"),
    "no price at all": (lambda bars: bars.assign(close="n/a?"), "close n/a?"),
    "missing column": (lambda bars: bars.drop(columns="volume"), "'volume'"),
}


@pytest.mark.parametrize("case", BROKEN_PRICES)
def test_broken_prices_are_repaired_with_a_count_or_refused(refused, checkpoint, tmp_path, capsys, case):
    change, named = BROKEN_PRICES[case]
    prices = csv_with(tmp_path, change)
    run = ["--model", str(checkpoint), "--prices", prices, "--output", "forecast.csv"]
    assert named in refused(forecast.main, [*run, "--strict"])
    forecast.main(run)
    report = capsys.readouterr().err
    assert named in report
    assert re.search(r"\b(1 dropped|1 repaired|1 merged|119 repaired) ", report)
    table = pd.read_csv("forecast.csv").drop(columns=["ticker", "cutoff", "date"])
    assert np.isfinite(table.drop(columns="y")).all(axis=None)


@pytest.mark.parametrize("case", TOO_FEW_PRICES)
def test_too_few_prices_are_refused(refused, checkpoint, tmp_path, case):
    change, named = TOO_FEW_PRICES[case]
    assert named in refused(forecast.main, ["--model", str(checkpoint), "--prices", csv_with(tmp_path, change)])


FORECAST_MISTAKES = {
    "missing file": (["--prices", "nowhere.parquet"], "nowhere.parquet"),
    "unknown suffix": (["--prices", "MARKET.txt"], "MARKET.txt"),
    "unknown ticker": (["--prices", "MARKET", "--tickers", "ZZZ"], "'ZZZ'"),
    "ticker not in the sample": (["--tickers", "TSLA"], "'TSLA'"),
    "ticker that is a path": (["--prices", "MARKET", "--tickers", "../../x"], "'../../X'"),
    "no ticker": (["--prices", "MARKET", "--tickers", ","], "','"),
    "as-of before the data": (["--prices", "MARKET", "--as-of", "1999-01-01"], "1999-01-01"),
    "as-of no date": (["--prices", "MARKET", "--as-of", "soon"], "'soon'"),
    "neither tickers nor prices": ([], "--tickers"),
    "output suffix": (["--prices", "MARKET", "--output", "forecast.xls"], "forecast.xls"),
    "plot suffix": (["--prices", "MARKET", "--plot", "fan.doc"], "fan.doc"),
    "paths suffix": (["--prices", "MARKET", "--num-samples", "3", "--paths", "paths.npz"], "paths.npz"),
    "paths of no samples": (["--prices", "MARKET", "--paths", "paths.csv"], "--paths paths.csv needs --num-samples"),
    "no sample": (["--prices", "MARKET", "--num-samples", "0"], "num_samples must be an integer, at least 1, got 0"),
    "beyond the last horizon": (["--prices", "MARKET", "--prediction-length", "11"], "from 1 to 10"),
    "unknown device": (["--prices", "MARKET", "--device", "abacus"], "abacus"),
    "unknown option": (["--prices", "MARKET", "--frobnicate"], "--frobnicate"),
    "missing model": (["--prices", "MARKET", "--model", "no/model"], "no/model"),
}


@pytest.mark.parametrize("case", FORECAST_MISTAKES)
def test_mistakes_of_forecast_are_refused(refused, checkpoint, market, tmp_path, case):
    options, named = FORECAST_MISTAKES[case]
    (tmp_path / "MARKET.txt").write_text("not a table")
    options = [str(market) if option == "MARKET" else option for option in options]
    assert named in refused(forecast.main, ["--model", str(checkpoint), *options])


EVALUATE_MISTAKES = {
    "dates of the training": (["--start", "2005-06-01"], "2005-06-01"),
    "start after end": (["--start", "2006-07-03", "--end", "2006-07-01"], "2006-07-03"),
    "start after the data": (["--start", "2030-01-01"], "2030-01-01"),
    "start no date": (["--start", "soon"], "'soon'"),
    "output suffix": (["--output", "forecasts.json"], "forecasts.json"),
}


@pytest.mark.parametrize("case", EVALUATE_MISTAKES)
def test_mistakes_of_evaluate_are_refused(refused, checkpoint, market, case):
    options, named = EVALUATE_MISTAKES[case]
    run = ["--model", str(checkpoint), "--prices", str(market), "--output", "forecasts.parquet", *options]
    assert named in refused(evaluate.main, run)


TRAINING_MISTAKES = {
    "unknown option": (["--frobnicate", "3"], "--frobnicate"),
    "missing recipe": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "recipe without a path": (["--config"], "--config"),
    "missing network": (["--model_config", "nowhere.json"], "nowhere.json"),
    "missing prices": (["--prices", "nowhere.csv"], "nowhere.csv"),
    "context longer than the network's": (["--context_length", "999"], "999"),
    "no context": (["--context_length", "0"], "0"),
    "no such normalization": (["--normalization", "magic"], "'magic'"),
    "test range too short": (["--test_fraction", "0.001"], "horizon of 10 days"),
    "fraction beyond one": (["--validation_fraction", "1.5"], "1.5"),
    "text for a number": (["--learning_rate", "fast"], "fast"),
    "two sources of data": (["--dataset", "some/dataset"], "some/dataset"),
    "no such feature group": (["--feature_groups", "price,astrology"], "'astrology'"),
    "no such calendar": (["--calendar", "XMARS"], "'XMARS'"),
    "two sources of weights": (["--model_name_or_path", "some/model"], "some/model"),
}


@pytest.mark.parametrize("case", TRAINING_MISTAKES)
def test_mistakes_of_training_are_refused(refused, market, tmp_path, case):
    options, named = TRAINING_MISTAKES[case]
    run = [] if "--config" in options else tiny_run(tmp_path / "model", "--prices", str(market))
    assert named in refused(sft.main, [*run, *options])


DATASET_MISTAKES = {
    "no folder": (lambda folder: shutil.rmtree(folder), {}, "is no dataset"),
    "no windows": (lambda folder: shutil.rmtree(folder / "sft"), {}, "is no dataset"),
    "other horizons": (lambda folder: None, {"horizons": [1, 2]}, "has log_return [1, 2, 5, 10]"),
    "other target": (lambda folder: None, {"target": "volatility"}, "the network predicts volatility"),
    "damaged": (lambda folder: next(folder.glob("series/*")).write_bytes(b"PAR1"), {}, "parquet"),
}


@pytest.mark.parametrize("case", DATASET_MISTAKES)
def test_mistakes_of_a_dataset_are_refused(refused, market, tmp_path, case):
    damage, fields, named = DATASET_MISTAKES[case]
    folder = tmp_path / "stocks"
    build_dataset.main(["--config", "sft", "--prices", str(market), "--output-dir", str(folder)])
    damage(folder)
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((RECIPE / "config.json").read_text()), **fields}))
    run = tiny_run(tmp_path / "model", "--dataset", str(folder), "--model_config", "config.json")
    assert named.lower() in refused(sft.main, run).lower()


def test_a_dataset_of_other_statistics_than_the_checkpoint_is_refused(refused, market, checkpoint, tmp_path):
    folder = tmp_path / "stocks"
    build_dataset.main(
        ["--config", "sft", "--prices", str(market), "--normalization", "minmax", "--output-dir", str(folder)]
    )
    run = ["--dataset", str(folder), "--model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "model")]
    assert f"build it with --extractor {checkpoint}" in refused(sft.main, run)


YAML_MISTAKES = {
    "unknown key": ("learning_rat: 1", "learning_rat"),
    "not YAML": ("{learning_rate", "recipe.yaml"),
    "not a mapping": ("- 1", "recipe.yaml"),
}


@pytest.mark.parametrize("case", YAML_MISTAKES)
def test_mistakes_in_a_recipe_are_refused(refused, tmp_path, case):
    text, named = YAML_MISTAKES[case]
    (tmp_path / "recipe.yaml").write_text(text)
    assert named in refused(sft.main, ["--config", "recipe.yaml"])


CONFIG_MISTAKES = {
    "unknown field's value": ({"num_experts_per_tok": 9}, "9"),
    "wrong type": ({"hidden_size": "wide"}, "wide"),
    "features of other data": ({"num_features": 3}, "3 features"),
    "decreasing horizons": ({"horizons": [5, 1]}, "[5, 1]"),
    "untrained teacher": ({"t2t_num_hidden_layers": 1, "t2t_loss_weight": 0.5}, "t2t_loss_weight=0.5"),
}


@pytest.mark.parametrize("case", CONFIG_MISTAKES)
def test_mistakes_in_a_network_are_refused(refused, market, tmp_path, case):
    fields, named = CONFIG_MISTAKES[case]
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((RECIPE / "config.json").read_text()), **fields}))
    run = tiny_run(tmp_path / "model", "--prices", str(market), "--model_config", "config.json")
    assert named in refused(sft.main, run)


def test_quickstart_refuses_an_unknown_ticker(refused):
    assert "'ZZZ'" in refused(quickstart.main, ["--tickers", "ZZZ"])


def test_a_checkpoint_of_another_head_makes_no_forecast(refused, checkpoint, market, tmp_path):
    """With a regression head at random it would."""
    model, extractor = load_checkpoint(checkpoint)
    folder = tmp_path / "other"
    SpaceExploreModel(model.config).save_pretrained(folder)
    extractor.save_pretrained(folder)
    run = ["--model", str(folder), "--prices", str(market)]
    assert "forecasts no prices: it holds SpaceExploreModel" in refused(forecast.main, run)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["SpaceExploreForRegression"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert "is no checkpoint of a Regression: it has no mean_head.bias" in refused(forecast.main, run)


def test_a_truncated_checkpoint_is_refused(refused, checkpoint, market, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint.iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content[:1000] if path.suffix == ".safetensors" else content)
    complaint = refused(forecast.main, ["--model", str(folder), "--prices", str(market)])
    assert re.search("safetensors|header", complaint)


def test_an_unwritable_output_is_refused(refused, checkpoint, market, tmp_path):
    (tmp_path / "file").write_text("")
    run = ["--model", str(checkpoint), "--prices", str(market), "--output", "file/forecast.csv"]
    assert "file/forecast.csv" in refused(forecast.main, run)


def test_a_broken_table_in_parquet_is_refused(refused, checkpoint, market, tmp_path):
    prices = read_prices(market)
    prices.loc[700, "high"] = prices.loc[700, "low"] / 2
    write_table(prices, tmp_path / "broken.parquet")
    complaint = refused(forecast.main, ["--model", str(checkpoint), "--prices", "broken.parquet", "--strict"])
    assert f"T1 {prices.loc[700, 'date']:%Y-%m-%d}: open" in complaint
