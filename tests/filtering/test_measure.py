"""Filtering with a policy: resume, other thresholds, several parts, and training on the result."""

import json

import numpy as np
import pytest
from recipes import changed
from recipes import config as training_config

from she_jax.data.dataset import open_prepared, open_split
from she_jax.filtering import measure
from she_jax.filtering.records import read_records
from she_jax.generate.generator import Generator
from she_jax.recipes import filter as filter_recipe
from she_jax.runs import filter as filter_run
from she_jax.runs.config import parse
from she_jax.runs.run import run
from she_jax.runs.validate import check_front
from she_jax.types import UserError

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
    monkeypatch.setattr(measure, "BLOCK", 16)


def config(policy, **changes):
    return changed(filter_recipe.get_config(), SMALL | {"checkpoint": str(policy)}, **changes)


@pytest.fixture(scope="module")
def done(policy, tmp_path_factory):
    """An uninterrupted filter."""
    workdir = tmp_path_factory.mktemp("filter") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "BLOCK", 16)
        run(config(policy), workdir)
    return workdir


def kept(workdir):
    return json.loads((workdir / "filter" / "kept.json").read_text())


def assert_same(workdir, other):
    assert kept(workdir) == kept(other)
    folder, other_folder = workdir / "filter", other / "filter"
    for shard in sorted((folder / "records").glob("*.parquet")):
        records, other_records = map(read_records, (shard, other_folder / "records" / shard.name))
        for a, b in zip(records, other_records, strict=True):
            assert vars(a) | {"embedding": None} == vars(b) | {"embedding": None}
            np.testing.assert_array_equal(a.embedding, b.embedding)
    pages = [path / "report.html" for path in (folder, other_folder)]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_filter_writes_a_data_set_a_report_and_the_rollouts(done, policy):
    summary = json.loads((done / "summary.json").read_text())
    assert summary["kept"] == 20
    assert summary["pairs"] == 40
    policy_recipe = json.loads((policy / "config.json").read_text())
    splits = {"train": 20, "validation": 16, "test": 32, "test_longtail": 16}
    assert policy_recipe["shopworld"]["pairs"] == [200, 16, 32, 16]
    rows = kept(done)["rows"]
    source = open_split(next((policy / "data").rglob("made.json")).parent, "train")
    for split, count in splits.items():
        pairs = open_split(summary["data"], split)
        assert len(pairs) == count
        if split == "train":
            assert [pair.uid for pair in pairs] == [source[row].uid for row in rows]
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


def test_the_measured_rows_are_spread_over_a_file_that_may_be_sorted(tmp_path):
    """Another ``skip``, that of the next stage, gives other rows while there are any."""
    file = {"data__name": "jsonl", "data__path": "pairs.jsonl", "filter__pairs": 100}

    def measured_rows(size, **changes):
        return measure._measured_rows(parse(training_config(**changes), tmp_path).measure, size)

    parts = [measured_rows(1_000, **file, filter__skip=100 * n) for n in range(10)]
    assert sorted(row for part in parts for row in part) == list(range(1_000))
    for part in parts:
        assert part == sorted(part)
        assert min(np.histogram(part, bins=5, range=(0, 1_000))[0]) >= 10  # 20 of 100 on average
    assert parts[0] == measured_rows(1_000, **file, filter__skip=1_000)
    assert measured_rows(1_000, filter__pairs=3, filter__skip=999) == [0, 1, 999]  # ShopWorld
    assert measured_rows(2, **file) == [0, 1]


def kill_in_the_second_block(recipe, workdir, monkeypatch):
    write_records = measure.write_records

    def killed(path, *rest):
        if path.name == "00001.parquet":
            raise KeyboardInterrupt
        write_records(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "write_records", killed)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, workdir)


def test_a_killed_filter_resumes_with_the_block_it_was_in(done, policy, tmp_path, monkeypatch):
    kill_in_the_second_block(config(policy), tmp_path / "run", monkeypatch)
    run(config(policy), tmp_path / "run")
    assert_same(done, tmp_path / "run")


def test_other_thresholds_need_no_new_rollouts(done, policy, tmp_path, monkeypatch):
    def forbidden(*_):
        raise AssertionError("sampled")

    monkeypatch.setattr(Generator, "sample", forbidden)
    again = config(policy, filter__records=str(done / "filter" / "records"), filter__size=10)
    run(again, tmp_path / "run")
    assert len(kept(tmp_path / "run")["rows"]) == 10


def test_a_stricter_filter_continues_records_for_the_thresholds_of_the_first(
    done, policy, tmp_path, monkeypatch
):
    records, similarities = str(tmp_path / "records"), []
    find = measure._duplicates

    def find_duplicates(records, source, rows, similarity):
        similarities.append(similarity)
        return find(records, source, rows, similarity)

    monkeypatch.setattr(measure, "_duplicates", find_duplicates)
    first = config(policy, filter__records=records)
    kill_in_the_second_block(first, tmp_path / "first", monkeypatch)
    stricter = {"filter__confidence": 0.5, "filter__similarity": 0.5}
    run(config(policy, filter__records=records, **stricter), tmp_path / "stricter")
    run(first, tmp_path / "first")
    assert similarities == [1.0, 1.0, 0.5, 1.0]  # the stricter one looks for more afterwards
    assert kept(tmp_path / "first") == kept(done)


