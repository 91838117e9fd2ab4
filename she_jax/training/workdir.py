"""The folder of a run: bound to one config, and locked by one command at a time."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from she_jax.training.files import write_json
from she_jax.types import UserError

# While none of these exists, the recipe may change without loss.
ARTIFACTS = ("checkpoints", "predictions.jsonl", "step_queries", "chains", "filter")
LOCK = ".lock"
SCHEMA = 2  # of config.json: raised when keys are renamed, so that old folders are refused


def claim_workdir(
    workdir: str | os.PathLike, recipe: Mapping[str, Any], artifacts: Sequence[str] = ARTIFACTS
) -> None:
    """Creates the folder of a run with its ``config.json``, or checks that it belongs to this run.

    A folder without results of training or evaluation accepts a new recipe. ``export``, which asks
    for an export of the policy, may change at any time.

    Args:
      workdir: the folder.
      recipe: the run's recipe as plain values.
      artifacts: names in the folder that mark results of training or evaluation.

    Raises:
      UserError: if the folder holds other files and no ``config.json``, or another recipe. The
        message lists every key that differs, with both values.
    """
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir {workdir} is a file: give a folder with --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    path, current = workdir / "config.json", {"schema": SCHEMA, **recipe}
    if not path.exists():
        # A kill while config.json is written leaves only config.json.part.
        if others := sorted(
            p.name for p in workdir.iterdir() if p.name not in ("config.json.part", LOCK)
        ):
            raise UserError(
                f"workdir {workdir} has no config.json, but other files ({', '.join(others[:5])}): "
                "give a new or empty folder with --workdir"
            )
        write_json(path, current)
        return
    try:
        saved = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}): give a new folder with --workdir"
        ) from error
    old, new = _flat(saved), _flat(current)
    lines = [
        f"  {key}: {_value(old, key)} in the workdir, {_value(new, key)} now"
        for key in sorted(old.keys() | new.keys())
        if _value(old, key) != _value(new, key) and key.rpartition(".")[2] != "export"
    ]
    if lines and not any((workdir / name).exists() for name in artifacts):
        write_json(path, current)
    elif lines:
        _check_schema(saved, path)
        raise UserError(
            f"workdir {workdir} belongs to a run with another config:\n"
            + "\n".join(lines)
            + "\nGive a new folder with --workdir, or the old values to resume the old run"
        )


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe in a run's ``config.json``, or that of a Hugging Face directory, without ``kind``.

    Raises:
      UserError: if an earlier version of she_jax wrote it.
    """
    path = folder / "config.json"
    recipe = json.loads(path.read_text(encoding="utf-8"))
    if "kind" in recipe:
        _check_schema(recipe, path)
        del recipe["schema"]  # of the file, not of the recipe, which is compared with others
    return recipe


def _check_schema(recipe: Mapping[str, Any], path: Path) -> None:
    if recipe.get("schema") != SCHEMA:
        raise UserError(
            f"{path} is of another version of she_jax (schema {recipe.get('schema', 1)}, this one "
            f"reads {SCHEMA}): use that version, or start anew in another --workdir"
        )


@contextmanager
def lock_workdir(workdir: str | os.PathLike) -> Iterator[None]:
    """Locks a folder for this process, if its file system supports it and it may be written.

    The system releases the lock of a process that ends, however it ends.

    Raises:
      UserError: if another command is running in it.
    """
    lock = FileLock(Path(workdir) / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:  # an OSError, too
        raise UserError(f"another command is running in {workdir}: wait for it") from error
    except (OSError, NotImplementedError):
        pass  # read-only, or on a network file system without locks
    try:
        yield
    finally:
        lock.release()


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _value(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"
