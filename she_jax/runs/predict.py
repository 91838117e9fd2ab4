"""Predicts labels for a data set with a checkpoint, block by block."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from she_jax.cot import Chain, CotSchema, ParsedStep
from she_jax.data.dataset import (
    ExampleSource,
    evenly_spaced_rows,
    fingerprint,
    open_split,
)
from she_jax.evaluation.evaluate import evenly_spaced
from she_jax.evaluation.judge import Calibration, Judgment, judge
from she_jax.evaluation.metrics import score
from she_jax.evaluation.pairs import common_fields
from she_jax.evaluation.report import below_floor
from she_jax.evaluation.unread import Unread
from she_jax.generate.language_model import UNLIMITED
from she_jax.generate.lengths import measure
from she_jax.runs.agreement import write_agreement
from she_jax.runs.config import PredictConfig
from she_jax.runs.decide import Decider
from she_jax.runs.load import PHASES, Source, fit_lengths, load_policy
from she_jax.training.checkpoint import params_digest
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, log
from she_jax.training.setup import prepare_dataset, split_mesh
from she_jax.training.stop import StopSignal
from she_jax.types import Example, UserError

LOOKED_AT = 1_000  # pairs whose products are searched for the fields of the training pairs
BLOCK = 512  # pairs a file while judging; a killed run judges at most this many again


def predict(config: PredictConfig, workdir: Path) -> None:
    """Writes a checkpoint's predictions for a data set, and their metrics if it has labels.

    ``predictions.jsonl`` has one line per pair, see ``prediction``. The metrics are in
    ``summary.json``. What is stopped goes on at the last block, with the same bytes.

    Raises:
      UserError: if the folder holds the predictions of other pairs or of another checkpoint.
      SystemExit: after a signal, once the block is written.
    """
    final, sources = workdir / "predictions.jsonl", workdir / "inputs.json"
    mesh, _ = split_mesh(config.mesh, 0)
    phases = (config.phase,) if config.phase else PHASES
    lm, params, source = load_policy(config, config.checkpoint, mesh, phases)
    # The data set follows the policy's chain.
    dataset = prepare_dataset(config.data.for_chain(lm.prompts.schema.options))
    for caveat in caveats(source):
        log(caveat)
    some = evenly_spaced(dataset, config.evaluation.split, LOOKED_AT)
    if lacking := lacking_fields(source, some):
        log(
            f"the policy was trained on products with {', '.join(lacking)}, which these lack; if "
            "they have other names here: --config.data.columns=FIELD=COLUMN"
        )
    if lm.prompts.prompt_length == UNLIMITED or lm.prompts.completion_length == UNLIMITED:
        sizes = measure(lm.prompts, open_split(dataset.path, config.evaluation.split))
        lm = fit_lengths(lm, replace(config.model, name=config.checkpoint), sizes)
    inputs = {"pairs": str(dataset.path), "checkpoint": str(source)}
    content = {"pairs": fingerprint(dataset), "checkpoint": params_digest(params)}
    if sources.is_file():
        saved = json.loads(sources.read_text(encoding="utf-8"))
        if content != saved["content"] if "content" in saved else inputs != saved:
            raise UserError(
                f"{workdir} holds predictions of other pairs or of another checkpoint (see "
                f"{sources}): give a new folder with --workdir"
            )
    if final.is_file():
        log(f"all is done: the predictions are in {final}")
        return
    write_json(sources, inputs | {"content": content})
    decider = Decider(config.decide, lm, params, config.evaluation.batch_size)
    calibration = decider.calibrate(source)
    if calibration.about:
        log(describe(calibration))
    examples = open_split(dataset.path, config.evaluation.split)
    rows = evenly_spaced_rows(len(examples), config.evaluation.pairs)
    with StopSignal() as stop, Progress(f"judging {config.data.name}", total=len(rows)) as bar:
        blocks = write_blocks(decider, calibration, examples, rows, workdir / "predictions", bar)
        for _ in blocks:
            if stop:
                log(f"{stop.name}: the finished blocks are kept; the same command goes on")
                raise SystemExit(stop.exit_code)
    schema, unread = lm.prompts.schema, Unread(lm.prompts.completion_length)
    has_labels = any(label is not None for label in examples.labels())
    draft = final.with_name(f"{final.name}.part")
    judged = []  # kept where there is something to compare with
    with draft.open("wb") as file:
        for row, line in zip(rows, _lines(workdir / "predictions"), strict=True):
            file.write(line)
            values = json.loads(line)
            unread.add(read_chain(values, schema), values["text"] or "", values["truncated"])
            if has_labels:
                judged.append((examples[row], values))
    labeled = [(pair, line) for pair, line in judged if pair.label is not None]
    if labeled:
        chains = [read_chain(line, schema) for _, line in labeled]
        metrics = score(chains, [pair for pair, _ in labeled], schema)
        write_json(workdir / "summary.json", metrics | {"decide": calibration.to_json()})
        log(f"macro F1 {metrics['macro_f1']:.3f}, accuracy {metrics['accuracy']:.3f}")
        pairs, lines = zip(*judged, strict=True)
        samples = config.decide.samples
        write_agreement(workdir, source, pairs, lines, schema.labels, calibration, samples)
    draft.replace(final)  # the last file: it says that all is done
    shutil.rmtree(workdir / "predictions")
    if unread.share:
        log(unread.sentence(bool(labeled)))
    if calibration.temperature is None:
        log("no confidence: --config.decide.samples=8 gives one, by votes, for 8 chains a pair")
    log(f"predictions: {final}" + (f", metrics: {workdir / 'summary.json'}" if labeled else ""))


def write_blocks(
    decider: Decider,
    calibration: Calibration,
    examples: ExampleSource,
    rows: Sequence[int],
    folder: Path,
    progress: Progress,
) -> Iterator[Path]:
    """Writes the predictions of each block of rows to a file, and yields it once it is whole.

    A file that is there is left alone. A block has samples of its own, whichever blocks were judged
    before it, and the rows that are batched together are those of a block.
    """
    folder.mkdir(exist_ok=True)
    for n, first in enumerate(range(0, len(rows), BLOCK)):
        path, block = folder / f"{n:06d}.jsonl", rows[first : first + BLOCK]
        if not path.is_file():
            seed = int(np.random.SeedSequence((decider.config.seed, n)).generate_state(1)[0])
            pairs = [examples[row] for row in block]
            rule, start = calibration.decision.rule, first

            def show(done: int, start: int = start) -> None:
                progress.update(start + done)

            evidence = decider.gather(pairs, rule, seed, show)
            judgments = judge(evidence, calibration, decider.labels)
            part = path.with_name(f"{path.name}.part")
            with part.open("w", encoding="utf-8") as file:
                for pair, judgment in zip(pairs, judgments, strict=True):
                    file.write(json.dumps(prediction(pair, judgment, decider)) + "\n")
            part.replace(path)
        progress.update(first + len(block))
        yield path


def prediction(example: Example, judgment: Judgment, decider: Decider) -> dict[str, Any]:
    """A line of ``predictions.jsonl``.

    ``uid``; ``label``, null if none could be read; ``probabilities`` of the labels: the shares of
    the votes, or the label's own of a policy that gives it first, else null; ``confidence``,
    ``expected`` and ``review``, see ``Judgment``; ``well_formed``, ``steps`` (each with its name,
    text and verdict) of the chain that speaks for the label, and ``text``, all that the model
    wrote, where that is not a well-formed chain.
    """
    answer, labels, schema = judgment.answer, decider.labels, decider.lm.prompts.schema
    by_label = judgment.probabilities and dict(
        zip(labels.texts, judgment.probabilities, strict=True)
    )
    return {
        "uid": example.uid,
        "label": judgment.label,
        "probabilities": by_label,
        "confidence": judgment.confidence,
        "expected": judgment.expected,
        "review": judgment.review,
        "well_formed": answer is not None and answer.chain.well_formed,
        "steps": [
            {"name": name, "text": step.text, "verdict": step.verdict}
            for name, step in zip(schema.names, answer.chain.steps, strict=True)
            if step is not None
        ]
        if answer
        else [],
        "text": answer.text if answer and not answer.chain.well_formed else None,
        "truncated": answer is not None and answer.truncated,
    }


def _lines(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            yield from file


def read_chain(line: dict[str, Any], schema: CotSchema) -> Chain:
    """The chain of a line of ``predictions.jsonl``, with the label that was decided on."""
    written = {step["name"]: (step["text"], step["verdict"]) for step in line["steps"]}
    steps: list[ParsedStep | None] = []
    for step in schema.steps:
        text, verdict = written.get(step.name, ("", None))
        valid = bool(verdict if step.verdicts else text)
        parsed = ParsedStep(text=text, verdict=verdict, valid=valid)
        steps.append(parsed if step.name in written else None)
    return Chain(
        steps=tuple(steps),
        line_steps=(),
        well_formed=line["well_formed"],
        label=line["label"],
        truncated=line["truncated"],
    )


def describe(calibration: Calibration) -> str:
    """What was fitted, a sentence for the screen."""
    about = calibration.about
    scores = ", ".join(f"{rule} {score:.3f}" for rule, score in about["macro_f1"].items())
    decision = calibration.decision
    limit = "" if decision.threshold is None else f" at {decision.threshold:.3f}"
    return (
        f"labels by {decision.rule}{limit}; macro F1 on {about['pairs']:,} validation pairs: "
        f"{scores}"
    )


def caveats(source: Source) -> list[str]:
    """What a user should know before relying on a policy's labels, in sentences."""
    if source.folder is None:
        return []  # of a model in files nothing is known
    if not (source.folder / "summary.json").is_file():
        return [f"the run has not finished: these are the labels of {source}"]
    if source.phase == "sft" and (source.folder / "checkpoints" / "policy").is_dir():
        return []  # the summary is of another policy
    return [sentence] if (sentence := below_floor(_summary(source))) else []


def lacking_fields(source: Source, examples: Sequence[Example]) -> list[str]:
    """The product fields that a policy was trained on and that these pairs do not have."""
    return sorted({*_summary(source).get("fields", [])} - {*common_fields(examples)})


def _summary(source: Source) -> dict[str, Any]:
    path = source.folder and source.folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
