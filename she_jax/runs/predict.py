"""Predicts labels for a data set with a checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from she_jax.cot import Chain
from she_jax.data.dataset import (
    ExampleSource,
    evenly_spaced_rows,
    fingerprint,
    open_split,
)
from she_jax.evaluation.evaluate import evenly_spaced
from she_jax.evaluation.metrics import score
from she_jax.evaluation.pairs import common_fields
from she_jax.evaluation.report import below_floor
from she_jax.evaluation.unread import Unread
from she_jax.generate.generator import Generator
from she_jax.generate.language_model import UNLIMITED, LanguageModel
from she_jax.generate.lengths import measure
from she_jax.generate.prompts import PromptFormat
from she_jax.generate.readout import label_tokens, make_readout
from she_jax.runs.config import PredictConfig
from she_jax.runs.load import fit_lengths, load_policy
from she_jax.training.checkpoint import params_digest
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, log
from she_jax.training.setup import prepare_dataset, split_mesh
from she_jax.types import Example, UserError

LOOKED_AT = 1_000  # pairs whose products are searched for the fields of the training pairs


def predict(config: PredictConfig, workdir: Path) -> None:
    """Writes a checkpoint's predictions for a data set, and their metrics if it has labels.

    ``predictions.jsonl`` has one line per pair: ``uid``, ``label`` (null if unreadable),
    ``probabilities`` of the labels given the reasoning before the label, ``well_formed``, ``steps``
    (each with its name, text and verdict), and ``text``, all that the model wrote, where it is not
    a well-formed chain. The metrics are in ``summary.json``.

    Raises:
      UserError: if the folder holds the predictions of other pairs or of another checkpoint.
    """
    final, sources = workdir / "predictions.jsonl", workdir / "inputs.json"
    mesh, _ = split_mesh(config.mesh, 0)
    lm, params, source = load_policy(config, config.checkpoint, mesh)
    # The data set follows the policy's chain.
    dataset = prepare_dataset(config.data.for_chain(lm.prompts.schema.options))
    for caveat in caveats(Path(config.checkpoint), source):
        log(caveat)
    some = evenly_spaced(dataset, config.evaluation.split, LOOKED_AT)
    if lacking := lacking_fields(Path(config.checkpoint), some):
        log(
            f"the policy was trained on products with {', '.join(lacking)}, which these lack; if "
            "they have other names here: --config.data.columns=FIELD=COLUMN"
        )
    if lm.prompts.prompt_length == UNLIMITED or lm.prompts.completion_length == UNLIMITED:
        sizes = measure(lm.prompts, open_split(dataset.path, config.evaluation.split))
        lm = fit_lengths(lm, replace(config.model, name=config.checkpoint), sizes)
    inputs = {"pairs": str(dataset.path), "checkpoint": source}
    content = {"pairs": fingerprint(dataset), "checkpoint": params_digest(params)}
    if final.is_file():
        saved = json.loads(sources.read_text(encoding="utf-8"))
        if content != saved["content"] if "content" in saved else inputs != saved:
            raise UserError(
                f"{final} holds predictions of other pairs or of another checkpoint (see "
                f"{sources}): give a new folder with --workdir"
            )
        log(f"all is done: the predictions are in {final}")
        return
    write_json(sources, inputs | {"content": content})
    draft, unread = workdir / "predictions.jsonl.part", Unread(lm.prompts.completion_length)
    examples = open_split(dataset.path, config.evaluation.split)
    rows = evenly_spaced_rows(len(examples), config.evaluation.pairs)
    predictor = Predictor(lm, params, config.evaluation.batch_size)
    labeled = predictor.write(examples, rows, draft, unread, config.data.name)
    if labeled:
        chains, pairs = zip(*labeled, strict=True)
        metrics = score(chains, pairs, lm.prompts.schema)
        write_json(workdir / "summary.json", metrics)
        log(f"macro F1 {metrics['macro_f1']:.3f}, accuracy {metrics['accuracy']:.3f}")
    if unread.share:
        log(unread.sentence(bool(labeled)))
    draft.replace(final)
    log(f"predictions: {final}" + (f", metrics: {workdir / 'summary.json'}" if labeled else ""))


def caveats(checkpoint: Path, source: str) -> list[str]:
    """What a user should know before relying on a policy's labels, in sentences.

    Args:
      checkpoint: a run's folder; of a model in files nothing is known.
      source: where exactly the policy is from.
    """
    if not (checkpoint / "checkpoints").is_dir():
        return []
    if not (checkpoint / "summary.json").is_file():
        return [f"the run has not finished: these are the labels of {source}"]
    return [sentence] if (sentence := below_floor(_summary(checkpoint))) else []


def lacking_fields(checkpoint: Path, examples: Sequence[Example]) -> list[str]:
    """The product fields that a policy was trained on and that these pairs do not have."""
    return sorted({*_summary(checkpoint).get("fields", [])} - {*common_fields(examples)})


def _summary(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class Predictor:
    """Writes a policy's predictions; what it compiles serves all of its data sets.

    Args:
      lm: model and prompts.
      params: of the policy.
      batch_size: pairs at a time.
    """

    def __init__(self, lm: LanguageModel, params: Any, batch_size: int):
        self.lm, self._params = lm, params
        self._generator = Generator(lm, batch_size, warn=log)
        self._read_out = jax.jit(make_readout(lm))

    def write(
        self, examples: ExampleSource, rows: Sequence[int], path: Path, unread: Unread, title: str
    ) -> list[tuple[Chain, Example]]:
        """Writes a JSON line for each row; returns the chains of the labeled pairs.

        Args:
          examples: the pairs.
          rows: those to predict.
          path: of the file.
          unread: counts the chains that cannot be read.
          title: of the data set, for the progress bar.
        """
        labeled: list[tuple[Chain, Example]] = []
        prompts, done = self.lm.prompts, 0
        with (
            path.open("w", encoding="utf-8") as file,
            Progress(f"evaluating {title}", total=len(rows)) as progress,
        ):
            batches = self._generator.greedy_rollouts(self._params, examples, rows)
            for part, rollout, chains in batches:
                starts, label_ids = label_tokens(prompts, rollout, chains)
                by_row = np.asarray(self._read_out(self._params, rollout, starts, label_ids)[0])
                texts, cut = prompts.decode(rollout), prompts.truncated(rollout)
                for n, (example, chain) in enumerate(zip(part, chains, strict=True)):
                    unread.add(chain, texts[n], bool(cut[n]))
                    line = _prediction(example, chain, by_row[n] if starts[n] else None, prompts)
                    line["text"] = None if chain.well_formed else texts[n]
                    file.write(json.dumps(line) + "\n")
                    if example.label is not None:
                        labeled.append((chain, example))
                done += len(part)
                progress.update(done)
        return labeled


def _prediction(
    example: Example, chain: Chain, probabilities: np.ndarray | None, prompts: PromptFormat
) -> dict[str, Any]:
    """A line of ``predictions.jsonl``."""
    steps = [
        {"name": name, "text": step.text, "verdict": step.verdict}
        for name, step in zip(prompts.schema.names, chain.steps, strict=True)
        if step is not None
    ]
    by_label = None
    if probabilities is not None:
        texts = prompts.schema.labels.texts
        by_label = {c: round(float(p), 6) for c, p in zip(texts, probabilities, strict=True)}
    return {
        "uid": example.uid,
        "label": chain.label,
        "probabilities": by_label,
        "well_formed": chain.well_formed,
        "steps": steps,
    }
