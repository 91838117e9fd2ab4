"""What ``import she_jax`` offers: all of it, lightly, and old names with a warning."""

import subprocess
import sys
import tomllib

import pytest
from recipes import ROOT

import she_jax
from she_jax.rl.losses import loss_denominators

HEAVY = (
    "absl",
    "flax",
    "grain",
    "jax",
    "matplotlib",
    "ml_collections",
    "optax",
    "orbax",
    "pyarrow",
    "rich",
    "sklearn",
    "tensorflow_datasets",
    "tokenizers",
)


def test_every_public_name_is_there():
    assert len(set(she_jax.__all__)) == len(she_jax.__all__)
    for name in she_jax.__all__:
        assert getattr(she_jax, name) is not None


@pytest.mark.parametrize(
    ("module", "later", "needs"),
    [
        ("she_jax", HEAVY, []),
        ("she_jax.__main__", HEAVY, []),
        # a wrong command line fails at once
        ("she_jax.runs.command", HEAVY, ["absl", "ml_collections"]),
        ("she_jax.runs.run", ("matplotlib", "scipy", "sklearn"), []),
    ],
)
def test_an_import_is_light(module, later, needs):
    code = f"import {module}, sys; print([m for m in {later} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(needs)


CORE_ONLY = """
import pydoc, sys
sys.modules |= dict.fromkeys(("flax", "ml_collections", "safetensors"))  # None: not installed
import she_jax
assert "srpo_advantages" in pydoc.plain(pydoc.render_doc(she_jax))
try:
    from she_jax import train
except ImportError as error:
    print(error)
from she_jax.__main__ import main
main()
"""


def test_without_the_full_install_what_is_missing_is_said_in_a_line():
    command = [sys.executable, "-c", CORE_ONLY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    words = "there is no package 'ml_collections'; this needs the full install: pip install"
    assert done.stdout.startswith(f"she_jax.train: {words}")
    assert done.stderr.startswith(f"she-jax: {words}")
    assert done.stderr.count("\n") == done.returncode == 1


def test_the_wheel_has_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {file.parent for file in (ROOT / "she_jax").rglob("__init__.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert {*settings["tool"]["setuptools"]["packages"]} == packages | {"she_jax.recipes"}


def test_an_old_name_warns_and_is_the_same():
    with pytest.warns(DeprecationWarning, match=r"row_counts is now she_jax\.loss_denominators"):
        assert she_jax.row_counts is loss_denominators
    with pytest.raises(AttributeError, match="no attribute 'row_sums'"):
        _ = she_jax.row_sums
