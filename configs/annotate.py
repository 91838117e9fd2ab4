"""Pairs for people to annotate, chosen with the policy of a run, with its chains to look at.

    python launch.py --config=configs/annotate.py --config.checkpoint=runs/stage1 \\
        --workdir=runs/stage1/annotate

The pairs are the run's training pairs, or those of a table (data.name, data.path). Of a folder of
predictions (checkpoint) the chains are taken as they are.
"""

from typing import Any

from ml_collections import ConfigDict

from she_jax.recipes import base


def get_config() -> Any:
    """The recipe."""
    config: Any = ConfigDict(base.get_config().to_dict())
    config.kind = "annotate"
    config.eval.batch_size = 64
    config.phase = ""  # of a run: policy | sft (its cold start); "" for the later one that it has
    config.annotate = ConfigDict()
    config.annotate.pairs = 100  # to annotate
    config.annotate.candidates = 0  # that the policy looks at; 0 for ten times as many
    # Chains of each candidate that vote, besides the greedy one that is shown. 0: the pairs cover
    # the cells, but nothing says which are doubtful.
    config.annotate.samples = 8
    config.annotate.split = ""  # they are of; "" for train, or all of a table or of predictions
    config.data.max_bad_share = 1.0  # rows that cannot be read are set aside, however many
    return config.lock()
