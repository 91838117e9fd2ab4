"""The chains of an evaluation that a run keeps, and what training changed in them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from she_jax.cot import Chain, CotSchema
from she_jax.data.dataset import evenly_spaced_rows
from she_jax.training.files import write_text
from she_jax.types import Example

KEPT = 200  # pairs, evenly spaced


def chains_file(when: str) -> str:
    """Name of the file with the chains of an evaluation, ``before`` or ``after`` training."""
    return f"chains_{when}.jsonl"


def write_chains(
    path: Path,
    examples: Sequence[Example],
    chains: Sequence[Chain],
    texts: Sequence[str],
    schema: CotSchema,
) -> None:
    """Writes the chains of up to ``KEPT`` pairs, a line each.

    A line has the pair (``uid``, ``query``, ``product``), its ``label`` and the ``truth`` of its
    steps as far as they are known, and what the policy said: ``given``, the label (None if it
    cannot be read), ``verdicts`` by step (without the label's) and the ``text`` of the chain.

    Args:
      path: the file.
      examples: the pairs that were evaluated.
      chains: one per pair.
      texts: as written.
      schema: the steps.
    """
    lines = [
        json.dumps(_line(examples[n], chains[n], texts[n], schema)) + "\n"
        for n in evenly_spaced_rows(len(examples), KEPT)
    ]
    write_text(path, "".join(lines))


def _line(example: Example, chain: Chain, text: str, schema: CotSchema) -> dict[str, Any]:
    steps = zip(schema.steps, chain.steps, strict=True)
    return {
        "uid": example.uid,
        "query": example.query,
        "product": dict(example.product),
        "label": example.label,
        "truth": dict(example.steps or {}),
        "given": chain.label,
        "verdicts": {
            step.name: parsed and parsed.verdict
            for n, (step, parsed) in enumerate(steps)
            if step.verdicts and n != schema.label_index
        },
        "text": text,
    }


def compare_chains(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """The pairs whose label or verdicts training changed, by what that did to the label.

    Args:
      before, after: lines of ``write_chains`` of the same pairs.

    Returns:
      (before, after) of each such pair, under ``gained`` (the label became right), ``lost`` (it
      became wrong) and ``other`` (it stayed right or wrong, or nobody knows).
    """
    changed: dict[str, list[Any]] = {"gained": [], "lost": [], "other": []}
    earlier = {line["uid"]: line for line in before}
    for new in after:
        old = earlier.get(new["uid"])
        if old is None or (old["given"], old["verdicts"]) == (new["given"], new["verdicts"]):
            continue
        was, is_right = (line["given"] == line["label"] is not None for line in (old, new))
        kind = "other" if was == is_right else "gained" if is_right else "lost"
        changed[kind].append((old, new))
    return changed
