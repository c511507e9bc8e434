"""The report of a run: figures are those of the evaluation, and every option that was set is there."""

import json

import numpy as np
import pytest
import yaml
from conftest import tiny_run
from huggingface_hub import ModelCard

from spaceexploreai.data.prices import read_prices
from spaceexploreai.data.windows import DateRange
from spaceexploreai.evaluation.scores import score
from spaceexploreai.scripts.evaluate import forecast_range
from spaceexploreai.train import report
from spaceexploreai.train.arguments import parse_run
from spaceexploreai.train.sft import fit, main, prepare


@pytest.fixture(scope="module")
def written(tmp_path_factory, market):
    folder = tmp_path_factory.mktemp("reported")
    main(tiny_run(folder, "--prices", str(market), "--learning_rate", "3e-4", "--balance", "year"))
    return folder


def test_the_report_says_what_was_done(written, market):
    text = (written / "report.md").read_text()
    config = json.loads((written / "config.json").read_text())
    options = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert options["prices"] == str(market)
    assert (options["learning_rate"], options["balance"], options["max_steps"]) == (3e-4, ["year"], 4)
    assert "weight_decay" in options  # of the recipe
    assert "adam_epsilon" not in options  # as by default
    assert f"to {config['train_cutoff']}; no label reaches beyond it" in text
    assert "1,200 rows read, 0 removed" in text
    assert "4 steps of 32 windows" in text
    assert (written / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_is_the_report_under_a_head(written):
    card = ModelCard.load(written / "README.md")
    assert card.data.pipeline_tag == "time-series-forecasting"
    assert card.data.library_name == "transformers"
    assert card.text.strip() == (written / "report.md").read_text().strip()


def test_the_scores_are_those_of_the_evaluation(tmp_path, market):
    """Of the same dates by `scripts/evaluate.py`, whose forecasts are made day by day from whole contexts."""
    run = parse_run(tiny_run(tmp_path, "--prices", str(market), "--stride", "1"))
    trainer, task, data = prepare(run)
    fit(trainer, data, run)
    table = report.forecast_table(task, trainer.predict(task.validation), data)
    prices = read_prices(market)
    within = DateRange(table["cutoff"].min(), table["cutoff"].max())
    expected = forecast_range(trainer.model.eval(), data.extractor, prices, within, stride=1)
    both = table.merge(expected, on=["ticker", "cutoff", "horizon"], suffixes=("", "_expected"))
    assert len(both) == len(table) == len(expected)
    np.testing.assert_allclose(both["y"], both["y_expected"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(both["q0.95"], both["q0.95_expected"], rtol=1e-3, atol=1e-6)
    assert (both["date"] == both["date_expected"]).all()
    ours = score(report.add_baselines(table, report.closes(data.validation.series, table["ticker"].unique())))
    theirs = score(expected.dropna(subset="y"))
    merged = ours.merge(theirs, on=["horizon", "metric"], suffixes=("", "_expected"))
    beside = merged["metric"].isin(["crps_skill", "crps_skill_se", "mase"])  # of other histories, as the baselines
    own = merged[~beside]
    np.testing.assert_allclose(own["model"], own["model_expected"], rtol=1e-3, atol=1e-3)
    errors = merged[merged["metric"].isin(["mse", "mae", "mase", "crps"])]
    for name in ("zero", "drift", "last", "ewma"):  # without the bars before the volatility is known
        np.testing.assert_allclose(errors[name], errors[f"{name}_expected"], rtol=0.03)


def test_a_large_market_is_reported_by_some_of_its_tickers(tmp_path, market, monkeypatch):
    trainer, task, data = prepare(parse_run(tiny_run(tmp_path, "--prices", str(market))))
    prediction = trainer.predict(task.validation)
    whole = report.forecast_table(task, prediction, data)
    monkeypatch.setattr(report, "MAX_ORIGINS", len(whole) // len(task.horizons) // 2)
    part = report.forecast_table(task, prediction, data)
    assert set(part["ticker"]) < set(whole["ticker"])
    assert set(part["cutoff"]) == set(whole["cutoff"])


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_other_heads_report_their_metrics(tmp_path, market, task):
    main(tiny_run(tmp_path, "--prices", str(market), "--task", task))
    text = (tmp_path / "report.md").read_text()
    assert "| log_loss_skill |" in text
    assert "per_second" not in text
