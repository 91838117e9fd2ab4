"""What an evaluation with labels leaves beside its predictions: report, page and table."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from she_jax.cot import LabelSet
from she_jax.evaluation.agreement_page import agreement_page, judged_rows
from she_jax.evaluation.agreement_report import agreement_report, judged_pairs
from she_jax.evaluation.evaluate import evenly_spaced
from she_jax.evaluation.judge import Calibration
from she_jax.runs.decide import pairs_of_run
from she_jax.runs.load import Source
from she_jax.runs.policy import FLOOR_PAIRS
from she_jax.training.files import write_json, write_text
from she_jax.training.logging import log
from she_jax.types import Example

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is a formula to a spreadsheet


def write_agreement(
    workdir: Path,
    source: Source,
    examples: Sequence[Example],
    lines: Sequence[Mapping[str, Any]],
    labels: LabelSet,
    calibration: Calibration,
    samples: int,
) -> None:
    """Writes ``agreement.json``, ``agreement.html`` and ``judged.csv``.

    Args:
      workdir: the evaluation's folder.
      source: where the policy is from; the floor is fitted on the training pairs of its run.
      examples: the pairs, of which some have a label.
      lines: their lines of ``predictions.jsonl``.
      labels: the label set.
      calibration: how the labels were decided on.
      samples: k, chains that voted.
    """
    temperature = calibration.temperature
    judged = judged_pairs(examples, lines, labels, samples=samples, temperature=temperature)
    report = agreement_report(judged, _training_pairs(source))
    write_json(workdir / "agreement.json", report | {"decide": calibration.to_json()})
    votes = f", by {samples} sampled chains a pair ({calibration.decision.rule})" if samples else ""
    about = f"{report['pairs']:,} labeled pairs, judged by {source}{votes}"
    write_text(workdir / "agreement.html", agreement_page(report, judged, about))
    _write_csv(workdir / "judged.csv", judged_rows(examples, lines))
    log(f"agreement with people: {workdir / 'agreement.html'}; a row a pair: judged.csv")


def _training_pairs(source: Source) -> list[Example]:
    if source.folder is None:
        return []
    try:
        return evenly_spaced(pairs_of_run(source.folder), "train", FLOOR_PAIRS)
    except FileNotFoundError as error:
        log(f"no floor, and nothing is known of the training pairs: {error}")
        return []


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            written = {name: row[name] for name in ("verdicts", "chain")}  # by a model
            safe = {k: f"'{v}" if v.startswith(_FORMULA) else v for k, v in written.items()}
            writer.writerow({**row, **safe})
    part.replace(path)
