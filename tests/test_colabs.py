"""Trap 12: the notebooks' cells run."""

import os
import pathlib

import nbclient
import nbformat
import pytest

COLABS = sorted((pathlib.Path(__file__).parent.parent / "colabs").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def test_there_is_a_notebook():
    assert COLABS


@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_a_notebook_opens_anywhere_and_carries_no_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.get("outputs") for cell in notebook.cells)


# The kernel's client is asyncio and zmq; what those say of each other is not about the notebook.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_trap_12_every_cell_of_a_notebook_runs(path, monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    root = str(path.parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    notebook = read(path)
    folder = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=240, resources=folder).execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    printed = "".join(output.get("text", "") for output in last.outputs)
    assert "grad_norm" in printed
