"""The folder of a run: bound to one config, and locked by one command at a time."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from she_jax.training.files import write_json

# While none of these exists, the config may change without loss.
MADE = ("checkpoints", "predictions.jsonl", "examinations", "outcomes", "filter")
# Written by rejection-sampling SFT: uids of the pairs without a correct rollout, and of all pairs.
MISSED = "missed.json"

# A ConfigDict. Its attributes are typed as a union of everything, which no type checker can follow.
Config: TypeAlias = Any


def claim_workdir(workdir: str | os.PathLike, config: Config, made: Sequence[str] = MADE) -> None:
    """Creates the folder of a run with its ``config.json``, or checks that it belongs to this run.

    A folder without results of training or evaluation accepts a new config. ``export``, which asks
    for an export of the policy, may change at any time.

    Args:
      workdir: the folder.
      config: the run's ``ConfigDict``.
      made: names in the folder that mark results of training or evaluation.

    Raises:
      ValueError: if the folder holds other files and no ``config.json``, or another config. The
        message lists every key that differs, with both values.
    """
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir {workdir} is a file: give a folder with --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    config_dict = config.to_dict()
    if not path.exists():
        # A kill while config.json is written leaves only config.json.part.
        if others := sorted(p.name for p in workdir.iterdir() if p.name != "config.json.part"):
            raise ValueError(
                f"workdir {workdir} has no config.json, but other files ({', '.join(others[:5])}): "
                "give a new or empty folder with --workdir"
            )
        write_json(path, config_dict)
        return
    try:
        saved_config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): give a new folder with --workdir"
        ) from error
    old, new = _flat(saved_config), _flat(json.loads(json.dumps(config_dict)))
    lines = [
        f"  {key}: {_value(old, key)} in the workdir, {_value(new, key)} now"
        for key in sorted(old.keys() | new.keys())
        if _value(old, key) != _value(new, key) and key.rpartition(".")[2] != "export"
    ]
    if lines and not any((workdir / name).exists() for name in made):
        write_json(path, config_dict)
    elif lines:
        raise ValueError(
            f"workdir {workdir} belongs to a run with another config:\n"
            + "\n".join(lines)
            + "\nGive a new folder with --workdir, or the old values to resume the old run"
        )


@contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
    """Locks a folder for this process, if its file system supports it.

    Raises:
      ValueError: if another command is running in it.
    """
    try:
        import fcntl
    except ImportError:  # not available on every system
        yield
        return
    folder = os.open(workdir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise ValueError(f"another command is running in {workdir}: wait for it") from error
    except OSError:
        pass  # some network file systems cannot lock folders
    try:
        yield
    finally:
        os.close(folder)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _value(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"
