"""Chooses pairs that are worth annotating, and writes what people annotate them with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from she_jax.annotation.label_studio import label_studio_task, labeling_config
from she_jax.annotation.page import annotation_page
from she_jax.annotation.quotas import (
    Cell,
    categories,
    cell_errors,
    choose,
    deciding_step,
    doubt,
    entropy,
)
from she_jax.annotation.stepwise import stepwise_row
from she_jax.annotation.tasks import json_lines, make_task, task_to_json
from she_jax.cot import LABEL_STEP, CotSchema
from she_jax.data.dataset import fingerprint, open_split, shuffled_rows
from she_jax.evaluation.decide import DecideConfig
from she_jax.evaluation.evaluate import VALIDATION, evenly_spaced
from she_jax.evaluation.judge import Calibration
from she_jax.generate.generator import Generator
from she_jax.generate.language_model import UNLIMITED
from she_jax.generate.lengths import measure
from she_jax.runs.blocks import Share
from she_jax.runs.config import INHERITED, AnnotateConfig, Recipe, inherit, read_run
from she_jax.runs.decide import Decider, pairs_of_run
from she_jax.runs.load import PHASES, Source, fit_lengths, load_policy
from she_jax.runs.predictions import FORMATS, OutputConfig, read_predictions
from she_jax.training.checkpoint import params_digest
from she_jax.training.files import write_json, write_text
from she_jax.training.logging import Progress, log
from she_jax.training.setup import prepare_dataset, split_mesh
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import read_recipe
from she_jax.types import Example, UserError

PAIRS, CHOICE = "pairs.jsonl", "choice.json"
MEASURED = 512  # validation pairs on which the errors of the cells are measured
WHOLE, TRAIN = "test", "train"  # where a table's rows are, all of them; a run's training pairs
Judged = Sequence[tuple[Example, Mapping[str, Any]]]  # pairs with their lines of predictions


def complete(recipe: Recipe) -> Recipe:
    """The recipe with the pairs to choose from: those of the run or of the predictions.

    Raises:
      FileNotFoundError: if there is no such folder.
      UserError: if it holds neither a policy nor finished predictions.
    """
    folder = Path(recipe.checkpoint)
    stored = read_recipe(folder) if (folder / "config.json").is_file() else {}
    changes: dict[str, Any] = {}
    split = WHOLE
    if stored.get("kind") == "evaluate":
        if _predictions(folder) is None:
            raise UserError(f"{folder}: the predictions are not done; repeat their command first")
        changes = {name: stored[name] for name in INHERITED}
        changes["data"] |= {"dir": stored["data"]["dir"] or str(folder / "data")}
        split = stored["data"]["eval_split"]
    elif recipe.data.name == "shopworld":  # no table is named
        recipe, split = inherit(recipe), TRAIN
    whole: Any = ConfigDict(recipe.to_dict() | changes)
    whole.annotate.split = whole.annotate.split or split
    return whole.lock()


def annotate(config: AnnotateConfig, workdir: Path) -> None:
    """Writes the pairs to annotate, as a page, for Label Studio and in TRL's format.

    ``pairs.jsonl`` comes last; once it is there nothing is written again.

    Raises:
      UserError: if no pair is left to annotate.
      SystemExit: after a signal, once what was judged is saved.
    """
    if (workdir / PAIRS).is_file():
        log("all is done already, and nothing is written again")
    else:
        stored = read_recipe(Path(config.checkpoint)) if _is_run(config.checkpoint) else {}
        by = _of_predictions if stored.get("kind") == "evaluate" else _by_policy
        schema, judged, errors, about = by(config, workdir)
        _write(config, workdir, schema, judged, errors, about)
    log(f"annotate in a browser: {workdir / 'annotate.html'}")
    log(f"or in Label Studio: {workdir / 'label_studio.json'} with label_studio.xml")
    log(f"or as TRL's stepwise supervision: {workdir / 'stepwise.jsonl'}")
    folder = "" if workdir == Path(config.checkpoint) / "annotate" else f" --workdir={workdir}"
    log(f"then: she-jax annotate {config.checkpoint}{folder} --import FILE ...")


def _is_run(checkpoint: str) -> bool:
    return (Path(checkpoint) / "config.json").is_file()


def _predictions(folder: Path) -> Path | None:
    """The finished predictions in a folder; None if there are none."""
    paths = [folder / f"predictions.{suffix}" for suffix in FORMATS]
    return next((path for path in paths if path.is_file()), None)


def _of_predictions(
    config: AnnotateConfig, workdir: Path
) -> tuple[CotSchema, Judged, dict[Cell, float] | None, str]:
    """The pairs of a folder of predictions with their chains; nothing is judged."""
    folder = Path(config.checkpoint)
    stored = read_recipe(folder)
    source = Path(stored["checkpoint"])
    schema = read_run(source).schema if _is_run(str(source)) else config.schema
    dataset = prepare_dataset(config.data.for_chain(schema.options))
    path = _predictions(folder)
    assert path is not None
    lines = {line["uid"]: line for line in read_predictions(path)}
    examples = open_split(dataset.path, config.split)
    uids = examples.texts("uid")
    judged = [(examples[n], lines[uid]) for n, uid in enumerate(uids) if uid in lines]
    log(f"{len(judged):,} pairs with their chains, as predicted in {folder}")
    return schema, judged, None, str(source)


def _by_policy(
    config: AnnotateConfig, workdir: Path
) -> tuple[CotSchema, Judged, dict[Cell, float] | None, str]:
    """Candidates with the chains that the policy writes of them, and its errors by cell."""
    mesh, _ = split_mesh(config.mesh, 0)
    phases = (config.phase,) if config.phase else PHASES
    lm, params, source = load_policy(config, config.checkpoint, mesh, phases)
    dataset = prepare_dataset(config.data.for_chain(lm.prompts.schema.options))
    examples = open_split(dataset.path, config.split)
    if UNLIMITED in (lm.prompts.prompt_length, lm.prompts.completion_length):
        model = replace(config.model, name=config.checkpoint)
        lm = fit_lengths(lm, model, measure(lm.prompts, examples))
    schema, count = lm.prompts.schema, config.candidates or 10 * config.pairs
    rows = _open_rows(examples, schema, count, shuffled=config.data.shuffled)
    k = config.samples
    log(
        f"{len(rows):,} candidates, {1 + k} chains each ({(1 + k) * len(rows):,} in all): one to "
        f"look at, {k} that vote; fewer with --samples or annotate.candidates"
    )
    decide = DecideConfig(samples=k, seed=config.seed)
    decider = Decider(decide, lm, params, config.evaluation.batch_size)
    share = Share(decider, source, examples, rows, workdir / "chains", OutputConfig())
    content = {"pairs": fingerprint(dataset), "checkpoint": params_digest(params)}
    share.claim(content, Calibration())
    with StopSignal() as stop:
        share.run("the candidates", stop)
    judged = [(examples[row], line) for row, line in zip(rows, share.blocks, strict=True)]
    errors = _measured_errors(Generator(lm, config.evaluation.batch_size), params, source, schema)
    return schema, judged, errors, str(source)


def _open_rows(
    examples: Sequence[Example] | Any, schema: CotSchema, count: int, *, shuffled: bool
) -> list[int]:
    """Rows of up to ``count`` different pairs of which not every step is annotated."""
    steps = {step.name for step in schema.steps if not step.optional} - {LABEL_STEP}
    rows: list[int] = []
    seen: set[tuple[str, str]] = set()
    for row in shuffled_rows(len(examples), shuffled=shuffled).tolist():
        example = examples[row]
        text = json.dumps(dict(example.product), sort_keys=True)
        pair = (example.query.casefold(), text.casefold())
        if steps <= set(example.annotations) or pair in seen:
            continue
        seen.add(pair)
        rows.append(row)
        if len(rows) == count:
            break
    if not rows:
        raise UserError(
            f"all steps of all {len(examples):,} pairs are annotated: name others with --table=FILE"
        )
    return sorted(rows)


def _measured_errors(
    generator: Generator, params: Any, source: Source, schema: CotSchema
) -> dict[Cell, float] | None:
    """The share of wrong labels by cell on the run's validation pairs; None without any."""
    if source.folder is None or schema.label_index < 0:
        return None
    try:
        pairs = evenly_spaced(pairs_of_run(source.folder), VALIDATION, MEASURED)
    except (FileNotFoundError, UserError) as error:
        log(f"errors are not measured on validation: {error}")
        return None
    pairs = [pair for pair in pairs if pair.label is not None]
    with Progress("errors on validation", total=len(pairs)) as bar:
        chains = generator.greedy(params, pairs, bar.update)
    verdicts = [
        {n: s and s.verdict for n, s in zip(schema.names, c.steps, strict=True)} for c in chains
    ]
    wrong = [float(c.label != pair.label) for c, pair in zip(chains, pairs, strict=True)]
    return cell_errors(_cells(pairs, verdicts, schema), wrong)


