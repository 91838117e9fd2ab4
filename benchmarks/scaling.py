"""How time and memory of an RL step grow with batch, length and model; a plot and its slopes.

    python benchmarks/scaling.py --plot=benchmarks/scaling.png

Each point is a run of ``rl_step.py`` in a separate process, close to its `tiny` work but with a
smaller vocabulary. The slope is that of a straight line through the logarithms: 1 is linear, 2
quadratic.
"""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
from absl import app, flags

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

FLAGS = flags.FLAGS
flags.DEFINE_string("plot", "scaling.png", "File of the plot.")
flags.DEFINE_integer("repeats", 3, "Timed calls per point.")

BASE = {"vocab": 8_192, "prompts": 4, "prompt_len": 64, "new_tokens": 64, "micro": 1}
# What grows: label, then the x value and the flags of each point.
SWEEPS = {
    "rollouts a step": [(8 * n, {"prompts": n}) for n in (2, 4, 8, 16)],
    "tokens a rollout": [(2 * n, {"prompt_len": n, "new_tokens": n}) for n in (64, 128, 256, 512)],
    "parameters in the layers": [
        (
            layers * dim * (4 * dim + 3 * 4 * dim),
            {
                "layers": layers,
                "dim": dim,
                "ffn": 4 * dim,
                "heads": dim // 64,
                "kv_heads": dim // 64,
            },
        )
        for layers, dim in ((4, 128), (4, 256), (8, 384), (12, 512))
    ],
}
SECTIONS = ("rollout", "train")


def point(changes: dict[str, int], section: str) -> tuple[float, float]:
    """Median seconds and peak GiB."""
    sizes = BASE | changes
    command = [sys.executable, str(Path(__file__).with_name("rl_step.py"))]
    command += [f"--{name}={value}" for name, value in sizes.items()]
    command += [f"--sections={section}", f"--repeats={FLAGS.repeats}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout)[section]
    memory = measured.get("peak_device_gib", measured["peak_rss_gib"])
    return measured["seconds"]["median"], memory


def slope(xs: list[float], ys: list[float]) -> float:
    """Slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def main(_: list[str]) -> None:
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(12, 6.4), sharex="col")
    for column, (label, points) in enumerate(SWEEPS.items()):
        xs = [x for x, _ in points]
        for section in SECTIONS:
            measured = [point(changes, section) for _, changes in points]
            values = zip(*measured, strict=True)
            for axis, ys, unit in zip(axes[:, column], values, "sG", strict=True):
                name = f"{section} (slope {slope(xs, list(ys)):.2f})"
                axis.loglog(xs, ys, marker="o", label=name)
                axis.set_ylabel({"s": "seconds", "G": "peak memory, GiB"}[unit])
            pairs = zip(xs, measured, strict=True)
            rows = "  ".join(f"{x:,}: {s:.2f} s {g:.2f} GiB" for x, (s, g) in pairs)
            seconds = slope(xs, [s for s, _ in measured])
            print(f"{label}, {section}: {rows}  slope {seconds:.2f}", flush=True)
        axes[1, column].set_xlabel(label)
        for axis in axes[:, column]:
            axis.set_xticks(xs, [f"{x / 1e6:.1f}M" if x > 1e5 else str(x) for x in xs])
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.suptitle("Cost of a rollout and of a train step")
    figure.tight_layout()
    figure.savefig(FLAGS.plot, dpi=110)


if __name__ == "__main__":
    app.run(main)