def test_a_duplicate_without_rollouts_stays_a_duplicate(policy, tmp_path, monkeypatch):
    """Pair 2 repeats pair 1, which with a lower similarity repeats another pair itself."""
    duplicates = {0.9: [2], 0.5: [1]}

    def find_duplicates(records, source, rows, similarity):
        return np.asarray(duplicates[similarity], np.int64)

    monkeypatch.setattr(measure, "_duplicates", find_duplicates)
    changes = {"filter__size": 0, "filter__pairs": 16, "filter__records": str(tmp_path / "records")}
    for similarity, dropped in ((0.9, [2]), (0.5, [1, 2])):
        workdir = tmp_path / str(similarity)
        run(config(policy, filter__similarity=similarity, **changes), workdir)
        assert kept(workdir)["rows"] == [row for row in range(16) if row not in dropped]
        by_reason = json.loads((workdir / "filter" / "report.json").read_text())["by_reason"]
        assert by_reason["duplicate"] == len(dropped)
        assert by_reason["unmeasured"] == 0


def test_parts_that_share_a_folder_give_the_result_of_a_single_run(done, policy, tmp_path, capsys):
    changes = {"filter__records": str(tmp_path / "records"), "filter__parts": 2}
    workdirs = [tmp_path / "part0", tmp_path / "part1"]
    parts = [config(policy, filter__part=part, **changes) for part in (0, 1)]
    run(parts[1], workdirs[1])
    assert "2 of 3 blocks are missing" in capsys.readouterr().out
    assert not (workdirs[1] / "summary.json").exists()
    run(parts[0], workdirs[0])
    assert kept(workdirs[0]) == kept(done)
    run(parts[1], workdirs[1])
    assert kept(workdirs[1]) == kept(done)


def test_records_of_other_pairs_are_refused(done, policy, tmp_path):
    other = config(policy, filter__records=str(done / "filter" / "records"), filter__pairs=20)
    with pytest.raises(ValueError, match=r"something else:\n  pairs: 40 in the records, 20 now"):
        run(other, tmp_path / "run")
    other = config(policy, filter__records=str(done / "filter" / "records"), seed=1)
    with pytest.raises(ValueError, match=r"seed: 0 in the records, 1 now"):
        run(other, tmp_path / "another")


def test_records_of_another_policy_are_refused(done, policy, tmp_path, monkeypatch):
    start_from_policy = filter_run.start_from_policy

    def start_from_another_policy(*arguments):
        dataset, lm, params = start_from_policy(*arguments)
        return dataset, lm, params | {"norm": params["norm"] + 1e-3}

    monkeypatch.setattr(filter_run, "start_from_policy", start_from_another_policy)
    with pytest.raises(ValueError, match=r"policy: .* in the records"):
        run(config(policy, filter__records=str(done / "filter" / "records")), tmp_path / "run")


def test_looser_thresholds_than_those_of_the_records_are_refused(done, policy, tmp_path):
    """The records were made with a similarity of 1; without one more pairs need rollouts."""
    records = str(done / "filter" / "records")
    with pytest.raises(ValueError, match=r"were made with similarity 1\.0.*now: 0\.0"):
        run(config(policy, filter__records=records, filter__similarity=0.0), tmp_path / "run")


def test_a_folder_of_a_filter_refuses_another_config(done, policy):
    with pytest.raises(ValueError, match=r"filter\.low: 0\.0 in the workdir, 0\.1 now"):
        run(config(policy, filter__low=0.1), done)


def test_too_few_pairs_of_the_kinds_in_front_are_reported(done, policy, tmp_path, capsys):
    records = str(done / "filter" / "records")
    run(config(policy, filter__records=records, filter__front=("negation",)), tmp_path / "run")
    output = " ".join(capsys.readouterr().out.split())
    assert "15 of filter.front=['negation'] were wanted, only" in output


def test_kinds_in_front_are_a_list_and_must_exist(done, policy, tmp_path):
    """On the command line a list is one text with commas."""
    changes = {"filter__front": (" negation,plain, ", "brand")}
    front = parse(training_config(**changes), tmp_path).filter.front
    assert front == ("negation", "plain", "brand")
    data = open_prepared(json.loads((done / "summary.json").read_text())["data"])
    check_front(data, ("negation", "question"))
    with pytest.raises(UserError, match=r"kind 'negaton' or 'Brand'; expected some of: .*negation"):
        check_front(data, ("negaton", "question", "Brand"))


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
def test_invalid_values_are_refused_before_anything_is_written(policy, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(config(policy, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_filtered_set_can_be_trained_on(done, policy, tmp_path):
    data = json.loads((done / "summary.json").read_text())["data"]
    init_from = str(policy / "checkpoints" / "sft")
    changes = {"init_from": init_from, "rl__steps": 1, "rl__eval_every": 1, "eval__pass_k": 0}
    run(training_config(data__name="prepared", data__path=data, **changes), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["n"] == 32
    with pytest.raises(FileNotFoundError, match="no data set at"):
        run(training_config(data__name="prepared", data__path=str(tmp_path)), tmp_path / "other")
