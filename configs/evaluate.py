"""Predictions of a checkpoint for a set of pairs, a JSON line a pair, and metrics if it has labels.

    python launch.py --config=configs/evaluate.py --config.checkpoint=runs/stage1 \\
        --config.data.name=jsonl --config.data.path=FILE --workdir=DIR

The checkpoint is a run's folder, which brings its own chain and lengths, or a model in files.
"""

from ml_collections import ConfigDict

from she_jax.recipes import base


def get_config() -> ConfigDict:
    """The recipe."""
    config = base.get_config()
    config.kind = "evaluate"
    config.eval.batch_size = 64
    config.data.max_bad_share = 1.0  # rows that cannot be read are set aside, however many
    return config
