"""The records of a policy's rollouts for each prompt, written and read back."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from she_jax.filtering.records import (
    PromptRecord,
    distinct_n,
    read_columns,
    read_records,
    read_step_names,
    write_records,
)

STEPS = ("query", "category", "label")
FULL = PromptRecord(
    row=7,
    uid="pair-7",
    query="kırmızı kupa ☕",
    title="マグカップ <赤> 😀\nsecond line",
    label="3",
    kind="negation",
    confidence=0.625,
    right=(True, False, True, True),
    paths=("match/met/3", "near/-/2", "match/met/3", "match/met/3"),
    step_rates=(1.0, 0.75, None),
    texts=("a b\nlabel: 3", "", "é", "d"),
    embedding=np.array([1.5, -2.0, 6e-8, 65504], np.float16),
)
BARE = PromptRecord(
    row=8,
    uid="8",
    query="mug",
    title="Mug",
    label=None,
    kind="",
    confidence=None,
    right=(),
    paths=(),
    step_rates=(None, None, None),
    texts=(),
    embedding=np.zeros(4, np.float16),
)


def same(a: PromptRecord, b: PromptRecord) -> bool:
    """Dataclass equality would compare arrays as truth values."""
    assert a.embedding.dtype == b.embedding.dtype == np.float16
    np.testing.assert_array_equal(a.embedding, b.embedding)
    return {**vars(a), "embedding": None} == {**vars(b), "embedding": None}


def test_records_are_read_back_as_written(tmp_path):
    """In any script, with and without label, confidence, step rates and rollouts."""
    path = tmp_path / "0.parquet"
    write_records(path, [FULL, BARE], STEPS)
    full, bare = read_records(path)
    assert same(full, FULL)
    assert same(bare, BARE)
    assert read_step_names(path) == STEPS
    assert list(tmp_path.iterdir()) == [path]


def test_pass_rate():
    assert FULL.pass_rate == 0.75
    assert BARE.pass_rate is None


def test_distinct_n_by_hand():
    """Bigrams: a-b b-a a-b in the first, a-b in the second; two different ones of four."""
    assert distinct_n(["a b a b", "a  b", "b"]) == 2 / 4
    assert distinct_n(["a b a b", "b"], n=1) == 2 / 5
    assert distinct_n(["a b c d"], n=3) == 1.0
    assert math.isnan(distinct_n(["one", ""]))
    assert math.isnan(distinct_n([]))


def test_distinct_bigrams_are_stored_in_a_column(tmp_path):
    path = tmp_path / "0.parquet"
    write_records(path, [replace(FULL, texts=("a b a b", "a b", "", ""))], STEPS)
    assert read_columns(path, ["row", "distinct"]).to_pylist() == [{"row": 7, "distinct": 0.5}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"paths": ("a",)}, "4 outcomes, 1 paths and 4 texts"),
        ({"step_rates": (1.0,)}, "1 step rates for 3 steps"),
        ({"embedding": np.zeros(3, np.float16)}, r"float16\[3\]; expected float16\[4\]"),
        ({"embedding": np.zeros(4, np.float32)}, r"float32\[4\]; expected float16\[4\]"),
        ({"embedding": np.array([0, 0, 0, np.inf], np.float16)}, "not finite"),
    ],
)
def test_an_inconsistent_record_is_refused(tmp_path, change, words):
    path = tmp_path / "0.parquet"
    with pytest.raises(ValueError, match=f"row 7: .*{words}"):
        write_records(path, [BARE, replace(FULL, **change)], STEPS)
    assert not list(tmp_path.iterdir())


def test_an_empty_shard_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no records to write"):
        write_records(tmp_path / "0.parquet", [], STEPS)


def test_a_shard_is_replaced_whole(tmp_path):
    """A partial file of a killed run is overwritten."""
    path = tmp_path / "0.parquet"
    (tmp_path / "0.parquet.part").write_bytes(b"half")
    write_records(path, [FULL], STEPS)
    write_records(path, [BARE], STEPS)
    assert [record.row for record in read_records(path)] == [8]
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_names_a_damaged_or_foreign_file(tmp_path):
    path = tmp_path / "0.parquet"
    write_records(path, [FULL, BARE], STEPS)
    whole = path.read_bytes()

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0\.parquet: not a whole parquet file .* Delete it"):
        read_records(path)

    flipped = bytearray(whole)
    flipped[40] ^= 0xFF  # in the first page; its checksum detects this
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="not a whole parquet file"):
        read_records(path)

    pq.write_table(pa.table({"row": [1]}), path)
    with pytest.raises(ValueError, match="version none; expected version 2"):
        read_step_names(path)

    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none.parquet")
