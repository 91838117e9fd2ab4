"""Stands in for the runs of the study in its tests; the processes of its jobs import only this."""

import json
import os
import signal
import time

from she_jax.training.stop import StopSignal

MACRO_F1 = {"grpo": 0.6, "srpo": 0.7, "rloo": 0.5}  # what the stand-in scores


def stand_in(config, folder):
    """Writes what a run would, or does what ``data.path`` says; appends its name to ``started``."""
    with (folder.parents[1] / "started").open("a") as file:
        file.write(f"{folder.relative_to(folder.parents[1])}\n")
    fate = "" if config.kind != "train" else config.data.path
    if fate == "fails":
        raise ValueError("a rate that is too high")
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    if fate == "waits":
        with StopSignal() as stop:
            (folder.parent / f"{folder.name}.pid").write_text(str(os.getpid()))
            while not stop:
                time.sleep(0.02)
        (folder.parent / f"{folder.name}.saved").touch()
        raise SystemExit(stop.exit_code)
    print("all went well")
    write_metrics(folder, MACRO_F1[config.rl.estimator] - config.rl.learning_rate)


def write_metrics(folder, macro_f1):
    """Writes the metrics of a run that the plan reads."""
    folder.mkdir(parents=True)
    line = {"phase": "eval", "step": 20, "validation/macro_f1": macro_f1}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    part = {"macro_f1": macro_f1, "accuracy": 0.5, "good_f1": 0.5, "parse_rate": 1.0}
    part |= {"f1": {"1": 0.5}, "step_accuracy": {"query": 0.9}, "confusion": [[1] * 5] * 4}
    (folder / "summary.json").write_text(json.dumps(part))
