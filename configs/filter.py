"""Diversified data filtering with the policy of a run.

    python launch.py --config=configs/filter.py --config.checkpoint=runs/stage1

measures training pairs of that run by rollouts of its best policy and writes those that are worth
training on as a data set, with a page that shows what was dropped and why. The rollouts can be
reused with other thresholds:

    python launch.py --config=configs/filter.py --config.checkpoint=runs/stage1 \\
        --config.filter.records=runs/filter/filter/records --config.filter.low=0.3 \\
        --workdir=runs/filter_again
"""

from typing import Any

from ml_collections import ConfigDict

from she_jax.recipes import base


def get_config() -> ConfigDict:
    """The recipe: what is not here is the run's."""
    full: Any = base.get_config()
    config: Any = ConfigDict()
    config.kind = "filter"
    config.seed = 0  # of the rollouts and of the selection
    config.checkpoint = "runs/stage1"  # folder of the policy's run
    config.cpu_devices = full.cpu_devices
    config.mesh = full.mesh
    config.eval = full.eval
    config.filter = full.filter
    config.filter.pairs = 8_000
    config.filter.low = 0.01  # DyKnow-RAG's (arXiv 2510.11122), as is the next
    config.filter.high = 0.9
    config.filter.size = 2_000
    return config.lock()
