"""Checks and cleans rows on their way into a data set.

All text passes ``normalize_text``. A row that cannot be used is set aside with its file, line and
reason.
"""

import ast
import dataclasses
import hashlib
import html
import html.entities
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from she_jax.cot import FOUR_GRADES, LabelSet
from she_jax.types import BadRow, Example, Label, UserError

_DUPLICATE = "duplicate uid: "
_EARLY_CHECK = 1_000  # rows after which a stream of mostly bad rows is aborted

# Between words: controls, line and paragraph separators, lone surrogates. Inside words, so removed
# without replacement: bidirectional controls, byte order marks, zero-width space, soft hyphen. The
# zero-width joiners stay: emoji and several scripts are spelled with them.
_TO_SPACE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
_TO_NOTHING = re.compile(
    "[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb]"
)

_TAG = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-z][^<>]*>", re.I | re.S)
_ENTITY = re.compile(r"&(#\d+;?|#x[\da-f]+;?|[a-z][a-z\d]*;)", re.I)
_MAX_MARKUP = 20_000  # characters that fields with tags are cut to, to bound the search


def normalize_text(text: str) -> str:
    """Text as it is stored: NFC, one line, no control or bidirectional characters.

    Control characters and lone surrogates become a space. Bidirectional and zero-width controls
    are removed. Runs of white space become one space. Letters of every script and emoji stay.
    """
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = _TO_NOTHING.sub("", _TO_SPACE.sub(" ", text))
    return " ".join(unicodedata.normalize("NFC", text).split())


def strip_markup(text: str) -> str:
    """The text without HTML: tags become a space, entities the character they stand for.

    An entity ends in a semicolon or is a number: "drink&notebook" holds none.
    """
    if "<" in text:
        text = _TAG.sub(" ", text[:_MAX_MARKUP])
    return _ENTITY.sub(_character, text) if "&" in text else text


def _character(entity: re.Match[str]) -> str:
    known = entity[1].startswith("#") or entity[1] in html.entities.html5
    return html.unescape(entity[0]) if known else entity[0]


def repeated_uid(reason: str) -> str | None:
    """The uid of a row that was rejected because an earlier one has it; None of other rows."""
    if not reason.startswith(_DUPLICATE):
        return None
    return ast.literal_eval(reason.removeprefix(_DUPLICATE))


