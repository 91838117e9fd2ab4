"""Judging the policy of a run on its splits: before, during and after training."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from she_jax.data.dataset import Prepared, open_split, spread_out
from she_jax.train.checkpoint import Checkpoints
from she_jax.train.evaluate import score
from she_jax.train.metrics import Progress
from she_jax.train.predict import Judge
from she_jax.train.report import write_json
from she_jax.train.workdir import Config
from she_jax.types import Example

LONGTAIL = "test_longtail"  # judged beside the evaluation split, where a data set has it
VALIDATION = "validation"


def judged(
    config: Config, workdir: Path, judge: Judge, params: Any, made: Prepared, when: str
) -> dict[str, Any]:
    """The figures on the evaluation split; from ``eval/<when>.json`` where they are there."""
    path = workdir / "eval" / f"{when}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    split, limit = config.data.eval_split, config.data.eval_pairs
    figures = judge_split(judge, params, made, split, limit, f"judging {split}, {when}")
    if made.splits.get(LONGTAIL) and split != LONGTAIL:
        task = f"judging {LONGTAIL}, {when}"
        figures["longtail"] = judge_split(judge, params, made, LONGTAIL, limit, task)
    if k := config.eval.pass_k:
        examples = take(made, split, config.eval.pass_pairs)
        with Progress(f"pass@{k}, {when}", total=len(examples)) as progress:
            figures |= judge.pass_at(params, examples, k, config.seed, progress.update)
    figures["judged_on"] = judged_on(config, made)
    write_json(path, figures)
    return figures


def judge_before(
    config: Config, workdir: Path, judge: Judge, params: Any, made: Prepared
) -> dict[str, Any]:
    """The figures of what the policy begins with.

    Where that is another run's policy, which was judged in the same way on the same pairs, they are
    that run's figures; and so are those on the validation split, which ``judge_validation`` finds.
    """
    path = workdir / "eval" / "before.json"
    if config.start and not path.is_file():
        folder, phase = Path(config.start).absolute().parent.parent, Path(config.start).name
        step = 0 if phase == "sft" else _best_step(workdir, folder)
        there = folder / "eval" / ("before.json" if phase == "sft" else "after.json")
        then = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        alike = all(then.get(key) == config.to_dict()[key] for key in ("seed", "eval", "model"))
        if alike and step is not None and there.is_file():
            figures = json.loads(there.read_text(encoding="utf-8"))
            if figures.get("judged_on") == judged_on(config, made):
                validation = folder / "eval" / _validation_file(step)
                if validation.is_file():
                    found = json.loads(validation.read_text(encoding="utf-8"))
                    write_json(workdir / "eval" / _validation_file(0), found)
                write_json(path, figures)
    return judged(config, workdir, judge, params, made, "before")


def _best_step(workdir: Path, other: Path) -> int | None:
    """The step that the other run was judged with, if it is the one that this run begins with."""
    summary = other / "summary.json"
    if not summary.is_file():  # it is still being trained
        return None
    best = json.loads(summary.read_text(encoding="utf-8")).get("checkpoint")
    return best if best in Checkpoints(workdir / "checkpoints" / "sft").steps else None


def judged_on(config: Config, made: Prepared) -> str:
    """Names the pairs that are judged, whatever set they are of, by all that is read of them.

    What humans annotated is not among that: sets that differ in nothing else are judged alike.
    """
    split, limit = config.data.eval_split, config.data.eval_pairs
    told = sha256(split.encode())
    for name in dict.fromkeys((split, LONGTAIL, VALIDATION)):
        if not made.splits.get(name):
            continue
        for one in take(made, name, limit):
            read = (one.query, dict(one.product), one.label, dict(one.steps or {}), one.kind)
            told.update(json.dumps([name, *read]).encode())
    return told.hexdigest()[:12]


def judge_validation(
    config: Config, workdir: Path, judge: Judge, params: Any, made: Prepared, step: int
) -> dict[str, float]:
    """During training: the validation split, which picks the checkpoint.

    At step 0 the figures are those of its file, where ``judge_before`` has brought them.
    """
    split, path = VALIDATION, workdir / "eval" / _validation_file(step)
    if not step and path.is_file():
        figures = json.loads(path.read_text(encoding="utf-8"))
    else:
        task = f"judging {split}, step {step}"
        figures = judge_split(judge, params, made, split, config.data.eval_pairs, task)
        write_json(path, figures)
    names = ("macro_f1", "accuracy", "good_f1", "parse_rate")
    flat = {f"{split}/{name}": figures[name] for name in names if figures[name] is not None}
    return flat | {f"{split}/step/{k}": v for k, v in figures["step_accuracy"].items()}


def _validation_file(step: int) -> str:
    return f"step_{step:06d}_{VALIDATION}.json"


def judge_split(
    judge: Judge, params: Any, made: Prepared, split: str, limit: int, task: str
) -> dict[str, Any]:
    """Greedy chains for a split, scored."""
    examples = take(made, split, limit)
    with Progress(task, total=len(examples)) as progress:
        chains = judge.chains(params, examples, progress.update)
        figures = score(chains, examples, judge.format.schema)
        progress.update(len(examples), macro_f1=figures["macro_f1"] or 0.0)
    return figures


def take(made: Prepared, split: str, limit: int) -> list[Example]:
    """So many examples of a split, spread out evenly, as a file may be sorted; all for 0."""
    source = open_split(made.path, split)
    return [source[row] for row in spread_out(len(source), limit)]
