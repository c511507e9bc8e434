"""The pictures: coordinates checked as numbers, files whole or absent."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.stats import norm

from spaceexploreai.evaluation import plots
from spaceexploreai.evaluation.baselines import add_baselines, quantile_columns

LEVELS = np.arange(1, 20) / 20
DATES = pd.bdate_range("2022-01-03", periods=140)
TICKERS = ["AAA", "BBB", "CCC", "DDD", "EEE"]


def make_prices() -> pd.DataFrame:
    rng = np.random.default_rng(5)
    frames = []
    for ticker in TICKERS:
        close = 100 * np.exp(np.cumsum(rng.normal(scale=0.02, size=len(DATES))))
        bars = dict.fromkeys(["open", "high", "low", "close"], close)
        frames.append(pd.DataFrame({"ticker": ticker, "date": DATES, **bars, "volume": 1.0}))
    return pd.concat(frames, ignore_index=True)


def make_forecasts(prices: pd.DataFrame) -> pd.DataFrame:
    """Forecasts from bars 100 to 129 at horizons 1, 2, 5, 10, with realised returns."""
    rng = np.random.default_rng(6)
    frames = []
    for ticker, bars in prices.groupby("ticker"):
        log_close = np.log(bars["close"].to_numpy())
        origins = np.arange(100, 130)
        for horizon in (1, 2, 5, 10):
            mean = rng.normal(scale=0.003, size=len(origins))
            quantiles = mean[:, None] + 0.02 * np.sqrt(horizon) * norm.ppf(LEVELS)
            table = pd.DataFrame(quantiles, columns=quantile_columns(LEVELS))
            table = table.assign(ticker=ticker, horizon=horizon, mean=mean, p_up=0.375)
            table["cutoff"], table["date"] = DATES[origins], DATES[origins + horizon]
            table["y"] = log_close[origins + horizon] - log_close[origins]
            frames.append(table)
    return pd.concat(frames).sort_values(["ticker", "cutoff", "horizon"], ignore_index=True)


PRICES = make_prices()
FORECASTS = add_baselines(make_forecasts(PRICES), PRICES, DATES[99])


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Figures as they were saved."""
    figures = []
    savefig = Figure.savefig

    def record(self, *args, **kwargs):
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def lines(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_xydata()) for line in axes.get_lines()}


def test_price_fan_starts_at_the_close_and_exponentiates():
    rows = pd.DataFrame({"horizon": [1, 5], "q0.1": [-0.1, -0.2], "q0.9": [0.1, np.log(2)], "ewma_q0.9": [0.3, 0.4]})
    fan = plots.price_fan(rows, 50.0, [0.1, 0.9])
    assert fan.index.to_list() == [0, 1, 5]
    assert fan.columns.to_list() == [0.1, 0.9]
    np.testing.assert_allclose(fan[0.1], [50.0, 50 / np.e**0.1, 50 / np.e**0.2])
    np.testing.assert_allclose(fan[0.9], [50.0, 50 * np.e**0.1, 100.0])
    np.testing.assert_allclose(
        plots.price_fan(rows, 50.0, [0.9], "ewma_")[0.9], [50.0, 50 * np.e**0.3, 50 * np.e**0.4]
    )


def test_plot_forecast_draws_the_newest_cutoff_in_prices(tmp_path, drawn):
    plots.plot_forecast(FORECASTS, PRICES, "BBB", tmp_path / "fan.png", history=40)
    axes = drawn[0].axes[0]
    closes = PRICES[PRICES["ticker"] == "BBB"]["close"].to_numpy()
    newest = FORECASTS[(FORECASTS["ticker"] == "BBB") & (FORECASTS["cutoff"] == DATES[129])]
    drawn_lines = lines(axes)
    np.testing.assert_allclose(drawn_lines["close"], np.column_stack([np.arange(-39, 1), closes[90:130]]))
    np.testing.assert_allclose(drawn_lines["realised"], np.column_stack([np.arange(1, 11), closes[130:140]]))
    median = closes[129] * np.exp([0, *newest["q0.5"]])
    np.testing.assert_allclose(drawn_lines["median"], np.column_stack([[0, 1, 2, 5, 10], median]))
    lower = closes[129] * np.exp([0, *newest["ewma_q0.05"]])
    np.testing.assert_allclose(drawn_lines["90% interval, ewma baseline"][:, 1], lower)
    assert (
        axes.get_title() == f"BBB: forecast from the close of {DATES[129]:%Y-%m-%d}\nP(up after 10 trading days) = 38%"
    )
    bands = {band.get_label(): band.get_datalim(axes.transData) for band in axes.collections}
    assert list(bands) == ["90% interval", "80% interval", "50% interval"]
    assert bands["50% interval"].y1 == pytest.approx(closes[129] * np.exp(newest["q0.75"].max()))
    assert bands["90% interval"].y0 == pytest.approx(closes[129] * np.exp(newest["q0.05"].min()))


def test_plot_forecast_ticks_are_real_dates(tmp_path, drawn):
    plots.plot_forecast(FORECASTS, PRICES, "AAA", tmp_path / "fan.png", history=40)
    axes = drawn[0].axes[0]
    ticks = dict(zip(axes.get_xticks(), (label.get_text() for label in axes.get_xticklabels()), strict=True))
    assert ticks == {day: f"{DATES[129 + day]:%Y-%m-%d}" for day in (0, -8, -16, -24, -32, 10)}
    assert axes.get_xticks(minor=True).tolist() == [1, 2, 5]


