"""Examples in and out of TFDS, hygiene, bad rows, and what happens when the disk is full."""

import dataclasses
import errno
import io
import json
import pickle
import sys
from collections.abc import Iterable
from itertools import pairwise

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import EXAMPLE, Given, GivenConfig, good_rows, make_dataset

from she_jax.data.dataset import (
    FEATURES,
    ExampleConfig,
    HashSplitConfig,
    decode,
    encode,
    open_split,
    prepare,
    shuffled_rows,
)
from she_jax.data.intake import Intake, Row, normalize_text, query_hash
from she_jax.types import BadRow, Example

TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
EXAMPLES = st.builds(
    Example,
    uid=TEXT,
    query=TEXT,
    product=st.dictionaries(TEXT, TEXT, max_size=4),
    label=st.none() | st.integers(1, 4),
    steps=st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
    kind=TEXT,
    annotations=st.lists(TEXT, max_size=3).map(tuple),
    rationale=st.none() | TEXT.filter(bool),
)


def admit(given: Iterable, max_bad_share: float = 0.05) -> tuple[list[Row], Intake, list[dict]]:
    """What Intake lets through, its counts, and what it wrote."""
    intake, written = Intake(), io.StringIO()
    good = list(intake.admit(given, written, max_chars=2_000, max_bad_share=max_bad_share))
    return good, intake, [json.loads(line) for line in written.getvalue().splitlines()]


@given(EXAMPLES)
def test_every_example_survives_encoding_and_the_file_format(example):
    """Lone surrogates and every other character included."""
    assert decode(FEATURES.deserialize_example_np(FEATURES.serialize_example(encode(example)))) == (
        example
    )


def test_a_label_outside_the_classes_is_not_stored_as_unknown():
    with pytest.raises(ValueError, match="label 0 of 'a': expected 1 to 4"):
        encode(dataclasses.replace(EXAMPLE, label=0))


@given(TEXT)
def test_hygiene_is_idempotent_and_leaves_storable_text(text):
    clean = normalize_text(text)
    assert normalize_text(clean) == clean
    assert clean == " ".join(clean.split())
    assert clean.encode().decode() == clean  # no lone surrogates
    assert not set(clean) & set("\0\t\n\r\ufeff\u200b\u200e\u200f\u202a\u202e\u2066\u2069\u061c")


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("  red\tmug\r\n", "red mug"),
        ("a\0b", "a b"),
        ("\ufeff\u202eabc\u202c\u2066d\u2069", "abcd"),
        ("x\ud800y", "x y"),
        ("Ｎintendo　スイッチ ふちなし", "Ｎintendo スイッチ ふちなし"),
        ("can\u0303a niño", "caña niño"),
        ("👩‍👩‍👧 ok", "👩‍👩‍👧 ok"),
    ],
)
def test_hygiene_cleans_and_keeps_three_languages(dirty, clean):
    assert normalize_text(dirty) == clean


def test_set_is_made_once_and_read_back_identical(tmp_path, capsys):
    given = (*good_rows(5), Row(split="test", example=dataclasses.replace(EXAMPLE, uid="t")))
    made = make_dataset(tmp_path, given)
    assert (made.splits, made.bad_rows, made.cut_fields) == ({"train": 5, "test": 1}, {}, 0)
    assert not made.reused
    assert list(open_split(made.path, "train")) == [row.example for row in given[:5]]
    assert open_split(made.path, "test")[0].uid == "t"
    again = make_dataset(tmp_path, given)
    assert again.reused
    assert dataclasses.replace(again, reused=False) == made
    assert "tensorflow" not in sys.modules
    assert capsys.readouterr() == ("", "")


def test_source_feeds_grain_and_travels_to_workers(tmp_path):
    source = open_split(make_dataset(tmp_path, good_rows(7)).path, "train")
    assert sorted(e.uid for e in grain.MapDataset.source(source).shuffle(seed=1)) == list("0123456")
    assert pickle.loads(pickle.dumps(source))[3] == source[3]
    with pytest.raises(IndexError, match="index 7 of a split with 7 examples"):
        source[7]


def test_other_options_or_sources_make_another_folder(tmp_path):
    path = tmp_path / "source"
    path.write_text("1")

    @dataclasses.dataclass(kw_only=True, eq=False)
    class FileConfig(ExampleConfig):
        size: int = 1

        def sources(self):
            return (path,)

    names = {FileConfig().name, FileConfig().name, FileConfig(size=2).name}
    assert len(names) == 2
    path.write_text("22")
    assert FileConfig().name not in names
    path.unlink()
    with pytest.raises(FileNotFoundError, match="source"):
        FileConfig()


def test_progress_is_reported(tmp_path):
    seen = []
    config = GivenConfig(rows=good_rows(4_100))
    prepare(Given(data_dir=tmp_path, config=config), on_progress=seen.append)
    assert seen == [2_000, 4_000, 4_100]


def test_open_split_names_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare"):
        open_split(tmp_path, "train")
    path = make_dataset(tmp_path, good_rows(3)).path
    with pytest.raises(ValueError, match=r"no split 'trian' in .*, only \['train'\]"):
        open_split(path, "trian")
    assert len(open_split(path, "train[:2]")) == 2


