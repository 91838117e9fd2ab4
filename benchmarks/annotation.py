"""What step annotation by people adds to SRPO: step accuracy and macro F1 over annotated pairs.

    python benchmarks/annotation.py --runs=runs/annotation --stage1=runs/stage1

From new ShopWorld pairs with labels and without any annotation of steps, ``she-jax annotate`` picks
1,000 with the cold start of a finished stage 1. The annotators are the truth, a tenth of whose
verdicts are flipped; they type the items of query and product. What they save comes back through
``she-jax annotate --import``. Each arm trains SRPO from that cold start on the same 1,000 labeled
pairs, of which the first 0, 100, 300 or all have annotated steps, with the sizes and rates of
``configs/stage1.py`` without its filter.

``--labels=annotated`` is the harder case: no pair has a label but those that the annotators give, a
tenth of them flipped too, and an arm trains on its annotated pairs alone (0 is the cold start).

What is done is not done again, and a stopped arm goes on where it was: ``--arms=0,100`` runs some
of them, and later calls the others. Once all are done, writes ``annotation.json`` (a table for
``docs/results/``) and ``annotation.png`` into ``--runs``.
"""

import datetime
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from she_jax.annotation.tasks import Task, json_lines, read_tasks
from she_jax.cot import LABEL_STEP, CotSchema
from she_jax.data.shopworld.builder import World, generate
from she_jax.runs.annotate import PAIRS
from she_jax.runs.annotate_import import import_annotations
from she_jax.training.files import write_json, write_text

FLAGS = flags.FLAGS
flags.DEFINE_string("runs", "runs/annotation", "Folder of the arms.")
flags.DEFINE_string("stage1", "runs/stage1", "A finished stage 1, whose cold start all begin with.")
flags.DEFINE_list("arms", ["0", "100", "300", "1000"], "How many pairs are annotated.")
flags.DEFINE_enum("labels", "all", ["all", "annotated"], "Which pairs have labels.")
flags.DEFINE_integer("pairs", 1_000, "Pairs to train on, those chosen to be annotated.")
flags.DEFINE_integer("candidates", 10_000, "Pairs that they are chosen from.")
flags.DEFINE_list("evaluated", ["512", "2048"], "Pairs of validation and test.")
flags.DEFINE_integer("steps", 60, "Updates of each arm.")
flags.DEFINE_integer("seed", 0, "Of the arms and of the annotators.")
flags.DEFINE_integer("devices", 2, "CPU devices; with 1, two commands may run side by side.")
ROOT = Path(__file__).resolve().parent.parent
FLIPPED = 0.1  # share of the verdicts that the annotators get wrong
SCHEMA = CotSchema.build()
ABOUT = {
    "all": "on the same {:,} labeled pairs",
    "annotated": "on the annotated pairs alone, with the annotators' labels",
}
COLUMNS = ("macro F1", "step accuracy", "category", "attributes", "right for a wrong reason")


def world() -> World:
    """New pairs, as many as are asked for."""
    counts = (FLAGS.candidates, *map(int, FLAGS.evaluated), 0)
    return World(seed=100 + FLAGS.seed, pairs=counts, coverage=0.0, chains="none")


def pool() -> Iterator[dict]:
    """The candidates as a user's table: labels, if there are any, and nothing of the steps."""
    for e in generate(world(), "train"):
        row = {"uid": e.uid, "query": e.query, "product": dict(e.product), "kind": e.kind}
        yield row | ({"label": e.label} if FLAGS.labels == "all" else {})


def annotations(tasks: list[Task], truth: dict[str, dict[str, str]]) -> Iterator[dict]:
    """What the annotators save: the truth with flipped verdicts, and the items of free text.

    The label is theirs only where no pair has one.

    Args:
      tasks: the pairs, in their order: who annotates fewer says the same of them.
      truth: the steps and the label of each pair.
    """
    rng = random.Random(FLAGS.seed)
    for task in tasks:
        for step in SCHEMA.steps:
            value = truth[task.uid][step.name]
            if step.name == LABEL_STEP and FLAGS.labels == "all":
                continue
            if step.verdicts and rng.random() < FLIPPED:
                value = rng.choice([verdict for verdict in step.verdicts if verdict != value])
            line = {"uid": task.uid, "step": step.name, "annotator": "simulated", "value": value}
            yield line | {"at": "2026-12-01T00:00:00Z"}


def choose(folder: Path) -> None:
    """Picks the pairs with ``she-jax annotate``."""
    if not (folder / "pool.jsonl").is_file():
        write_text(folder / "pool.jsonl", json_lines(pool()))
    command = [sys.executable, "-m", "she_jax", "annotate", FLAGS.stage1]
    command += [f"--table={folder / 'pool.jsonl'}", f"--pairs={FLAGS.pairs}"]
    command += [
        f"--workdir={folder / 'annotate'}",
        "--config.phase=sft",
        "--config.data.labels=1-4",
    ]
    command += [f"--config.annotate.candidates={FLAGS.candidates}"]
    command += [f"--config.cpu_devices={FLAGS.devices}", "--config.eval.batch_size=256"]
    run(command)


