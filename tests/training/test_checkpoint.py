"""Checkpoints: restored bit for bit, written whole or not at all, and damage detected."""

import os
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from recipes import ROOT, make_state, train_some

from she_jax.training import checkpoint
from she_jax.training.checkpoint import MANIFEST, Checkpoints
from she_jax.types import TrainState


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_restored_state_equals_the_saved_one_bit_for_bit(tmp_path):
    """NaN, -0.0, denormals, bfloat16, uint32 keys, empty optimizer states and the host dict."""
    state = make_state()
    host = {"position": [3, 17], "score": 0.1 + 0.2, "curriculum": {"stage": 1, "seen": {}}}
    Checkpoints(tmp_path).save(3, state, host)
    step, restored, restored_host = Checkpoints(tmp_path).restore(make_state(1))
    assert (step, restored_host) == (3, host)
    assert_same(restored, state)


def test_restore_takes_abstract_leaves(tmp_path):
    state = make_state()
    Checkpoints(tmp_path).save(3, state, {})
    template = jax.eval_shape(lambda: state)
    assert_same(Checkpoints(tmp_path).restore(template)[1], state)


def test_nothing_saved_restores_to_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.restore(make_state()) is None
    assert checkpoints.restore_params(make_state().params) is None
    assert checkpoints.latest_step is None


def test_trap_11_a_resumed_loop_equals_the_uninterrupted_one(tmp_path):
    """The key, the optimizer's accumulators and the data cursor all come back."""
    data = jnp.arange(20.0)

    def run(state, cursor, until):
        while cursor < until:
            params = dict(state.params)
            params["embed"] = params["embed"] + data[cursor]
            fields = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
            state = train_some(TrainState(params=params, **fields), 1)
            cursor += 1
        return state, cursor

    whole, _ = run(make_state(), 0, 9)
    half, cursor = run(make_state(), 0, 5)
    Checkpoints(tmp_path).save(5, half, {"cursor": cursor})
    _, state, host = Checkpoints(tmp_path).restore(make_state(7))
    resumed, _ = run(state, host["cursor"], 9)
    assert_same(resumed, whole)


def test_restored_arrays_have_the_shardings_of_the_template(tmp_path):
    """Saved on one device, restored sharded over eight, and back."""
    state = make_state()
    Checkpoints(tmp_path / "one").save(1, state, {})
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        spec = PartitionSpec("fsdp") if x.shape[:1] == (40,) else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    template = jax.tree.map(place, make_state(1))
    sharded = Checkpoints(tmp_path / "one").restore(template)[1]
    assert sharded.params["embed"].sharding == template.params["embed"].sharding
    assert_same(sharded, state)
    Checkpoints(tmp_path / "eight").save(1, sharded, {})
    assert_same(Checkpoints(tmp_path / "eight").restore(state)[1], state)


def test_the_last_checkpoints_and_their_best_are_kept(tmp_path):
    state = make_state()
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step, state, {}, best=step == 2)
    assert checkpoints.steps == [2, 4, 5]
    checkpoints.save(6, state, {}, best=True)
    assert checkpoints.steps == [2, 5, 6], "a fallback to 5 still needs its best, 2"
    checkpoints.save(7, state, {})
    assert checkpoints.steps == [6, 7]


def test_the_best_survives_a_restart(tmp_path):
    Checkpoints(tmp_path, keep=1).save(1, make_state(1), {}, best=True)
    for step in (2, 3):
        checkpoints = Checkpoints(tmp_path, keep=1)
        checkpoints.restore(make_state())
        checkpoints.save(step, make_state(step), {})
    assert checkpoints.steps == [1, 3]
    step, params = Checkpoints(tmp_path).restore_params(make_state().params)
    assert step == 1
    assert_same(params, make_state(1).params)


def test_params_without_a_best_are_the_last(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    checkpoints.save(2, make_state(2), {})
    step, params = checkpoints.restore_params(make_state().params)
    assert step == 2
    assert_same(params, make_state(2).params)
    step, params = checkpoints.restore_params(make_state().params, up_to=1)
    assert step == 1
    assert_same(params, make_state(1).params)
    assert checkpoints.restore_params(make_state().params, up_to=0) is None


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, make_state(1), {"at": 1})
    checkpoints.save(2, make_state(2), {"at": 2})
    return directory


def files_of(directory):
    return sorted(p for p in (directory / "2").rglob("*") if p.is_file() and p.stat().st_size)


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", lambda data: b"{]", None])
def test_damage_to_any_file_is_reported_and_falls_back(two_checkpoints, tmp_path, damage):
    """Each file of the newest checkpoint in turn: cut, one bit flipped, emptied, garbage, gone."""
    files = files_of(two_checkpoints)
    assert len(files) > 10
    for number, original in enumerate(files):
        directory = tmp_path / str(number)
        shutil.copytree(two_checkpoints, directory)
        file = directory / original.relative_to(two_checkpoints)
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage(file.read_bytes()))
        warnings = []
        checkpoints = Checkpoints(directory, warn=warnings.append)
        if number == 0:
            step, params = checkpoints.restore_params(make_state().params)
            assert step == 1
            assert_same(params, make_state(1).params)
            assert checkpoints.steps == [1, 2], "reading parameters changes nothing"
            warnings.clear()
        step, state, host = checkpoints.restore(make_state())
        assert (step, host) == (1, {"at": 1}), file
        assert_same(state, make_state(1))
        assert len(warnings) == 1
        assert str(directory / "2") in warnings[0]
        # An altered manifest blames another file.
        assert file.name in warnings[0] or file.name == MANIFEST
        assert (directory / "2.damaged").is_dir(), "set aside, not deleted"
        assert checkpoints.steps == [1]