@pytest.mark.parametrize(("size", "together"), [(1_000, 1), (1_000, 16), (7, 16), (0, 1)])
def test_rows_in_no_order_are_all_rows_from_all_over_and_neighbours_stay(size, together):
    rows = shuffled_rows("jsonl", size, together).tolist()
    assert sorted(rows) == list(range(size))
    assert rows == shuffled_rows("jsonl", size, together).tolist()
    if size == 1_000:
        assert rows != sorted(rows)
        counts = np.histogram(rows[:200], bins=5, range=(0, size))[0]
        assert min(counts) >= 16  # 40 in the mean
    beside = sum(b - a == 1 for a, b in pairwise(rows))
    assert beside >= size - 1 - size // together
    assert shuffled_rows("shopworld", size, together).tolist() == list(range(size))


def test_bad_rows_are_set_aside_with_place_and_reason():
    good = good_rows(4)
    ruined = [
        ("empty query", {"query": " \u200b "}),
        ("missing title", {"product": {"brand": "x"}}),
        ("missing title", {"product": {"title": "\0"}}),
        ("unknown label: 7, expected 1 to 4", {"label": 7}),
        ("empty uid", {"uid": "\n"}),
        ("duplicate uid: '0'", {"uid": "0"}),
    ]
    bad = [
        Row(split="train", example=dataclasses.replace(EXAMPLE, **({"uid": f"b{i}"} | change)))
        for i, (_, change) in enumerate(ruined)
    ]
    kept, intake, written = admit(
        [*good, BadRow(file="g", line=9, reason="not JSON: x"), *bad], max_bad_share=0.9
    )
    assert kept == list(good)
    assert [row["reason"] for row in written] == ["not JSON: x", *(reason for reason, _ in ruined)]
    assert written[0] == {"file": "g", "line": 9, "reason": "not JSON: x"}
    assert intake.bad["missing title"] == 2
    assert intake.bad["duplicate uid"] == intake.bad["not JSON"] == 1


def test_a_row_refused_for_another_reason_does_not_claim_its_uid():
    bad = Row(split="train", example=dataclasses.replace(EXAMPLE, uid="0", query=""))
    kept, intake, _ = admit([bad, *good_rows(1)], max_bad_share=0.5)
    assert len(kept) == 1
    assert dict(intake.bad) == {"empty query": 1}


def test_long_fields_are_cut_and_counted():
    product = {"title": "x" * 100_000, "brand": "y" * 2_000}
    kept, intake, _ = admit(good_rows(1, product=product))
    assert kept[0].example.product == {"title": "x" * 2_000, "brand": "y" * 2_000}
    assert intake.cut == 1


def test_a_rationale_keeps_its_lines():
    kept, _, _ = admit(good_rows(1, rationale="query: a\tb\r\nlabel: 4"))
    assert kept[0].example.rationale == "query: a b\nlabel: 4"


def test_too_many_bad_rows_are_an_error_with_counts_and_examples(tmp_path):
    bad = [BadRow(file="f.jsonl", line=i, reason=f"not JSON: {i}") for i in range(6)]
    with pytest.raises(ValueError, match="6 of 100 rows") as caught:
        make_dataset(tmp_path, [*good_rows(94), *bad])
    assert "not JSON (6)" in str(caught.value)
    assert "f.jsonl:4: not JSON: 4" in str(caught.value)
    assert "f.jsonl:5" not in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))
    made = make_dataset(tmp_path, [*good_rows(95), *bad[:5]])
    assert made.bad_rows == {"not JSON": 5}
    lines = (made.path / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(lines[4]) == {"file": "f.jsonl", "line": 4, "reason": "not JSON: 4"}


def test_a_hopeless_stream_is_given_up_early():
    taken = []

    def stream():
        for i in range(100_000):
            taken.append(i)
            yield BadRow(file="f", line=i, reason="not JSON")

    with pytest.raises(ValueError, match="1000 of 1000 rows"):
        admit(stream())
    assert len(taken) == 1_000


def test_an_empty_stream_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no row came in"):
        make_dataset(tmp_path, [])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("write() failed: No space left on device; writing x"),
    ],
)
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, error):
    with pytest.raises(OSError, match="the disk is full") as caught:
        make_dataset(tmp_path, [*good_rows(10), error])
    assert str(tmp_path) in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert make_dataset(tmp_path, good_rows(10)).splits == {"train": 10}


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(RuntimeError, match="something else"):
        make_dataset(tmp_path, [*good_rows(10), RuntimeError("something else")])


def test_an_unfinished_folder_is_refused(tmp_path):
    made = make_dataset(tmp_path, good_rows(2))
    (made.path / "made.json").unlink()
    with pytest.raises(ValueError, match="not a finished data set"):
        make_dataset(tmp_path, good_rows(2))


def test_query_hash_ignores_case_and_white_space_and_is_even():
    assert query_hash("Red  mug\n") == query_hash("red mug") != query_hash("red mugs")
    places = [query_hash(f"query {i}") for i in range(2_000)]
    assert all(0 <= place < 1 for place in places)
    assert 0.45 < sum(places) / len(places) < 0.55


def test_carved_splits_have_their_shares_and_share_no_query():
    config = HashSplitConfig(validation_share=0.2, test_share=0.3)
    splits = [config.split_of(f"query {i}") for i in range(2_000)]
    shares = {name: splits.count(name) / 2_000 for name in ("train", "validation", "test")}
    assert shares == pytest.approx({"train": 0.5, "validation": 0.2, "test": 0.3}, abs=0.04)
    assert config.split_of("Query  1") == splits[1]
    with pytest.raises(ValueError, match=r"validation_share=0\.5, test_share=0\.5"):
        HashSplitConfig(validation_share=0.5, test_share=0.5)


def test_builders_stay_out_of_the_global_registry():
    import tensorflow_datasets as tfds

    assert not {"given", "example_builder"} & set(tfds.core.registered._DATASET_REGISTRY)
