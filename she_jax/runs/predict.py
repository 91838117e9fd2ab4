"""Predicts labels for a data set with a checkpoint, block by block."""

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from she_jax.data.dataset import (
    ExampleSource,
    PreparedDataset,
    evenly_spaced_rows,
    fingerprint,
    open_split,
)
from she_jax.evaluation.decide import FEW
from she_jax.evaluation.evaluate import evenly_spaced
from she_jax.evaluation.judge import Calibration
from she_jax.evaluation.lazy import Lazy
from she_jax.evaluation.metrics import score
from she_jax.evaluation.pairs import common_fields
from she_jax.evaluation.report import below_floor
from she_jax.evaluation.unread import Unread
from she_jax.generate.language_model import UNLIMITED, LanguageModel
from she_jax.generate.lengths import measure
from she_jax.runs.agreement import write_agreement, write_judged
from she_jax.runs.blocks import Share
from she_jax.runs.config import PredictConfig
from she_jax.runs.decide import Decider
from she_jax.runs.load import PHASES, Source, fit_lengths, load_policy
from she_jax.runs.outputs import open_judged_table, write_outputs
from she_jax.runs.predictions import join_blocks, read_chain
from she_jax.runs.systems import check_run, read_systems
from she_jax.training.checkpoint import params_digest
from she_jax.training.files import write_json
from she_jax.training.logging import log
from she_jax.training.setup import prepare_dataset, split_mesh
from she_jax.training.stop import StopSignal
from she_jax.types import Example, UserError

LOOKED_AT = 1_000  # pairs whose products are searched for the fields of the training pairs
BLOCKS = "predictions"  # folder of the blocks that are done, if no other is named


@dataclass(frozen=True)
class Job:
    """What is to be judged, and by what.

    Attributes:
      config: the options.
      folder: of the blocks.
      lm, params: the policy.
      source: where it is from.
      dataset: the pairs, and others.
      examples: the pairs.
      rows: those of them that are judged.
    """

    config: PredictConfig
    folder: Path
    lm: LanguageModel
    params: Any
    source: Source
    dataset: PreparedDataset
    examples: ExampleSource
    rows: Sequence[int]

    @functools.cached_property
    def content(self) -> dict[str, str]:
        """What the pairs and the policy are, whatever their places."""
        return {"pairs": fingerprint(self.dataset), "checkpoint": params_digest(self.params)}

    def share(self) -> Share:
        """What judges the blocks.

        Raises:
          UserError: if the folder has blocks of something else.
        """
        config = self.config
        decider = Decider(config.decide, self.lm, self.params, config.evaluation.batch_size)
        parts = (self.examples, self.rows, self.folder, config.output)
        share = Share(decider, self.source, *parts)
        lengths = self.lm.prompts.prompt_length, self.lm.prompts.completion_length
        share.claim(
            {
                **self.content,
                "split": config.evaluation.split,
                "batch_size": config.evaluation.batch_size,  # samples are drawn by batches
                "lengths": list(lengths),
                "dtype": self.lm.model.config.dtype,
            }
        )
        return share


def open_job(config: PredictConfig, workdir: Path) -> Job:
    """Loads the policy and prepares the pairs, and says what the user should know of both."""
    mesh, _ = split_mesh(config.mesh, 0)
    phases = (config.phase,) if config.phase else PHASES
    lm, params, source = load_policy(config, config.checkpoint, mesh, phases)
    # The data set follows the policy's chain.
    dataset = prepare_dataset(config.data.for_chain(lm.prompts.schema.options))
    for caveat in caveats(source):
        log(caveat)
    split = config.evaluation.split
    if lacking := lacking_fields(source, evenly_spaced(dataset, split, LOOKED_AT)):
        log(
            f"the policy was trained on products with {', '.join(lacking)}, which these lack; if "
            "they have other names here: --config.data.columns=FIELD=COLUMN"
        )
    examples = open_split(dataset.path, split)
    if lm.prompts.prompt_length == UNLIMITED or lm.prompts.completion_length == UNLIMITED:
        sizes = measure(lm.prompts, examples)
        lm = fit_lengths(lm, replace(config.model, name=config.checkpoint), sizes)
    rows = evenly_spaced_rows(len(examples), config.evaluation.pairs)
    folder = Path(config.output.blocks or workdir / BLOCKS)
    return Job(config, folder, lm, params, source, dataset, examples, rows)


