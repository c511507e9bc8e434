"""The mean is multiplied by what the validation dates tell, and nothing else is."""

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from spaceexploreai.data.prices import read_prices
from spaceexploreai.data.windows import DateRange
from spaceexploreai.scripts.evaluate import forecast_range
from spaceexploreai.scripts.forecasters import load_checkpoint
from spaceexploreai.scripts.shrink_mean import main, selection_range, slopes

WITHIN = DateRange(pd.Timestamp("2020-01-01"), pd.Timestamp("2020-12-31"))


def make_table(slope: float, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    mean = generator.normal(size=500)
    dates = pd.Timestamp("2020-06-01") + pd.to_timedelta(np.arange(500) % 100, unit="D")
    return pd.DataFrame({"horizon": 1, "date": dates, "mean": mean, "y": slope * mean + generator.normal(size=500)})


@pytest.mark.parametrize("slope", [-2.0, 0.4, 3.0])
def test_slopes_are_those_of_least_squares_within_bounds(slope):
    two = pd.concat([make_table(slope), make_table(0.5, seed=1).assign(horizon=5)])
    found = slopes(two, WITHIN)
    for horizon, rows in two.groupby("horizon"):
        expected = np.linalg.lstsq(rows[["mean"]], rows["y"])[0].item()
        assert found[horizon] == pytest.approx(np.clip(expected, 0, 1))


def test_what_was_realised_later_or_never_tells_nothing():
    table = make_table(0.4)
    later = table.assign(date=WITHIN.end + pd.Timedelta(days=1), y=-table["mean"])
    unknown = table.assign(y=np.nan)
    assert slopes(pd.concat([table, later, unknown]), WITHIN) == slopes(table, WITHIN)


def test_a_mean_that_says_nothing_stays_nothing():
    assert slopes(make_table(0.4).assign(mean=0.0), WITHIN) == {1: 0.0}


def test_a_horizon_of_which_nothing_is_known_is_refused():
    unknown = make_table(0.4).assign(horizon=5, y=np.nan)
    with pytest.raises(ValueError, match="before any return over 5 days of 2020-01-01 to 2020-12-31 is known"):
        slopes(pd.concat([make_table(0.4), unknown]), WITHIN)


def test_the_mean_alone_is_shrunk(checkpoint, market, tmp_path, capsys):
    checkpoint = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (checkpoint / "report.md").write_text("a report\n")
    before, extractor = load_checkpoint(checkpoint)
    prices, within = read_prices(market), selection_range(before.config)
    expected = slopes(forecast_range(before, extractor, prices, within), within)
    main(["--model", str(checkpoint), "--prices", str(market), "--output-dir", str(tmp_path / "shrunk")])
    assert str(expected) in capsys.readouterr().out
    after, _ = load_checkpoint(tmp_path / "shrunk")
    batch = extractor(prices)
    with torch.inference_mode():
        one, other = before(**batch), after(**batch)
    factors = torch.tensor(list(expected.values()))
    torch.testing.assert_close(other.mean, one.mean * factors)
    torch.testing.assert_close(other.quantiles, one.quantiles)
    report = (tmp_path / "shrunk" / "report.md").read_text()
    assert report.startswith("a report\n")
    assert str(expected) in report.splitlines()[-1]
    assert {path.name for path in checkpoint.iterdir() if path.is_file()} == {
        path.name for path in (tmp_path / "shrunk").iterdir()
    }


@pytest.mark.parametrize(("train", "chosen"), [(None, "2019-01-01"), ("2019-01-01", None), ("2019-01-01",) * 2])
def test_a_checkpoint_without_dates_of_its_own_is_refused(train, chosen):
    with pytest.raises(ValueError, match="there are no dates that the checkpoint was chosen by"):
        selection_range(SimpleNamespace(train_cutoff=train, selection_cutoff=chosen))


def test_nothing_is_written_over(checkpoint, market, refused, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert "exists and is not an empty folder" in refused(
        main, ["--model", str(checkpoint), "--prices", str(market), "--output-dir", str(tmp_path / "there")]
    )
