"""The folder of a run: local, bound to one recipe, locked by one command at a time."""

import json
import shutil
import subprocess
import sys

import ml_collections
import pytest

from she_jax.runs.config import plain
from she_jax.training.files import write_json
from she_jax.training.workdir import check_local, claim_workdir, lock_workdir
from she_jax.types import UserError


def recipe(**changes):
    base = ml_collections.ConfigDict({"seed": 0, "optim": {"lr": 1e-3, "betas": (0.9, 0.99)}})
    base.update_from_flattened_dict(changes)
    return plain(base)


def test_a_workdir_is_claimed_once_and_recognized(tmp_path):
    claim_workdir(tmp_path / "run", recipe())
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved == {"schema": 2, "seed": 0, "optim": {"lr": 1e-3, "betas": [0.9, 0.99]}}
    (tmp_path / "run" / "checkpoints").mkdir()
    claim_workdir(tmp_path / "run", recipe())


def test_a_changed_recipe_lists_every_key_that_differs(tmp_path):
    claim_workdir(tmp_path, recipe())
    (tmp_path / "checkpoints").mkdir()
    changed = recipe(**{"seed": 1, "optim.lr": 2e-3}) | {"extra": {"flag": True}}
    with pytest.raises(UserError, match="another config") as error:
        claim_workdir(tmp_path, changed)
    message = str(error.value)
    assert "seed: 0 in the workdir, 1 now" in message
    assert "optim.lr: 0.001 in the workdir, 0.002 now" in message
    assert "extra.flag: absent in the workdir, true now" in message
    assert "betas" not in message
    assert "schema" not in message
    assert "--workdir" in message


def test_a_folder_without_results_takes_another_recipe(tmp_path):
    claim_workdir(tmp_path, recipe())
    claim_workdir(tmp_path, recipe(seed=1))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


def test_a_folder_of_an_earlier_version_is_refused(tmp_path):
    """Its keys had other names, so a list of those that differ would help nobody."""
    write_json(tmp_path / "config.json", recipe())
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        UserError, match=r"another version of she_jax \(schema 1, this one reads 2\)"
    ):
        claim_workdir(tmp_path, recipe())


def test_a_folder_of_other_files_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex"):
        claim_workdir(tmp_path, recipe())
    with pytest.raises(UserError, match="is a file"):
        claim_workdir(tmp_path / "thesis.tex", recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_kill_while_claiming_and_a_broken_config(tmp_path):
    (tmp_path / "config.json.part").write_text('{"se')
    claim_workdir(tmp_path, recipe())
    (tmp_path / "config.json").write_text('{"se')
    with pytest.raises(UserError, match="not JSON"):
        claim_workdir(tmp_path, recipe())


@pytest.mark.parametrize("address", ["gs://b/x", "s3://b/x", "hdfs:///x", "file:///x", "GS://b"])
def test_buckets_and_urls_are_refused_in_any_setting(tmp_path, address):
    for place in ({"data": {"path": address}}, {"stages": {"one": {"init_from": address}}}):
        with pytest.raises(UserError, match=r"^--config\.(data\.path|stages\.one\.init_from)="):
            check_local(place, tmp_path)
    with pytest.raises(UserError, match=f"--workdir={address.replace(':///', '://')}: only local"):
        check_local({}, tmp_path.__class__(address))


def test_other_texts_are_no_buckets(tmp_path):
    texts = ["module:Class", "C:/runs", "a: b", "query=q,docid=sku", "runs/gs:/x", "http: //x"]
    check_local({"texts": texts, "number": 3}, tmp_path)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    return tmp_path / "model"


def test_a_path_may_change_if_its_content_stays(tmp_path, model, capsys):
    folder = tmp_path / "run"
    claim_workdir(folder, {"model": {"name": str(model)}, "data": {"dir": "a"}, "seed": 0})
    (folder / "checkpoints").mkdir()
    moved = {"model": {"name": str(tmp_path / "moved")}, "data": {"dir": "b"}, "seed": 0}
    shutil.copytree(model, tmp_path / "moved")
    with pytest.raises(UserError, match="seed: 0 in the workdir, 1 now") as error:
        claim_workdir(folder, moved | {"seed": 1})
    assert "model.name" not in str(error.value)
    claim_workdir(folder, moved)
    assert json.loads((folder / "config.json").read_text()) == {"schema": 2, **moved}
    assert 'moved" has the content of' in capsys.readouterr().out
    (tmp_path / "moved" / "weights").write_text("2")
    shutil.move(tmp_path / "moved", tmp_path / "again")
    with pytest.raises(UserError, match=r"model\.name: .*moved.* in the workdir, .*again.* now"):
        claim_workdir(folder, moved | {"model": {"name": str(tmp_path / "again")}})


def test_a_table_that_was_edited_is_not_that_of_the_run(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("a")
    recipe, folder = {"data": {"path": str(table)}}, tmp_path / "run"
    claim_workdir(folder, recipe)
    table.write_text("b")
    claim_workdir(folder, recipe)  # nothing is there yet
    table.write_text("a")
    claim_workdir(folder, recipe)
    (folder / "checkpoints").mkdir()
    table.touch()
    claim_workdir(folder, recipe)
    table.write_text("b")
    with pytest.raises(UserError, match=r"data\.path: .* has another content than when the run in"):
        claim_workdir(folder, recipe)
    table.unlink()
    claim_workdir(folder, recipe)  # what was prepared of it suffices


def test_the_path_of_a_run_without_digests_may_not_change(tmp_path, model):
    """As an earlier version left it; nor may one that names nothing on this disk."""
    folder = tmp_path / "run"
    claim_workdir(folder, {"model": {"name": "scratch"}, "init_from": str(model)})
    (folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"model\.name"):
        claim_workdir(folder, {"model": {"name": str(model)}, "init_from": str(model)})
    (folder / "contents.json").unlink()
    copied = shutil.copytree(model, tmp_path / "copy")
    with pytest.raises(UserError, match="init_from"):
        claim_workdir(folder, {"model": {"name": "scratch"}, "init_from": str(copied)})


def test_a_dead_process_leaves_no_lock(tmp_path):
    code = (
        "import os, signal, sys, filelock\n"
        "filelock.FileLock(sys.argv[1]).acquire()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")], check=False)
    assert (tmp_path / ".lock").exists()
    with (
        lock_workdir(tmp_path),
        pytest.raises(UserError, match="another command is running in"),
        lock_workdir(tmp_path),
    ):
        pass
    with lock_workdir(tmp_path):
        pass
    (tmp_path / "read_only").touch()
    with lock_workdir(tmp_path / "read_only"):  # no folder: nothing to lock
        pass
