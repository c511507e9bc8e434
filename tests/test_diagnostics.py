"""The pictures of failures: what is drawn is what SciPy, pandas or a count by hand gives."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot, rcParams
from scipy.stats import norm, spearmanr
from test_plots import lines, saved

from spaceexploreai.evaluation import diagnostics
from spaceexploreai.evaluation.inference import critical_value, standard_error

LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]
DATES = pd.bdate_range("2022-01-03", periods=80)
HORIZONS = (1, 2, 5, 10)


def make_forecasts(tickers: int = 12, sharp: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Outcomes are normal with the model's own mean, and sd 1/`sharp` of its; ewma knows their sd. The ranks of drift
    are those of the outcomes, the other way round; zero has none, those of last and ewma are noise."""
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product([range(tickers), DATES, HORIZONS], names=["ticker", "cutoff", "horizon"])
    table = index.to_frame(index=False)
    table["ticker"] = "T" + table["ticker"].astype(str)
    count, sd = len(table), 0.02 * np.sqrt(table["horizon"].to_numpy())
    table["mean"] = rng.normal(0, 0.01, count)
    table["y"] = table["mean"] + sd / sharp * rng.normal(size=count)
    for level in LEVELS:
        table[f"q{level:g}"] = table["mean"] + sd * norm.ppf(level)
        table[f"ewma_q{level:g}"] = sd / sharp * norm.ppf(level)
    means = {"zero": 0.0, "drift": -table["y"], "last": rng.normal(size=count), "ewma": rng.normal(size=count)}
    return table.assign(**{f"{name}_mean": mean for name, mean in means.items()})


FORECASTS = make_forecasts()


def of_horizon(horizon: int, forecasts: pd.DataFrame = FORECASTS) -> pd.DataFrame:
    return forecasts[forecasts["horizon"] == horizon]


# --- calibration ---


def test_reliability_is_the_share_of_outcomes_below_each_quantile():
    figure = diagnostics.plot_calibration(FORECASTS)
    for axes, horizon in zip(figure.axes[::2], HORIZONS, strict=True):
        rows, drawn = of_horizon(horizon), lines(axes)
        for name, prefix in (("model", ""), ("ewma", "ewma_")):
            expected = [(rows["y"] < rows[f"{prefix}q{level:g}"]).mean() for level in LEVELS]
            np.testing.assert_allclose(drawn[name], np.column_stack([LEVELS, expected]))
        assert axes.get_ylabel().startswith(f"{horizon} trading day{'s' if horizon > 1 else ''}\n")


def test_pit_bars_are_the_share_between_quantiles_over_what_is_expected():
    rows = of_horizon(5)
    axes = diagnostics.plot_calibration(FORECASTS).axes[5]
    edges = np.array([0, *LEVELS, 1])
    for steps, prefix in zip(axes.patches, ("", "ewma_"), strict=True):
        quantiles = rows[[f"{prefix}q{level:g}" for level in LEVELS]].to_numpy()
        bins = [np.searchsorted(row, y) for row, y in zip(quantiles, rows["y"], strict=True)]
        shares = np.bincount(bins, minlength=len(edges) - 1) / len(rows)
        np.testing.assert_allclose(steps.get_data().values, shares / np.diff(edges))
        np.testing.assert_allclose(steps.get_data().edges, edges)


def test_a_calibrated_forecast_is_inside_of_its_band_and_a_wide_one_is_not():
    def diagonal_is_inside(forecasts):
        (axes, _) = diagnostics.plot_calibration(of_horizon(1, forecasts)).axes
        corners = axes.collections[0].get_paths()[0].vertices
        bounds = [np.sort(corners[np.isclose(corners[:, 0], level), 1])[[0, -1]] for level in LEVELS]
        return [low <= level <= high for level, (low, high) in zip(LEVELS, bounds, strict=True)]

    assert all(diagonal_is_inside(FORECASTS))
    assert diagonal_is_inside(make_forecasts(sharp=2.0)) == [False, False, True, False, False]