@pytest.mark.parametrize("lines", [0, 1, 3, -1])
def test_a_manifest_cut_at_a_line_is_detected(two_checkpoints, tmp_path, lines):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    manifest = tmp_path / "c" / "2" / MANIFEST
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:lines]))
    assert Checkpoints(tmp_path / "c").restore(make_state())[0] == 1


def test_with_all_damaged_nothing_is_restored_and_damaged_folders_keep_apart(
    two_checkpoints, tmp_path
):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    warnings = []
    checkpoints = Checkpoints(tmp_path / "c", warn=warnings.append)
    for step in ("1", "2"):
        (tmp_path / "c" / step / MANIFEST).unlink()
    assert checkpoints.restore(make_state()) is None
    assert len(warnings) == 2
    checkpoints.save(2, make_state(2), {})
    (tmp_path / "c" / "2" / MANIFEST).unlink()
    assert checkpoints.restore(make_state()) is None
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["1.damaged", "2.damaged", "2.damaged2"]


def test_a_run_continues_after_a_fallback(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    (tmp_path / "c" / "2" / "record" / "metadata").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.restore(make_state())
    checkpoints.save(2, make_state(5), {"at": "again"})
    step, state, host = Checkpoints(tmp_path / "c").restore(make_state())
    assert (step, host) == (2, {"at": "again"})
    assert_same(state, make_state(5))


def test_differing_arrays_are_one_error_that_lists_them_all(tmp_path):
    """Orbax alone would cast the dtype; an intact checkpoint that does not fit is not set aside."""
    Checkpoints(tmp_path).save(3, make_state(), {})
    state = make_state()
    params = {"embed": jnp.zeros((41, 8)), "odd": jnp.zeros(4, jnp.bfloat16), "more": jnp.ones(2)}
    template = TrainState(step=state.step, params=params, opt_state=state.opt_state, key=state.key)
    with pytest.raises(ValueError, match="other arrays") as error:
        Checkpoints(tmp_path).restore(template)
    message = str(error.value)
    for word in ("[40, 8]", "[41, 8]", "bfloat16", "['more']", "['half']", "absent"):
        assert word in message
    with pytest.raises(ValueError, match="'more'"):
        Checkpoints(tmp_path).restore_params(params)
    assert Checkpoints(tmp_path).steps == [3]


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
from recipes import make_state
from she_jax.training.checkpoint import Checkpoints
checkpoints = Checkpoints({directory!r})
checkpoints.save(1, make_state(1), {{"at": 1}}, best=True)
big = make_state(2, size=100_000)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, hard))
try:
    checkpoints.save(2, big, {{}})
except OSError as error:
    print(error)
"""


def python(code: str, directory, **values) -> subprocess.Popen:
    """Another process: one to be killed, or whose Orbax threads are left in disorder."""
    code = code.format(tests=str(ROOT / "tests"), directory=str(directory), **values)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_failed_write_leaves_the_previous_checkpoint_and_names_the_path(tmp_path):
    """The system refuses to write more (here a file size limit, which acts like a full disk)."""
    message = python(FULL, tmp_path, limit=500_000).communicate()[0]
    assert f"could not save the checkpoint {tmp_path / '2'}" in message
    assert "Make room on the disk" in message
    assert "steps [1] are intact" in message
    checkpoints = Checkpoints(tmp_path)
    step, state, host = checkpoints.restore(make_state())
    assert (step, host) == (1, {"at": 1})
    assert_same(state, make_state(1))
    checkpoints.save(2, make_state(2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"], "leftovers are deleted"


def test_a_disk_with_too_little_space_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OSError, match=r"bytes to write, 1,000 bytes free. Make room"):
            checkpoints.save(2, make_state(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_full_disk_at_the_manifest_leaves_no_checkpoint_that_looks_damaged(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sha256", full)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.save(2, make_state(2), {})
    assert checkpoints.steps == [1]
    checkpoints.save(2, make_state(2), {})
    assert_same(checkpoints.restore(make_state())[1], make_state(2))


def test_invalid_arguments_are_errors(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="survive JSON"):
        checkpoints.save(1, make_state(), {"pair": (1, 2)})
    with pytest.raises(ValueError, match="survive JSON"):
        checkpoints.save(1, make_state(), {"by_step": {1: 2}})
    checkpoints.save(1, make_state(), {})
    with pytest.raises(ValueError, match="saved once"):
        checkpoints.save(1, make_state(), {})


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from recipes import make_state
from she_jax.training.checkpoint import Checkpoints
checkpoints = Checkpoints({directory!r})
for step in range(1, 1000):
    checkpoints.save(step, make_state(step), {{"at": step}})
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_an_intact_checkpoint(tmp_path):
    """SIGKILL in the middle of saving; a checkpoint that was reported as saved exists."""
    process = python(KILLED, tmp_path)
    with process:
        for line in process.stdout:
            if line.strip() == "3":
                break
        time.sleep(0.02)
        process.kill()
        reported = [3, *map(int, process.stdout.read().split())][-1]
    checkpoints = Checkpoints(tmp_path)
    step, state, host = checkpoints.restore(make_state())
    assert step in (reported, reported + 1)
    assert host == {"at": step}
    assert_same(state, make_state(step))
    checkpoints.save(step + 1, state, {})
    assert not list(tmp_path.glob("*tmp*")), "the next save deletes leftovers"


def test_saving_is_quiet(tmp_path, capfd):
    """Orbax logs a lot."""
    state = make_state()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.restore(state)
    assert capfd.readouterr() == ("", "")
