"""The run of a policy, as those see it who train a reward model for that policy."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from she_jax.data.dataset import Prepared
from she_jax.generate.generator import Judge, Sample
from she_jax.generate.language_model import Policy
from she_jax.training.files import write_text
from she_jax.training.logging import Progress, say
from she_jax.training.setup import load_policy, make_data
from she_jax.training.workdir import Config
from she_jax.types import Example

INHERITED = ("data", "shopworld", "chain", "model")
PHASES = ("sft", "srpo")  # the policies of a run that a reward model hears of


def inherit(config: Config) -> Config:
    """The config with the pairs, the chain and the model of the run ``config.checkpoint``.

    Raises:
      FileNotFoundError: if there is no run.
      ValueError: if the folder belongs to another kind of run, or the run has no cold start yet.
    """
    folder = Path(config.checkpoint)
    path = folder / "config.json"
    hint = "give the folder of a policy's run with --config.checkpoint"
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={folder}: there is no run there; {hint}")
    run = json.loads(path.read_text(encoding="utf-8"))
    if run.get("kind") != "train" or not (folder / "checkpoints" / "sft").is_dir():
        raise ValueError(f"checkpoint={folder}: no policy was trained there; {hint}")
    whole: Config = ConfigDict(config.to_dict() | {name: run[name] for name in INHERITED})
    whole.data.dir = whole.data.dir or str(folder / "data")
    return whole.lock()


def begin(
    config: Config, workdir: Path, name: str, phases: Sequence[str]
) -> tuple[Prepared, Policy, list[str]]:
    """The run's pairs, its policy, and the splits on which to measure what that becomes.

    The tokenizer goes to the new run's folder.

    Args:
      config: an inherited one.
      workdir: of the new run.
      name: of what begins as that policy, for the screen.
      phases: see ``load_policy``.
    """
    made = make_data(config, workdir)
    policy, source = load_policy(config, phases)
    say(f"the {name} begins as {source}")
    write_text(workdir / "tokenizer.json", policy.format.tokenizer.to_str(pretty=True))
    others = dict.fromkeys((config.data.eval_split, "test_longtail"))
    return made, policy, [split for split in others if split != "train" and made.splits.get(split)]


def policy_samples(
    config: Config, examples: Sequence[Example], split: str, k: int, batch_size: int
) -> Iterator[tuple[str, Example, list[Sample]]]:
    """What the policies of the run write of some pairs: its cold start, and its best of SRPO.

    Args:
      config: an inherited one.
      examples: the pairs.
      split: where they are from, for the screen.
      k: completions of each policy a pair, sampled at temperature 1.
      batch_size: completions at a time.

    Yields:
      The phase that made the policy, a pair, its k completions.
    """
    for phase in PHASES:
        if not (Path(config.checkpoint) / "checkpoints" / phase).is_dir():
            continue
        policy, source = load_policy(config, (phase,))
        judge = Judge(policy, batch_size)
        with Progress(f"{split}: chains of {source}", total=len(examples)) as progress:
            groups = judge.samples(policy.params, examples, k, config.seed, progress.update)
        for example, samples in zip(examples, groups, strict=True):
            yield phase, example, samples
