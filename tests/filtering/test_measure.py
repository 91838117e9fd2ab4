"""Filtering with a policy: killed in the middle, with other thresholds, in parts, and used."""

import json
import shutil

import numpy as np
import pytest
from recipes import changed
from recipes import config as small
from she_jax.runs.policy_run import begin

from configs import filter as recipe
from she_jax.data.dataset import open_split
from she_jax.filtering import measure as filter_run
from she_jax.filtering.measure import _looked_at
from she_jax.filtering.records import read_records
from she_jax.generate.generator import Generator
from she_jax.runs.run import run

SMALL = {
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "eval.batch_size": 16,
    "filter.pairs": 40,
    "filter.rollouts": 4,
    "filter.low": 0.0,
    "filter.high": 1.0,
    "filter.similarity": 1.0,
    "filter.clusters": 2,
    "filter.size": 20,
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(filter_run, "BLOCK", 16)


def config(policy, **changes):
    return changed(recipe.get_config(), SMALL | {"checkpoint": str(policy)}, **changes)


@pytest.fixture(scope="module")
def done(policy, tmp_path_factory):
    """An uninterrupted filter."""
    workdir = tmp_path_factory.mktemp("filter") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filter_run, "BLOCK", 16)
        run(config(policy), workdir)
    return workdir


def kept(workdir):
    return json.loads((workdir / "filter" / "kept.json").read_text())


def assert_same(one, other):
    assert kept(one) == kept(other)
    for shard in sorted((one / "filter" / "records").glob("*.parquet")):
        mine, theirs = (read_records(w / "filter" / "records" / shard.name) for w in (one, other))
        for a, b in zip(mine, theirs, strict=True):
            left, right = vars(a) | {"embedding": None}, vars(b) | {"embedding": None}
            assert left == right
            np.testing.assert_array_equal(a.embedding, b.embedding)
    pages = [(w / "filter" / "report.html").read_bytes() for w in (one, other)]
    assert pages[0] == pages[1]


def test_a_filter_leaves_a_data_set_a_report_and_the_rollouts(done, policy):
    summary = json.loads((done / "summary.json").read_text())
    assert summary["kept"] == 20
    assert summary["pairs"] == 40
    own = json.loads((policy / "config.json").read_text())
    splits = {"train": 20, "validation": 16, "test": 32, "test_longtail": 16}
    assert own["shopworld"]["pairs"] == [200, 16, 32, 16]
    rows = kept(done)["rows"]
    source = open_split(next((policy / "data").rglob("made.json")).parent, "train")
    for split, count in splits.items():
        found = open_split(summary["data"], split)
        assert len(found) == count
        if split == "train":
            assert [found[n].uid for n in range(count)] == [source[row].uid for row in rows]
    records = [r for p in (done / "filter" / "records").glob("*.parquet") for r in read_records(p)]
    assert len(records) == 40
    measured = [record for record in records if record.right]
    assert measured
    for record in measured:
        assert len(record.right) == len(record.paths) == len(record.texts) == 4
        assert record.uid == source[record.row].uid
        assert np.isfinite(record.embedding).all()
        assert record.embedding.any()
    assert {kept(done)["rates"][source[row].uid] for row in rows} <= {0.0, 0.25, 0.5, 0.75, 1.0}


def test_what_is_looked_at_is_spread_out_over_a_file_that_may_be_sorted():
    """And the next stage, which skips it, looks at other rows as long as there are any."""
    sorted_file = {"data__name": "jsonl", "filter__pairs": 100}
    parts = [_looked_at(small(**sorted_file, filter__skip=100 * n), 1_000) for n in range(10)]
    assert sorted(row for part in parts for row in part) == list(range(1_000))
    for part in parts:
        assert part == sorted(part)
        assert min(np.histogram(part, bins=5, range=(0, 1_000))[0]) >= 10  # 20 of 100 in the mean
    assert parts[0] == _looked_at(small(**sorted_file, filter__skip=1_000), 1_000)
    assert _looked_at(small(filter__pairs=3, filter__skip=999), 1_000) == [0, 1, 999]  # ShopWorld
    assert _looked_at(small(**sorted_file), 2) == [0, 1]


def test_a_killed_filter_goes_on_with_the_block_it_was_in(done, policy, tmp_path, monkeypatch):
    written = filter_run.write_records

    def dying(path, *rest):
        if path.name == "00001.parquet":
            raise KeyboardInterrupt
        written(path, *rest)

    monkeypatch.setattr(filter_run, "write_records", dying)
    with pytest.raises(KeyboardInterrupt):
        run(config(policy), tmp_path / "run")
    monkeypatch.setattr(filter_run, "write_records", written)
    run(config(policy), tmp_path / "run")
    assert_same(done, tmp_path / "run")


def test_other_thresholds_take_no_new_rollouts(done, policy, tmp_path, monkeypatch):
    def forbidden(*_):
        raise AssertionError("sampled")

    monkeypatch.setattr(Generator, "samples", forbidden)
    again = config(policy, filter__records=str(done / "filter" / "records"), filter__size=10)
    run(again, tmp_path / "run")
    assert len(kept(tmp_path / "run")["rows"]) == 10


