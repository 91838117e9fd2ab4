"""Data sets on disk: examples in and out of TFDS, splits, and errors while writing."""

import dataclasses
import errno
import json
import pickle
import sys
import tempfile
from itertools import pairwise

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import EXAMPLE, Given, GivenConfig, good_rows, make_dataset

from she_jax.data import dataset
from she_jax.data.dataset import (
    FEATURES,
    ExampleConfig,
    decode,
    encode,
    open_split,
    prepare,
    shuffled_rows,
)
from she_jax.data.intake import Row
from she_jax.data.splits import HashSplitConfig
from she_jax.types import BadRow, Example

TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
EXAMPLES = st.builds(
    Example,
    uid=TEXT,
    query=TEXT,
    product=st.dictionaries(TEXT, TEXT, max_size=4),
    label=st.none() | st.integers(0, 10) | st.sampled_from([0.5, "fair", "0", "10"]),
    steps=st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
    kind=TEXT,
    annotations=st.lists(TEXT, max_size=3).map(tuple),
    rationale=st.none() | TEXT.filter(bool),
)


@given(EXAMPLES)
def test_every_example_survives_encoding_and_the_file_format(example):
    """Lone surrogates and every other character included."""
    assert decode(FEATURES.deserialize_example_np(FEATURES.serialize_example(encode(example)))) == (
        example
    )


def test_a_data_set_is_written_once_and_read_back_identical(tmp_path, capsys, monkeypatch):
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    given = (*good_rows(5), Row(split="test", example=dataclasses.replace(EXAMPLE, uid="t")))
    dataset = make_dataset(tmp_path, given)
    assert dataset.splits == {"train": 5, "test": 1}
    assert (dataset.bad_rows, dataset.cut_fields) == ({}, 0)
    assert not dataset.reused
    assert not list(temporary.iterdir())  # TFDS would leave a folder there
    assert list(open_split(dataset.path, "train")) == [row.example for row in given[:5]]
    assert open_split(dataset.path, "test")[0].uid == "t"
    again = make_dataset(tmp_path, given)
    assert again.reused
    assert dataclasses.replace(again, reused=False) == dataset
    assert "tensorflow" not in sys.modules
    assert capsys.readouterr() == ("", "")


def test_a_column_is_read_without_the_others_and_says_so_if_it_takes_long(
    tmp_path, monkeypatch, caplog
):
    examples = [
        dataclasses.replace(EXAMPLE, uid=f"ü{n}", label=label)
        for n, label in enumerate((4, 4, None, 1))
    ]
    path = make_dataset(tmp_path, [Row(split="train", example=e) for e in examples]).path
    source = open_split(path, "train")
    assert source.labels() == [4, 4, None, 1]
    assert open_split(path, "train[:3]").labels() == [4, 4, None]
    assert source.texts("uid") == [example.uid for example in examples]
    monkeypatch.setattr(dataset, "_SECONDS", 0)
    assert source.labels() == [4, 4, None, 1]
    assert caplog.messages == ["reading the column 'label': 4 of 4 rows"]


def test_a_source_works_with_grain_and_can_be_pickled(tmp_path):
    source = open_split(make_dataset(tmp_path, good_rows(7)).path, "train")
    assert sorted(e.uid for e in grain.MapDataset.source(source).shuffle(seed=1)) == list("0123456")
    assert pickle.loads(pickle.dumps(source))[3] == source[3]
    with pytest.raises(IndexError, match="index 7 of a split with 7 examples"):
        source[7]


def test_other_options_or_sources_give_another_folder(tmp_path):
    path = tmp_path / "source"
    path.write_text("1")

    @dataclasses.dataclass(kw_only=True, eq=False)
    class FileConfig(ExampleConfig):
        size: int = 1

        def sources(self):
            return (path,)

    names = {FileConfig().name, FileConfig().name, FileConfig(size=2).name}
    assert len(names) == 2
    path.write_text("2")  # one byte, of the same length
    assert FileConfig().name not in names
    path.unlink()
    with pytest.raises(FileNotFoundError, match="source"):
        Given(data_dir=tmp_path, config=FileConfig())


def test_progress_is_reported(tmp_path):
    seen = []
    config = GivenConfig(rows=good_rows(4_100))
    prepare(Given(data_dir=tmp_path, config=config), on_progress=seen.append)
    assert seen == [2_000, 4_000, 4_100]


def test_open_split_names_a_missing_data_set_or_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare"):
        open_split(tmp_path, "train")
    path = make_dataset(tmp_path, good_rows(3)).path
    with pytest.raises(ValueError, match=r"no split 'trian' in .*, only \['train'\]"):
        open_split(path, "trian")
    assert len(open_split(path, "train[:2]")) == 2


@pytest.mark.parametrize(("size", "block_size"), [(1_000, 1), (1_000, 16), (7, 16), (0, 1)])
def test_shuffled_rows_are_a_permutation_that_keeps_blocks_together(size, block_size):
    rows = shuffled_rows(size, block_size=block_size).tolist()
    assert sorted(rows) == list(range(size))
    assert rows == shuffled_rows(size, block_size=block_size).tolist()
    if size == 1_000:
        assert rows != sorted(rows)
        counts = np.histogram(rows[:200], bins=5, range=(0, size))[0]
        assert min(counts) >= 16  # 40 on average
    neighbors = sum(b - a == 1 for a, b in pairwise(rows))
    assert neighbors >= size - 1 - size // block_size
    in_order = shuffled_rows(size, shuffled=True, block_size=block_size)
    assert in_order.tolist() == list(range(size))


def test_too_many_bad_rows_are_an_error_with_counts_and_examples(tmp_path):
    bad = [BadRow(file="f.jsonl", line=i, reason=f"not JSON: {i}") for i in range(6)]
    with pytest.raises(ValueError, match="6 of 100 rows") as caught:
        make_dataset(tmp_path, [*good_rows(94), *bad])
    assert "not JSON (6)" in str(caught.value)
    assert "f.jsonl:4: not JSON: 4" in str(caught.value)
    assert "f.jsonl:5" not in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))
    dataset = make_dataset(tmp_path, [*good_rows(95), *bad[:5]])
    assert dataset.bad_rows == {"not JSON": 5}
    lines = (dataset.path / "bad_rows.jsonl").read_text().splitlines()
    bad_row = {"file": "f.jsonl", "line": 4, "reason": "not JSON: 4"}
    assert json.loads(lines[4]) == bad_row | {"record": 99}


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
def test_a_full_disk_is_reported_and_no_files_are_left(tmp_path, error):
    with pytest.raises(OSError, match="the disk is full") as caught:
        make_dataset(tmp_path, [*good_rows(10), error])
    assert str(tmp_path) in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert make_dataset(tmp_path, good_rows(10)).splits == {"train": 10}


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(RuntimeError, match="something else"):
        make_dataset(tmp_path, [*good_rows(10), RuntimeError("something else")])


def test_an_unfinished_folder_is_refused(tmp_path):
    dataset = make_dataset(tmp_path, good_rows(2))
    (dataset.path / "made.json").unlink()
    with pytest.raises(ValueError, match="not a finished data set"):
        make_dataset(tmp_path, good_rows(2))


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
