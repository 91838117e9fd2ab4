"""Predictions of a checkpoint for a set of pairs, a JSON line a pair, and metrics if it has labels.

    python launch.py --config=configs/evaluate.py --config.checkpoint=runs/stage1 \\
        --config.data.name=jsonl --config.data.path=FILE --workdir=DIR

The checkpoint is a run's folder, which brings its own chain and lengths, or a model in files.
"""

from typing import Any

from ml_collections import ConfigDict

from she_jax.recipes import base


def get_config() -> Any:
    """The recipe."""
    config: Any = ConfigDict(base.get_config().to_dict())
    config.kind = "evaluate"
    config.eval.batch_size = 64
    config.phase = ""  # of a run: policy | sft (its cold start); "" for the later one that it has
    # From chains to labels; she_jax.evaluation.decide. The threshold of "cumulative", the choice of
    # "auto" and a temperature are fitted once on the run's validation pairs.
    config.decide = ConfigDict()
    config.decide.samples = 0  # chains a pair that vote, 8 say; 0 leaves probabilities out
    config.decide.rule = "greedy"  # greedy | majority | cumulative | auto
    config.decide.chains = True  # False: the label alone, of a policy that gives its label first
    config.predict = ConfigDict()
    config.predict.format = "jsonl"  # of the predictions: jsonl | parquet
    # Several runs may share the work: each has its number and the same folder of blocks, and
    # whoever finds all blocks there finishes. docs/scaling.md
    config.predict.blocks = ""  # "" for a folder of the run's own, which goes once all is done
    config.predict.part = 0
    config.predict.parts = 1
    # With labels: a TREC run file (qid Q0 docid rank score tag), whose systems are compared under
    # human and under the judge's labels. A table's columns system and rank do without.
    config.predict.systems = ""
    config.data.max_bad_share = 1.0  # rows that cannot be read are set aside, however many
    return config.lock()
