"""The run's folder belongs to one config, and to one command at a time."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from she_jax.train.report import write_json

# As long as none of these is there, nothing is lost by another config.
MADE = ("checkpoints", "predictions.jsonl", "examinations", "outcomes", "filter")
MISSED = "missed.json"  # of an SFT on own right rollouts: uids of pairs without one, and of all met

# A ConfigDict. Its attributes are typed as a union of everything, which no checker can follow.
Config: TypeAlias = Any


def claim_workdir(workdir: str | os.PathLike, config: Config, made: Sequence[str] = MADE) -> None:
    """Makes the folder of a run and writes ``config.json``, or checks that it is this run's folder.

    A folder in which nothing was trained or judged yet takes the new config. Whether the judge is
    to be exported (``export``) may be decided at any time.

    Args:
      workdir: the folder.
      config: the run's ``ConfigDict``.
      made: what is in the folder once something was trained or judged.

    Raises:
      ValueError: if the folder holds other files and no ``config.json``, or another config; the
        message lists every key that differs, with both values.
    """
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir {workdir} is a file: give a folder with --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    now = config.to_dict()
    if not path.exists():
        # A kill while config.json was written leaves only its part.
        if others := sorted(p.name for p in workdir.iterdir() if p.name != "config.json.part"):
            raise ValueError(
                f"workdir {workdir} has no config.json, but other files ({', '.join(others[:5])}): "
                "give a new or empty folder with --workdir"
            )
        write_json(path, now)
        return
    try:
        then = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): give a new folder with --workdir"
        ) from error
    old, new = _flat(then), _flat(json.loads(json.dumps(now)))
    lines = [
        f"  {key}: {_value(old, key)} in the workdir, {_value(new, key)} now"
        for key in sorted(old.keys() | new.keys())
        if _value(old, key) != _value(new, key) and key.rpartition(".")[2] != "export"
    ]
    if lines and not any((workdir / name).exists() for name in made):
        write_json(path, now)
    elif lines:
        raise ValueError(
            f"workdir {workdir} belongs to a run with another config:\n"
            + "\n".join(lines)
            + "\nGive a new folder with --workdir, or the old values to go on with the old run"
        )


@contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
    """Keeps a folder to this process, as far as its file system can.

    Raises:
      ValueError: if another command is at work in it.
    """
    try:
        import fcntl
    except ImportError:  # not every system has it
        yield
        return
    folder = os.open(workdir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise ValueError(f"another command is at work in {workdir}: wait for it") from error
    except OSError:
        pass  # some network file systems lock no folders
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
