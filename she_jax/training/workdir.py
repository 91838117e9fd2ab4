"""The folder of a run: local, bound to one config, and locked by one command at a time."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from she_jax.data.content import content_digest
from she_jax.training.checkpoint import MANIFEST
from she_jax.training.files import write_json
from she_jax.training.logging import log
from she_jax.types import UserError

# While none of these exists, the recipe may change without loss.
ARTIFACTS = (
    *("checkpoints", "predictions", "predictions.jsonl", "predictions.parquet"),
    *("step_queries", "chains", "filter", "pairs.jsonl"),
)
LOCK = ".lock"
CONTENTS = "contents.json"  # digests of what the recipe's settings in MOVABLE name
# Settings that say where something is. It may move as long as its content stays ...
TABLES = ("data.path", "data.products", "data.queries")  # ... and these only as long as they do
MOVABLE = (
    *TABLES,
    *("model.name", "checkpoint", "init_from", "reward.prm", "reward.orm"),
)
# ... and what these name, a run checks when it reads it.
UNCHECKED = ("data.dir", "filter.records", "predict.blocks")
SCHEMA = 2  # of config.json: raised when keys are renamed, so that old folders are refused


def check_local(recipe: Mapping[str, Any], workdir: Path) -> None:
    """Refuses buckets and URLs, as long as nothing reads or writes them.

    Args:
      recipe: as plain values.
      workdir: the run's folder. As a ``Path``, ``gs://bucket`` has become ``gs:/bucket``.

    Raises:
      UserError: for the first setting that names one.
    """
    for key, value in [("workdir", str(workdir)), *_texts(recipe, "config")]:
        if match := re.match(r"([a-z][a-z0-9+.-]+):/+(?=\S)", value, re.IGNORECASE):
            address = f"{match[1]}://{value[match.end() :]}"
            raise UserError(
                f"--{key}={address}: only local folders and files can be read and written; give a "
                "local copy, or where it is mounted"
            )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in nested values, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(part, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part, key)


def claim_workdir(
    workdir: str | os.PathLike, recipe: Mapping[str, Any], artifacts: Sequence[str] = ARTIFACTS
) -> None:
    """Creates the folder of a run with its ``config.json``, or checks that it belongs to this run.

    A folder without results of training or evaluation accepts a new recipe. ``export``, which asks
    for an export of the policy, may change at any time, and a path if what it names only moved.

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
        # A kill while the claim is written leaves nothing else.
        ours = ("config.json.part", f"{CONTENTS}.part", CONTENTS, LOCK)
        if others := sorted(p.name for p in workdir.iterdir() if p.name not in ours):
            raise UserError(
                f"workdir {workdir} has no config.json, but other files ({', '.join(others[:5])}): "
                "give a new or empty folder with --workdir"
            )
        _write_claim(workdir, current)
        return
    try:
        saved = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}): give a new folder with --workdir"
        ) from error
    old, new = _flat(saved), _flat(current)
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if _value(old, key) != _value(new, key) and key.rpartition(".")[2] != "export"
    ]
    if not any((workdir / name).exists() for name in artifacts):
        _write_claim(workdir, current)
        return
    if others := [key for key in changed if not _moved(workdir, key, new)]:
        _check_schema(saved, path)
        lines = [f"  {k}: {_value(old, k)} in the workdir, {_value(new, k)} now" for k in others]
        raise UserError(
            f"workdir {workdir} belongs to a run with another config:\n"
            + "\n".join(lines)
            + "\nGive a new folder with --workdir, or the old values to resume the old run"
        )
    for key in TABLES:
        if key not in changed and _edited(workdir, key, new):
            raise UserError(
                f"{key}: {_value(new, key)} has another content than when the run in {workdir} "
                "began: put the old one back, or give a new folder with --workdir"
            )
    if changed:
        for key in changed:
            log(f"{key}: {_value(new, key)} has the content of {_value(old, key)}: it moved")
        write_json(path, current)


def _write_claim(workdir: Path, recipe: Mapping[str, Any]) -> None:
    flat = _flat(recipe)
    contents = {key: _content(value) for key, value in flat.items() if _ends_in(key, MOVABLE)}
    write_json(workdir / CONTENTS, {key: digest for key, digest in contents.items() if digest})
    write_json(workdir / "config.json", recipe)


def _moved(workdir: Path, key: str, recipe: Mapping[str, Any]) -> bool:
    """Whether a setting is a path, and what it names is what it was."""
    if _ends_in(key, UNCHECKED):
        return key in recipe
    file = workdir / CONTENTS
    if not _ends_in(key, MOVABLE) or not file.is_file():
        return False
    before = json.loads(file.read_text(encoding="utf-8")).get(key)
    return before is not None and before == _content(recipe.get(key))


def _edited(workdir: Path, key: str, recipe: Mapping[str, Any]) -> bool:
    """Whether a file that is there is not what it was."""
    file, path = workdir / CONTENTS, Path(recipe.get(key) or "")
    if not file.is_file() or not path.is_file():
        return False
    before = json.loads(file.read_text(encoding="utf-8")).get(key)
    return before is not None and before != _content(str(path))


def _ends_in(key: str, settings: Sequence[str]) -> bool:
    return any(f".{key}".endswith(f".{setting}") for setting in settings)


def _content(path: Any) -> str | None:
    return content_digest(Path(path), MANIFEST) if path and isinstance(path, str) else None


def keep_settings(workdir: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes values that a run has found into its ``config.json``, by section."""
    path = workdir / "config.json"
    recipe = json.loads(path.read_text(encoding="utf-8"))
    for section, values in settings.items():
        recipe[section] |= values
    write_json(path, recipe)


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
