"""Learning from chains that are there before the first update: more SFT, and DPO.

All are made with the policy as it begins, from the prompts and with the number of rollouts that
learning online would have had: the same annotation, the same sampling, the same updates.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from she_jax.cot import CotSchema
from she_jax.data.dataset import ExampleSource
from she_jax.data.rationales import write_chain
from she_jax.generate.generator import Judge, Sample
from she_jax.generate.language_model import Policy
from she_jax.generate.prompts import PromptFormat
from she_jax.rewards.prm.model import Examiner, examine_chains, load_examiner
from she_jax.rewards.verifier import FULL_MARKS, left_out, verify
from she_jax.rl.update import make_scorer
from she_jax.rollouts.prompt_source import left_over, make_pool
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, say
from she_jax.training.packing import completion_batch, two_a_row
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import MISSED, Config
from she_jax.types import DpoBatch, Example, SftBatch, TrainState


class Completion(NamedTuple):
    """A pair and one chain for it, as tokens, the end included."""

    example: Example
    tokens: tuple[int, ...]


class Offline:
    """What both ways of learning offline share.

    Args:
      config: of the run.
      workdir: its folder.
      policy: model, prompts and devices; its parameters are not read.
      reference: the parameters that the policy begins with.
      source: the prompts.
      judge: samples.
      stop: asks to stop; honoured between two batches of rollouts.

    Raises:
      SystemExit: when it asked.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        policy: Policy,
        reference: Any,
        source: Sequence[Example] | ExampleSource,
        judge: Judge,
        stop: StopSignal,
    ):
        self._config, self._workdir, self._stop = config, workdir, stop
        self._policy, self._reference = policy, reference
        self._prompts, self._judge = offline_prompts(config, source), judge
        self._rows: list[tuple[Completion, ...]] = []  # what an update takes one by one
        self._sampled = 0

    @property
    def state(self) -> dict[str, Any]:
        """Tokens that were sampled, and what tells one set of chains from another."""
        told = repr([[one.tokens for one in row] for row in self._rows])
        return {"sampled_tokens": self._sampled, "chains": sha256(told.encode()).hexdigest()}

    def begin(self, state: Mapping[str, Any], start: int) -> None:
        """Checks that the chains, which are made anew, are the ones that a checkpoint began with.

        Raises:
          ValueError: if they are not.
        """
        if state["chains"] != self.state["chains"]:
            raise ValueError(
                "the chains sampled now are not those of the last checkpoint: go on with the same "
                "machine, devices and versions, or start anew in another --workdir"
            )

    def after(self, step: int, params: Any, figures: Mapping[str, float], last: bool) -> bool:
        """Nothing to do."""
        return False

    def _sample(self) -> list[list[Sample]]:
        """A group of rollouts for each prompt."""
        with Progress("rollouts, of prompts", total=len(self._prompts)) as progress:

            def show(count: int) -> None:
                progress.update(count)
                self._leave_if_asked()

            size, seed = self._config.rl.group_size, self._config.seed + 1
            groups = self._judge.samples(self._reference, self._prompts, size, seed, show)
        self._sampled = sum(len(sample.tokens) for group in groups for sample in group)
        return groups

    def _leave_if_asked(self) -> None:
        if self._stop:
            say(f"{self._stop.name}: the same command samples these rollouts anew")
            raise SystemExit(self._stop.exit_code)