def predict(config: PredictConfig, workdir: Path) -> None:
    """Writes a checkpoint's predictions for a data set, and their metrics if it has labels.

    ``predictions.jsonl`` (or ``.parquet``) has a line per pair, see ``prediction``. The rows of a
    table are written again with labels, see ``write_outputs``. The metrics are in
    ``summary.json``. What is stopped goes on at the last block, with the same bytes.

    Raises:
      UserError: if the folder holds the predictions of other pairs or of another checkpoint.
      SystemExit: after a signal, once the block is written.
    """
    final, sources = workdir / f"predictions.{config.output.format}", workdir / "inputs.json"
    job = open_job(config, workdir)
    inputs = {"pairs": str(job.dataset.path), "checkpoint": str(job.source)}
    if sources.is_file():
        saved = json.loads(sources.read_text(encoding="utf-8"))
        if job.content != saved["content"] if "content" in saved else inputs != saved:
            raise UserError(
                f"{workdir} holds predictions of other pairs or of another checkpoint (see "
                f"{sources}): give a new folder with --workdir"
            )
    if final.is_file():
        shutil.rmtree(workdir / BLOCKS, ignore_errors=True)  # of a run killed in its last moment
        log(f"all is done: the predictions are in {final}")
        return
    if config.output.systems:
        check_run(config.output.systems, config.data)
    write_json(sources, inputs | {"content": job.content})
    share = job.share()
    if share.calibration.about:
        log(describe(share.calibration))
    with StopSignal() as stop:
        share.run(config.data.name, stop)
    if missing := share.blocks.missing():
        log(
            f"{len(missing)} of {len(share.blocks.paths)} blocks are missing: they are for the "
            f"other predict.parts. Once they are done, the same command finishes with all of "
            f"{job.folder}"
        )
        return
    _finish(job, share, workdir, final)


def _finish(job: Job, share: Share, workdir: Path, final: Path) -> None:
    """Writes what is made of all the blocks; the predictions come last: they say that it is."""
    schema, lines = job.lm.prompts.schema, share.blocks
    unread = Unread(job.lm.prompts.completion_length)
    for line in lines:
        unread.add(read_chain(line, schema), line["text"] or "", line["truncated"])
    examples = Lazy(job.rows, job.examples.__getitem__)
    data = job.config.data.for_chain(schema.options)
    table = open_judged_table(data, job.dataset, job.examples, job.rows, lines, schema)
    labeled = any(label is not None for label in Lazy(job.rows, job.examples.labels().__getitem__))
    if labeled:
        chains = Lazy(range(len(lines)), lambda n: read_chain(lines[n], schema))
        metrics = score(chains, examples, schema)
        if not job.config.decide.chains:  # nothing was asked of the steps
            metrics |= {"parse_rate": None, "step_accuracy": {}, "right_for_wrong_reason": None}
        write_json(workdir / "summary.json", metrics | {"decide": share.calibration.to_json()})
        if schema.label_index >= 0:
            log(f"macro F1 {metrics['macro_f1']:.3f}, accuracy {metrics['accuracy']:.3f}")
            ranks = read_systems(table, job.config.output.systems) if table else {}
            decided = share.calibration, job.config.decide.samples, ranks
            write_agreement(workdir, job.source, examples, lines, schema.labels, *decided)
            write_judged(workdir, examples, lines, table)
    if table:
        write_outputs(table, data, workdir)
    draft = final.with_name(f"draft.{final.name}")
    join_blocks(lines.paths, draft, schema.labels)
    draft.replace(final)
    if not job.config.output.blocks:  # those that several runs share are not ours
        shutil.rmtree(job.folder)
    if unread.share and job.config.decide.chains:
        log(unread.sentence(labeled))
    if share.calibration.temperature is None:
        log("no confidence: --config.decide.samples=8 gives one, by votes, for 8 chains a pair")
    log(f"predictions: {final}" + (f", metrics: {workdir / 'summary.json'}" if labeled else ""))


def describe(calibration: Calibration) -> str:
    """What was fitted, a sentence for the screen."""
    about = calibration.about
    scores = ", ".join(f"{rule} {score:.3f}" for rule, score in about["macro_f1"].items())
    decision = calibration.decision
    limit = "" if decision.threshold is None else f" at {decision.threshold:.3f}"
    return (
        f"labels by {decision.rule}{limit}; macro F1 on {about['pairs']:,} validation pairs: "
        f"{scores} (auto leaves the majority for what {FEW} pairs or more show to be better, "
        "by more than a standard error)"
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
