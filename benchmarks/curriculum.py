"""What filtering and the curriculum contribute: all of them, and all but one part.

    python benchmarks/curriculum.py --runs=runs/curriculum --seeds=0,1,2 --stage1=runs/seed{seed}

Each seed needs a finished stage 1, whose cold start and pairs all arms share. Every arm makes the
same number of SRPO updates:

- ``full``: three stages as in ``configs/curriculum.py``;
- ``no_difficulty``: no bounds on the pass rate, shuffled prompts, no dynamic sampling;
- ``no_diversity``: a random choice in place of quotas over class, kind, difficulty and cluster, and
  no kinds in front;
- ``no_curriculum``: one long stage with the filter, dynamic sampling and difficulty of stage 3;
- ``plain``: SRPO on all training pairs, shuffled, without filter and dynamic sampling.

An arm that is done is not run again. Writes ``curriculum.json`` into ``--runs``, prints the tables,
and draws ``--plot`` if that is given.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("runs", "runs/curriculum", "Folder of the arms.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
flags.DEFINE_list("arms", [], "Only these arms.")
flags.DEFINE_string("stage1", "runs/seed{seed}", "A finished stage 1 of a seed.")
flags.DEFINE_integer(
    "devices", 2, "CPU devices per arm; with 1, two commands may run side by side."
)
flags.DEFINE_string("plot", "", "Draw the figures to this file.")
ROOT = Path(__file__).resolve().parent.parent
STAGES = ("stage1", "stage2", "stage3")
UPDATES = (60, 30, 30)  # as in their recipes
OPEN = {
    "filter.low": 0.0,
    "filter.high": 1.0,
    "rl.difficulty": "even",
    "rl.dynamic_sampling_rounds": 0,
}
RANDOM = {"filter.balance": False, "filter.clusters": 0, "filter.front": ()}
ARMS = ("full", "no_difficulty", "no_diversity", "no_curriculum", "plain")
TITLES = {
    "full": "full",
    "no_difficulty": "without difficulty",
    "no_diversity": "without diversity",
    "no_curriculum": "without curriculum",
    "plain": "plain SRPO",
}
FIGURES = {
    "macro_f1": "macro F1, test",
    "longtail": "macro F1, long tail",
    "step_accuracy": "step accuracy, test",
    "negation": "macro F1, negation",
    "stage1_longtail": "long tail after stage 1",
    "entropy": "entropy at the end",
}


def settings(arm: str, seed: str) -> tuple[str, dict]:
    """The recipe and the values of an arm."""
    source = Path(FLAGS.stage1.format(seed=seed)).absolute()
    shared = {"seed": seed, "shopworld.seed": seed, "data.dir": source / "data", "eval.pass_k": 0}
    shared |= {"cpu_devices": FLAGS.devices}
    init_from = source / "checkpoints" / "sft"
    if arm in ("no_curriculum", "plain"):
        shared |= {"init_from": init_from, "rl.steps": sum(UPDATES), "rl.patience": 0}
        shared |= {"rl.eval_every": UPDATES[-1]}
        if arm == "plain":
            return "stage1.py", shared | OPEN | {"filter.pairs": 0}
        filters = {"filter.skip": 0, "filter.pairs": 11_000, "filter.size": 3_500}
        return "stage3.py", shared | filters | {"rl.learning_rate": 3e-4}
    changes = {"no_difficulty": OPEN, "no_diversity": RANDOM}.get(arm, {}) | {"rl.patience": 0}
    per_stage = {f"stages.{s}.{k}": v for s in STAGES for k, v in changes.items()}
    return "curriculum.py", shared | per_stage | {"stages.stage1.init_from": init_from}


def run_arm(arm: str, seed: str) -> Path:
    """Runs an arm by the command line, and returns its folder."""
    runs = Path(FLAGS.runs).absolute()
    workdir = runs / f"seed{seed}" / arm
    if not (workdir / "summary.json").is_file():
        recipe, values = settings(arm, seed)
        command = [sys.executable, "launch.py", f"--config=configs/{recipe}"]
        command += [f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in values.items()]
        # All arms run the same programs: they are compiled once.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(runs / "compiled")}
        subprocess.run(command, cwd=ROOT, env=os.environ | cache, check=True)
    return workdir


def updates(workdir: Path) -> list[dict]:
    """The metrics of every SRPO update, over all stages."""
    folders = [workdir / name for name in STAGES if (workdir / name).is_dir()] or [workdir]
    lines = [
        json.loads(line)
        for folder in folders
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line["phase"] == "rl"]


def metrics(workdir: Path) -> dict:
    """What the tables and the plot show of an arm."""
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    lines = updates(workdir)
    first = summary.get("stages", {}).get("stage1", summary)
    return {
        "macro_f1": summary["macro_f1"],
        "longtail": summary["longtail"]["macro_f1"],
        "step_accuracy": float(np.mean(list(summary["step_accuracy"].values()))),
        "negation": summary["by_kind"]["negation"]["macro_f1"],
        "stage1_longtail": first["longtail"]["macro_f1"],
        "entropy": float(np.mean([line["entropy"] for line in lines[-10:]])),
        "entropies": [line["entropy"] for line in lines],
        "paths": [line["paths"] for line in lines],
        "seconds": sum(line["time/step"] for line in lines),
    }


def table(results: dict[str, list[dict]]) -> list[str]:
    """Markdown: a row per arm, mean and standard deviation (of the population) over the seeds."""
    lines = [f"| | {' | '.join(FIGURES.values())} |", f"|---{'|---' * len(FIGURES)}|"]
    for arm, runs in results.items():
        cells = []
        for name in FIGURES:
            values = [run[name] for run in runs]
            single = name == "stage1_longtail" and arm in ("no_curriculum", "plain")
            cells.append("" if single else f"{np.mean(values):.3f} ± {np.std(values):.3f}")
        lines.append(f"| {TITLES[arm]} | {' | '.join(cells)} |")
    lines += ["", "| macro F1 by seed, test / long tail | |", "|---|---|"]
    for arm, runs in results.items():
        cells = ", ".join(f"{run['macro_f1']:.3f} / {run['longtail']:.3f}" for run in runs)
        lines.append(f"| {TITLES[arm]} | {cells} |")
    return lines


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Plots entropy and number of paths over the updates, means over the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    titles = {
        "entropies": "policy entropy (nats per token)",
        "paths": "different paths in a group of 8",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for arm, runs in results.items():
            length = min(len(run[name]) for run in runs)
            mean = np.mean([run[name][:length] for run in runs], axis=0)
            smooth = np.convolve(mean, np.ones(5) / 5, mode="valid")
            axis.plot(np.arange(len(smooth)) + 3, smooth, label=TITLES[arm], linewidth=1.8)
        for stage in range(1, len(STAGES)):
            axis.axvline(sum(UPDATES[:stage]), color="grey", linestyle=":", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("SRPO update (mean of five)")
        axis.grid(alpha=0.3)
    axes[-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    del argv
    results: dict[str, list[dict]] = {}
    for seed in FLAGS.seeds:
        for arm in FLAGS.arms or ARMS:
            results.setdefault(arm, []).append(metrics(run_arm(arm, seed)))
    path = Path(FLAGS.runs) / "curriculum.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))
    if FLAGS.plot:
        draw(results, Path(FLAGS.plot))


if __name__ == "__main__":
    app.run(main)
