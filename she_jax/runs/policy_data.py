"""What a reward model's or a filter's run takes from the policy's run it is made for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from she_jax.data.dataset import PreparedDataset, open_split, shuffled_rows
from she_jax.evaluation.evaluate import LONGTAIL
from she_jax.generate.generator import Generator, Sample
from she_jax.generate.language_model import LanguageModel
from she_jax.runs.config import FilterRunConfig, OrmRunConfig, PrmRunConfig
from she_jax.runs.load import load_policy
from she_jax.training.logging import Progress, log
from she_jax.training.setup import TOKENIZER_FILE, prepare_dataset, split_mesh, write_tokenizer
from she_jax.types import Example

RewardRunConfig = PrmRunConfig | OrmRunConfig


def start_from_policy(
    config: RewardRunConfig | FilterRunConfig, workdir: Path, name: str, phases: Sequence[str]
) -> tuple[PreparedDataset, LanguageModel, Any]:
    """The pairs of the policy's run, and the policy: a language model and its parameters.

    The tokenizer is copied to the new run's folder.

    Args:
      config: of the new run.
      workdir: of the new run.
      name: of what begins as the policy, for the log.
      phases: see ``load_policy``.
    """
    dataset = prepare_dataset(config.data)
    mesh, _ = split_mesh(config.mesh, 0)
    lm, params, source = load_policy(config, config.checkpoint, mesh, phases)
    log(f"the {name} begins as {source}")
    if not (workdir / TOKENIZER_FILE).is_file():
        write_tokenizer(workdir, lm.prompts.tokenizer)
    return dataset, lm, params


def measured_splits(dataset: PreparedDataset, eval_split: str) -> list[str]:
    """The splits on which a reward model is measured, if the data set has them."""
    splits = dict.fromkeys((eval_split, LONGTAIL))
    return [split for split in splits if split != "train" and dataset.splits.get(split)]


def drawn_examples(
    dataset: PreparedDataset, split: str, count: int, *, shuffled: bool, block_size: int = 1
) -> list[Example]:
    """Up to ``count`` examples of a split in random order.

    Args:
      dataset: the pairs.
      split: its name.
      count: at most.
      shuffled: the rows are in random order already.
      block_size: rows that stay next to each other, which may have the same query.
    """
    source = open_split(dataset.path, split)
    rows = shuffled_rows(len(source), shuffled=shuffled, block_size=block_size)
    return [source[row] for row in rows[:count].tolist()]


def policy_samples(
    config: RewardRunConfig, examples: Sequence[Example], split: str, k: int, batch_size: int
) -> Iterator[tuple[str, Example, list[Sample]]]:
    """Completions of the run's policies for some pairs: of its cold start, and of its best policy.

    Args:
      config: of the new run.
      examples: the pairs.
      split: where they are from, for the progress bar.
      k: completions of each policy a pair, sampled at temperature 1.
      batch_size: completions at a time.

    Yields:
      The phase that the policy is from, a pair, its k completions.
    """
    mesh, _ = split_mesh(config.mesh, 0)
    for phase in ("sft", "policy"):
        if not (Path(config.checkpoint) / "checkpoints" / phase).is_dir():
            continue
        lm, params, source = load_policy(config, config.checkpoint, mesh, (phase,))
        generator = Generator(lm, batch_size, warn=log)
        with Progress(f"{split}: chains of {source}", total=len(examples)) as progress:
            groups = generator.sample(params, examples, k, config.seed, progress.update)
        for example, samples in zip(examples, groups, strict=True):
            yield phase, example, samples
