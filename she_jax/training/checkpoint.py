"""Checkpoints with verified integrity.

Orbax writes the arrays and makes a save atomic (a temporary folder, then a rename). It does not
detect a file that was truncated or altered afterwards. So every checkpoint has ``SHA256SUMS`` (the
format of ``sha256sum -c``, after a line with the number of files), checked before a restore.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from she_jax.types import TrainState, UserError

MANIFEST = "SHA256SUMS"
_LOG = logging.getLogger("she_jax")
LEFTOVER = ".orbax-checkpoint-tmp"  # in the names of Orbax's saves in progress or interrupted


class Checkpoints:
    """The checkpoints of one run, in a folder per step: ``<directory>/<step>``.

    The directory may be on a local or a shared disk. The last ``keep`` checkpoints are kept, and
    for each of them the best one as of its step, so that a fallback still has its best checkpoint.
    Saving is synchronous: when ``save`` returns, the checkpoint is on disk.

    Args:
      directory: parent of the checkpoints; created if missing.
      keep: how many of the last checkpoints to keep, at least 1.
      every: updates between two checkpoints, at least 1; read by ``she_jax.training.loop``.
      warn: called with a sentence for each damaged checkpoint.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 2,
        every: int = 1,
        warn: Callable[[str], Any] = _LOG.warning,
    ):
        if keep < 1:
            raise UserError(f"keep={keep}: at least 1 checkpoint must be kept")
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self.every = every
        self._warn = warn
        self._best_of: dict[int, int | None] = {}
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, intact or not, in ascending order."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    @property
    def latest_step(self) -> int | None:
        """The last step that has a checkpoint, intact or not; None if there is none."""
        return max(self.steps, default=None)

    def save(self, step: int, state: TrainState, host: Mapping, *, best: bool = False) -> None:
        """Saves a checkpoint atomically, then deletes those that are no longer kept.

        Args:
          step: its number; each step is saved once.
          state: the device state.
          host: the host state (data position, curriculum, best score, ...), which must survive JSON
            unchanged: string keys, lists, no tuples, no NaN.
          best: whether this is the best checkpoint so far.

        Raises:
          UserError: if the step exists already, or ``host`` does not survive JSON.
          OSError: if writing failed (a full disk); earlier checkpoints are untouched.
        """
        path = self.directory / str(step)
        if path.exists() and _damage(path):  # left by an interrupted save
            self._set_aside(path)
        if path.exists():
            raise UserError(f"{path} exists already: a step is saved once, after restore()")
        if json.loads(json.dumps(host)) != host:
            raise UserError(f"host state {host!r} does not survive JSON: use string keys and lists")
        steps = self.steps
        best_step = step if best else self._best_of.get(steps[-1]) if steps else None
        record = {"host": dict(host), "best": best_step, "arrays": _describe(state)}
        rest = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(rest),
            record=ocp.args.JsonSave(record),
        )
        self._delete(f"*{LEFTOVER}*")
        # Checked first, since on a full disk Orbax prints pages of tracebacks from its threads.
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if (free := shutil.disk_usage(self.directory).free) < size:
            raise self._write_error(path, f"{size:,} bytes to write, {free:,} bytes free", steps)
        try:
            self._orbax.save(path, args=items)
            if jax.process_index() == 0:
                _write_manifest(path)
        except (OSError, ValueError) as error:
            # TensorStore reports errors of the system as a ValueError with this mark in its text.
            if isinstance(error, ValueError) and "os_error_code" not in str(error):
                raise
            # Threads of Orbax may still be writing, so the next save deletes what is left. Under
            # the step's name it would look like a checkpoint without a manifest.
            if path.exists():
                path.rename(f"{path}{LEFTOVER}")
            raise self._write_error(path, str(error), steps) from error
        self._best_of[step] = best_step
        last = [*steps, step][-self._keep :]
        kept_steps = {*last, *(self._best_of.get(s) for s in last)}
        self._delete(*(str(s) for s in steps if s not in kept_steps))

    def restore(self, template: TrainState) -> tuple[int, TrainState, dict] | None:
        """Restores the last intact checkpoint, bit for bit.

        A damaged one is renamed to ``<step>.damaged`` and reported to ``warn`` with the reason, and
        the one before is tried.

        Args:
          template: a state (or ``jax.ShapeDtypeStruct`` leaves) with the shapes, dtypes and
            shardings to restore to.

        Returns:
          (step, state, host), or None if there is no intact checkpoint.

        Raises:
          UserError: if the checkpoint is intact but its arrays differ from the template's.
        """
        for step in reversed(self.steps):
            path = self.directory / str(step)
            if reason := _damage(path):
                new_path = self._set_aside(path)
                self._warn(
                    f"checkpoint {path} is damaged: {reason}. It is now {new_path.name}; "
                    "falling back to the one before"
                )
                continue
            record = self._record(path)
            _check_arrays(path, record["arrays"], _describe(template))
            rest = {"step": template.step, "opt_state": template.opt_state, "key": template.key}
            items = self._orbax.restore(
                path,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(_abstract(template.params)),
                    rest=ocp.args.StandardRestore(_abstract(rest)),
                ),
            )
            self._best_of = {step: record["best"]}
            state = dataclasses.replace(template, params=items["params"], **items["rest"])
            return step, state, record["host"]
        return None

    def restore_params(self, template: Any, *, up_to: int | None = None) -> tuple[int, Any] | None:
        """Restores only the parameters of the best checkpoint, or of the last if none was best.

        Changes nothing on disk, so it may be used on a run in progress. Damaged checkpoints are
        skipped and reported to ``warn``.

        Args:
          template: parameters (or ``jax.ShapeDtypeStruct`` leaves), as for ``restore``.
          up_to: skip the checkpoints of later steps.

        Returns:
          (step, params), or None if there is no intact checkpoint.

        Raises:
          UserError: if the checkpoint is intact but its arrays differ from the template's.
        """
        chosen = None
        for step in reversed([s for s in self.steps if up_to is None or s <= up_to]):
            path = self.directory / str(step)
            if reason := _damage(path):
                self._warn(f"checkpoint {path} is skipped: {reason}")
                continue
            best = self._record(path)["best"]
            if best not in (None, step):
                if reason := _damage(self.directory / str(best)):
                    self._warn(f"best checkpoint {best} is skipped in favor of {path}: {reason}")
                else:
                    step, path = best, self.directory / str(best)
            chosen = step, path
            break
        if chosen is None:
            return None
        step, path = chosen
        saved = {
            name.removeprefix(".params"): array
            for name, array in self._record(path)["arrays"].items()
            if name.startswith(".params")
        }
        _check_arrays(path, saved, _describe(template))
        restore = ocp.args.StandardRestore(_abstract(template))
        return step, self._orbax.restore(path, args=ocp.args.Composite(params=restore))["params"]

    @staticmethod
    def _write_error(path: Path, reason: str, steps: list[int]) -> OSError:
        return OSError(
            f"could not save the checkpoint {path}: {reason}. Make room on the disk and start "
            f"again; the checkpoints of steps {steps} are intact"
        )

    def _record(self, path: Path) -> dict:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._orbax.restore(path, args=args)["record"]

    def _delete(self, *patterns: str) -> None:
        if jax.process_index() != 0:
            return
        for path in [path for pattern in patterns for path in self.directory.glob(pattern)]:
            # Renamed first: a kill during the deletion must not leave part of a checkpoint under a
            # step's name.
            temporary = path if LEFTOVER in path.name else path.rename(f"{path}{LEFTOVER}")
            shutil.rmtree(temporary)

    def _set_aside(self, path: Path) -> Path:
        new_path = path.with_name(f"{path.name}.damaged")
        number = 1
        while new_path.exists():
            number += 1
            new_path = path.with_name(f"{path.name}.damaged{number}")
        if jax.process_index() == 0:
            path.rename(new_path)
        return new_path


