"""A run from the config to the figures: data, cold start, what follows it, judging all along.

The way to the loss: ``launch.py``, here, ``she_jax.runs.policy``, ``she_jax.rl.update``.
"""

from pathlib import Path

from she_jax.runs.curriculum import make_start, run_curriculum
from she_jax.runs.filter import run_filter
from she_jax.runs.outcome_reward import train_scalar
from she_jax.runs.policy import train
from she_jax.runs.policy_run import inherit
from she_jax.runs.predict import evaluate
from she_jax.runs.process_reward import train_examiner
from she_jax.runs.validate import check
from she_jax.training.workdir import Config, claim_workdir, held

KINDS = ("train", "curriculum", "filter", "evaluate", "reward_model", "scalar_reward")


def run(config: Config, workdir: Path) -> None:
    """Does what the config says, or goes on where an earlier run of it stopped.

    Args:
      config: a recipe of ``configs/``.
      workdir: the run's folder.

    Raises:
      ValueError: for a config that cannot be run, or a folder of another one.
      SystemExit: when a signal asked to stop, after saving.
    """
    if config.kind not in KINDS:
        raise ValueError(f"kind={config.kind!r}: expected one of {KINDS}")
    if config.kind == "curriculum":
        run_curriculum(config, workdir, run)
        return
    if config.kind in ("reward_model", "scalar_reward", "filter"):
        config = inherit(config)
    if config.get("before") and config.start:
        make_start(config, workdir, run)
    check(config, workdir)
    claim_workdir(workdir, config)
    own = {
        "filter": run_filter,
        "evaluate": evaluate,
        "reward_model": train_examiner,
        "scalar_reward": train_scalar,
        "train": train,
    }
    with held(workdir):
        own[config.kind](config, workdir)


# -------------------------------------------------------------------------- stages


# -------------------------------------------------------------------------- the cold start
