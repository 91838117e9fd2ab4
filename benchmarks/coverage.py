"""What a process reward model adds to SRPO with fewer and fewer annotated pairs, in three ways.

    python benchmarks/coverage.py --runs=runs/coverage --seeds=0,1,2 \
        --stage1=runs/seed{seed} --prm=runs/prm{seed}

Each seed needs a finished stage 1, from whose cold start every arm starts, and a process reward
model (the same for all seeds if its name has no ``{seed}``). The pairs are new, of another
ShopWorld than the one that both were trained on; of a share of them the label and the steps are
annotated. All arms have the same pairs, updates and numbers of rollouts. An arm that is done is not
run again. Writes ``coverage.json`` into ``--runs``, prints the table, and draws ``--plot`` if that
is given.
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
flags.DEFINE_string("runs", "runs/coverage", "Folder of the arms.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
flags.DEFINE_string("stage1", "runs/seed{seed}", "A finished stage 1 of a seed.")
flags.DEFINE_string("prm", "runs/prm{seed}", "A process reward model for it.")
flags.DEFINE_integer("steps", 40, "Updates per arm.")
flags.DEFINE_integer("devices", 2, "CPU devices per arm.")
flags.DEFINE_string("plot", "", "Draw the figures to this file.")
ROOT = Path(__file__).resolve().parent.parent
COVERAGE = (1.0, 0.5, 0.2, 0.0)
ARMS = (
    *(("verifier_only", share) for share in COVERAGE),
    *(("model_only", share) for share in COVERAGE),
    *(("precedence", share) for share in COVERAGE[1:-1]),
)
# With precedence: where all is annotated the verifier decides, where nothing is, the model.
SAME = {("precedence", 1.0): "verifier_only-1", ("precedence", 0.0): "model_only-0"}
TITLES = {
    "verifier_only": "verifier only",
    "precedence": "verifier, else reward model",
    "model_only": "reward model only",
}


def settings(seed: str, combine: str, share: float) -> dict:
    """What an arm changes in ``configs/stage1.py``."""
    stage1 = Path(FLAGS.stage1.format(seed=seed)).absolute()
    values = {
        "seed": seed,
        "cpu_devices": FLAGS.devices,
        "init_from": stage1 / "checkpoints" / "sft",
        "data.dir": Path(FLAGS.runs).absolute() / f"seed{seed}" / "data",
        "shopworld.seed": 100 + int(seed),
        "shopworld.annotated": share,
        "reward.combine": combine,
        "rl.min_std": 0.05,
        "rl.steps": FLAGS.steps,
        "rl.eval_every": FLAGS.steps,
        "eval.pass_k": 0,
        "rl.difficulty": "even",
        "rl.dynamic_sampling_rounds": 0,
        "filter.pairs": 0,  # pairs without annotation have no pass rate
    }
    if combine != "verifier_only":
        values["reward.prm"] = Path(FLAGS.prm.format(seed=seed)).absolute()
    return values


def run_arm(seed: str, combine: str, share: float) -> dict:
    """Runs an arm by the command line, and returns its summary."""
    runs = Path(FLAGS.runs).absolute()
    workdir = runs / f"seed{seed}" / f"{combine}-{share:g}"
    if not (workdir / "summary.json").is_file():
        values = settings(seed, combine, share)
        command = [sys.executable, "launch.py", "--config=configs/stage1.py"]
        command += [f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in values.items()]
        # All arms run the same program: it is compiled once.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(runs / "compiled")}
        subprocess.run(command, cwd=ROOT, env=os.environ | cache, check=True)
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


def metrics(summary: dict) -> dict[str, float]:
    """Macro F1, and the mean accuracy of the steps with a verdict."""
    steps = [v for v in summary["step_accuracy"].values() if v is not None]
    return {"macro_f1": summary["macro_f1"], "step_accuracy": float(np.mean(steps))}


def table(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """Markdown: a row per way, a column per share, mean and standard deviation over the seeds."""
    heads = [f"{share:.0%}" for share in COVERAGE]
    lines = []
    for name, title in (("macro_f1", "macro F1"), ("step_accuracy", "step accuracy")):
        lines += [f"| {title} | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
        for combine, label in TITLES.items():
            cells = []
            for share in COVERAGE:
                values = [run[name] for run in results[arm_of(combine, share)]]
                cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}")
            lines.append(f"| {label} | {' | '.join(cells)} |")
        start = [run[name] for run in results["start"]]
        lines += [f"| cold start | {np.mean(start):.3f} ± {np.std(start):.3f} | | | |", ""]
    return lines


def arm_of(combine: str, share: float) -> str:
    """The arm whose metrics are in a cell of the table."""
    return SAME.get((combine, share), f"{combine}-{share:g}")


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plots macro F1 and step accuracy over the share of annotated pairs, with a dot per seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    xs = range(len(COVERAGE))
    for axis, name, title in zip(
        axes, ("macro_f1", "step_accuracy"), ("macro F1", "step accuracy"), strict=True
    ):
        for combine, label in TITLES.items():
            values = np.array(
                [[run[name] for run in results[arm_of(combine, share)]] for share in COVERAGE]
            )
            (line,) = axis.plot(xs, values.mean(axis=1), label=label, linewidth=2)
            for seed in values.T:
                axis.plot(xs, seed, ".", color=line.get_color(), alpha=0.6)
        start = np.mean([run[name] for run in results["start"]])
        axis.axhline(start, color="grey", linestyle=":", label="cold start")
        axis.set_xticks(xs, [f"{share:.0%}" for share in COVERAGE])
        axis.set_xlabel("pairs that humans annotated")
        axis.set_title(f"{title} on test")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    del argv
    results: dict[str, list[dict[str, float]]] = {}
    for seed in FLAGS.seeds:
        for combine, share in ARMS:
            summary = run_arm(seed, combine, share)
            results.setdefault(f"{combine}-{share:g}", []).append(metrics(summary))
        results.setdefault("start", []).append(metrics(summary["before"]))
    path = Path(FLAGS.runs) / "coverage.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(results)))
    if FLAGS.plot:
        draw(results, Path(FLAGS.plot))


if __name__ == "__main__":
    app.run(main)
