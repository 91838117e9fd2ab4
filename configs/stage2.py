"""Stage 2, reasoning: SRPO from stage 1's policy, on prompts that it does not solve yet.

    python launch.py --config=configs/stage2.py

starts from ``runs/stage1``, which it runs first if it is missing. It measures that policy on
training pairs that stage 1's filter has not measured and keeps those that it solves sometimes, in
equal shares over label, kind and difficulty. (Hard prompts alone made it worse: docs/results.md.)
With a process reward model the reward is the hybrid:
``--config.reward.prm=runs/reward_model --config.rl.min_std=0.05``.
"""

import re
from typing import Any

from she_jax.recipes import stage1

SHARED = ("cpu_devices", "data", "shopworld", "chain", "model", "mesh", "eval")


def get_config(arg: str = "") -> Any:
    """The recipe; ``arg`` as in stage 1."""
    config = after(stage1.get_config(arg), "stage1", arg)
    prerequisite = config.prerequisite
    config.rl.learning_rate = prerequisite.rl.learning_rate / 2  # the policy is good already
    config.rl.steps = 30
    config.rl.eval_every = 10
    config.rl.patience = 2
    config.filter.skip = prerequisite.filter.pairs  # what stage 1's filter has measured
    config.filter.pairs = prerequisite.filter.pairs * 4 // 3
    config.filter.size = prerequisite.filter.size * 2 // 3
    config.filter.low = 0.1  # one of eight rollouts correct
    config.filter.high = 0.9  # to seven
    return config.lock()


def after(prerequisite: Any, name: str, arg: str) -> Any:
    """A stage that starts from another one's policy; what they share is one value in both."""
    config = stage1.get_config(arg).unlock()
    config.prerequisite = prerequisite
    config.init_from = f"{folder(name, arg)}/checkpoints/policy"
    config.seed = prerequisite.get_ref("seed")
    for key in SHARED:
        config[key] = prerequisite.get_ref(key) if key == "cpu_devices" else prerequisite[key]
    return config


def folder(name: str, arg: str) -> str:
    """The folder in which ``launch.py`` runs a stage by default."""
    return f"runs/{name}" + re.sub(r"[^A-Za-z0-9.]+", "-", f":{arg}" if arg else "")
