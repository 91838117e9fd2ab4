"""Trains and measures an examiner, the generative stepwise reward model, for the policy of a run.

The examiner begins as that policy's best, which reads queries and products already. It learns to
judge pairs itself, from chains that the annotation finds right, and then to answer examinations and
to go on judging. At work it writes a chain of its own and compares: a model of this size does not
see in one pass where two lists differ. All is supervised fine-tuning; its pairs, chain and model
are the run's.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Column, Table
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from she_jax.cot import CotSchema
from she_jax.data.dataset import Prepared, in_no_order, open_split
from she_jax.rewards.prm.dataset import (
    POLICY,
    Balanced,
    demonstrated,
    judged,
    put_right,
    right_evidence,
    with_all_truth,
)
from she_jax.rewards.prm.packing import QuestionFormat
from she_jax.rewards.prm.step_query import Examination
from she_jax.runs.validate import fingerprint
from she_jax.rewards.prm.model import EXAMINER, SOLVE, Examiner, Scores, describe_examiner
from she_jax.training.logging import Progress, say
from she_jax.runs.policy_run import begin, policy_samples
from she_jax.rollouts.page import write_json, write_text
from she_jax.training.setup import Policy
from she_jax.training.sft import sft, sft_batch, two_a_row
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import Config
from she_jax.types import Example, SftBatch

BINS = 10  # of the calibration error
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


def save_examinations(path: Path, found: Iterable[Examination]) -> None:
    """Writes examinations as JSON lines, for people and for ``read_examinations``."""
    lines = []
    for one in found:
        pair = {"uid": one.example.uid, "query": one.example.query}
        rest = {name: value for name, value in vars(one).items() if name != "example"}
        record = pair | {"product": dict(one.example.product)} | rest
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def read_examinations(path: Path) -> list[Examination]:
    """Reads them back; of a pair there is its ``uid``, query and product."""
    found = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            pair = {name: record.pop(name) for name in ("uid", "query", "product")}
            found.append(Examination(example=Example(**pair), **record))
    return found


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


def examiner_figures(pool: Sequence[Examination], told: Scores) -> dict[str, Any]:
    """Scores against the truth, all of them, by step and by source.

    Returns:
      ``n``, ``unreadable`` (left out of the rest), ``incorrect`` (share of wrong steps),
      ``accuracy``, ``f1_incorrect``, ``auroc``, ``ece`` (see ``calibration_error``),
      ``agreement`` (with the verifier, over the steps that humans annotated); the same in
      ``by_step`` and ``by_source``, and for the policy's own steps ``policy_by_step`` and
      ``policy_by_phase`` (``sft`` is its cold start, ``srpo`` its best); and ``first_errors``, see
      there. A figure over nothing, or of one verdict alone where it needs both, is None.
    """
    steps = np.array([one.step for one in pool])
    sources = np.array([one.source for one in pool])
    truth = np.array([one.correct for one in pool], bool)
    annotated = np.array([one.annotated for one in pool], bool)

    def of(chosen: np.ndarray) -> dict[str, Any]:
        """The figures of some of the examinations."""
        return _figures(truth[chosen], annotated[chosen], told, chosen)

    own = sources == POLICY
    phases = np.array([one.chain.split("/")[-2] if one.source == POLICY else "" for one in pool])
    return of(np.ones(len(pool), bool)) | {
        "by_step": {str(name): of(steps == name) for name in dict.fromkeys(steps)},
        "by_source": {str(name): of(sources == name) for name in dict.fromkeys(sources)},
        "policy_by_step": {
            str(name): of(own & (steps == name)) for name in dict.fromkeys(steps[own])
        },
        "policy_by_phase": {str(name): of(phases == name) for name in dict.fromkeys(phases[own])},
        "first_errors": first_errors(pool, told),
    }


def _figures(
    truth: np.ndarray, annotated: np.ndarray, told: Scores, chosen: np.ndarray
) -> dict[str, Any]:
    known = told.known[chosen]
    both = annotated & known
    agree = (told.score[chosen] >= 0.5) == truth
    score, right = told.score[chosen][known], truth[known]
    return {
        "n": len(truth),
        "unreadable": int((~known).sum()),
        "incorrect": float(1 - truth.mean()) if len(truth) else None,
        "f1_incorrect": float(f1_score(~right, score < 0.5)) if not right.all() else None,
        "agreement": float(agree[both].mean()) if both.any() else None,
    } | score_figures(right, score)


def score_figures(right: np.ndarray, score: np.ndarray) -> dict[str, float | None]:
    """``accuracy`` from one half on, ``auroc`` and ``ece`` of probabilities of being right.

    A figure over nothing, or of one outcome alone where it needs both, is None.
    """
    both = len(set(right.tolist())) == 2
    return {
        "accuracy": float(accuracy_score(right, score >= 0.5)) if len(right) else None,
        "auroc": float(roc_auc_score(right, score)) if both else None,
        "ece": calibration_error(right, score) if len(right) else None,
    }


def calibration_error(right: np.ndarray, score: np.ndarray) -> float:
    """Expected calibration error: |share right - mean score| over equal bins, weighted by size.

    Guo et al. (arXiv 1706.04599), equation 3, for P(correct) in ``BINS`` bins.
    """
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    gaps = np.bincount(place, right, BINS) - np.bincount(place, score, BINS)
    return float(np.abs(gaps).sum() / len(right))


def first_errors(pool: Sequence[Examination], told: Scores) -> dict[str, Any]:
    """How well the first error of the policy's chains is found.

    Returns:
      ``found``: the share, among chains with a wrong step, of those whose first wrong step is the
      first that the examiner calls incorrect; ``spared``: the share, among the others, of those in
      which it calls none incorrect; ``wrong`` and ``right``, how many of each there are. An unknown
      step is not called incorrect.
    """
    chains: dict[str, list[tuple[bool, bool]]] = {}
    for one, score, known in zip(pool, told.score, told.known, strict=True):
        if one.source == POLICY:
            called = bool(known and score < 0.5)
            chains.setdefault(one.chain, []).append((not one.correct, called))
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for steps in chains.values():
        wrong, called = ([n for n, step in enumerate(steps) if step[i]][:1] for i in (0, 1))
        hits[bool(wrong)].append(wrong == called)
    share = {flag: float(np.mean(own)) if own else None for flag, own in hits.items()}
    return {
        "found": share[True],
        "spared": share[False],
        "wrong": len(hits[True]),
        "right": len(hits[False]),
    }


def figures_table(title: str, told: dict[str, Any]) -> Table:
    """The figures of one split for the screen."""
    columns = ("n", "incorrect", "accuracy", "f1_incorrect", "auroc", "ece", "agreement")
    columns += ("unreadable",)
    rows = {"all": told}
    rows |= {f"step {name}": own for name, own in told["by_step"].items()}
    rows |= {f"source {name}": own for name, own in told["by_source"].items()}
    rows |= {f"policy's {name}": own for name, own in told["policy_by_step"].items()}
    rows |= {f"policy after {name}": own for name, own in told["policy_by_phase"].items()}
    table = rows_table(title, columns, rows)
    first = told["first_errors"]
    if first["found"] is not None:
        table.caption = f"first errors found: {first['found']:.3f} of {first['wrong']} chains"
    return table


def rows_table(title: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Figures for the screen: a row each under its name, a column a figure, a dash for None."""
    # In 80 columns there is room for the names and the figures; longer headings are folded.
    figure = {"min_width": 5, "justify": "right", "overflow": "fold"}
    headings = [Column(name.replace("_", " "), **figure) for name in columns]
    style = {"box": box.SIMPLE, "padding": (0, 1, 0, 0)}
    table = Table(Column(no_wrap=True), *headings, title=title, **style)
    for name, own in rows.items():
        cells = [own[column] for column in columns]
        table.add_row(
            name,
            *("-" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells),
        )
    return table