def test_plot_forecast_of_the_last_bar_has_nothing_realised(tmp_path, drawn):
    known = PRICES[PRICES["date"] <= DATES[129]]
    plots.plot_forecast(FORECASTS, known, "AAA", tmp_path / "fan.png", history=500)
    assert "realised" not in lines(drawn[0].axes[0])
    assert len(lines(drawn[0].axes[0])["close"]) == 130


def test_plot_forecast_writes_a_png_of_known_size(tmp_path):
    path = tmp_path / "fan.png"
    plots.plot_forecast(FORECASTS, PRICES, "AAA", path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = imread(path)
    assert picture.shape[:2] == (900, 1500)
    assert picture[..., :3].std() > 0.05
    assert list(tmp_path.iterdir()) == [path]


def test_plot_predicted_vs_actual_draws_percent_at_the_middle_horizon(tmp_path, drawn):
    path = tmp_path / "compare.png"
    fewer = FORECASTS[(FORECASTS["ticker"] != "BBB") | (FORECASTS["cutoff"] > DATES[115])]
    plots.plot_predicted_vs_actual(fewer, path)
    *panels, scatter = drawn[0].axes
    assert [panel.get_ylabel().split("\n")[0] for panel in panels] == ["AAA", "CCC", "DDD", "EEE"]
    rows = fewer[(fewer["ticker"] == "CCC") & (fewer["horizon"] == 5)]
    panel = {label: xy[:, 1] for label, xy in lines(panels[1]).items()}
    np.testing.assert_allclose(panel["realised"], 100 * rows["y"])
    np.testing.assert_allclose(panel["median, predicted"], 100 * rows["q0.5"])
    np.testing.assert_allclose(panel["90% interval, ewma baseline"], 100 * rows["ewma_q0.05"])
    assert panels[1].get_lines()[2].get_xdata()[0] == rows["date"].iloc[0].to_datetime64()
    everyone = fewer[fewer["horizon"] == 5]
    np.testing.assert_allclose(lines(scatter)["one forecast"], 100 * everyone[["mean", "y"]])
    correlation = everyone["mean"].corr(everyone["y"])
    assert scatter.get_title() == f"tickers: 5, forecasts: {len(everyone)}\ncorrelation: {correlation:+.3f}"
    identity = lines(scatter)["predicted = realised"]
    np.testing.assert_array_equal(identity[:, 0], identity[:, 1])
    assert imread(path).shape[:2] == (1560, 2100)


def test_plot_predicted_vs_actual_of_one_ticker_and_a_constant_mean(tmp_path, drawn):
    path = tmp_path / "compare.png"
    plots.plot_predicted_vs_actual(FORECASTS[FORECASTS["ticker"] == "AAA"].assign(mean=0.0), path)
    assert drawn[0].axes[-1].get_title().endswith("correlation: undefined (constant)")
    assert imread(path).shape[:2] == (825, 2100)


def test_plot_predicted_vs_actual_leaves_out_the_unknown(tmp_path, drawn):
    unknown = FORECASTS["cutoff"] > DATES[120]
    plots.plot_predicted_vs_actual(FORECASTS.assign(y=FORECASTS["y"].mask(unknown)), tmp_path / "compare.png")
    assert len(lines(drawn[0].axes[0])["realised"]) == 21


def test_a_ticker_without_forecast_is_named(tmp_path):
    with pytest.raises(ValueError, match="no ticker 'ZZZ'"):
        plots.plot_forecast(FORECASTS, PRICES, "ZZZ", tmp_path / "fan.png")
    assert not any(tmp_path.iterdir())


def test_a_cutoff_without_a_bar_is_named(tmp_path):
    gap = PRICES[PRICES["date"] != DATES[129]]
    with pytest.raises(ValueError, match=f"AAA has no bar in the price table on its cutoff {DATES[129]:%Y-%m-%d}"):
        plots.plot_forecast(FORECASTS, gap, "AAA", tmp_path / "fan.png")
    with pytest.raises(ValueError, match="AAA has no bar"):
        plots.plot_forecast(FORECASTS, PRICES[PRICES["ticker"] == "BBB"], "AAA", tmp_path / "fan.png")


@pytest.mark.parametrize("column", ["q0.25", "ewma_q0.95"])
def test_a_missing_column_is_named(tmp_path, column):
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        plots.plot_forecast(FORECASTS.drop(columns=column), PRICES, "AAA", tmp_path / "fan.png")


def test_no_outcome_at_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to plot: none of the 600 forecasts"):
        plots.plot_predicted_vs_actual(FORECASTS.assign(y=np.nan), tmp_path / "compare.png")
    with pytest.raises(ValueError, match="no column 'y'"):
        plots.plot_predicted_vs_actual(FORECASTS.drop(columns="y"), tmp_path / "compare.png")


@pytest.mark.parametrize("failing", ["matplotlib.figure.Figure.savefig", "os.replace"])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failing):
    path = tmp_path / "fan.png"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="disk full"):
        plots.plot_forecast(FORECASTS, PRICES, "AAA", path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_global_figure_is_left_behind(tmp_path):
    plots.plot_forecast(FORECASTS, PRICES, "AAA", tmp_path / "fan.png")
    plots.plot_predicted_vs_actual(FORECASTS, tmp_path / "compare.png")
    assert pyplot.get_fignums() == []
