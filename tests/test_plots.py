"""The pictures: coordinates checked as numbers, on figures that no global state knows of."""

from io import BytesIO
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot, rcParams
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
        open_ = close * np.exp(rng.normal(scale=0.01, size=len(DATES)))
        high, low = np.maximum(open_, close) * 1.004, np.minimum(open_, close) * 0.996
        bars = {"open": open_, "high": high, "low": low, "close": close}
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
FORECASTS = add_baselines(make_forecasts(PRICES), PRICES)


def pixels(figure: Figure) -> tuple[float, float]:
    """Width and height."""
    return tuple(figure.get_size_inches() * figure.dpi)


def saved(figure: Figure) -> BytesIO:
    file = BytesIO()
    figure.savefig(file)
    file.seek(0)
    return file


def words_to(cutoff: int) -> list[dict]:
    """Three patches of 12 days that overlap by 4, the newest ending on the cutoff; places among `DATES`."""
    said = [("surge", 0.9), ("slip", 0.5), ("flat", 0.7)]
    starts = [cutoff - 11 - 8 * age for age in (2, 1, 0)]
    return [
        {"start": DATES[start], "end": DATES[start + 11], "word": word, "probability": sure}
        for start, (word, sure) in zip(starts, said, strict=True)
    ]


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


def test_plot_forecast_draws_the_newest_cutoff_in_prices():
    (axes,) = plots.plot_forecast(FORECASTS, PRICES, "BBB", history=40).axes
    closes = PRICES[PRICES["ticker"] == "BBB"]["close"].to_numpy()
    newest = FORECASTS[(FORECASTS["ticker"] == "BBB") & (FORECASTS["cutoff"] == DATES[129])]
    drawn_lines = lines(axes)
    np.testing.assert_allclose(drawn_lines["realised"], np.column_stack([np.arange(1, 11), closes[130:140]]))
    median = closes[129] * np.exp([0, *newest["q0.5"]])
    np.testing.assert_allclose(drawn_lines["median"], np.column_stack([[0, 1, 2, 5, 10], median]))
    lower = closes[129] * np.exp([0, *newest["ewma_q0.05"]])
    np.testing.assert_allclose(drawn_lines["90% interval, ewma baseline"][:, 1], lower)
    assert (
        axes.get_title() == f"BBB: forecast from the close of {DATES[129]:%Y-%m-%d}\nP(up after 10 trading days) = 38%"
    )
    bands = {band.get_label(): band.get_datalim(axes.transData) for band in axes.collections[1:]}
    assert list(bands) == ["90% interval", "80% interval", "50% interval"]
    assert bands["50% interval"].y1 == pytest.approx(closes[129] * np.exp(newest["q0.75"].max()))
    assert bands["90% interval"].y0 == pytest.approx(closes[129] * np.exp(newest["q0.05"].min()))


def test_plot_forecast_draws_a_candle_for_each_bar_to_the_cutoff():
    (axes,) = plots.plot_forecast(FORECASTS, PRICES, "BBB", history=40).axes
    bars = PRICES[(PRICES["ticker"] == "BBB") & PRICES["date"].between(DATES[90], DATES[129])]
    reach = np.array([line[:, 1] for line in axes.collections[0].get_segments()])
    np.testing.assert_allclose(reach, bars[["low", "high"]])
    bodies = {container.get_label(): container.patches for container in axes.containers}
    assert {name: body[0].get_facecolor()[:3] for name, body in bodies.items()} == {
        "day that rose": (1, 1, 1),
        "day that fell": (0.45, 0.45, 0.45),
    }
    place = {round(box.get_x() + box.get_width() / 2): (name, box) for name in bodies for box in bodies[name]}
    assert sorted(place) == list(range(-39, 1))
    for day, (first, last) in enumerate(zip(bars["open"], bars["close"], strict=True), -39):
        name, box = place[day]
        assert name == ("day that rose" if last >= first else "day that fell")
        assert sorted([box.get_y(), box.get_y() + box.get_height()]) == pytest.approx(sorted([first, last]))


def test_plot_forecast_puts_each_word_under_its_days():
    axes, strip = plots.plot_forecast(FORECASTS, PRICES, "BBB", history=40, words=words_to(129)).axes
    assert [text.get_text() for text in strip.texts] == ["surge 90%", "slip 50%", "flat 70%"]
    boxes = [(box.get_x(), box.get_x() + box.get_width()) for box in strip.patches]
    np.testing.assert_allclose(boxes, [(-27.5, -15.5), (-19.5, -7.5), (-11.5, 0.5)])
    rows = [round(box.get_y() + box.get_height() / 2) for box in strip.patches]
    assert rows == [0, 1, 0]  # those that overlap are not drawn over each other
    assert strip.get_xlim() == axes.get_xlim()
    assert f"{DATES[129]:%Y-%m-%d}" in [label.get_text() for label in strip.get_xticklabels()]


