"""The command line: errors in it are reported at once and in one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

RECIPE = """
import os
import signal

from ml_collections import ConfigDict

def get_config(arg=""):
    if arg == "interrupt_recipe":
        os.kill(os.getpid(), signal.SIGINT)
    if arg == "bad":
        raise ValueError("argument 'bad': expected model=NAME")
    if arg == "bug":
        raise TypeError("a bug in the recipe")
    optim = {"lr": 1e-3, "steps": 3}
    kind = "evidence" if arg.startswith("study") else "train"
    return ConfigDict({"kind": kind, "seed": 1, "optim": optim, "arg": arg, "cpu_devices": 2})
"""

# Stands in for the first of the package's imports.
RECIPES = """
import os
import signal
import sys

if sys.argv[-1].endswith(":interrupt_import"):
    os.kill(os.getpid(), signal.SIGINT)
"""

# Stands in for JAX, which takes a second to import.
JAX = """
from types import SimpleNamespace

config = SimpleNamespace(update=lambda *change: print(*change))
"""

# Stands in for she_jax.types, which imports JAX.
TYPES = """
class UserError(ValueError):
    pass
"""

# Stands in for she_jax.runs.run, so that these tests train nothing.
RUN = """
import json
import os
import signal

from she_jax.types import UserError

def run(config, workdir):
    if config.arg == "user":
        raise UserError("the user's mistake")
    if config.arg == "disk":
        open("/nowhere/at/all")
    if config.arg == "value":
        raise ValueError("a value that no user gave")
    if config.arg == "library":
        json.loads("{")
    if config.arg == "type":
        len(3)
    if config.arg == "stop":
        raise SystemExit(143)
    if config.arg == "interrupt_run":
        os.kill(os.getpid(), signal.SIGINT)
    print(workdir, config.optim.lr, config.seed)
"""

# Stands in for benchmarks.evidence.run.
STUDY = """
from she_jax.types import UserError

