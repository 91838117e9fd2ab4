"""Data sets of query-product pairs, stored and read with TFDS.

A data set is a small subclass of ``ExampleBuilder`` with one method, ``rows``. ``prepare`` writes
it once, as TFDS ``array_record`` files and without TensorFlow. ``open_split`` reads it by index::

    class Pairs(ExampleBuilder):
        def rows(self):
            example = Example(uid="0", query="mug", product={"title": "Red mug"}, label=4)
            yield Row(split="train", example=example)

    dataset = prepare(Pairs(data_dir="data", config=ExampleConfig()))
    train = open_split(dataset.path, "train")      # len(train), train[0]

Rows are cleaned and checked by ``she_jax.data.intake``. Rows that cannot be used are listed in
``bad_rows.jsonl`` beside the data, with file, line and reason.
"""

import dataclasses
import errno
import json
import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int64

from she_jax.data.content import (
    SUMMARY,
    ExampleConfig,
    name_of,
    prepared_before,
    preparing,
    remember_paths,
)
from she_jax.data.intake import Intake, Row
from she_jax.types import BadRow, Example, Label, UserError

# Scalars and text only: TFDS takes twice as long to read nested features and four times as long to
# write them. So product and steps are JSON objects, annotations and raters JSON lists, and the
# label is a JSON number or text. "" means none.
FEATURES = tfds.features.FeaturesDict(
    {
        "uid": tfds.features.Text(),
        "query": tfds.features.Text(),
        "product": tfds.features.Text(),
        "label": tfds.features.Text(),
        "steps": tfds.features.Text(),
        "kind": tfds.features.Text(),
        "annotations": tfds.features.Text(),
        "rationale": tfds.features.Text(),
        "raters": tfds.features.Text(),
    }
)

_BATCH = 2_000  # rows between two writes of TFDS's metadata
_SHARD = 200_000  # rows per file
_SECONDS = 10.0  # between two lines about a column that takes long to read
_LOG = logging.getLogger("she_jax")


def encode(example: Example) -> dict[str, bytes]:
    """Converts an example to a record of ``FEATURES``."""
    texts = {
        "uid": example.uid,
        "query": example.query,
        "product": _json(dict(example.product)),
        "label": "" if example.label is None else _json(example.label),
        "steps": "" if example.steps is None else _json(dict(example.steps)),
        "kind": example.kind,
        "annotations": _json(list(example.annotations)) if example.annotations else "",
        "rationale": example.rationale or "",
        "raters": _json(list(example.raters)) if example.raters else "",
    }
    return {k: v.encode(errors="surrogatepass") for k, v in texts.items()}