def test_words_that_begin_before_the_chart_are_left_out_and_later_ones_refused():
    _, strip = plots.plot_forecast(FORECASTS, PRICES, "BBB", history=25, words=words_to(129)).axes
    assert [text.get_text() for text in strip.texts] == ["slip 50%", "flat 70%"]
    with pytest.raises(ValueError, match="the word 'flat' is of days after the cutoff"):
        plots.plot_forecast(FORECASTS, PRICES, "BBB", words=words_to(130))


@pytest.mark.parametrize("ticker", [r"$\nothing{$", "<b>&amp;"])
def test_a_ticker_is_text_not_a_formula(ticker):
    prices, forecasts = (table.replace({"ticker": {"AAA": ticker}}) for table in (PRICES, FORECASTS))
    figures = plots.plot_forecast(forecasts, prices, ticker), plots.plot_predicted_vs_actual(forecasts)
    assert figures[0].axes[0].get_title().startswith(ticker)
    assert ticker in [axes.get_ylabel().split("\n")[0] for axes in figures[1].axes]
    for figure in figures:
        assert saved(figure).getvalue().startswith(b"\x89PNG")


def test_a_horizon_of_one_day_has_one_date_under_the_fan():
    """The dates of the cutoff and of the next day would be written over each other."""
    (axes,) = plots.plot_forecast(FORECASTS[FORECASTS["horizon"] == 1], PRICES, "AAA").axes
    assert axes.get_title().endswith("P(up after 1 trading day) = 38%")
    assert axes.get_xticks().tolist() == [-12, -24, -36, -48, 1]


def test_a_notice_stands_once_above_the_whole_figure():
    figure = plots.plot_predicted_vs_actual(FORECASTS)
    title = figure.get_suptitle()
    notice = "IN SAMPLE: " + "the model was trained on these dates, which is no evaluation, " * 3
    for _ in range(2):
        plots.stamp(figure, [notice, "second $"])
    *first, second, last = figure.get_suptitle().split("\n")
    assert " ".join(first) == notice.strip()
    assert (second, last) == ("second $", title)
    figure.draw_without_rendering()
    written = figure._suptitle.get_window_extent()
    assert written.x0 >= 0
    assert written.x1 <= pixels(figure)[0]
    assert written.y0 >= max(axes.get_tightbbox().y1 for axes in figure.axes)
    untouched = plots.stamp(plots.plot_predicted_vs_actual(FORECASTS), [])
    assert untouched.get_suptitle() == title


def test_plot_forecast_ticks_are_real_dates():
    (axes,) = plots.plot_forecast(FORECASTS, PRICES, "AAA", history=40).axes
    ticks = dict(zip(axes.get_xticks(), (label.get_text() for label in axes.get_xticklabels()), strict=True))
    assert ticks == {day: f"{DATES[129 + day]:%Y-%m-%d}" for day in (0, -8, -16, -24, -32, 10)}
    assert axes.get_xticks(minor=True).tolist() == [1, 2, 5]


def test_numbers_of_many_days_do_not_touch():
    (first,) = (rows for key, rows in FORECASTS.groupby("horizon") if key == 1)
    daily = pd.concat([first.assign(horizon=day) for day in range(1, 25)])
    figure = plots.plot_forecast(daily, PRICES, "AAA")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = axes.get_xticklabels(minor=True)
    assert len(labels) >= 3
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_plot_forecast_of_the_last_bar_has_nothing_realised():
    known = PRICES[PRICES["date"] <= DATES[129]]
    (axes,) = plots.plot_forecast(FORECASTS, known, "AAA", history=500).axes
    assert "realised" not in lines(axes)
    assert sum(map(len, axes.containers)) == 130


def test_plot_forecast_shows_sixty_days_by_default():
    (axes,) = plots.plot_forecast(FORECASTS, PRICES, "AAA").axes
    np.testing.assert_array_equal([line[0, 0] for line in axes.collections[0].get_segments()], np.arange(-59, 1))


def test_plot_forecast_is_a_png_of_known_size():
    figure = plots.plot_forecast(FORECASTS, PRICES, "AAA")
    assert pixels(figure) == (1500, 900)
    file = saved(figure)
    assert file.getvalue().startswith(b"\x89PNG\r\n\x1a\n")
    picture = imread(file)
    assert picture.shape[:2] == (900, 1500)
    assert picture[..., :3].std() > 0.05


