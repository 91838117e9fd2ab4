"""A process reward model (SHE's "examiner") for the policy of a run.

    python launch.py --config=configs/reward_model.py --config.checkpoint=runs/stage1

Pairs, chain and model are those of that run. It begins as the run's best policy, learns to score
steps, among them those that the run's policies write, and is measured on other queries. Then

    python launch.py --config=configs/stage1.py --config.init_from=runs/stage1/checkpoints/sft \\
        --config.shopworld.seed=100 --config.shopworld.annotated=0.2 \\
        --config.reward.prm=runs/reward_model --config.rl.min_std=0.05 \\
        --config.filter.pairs=0 --workdir=runs/hybrid

trains a policy with it, on new pairs of which a fifth is annotated. Its training took 62 min on one
busy core of an AMD EPYC (2026-11-26), and it finds wrong steps of its policies with an F1 of 0.96
(seed 0); with ``--config.prm.votes=0`` on both cores, 25 min (2026-11-24): docs/results.md.
"""

from ml_collections import ConfigDict

from she_jax.recipes import base


def get_config() -> ConfigDict:
    """The recipe: what is not here is the run's."""
    full, config = base.get_config(), ConfigDict()
    config.kind = "reward_model"
    config.seed = 0  # of the step queries, their order and the sampling
    config.checkpoint = "runs/stage1"  # folder of the policy's run
    config.cpu_devices = full.cpu_devices
    config.mesh = full.mesh
    # First it learns to write correct chains itself (0 steps: it does not) ...
    config.reference_sft = full.sft.copy_and_resolve_references()
    config.reference_sft.steps = 1_200
    config.reference_sft.learning_rate = 1e-3
    config.reference_sft.batch_size = 64
    # ... and then to score steps.
    config.sft = full.sft
    config.sft.steps = 2_000
    config.sft.learning_rate = 1e-3

    config.prm = ConfigDict()
    config.prm.pairs = 40_000  # training pairs that give steps of rationales, correct and corrupted
    config.prm.policy_pairs = 20_000  # training pairs on which the policies write steps
    config.prm.rollouts = 1  # chains that each policy writes a pair
    config.prm.eval_pairs = 512  # pairs of each other split to be measured on
    config.prm.answer_length = 40  # tokens of an answer, the end included
    config.prm.room = 120  # tokens of the answers to one chain in a training row
    config.prm.batch_size = 128  # steps or pairs at a time, when nothing is trained
    config.prm.votes = 1  # also measure it with this many critiques a step; 0: without
    return config.lock()