def query_hash(query: str) -> float:
    """A hash of a query in [0, 1) that ignores case and runs of white space.

    Splits chosen by this hash never share a query.
    """
    digest = hashlib.blake2b(normalize_text(query).casefold().encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An example on its way into a data set, with its split and where it was read."""

    split: str
    example: Example
    file: str = ""
    line: int = 0


@dataclass(kw_only=True)
class Intake:
    """Filters a stream of rows and counts the accepted and the rejected ones.

    Attributes:
      good: rows that were kept.
      bad: rejected rows by reason (the part of ``BadRow.reason`` before the first colon).
      cut: fields that were longer than ``max_chars``.
      first: the first few rejected rows.
    """

    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    first: list[BadRow] = field(default_factory=list)

    def admit(
        self,
        rows: Iterable[Row | BadRow],
        bad_file: TextIO,
        *,
        max_chars: int,
        max_bad_share: float,
        labels: LabelSet = FOUR_GRADES,
        markup: bool = False,
        needs_title: bool = True,
    ) -> Iterator[Row]:
        """Yields the usable rows, cleaned, and writes the others to ``bad_file`` as JSON lines.

        Args:
          rows: the stream.
          bad_file: receives a JSON object per rejected row, its place in the stream as ``record``.
          max_chars: longer fields are cut to this many characters.
          max_bad_share: largest allowed share of rejected rows, in [0, 1].
          labels: the labels that rows may have; what stands for one of them becomes it.
          markup: read HTML in the fields of products, see ``strip_markup``.
          needs_title: a row whose product has no title cannot be used.

        Raises:
          UserError: if more than ``max_bad_share`` of the rows are bad, at the end of the stream
            or, after the first thousand rows, as soon as more than half are bad as well.
        """
        seen_uids: set[int] = set()
        for number, row in enumerate(rows):
            if markup and isinstance(row, Row):
                row = _without_markup(row)
            checked = self._check(row, max_chars, seen_uids, labels, needs_title)
            if isinstance(checked, BadRow):
                self.bad[checked.reason.partition(":")[0]] += 1
                self.first += [checked] if len(self.first) < 5 else []
                entry = dataclasses.asdict(checked) | {"record": number}
                bad_file.write(json.dumps(entry) + "\n")
                if self.good + self.bad.total() >= _EARLY_CHECK:
                    self._limit_bad_share(max(0.5, max_bad_share))
            else:
                self.good += 1
                yield checked
        self._limit_bad_share(max_bad_share)

    def _check(
        self,
        row: Row | BadRow,
        max_chars: int,
        seen_uids: set[int],
        labels: LabelSet,
        needs_title: bool,
    ) -> Row | BadRow:
        if isinstance(row, BadRow):
            return row
        try:
            label = None if row.example.label is None else labels.read(row.example.label)
        except ValueError as error:
            return BadRow(file=row.file, line=row.line, reason=str(error))
        example, cut_fields = _clean(row.example, max_chars, label)
        # Hashes, not strings: millions are remembered, and 64 bits do not collide by chance.
        uid = hash(example.uid)
        reason = _defect(example, needs_title)
        reason = reason or (f"{_DUPLICATE}{example.uid!r}" if uid in seen_uids else "")
        if reason:
            return BadRow(file=row.file, line=row.line, reason=reason)
        seen_uids.add(uid)
        self.cut += cut_fields
        return dataclasses.replace(row, example=example)

    def _limit_bad_share(self, max_share: float):
        bad, total = self.bad.total(), self.good + self.bad.total()
        if bad > max_share * total:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in self.bad.most_common())
            first = "\n  ".join(f"{row.file}:{row.line}: {row.reason}" for row in self.first)
            raise UserError(
                f"{bad} of {total} rows cannot be used, more than the allowed share of "
                f"{max_share:g}: {reasons}. The first:\n  {first}\n"
                "Correct them, or set them aside: --config.data.max_bad_share=SHARE"
            )


def _without_markup(row: Row) -> Row:
    product = {name: strip_markup(text) for name, text in row.example.product.items()}
    if product == row.example.product:
        return row
    return dataclasses.replace(row, example=dataclasses.replace(row.example, product=product))


def _clean(example: Example, max_chars: int, label: Label | None) -> tuple[Example, int]:
    """The example with clean texts of at most ``max_chars``, and how many fields were cut."""
    cut_fields = 0

    def clean(text: str) -> str:
        nonlocal cut_fields
        text = normalize_text(text)
        if len(text) <= max_chars:
            return text
        cut_fields += 1
        return text[:max_chars].rstrip()

    fields = example.product.items()
    product = {clean(name): text for name, value in fields if (text := clean(value))}
    steps, rationale = example.steps, example.rationale
    cleaned = dataclasses.replace(
        example,
        uid=clean(example.uid),
        query=clean(example.query),
        product=product,
        label=label,
        steps=None if steps is None else {name: clean(text) for name, text in steps.items()},
        kind=clean(example.kind),
        # The lines of a rationale are its steps, so line breaks are kept.
        rationale="\n".join(map(clean, rationale.split("\n"))) if rationale else None,
    )
    return cleaned, cut_fields


def _defect(example: Example, needs_title: bool) -> str:
    """Why an example cannot be used; empty if it can."""
    if not example.query:
        return "empty query"
    if needs_title and not example.product.get("title"):
        return "missing title"
    if not example.uid:
        return "empty uid"
    return ""
