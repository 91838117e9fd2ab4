"""Which labels a table has: taken where there is one reading, asked for with the choices else."""

from collections import Counter
from pathlib import Path

import pytest

from she_jax.cot import LabelSet
from she_jax.data.label_choice import label_choices, resolve_labels
from she_jax.data.sources import DataConfig
from she_jax.types import UserError


def resolve(tmp_path, labels, text="", column="label", **options) -> str:
    path = tmp_path / "pairs.csv"
    rows = "".join(f"mug,Mug,{label}\n" for label in labels)
    path.write_text(f"query,title,{column}\n{rows}")
    chain = {"labels": "1-4"} | options.pop("chain", {})
    config = DataConfig(name="table", folder=Path(), path=str(path), chain=chain, **options)
    return resolve_labels(config, text)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1", "2", "3", "4", "4"], "1-4"),
        (["4.0", "3.0", "2.0", "1.0", ""], "1-4"),  # as pandas writes them beside a gap
        (["E", "S", "C", "I"], "esci"),
    ],
)
def test_a_file_with_exactly_the_values_of_a_set_has_that_set(tmp_path, labels, expected):
    assert resolve(tmp_path, labels) == expected


@pytest.mark.parametrize(
    ("labels", "shown", "choices"),
    [
        ("0123", "0 (1), 1 (1), 2 (1), 3 (1)", ["0-3", "0-4", "0-10"]),
        ("1233", "1 (1), 2 (1), 3 (2)", ["1-3", "1-4", "0-3", "1-5"]),
        ("12345", "1 (1), 2 (1)", ["1-5", "1-10", "0-10"]),
        ("01", "0 (1), 1 (1)", ["binary", "0-1", "0-2", "0-3"]),
        ("33", "3 (2)", ["1-3", "0-3", "1-4"]),
        (["0", "0.5", "1"], "0 (1), 0.5 (1), 1 (1)", ["0,0.5,1"]),
        (["yes", "no"], "yes (1), no (1)", ["binary"]),
        (["E", "I"], "E (1), I (1)", ["esci"]),
        (["good", "very bad"], "good (1), very bad (1)", ["'good,very bad'"]),
    ],
)
def test_any_other_set_stops_with_the_counts_and_the_choices(tmp_path, labels, shown, choices):
    with pytest.raises(UserError) as caught:
        resolve(tmp_path, labels)
    assert str(tmp_path / "pairs.csv") in str(caught.value)
    assert shown in str(caught.value)
    for choice in choices:
        assert f"--config.data.labels={choice}\n" in str(caught.value)
    for text in label_choices(sorted(set(labels))):
        if text != "binary":
            assert LabelSet.parse(text.strip("'")).read(labels[0]) is not None


def test_scores_are_no_grades(tmp_path):
    with pytest.raises(UserError, match=r"50 different labels, .*are these grades\?"):
        resolve(tmp_path, [f"0.{n}" for n in range(10, 60)])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("0110", "binary"),
        (["False", "True"], "False: not relevant\nTrue: relevant"),
        (["YES", "NO"], "NO: not relevant\nYES: relevant"),
        (["No"], "No: not relevant\nYes: relevant"),
        (["relevant", "irrelevant"], "irrelevant,relevant"),
    ],
)
def test_binary_becomes_the_spelling_of_the_file(tmp_path, labels, expected):
    text = resolve(tmp_path, labels, "binary")
    assert text == expected
    read = [LabelSet.parse(text).read(label) for label in labels]
    assert Counter(map(str, read)) == Counter(labels)


def test_binary_with_other_labels_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"but the labels are 0 \(1\), 2 \(1\); expected 0/1"):
        resolve(tmp_path, "02", "binary")


def test_without_labels_the_unknown_columns_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no column label, only query, title, relevance\."):
        resolve(tmp_path, "0123", column="relevance")
    assert resolve(tmp_path, "1234", column="relevance", columns="label=relevance") == "1-4"
    assert resolve(tmp_path, "1234", column="rating") == "1-4"  # Quepid's export
    assert resolve(tmp_path, "1234", column="a", columns="raters=a") == "1-4"


def test_chains_without_a_label_ask_for_none(tmp_path):
    chain = {"steps": ["plan: what to do", "answer: the number"]}
    assert resolve(tmp_path, "", chain=chain) == "1-4"
