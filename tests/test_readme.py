"""Trap 12: the README's example runs."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_trap_12_the_update_step_of_the_readme_runs():
    """In fifteen lines, on a toy forward; the table of logits has moved and nothing is NaN."""
    if not README.exists():
        pytest.fail(f"{README} is missing: it carries the example of make_update_step")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    example = next(block for block in blocks if "make_update_step" in block)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["state"].step == 1
    assert abs(names["state"].params["table"]).max() > 0
    assert all(abs(float(value)) < 100 for value in names["metrics"].values())
