"""Trains and measures an examiner, the generative stepwise reward model, for the policy of a run.

The examiner begins as that policy's best, which reads queries and products already. It learns to
judge pairs itself, from chains that the annotation finds right, and then to answer examinations and
to go on judging. At work it writes a chain of its own and compares: a model of this size does not
see in one pass where two lists differ. All is supervised fine-tuning; its pairs, chain and model
are the run's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from she_jax.cot import CotSchema
from she_jax.data.dataset import Prepared, fingerprint, in_no_order, open_split
from she_jax.generate.language_model import Policy
from she_jax.rewards.prm.dataset import (
    POLICY,
    Balanced,
    demonstrated,
    judged,
    put_right,
    read_examinations,
    right_evidence,
    save_examinations,
)
from she_jax.rewards.prm.metrics import examiner_figures, figures_table
from she_jax.rewards.prm.model import EXAMINER, SOLVE, Examiner, describe_examiner
from she_jax.rewards.prm.packing import QuestionFormat
from she_jax.rewards.prm.step_query import Examination
from she_jax.rewards.verifier import with_all_truth
from she_jax.runs.policy_run import begin, policy_samples
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, say
from she_jax.training.packing import two_a_row
from she_jax.training.sft import sft, sft_batch
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import Config
from she_jax.types import Example, SftBatch

NEARBY = 8  # rows to either side among which pairs of the same query are looked for
BESIDE = 4  # rows that stay together where pairs are drawn, so that there are some


def train_examiner(config: Config, workdir: Path) -> None:
    """From the policy's run to a measured examiner: ``summary.json``, and its checkpoints.

    ``examinations/<split>.jsonl`` has every step it was trained and measured on. It learns from
    pairs of the training split only, and is measured on splits that share no query with it.
    """
    summary = workdir / "summary.json"
    if not summary.is_file():
        with StopSignal() as stop:
            made, policy, splits = begin(config, workdir, "examiner", ("srpo", "sft"))
            write_json(workdir / EXAMINER.identity, describe_examiner(policy))
            wanted = {"train": (config.examiner.pairs, config.examiner.policy_pairs)}
            wanted |= {split: (config.examiner.eval_pairs,) * 2 for split in splits}
            pools = {
                split: examinations(config, workdir, made, policy.format.schema, split, *counts)
                for split, counts in wanted.items()
            }
            right = right_chains(config, made, policy.format.schema, pools["train"])
            policy, lines = solve(config, workdir, policy, right, fingerprint(made), stop)
            params = learn(config, workdir, policy, pools["train"], right, lines, stop)
            trained = Policy(**vars(policy) | {"params": params})
            others = {split: pools[split] for split in splits}
            write_json(summary, measure(config, trained, others, own_chain=bool(right)))
    figures = json.loads(summary.read_text(encoding="utf-8"))
    console = Console(highlight=False)
    for way, by_split in figures.items():
        for split, told in by_split.items():
            console.print(figures_table(f"{split}, {way}", told))


def right_chains(
    config: Config, made: Prepared, schema: CotSchema, pool: Sequence[Examination]
) -> dict[str, Example]:
    """By uid, the training pairs all of whose steps are annotated, with a chain that is right.

    None, where the examiner is not to learn to judge pairs.
    """
    if not config.solve.steps:
        return {}
    count, evidence = max(config.examiner.pairs, config.examiner.policy_pairs), right_evidence(pool)
    examples = some_pairs(config, made, "train", count)
    solved = [put_right(one, schema, evidence.get(one.uid, {})) for one in examples]
    if found := {one.uid: one for one in solved if one is not None}:
        return found
    say("no pair has all of its steps annotated: the examiner does not learn to judge pairs")
    return {}


def solve(
    config: Config,
    workdir: Path,
    policy: Policy,
    right: Mapping[str, Example],
    data: str,
    stop: StopSignal,
) -> tuple[Policy, int]:
    """Learns to write right chains, if there are any.

    Args:
      right: see ``right_chains``.
      data: names the pairs.

    Returns:
      The policy with what it learnt, and how many lines ``metrics.jsonl`` has by then.
    """
    if not right:
        return policy, 0
    known = list(right.values())

    def batch_at(position: int) -> tuple[SftBatch, dict[str, int]]:
        rng = np.random.default_rng((config.seed, position))
        drawn = [known[i] for i in rng.integers(len(known), size=config.solve.batch_size)]
        return sft_batch(policy.format, drawn, (config.seed, position))

    own: Config = ConfigDict({"seed": config.seed, "sft": config.solve.to_dict()})
    params, lines = sft(
        own, workdir, policy, batch_at, data, stop, phase=SOLVE, title="judging (SFT)"
    )
    return Policy(**vars(policy) | {"params": params}), lines


def learn(
    config: Config,
    workdir: Path,
    policy: Policy,
    pool: Sequence[Examination],
    right: Mapping[str, Example],
    lines: int,
    stop: StopSignal,
) -> Any:
    """Learns the answers to balanced draws from the pool, and goes on with right chains."""
    drawer = Balanced(pool)
    form = QuestionFormat(prompts=policy.format, answer_length=config.examiner.answer_length)
    chains = {uid: str(example.rationale) for uid, example in right.items()}

    def batch_at(position: int) -> tuple[SftBatch, dict[str, int]]:
        rng = np.random.default_rng((config.seed, position))
        drawn = drawer.draw(config.sft.batch_size, rng)
        own = [chains.get(chain[0].example.uid, "") for chain in drawn] if chains else None
        batch, left_out = form.sft_batch(drawn, config.examiner.room, rng, own)
        return two_a_row(batch), {"left_out": left_out}

    mark = sha256((workdir / "examinations" / "train.jsonl").read_bytes()).hexdigest()[:16]
    params, _ = sft(
        config,
        workdir,
        policy,
        batch_at,
        mark,
        stop,
        lines=lines,
        phase=EXAMINER.kind,
        title="examiner (SFT)",
    )
    return params


# -------------------------------------------------------------------------- what is examined


def examinations(
    config: Config,
    workdir: Path,
    made: Prepared,
    schema: CotSchema,
    split: str,
    pairs: int,
    policy_pairs: int,
) -> list[Examination]:
    """The examinations of a split, from its file where that is there.

    Beyond the training split the truth is judge, not the annotation alone.

    Args:
      pairs: so many pairs of the split give demonstrated steps, right and spoilt.
      policy_pairs: so many give steps of the run's policies, sampled at temperature 1.
    """
    path = workdir / "examinations" / f"{split}.jsonl"
    if path.is_file():
        return read_examinations(path)
    examples = some_pairs(config, made, split, max(pairs, policy_pairs))
    examples = [example for example in examples if example.label is not None]
    said = {example.uid: {"label", *example.annotations} for example in examples}
    if split != "train":
        examples = [with_all_truth(example) for example in examples]
    rng = np.random.default_rng(config.seed)
    found = []
    for row, example in enumerate(examples[:pairs]):
        found += demonstrated(example, _other(examples, row, rng), schema, rng)
    found += policy_steps(config, examples[:policy_pairs], schema, split)
    found = [replace(one, annotated=one.step in said[one.example.uid]) for one in found]
    save_examinations(path, found)
    return found


def some_pairs(config: Config, made: Prepared, split: str, count: int) -> list[Example]:
    """So many pairs of a split, with their neighbours, which may have the same query."""
    source = open_split(made.path, split)
    rows = in_no_order(config.data.name, len(source), together=BESIDE)
    return [source[row] for row in rows[:count].tolist()]


def _other(examples: Sequence[Example], row: int, rng: np.random.Generator) -> Example:
    """Another pair: half the time one nearby of the same query, whose product is alike."""
    near = [
        one
        for one in examples[max(0, row - NEARBY) : row + NEARBY + 1]
        if one.query == examples[row].query and one.uid != examples[row].uid
    ]
    if near and rng.random() < 0.5:
        return near[int(rng.integers(len(near)))]
    return examples[int(rng.integers(len(examples)))]


def policy_steps(
    config: Config, examples: Sequence[Example], schema: CotSchema, split: str
) -> list[Examination]:
    """Steps that the policies of the run write."""
    k, size = config.examiner.rollouts, config.examiner.batch_size
    return [
        step
        for phase, example, samples in policy_samples(config, examples, split, k, size)
        for n, sample in enumerate(samples)
        for step in judged(sample.chain, example, schema, POLICY, f"{example.uid}/{phase}/{n}")
    ]


# -------------------------------------------------------------------------- how good it is


def measure(
    config: Config, trained: Policy, pools: dict[str, list[Examination]], *, own_chain: bool
) -> dict[str, dict[str, Any]]:
    """The figures of each split, verdicts read directly and, with votes, behind critiques."""
    figures: dict[str, dict[str, Any]] = {}
    for votes in sorted({0, config.examiner.votes}):
        examiner = Examiner(
            trained,
            answer_length=config.examiner.answer_length,
            batch_size=config.examiner.batch_size,
            votes=votes,
            own_chain=own_chain,
        )
        way = f"critique_{votes}" if votes else "direct"
        figures[way] = {}
        for split, pool in pools.items():
            with Progress(f"examining {split}, {way}", total=len(pool)) as progress:
                told = examiner.score(pool, jax.random.key(config.seed))
                progress.update(len(pool))
            figures[way][split] = examiner_figures(pool, told)
    return figures