class Imitation(Offline):
    """More supervised fine-tuning, on chains for the prompts that learning online would meet.

    ``offline.chains`` says which: ``written``, the data set's own (a teacher's, or gold ones: what
    SFT reaches where someone writes them); ``rejection``, the policy's own, sampled, as far as they
    agree with all that humans said of the pair and, where there is an examiner (``reward.model``),
    with what it says of the other steps; ``missed.json`` in the run's folder names the labelled
    pairs without one, on which a stage after it may learn (``rl.missed``), and all pairs met so
    far.

    Raises:
      ValueError: if no sampled chain agrees with the annotation.
    """

    title = "SFT"
    shown: tuple[str, ...] = ("loss",)

    def __init__(self, *args: Any):
        super().__init__(*args)
        own = self._policy.format
        if self._config.offline.chains == "written":
            self._rows = [(one,) for one in written(self._prompts, own, self._config.seed)]
            return
        groups = self._sample()
        right = agreeing(self._prompts, groups, own.schema)
        labelled = {one.uid for one in self._prompts if one.label is not None}
        met = {one.uid for one in self._prompts}
        say(
            f"{len(right):,} of {sum(map(len, groups)):,} rollouts agree with the annotation and "
            "differ from each other"
        )
        if silent := len(met - labelled):
            say(f"{silent:,} of {len(met):,} pairs have no label that a rollout could agree with")
        if self._config.reward.model and right:
            right = self._approved(right)
        if not right:
            raise ValueError(
                "no rollout is right: train a better cold start, sample more (rl.group_size, "
                "rl.steps), or do without an examiner, if there is one (reward.model)"
            )
        self._rows = [(Completion(one, sample.tokens),) for one, sample in right]
        found = {one.example.uid for (one,) in self._rows}
        left, before = left_over(self._config) if self._config.rl.missed else (set(), set())
        told = {"missed": sorted((labelled | left) - found), "met": sorted(met | before)}
        write_json(self._workdir / MISSED, told)

    def _approved(self, told: Sequence[tuple[Example, Sample]]) -> list[tuple[Example, Sample]]:
        """Those of some rollouts that the examiner approves of."""
        examiner, schema = load_examiner(self._config), self._policy.format.schema
        key, kept = jax.random.key(self._config.seed + 1), []
        with Progress("rollouts, examined", total=len(told)) as progress:
            for first in range(0, len(told), self._config.eval.batch_size):
                self._leave_if_asked()
                part = told[first : first + self._config.eval.batch_size]
                own = jax.random.fold_in(key, first)
                good = approved(part, examiner, schema, own)
                kept += [one for one, fine in zip(part, good, strict=True) if fine]
                progress.update(first + len(part))
        say(f"of these, {len(kept):,} have no step that the examiner calls wrong")
        return kept

    def batch(self, state: TrainState, step: int) -> tuple[SftBatch, dict[str, float]]:
        """The next rows, as many as an update online has; shuffled anew each time round."""
        rl = self._config.rl
        rows = shuffled(self._rows, rl.prompts * rl.group_size, step, self._config.seed)
        batch, cut = as_batch(self._policy.format, [one for row in rows for one in row])
        return two_a_row(batch), {"cut_prompts": cut}