def _cells(
    pairs: Sequence[Example], verdicts: Sequence[Mapping[str, str | None]], schema: CotSchema
) -> list[Cell]:
    kinds = categories(pairs)
    return [
        (category, pair.kind, deciding_step(given, schema))
        for category, pair, given in zip(kinds, pairs, verdicts, strict=True)
    ]


def _write(
    config: AnnotateConfig,
    workdir: Path,
    schema: CotSchema,
    judged: Judged,
    errors: dict[Cell, float] | None,
    about: str,
) -> None:
    """Chooses, and writes the files for the annotators."""
    pairs = [pair for pair, _ in judged]
    verdicts = [{s["name"]: s["verdict"] for s in line["steps"]} for _, line in judged]
    cells, doubts = _cells(pairs, verdicts, schema), [doubt(line) for _, line in judged]
    measured = errors is not None
    if errors is None:
        errors = cell_errors(cells, [first for first, _ in doubts])
    chosen = choose(cells, doubts, errors, config.pairs)
    tasks = [make_task(*judged[index], schema, cells[index]) for index in chosen]
    about_errors = "validation" if measured else "doubt"
    about_cells = _cell_table(cells, [task.cell for task in tasks], errors)
    choice = {"chain": schema.options, "about": about, "pairs": len(tasks)}
    choice |= {"candidates": len(judged), "errors": about_errors, **about_cells}
    write_json(workdir / CHOICE, choice)
    write_text(workdir / "annotate.html", annotation_page(tasks, schema, about))
    write_text(workdir / "label_studio.xml", labeling_config(schema))
    studio = [label_studio_task(task, schema, about) for task in tasks]
    write_text(workdir / "label_studio.json", json.dumps(studio, ensure_ascii=False, indent=1))
    write_text(workdir / "stepwise.jsonl", json_lines(stepwise_row(task, schema) for task in tasks))
    write_text(workdir / PAIRS, json_lines(task_to_json(task) for task in tasks))
    log(f"chose {len(tasks):,} of {len(judged):,} pairs, see {workdir / CHOICE}")
    if any(line["confidence"] is not None for _, line in judged):
        sure = [np.mean([1 - doubts[k][0] for k in ks]) for ks in (chosen, range(len(doubts)))]
        log(f"mean confidence of the chosen {sure[0]:.2f}, of all {sure[1]:.2f}")
    else:
        log("there were no votes, so the pairs cover the cells and nothing says which are doubtful")


def _cell_table(
    cells: Sequence[Cell], chosen: Sequence[Cell], errors: Mapping[Cell, float]
) -> dict[str, Any]:
    """How the candidates and the chosen pairs cover the cells, entropies in nats."""
    names = sorted(set(cells))
    return {
        "coverage": entropy([chosen.count(name) / len(chosen) for name in names]),
        "coverage_of_candidates": entropy([cells.count(name) / len(cells) for name in names]),
        "cells": [
            {
                **dict(zip(("category", "kind", "step"), name, strict=True)),
                "candidates": cells.count(name),
                "chosen": chosen.count(name),
                "errors": errors.get(name),
            }
            for name in names
        ],
    }