def test_figures_name_what_they_draw_once():
    fan = plots.plot_forecast(FORECASTS, PRICES, "AAA")
    names = [text.get_text() for text in fan.legends[0].get_texts()]
    intervals = ["90% interval", "80% interval", "50% interval"]
    candles = ["day that rose", "day that fell"]
    assert sorted(names) == sorted([*candles, "realised", "median", "90% interval, ewma baseline", *intervals])
    compare = plots.plot_predicted_vs_actual(FORECASTS)
    names = [text.get_text() for text in compare.legends[0].get_texts()]
    interval = "90% interval, predicted"
    assert sorted(names) == sorted([interval, "90% interval, ewma baseline", "realised", "median, predicted"])


def test_plot_predicted_vs_actual_draws_percent_at_the_middle_horizon():
    fewer = FORECASTS[(FORECASTS["ticker"] != "BBB") | (FORECASTS["cutoff"] > DATES[115])]
    figure = plots.plot_predicted_vs_actual(fewer)
    *panels, scatter = figure.axes
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
    np.testing.assert_allclose(pixels(figure), (1500, 1260))
    assert imread(saved(figure)).shape[:2] == (1260, 1500)


def test_plot_predicted_vs_actual_of_one_ticker_and_a_constant_mean():
    figure = plots.plot_predicted_vs_actual(FORECASTS[FORECASTS["ticker"] == "AAA"].assign(mean=0.0))
    assert figure.axes[-1].get_title().endswith("correlation: undefined (constant)")
    np.testing.assert_allclose(pixels(figure), (1500, 675))
    assert imread(saved(figure)).shape[:2] == (675, 1500)


def test_plot_predicted_vs_actual_leaves_out_the_unknown():
    unknown = FORECASTS["cutoff"] > DATES[120]
    figure = plots.plot_predicted_vs_actual(FORECASTS.assign(y=FORECASTS["y"].mask(unknown)))
    assert len(lines(figure.axes[0])["realised"]) == 21


def test_a_ticker_without_forecast_is_named():
    with pytest.raises(ValueError, match="no ticker 'ZZZ'"):
        plots.plot_forecast(FORECASTS, PRICES, "ZZZ")


def test_a_cutoff_without_a_bar_is_named():
    gap = PRICES[PRICES["date"] != DATES[129]]
    with pytest.raises(ValueError, match=f"AAA has no bar in the price table on its cutoff {DATES[129]:%Y-%m-%d}"):
        plots.plot_forecast(FORECASTS, gap, "AAA")
    with pytest.raises(ValueError, match="AAA has no bar"):
        plots.plot_forecast(FORECASTS, PRICES[PRICES["ticker"] == "BBB"], "AAA")


@pytest.mark.parametrize("column", ["q0.25", "ewma_q0.95"])
def test_a_missing_column_is_named(column):
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        plots.plot_forecast(FORECASTS.drop(columns=column), PRICES, "AAA")


def test_no_outcome_at_all_is_refused():
    with pytest.raises(ValueError, match="nothing to plot: none of the 600 forecasts"):
        plots.plot_predicted_vs_actual(FORECASTS.assign(y=np.nan))
    with pytest.raises(ValueError, match="no column 'y'"):
        plots.plot_predicted_vs_actual(FORECASTS.drop(columns="y"))


def test_nothing_global_is_touched_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = dict(rcParams)
    plots.plot_forecast(FORECASTS, PRICES, "AAA")
    plots.plot_predicted_vs_actual(FORECASTS)
    assert pyplot.get_fignums() == []
    assert dict(rcParams) == settings
    assert not any(tmp_path.iterdir())


def test_plot_equity_draws_each_portfolio_and_what_it_lost():
    index = pd.bdate_range("2022-01-03", periods=5)
    equity = pd.DataFrame({"strategy": [1, 1.2, 0.9, 1.5, 1.2], "equal_weight": [2, 1, 2, 3, 3.0]}, index=index)
    figure = plots.plot_equity(equity, "long, top 2")
    upper, lower = figure.axes
    assert upper.get_yscale() == "log"
    assert upper.get_title() == "long, top 2"
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["strategy: +20.0%", "equal weight: +50.0%"]
    for column, curve, lost in zip(equity, upper.get_lines(), lower.get_lines(), strict=True):
        np.testing.assert_array_equal(curve.get_ydata(), equity[column])
        assert curve.get_color() == lost.get_color()
        assert curve.get_linestyle() == lost.get_linestyle()
    np.testing.assert_allclose(lower.get_lines()[0].get_ydata(), [0, 0, -25, 0, -20])
    np.testing.assert_allclose(lower.get_lines()[1].get_ydata(), [0, -50, 0, 0, 0])
    assert len({line.get_linestyle() for line in upper.get_lines()}) == 2  # told apart in print
    assert imread(saved(figure)).shape[:2] == (1050, 1500)