def test_an_outcome_on_a_quantile_counts_half():
    still = FORECASTS.assign(y=0.0, **{"q0.5": 0.0})
    drawn = lines(diagnostics.plot_calibration(still).axes[0])["model"]
    assert drawn[LEVELS.index(0.5), 1] == 0.5


def test_of_many_horizons_four_are_drawn_from_the_first_to_the_last():
    many = pd.concat([of_horizon(1).assign(horizon=horizon) for horizon in range(1, 11)])
    labels = [axes.get_ylabel().split(" ")[0] for axes in diagnostics.plot_calibration(many).axes[::2]]
    assert labels == ["1", "4", "7", "10"]


# --- ranks ---


def rank_correlations(rows: pd.DataFrame, column: str) -> np.ndarray:
    return np.array([spearmanr(group[column], group["y"])[0] for _, group in rows.groupby("cutoff")])


def test_rank_ic_is_drawn_beside_the_two_strongest_baselines():
    upper, lower = diagnostics.plot_rank_ic(FORECASTS).axes
    rows = of_horizon(5)
    names = [text.get_text() for text in lower.get_legend().get_texts()]
    weak = max(("last", "ewma"), key=lambda name: abs(rank_correlations(rows, f"{name}_mean").mean()))
    columns = {"model": "mean", "drift": "drift_mean", weak: f"{weak}_mean"}
    assert [name.split(":")[0] for name in names] == list(columns)
    drawn = [(above, below) for above, below in zip(upper.get_lines(), lower.get_lines(), strict=True)][:3]
    for (above, below), name, column in zip(drawn, names, columns.values(), strict=True):
        expected = rank_correlations(rows, column)
        np.testing.assert_allclose(below.get_ydata(), expected.cumsum())
        np.testing.assert_array_equal(below.get_xdata(), DATES)
        rolling = [expected[end - 60 : end].mean() for end in range(60, 81)]
        np.testing.assert_allclose(above.get_ydata()[59:], rolling)
        assert np.isnan(above.get_ydata()[:59]).all()
        assert f"mean {expected.mean():+.3f} " in name
    assert names[1].startswith("drift: mean -1.000")  # the strongest, on whichever side


def test_the_band_is_of_the_dates_that_the_mean_is_of():
    upper, _ = diagnostics.plot_rank_ic(FORECASTS).axes
    expected = rank_correlations(of_horizon(5), "mean")
    half = critical_value(60, 5) * standard_error(expected[-60:], 5)
    corners = upper.collections[0].get_paths()[-1].vertices
    last = corners[corners[:, 0] == corners[:, 0].max(), 1]
    assert last.min() == pytest.approx(expected[-60:].mean() - half)
    assert last.max() == pytest.approx(expected[-60:].mean() + half)


def test_a_short_history_is_averaged_whole():
    upper, _ = diagnostics.plot_rank_ic(FORECASTS[FORECASTS["cutoff"] < DATES[20]]).axes
    assert upper.get_ylabel() == "RankIC, mean of 20 dates"
    assert np.isfinite(upper.get_lines()[0].get_ydata()).sum() == 1


def test_classes_are_ranked_by_their_probabilities():
    p_up = FORECASTS["mean"].rank(pct=True)
    of_classes = FORECASTS.drop(columns="mean").assign(p_up=p_up / 2, p_flat=0.5, p_down=0.5 - p_up / 2)
    figures = [diagnostics.plot_rank_ic(table) for table in (FORECASTS, of_classes)]
    curves = [figure.axes[1].get_lines()[0].get_ydata() for figure in figures]
    np.testing.assert_allclose(*curves)


def test_too_few_tickers_have_no_ranks():
    with pytest.raises(ValueError, match="a date needs 10 tickers whose forecasts differ, here it has 9 at most"):
        diagnostics.plot_rank_ic(make_forecasts(tickers=9))


