"""Stage 1: a cold start on a fallible teacher's chains, then SRPO on human annotation.

``python launch.py --config=configs/stage1.py`` takes 5 min 49 s on 2 cores of an AMD EPYC (jax
0.10.2, 2026-11-23), and takes macro F1 on ShopWorld's test split from 0.59, 0.60 and 0.59 to 0.98,
0.89 and 0.94 on seeds 0 to 2 (5d6f610, 2026-11-30: docs/results.md).

``python launch.py --config=configs/stage1.py:model=smollm2,data=esci --config.data.path=DIR`` is
sized for an accelerator; docs/results.md has the shorter form that was run on a CPU.
"""

from typing import Any

from ml_collections import ConfigDict

from she_jax.recipes import base

CHOICES = {
    "model": ("scratch", "smollm2"),
    "data": ("shopworld", "esci", "wands", "table", "jsonl", "trec"),
}


def get_config(arg: str = "") -> Any:
    """The recipe; ``arg`` is empty or such as ``model=smollm2,data=esci``.

    Raises:
      ValueError: for an argument that is not among ``CHOICES``.
    """
    config = base.get_config()
    for part in filter(None, arg.split(",")):
        key, _, value = part.partition("=")
        if value not in CHOICES.get(key, ()):
            choices = "; ".join(f"{k}={'|'.join(v)}" for k, v in CHOICES.items())
            raise ValueError(f"stage1.py:{part}: expected {choices}")
        config[key].name = value
    # Foundation: prompts that the cold start solves sometimes, neither always nor hardly ever.
    config.rl.steps = 60
    config.rl.eval_every = 30
    config.rl.difficulty = "medium"
    config.rl.dynamic_sampling_rounds = 1
    config.filter.pairs = 3_000
    config.filter.size = 1_500
    config.filter.low = 0.2  # two of eight rollouts correct
    config.filter.high = 0.9  # to seven of eight
    if config.model.name == "smollm2":
        _smollm2(config)
    return config


def _smollm2(config: ConfigDict) -> None:
    """SmolLM2-135M-Instruct: longer texts, lower rates, fewer and smaller updates."""
    config.update_from_flattened_dict(
        {
            "cpu_devices": 1,  # a second one would hold another copy of the parameters
            "sft.learning_rate": 1e-4,
            "sft.batch_size": 16,
            "sft.steps": 240,
            "sft.warmup": 20,
            "sft.micro_batches": 1,
            "sft.checkpoint_every": 60,
            "filter.pairs": 512,
            "filter.size": 256,
            "rl.learning_rate": 1e-5,
            "rl.steps": 60,
            "rl.prompts": 8,
            "rl.group_size": 8,
            "rl.loss.micro_batches": 8,
            "rl.eval_every": 30,
            "rl.checkpoint_every": 20,
            "rl.sample_every": 20,
            "reward.batch_size": 64,
            "eval.batch_size": 32,
            "eval.pass_pairs": 64,
            "data.eval_pairs": 256,
        }
    )
