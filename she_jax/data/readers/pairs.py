"""Makes a pair of a row of judgments and its product."""

import re
from collections.abc import Iterator, Mapping, Sequence

from she_jax.cot import CotSchema
from she_jax.data.intake import Row
from she_jax.data.readers.columns import STEP
from she_jax.data.readers.delimited import Record
from she_jax.data.readers.judgments import Judgments, TableConfig
from she_jax.data.splits import split_bounds
from she_jax.types import BadRow, Example, Label

# Verdicts by step. All numbered checks have those of ``check_1``.
_VERDICTS = {step.name: step.verdicts for step in CotSchema.build(checks=1).steps}


class PairReader:
    """Makes a pair of a row and its product, and counts what is to be said of all."""

    def __init__(self, judgments: Judgments, queries: Mapping[str, str], config: TableConfig):
        """A reader of some judgments.

        Args:
          judgments: the table; it is read up to where no split is empty.
          queries: by ``qid``; empty if the judgments have them.
          config: the options.
        """
        self._judgments, self._queries = judgments, queries
        self._config, self._schema = config, config.schema
        self._verdicts = _VERDICTS | {step.name: step.verdicts for step in self._schema.steps}
        self._labels = self._rationales = self._contradictions = self._no_chains = 0
        self._others, self._other = 0, ""  # labels of another set, and what is said of the first
        self._no_chain = ""  # the first rationale that is none
        self._place, self._again = ("", 0), 0
        self._bounds = None if config.evaluation else split_bounds(self._hashed_queries(), config)

    def row(self, record: Record, product: Mapping[str, str]) -> Row:
        """The pair of a row.

        Raises:
          ValueError: if the row cannot be used; the message is the reason.
        """
        cells = self._judgments.pair(record)
        query = self._query(cells)
        judged = self._judgments.columns.judged.items()
        product = {f: record.cells[c] for f, c in judged if c in record.cells} | dict(product)
        steps = self._steps(cells)
        label, raters = self._labels_of(record, cells)
        example = Example(
            uid=self._uid(record, cells, query),
            query=query,
            product=product,
            label=label,
            steps=steps or None,
            kind=cells.get("kind", ""),
            annotations=tuple(steps),
            rationale=cells.get("rationale"),
            raters=raters,
        )
        well_formed = self._check_rationale(record, example)
        optional = self._config.evaluation or self._schema.label_index < 0
        if not (optional or label is not None or well_formed):
            needs = f"or a rationale with the steps {', '.join(self._schema.names)}"
            raise ValueError(f"no label: training needs one, {needs}")
        return Row(
            split="test" if self._config.evaluation else self._split(cells, query),
            example=example,
            file=record.file,
            line=record.line,
        )

    def notes(self) -> list[str]:
        """What the user should know of the rows, in sentences."""
        notes, path = [], self._config.path
        if unread := self._judgments.unread():
            notes.append(
                f"{path}: columns that are not read: {_few(unread)} (a field of the product is "
                "named with --config.data.columns=FIELD=COLUMN, raters with raters=COLUMN+COLUMN)"
            )
        if self._others:
            notes.append(
                f"{path}: {self._others:,} labels are not of the policy's set, and their pairs are "
                f"judged without them; the first: {self._other}"
            )
        elif not self._labels and self._schema.label_index >= 0:
            notes.append(
                f"{path}: no row has a label, so nothing is measured"
                + (f"; is it one of {_few(unread)}? Then" if unread else "; if there is one,")
                + " name it: --config.data.columns=label=COLUMN"
            )
        if self._no_chains:
            notes.append(
                f"{path}: {self._no_chains:,} of {self._rationales:,} rationales are no chain of "
                f"the steps {', '.join(self._schema.names)}, such as {self._no_chain}"
            )
        if self._contradictions:
            notes.append(
                f"{path}: {self._contradictions:,} of {self._rationales:,} rationales end in "
                "another label than their pair's"
            )
        return notes

    def _query(self, cells: Mapping[str, str]) -> str:
        if not self._config.queries:
            return cells.get("query", "")
        if cells.get("qid") not in self._queries:
            raise ValueError(f"no such query: {cells.get('qid', '')!r}")
        return self._queries[cells["qid"]]

    def _uid(self, record: Record, cells: Mapping[str, str], query: str) -> str:
        if uid := cells.get("uid"):
            return uid
        if docid := cells.get("docid"):
            return f"{query} / {docid}"
        place = (record.file, record.line)
        self._again = self._again + 1 if place == self._place else 1  # a JSON array on one line
        self._place = place
        file = f"{record.file}-" if len(self._judgments.parts) > 1 else ""
        again = f"-{self._again}" if self._again > 1 else ""
        return f"{file}line-{record.line}{again}"

    def _labels_of(
        self, record: Record, cells: Mapping[str, str]
    ) -> tuple[Label | None, tuple[Label, ...]]:
        """The label, and those of the raters, whose lower median is the label if there is none."""
        labels = self._schema.labels
        try:
            raters = tuple(labels.read(text) for text in self._judgments.rater_texts(record))
            label = labels.read(cells["label"]) if "label" in cells else None
        except ValueError as error:
            if not self._config.evaluation:
                raise
            self._others += 1  # it can be judged all the same
            self._other = self._other or str(error)
            return None, ()
        if label is None and raters:
            ordered = sorted(raters, key=labels.index)
            label = ordered[(len(ordered) - 1) // 2]
        self._labels += label is not None
        return label, raters

    def _steps(self, cells: Mapping[str, str]) -> dict[str, str]:
        """The annotated steps of a row.

        Raises:
          ValueError: if there is no such step, or a verdict is not one of its own.
        """
        if "steps" in cells:
            raise ValueError(f"wrong steps: {cells['steps'][:60]!r}, expected names with texts")
        steps = {f[len(STEP) :]: text for f, text in cells.items() if f.startswith(STEP)}
        if "label" in steps:
            raise ValueError("wrong steps: 'label' is a key of the row, not a step")
        for name, verdict in steps.items():
            known = name if name in self._verdicts else re.sub(r"_\d+$", "_1", name)
            if known not in self._verdicts:
                expected = list(self._verdicts)
                raise ValueError(f"wrong steps: no step {name!r}, expected some of {expected}")
            if self._verdicts[known] and verdict not in self._verdicts[known]:
                expected = ", ".join(self._verdicts[known])
                raise ValueError(f"wrong steps: {name} {verdict!r}, expected one of {expected}")
        return steps

    def _check_rationale(self, record: Record, example: Example) -> bool:
        """Whether there is a rationale that is a chain of the schema."""
        if not example.rationale:
            return False
        self._rationales += 1
        chain = self._schema.parse(example.rationale)
        if not chain.well_formed:
            self._no_chains += 1
            shown = " ".join(example.rationale.split())[:60]
            self._no_chain = self._no_chain or f"{record.file}:{record.line}: {shown!r}"
        self._contradictions += (
            chain.well_formed and example.label is not None and chain.label != example.label
        )
        return chain.well_formed

    def _split(self, cells: Mapping[str, str], query: str) -> str:
        if split := cells.get("split", "").lower():
            if not re.fullmatch(r"[a-z]\w*", split, re.ASCII):
                raise ValueError(
                    f"wrong split: {split!r}, expected a word such as train, validation, test"
                )
            return split
        return self._config.split_of(query, self._bounds)

    def _hashed_queries(self) -> Iterator[str]:
        """The queries of the rows that can be used and name no split."""
        for record in self._judgments.records():
            if isinstance(record, BadRow):
                continue
            cells = self._judgments.pair(record)
            labeled = (
                self._schema.label_index < 0
                or {"label", "rationale"} & cells.keys()
                or self._judgments.rater_texts(record)
            )
            query = self._queries.get(cells.get("qid", "")) or cells.get("query")
            if labeled and query and "split" not in cells:
                yield query


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