# --- classes ---


def test_confusion_counts_what_was_most_probable():
    probabilities = [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]]
    table = pd.DataFrame(probabilities, columns=["p_down", "p_flat", "p_up"])
    table = table.assign(horizon=2, band=0.01, y=[-0.02, -0.02, 0.005, 0.03])
    (axes,) = diagnostics.plot_confusion(table).axes
    written = np.array([text.get_text() for text in axes.texts]).reshape(3, 3)
    expected = [["50%\n1", "0%\n0", "50%\n1"], ["0%\n0", "100%\n1", "0%\n0"], ["0%\n0", "0%\n0", "100%\n1"]]
    assert written.tolist() == expected
    np.testing.assert_allclose(axes.get_images()[0].get_array(), [[0.5, 0, 0.5], [0, 1, 0], [0, 0, 1]])
    assert axes.get_title() == "2 trading days: right 75.0%, base rate 50.0%"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["down", "flat", "up"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("forecast", "came true")


def test_confusion_of_quantiles_has_a_panel_for_each_horizon():
    figure = diagnostics.plot_confusion(FORECASTS[FORECASTS["horizon"] > 1].assign(band=0.01))
    titles = [axes.get_title().split(":")[0] for axes in figure.axes]
    assert titles == ["2 trading days", "5 trading days", "10 trading days", ""]
    assert not figure.axes[-1].axison
    total = sum(int(text.get_text().split("\n")[1]) for text in figure.axes[0].texts)
    assert total == len(of_horizon(2))


# --- experts ---


def test_expert_usage_draws_shares_beside_balance():
    load = np.array([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]])
    figure = diagnostics.plot_expert_usage(load)
    for axes, shares in zip(figure.axes, load, strict=True):
        np.testing.assert_allclose([bar.get_height() for bar in axes.patches], shares)
        np.testing.assert_allclose(lines(axes)["balance, 1/4"][:, 1], 0.25)
    assert [axes.get_ylabel() for axes in figure.axes] == ["MoE layer 1", "MoE layer 2"]


@pytest.mark.parametrize("load", [[0.5, 0.5], [[0.5, 0.25]], np.zeros((0, 4))])
def test_what_is_no_load_is_refused(load):
    with pytest.raises(ValueError, match="the load of experts must be"):
        diagnostics.plot_expert_usage(load)


# --- all of them ---

DRAWN = {
    diagnostics.plot_calibration: ["y", "horizon", "cutoff", "ewma_q0.25"],
    diagnostics.plot_rank_ic: ["y", "ticker", "cutoff", "drift_mean"],
    diagnostics.plot_confusion: ["y", "horizon", "band"],
}


@pytest.mark.parametrize(("draw", "column"), [(draw, column) for draw, columns in DRAWN.items() for column in columns])
def test_a_missing_column_is_named(draw, column):
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        draw(FORECASTS.assign(band=0.01).drop(columns=column))


@pytest.mark.parametrize("draw", DRAWN)
def test_what_has_no_outcome_is_left_out_or_refused(draw):
    table = FORECASTS.assign(band=0.01)
    with pytest.raises(ValueError, match="nothing to plot: none of the 3840 forecasts"):
        draw(table.assign(y=np.nan))
    later = table.assign(cutoff=table["cutoff"] + pd.Timedelta(days=365), y=np.nan)
    with_later, without = (saved(draw(one)).getvalue() for one in (pd.concat([table, later]), table))
    assert with_later == without


def test_nothing_global_is_touched_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = dict(rcParams)
    for draw in DRAWN:
        draw(FORECASTS.assign(band=0.01))
    diagnostics.plot_expert_usage([[0.5, 0.5]])
    assert pyplot.get_fignums() == []
    assert dict(rcParams) == settings
    assert not any(tmp_path.iterdir())