def test_a_stricter_filter_goes_on_with_records_that_the_first_one_can_use(
    done, policy, tmp_path, monkeypatch
):
    written, records, confidences = filter_run.write_records, str(tmp_path / "records"), []

    class Recorder(filter_run.Recorder):
        def __init__(self, own, policy, confidence):
            confidences.append(confidence)
            super().__init__(own, policy, confidence)

    def dying(path, *rest):
        if path.name == "00001.parquet":
            raise KeyboardInterrupt
        written(path, *rest)

    monkeypatch.setattr(filter_run, "Recorder", Recorder)
    monkeypatch.setattr(filter_run, "write_records", dying)
    with pytest.raises(KeyboardInterrupt):
        run(config(policy, filter__records=records), tmp_path / "first")
    monkeypatch.setattr(filter_run, "write_records", written)
    stricter = {"filter__confidence": 0.5, "filter__similarity": 0.5}
    run(config(policy, filter__records=records, **stricter), tmp_path / "stricter")
    run(config(policy, filter__records=records), tmp_path / "first")
    assert confidences == [1.0] * 3
    assert kept(tmp_path / "first") == kept(done)


def test_what_had_no_rollouts_as_a_repeat_stays_one(policy, tmp_path, monkeypatch):
    """Pair 2 repeats pair 1, which with a lower similarity repeats another one itself."""
    repeats = {0.9: [2], 0.5: [1]}
    monkeypatch.setattr(filter_run, "_repeats", lambda *own: np.asarray(repeats[own[-1]], np.int64))
    own = {"filter__size": 0, "filter__records": str(tmp_path / "records")}
    for similarity, missing_steps in ((0.9, [2]), (0.5, [1, 2])):
        workdir = tmp_path / str(similarity)
        run(config(policy, filter__similarity=similarity, **own), workdir)
        assert kept(workdir)["rows"] == [row for row in range(40) if row not in missing_steps]
        told = json.loads((workdir / "filter" / "report.json").read_text())["by_reason"]
        assert told["duplicate"] == len(missing_steps)
        assert told["unmeasured"] == 0


def test_parts_that_share_a_folder_make_what_one_run_makes(done, policy, tmp_path, capsys):
    records = tmp_path / "records"
    for part in (1, 0):
        parted = config(policy, filter__records=str(records), filter__part=part, filter__parts=2)
        run(parted, tmp_path / f"part{part}")
        if part:
            assert "2 of 3 blocks are not there yet" in capsys.readouterr().out
            assert not (tmp_path / "part1" / "summary.json").exists()
    assert kept(tmp_path / "part0") == kept(done)
    run(config(policy, filter__records=str(records), filter__part=1, filter__parts=2),
        tmp_path / "part1")  # fmt: skip
    assert kept(tmp_path / "part1") == kept(done)


def test_records_of_other_pairs_are_refused(done, policy, tmp_path):
    other = config(policy, filter__records=str(done / "filter" / "records"), filter__pairs=20)
    with pytest.raises(ValueError, match=r"something else:\n  pairs: 40 in the records, 20 now"):
        run(other, tmp_path / "run")
    other = config(policy, filter__records=str(done / "filter" / "records"), seed=1)
    with pytest.raises(ValueError, match=r"seed: 0 in the records, 1 now"):
        run(other, tmp_path / "another")


def test_records_of_another_policy_are_refused(done, policy, tmp_path, monkeypatch):
    def changed_policy(*arguments):
        made, own, splits = begin(*arguments)
        params = own.params | {"norm": own.params["norm"] + 1e-3}
        return made, type(own)(**vars(own) | {"params": params}), splits

    monkeypatch.setattr(filter_run, "begin", changed_policy)
    with pytest.raises(ValueError, match=r"policy: .* in the records"):
        run(config(policy, filter__records=str(done / "filter" / "records")), tmp_path / "run")


def test_what_the_records_left_out_is_not_taken_for_measured(done, policy, tmp_path):
    """They were made with a similarity of 1; none at all would let more through."""
    records = str(done / "filter" / "records")
    with pytest.raises(ValueError, match=r"were made with similarity 1\.0.*now: similarity 0\.0"):
        run(config(policy, filter__records=records, filter__similarity=0.0), tmp_path / "run")


def test_a_filters_folder_belongs_to_its_config(done, policy):
    with pytest.raises(ValueError, match=r"filter\.low: 0\.0 in the workdir, 0\.1 now"):
        run(config(policy, filter__low=0.1), done)


def test_kinds_in_front_that_are_not_there_are_said(done, policy, tmp_path, capsys):
    records = str(done / "filter" / "records")
    run(config(policy, filter__records=records, filter__front=("negaton",)), tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "15 of filter.front=['negaton'] were wanted, only 0 are left; the kinds here" in said


def test_an_empty_result_names_the_threshold(done, policy, tmp_path):
    records = str(done / "filter" / "records")
    with pytest.raises(ValueError, match=r"no prompt is left of 40.*low=0\.9"):
        run(config(policy, filter__records=records, filter__low=0.9), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter__low": 2.0}, "low=2.0"),
        ({"filter__pairs": 0}, "filter.pairs=0"),
        ({"filter__rollouts": 0}, "filter.rollouts=0"),
        ({"filter__part": 2, "filter__parts": 2}, "filter.part=2"),
    ],
)
def test_what_cannot_work_is_said_at_once(policy, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(config(policy, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_filtered_set_can_be_trained_on(done, policy, tmp_path):
    data = json.loads((done / "summary.json").read_text())["data"]
    start = str(policy / "checkpoints" / "sft")
    more = {"rl__steps": 1, "rl__eval_every": 1, "eval__pass_k": 0}
    run(small(data__name="made", data__path=data, start=start, **more), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["n"] == 32
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no data set at"):
        run(small(data__name="made", data__path=str(tmp_path)), tmp_path / "run")
