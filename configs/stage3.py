"""Stage 3, the long tail: SRPO from stage 2's policy, with the difficult kinds of query first.

    python launch.py --config=configs/stage3.py

starts from ``runs/stage2``, which it runs first if it is missing, and measures anew what is
difficult for that policy.
"""

from typing import Any

from she_jax.recipes import stage2


def get_config(arg: str = "") -> Any:
    """The recipe; ``arg`` as in stage 1."""
    config = stage2.after(stage2.get_config(arg), "stage2", arg)
    prerequisite = config.prerequisite
    config.rl.learning_rate = prerequisite.prerequisite.rl.learning_rate / 3
    config.rl.steps = 30
    config.rl.eval_every = 10
    config.rl.patience = 2
    config.filter.skip = prerequisite.filter.skip + prerequisite.filter.pairs
    config.filter.pairs = prerequisite.filter.pairs
    config.filter.size = prerequisite.filter.size
    config.filter.low = 0.01  # DyKnow-RAG's (arXiv 2510.11122), as is the next
    config.filter.high = 0.9
    if config.data.name == "shopworld":  # other pairs have kinds of their own, or none
        config.filter.front = ("negation", "alternative", "question")
    return config.lock()
