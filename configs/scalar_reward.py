"""An outcome reward model for the policy of a run: what process reward models are compared with.

    python launch.py --config=configs/scalar_reward.py --config.checkpoint=runs/stage1

Pairs, chain and model are those of that run. It begins as the run's cold start with a value head,
learns from chains of the run's policies which of them are correct, and is measured on other
queries. Then

    python launch.py --config=configs/stage1.py --config.init_from=runs/stage1/checkpoints/sft \\
        --config.reward.orm=runs/scalar_reward --config.rl.min_std=0.05 --workdir=runs/scalar

trains a policy with its score as the outcome reward. It takes about 5 min on one core of an AMD
EPYC (jax 0.10.2, 2026-11-23); docs/results.md has its figures.
"""

from ml_collections import ConfigDict

from she_jax.recipes import base


def get_config() -> ConfigDict:
    """The recipe: what is not here is the run's."""
    full, config = base.get_config(), ConfigDict()
    config.kind = "scalar_reward"
    config.seed = 0  # of the chains and their order
    config.checkpoint = "runs/stage1"  # folder of the policy's run
    config.mesh = full.mesh
    config.cpu_devices = full.cpu_devices
    config.sft = full.sft  # its batch_size counts chains, also where they come in pairs
    config.sft.learning_rate = 3e-4  # at 1e-3 it memorizes the training pairs
    config.sft.steps = 1_200

    config.orm = ConfigDict()
    config.orm.loss = "pointwise"  # pointwise | pairwise
    config.orm.pairs = 8_000  # training pairs on which the policies write chains
    config.orm.rollouts = 2  # chains that each policy writes a pair
    config.orm.eval_pairs = 512  # pairs of each other split to be measured on
    config.orm.batch_size = 256  # chains at a time, when nothing is trained
    return config.lock()