class Preferences(Offline):
    """DPO on the policy's own rollouts: one with the right label is preferred to one without.

    As TaoSR1 (arXiv 2508.12365) does it: sampled offline, pass@N, the policy as it begins is the
    reference. Each rollout is in one pair at most, and no two pairs are alike.

    Raises:
      ValueError: if no group has both a right and a wrong rollout.
    """

    title = "DPO"
    shown: tuple[str, ...] = ("loss", "accuracy")

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._rows += preferred(self._prompts, self._sample(), self._config.seed)
        say(f"{len(self._rows):,} pairs of a right and a wrong rollout")
        if not self._rows:
            raise ValueError(
                "no group has both a right and a wrong rollout: sample more (rl.group_size)"
            )
        self._score = make_scorer(
            self._policy.model.forward,
            start=self._policy.format.prompt_length,
            micro_batches=self._config.rl.loss.micro_batches,
            group_size=2,
        )

    def batch(self, state: TrainState, step: int) -> tuple[DpoBatch, dict[str, float]]:
        """The next pairs: as many rows as an update online has."""
        rl = self._config.rl
        pairs = shuffled(self._rows, rl.prompts * rl.group_size // 2, step, self._config.seed)
        rows, cut = as_batch(self._policy.format, [one for pair in pairs for one in pair])
        ref_logps = self._score(self._reference, rows.tokens, rows.positions, jnp.float32(1.0))
        batch = DpoBatch(
            tokens=rows.tokens,
            positions=rows.positions,
            weights=rows.weights,
            ref_logps=ref_logps,
            prompt_length=rows.prompt_length,
        )
        return batch, {"cut_prompts": cut}


def offline_prompts(config: Config, source: Sequence[Example] | ExampleSource) -> list[Example]:
    """The prompts that learning online would meet, in its order; ``offline.pairs`` of them."""
    rl, pool = config.rl, make_pool(config, source, {})
    count = config.offline.pairs or rl.steps * rl.prompts
    drawn = [example for _ in range(-(-count // rl.prompts)) for example in pool.draw()]
    return drawn[:count]


def written(prompts: Sequence[Example], own: PromptFormat, seed: int) -> list[Completion]:
    """The data set's own chain for each prompt, cut where it is longer than a completion may be."""
    rng = np.random.default_rng(seed)
    tokens, mask, cut = own.chains([write_chain(one, own.schema, rng) for one in prompts])
    if cut:
        say(f"{cut:,} of {len(prompts):,} chains are cut: raise model.completion_length")
    return [
        Completion(one, tuple(ids[real].tolist()))
        for one, ids, real in zip(prompts, tokens, mask, strict=True)
    ]


def agreeing(
    prompts: Sequence[Example], groups: Sequence[Sequence[Sample]], schema: CotSchema
) -> list[tuple[Example, Sample]]:
    """The rollouts that say of every step and of the label what humans said, each chain once."""
    kept = {
        (example.uid, sample.text): (example, sample)
        for example, group in zip(prompts, groups, strict=True)
        for sample in group
        if not sample.truncated and _agrees(sample, example, schema)
    }
    return list(kept.values())


def _agrees(sample: Sample, example: Example, schema: CotSchema) -> bool:
    rewards, known = verify(sample.chain, example, schema)
    right = sample.chain.well_formed and sample.chain.label == example.label
    whole = not left_out(sample.chain, example, schema).any()
    return bool(right and whole and (rewards[known] >= FULL_MARKS).all())


def approved(
    told: Sequence[tuple[Example, Sample]], examiner: Examiner, schema: CotSchema, key: Array
) -> list[bool]:
    """Whether the examiner calls none of a rollout's steps wrong, of those humans did not look at.

    Reconstruction: rejection sampling by the hybrid. A step is wrong with a P(correct) below 1/2.

    Args:
      told: pairs and rollouts for them.
      key: of the examiner's critiques, consumed.
    """
    examples, chains = [one for one, _ in told], [sample.chain for _, sample in told]
    scores = examine_chains(examiner, chains, examples, schema, key)
    human = np.stack(
        [verify(chain, one, schema)[1] for chain, one in zip(chains, examples, strict=True)]
    )
    wrong = ~human & scores.known & (scores.score < 0.5)
    return [not row.any() for row in wrong]


def preferred(
    prompts: Sequence[Example], groups: Sequence[Sequence[Sample]], seed: int
) -> list[tuple[Completion, Completion]]:
    """Pairs of a rollout with the right label and one without, different ones, drawn by chance."""
    rng = np.random.default_rng((seed, 0))
    pairs = {}
    for example, group in zip(prompts, groups, strict=True):
        different = list({sample.text: sample for sample in group}.values())
        order = [different[n] for n in rng.permutation(len(different))]
        whole = [s for s in order if s.chain.well_formed and not s.truncated]
        right = [s for s in whole if s.chain.label == example.label]
        wrong = [s for s in order if s.chain.label != example.label]
        for better, worse in zip(right, wrong, strict=False):
            key = example.uid, better.text, worse.text
            pairs[key] = Completion(example, better.tokens), Completion(example, worse.tokens)
    return list(pairs.values())


def shuffled(rows: Sequence[Any], size: int, step: int, seed: int) -> list[Any]:
    """Rows ``step * size`` and on of an endless series, every row once each time round."""
    places = np.arange(step * size, (step + 1) * size)
    rounds = np.unique(places // len(rows))
    order = {n: np.random.default_rng((seed, 1, n)).permutation(len(rows)) for n in rounds}
    return [rows[order[place // len(rows)][place % len(rows)]] for place in places]


def as_batch(own: PromptFormat, rows: Sequence[Completion]) -> tuple[SftBatch, int]:
    """Completions behind their prompts, to be trained on; and how many prompts had to be cut."""
    tokens = np.full((len(rows), own.completion_length), own.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for n, row in enumerate(rows):
        tokens[n, : len(row.tokens)] = row.tokens
        mask[n, : len(row.tokens)] = True
    return completion_batch(own, [row.example for row in rows], tokens, mask)