def _abstract(tree: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None) or device
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree)


def _describe(tree: Any) -> dict[str, list]:
    """Maps the path of each array to its shape and dtype, as JSON returns them."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)] for path, x in leaves}


def _check_arrays(path: Path, saved: dict, wanted: dict) -> None:
    """Raises one error for all differing arrays; Orbax would cast them to fit the template."""
    lines = [
        f"  {name}: saved {saved.get(name, 'absent')}, expected {wanted.get(name, 'absent')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        raise UserError(
            f"checkpoint {path} holds other arrays than this config needs; resume with the model "
            "and optimizer it was saved with, or choose another workdir:\n" + "\n".join(lines)
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def params_digest(params: Any) -> str:
    """A short hash of parameters, whatever file they are from."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(params)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _write_manifest(path: Path) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"# {len(files)} files"]
    lines += [f"{_sha256(file)}  {file.relative_to(path).as_posix()}" for file in files]
    part = path / f"{MANIFEST}.part"
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(path / MANIFEST)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint on disk, or None if it is as it was saved."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing, the save was interrupted"
    lines = manifest.read_bytes().decode("utf-8", "replace").splitlines()
    if not lines or lines[0] != f"# {len(lines) - 1} files":
        return f"{MANIFEST} is incomplete"
    for line in lines[1:]:
        digest, _, name = line.partition("  ")
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != digest:
            return f"{name} ({file.stat().st_size} bytes) is not as it was saved"
    return None
