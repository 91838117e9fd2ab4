"""What a data set is made of, by content: digests of files, and the folders prepared from them.

Neither the path nor the time of a file is part of its identity: a file that was touched, moved or
copied gives the data set that it gave before.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from filelock import FileLock, Timeout

from she_jax.cot import FOUR_GRADES, LabelSet

SUMMARY = "made.json"  # of a data set; written last, so its presence marks a finished one
LOCK = ".lock"
_LOG = logging.getLogger("she_jax")


def file_digest(path: Path) -> str:
    """Hash of a file's bytes; read once by a process, as long as its size and time are the same."""
    stat = path.stat()
    return _digest(path.absolute(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, size: int, time: int) -> str:
    with path.open("rb") as file:  # SHA-256 is in the processor, and so faster than BLAKE2
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def content_digest(path: Path, manifest: str) -> str | None:
    """Hash of a file, or of what a folder holds; None if there is nothing at ``path``.

    Of a run or its checkpoints the manifests count, of any other folder the visible files in it.

    Args:
      path: a file or a folder.
      manifest: name of the files that list digests, in a checkpoint.
    """
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return None
    patterns = (f"*/{manifest}", f"checkpoints/*/*/{manifest}")
    files = [file for pattern in patterns for file in path.glob(pattern)]
    files = files or [file for file in path.glob("[!.]*") if file.is_file()]
    names = sorted((file.relative_to(path).as_posix(), file_digest(file)) for file in files)
    return name_of(names)


def name_of(options: Any) -> str:
    """A short hash of JSON values, which names the folder of a data set."""
    text = json.dumps(options, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def prepared_before(
    parent: Path, version: str, settings: Mapping[str, Any], sources: Sequence[Path]
) -> str | None:
    """Name of a data set that was prepared from these sources, though their content gives another.

    Either the sources are gone, and the last one that was made from the same paths is meant. Or an
    earlier version of she_jax named it by their paths, sizes and times, which are still the same.

    Args:
      parent: the folder of the data sets of one reader, ``<name>/<version>`` each.
      version: of the reader.
      settings: the options without what says where the sources are.
      sources: the files.
    """
    gone = not all(path.is_file() for path in sources)
    given = [[str(path) for path in sources], [str(path.absolute()) for path in sources]]
    files = parent.glob(f"*/{version}/{SUMMARY}")
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        summary = json.loads(file.read_text(encoding="utf-8"))
        options = summary["options"]
        by_time = [entry for entry in options["sources"] if isinstance(entry, list)]
        if {key: options.get(key) for key in settings} != settings or not options["sources"]:
            continue
        if gone and any(paths in given for paths in _known_paths(summary)):
            return file.parent.parent.name
        if by_time and not gone and by_time == [_path_size_time(path) for path in sources]:
            return file.parent.parent.name
    return None


def remember_paths(file: Path, sources: Sequence[Path]) -> None:
    """Adds where the sources of a data set now are to its ``made.json``, if it may be written."""
    summary, paths = json.loads(file.read_text(encoding="utf-8")), [str(path) for path in sources]
    if not sources or paths in _known_paths(summary):
        return
    summary["paths"] = [*_known_paths(summary), paths]
    part = file.with_name(f"{file.name}.part")
    with suppress(OSError):
        part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        part.replace(file)


def _known_paths(summary: Mapping[str, Any]) -> list[list[str]]:
    """Where the sources of a data set have been."""
    sources = summary["options"]["sources"]
    return summary.get("paths") or [[entry[0] for entry in sources if isinstance(entry, list)]]


def _path_size_time(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path.absolute()), stat.st_size, stat.st_mtime_ns]


@dataclass(kw_only=True, eq=False)
class ExampleConfig(tfds.core.BuilderConfig):
    """Options of a data set. Subclasses add fields, and every field is part of the fingerprint.

    The fingerprint is a hash of the options and of the bytes of each source file. It names the
    config and so the folder. Different options or a changed source give another folder, and nothing
    is overwritten; a file that is touched, moved or copied gives the same one. So all that decides
    how a file is read must be an option.

    Attributes:
      max_chars: longer fields are cut to this many characters, and counted.
      max_bad_share: largest allowed share of unusable rows, in [0, 1].
      markup: read HTML in the fields of products: tags go, entities become their character.
      locations: names of the fields that say where the sources are, not what is in them.
    """

    locations: ClassVar[tuple[str, ...]] = ("path",)
    name: str = ""
    max_chars: int = 2_000
    max_bad_share: float = 0.05
    markup: bool = True

    def __post_init__(self):
        if not self.name and not self.missing_sources():
            self.name = name_of(self.options())

    def sources(self) -> tuple[Path, ...]:
        """The source files of the data set; empty for a generated one."""
        return ()

    @property
    def label_set(self) -> LabelSet:
        """The labels that its rows may have."""
        return FOUR_GRADES

    @property
    def needs_title(self) -> bool:
        """Whether its rows are about products, each with a title."""
        return True

    def missing_sources(self) -> list[str]:
        """The source files that are not there."""
        return [str(path.absolute()) for path in self.sources() if not path.is_file()]

    def settings(self) -> dict[str, Any]:
        """The options without the sources, as JSON values."""
        tfds_fields = {f.name for f in dataclasses.fields(tfds.core.BuilderConfig)}
        names = [f.name for f in dataclasses.fields(self) if f.name not in tfds_fields]
        options = {name: getattr(self, name) for name in names if name not in self.locations}
        return json.loads(json.dumps(options, default=str))

    def options(self) -> dict[str, Any]:
        """Everything that determines the content, as JSON values; reads all source files.

        Raises:
          FileNotFoundError: if a source file is missing.
        """
        return self.settings() | {"sources": [file_digest(path) for path in self.sources()]}


@contextmanager
def preparing(folder: Path) -> Iterator[None]:
    """Lets only this process prepare data sets in a folder, and sweeps what killed ones left.

    Another process is waited for. What it began lies in ``incomplete.*`` beside the data set; such
    folders go only where nobody holds the lock, here and in the folders of other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _LOG.warning("another command prepares data in %s: waiting for it", folder)
        lock.acquire()
    except (OSError, NotImplementedError):  # on a network file system without locks
        yield
        return
    try:
        _sweep(folder)
        for parent in {leftover.parent for leftover in folder.parent.glob("*/incomplete.*")}:
            try:
                with FileLock(parent / LOCK, blocking=False):
                    _sweep(parent)
            except OSError:
                continue  # somebody is at it, or it is not ours
        yield
    finally:
        lock.release()


def _sweep(folder: Path) -> None:
    for leftover in folder.glob("incomplete.*"):
        shutil.rmtree(leftover, ignore_errors=True)
