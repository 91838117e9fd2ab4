"""Merges what annotators send back into a table of pairs that training reads."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from she_jax.annotation.merge import agreement, annotated_row, by_pair, consensus, pair_row
from she_jax.annotation.reading import read_opinions
from she_jax.annotation.stepwise import judged_row
from she_jax.annotation.tasks import Opinion, Task, json_lines, read_tasks
from she_jax.cot import CotSchema
from she_jax.data.dataset import open_split
from she_jax.recipes import annotate as annotate_recipe
from she_jax.runs.annotate import CHOICE, PAIRS, TRAIN
from she_jax.runs.config import data_config
from she_jax.training.files import write_json, write_text
from she_jax.training.logging import log, rows_table, show
from she_jax.training.setup import prepare_dataset
from she_jax.training.workdir import lock_workdir, read_recipe
from she_jax.types import UserError

STORE = "imported.jsonl"  # every opinion that was ever imported, each once
SHOWN = 5  # bad lines on the screen
Rows = dict[str, dict[str, Any]]  # by uid


def import_annotations(folder: Path, files: Sequence[Path], *, whole: bool = False) -> None:
    """Adds the opinions in some files to those that were imported before, and merges all.

    ``annotated.jsonl`` is the table of annotated pairs, ``stepwise_judged.jsonl`` those with all
    steps judged in TRL's format, ``annotators.json`` the agreement and what is missing,
    ``bad_rows.jsonl`` what could not be used.

    Args:
      folder: where ``annotate`` wrote the pairs.
      files: see ``she_jax.annotation.reading``; none merges again what was imported before.
      whole: also write ``all_pairs.jsonl``, every pair of the run's data with its split.

    Raises:
      FileNotFoundError: if a file is missing.
      UserError: if the folder has no pairs that were given out, or nothing at all could be used.
    """
    if not (folder / PAIRS).is_file():
        raise UserError(f"{folder} has no {PAIRS}: first she-jax annotate RUN --pairs=N")
    with lock_workdir(folder):
        choice = json.loads((folder / CHOICE).read_text(encoding="utf-8"))
        schema, tasks = CotSchema.build(**choice["chain"]), read_tasks(folder / PAIRS)
        fresh, bad = read_opinions(files, tasks, schema)
        write_text(folder / "bad_rows.jsonl", json_lines(map(asdict, bad)))
        if bad:
            first = "".join(f"\n  {row.file}:{row.line}: {row.reason}" for row in bad[:SHOWN])
            log(f"{len(bad):,} lines or steps set aside, see {folder / 'bad_rows.jsonl'}:{first}")
        store = folder / STORE
        earlier = read_opinions([store], tasks, schema)[0] if _filled(store) else []
        opinions = sorted({*earlier, *fresh}, key=lambda opinion: opinion.order)
        if not opinions:
            raise UserError(
                f"no annotation in {', '.join(map(str, files))}: expected a step or more"
            )
        write_text(store, json_lines(map(asdict, opinions)))
        log(f"{len(fresh):,} opinions read, {len(opinions) - len(set(earlier)):,} of them new")
        _merge(folder, schema, tasks, opinions, whole)


def _filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _merge(
    folder: Path,
    schema: CotSchema,
    tasks: Mapping[str, Task],
    opinions: Sequence[Opinion],
    whole: bool,
) -> None:
    pairs = by_pair(opinions)
    rows = {u: annotated_row(tasks[u].example, pairs[u], schema) for u in tasks if u in pairs}
    usable = {uid: row for uid, row in rows.items() if _trainable(row, schema)}
    write_text(folder / "annotated.jsonl", json_lines(usable.values()))
    judged = [judged_row(tasks[u], schema, consensus(pairs[u], schema).correct) for u in rows]
    if any(judged):  # datasets refuses an empty file
        write_text(folder / "stepwise_judged.jsonl", json_lines(filter(None, judged)))
    missing = {
        "without_annotation": [uid for uid in tasks if uid not in pairs],
        "without_steps": [uid for uid, row in rows.items() if "steps" not in row],
        "without_label": [uid for uid, row in rows.items() if not _trainable(row, schema)],
    }
    report = agreement(tasks, opinions, schema) | missing
    write_json(folder / "annotators.json", report)
    _show(report)
    log(f"{len(usable):,} annotated pairs: {folder / 'annotated.jsonl'}")
    for name, uids in missing.items():
        if uids:
            log(f"{len(uids):,} pairs {name.replace('_', ' ')}, named in annotators.json")
    path = folder / "annotated.jsonl"
    if whole:
        path = folder / "all_pairs.jsonl"
        write_text(path, json_lines(_all_rows(folder, schema, usable)))
        log(f"all pairs, these among them: {path}")
    labels = f" --config.data.labels={shlex.quote(schema.labels.text)}"
    known = schema.label_index < 0 or schema.labels.text == "1-4"
    log(f"train on them: she-jax train {shlex.quote(str(path))}{'' if known else labels}")


def _trainable(row: Mapping[str, Any], schema: CotSchema) -> bool:
    """Whether training takes the row: with a label, or with a chain, or where there is no label."""
    well_formed = schema.parse(row.get("rationale", "")).well_formed
    return schema.label_index < 0 or "label" in row or well_formed


def _all_rows(folder: Path, schema: CotSchema, rows: Rows) -> Iterator[dict[str, Any]]:
    """Every pair of the data that the pairs were chosen from; of a run each with its split."""
    recipe: Any = ConfigDict(annotate_recipe.get_config().to_dict() | read_recipe(folder))
    dataset = prepare_dataset(data_config(recipe, folder).for_chain(schema.options))
    for split in dataset.splits:
        examples = open_split(dataset.path, split)
        for row in range(len(examples)):
            example = examples[row]
            values = rows.get(example.uid) or pair_row(example)
            yield values | ({"split": split} if recipe.annotate.split == TRAIN else {})


def _show(report: Mapping[str, Any]) -> None:
    """The agreement as a table on the screen."""
    who = ", ".join(f"{name} ({n:,} pairs)" for name, n in report["annotators"].items())
    log(f"annotators: {who}")
    columns = ("pairs", "twice", "ties", "chain_right", "accuracy", "kappa", "alpha")
    rows = {
        name: {
            column: value.get("estimate") if isinstance(value := step[column], Mapping) else value
            for column in columns
        }
        for name, step in report["steps"].items()
    }
    show(rows_table("annotators, step by step", columns, rows))
