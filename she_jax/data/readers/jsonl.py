"""Reads a user's own pairs from a JSONL file, with one JSON object per line.

    {"query": "red mug", "product": {"title": "Mug, red", "brand": "Acme"}, "label": 4}

A ``query``, and a ``product`` with a ``title``, are required. ``label`` (of the run's label set),
``steps`` (step name to verdict, or to a string of items separated by ";" for a free-text step),
``kind``, ``uid``, ``rationale`` (a whole chain) and ``split`` are optional. Other keys are ignored.
Training needs a label, or a rationale with all steps of the run's chain.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from she_jax.cot import CotSchema, LabelSet
from she_jax.data.dataset import ExampleBuilder, HashSplitConfig
from she_jax.data.intake import Row
from she_jax.types import BadRow, Example, Label

# Verdicts by step. All numbered checks have those of ``check_1``.
_VERDICTS = {step.name: step.verdicts for step in CotSchema.build(checks=1).steps}


@dataclass(kw_only=True, eq=False)
class JsonlConfig(HashSplitConfig):
    """Options of a JSONL file: its path, splits and chain.

    Attributes:
      path: the file.
      evaluation: put every row in ``test``, whatever its ``split``, to evaluate on the whole file.
      chain: the arguments of ``CotSchema.build`` for the run's chain, with its labels.
    """

    path: str
    evaluation: bool = False
    chain: dict[str, Any] = field(default_factory=dict)

    @property
    def schema(self) -> CotSchema:
        """The steps of the chain."""
        return CotSchema.build(**self.chain)

    @property
    def label_set(self) -> LabelSet:
        return self.schema.labels

    def sources(self) -> tuple[Path, ...]:
        return (Path(self.path),)


class Jsonl(ExampleBuilder):
    """A user's JSONL file."""

    builder_config: JsonlConfig

    def rows(self) -> Iterator[Row | BadRow]:
        config = self.builder_config
        schema = config.schema
        verdicts = _VERDICTS | {step.name: step.verdicts for step in schema.steps}
        with open(config.path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                text = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if not text.strip():
                    continue
                try:
                    example, split = _parse(text, line, schema.labels, verdicts)
                except ValueError as error:
                    yield BadRow(file=config.path, line=line, reason=str(error))
                    continue
                well_formed = example.rationale and schema.parse(example.rationale).well_formed
                if not (config.evaluation or example.label is not None or well_formed):
                    needs = f"or a rationale with the steps {', '.join(schema.names)}"
                    reason = f"no label: training needs one, {needs}"
                    yield BadRow(file=config.path, line=line, reason=reason)
                    continue
                split = "test" if config.evaluation else split or config.split_of(example.query)
                yield Row(split=split, example=example, file=config.path, line=line)


def _parse(
    raw: bytes, line: int, labels: LabelSet, verdicts: Mapping[str, tuple[str, ...]]
) -> tuple[Example, str]:
    """Parses a line into an example and its split, "" if the row has none.

    Raises:
      ValueError: if the row cannot be used; the message is the reason.
    """
    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"not an object: {_preview(row)}")
    steps = row.get("steps")
    example = Example(
        uid=_scalar(row.get("uid"), "uid") or f"line-{line}",
        query=_text(row, "query"),
        product=_product(row.get("product")),
        label=_label(row.get("label"), labels),
        steps=steps if steps is None else _steps(steps, verdicts),
        kind=_text(row, "kind"),
        annotations=tuple(steps or ()),
        rationale=_text(row, "rationale") or None,
    )
    split = _text(row, "split")
    if split and not re.fullmatch(r"[a-z]\w*", split, re.ASCII):
        raise ValueError(f"wrong split: {split!r}, expected a word such as train, validation, test")
    return example, split


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"wrong {key}: {_preview(value)}, expected text")
    return value or ""


def _label(value: Any, labels: LabelSet) -> Label | None:
    if value is None or value != value:  # NaN: how pandas writes a gap
        return None
    if isinstance(value, list | dict):
        raise ValueError(f"unknown label: {_preview(value)}, expected {', '.join(labels.texts)}")
    return labels.read(value)


def _product(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"wrong product: {_preview(value)}, expected an object with a title")
    return {name: _field(field, name) for name, field in value.items()}


def _field(value: Any, name: str) -> str:
    if isinstance(value, list):
        return ", ".join(_scalar(item, f"product field: {name}") for item in value)
    return _scalar(value, f"product field: {name}")


def _scalar(value: Any, key: str) -> str:
    if isinstance(value, dict | list):
        raise ValueError(f"wrong {key}: {_preview(value)}, expected text or a number")
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _steps(value: Any, verdicts: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ValueError(f"wrong steps: {_preview(value)}, expected step names with texts")
    if "label" in value:
        raise ValueError("wrong steps: 'label' is a key of the row, not a step")
    for name, verdict in value.items():
        known = name if name in verdicts else re.sub(r"_\d+$", "_1", name)
        if known not in verdicts:
            raise ValueError(f"wrong steps: no step {name!r}, expected some of {list(verdicts)}")
        if verdicts[known] and verdict not in verdicts[known]:
            expected = ", ".join(verdicts[known])
            raise ValueError(f"wrong steps: {name} {verdict!r}, expected one of {expected}")
    return value


def _preview(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