def arm_table(folder: Path, count: int) -> Path:
    """The table of an arm: the chosen pairs, some with steps, and the splits that measure."""
    arm = folder / f"arm-{count}"
    table = arm / "pairs.jsonl"
    if table.is_file():
        return table
    tasks = list(read_tasks(folder / "annotate" / PAIRS).values())
    truth = {
        e.uid: {**(e.steps or {}), LABEL_STEP: str(e.label)} for e in generate(world(), "train")
    }
    rows = {row["uid"]: row for row in pool()}
    if count:
        copy = arm / "annotate"
        copy.mkdir(parents=True, exist_ok=True)
        for name in (PAIRS, "choice.json"):
            shutil.copy(folder / "annotate" / name, copy / name)
        saved = copy / "annotated-by-simulated.jsonl"
        write_text(saved, json_lines(annotations(tasks[:count], truth)))
        import_annotations(copy, [saved])
        with (copy / "annotated.jsonl").open(encoding="utf-8") as file:
            rows |= {row["uid"]: row for row in map(json.loads, file)}
    chosen = [rows[t.uid] | {"split": "train"} for t in tasks if "label" in rows[t.uid]]
    measured = [
        {"uid": e.uid, "query": e.query, "product": dict(e.product), "label": e.label}
        | {"kind": e.kind, "steps": dict(e.steps or {}), "split": split}
        for split in ("validation", "test")
        for e in generate(world(), split)
    ]
    write_text(table, json_lines([*chosen, *measured]))
    return table


def settings(table: Path) -> dict:
    """What an arm changes in ``configs/stage1.py``."""
    return {
        "seed": FLAGS.seed,
        "cpu_devices": FLAGS.devices,
        "init_from": Path(FLAGS.stage1).absolute() / "checkpoints" / "sft",
        "data.name": "table",
        "data.path": table.absolute(),
        "data.labels": "1-4",
        "data.balance": False,
        "filter.pairs": 0,
        "rl.steps": FLAGS.steps,
        "rl.eval_every": max(1, FLAGS.steps // 2),
        "eval.pass_k": 0,
    }


def run_arm(folder: Path, count: int) -> None:
    """Trains an arm by the command line, as far as it is not done."""
    workdir = folder / f"arm-{count}" / "run"
    if (workdir / "summary.json").is_file():
        return
    values = settings(arm_table(folder, count))
    command = [sys.executable, "launch.py", "--config=configs/stage1.py", f"--workdir={workdir}"]
    run(command + [f"--config.{key}={value}" for key, value in values.items()])


def run(command: list[str]) -> None:
    """A command in the checkout; all arms run the same programs, which are compiled once."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(FLAGS.runs).absolute() / "compiled")}
    subprocess.run(command, cwd=ROOT, env=os.environ | cache, check=True)


def metrics(summary: dict) -> dict[str, float]:
    """The columns of the table."""
    steps = summary["step_accuracy"]
    verdicts = [value for value in steps.values() if value is not None]
    return {
        "macro F1": summary["macro_f1"],
        "step accuracy": float(np.mean(verdicts)),
        "category": steps["category"],
        "attributes": steps["attributes"],
        "right for a wrong reason": summary["right_for_wrong_reason"],
    }


def table(summaries: dict[str, dict]) -> dict:
    """The table for ``docs/results/``."""
    rows = [{"name": "cold start"} | metrics(next(iter(summaries.values()))["before"])]
    rows += [{"name": f"{n} annotated pairs"} | metrics(s) for n, s in summaries.items()]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "schema": 1,
        "order": 125,
        "title": "Annotated pairs, the truth with a tenth of the verdicts flipped",
        "note": f"SRPO from one cold start {ABOUT[FLAGS.labels].format(FLAGS.pairs)}, chosen by "
        "she-jax annotate; no other step is annotated; one seed, so differences below 0.02 say "
        "nothing.",
        "command": f"python benchmarks/annotation.py --runs={FLAGS.runs} --stage1={FLAGS.stage1} "
        f"--labels={FLAGS.labels}",
        "commit": commit or None,
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores",
        "seeds": [FLAGS.seed],
        "source": "this command",
        "columns": list(COLUMNS),
        "rows": rows,
    }


def draw(summaries: dict[str, dict], path: Path) -> None:
    """Plots macro F1 and step accuracy over the number of annotated pairs."""
    start = metrics(next(iter(summaries.values()))["before"])
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    xs = range(len(summaries))
    for name in COLUMNS[:2]:
        ys = [metrics(summary)[name] for summary in summaries.values()]
        (line,) = axis.plot(xs, ys, marker="o", linewidth=2, label=name)
        axis.axhline(
            start[name], color=line.get_color(), linestyle=":", label=f"{name}, cold start"
        )
    axis.set_xticks(xs, list(summaries))
    axis.set_xlabel("annotated pairs")
    axis.set_title("after SRPO, on test")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    del argv
    folder = Path(FLAGS.runs).absolute()
    choose(folder)
    for count in map(int, FLAGS.arms):
        if count or FLAGS.labels == "all":
            run_arm(folder, count)
    counts = sorted(int(arm.name.partition("-")[2]) for arm in folder.glob("arm-*"))
    files = {str(count): folder / f"arm-{count}" / "run" / "summary.json" for count in counts}
    done = {name: json.loads(file.read_bytes()) for name, file in files.items() if file.is_file()}
    write_json(folder / "annotation.json", table(done))
    draw(done, folder / "annotation.png")
    print((folder / "annotation.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    app.run(main)
