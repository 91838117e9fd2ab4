"""The bridge between ``Example`` and TFDS: how a set of pairs is made, stored and read.

A data set is a small subclass of ``ExampleBuilder`` with one method, ``rows``. ``prepare`` makes it
once (TFDS's ``array_record`` files, no TensorFlow), ``open_split`` reads it back by index::

    class Pairs(ExampleBuilder):
        def rows(self):
            example = Example(uid="0", query="mug", product={"title": "Red mug"}, label=4)
            yield Row(split="train", example=example)

    made = prepare(Pairs(data_dir="data", config=ExampleConfig()))
    train = open_split(made.path, "train")      # len(train), train[0]

All text passes ``hygiene`` on its way in, and rows that cannot be used are set aside in
``bad_rows.jsonl`` beside the data, with file, line and reason.
"""

import dataclasses
import errno
import hashlib
import json
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex, TextIO

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int64

from she_jax.types import BadRow, Example

# Scalars and text only: nested features take TFDS twice the time to read, four times to write. So a
# product and its steps are JSON objects, annotations a JSON list; label 0 and "" mean none.
FEATURES = tfds.features.FeaturesDict(
    {
        "uid": tfds.features.Text(),
        "query": tfds.features.Text(),
        "product": tfds.features.Text(),
        "label": tfds.features.Scalar(np.int64),
        "steps": tfds.features.Text(),
        "kind": tfds.features.Text(),
        "annotations": tfds.features.Text(),
        "rationale": tfds.features.Text(),
    }
)
LABELS = (1, 2, 3, 4)

_MADE = "made.json"
_BATCH = 2_000  # rows between two writes of TFDS's metadata
_SHARD = 200_000  # rows a file
_EARLY = 1_000  # rows after which a stream that is mostly bad is given up

# Between words: controls, line and paragraph separators, lone surrogates. Inside words, so removed
# without a trace: bidirectional controls, byte order marks, zero-width space, soft hyphen. The
# zero-width joiners stay: emoji and several scripts are spelled with them.
_TO_SPACE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
_TO_NOTHING = re.compile(
    "[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb]"
)


def hygiene(text: str) -> str:
    """Text as the project stores it: NFC, one line, no control or bidirectional characters.

    Control characters and lone surrogates become a space, bidirectional and zero-width controls
    vanish, runs of white space become one space. Letters of every script and emoji stay.
    """
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = _TO_NOTHING.sub("", _TO_SPACE.sub(" ", text))
    return " ".join(unicodedata.normalize("NFC", text).split())


