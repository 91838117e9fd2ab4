"""A data set is known by the content of its sources, and prepared by one process at a time."""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from recipes import good_rows, make_dataset

from she_jax.data.content import ExampleConfig, content_digest, preparing
from she_jax.data.dataset import fingerprint, open_prepared, prepare
from she_jax.data.readers.judgments import TableConfig
from she_jax.data.readers.tables import Tables

PAIR = {"query": "red mug", "product": {"title": "Mug, red"}, "label": 4}


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR | {"label": 2}) + "\n")
    return path


def prepared(tmp_path, path, **options):
    return prepare(
        Tables(data_dir=tmp_path / "data", config=TableConfig(path=str(path), **options))
    )


def touch(path):
    os.utime(path, (1, 1))
    return path


def move(path):
    return path.rename(path.parent / "moved.jsonl")


def copy(path):
    (path.parent / "elsewhere").mkdir()
    return shutil.copy2(path, path.parent / "elsewhere" / "pairs.jsonl")


def change(path):
    """One byte, and the file's size and time stay."""
    time = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"red mug", b"rod mug", 1))
    os.utime(path, ns=(time, time + 1))  # this process remembers what it read by time
    return path


def remove(path):
    path.unlink()
    return path


@pytest.mark.parametrize("event", [touch, move, copy, remove])
def test_what_keeps_the_bytes_keeps_the_data_set(tmp_path, pairs, event):
    """So does the loss of the source: what was prepared from it is whole."""
    before = prepared(tmp_path, pairs)
    source = event(pairs)
    for _ in range(2):
        after = prepared(tmp_path, source)
        assert after.reused
        assert (after.path, after.splits) == (before.path, before.splits)
        assert fingerprint(after) == fingerprint(before)
        Path(source).unlink(missing_ok=True)  # now it is lost where it was last


def test_a_changed_byte_or_option_is_another_data_set(tmp_path, pairs):
    prints = {fingerprint(prepared(tmp_path, pairs))}
    prints.add(fingerprint(prepared(tmp_path, pairs, evaluation=True)))
    prints.add(fingerprint(prepared(tmp_path, change(pairs))))
    assert len(prints) == 3


def test_of_a_lost_source_the_last_state_counts_and_options_must_fit(tmp_path, pairs):
    prepared(tmp_path, pairs)
    last = prepared(tmp_path, change(pairs))
    remove(pairs)
    assert fingerprint(prepared(tmp_path, pairs)) == fingerprint(last)
    for path, options in ((pairs, {"columns": "title=name"}), (tmp_path / "other.jsonl", {})):
        with pytest.raises(FileNotFoundError, match=f"missing .*{path.name}"):
            prepared(tmp_path, path, **options)


def by_time(dataset, source):
    """The data set as an earlier version of she_jax would have made and named it."""
    file = dataset.path / "made.json"
    summary = json.loads(file.read_text())
    del summary["paths"]
    stat = source.stat()
    summary["options"] |= {
        "path": str(source),
        "sources": [[str(source.absolute()), stat.st_size, stat.st_mtime_ns]],
    }
    file.write_text(json.dumps(summary))
    text = json.dumps(summary["options"], ensure_ascii=False, separators=(",", ":"))
    name = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    dataset.path.parent.rename(dataset.path.parents[1] / name)
    return name


def test_a_data_set_of_an_earlier_version_goes_on_under_its_name(tmp_path, pairs):
    """As long as the source's time is the same, or the source is gone."""
    name = by_time(prepared(tmp_path, pairs), pairs)
    assert fingerprint(prepared(tmp_path, pairs)) == name
    assert fingerprint(prepared(tmp_path, remove(pairs))) == name


def test_a_touched_source_of_an_earlier_version_is_prepared_anew(tmp_path, pairs):
    name = by_time(prepared(tmp_path, pairs), pairs)
    after = prepared(tmp_path, touch(pairs))
    assert fingerprint(after) != name
    assert not after.reused


def test_a_moved_data_set_has_the_same_fingerprint(tmp_path, pairs):
    dataset = prepared(tmp_path, pairs)
    moved = shutil.copytree(dataset.path, tmp_path / "mine")
    assert fingerprint(open_prepared(moved)) == fingerprint(dataset)


def test_the_content_of_a_folder_is_that_of_its_files_or_of_its_checkpoints(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("1")
    digest = content_digest(model, "SUMS")
    (model / ".hidden").write_text("of the system")
    moved = shutil.copytree(model, tmp_path / "moved")
    assert content_digest(moved, "SUMS") == digest
    (moved / "weights").write_text("2")
    assert content_digest(moved, "SUMS") != digest
    checkpoint = moved / "checkpoints" / "sft" / "3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "SUMS").write_text("digest")
    run = content_digest(moved, "SUMS")
    (moved / "metrics").write_text("one more line")
    assert content_digest(moved, "SUMS") == run
    assert content_digest(checkpoint.parent, "SUMS") is not None
    assert content_digest(tmp_path / "scratch", "SUMS") is None


def test_what_killed_preparations_left_is_swept_and_what_is_in_progress_stays(tmp_path):
    name = ExampleConfig(max_chars=7).name
    folders = [tmp_path / "given" / options for options in ("killed", "running", name)]
    for folder in folders:
        (folder / "incomplete.ABC_1.0.0").mkdir(parents=True)
    with FileLock(folders[1] / ".lock"):
        make_dataset(tmp_path, good_rows(2))
    assert [path.parent.name for path in tmp_path.rglob("incomplete.*")] == ["running"]


def test_a_data_set_is_prepared_by_one_process_at_a_time(tmp_path, caplog):
    order = []

    def another():
        with preparing(tmp_path):
            order.append("another")

    thread = threading.Thread(target=another)
    with preparing(tmp_path):
        thread.start()
        while not caplog.messages:
            thread.join(0.01)
        order.append("this")
    thread.join()
    assert order == ["this", "another"]
    assert caplog.messages == [f"another command prepares data in {tmp_path}: waiting for it"]
