"""Every notebook runs from top to bottom, shows its figures, and is committed clean."""

import base64
import io
import json
import re
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
# Calls of pulmo_jax.reporting.figures, adi_figures or examples that draw.
FIGURE = re.compile(r"figures\.\w+\(|examples\.(reconstructions|score_maps)\(")
DEFINITION = re.compile(r"\b(def|class)\s")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def image_of(cell):
    """The only picture that a cell shows, (h, w, 4), and the width that it is shown at, px."""
    (shown,) = [output for output in cell.outputs if "image/png" in output.get("data", {})]
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(shown.data["image/png"])))
    return pixels, shown.metadata["image/png"]["width"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@each_notebook
def test_notebook_is_committed_clean(path):
    notebook = nbformat.from_dict(json.loads(path.read_text(encoding="utf-8")))  # as it is: `read` would repair it
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(notebook))


@each_notebook
def test_notebook_defines_nothing(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.id for cell in cells if DEFINITION.search(cell.source)] == []


# What the messaging underneath says of itself is not the notebook's.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(zmq|jupyter_client|nbclient|ipykernel|traitlets)")
@pytest.mark.slow
@each_notebook
def test_notebook_runs_and_shows_its_figures(path, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND")  # as it is for a reader
    # Nothing of this user's, and nothing left behind.
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(path, as_version=4)
    folder = tmp_path / "copy"
    folder.mkdir()
    NotebookClient(notebook, timeout=3000, resources={"metadata": {"path": str(folder)}}).execute()

    cells = code_cells(notebook)
    assert all(cell.execution_count for cell in cells)
    figures = [cell for cell in cells if FIGURE.search(cell.source)]
    assert figures
    for cell in figures:
        pixels, shown_width = image_of(cell)
        assert pixels.shape[1] == pytest.approx(2 * shown_width, abs=2), f"{cell.id}: not sharp on a fine screen"
        assert pixels.std() > 0.02, f"{cell.id}: blank"
    warned = {
        cell.id: output.text
        for cell in cells
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr" and "Warning" in output.text
    }
    assert not warned