def query_hash(query: str) -> float:
    """A fixed number in [0, 1) for a query, the same in any case and white space.

    Splits carved by it never share a query.
    """
    digest = hashlib.blake2b(hygiene(query).casefold().encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def encode(example: Example) -> dict[str, bytes | int]:
    """An ``Example`` as a record of ``FEATURES``.

    Raises:
      ValueError: if the label is neither None nor 1 to 4.
    """
    if example.label is not None and example.label not in LABELS:
        raise ValueError(f"label {example.label!r} of {example.uid!r}: expected 1 to 4, or None")
    texts = {
        "uid": example.uid,
        "query": example.query,
        "product": _json(dict(example.product)),
        "steps": "" if example.steps is None else _json(dict(example.steps)),
        "kind": example.kind,
        "annotations": _json(list(example.annotations)) if example.annotations else "",
        "rationale": example.rationale or "",
    }
    record: dict[str, bytes | int] = {k: v.encode(errors="surrogatepass") for k, v in texts.items()}
    return record | {"label": example.label or 0}


def decode(record: Mapping[str, Any]) -> Example:
    """The inverse of ``encode``; an empty ``rationale`` comes back as None."""
    text = {k: v.decode(errors="surrogatepass") for k, v in record.items() if k != "label"}
    return Example(
        uid=text["uid"],
        query=text["query"],
        product=json.loads(text["product"]),
        label=int(record["label"]) or None,
        steps=json.loads(text["steps"]) if text["steps"] else None,
        kind=text["kind"],
        annotations=tuple(json.loads(text["annotations"])) if text["annotations"] else (),
        rationale=text["rationale"] or None,
    )


def _json(value: dict | list) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A pair on its way into a data set: its split, and where it was read from."""

    split: str
    example: Example
    file: str = ""
    line: int = 0


@dataclass(kw_only=True, eq=False)
class ExampleConfig(tfds.core.BuilderConfig):
    """Options of a data set. Subclasses add their own; every field is part of the fingerprint.

    The config's name, and so the folder, is that fingerprint: the options, and the size and time of
    the source files. Other options or a changed source give another folder; nothing is overwritten.

    Attributes:
      max_chars: longer fields are cut to this many characters, and counted.
      max_bad_share: largest share of unusable rows, in [0, 1], that is put up with.
    """

    name: str = ""
    max_chars: int = 2_000
    max_bad_share: float = 0.05

    def __post_init__(self):
        if not self.name:
            self.name = hashlib.blake2b(_json(self.options()).encode(), digest_size=6).hexdigest()

    def sources(self) -> tuple[Path, ...]:
        """The files the set is made from; none for a procedural set."""
        return ()

    def options(self) -> dict[str, Any]:
        """What decides the content, as JSON values.

        Raises:
          FileNotFoundError: if a source file is missing; lists all that are.
        """
        base = {f.name for f in dataclasses.fields(tfds.core.BuilderConfig)}
        own = [f.name for f in dataclasses.fields(self) if f.name not in base]
        sources = [path.absolute() for path in self.sources()]
        if missing := [str(path) for path in sources if not path.is_file()]:
            raise FileNotFoundError(f"missing {', '.join(missing)}: expected the set's files there")
        stats = [(str(path), path.stat()) for path in sources]
        options = {name: getattr(self, name) for name in own}
        options["sources"] = [[path, s.st_size, s.st_mtime_ns] for path, s in stats]
        return json.loads(json.dumps(options, default=str))


@dataclass(kw_only=True, eq=False)
class CarvedConfig(ExampleConfig):
    """Options of a set without official splits: queries are parted by ``query_hash``.

    Attributes:
      validation_share, test_share: shares of the queries, each in [0, 1), together below 1.
    """

    validation_share: float = 0.1
    test_share: float = 0.2

    def __post_init__(self):
        if min(self.validation_share, self.test_share) < 0 or not 0 < self.train_share <= 1:
            raise ValueError(
                f"validation_share={self.validation_share}, test_share={self.test_share}: expected "
                "two shares from 0 on that leave something for training"
            )
        super().__post_init__()

    @property
    def train_share(self) -> float:
        """What the other two shares leave."""
        return 1 - self.validation_share - self.test_share

    def split_of(self, query: str) -> str:
        """The split a query belongs to."""
        place = query_hash(query) - self.train_share
        return "train" if place < 0 else "validation" if place < self.validation_share else "test"


@dataclass(kw_only=True)
class Intake:
    """What came in from a stream of rows, and what was set aside.

    Attributes:
      good: rows that were kept.
      bad: rows set aside, by reason (the part of ``BadRow.reason`` before the first colon).
      cut: fields that were longer than ``max_chars``.
      first: the first few rows that were set aside.
    """

    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    first: list[BadRow] = field(default_factory=list)

    def admit(
        self, rows: Iterable[Row | BadRow], config: ExampleConfig, bad_file: TextIO
    ) -> Iterator[Row]:
        """Yields the usable rows, cleaned, and writes the others to ``bad_file``, a JSON line each.

        Raises:
          ValueError: if more than ``config.max_bad_share`` of the rows are bad, at the end or as
            soon as most of a thousand rows or more are.
        """
        seen: set[int] = set()
        for row in rows:
            admitted = self._check(row, config.max_chars, seen)
            if isinstance(admitted, BadRow):
                self.bad[admitted.reason.partition(":")[0]] += 1
                self.first += [admitted] if len(self.first) < 5 else []
                bad_file.write(json.dumps(dataclasses.asdict(admitted)) + "\n")
                if self.good + self.bad.total() >= _EARLY:
                    self._judge(max(0.5, config.max_bad_share))
            else:
                self.good += 1
                yield admitted
        self._judge(config.max_bad_share)

    def _check(self, row: Row | BadRow, max_chars: int, seen: set[int]) -> Row | BadRow:
        if isinstance(row, BadRow):
            return row
        example, cut = _clean(row.example, max_chars)
        # Hashes, not strings: millions are remembered, and 64 bits do not collide by chance.
        uid = hash(example.uid)
        reason = _fault(example) or (f"duplicate uid: {example.uid!r}" if uid in seen else "")
        if reason:
            return BadRow(file=row.file, line=row.line, reason=reason)
        seen.add(uid)
        self.cut += cut
        return dataclasses.replace(row, example=example)

    def _judge(self, max_share: float):
        bad, total = self.bad.total(), self.good + self.bad.total()
        if bad > max_share * total:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in self.bad.most_common())
            first = "\n  ".join(f"{row.file}:{row.line}: {row.reason}" for row in self.first)
            raise ValueError(
                f"{bad} of {total} rows cannot be used, more than the share of {max_share:g} that "
                f"is put up with: {reasons}. The first:\n  {first}\n"
                "Correct them, or raise max_bad_share."
            )


def _clean(example: Example, max_chars: int) -> tuple[Example, int]:
    cut = 0

    def tidy(text: str) -> str:
        nonlocal cut
        text = hygiene(text)
        if len(text) <= max_chars:
            return text
        cut += 1
        return text[:max_chars].rstrip()

    product = {tidy(name): text for name, value in example.product.items() if (text := tidy(value))}
    steps = example.steps
    chain = example.rationale
    clean = Example(
        uid=tidy(example.uid),
        query=tidy(example.query),
        product=product,
        label=example.label,
        steps=None if steps is None else {name: tidy(value) for name, value in steps.items()},
        kind=tidy(example.kind),
        annotations=example.annotations,
        # A chain's lines are its steps, so they stay apart.
        rationale="\n".join(tidy(line) for line in chain.split("\n")) if chain else None,
    )
    return clean, cut


def _fault(example: Example) -> str:
    if not example.query:
        return "empty query"
    if not example.product.get("title"):
        return "missing title"
    if not example.uid:
        return "empty uid"
    if example.label is not None and example.label not in LABELS:
        return f"unknown label: {example.label!r}, expected 1 to 4"
    return ""


def spread_out(size: int, limit: int) -> list[int]:
    """So many of the rows of a set, evenly spread out, as a file may be sorted; all for 0."""
    count = min(limit or size, size)
    return [n * size // count for n in range(count)]


def in_no_order(name: str, size: int, together: int = 1) -> Int64[np.ndarray, "N"]:
    """A fixed shuffle of all rows of a set, as a file may be sorted, by query or by class.

    Args:
      name: of the data, ``data.name``; the pairs of ShopWorld come in no order, and stay as they
        are.
      size: of the set.
      together: so many neighbours stay beside each other.
    """
    if name == "shopworld":
        return np.arange(size)
    blocks = np.random.default_rng(0).permutation(-(-size // together))
    rows = (blocks[:, None] * together + np.arange(together)).ravel()
    return rows[rows < size]


class ExampleBuilder(tfds.core.DatasetBuilder, skip_registration=True):
    """Base of the project's TFDS builders: a subclass writes ``rows``.

    It raises its ``VERSION`` when the same options come to mean other rows; the version is part of
    the folder. Unlike with TFDS's ``GeneratorBasedBuilder`` the rows of all splits come in one
    stream and are written as they come: one pass over the source, and no shuffling buffer, which
    from 1 GiB on needs TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")
    builder_config: ExampleConfig
    intake: Intake
    on_progress: Callable[[int], None] | None = None

    def __init_subclass__(cls, **kwargs):
        # TFDS keeps a process-wide registry by class name; importing a library should not fill it.
        super().__init_subclass__(skip_registration=True, **kwargs)

    def rows(self) -> Iterator[Row | BadRow]:
        """All rows of all splits, in a fixed order."""
        raise NotImplementedError(f"{type(self).__name__} must define rows()")

    def _info(self) -> tfds.core.DatasetInfo:
        doc = (type(self).__doc__ or type(self).__name__).splitlines()[0]
        return tfds.core.DatasetInfo(
            builder=self, description=doc, features=FEATURES, disable_shuffling=True
        )

    def _download_and_prepare(self, dl_manager, download_config=None):
        del dl_manager, download_config  # nothing is downloaded
        folder = Path(self.data_dir)  # TFDS's temporary folder, renamed when all went well
        info = self._info()
        writer = tfds.core.SequentialWriter(info, _SHARD, file_format="array_record")
        self.intake, batch, counts = Intake(), {}, Counter()
        with open(folder / "bad_rows.jsonl", "w", encoding="utf-8") as bad_file:
            for row in self.intake.admit(self.rows(), self.builder_config, bad_file):
                batch.setdefault(row.split, []).append(encode(row.example))
                counts[row.split] += 1
                if self.intake.good % _BATCH == 0:
                    self._flush(writer, batch)
        self._flush(writer, batch)
        if not counts:
            raise ValueError(f"{self.name}: no row came in; expected at least one usable pair")
        writer.close_all()
        self.info.set_splits(info.splits)
        made = {
            "splits": dict(counts),
            "bad_rows": dict(self.intake.bad),
            "cut_fields": self.intake.cut,
            "options": self.builder_config.options(),
        }
        (folder / _MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")

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
        """Nothing is downloaded: TFDS's two printed lines would be wrong and in the way."""

    def _log_download_done(self):
        """See ``_log_download_bytes``."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A data set on disk.

    Attributes:
      path: its folder, for ``open_split``.
      splits: rows by split.
      bad_rows: rows set aside by reason; they are in ``path / "bad_rows.jsonl"``.
      cut_fields: fields longer than ``max_chars``.
      reused: it was already there.
    """

    path: Path
    splits: Mapping[str, int]
    bad_rows: Mapping[str, int]
    cut_fields: int
    reused: bool


def prepare(builder: ExampleBuilder, on_progress: Callable[[int], None] | None = None) -> Prepared:
    """Makes a data set, or finds it already made from the same options and sources.

    Args:
      builder: the set, with its config and the ``data_dir`` under which it goes.
      on_progress: called now and then with the number of rows written so far.

    Raises:
      ValueError: if too many rows are bad, or none is good.
      OSError: if the disk is full; nothing that looks finished is left.
    """
    path = Path(builder.data_dir)
    reused = path.exists()
    if not reused:
        builder.on_progress = on_progress
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as unused:  # TFDS insists on a download folder
                builder.download_and_prepare(download_dir=unused, file_format="array_record")
        except (OSError, RuntimeError) as error:
            # array_record reports a full disk as a RuntimeError with the system's words.
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if not full and "No space left" not in str(error):
                raise
            free = shutil.disk_usage(path.parent).free >> 20
            raise OSError(
                errno.ENOSPC,
                f"the disk is full ({free} MiB free) while making {path}; nothing was kept. Free "
                "some space, or choose another data_dir",
            ) from error
    if not (path / _MADE).is_file():
        raise ValueError(f"{path} is not a finished data set ({_MADE} is missing): delete it")
    return dataclasses.replace(open_prepared(path), reused=reused)


def open_prepared(path: str | Path) -> Prepared:
    """A data set that was made before, by its folder.

    Raises:
      FileNotFoundError: if there is none.
    """
    file = Path(path) / _MADE
    if not file.is_file():
        raise FileNotFoundError(
            f"no data set at {path} ({_MADE} is missing): expected a folder that was made from "
            "pairs, such as runs/filter/filtered/<name>/<options>/<version>"
        )
    made = json.loads(file.read_text(encoding="utf-8"))
    del made["options"]
    return Prepared(path=Path(path), reused=True, **made)


class ExampleSource:
    """Random access to the examples of a split; fit for ``grain.MapDataset.source``."""

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


def open_split(path: str | Path, split: str) -> ExampleSource:
    """Opens a split of a data set that ``prepare`` made.

    Args:
      path: the set's folder, ``Prepared.path``.
      split: its name, or a TFDS slice of it such as ``train[:100]``.

    Raises:
      FileNotFoundError: if there is no data set at ``path``.
      ValueError: if it has no such split; lists those it has.
    """
    if not (Path(path) / _MADE).is_file():
        raise FileNotFoundError(f"no data set at {path}: make it with prepare() first")
    builder: Any = tfds.builder_from_directory(str(path))
    if split.partition("[")[0] not in builder.info.splits:
        raise ValueError(f"no split {split!r} in {path}, only {sorted(builder.info.splits)}")
    return ExampleSource(builder.as_data_source(split))
