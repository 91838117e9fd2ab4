"""Stage 2, reasoning: SRPO from stage 1's policy, on prompts that it does not get right yet.

    python launch.py --config=configs/stage2.py

starts from ``runs/stage1``, which it makes where it is not there. It measures that policy on
training pairs that stage 1's filter has not looked at and keeps those that it gets right now and
then, hard ones in as large a share as there are: even shares over class, kind and difficulty.
(Hard prompts alone made it worse: docs/results.md.) The hybrid examination is on as soon as there
is an examiner: ``--config.reward.model=runs/reward_model --config.rl.tol=0.05``.
"""

import re
from typing import Any

from configs import stage1

SHARED = ("cpu_devices", "data", "shopworld", "chain", "model", "mesh", "eval")


def get_config(arg: str = "") -> Any:
    """The recipe; ``arg`` as in stage 1."""
    config = after(stage1.get_config(arg), "stage1", arg)
    before = config.before
    config.rl.learning_rate = before.rl.learning_rate / 2  # the policy is good already
    config.rl.steps = 30
    config.rl.eval_every = 10
    config.rl.patience = 2
    config.filter.skip = before.filter.pairs  # what stage 1's filter has looked at
    config.filter.pairs = before.filter.pairs * 4 // 3
    config.filter.size = before.filter.size * 2 // 3
    config.filter.low = 0.1  # of eight rollouts one right
    config.filter.high = 0.9  # to seven
    return config.lock()


def after(before: Any, name: str, arg: str) -> Any:
    """A stage that starts where another one ends; what they share is one value in both."""
    config = stage1.get_config(arg).unlock()
    config.before = before
    config.start = f"{folder(name, arg)}/checkpoints/srpo"
    config.seed = before.get_ref("seed")
    for key in SHARED:
        config[key] = before.get_ref(key) if key == "cpu_devices" else before[key]
    return config


def folder(name: str, arg: str) -> str:
    """Where ``launch.py`` puts a stage if it is not told otherwise."""
    return f"runs/{name}" + re.sub(r"[^A-Za-z0-9.]+", "-", f":{arg}" if arg else "")
