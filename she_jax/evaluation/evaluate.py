"""Evaluation of a run's policy on its splits, before, during and after training."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from she_jax.data.dataset import Prepared, open_split, spread_out
from she_jax.evaluation.metrics import score
from she_jax.generate.generator import Judge
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.files import write_json
from she_jax.training.logging import Progress
from she_jax.training.workdir import Config
from she_jax.types import Example

LONGTAIL = "test_longtail"  # evaluated in addition to the evaluation split, if present
VALIDATION = "validation"


def judged(
    config: Config, workdir: Path, generator: Judge, params: Any, dataset: Prepared, when: str
) -> dict[str, Any]:
    """Evaluation metrics on the evaluation split, read from ``eval/<when>.json`` if it exists."""
    path = workdir / "eval" / f"{when}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    split, limit = config.data.eval_split, config.data.eval_pairs
    task = f"evaluating {split}, {when}"
    metrics = judge_split(generator, params, dataset, split, limit, task)
    if dataset.splits.get(LONGTAIL) and split != LONGTAIL:
        task = f"evaluating {LONGTAIL}, {when}"
        metrics["longtail"] = judge_split(generator, params, dataset, LONGTAIL, limit, task)
    if k := config.eval.pass_k:
        examples = take(dataset, split, config.eval.pass_pairs)
        with Progress(f"pass@{k}, {when}", total=len(examples)) as progress:
            metrics |= generator.pass_at(params, examples, k, config.seed, progress.update)
    metrics["judged_on"] = judged_on(config, dataset)
    write_json(path, metrics)
    return metrics


def judge_before(
    config: Config, workdir: Path, generator: Judge, params: Any, dataset: Prepared
) -> dict[str, Any]:
    """Evaluation metrics of the initial policy.

    If that is another run's policy, evaluated in the same way on the same pairs, its metrics are
    copied from that run, as are those on the validation split for ``judge_validation``.
    """
    path = workdir / "eval" / "before.json"
    if config.start and not path.is_file():
        other, phase = Path(config.start).absolute().parent.parent, Path(config.start).name
        step = 0 if phase == "sft" else _best_step(workdir, other)
        source = other / "eval" / ("before.json" if phase == "sft" else "after.json")
        settings = json.loads((other / "config.json").read_text(encoding="utf-8"))
        same = all(settings.get(key) == config.to_dict()[key] for key in ("seed", "eval", "model"))
        if same and step is not None and source.is_file():
            metrics = json.loads(source.read_text(encoding="utf-8"))
            if metrics.get("judged_on") == judged_on(config, dataset):
                validation = other / "eval" / _validation_file(step)
                if validation.is_file():
                    validation_metrics = json.loads(validation.read_text(encoding="utf-8"))
                    write_json(workdir / "eval" / _validation_file(0), validation_metrics)
                write_json(path, metrics)
    return judged(config, workdir, generator, params, dataset, "before")


def _best_step(workdir: Path, other: Path) -> int | None:
    """The step at which the other run was evaluated, if this run starts from that checkpoint."""
    summary = other / "summary.json"
    if not summary.is_file():  # it is still being trained
        return None
    best = json.loads(summary.read_text(encoding="utf-8")).get("checkpoint")
    return best if best in Checkpoints(workdir / "checkpoints" / "sft").steps else None


def judged_on(config: Config, dataset: Prepared) -> str:
    """Hash of the evaluated pairs: of every field that affects evaluation, whatever the data set.

    Which steps humans annotated does not: data sets that differ only in that have equal hashes.
    """
    split, limit = config.data.eval_split, config.data.eval_pairs
    digest = sha256(split.encode())
    for name in dict.fromkeys((split, LONGTAIL, VALIDATION)):
        if not dataset.splits.get(name):
            continue
        for pair in take(dataset, name, limit):
            fields = (pair.query, dict(pair.product), pair.label, dict(pair.steps or {}), pair.kind)
            digest.update(json.dumps([name, *fields]).encode())
    return digest.hexdigest()[:12]


def judge_validation(
    config: Config, workdir: Path, generator: Judge, params: Any, dataset: Prepared, step: int
) -> dict[str, float]:
    """Evaluation on the validation split during training, which selects the checkpoint.

    At step 0 the metrics are read from their file if ``judge_before`` has copied it.
    """
    split, path = VALIDATION, workdir / "eval" / _validation_file(step)
    if not step and path.is_file():
        metrics = json.loads(path.read_text(encoding="utf-8"))
    else:
        task = f"evaluating {split}, step {step}"
        metrics = judge_split(generator, params, dataset, split, config.data.eval_pairs, task)
        write_json(path, metrics)
    names = ("macro_f1", "accuracy", "good_f1", "parse_rate")
    flat = {f"{split}/{name}": metrics[name] for name in names if metrics[name] is not None}
    return flat | {f"{split}/step/{k}": v for k, v in metrics["step_accuracy"].items()}


def _validation_file(step: int) -> str:
    return f"step_{step:06d}_{VALIDATION}.json"


def judge_split(
    generator: Judge, params: Any, dataset: Prepared, split: str, limit: int, task: str
) -> dict[str, Any]:
    """Evaluation metrics of the greedy chains for ``take(dataset, split, limit)``."""
    examples = take(dataset, split, limit)
    with Progress(task, total=len(examples)) as progress:
        chains = generator.chains(params, examples, progress.update)
        metrics = score(chains, examples, generator.format.schema)
        progress.update(len(examples), macro_f1=metrics["macro_f1"] or 0.0)
    return metrics


def take(dataset: Prepared, split: str, limit: int) -> list[Example]:
    """Up to ``limit`` examples of a split, evenly spaced as a file may be sorted; 0 means all."""
    source = open_split(dataset.path, split)
    return [source[row] for row in spread_out(len(source), limit)]