def run_study(config, workdir):
    if config.arg == "study_bad":
        raise UserError("the study's mistake")
    print(workdir, config.kind)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The command line's own files beside stand-ins for the rest of the package, and a recipe."""
    folder = tmp_path_factory.mktemp("project")
    for file in (
        "launch.py",
        "she_jax/__init__.py",
        "she_jax/__main__.py",
        "she_jax/recipes/renamed.py",
        "she_jax/runs/__init__.py",
        "she_jax/runs/command.py",
        "she_jax/runs/launch.py",
        "she_jax/training/__init__.py",
        "she_jax/training/stop.py",
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((ROOT / file).read_bytes())
    (folder / "jax.py").write_text(JAX)
    (folder / "she_jax" / "types.py").write_text(TYPES)
    (folder / "she_jax" / "runs" / "run.py").write_text(RUN)
    (folder / "she_jax" / "recipes" / "__init__.py").write_text(RECIPES)
    for name in ("recipe", "she_jax/recipes/stage1"):
        (folder / f"{name}.py").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def checkout(project, tmp_path_factory):
    """The same with a study in its benchmarks."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(project, folder, dirs_exist_ok=True)
    write_study(folder, STUDY)
    return folder


def write_study(folder, text):
    (folder / "benchmarks" / "evidence").mkdir(parents=True)
    for package in ("benchmarks", "benchmarks/evidence"):
        (folder / package / "__init__.py").touch()
    (folder / "benchmarks" / "evidence" / "run.py").write_text(text)


def launch(project, *arguments, cwd=None, path=None):
    command = [sys.executable, project / "launch.py", *arguments]
    env = {**os.environ, "PYTHONPATH": str(path or project)}
    return subprocess.run(command, cwd=cwd or project, env=env, capture_output=True, text=True)


def test_the_console_script_runs_a_recipe_as_launch_does(project, monkeypatch):
    """And without XLA_FLAGS both split the CPU, which JAX would read too early as a variable."""
    monkeypatch.delenv("XLA_FLAGS")
    script = [sys.executable, "-m", "she_jax", "train", "recipe.py", "--config.seed=7"]
    done = subprocess.run(script, cwd=project, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "jax_num_cpu_devices 2\nruns/recipe 0.001 7\n"
    assert done.stdout == launch(project, "--config=recipe.py", "--config.seed=7").stdout


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["--config=recipe.py"], "runs/recipe 0.001 1"),
        (["--config=recipe.py", "--config.optim.lr=0.5", "--workdir=w"], "w 0.5 1"),
        (["--config=recipe.py:a=b,c=d/e"], "runs/recipe-a-b-c-d-e 0.001 1"),
    ],
)
def test_a_recipe_runs_in_its_workdir(project, arguments, output):
    done = launch(project, *arguments)
    assert (done.stdout.strip(), done.stderr, done.returncode) == (output, "", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optim.lrr=1"], "--config.optim.lrr: there is no such key; the nearest one is"),
        (["--config.optm.steps", "1"], "the nearest one is --config.optim.steps"),
        (["--config.sed=1"], "the nearest one is --config.seed"),
        (["--config.optim.lr.x=1"], "--config.optim.lr.x: there is no such key"),
        (["--config.optim.lr=high"], "could not convert string to float: 'high'"),
        (["--config.cpu_devices=0"], "--config.cpu_devices=0: expected at least 1"),
        (["--config.cpu_devices=-1"], "--config.cpu_devices=-1: expected at least 1"),
        (["--wrkdir=x"], "is --workdir meant?"),
        (["stray"], "unexpected arguments ['stray']"),
    ],
)  # fmt: skip
def test_an_invalid_command_line_is_one_line_and_code_2(project, arguments, message):
    done = launch(project, "--config=recipe.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=nowhere.py"], "--config=nowhere.py: there is no such file"),
        (["--config=recipe.py:bad"], "argument 'bad': expected model=NAME"),
    ],
)
def test_an_invalid_recipe_is_one_line_and_code_2(project, arguments, message):
    done = launch(project, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"launch.py: {message}")
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("kind", "message"), [("user", "the user's mistake"), ("disk", "No such file or directory")]
)
def test_invalid_input_is_a_message_and_code_1(project, kind, message):
    done = launch(project, f"--config=recipe.py:{kind}")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("value", "ValueError: a value"),
        ("library", "JSONDecodeError"),
        ("type", "TypeError"),
        ("bug", "a bug in"),
    ],
)
def test_a_bug_shows_its_traceback(project, kind, word):
    done = launch(project, f"--config=recipe.py:{kind}")
    assert done.returncode not in (0, 2)
    assert "Traceback" in done.stderr
    assert word in done.stderr


def test_a_stopped_run_has_the_shells_code(project):
    assert launch(project, "--config=recipe.py:stop").returncode == 143


@pytest.mark.parametrize("when", ["import", "recipe", "run"])
def test_ctrl_c_leaves_a_line_and_no_traceback(project, when):
    done = launch(project, f"--config=recipe.py:interrupt_{when}")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("launch.py: interrupted")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_the_study_of_the_checkout_runs_from_any_folder(checkout, tmp_path):
    """Not another ``benchmarks`` in the working folder or on Python's path."""
    write_study(tmp_path, "raise RuntimeError('another one')")
    recipe = f"--config={checkout / 'recipe.py'}:study"
    done = launch(checkout, recipe, cwd=tmp_path, path=tmp_path)
    assert (done.stdout.strip(), done.stderr, done.returncode) == (
        "runs/recipe-study evidence",
        "",
        0,
    )
    done = launch(checkout, f"{recipe}_bad", cwd=tmp_path)
    assert (done.stderr, done.returncode) == ("launch.py: the study's mistake\n", 1)


def test_the_study_needs_a_checkout(project):
    done = launch(project, "--config=recipe.py:study")
    assert done.returncode == 1
    assert "kind='evidence': the study needs a checkout of the repository, " in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
