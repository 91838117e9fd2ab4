"""What ``import she_jax`` offers: all of it, lightly, and old names with a warning."""

import subprocess
import sys

import pytest

import she_jax
from she_jax.rl.losses import loss_denominators

HEAVY = (
    "flax",
    "grain",
    "matplotlib",
    "ml_collections",
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
    ("module", "later"),
    [("she_jax", HEAVY), ("she_jax.runs.run", ("matplotlib", "scipy", "sklearn"))],
)
def test_what_a_start_does_not_need_is_imported_when_used(module, later):
    code = f"import {module}, sys; print([m for m in {later} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_old_name_warns_and_is_the_same():
    with pytest.warns(DeprecationWarning, match=r"row_counts is now she_jax\.loss_denominators"):
        assert she_jax.row_counts is loss_denominators
    with pytest.raises(AttributeError, match="no attribute 'row_sums'"):
        _ = she_jax.row_sums
