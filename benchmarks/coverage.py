"""Where the examiner earns its keep: SRPO with fewer and fewer annotated pairs, three ways.

    python benchmarks/coverage.py --runs=runs/coverage --seeds=0,1,2 \
        --stage1=runs/seed{seed} --examiner=runs/examiner{seed}

For each seed there is a finished stage 1, whose cold start is where every arm begins, and an
examiner (one for all seeds, if its name has no ``{seed}``). The pairs are new ones, of another
ShopWorld than the one that both were trained on, and humans annotated a share of them, label and
steps. All arms have the same pairs, updates and numbers of rollouts. An arm that is done is not run
again. Writes ``coverage.json`` into ``--runs``, prints the table, and draws ``--plot`` if that is
given.
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
flags.DEFINE_string("runs", "runs/coverage", "Where the arms go.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
flags.DEFINE_string("stage1", "runs/seed{seed}", "A finished stage 1 of a seed.")
flags.DEFINE_string("examiner", "runs/examiner{seed}", "The examiner for it.")
flags.DEFINE_integer("steps", 40, "Updates an arm.")
flags.DEFINE_integer("devices", 2, "CPU devices an arm.")
flags.DEFINE_string("plot", "", "Draw the figures to this file.")
ROOT = Path(__file__).resolve().parent.parent
COVERAGE = (1.0, 0.5, 0.2, 0.0)
ARMS = (
    *(("verifier_only", share) for share in COVERAGE),
    *(("model_only", share) for share in COVERAGE),
    *(("precedence", share) for share in COVERAGE[1:-1]),
)
# Where all is annotated precedence hears the verifier alone, and where nothing is the examiner.
SAME = {("precedence", 1.0): "verifier_only-1", ("precedence", 0.0): "model_only-0"}
TITLES = {
    "verifier_only": "verifier only",
    "precedence": "verifier, else examiner",
    "model_only": "examiner only",
}


def run_arm(seed: str, how: str, share: float) -> dict:
    """One run through the command line; its figures."""
    runs = Path(FLAGS.runs).absolute()
    folder = runs / f"seed{seed}"
    workdir = folder / f"{how}-{share:g}"
    if not (workdir / "summary.json").is_file():
        command = [sys.executable, "launch.py", "--config=configs/stage1.py"]
        settings = {
            "seed": seed,
            "cpu_devices": FLAGS.devices,
            "start": Path(FLAGS.stage1.format(seed=seed)).absolute() / "checkpoints" / "sft",
            "data.dir": folder / "data",
            "shopworld.seed": 100 + int(seed),
            "shopworld.annotated": share,
            "reward.combine": how,
            "rl.min_std": 0.05,
            "rl.steps": FLAGS.steps,
            "rl.eval_every": FLAGS.steps,
            "eval.pass_k": 0,
            "rl.difficulty": "even",
            "rl.dynamic_sampling_rounds": 0,
            "filter.pairs": 0,  # unannotated pairs have no pass rate
        }
        if how != "verifier_only":
            settings["reward.prm"] = Path(FLAGS.examiner.format(seed=seed)).absolute()
        command += [f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        # All arms are the same program: it is compiled once.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(runs / "compiled")}
        subprocess.run(command, cwd=ROOT, env=os.environ | cache, check=True)
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


def figures(summary: dict) -> dict[str, float]:
    """Macro F1, and the mean accuracy of the steps with a verdict."""
    steps = [v for v in summary["step_accuracy"].values() if v is not None]
    return {"macro_f1": summary["macro_f1"], "step_accuracy": float(np.mean(steps))}


def table(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """Markdown: a row a way, a column a share, mean and standard deviation over the seeds."""
    heads = [f"{share:.0%}" for share in COVERAGE]
    lines = []
    for name, title in (("macro_f1", "macro F1"), ("step_accuracy", "step accuracy")):
        lines += [f"| {title} | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
        for how, words in TITLES.items():
            cells = []
            for share in COVERAGE:
                values = [one[name] for one in results[cell(how, share)]]
                cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}")
            lines.append(f"| {words} | {' | '.join(cells)} |")
        start = [one[name] for one in results["start"]]
        lines += [f"| cold start | {np.mean(start):.3f} ± {np.std(start):.3f} | | | |", ""]
    return lines


def cell(how: str, share: float) -> str:
    """The arm that fills a cell of the table."""
    return SAME.get((how, share), f"{how}-{share:g}")


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Macro F1 and step accuracy over the share of annotated steps; every seed a dot."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    places = range(len(COVERAGE))
    for axis, name, title in zip(
        axes, ("macro_f1", "step_accuracy"), ("macro F1", "step accuracy"), strict=True
    ):
        for how, words in TITLES.items():
            values = np.array(
                [[one[name] for one in results[cell(how, share)]] for share in COVERAGE]
            )
            (line,) = axis.plot(places, values.mean(axis=1), label=words, linewidth=2)
            for seed in values.T:
                axis.plot(places, seed, ".", color=line.get_color(), alpha=0.6)
        start = np.mean([one[name] for one in results["start"]])
        axis.axhline(start, color="grey", linestyle=":", label="cold start")
        axis.set_xticks(places, [f"{share:.0%}" for share in COVERAGE])
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
        for how, share in ARMS:
            summary = run_arm(seed, how, share)
            results.setdefault(f"{how}-{share:g}", []).append(figures(summary))
        results.setdefault("start", []).append(figures(summary["before"]))
    path = Path(FLAGS.runs) / "coverage.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(results)))
    if FLAGS.plot:
        draw(results, Path(FLAGS.plot))


if __name__ == "__main__":
    app.run(main)
