"""Trap 12: the cells of the notebooks run."""

import json
import os
import pathlib

import nbclient
import nbformat
import pytest
from recipes import SMALL
from small_study import small_config, write_study

from benchmarks.evidence.plots import FIGURES
from benchmarks.evidence.report import write_report
from benchmarks.evidence.run import run_study

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


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """Runs a notebook by its name, with more environment variables; returns its code cells."""

    def run(name, **environment):
        (path,) = (path for path in COLABS if path.stem == name)
        root = str(path.parent.parent)
        python_path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        variables = {"MPLBACKEND": "agg", "IPYTHONDIR": str(tmp_path), "PYTHONPATH": python_path}
        for key, value in (variables | environment).items():
            monkeypatch.setenv(key, value)
        notebook = read(path)
        folder = {"metadata": {"path": str(path.parent)}}
        nbclient.NotebookClient(notebook, timeout=240, resources=folder).execute()
        return [cell for cell in notebook.cells if cell.cell_type == "code"]

    return run


def shown(cells, kind):
    """The outputs of the cells that have a MIME type."""
    outputs = [output for cell in cells for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.filterwarnings("ignore")  # asyncio and zmq, of each other: not of the notebook
def test_trap_12_every_cell_of_the_step_notebook_runs(execute):
    assert "grad_norm" in printed(execute("srpo_step")[-1])


@pytest.mark.filterwarnings("ignore")
def test_trap_12_every_cell_of_the_evidence_notebook_runs(execute, tmp_path):
    folder = tmp_path / "evidence"
    write_report(write_study(folder), folder)
    cells = execute("evidence", EVIDENCE=str(folder))
    assert "11 of 11 runs are done" in printed(cells[1])
    assert len(shown(cells, "image/png")) == len(FIGURES)
    *_, paired, everything = shown(cells, "text/markdown")
    assert "| grpo | +0.120 [-0.134, +0.374], p=0.11, n=2 |" in paired
    assert "### Reasoning" not in paired
    assert everything == (folder / "tables.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_evidence_notebook_shows_a_study_that_is_half_finished(execute, tmp_path):
    folder = tmp_path / "evidence"
    config = write_study(folder)
    for seed in (0, 1):
        (folder / f"seed{seed}/srpo-0.0003/summary.json").unlink()
        (folder / f"seed{seed}/few-0.0003/summary.json").unlink()
    (folder / "seed1/grpo-0.0003/summary.json").write_text("{")
    write_report(config, folder)
    cells = execute("evidence", EVIDENCE=str(folder))
    assert "6 of 11 runs are done" in printed(cells[1])
    absent, bad, checks, paired, _ = shown(cells, "text/markdown")
    assert "- srpo: 2 of 2 seeds" in absent
    assert "- seed1/grpo-0.0003: JSONDecodeError" in bad
    assert checks == paired == "*Not there yet: the runs it needs are not done.*"
    assert len(shown(cells, "image/png")) == len(FIGURES) - 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_two_rows_from_the_cold_start_to_the_tables_and_the_notebook(execute, tmp_path):
    """The smallest real runs: the cold start, and an arm that starts from it."""
    settings = {"rl.estimator": "grpo"}
    config = small_config(
        {"grpo": {"settings": settings, "tuned": False}, "base": {"trained": False}}
    )
    config.unlock().recipe.update_from_flattened_dict(
        SMALL | {"chain.checks": 0, "rl.steps": 2, "rl.eval_every": 1, "eval.pass_k": 0}
    )
    config.plots.curves = ("grpo",)
    config.plots.confusion = ("base", "grpo")
    folder = tmp_path / "evidence"
    run_study(config.lock(), folder)
    results = json.loads((folder / "evidence.json").read_text())
    assert results["bad"] == {}
    grpo, base = (results["arms"][name]["seeds"]["0"] for name in ("grpo", "base"))
    assert [step for step, _ in grpo["curve"]] == [0, 1, 2]
    assert min(grpo["sampled_tokens"], grpo["trained_tokens"], grpo["entropy"]) > 0
    assert (base["sampled_tokens"], base["entropy"], base["curve"]) == (None, None, [])
    before = json.loads((folder / "seed0/grpo-0.0003/summary.json").read_text())["before"]
    assert before["macro_f1"] == base["test"]["macro_f1"]
    cells = execute("evidence", EVIDENCE=str(folder))
    assert "2 of 2 runs are done" in printed(cells[1])
    assert len(shown(cells, "image/png")) == 3  # curves, entropy, confusion
    assert "| wrong reason, test |" in shown(cells, "text/markdown")[-1]
