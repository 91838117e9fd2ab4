"""What the Python functions take: pairs of any kind, and settings that exist."""

import datetime
import json

import numpy as np
import pytest

from she_jax.recipes import stage1
from she_jax.runs.api import _recipe, _stored, _write_pairs
from she_jax.types import UserError

PAIR = {"query": "red mug", "product": {"title": "Mug"}, "label": 3}


class Polars:
    """What counts of another kind of DataFrame."""

    def to_dict(self, as_series=True):
        raise AssertionError("columns, not rows")

    def to_dicts(self):
        return [PAIR]


class NaT(datetime.datetime):
    """Not a time: the only date that is not itself."""

    __hash__ = None

    def __ne__(self, other):
        return True


@pytest.mark.parametrize(
    ("pairs", "rows"),
    [
        ([PAIR], [PAIR]),
        ((pair for pair in (PAIR, PAIR)), [PAIR, PAIR]),
        (Polars(), [PAIR]),
        ([PAIR | {"label": np.int64(2)}], [PAIR | {"label": 2}]),
        (
            [{"a": np.arange(2), "b": NaT(1, 1, 1), "c": None}],
            [{"a": [0, 1], "b": None, "c": None}],
        ),
        (
            [{"query": "\ud800", "product": {1: b"x"}}],
            [{"query": "\ud800", "product": {"1": "b'x'"}}],
        ),
    ],
)
def test_pairs_of_any_kind_become_lines(tmp_path, pairs, rows):
    assert _write_pairs(pairs, tmp_path / "pairs.jsonl") == len(rows)
    with (tmp_path / "pairs.jsonl").open() as file:
        assert [json.loads(line) for line in file] == rows


def test_what_is_no_pair_is_named(tmp_path):
    with pytest.raises(UserError, match="pair 2: str, expected a mapping"):
        _write_pairs([PAIR, "mug"], tmp_path / "pairs.jsonl")


def test_other_pairs_are_not_those_of_the_judge_in_the_folder(tmp_path):
    folder = tmp_path / "judge"
    path = _stored([PAIR], folder)
    assert _stored([PAIR | {"label": 1}], folder) == path  # nothing was trained there yet
    (folder / "checkpoints").mkdir(parents=True)
    assert _stored([PAIR | {"label": 1}], folder) == path
    with pytest.raises(UserError, match="holds a judge of other pairs: give a new folder"):
        _stored([PAIR], folder)
    with open(path) as file:
        assert json.loads(file.read()) == PAIR | {"label": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rl.stps": 1}, "there is no key 'rl.stps'"),
        ({"seed.x": 1}, "there is no key 'seed.x'"),
        ({"rl.steps": "20"}, "rl.steps='20': expected int"),
        ({"rl.steps": 0.5}, "rl.steps=0.5: expected int"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        _recipe(stage1.get_config(), settings)


def test_numbers_of_numpy_are_settings():
    assert _recipe(stage1.get_config(), {"rl.steps": np.int64(3)}).rl.steps == 3