def decode(record: Mapping[str, Any]) -> Example:
    """Inverts ``encode``, except that an empty ``rationale`` becomes None."""
    texts = {k: v.decode(errors="surrogatepass") for k, v in record.items()}
    return Example(
        uid=texts["uid"],
        query=texts["query"],
        product=json.loads(texts["product"]),
        label=json.loads(texts["label"]) if texts["label"] else None,
        steps=json.loads(texts["steps"]) if texts["steps"] else None,
        kind=texts["kind"],
        annotations=tuple(json.loads(texts["annotations"])) if texts["annotations"] else (),
        rationale=texts["rationale"] or None,
        raters=tuple(json.loads(texts["raters"])) if texts.get("raters") else (),
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def evenly_spaced_rows(size: int, limit: int) -> list[int]:
    """Indices of up to ``limit`` evenly spaced rows, since a file may be sorted.

    Args:
      size: rows of the data set.
      limit: number of rows to choose; 0 for all.
    """
    count = min(limit or size, size)
    return [n * size // count for n in range(count)]


def shuffled_rows(
    size: int, *, shuffled: bool = False, block_size: int = 1
) -> Int64[np.ndarray, "N"]:
    """A fixed shuffle of all row indices, since a file may be sorted by query or by class.

    Args:
      size: rows of the data set, N.
      shuffled: the rows are in random order already, and stay as they are.
      block_size: length of the blocks of neighboring rows that stay together.

    Returns:
      Every index in [0, N), once.
    """
    if shuffled:
        return np.arange(size)
    blocks = np.random.default_rng(0).permutation(-(-size // block_size))
    rows = (blocks[:, None] * block_size + np.arange(block_size)).ravel()
    return rows[rows < size]


class ExampleBuilder(tfds.core.DatasetBuilder, skip_registration=True):
    """Base class of the TFDS builders. A subclass implements ``rows``.

    A subclass raises its ``VERSION``, which is part of the folder name, when the same options lead
    to different rows. Unlike in TFDS's ``GeneratorBasedBuilder``, the rows of all splits form one
    stream and are written in its order. The source is read once, and there is no shuffle buffer,
    which would need TensorFlow from 1 GiB on.

    Attributes:
      notes: what the user should know of the whole set, in sentences; ``rows`` sets it.
    """

    VERSION = tfds.core.Version("2.0.0")
    builder_config: ExampleConfig
    intake: Intake
    notes: Sequence[str] = ()
    on_progress: Callable[[int], None] | None = None

    def __init__(self, *, data_dir: str | Path, config: ExampleConfig, **options: Any):
        """Finds the folder of the data set, which may have been prepared from sources now gone.

        Raises:
          FileNotFoundError: if source files are missing, and nothing was prepared from them.
        """
        version, parent = str(self.VERSION), Path(data_dir).expanduser() / type(self).name
        if not (parent / config.name / version / SUMMARY).is_file():
            earlier = prepared_before(parent, version, config.settings(), config.sources())
            if not earlier and (missing := config.missing_sources()):
                raise FileNotFoundError(
                    f"missing {', '.join(missing)}: expected the set's files there"
                )
            config = dataclasses.replace(config, name=earlier or config.name)
        super().__init__(data_dir=data_dir, config=config, **options)

    def __init_subclass__(cls, **kwargs):
        # TFDS keeps a process-wide registry by class name. Importing a library should not fill it.
        super().__init_subclass__(skip_registration=True, **kwargs)

    def rows(self) -> Iterator[Row | BadRow]:
        """All rows of all splits, in a fixed order."""
        raise NotImplementedError(f"{type(self).__name__} must define rows()")

    def _info(self) -> tfds.core.DatasetInfo:
        doc = (type(self).__doc__ or type(self).__name__).splitlines()[0]
        return _Info(builder=self, description=doc, features=FEATURES, disable_shuffling=True)

    def _download_and_prepare(self, dl_manager, download_config=None):
        del dl_manager, download_config  # nothing is downloaded
        folder = Path(self.data_dir)  # TFDS's temporary folder, renamed on success
        info = self._info()
        writer = tfds.core.SequentialWriter(info, _SHARD, file_format="array_record")
        self.intake, batch, counts = Intake(), {}, Counter()
        with open(folder / "bad_rows.jsonl", "w", encoding="utf-8") as bad_file:
            admitted = self.intake.admit(
                self.rows(),
                bad_file,
                max_chars=self.builder_config.max_chars,
                max_bad_share=self.builder_config.max_bad_share,
                labels=self.builder_config.label_set,
                markup=self.builder_config.markup,
                needs_title=self.builder_config.needs_title,
            )
            for row in admitted:
                batch.setdefault(row.split, []).append(encode(row.example))
                counts[row.split] += 1
                if self.intake.good % _BATCH == 0:
                    self._flush(writer, batch)
        self._flush(writer, batch)
        if not counts and self.builder_config.max_bad_share < 1:
            raise UserError(f"{self.name}: no row came in; expected at least one usable pair")
        writer.close_all()
        self.info.set_splits(info.splits)
        summary = {
            "splits": dict(counts),
            "bad_rows": dict(self.intake.bad),
            "cut_fields": self.intake.cut,
            "notes": list(self.notes),
            "labels": self.builder_config.label_set.text,
            "options": self.builder_config.options(),
            "paths": [[str(path) for path in self.builder_config.sources()]],
        }
        (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    def _flush(self, writer: tfds.core.SequentialWriter, batch: dict[str, list]):
        if batch:
            writer.initialize_splits(list(batch), fail_if_exists=False)
            writer.add_examples(batch)
            batch.clear()
        if self.on_progress is not None:
            self.on_progress(self.intake.good)

    def _as_dataset(self, *args, **kwargs):
        raise NotImplementedError("tf.data needs TensorFlow: use open_split or as_data_source")

    def _create_builder_config(self, builder_config, version):
        # TFDS would warn that the config is not one of a closed list.
        return builder_config

    def _log_download_bytes(self):
        """Prints nothing, since nothing is downloaded; TFDS would print two lines."""

    def _log_download_done(self):
        """Prints nothing, see ``_log_download_bytes``."""


class _Info(tfds.core.DatasetInfo):
    """What TFDS knows of a data set, from its folder alone."""

    def initialize_from_bucket(self) -> None:
        """Does nothing: TFDS would leave an empty folder in /tmp here, at every start."""


@dataclass(frozen=True, kw_only=True)
class PreparedDataset:
    """A data set on disk.

    Attributes:
      path: its folder, for ``open_split``.
      splits: number of rows by split.
      bad_rows: number of rejected rows by reason; they are listed in ``path / "bad_rows.jsonl"``.
      cut_fields: number of fields that were longer than ``max_chars``.
      fingerprint: identifies its options and the content of its sources.
      reused: whether it existed already.
      notes: what the user should know of the whole set, in sentences.
      labels: its label set, for ``LabelSet.parse``.
    """

    path: Path
    splits: Mapping[str, int]
    bad_rows: Mapping[str, int]
    cut_fields: int
    fingerprint: str
    reused: bool
    notes: Sequence[str] = ()
    labels: str = "1-4"


def prepare(
    builder: ExampleBuilder, on_progress: Callable[[int], None] | None = None
) -> PreparedDataset:
    """Writes a data set, or reuses the one written from the same options and sources.

    Args:
      builder: the builder, with its config and the ``data_dir`` to write under.
      on_progress: called from time to time with the number of rows written so far.

    Raises:
      UserError: if too many rows are bad, if none is good, or if the folder is unfinished.
      OSError: if the disk is full; no folder that looks finished is left.
    """
    path = Path(builder.data_dir)
    reused = path.exists()
    if not reused:
        builder.on_progress = on_progress
        try:
            with preparing(path.parent):
                reused = path.exists()  # by now: another process may have been at it
                if not reused:
                    _write(builder)
        except (OSError, RuntimeError) as error:
            # array_record reports a full disk as a RuntimeError with the system's message.
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if not full and "No space left" not in str(error):
                raise
            free = shutil.disk_usage(path.parent).free >> 20
            raise OSError(
                errno.ENOSPC,
                f"the disk is full ({free} MiB free) while making {path}; nothing was kept. Free "
                "some space, or choose another data_dir",
            ) from error
    if reused and (path / SUMMARY).is_file():
        remember_paths(path / SUMMARY, builder.builder_config.sources())
    if not (path / SUMMARY).is_file():
        raise UserError(f"{path} is not a finished data set ({SUMMARY} is missing): delete it")
    return dataclasses.replace(open_prepared(path), reused=reused)


def _write(builder: ExampleBuilder) -> None:
    with tempfile.TemporaryDirectory() as unused:  # TFDS insists on a download folder
        builder.download_and_prepare(download_dir=unused, file_format="array_record")


def open_prepared(path: str | Path) -> PreparedDataset:
    """Opens the data set in a folder that ``prepare`` wrote.

    Raises:
      FileNotFoundError: if there is none.
    """
    file = Path(path) / SUMMARY
    if not file.is_file():
        raise FileNotFoundError(
            f"no data set at {path} ({SUMMARY} is missing): expected a folder that was made from "
            "pairs, such as runs/filter/filtered/<name>/<options>/<version>"
        )
    summary = json.loads(file.read_text(encoding="utf-8"))
    known = ("splits", "bad_rows", "cut_fields", "notes", "labels")
    values = {key: summary[key] for key in known if key in summary}
    fingerprint = name_of(summary["options"])
    return PreparedDataset(path=Path(path), fingerprint=fingerprint, reused=True, **values)


class ExampleSource:
    """Random access to the examples of a split, suitable for ``grain.MapDataset.source``.

    Args:
      source: of TFDS.
    """

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = index.__index__()
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} of a split with {len(self)} examples")
        return decode(self._source[i])

    def __repr__(self) -> str:
        return f"ExampleSource({self._source!r})"

    def labels(self) -> list[Label | None]:
        """The label of every example."""
        return [json.loads(text) if text else None for text in self.texts("label")]

    def texts(self, name: str) -> list[str]:
        """The ``uid``, ``query``, ``kind`` or ``label`` (as JSON) of all examples."""
        return [text.decode(errors="surrogatepass") for text in self._column(name)]

    def _column(self, name: str) -> list[Any]:
        # Without the other fields it is read several times as fast as the examples.
        feature: Any = tfds.features.FeaturesDict({name: FEATURES[name]})
        records = self._source.data_source
        values: list[Any] = []
        since = time.monotonic()
        for first in range(0, len(self), _BATCH):
            part = records.__getitems__(list(range(first, min(first + _BATCH, len(self)))))
            rows: list[Any] = [feature.deserialize_example_np(record) for record in part]
            values += [row[name] for row in rows]
            if time.monotonic() - since > _SECONDS:
                since = time.monotonic()
                _LOG.warning("reading the column %r: %d of %d rows", name, len(values), len(self))
        return values


def open_split(path: str | Path, split: str) -> ExampleSource:
    """Opens a split of a data set that ``prepare`` wrote.

    Args:
      path: the folder, ``PreparedDataset.path``.
      split: name of the split, or a TFDS slice of it such as ``train[:100]``.

    Raises:
      FileNotFoundError: if there is no data set at ``path``.
      UserError: if there is no such split; lists the existing ones.
    """
    if not (Path(path) / SUMMARY).is_file():
        raise FileNotFoundError(f"no data set at {path}: make it with prepare() first")
    builder: Any = tfds.builder_from_directory(str(path))
    if not builder.info.splits:
        raise UserError(f"{path} has no pair: every row was set aside, see bad_rows.jsonl in it")
    if split.partition("[")[0] not in builder.info.splits:
        raise UserError(f"no split {split!r} in {path}, only {sorted(builder.info.splits)}")
    if type(builder.info.features["label"]) is not type(FEATURES["label"]):
        raise UserError(f"{path} was written by an earlier version of she_jax: prepare it again")
    return ExampleSource(builder.as_data_source(split))


def fingerprint(dataset: PreparedDataset) -> str:
    """Identifies a data set: its options, and the content of its source files."""
    return dataset.fingerprint
