"""What an evaluation with labels leaves beside its predictions: report, page and table."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from she_jax.cot import LabelSet
from she_jax.data.dataset import open_split
from she_jax.evaluation.agreement_page import agreement_page, judged_row, other_mix
from she_jax.evaluation.agreement_report import agreement_report, flagged
from she_jax.evaluation.evaluate import VALIDATION, evenly_spaced
from she_jax.evaluation.judge import Calibration
from she_jax.evaluation.judged import JudgedPairs, judged_pairs
from she_jax.runs.decide import pairs_of_run
from she_jax.runs.load import Source
from she_jax.runs.outputs import Table, no_formula
from she_jax.runs.policy import FLOOR_PAIRS
from she_jax.training.files import write_json, write_text
from she_jax.training.logging import log
from she_jax.types import Example

Ranks = Mapping[str, Mapping[int, float]]  # by system: the place of a pair to its rank


def write_agreement(
    workdir: Path,
    source: Source,
    examples: Sequence[Example],
    lines: Sequence[Mapping[str, Any]],
    labels: LabelSet,
    calibration: Calibration,
    samples: int,
    ranks: Ranks,
) -> None:
    """Writes ``agreement.json`` and ``agreement.html``.

    Args:
      workdir: the evaluation's folder.
      source: where the policy is from; the floor is fitted on the training pairs of its run.
      examples: the pairs, of which some have a label.
      lines: their lines of ``predictions.jsonl``.
      labels: the label set.
      calibration: how the labels were decided on.
      samples: k, chains that voted.
      ranks: of ranking systems, by the places of the pairs; empty for none.
    """
    temperature = calibration.temperature
    judged = judged_pairs(examples, lines, labels, samples=samples, temperature=temperature)
    train, known = _training_pairs(source)
    report = agreement_report(judged, train, _labeled(ranks, judged), known)
    report["decide"] = calibration.to_json()
    if (limit := calibration.review_below) is not None:
        report["flagged"] = flagged(judged, limit)
    write_json(workdir / "agreement.json", report)
    if warning := other_mix(report):
        log(warning)
    votes = f", by {samples} sampled chains a pair ({calibration.decision.rule})" if samples else ""
    about = f"{report['pairs']:,} labeled pairs, judged by {source}{votes}"
    write_text(workdir / "agreement.html", agreement_page(report, judged, about))
    log(f"agreement with people: {workdir / 'agreement.html'}; a row a pair: judged.csv")


def _labeled(ranks: Ranks, judged: JudgedPairs) -> dict[str, dict[int, float]]:
    """The ranks by the numbers of the labeled pairs, without those of others."""
    labeled = {}
    for system, places in ranks.items():
        given = np.array(sorted(places), int)
        numbers = np.searchsorted(judged.places, given)
        known = np.isin(given, judged.places)
        pairs = zip(numbers[known].tolist(), given[known].tolist(), strict=True)
        labeled[system] = {number: places[place] for number, place in pairs}
    return labeled


def _training_pairs(source: Source) -> tuple[list[Example], set[str]]:
    """Some training pairs of the run, and all queries that it was trained or tuned on."""
    if source.folder is None:
        return [], set()
    try:
        dataset = pairs_of_run(source.folder)
    except FileNotFoundError as error:
        log(f"no floor, and nothing is known of the training pairs: {error}")
        return [], set()
    known = {
        query
        for split in ("train", VALIDATION)
        if dataset.splits.get(split)
        for query in open_split(dataset.path, split).texts("query")
    }
    return evenly_spaced(dataset, "train", FLOOR_PAIRS), known


def write_judged(
    workdir: Path,
    examples: Sequence[Example],
    lines: Sequence[Mapping[str, Any]],
    table: Table | None,
) -> None:
    """Writes ``judged.csv``, a row for each pair.

    Args:
      workdir: the evaluation's folder.
      examples: the pairs.
      lines: their lines of ``predictions.jsonl``.
      table: the user's, for the ids; None if the pairs are of none.
    """

    def ids() -> Iterator[dict[str, str]]:
        if table is None:
            yield from ({"docid": example.uid} for example in examples)
            return
        names = ("qid", "docid") if table.has_qids else ("docid",)
        for _, cells in table.records():
            yield {name: cells.get(name, "") for name in names}

    part = workdir / "judged.csv.part"
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = None
        for example, line, known in zip(examples, lines, ids(), strict=True):
            row = {**known, **judged_row(example, line)}
            row |= {name: no_formula(row[name]) for name in ("verdicts", "chain")}
            if writer is None:
                writer = csv.DictWriter(file, row.keys())
                writer.writeheader()
            writer.writerow(row)
    part.replace(workdir / "judged.csv")
