"""The notebook runs from its first cell to its last, and shows what it says."""

import nbformat
import pytest
from conftest import RECIPE
from nbclient import NotebookClient

NOTEBOOK = RECIPE.parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> list[dict]:
    """What every code cell shows last, by kind of content."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = [
        [one for one in cell.outputs if one.output_type == "execute_result"]
        for cell in notebook.cells
        if "outputs" in cell
    ]
    return [cell[-1]["data"] if cell else {} for cell in shown]


def test_every_cell_runs(outputs):
    assert len(outputs) == 7


def test_the_tables_are_filled(outputs):
    tickers, _, _, forecast, touches, _, scores = [output.get("text/plain", "") for output in outputs]
    assert all(ticker in tickers for ticker in ("AAPL", "FB", "GOOG", "IBM", "MSFT"))
    assert "2013-03-15" in forecast
    assert "NaN" not in forecast + touches + scores
    assert "crps_skill" in scores


def test_the_picture_is_one(outputs):
    assert any("image/png" in output for output in outputs)


def test_the_notebook_is_kept_without_results():
    """They would change with every run, and are megabytes."""
    assert all(not cell.get("outputs") for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
