"""Training on chains that exist before the first update: rejection-sampling fine-tuning and DPO.

Rollouts are sampled once, by the policy that training starts from, with the prompts and the number
of rollouts that online training would have: the same annotation, sampling and updates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from she_jax.cot import CotSchema
from she_jax.data.rationales import write_chain
from she_jax.generate.generator import Generator, Sample
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.prompts import PromptFormat
from she_jax.rewards.prm.model import ProcessRewardModel, score_steps
from she_jax.rewards.verifier import FULL_REWARD, missing_steps, verify
from she_jax.rl.update import make_scorer
from she_jax.rollouts.prompt_source import (
    UNSOLVED,
    Examples,
    PromptConfig,
    read_unsolved,
)
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, log
from she_jax.training.packing import completion_batch, pack_pairs
from she_jax.training.stop import StopSignal
from she_jax.types import DpoBatch, Example, SftBatch, TrainState, UserError

CHAINS = ("rejection", "written")


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """How offline training samples and forms its batches.

    Attributes:
      group_size: rollouts a prompt.
      rows: chains an update reads.
      micro_batches: parts in which a batch is worked through.
      pairs: number of prompts; 0 for as many as online training would draw.
      seed: of sampling and order.
      batch_size: rollouts that the process reward model scores at a time.
      chains: for SFT, ``rejection`` (the policy's own correct rollouts) or ``written`` (the data
        set's chains).
      beta: of DPO, > 0.

    Raises:
      ValueError: if a value is out of its range.
    """

    group_size: int
    rows: int
    micro_batches: int
    pairs: int
    seed: int
    batch_size: int
    chains: str = "rejection"
    beta: float = 0.1

    def __post_init__(self):
        if self.chains not in CHAINS:
            raise ValueError(f"offline.chains={self.chains!r}: expected one of {CHAINS}")
        if self.pairs < 0:
            raise ValueError(f"offline.pairs={self.pairs}: expected 0 (as many as online) or more")
        if not self.beta > 0:
            raise ValueError(f"offline.beta={self.beta}: expected a positive number")


class TokenizedChain(NamedTuple):
    """A pair and one chain for it as token ids, the end-of-sequence token included."""

    example: Example
    tokens: tuple[int, ...]


class OfflineSource:
    """What both kinds of offline training share; a batch source.

    Args:
      lm: model, prompts and devices.
      reference: the parameters that training starts from; they sample.
      prompts: returns the training prompts; called once, when the first update is due.
      generator: samples.
      config: sizes and seeds.
      fingerprint: of the data.
      stop: checked between two batches of rollouts.
    """

    def __init__(
        self,
        lm: LanguageModel,
        reference: Any,
        prompts: Callable[[], list[Example]],
        generator: Generator,
        config: OfflineConfig,
        *,
        fingerprint: str,
        stop: StopSignal,
    ):
        self._lm, self._reference, self._config = lm, reference, config
        self._load_prompts, self._generator, self._stop = prompts, generator, stop
        self.fingerprint = fingerprint
        self._prompts: list[Example] = []
        self._rows: list[tuple[TokenizedChain, ...]] = []  # what an update takes one by one
        self._sampled = 0

    @property
    def state(self) -> dict[str, Any]:
        """Tokens sampled, and a digest of the chains."""
        tokens = repr([[chain.tokens for chain in row] for row in self._rows])
        return {"sampled_tokens": self._sampled, "chains": sha256(tokens.encode()).hexdigest()}

    def begin(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Samples the chains, anew after an interruption, and checks that they are the same.

        Raises:
          UserError: if they differ from those the checkpoint began with.
          SystemExit: after a signal.
        """
        self._prompts = self._load_prompts()
        self._rows = self._make_rows()
        if state is not None and state["chains"] != self.state["chains"]:
            raise UserError(
                "the chains sampled now are not those of the last checkpoint: resume with the "
                "same machine, devices and versions, or start anew in another --workdir"
            )

    def on_step_end(self, step: int, params: Any, metrics: Mapping[str, float], last: bool) -> bool:
        """Nothing to do."""
        return False

    def _make_rows(self) -> list[tuple[TokenizedChain, ...]]:
        """The chains to train on, in the units that are shuffled."""
        raise NotImplementedError

    def _sample(self) -> list[list[Sample]]:
        """A group of rollouts for each prompt."""
        with Progress("rollouts, of prompts", total=len(self._prompts)) as progress:

            def show(count: int) -> None:
                progress.update(count)
                self._leave_if_asked()

            size, seed = self._config.group_size, self._config.seed + 1
            groups = self._generator.sample(self._reference, self._prompts, size, seed, show)
        self._sampled = sum(len(sample.tokens) for group in groups for sample in group)
        return groups

    def _leave_if_asked(self) -> None:
        if self._stop:
            log(f"{self._stop.name}: the same command samples these rollouts anew")
            raise SystemExit(self._stop.exit_code)


class RejectionSampling(OfflineSource):
    """Supervised fine-tuning on chains for the prompts that online training would draw.

    ``config.chains`` selects them. ``written``: the data set's own chains (a teacher's, or gold
    ones). ``rejection``: the policy's own rollouts that agree with the whole annotation of the pair
    and, with a process reward model, have no step that it scores below 1/2 among the others.
    ``unsolved.json`` in the run's folder then names the labeled pairs without such a rollout and
    all pairs seen, for a later stage with ``rl.unsolved_share``.

    Args:
      workdir: the run's folder.
      load_prm: loads the process reward model, or None.
      earlier: the checkpoints of the run whose unsolved pairs this one continues with, or "".
      args, kwargs: as for ``OfflineSource``.
    """

    title, phase = "SFT", "rft"
    shown: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        *args: Any,
        workdir: Path,
        load_prm: Callable[[], ProcessRewardModel] | None = None,
        earlier: str = "",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._workdir, self._load_prm, self._earlier = workdir, load_prm, earlier

    def _make_rows(self) -> list[tuple[TokenizedChain, ...]]:
        """One chain a row.

        Raises:
          UserError: if no rollout agrees with the annotation.
        """
        prompts = self._lm.prompts
        if self._config.chains == "written":
            chains = written_chains(self._prompts, prompts, self._config.seed)
            return [(chain,) for chain in chains]
        groups = self._sample()
        correct = correct_rollouts(self._prompts, groups, prompts.schema)
        labeled = {example.uid for example in self._prompts if example.label is not None}
        seen = {example.uid for example in self._prompts}
        log(
            f"{len(correct):,} of {sum(map(len, groups)):,} rollouts agree with the annotation and "
            "differ from each other"
        )
        if unlabeled := len(seen - labeled):
            log(f"{unlabeled:,} of {len(seen):,} pairs have no label to agree with")
        if self._load_prm is not None and correct:
            correct = self._accepted(correct, self._load_prm())
        if not correct:
            raise UserError(
                "no rollout is correct: train a better cold start, sample more (rl.group_size, "
                "rl.steps), or leave out the process reward model, if there is one (reward.prm)"
            )
        solved = {example.uid for example, _ in correct}
        unsolved, earlier = read_unsolved(self._earlier) if self._earlier else (set(), set())
        record = {
            "unsolved": sorted((labeled | unsolved) - solved),
            "seen": sorted(seen | earlier),
        }
        write_json(self._workdir / UNSOLVED, record)
        return [(TokenizedChain(example, sample.tokens),) for example, sample in correct]

    def _accepted(
        self, rollouts: Sequence[tuple[Example, Sample]], prm: ProcessRewardModel
    ) -> list[tuple[Example, Sample]]:
        """The rollouts in which the process reward model finds no wrong step."""
        key, kept = jax.random.key(self._config.seed + 1), []
        size = self._config.batch_size
        with Progress("rollouts, scored", total=len(rollouts)) as progress:
            for first in range(0, len(rollouts), size):
                self._leave_if_asked()
                part = rollouts[first : first + size]
                part_key = jax.random.fold_in(key, first)
                flags = accepted_by_prm(part, prm, self._lm.prompts.schema, part_key)
                kept += [rollout for rollout, good in zip(part, flags, strict=True) if good]
                progress.update(first + len(part))
        log(f"of these, {len(kept):,} have no step that the process reward model calls wrong")
        return kept

    def batch(self, state: TrainState, step: int) -> tuple[SftBatch, dict[str, float]]:
        """The next chains, as many as an online update has; shuffled anew each epoch."""
        rows = shuffled(self._rows, self._config.rows, step, self._config.seed)
        batch, cut = chain_batch(self._lm.prompts, [chain for row in rows for chain in row])
        return pack_pairs(batch), {"cut_prompts": cut}


class PreferencePairs(OfflineSource):
    """DPO on the policy's own rollouts: a correct label is preferred to a wrong one.

    As in TaoSR1 (arXiv 2508.12365): sampled offline, pass@N; the policy that training starts from
    is the reference. Each rollout is in at most one pair, and no two pairs are alike.
    """

    title, phase = "DPO", "dpo"
    shown: tuple[str, ...] = ("loss", "accuracy")

    def _make_rows(self) -> list[tuple[TokenizedChain, ...]]:
        """A pair a row, the chosen chain first.

        Raises:
          UserError: if no group has both a correct and a wrong rollout.
        """
        pairs = preference_pairs(self._prompts, self._sample(), self._config.seed)
        log(f"{len(pairs):,} pairs of a correct and a wrong rollout")
        if not pairs:
            raise UserError(
                "no group has both a correct and a wrong rollout: sample more (rl.group_size)"
            )
        self._score = make_scorer(
            self._lm.model.forward,
            start=self._lm.prompts.prompt_length,
            micro_batches=self._config.micro_batches,
            group_size=2,
        )
        return list(pairs)

    def batch(self, state: TrainState, step: int) -> tuple[DpoBatch, dict[str, float]]:
        """The next pairs: as many rows as an online update has."""
        pairs = shuffled(self._rows, self._config.rows // 2, step, self._config.seed)
        rows, cut = chain_batch(self._lm.prompts, [chain for pair in pairs for chain in pair])
        ref_logps = self._score(self._reference, rows.tokens, rows.positions, jnp.float32(1.0))
        batch = DpoBatch(
            tokens=rows.tokens,
            positions=rows.positions,
            loss_weights=rows.loss_weights,
            ref_logps=ref_logps,
            prompt_length=rows.prompt_length,
        )
        return batch, {"cut_prompts": cut}


def offline_prompts(config: PromptConfig, pairs: int, source: Examples) -> list[Example]:
    """The prompts that online training would draw, in its order.

    Args:
      config: which prompts.
      pairs: how many; 0 for as many as online training draws.
      source: the stage's examples.
    """
    pool, count = config.pool(source, {}), pairs or config.steps * config.prompts
    drawn = [example for _ in range(-(-count // config.prompts)) for example in pool.draw()]
    return drawn[:count]


def written_chains(
    examples: Sequence[Example], prompts: PromptFormat, seed: int
) -> list[TokenizedChain]:
    """The data set's own chain for each prompt, cut to the completion length."""
    rng = np.random.default_rng(seed)
    texts = [write_chain(example, prompts.schema, rng) for example in examples]
    tokens, mask, cut = prompts.encode_chains(texts)
    if cut:
        log(f"{cut:,} of {len(examples):,} chains are cut: raise model.completion_length")
    return [
        TokenizedChain(example, tuple(ids[real].tolist()))
        for example, ids, real in zip(examples, tokens, mask, strict=True)
    ]


def correct_rollouts(
    examples: Sequence[Example], groups: Sequence[Sequence[Sample]], schema: CotSchema
) -> list[tuple[Example, Sample]]:
    """The rollouts whose steps and label all agree with the annotation, each chain once."""
    kept = {
        (example.uid, sample.text): (example, sample)
        for example, group in zip(examples, groups, strict=True)
        for sample in group
        if not sample.truncated and _agrees(sample, example, schema)
    }
    return list(kept.values())


def _agrees(sample: Sample, example: Example, schema: CotSchema) -> bool:
    rewards, known = verify(sample.chain, example, schema)
    label_correct = sample.chain.well_formed and sample.chain.label == example.label
    complete = not missing_steps(sample.chain, example, schema).any()
    return bool(label_correct and complete and (rewards[known] >= FULL_REWARD).all())


def accepted_by_prm(
    rollouts: Sequence[tuple[Example, Sample]],
    prm: ProcessRewardModel,
    schema: CotSchema,
    key: Array,
) -> list[bool]:
    """Whether the process reward model calls no step of a rollout wrong, of those not annotated.

    Reconstruction: rejection sampling by the hybrid. A step is wrong with a P(correct) below 1/2.

    Args:
      rollouts: pairs and rollouts for them.
      prm: the process reward model.
      schema: the steps.
      key: of its critiques, consumed.
    """
    examples = [example for example, _ in rollouts]
    chains = [sample.chain for _, sample in rollouts]
    scores = score_steps(prm, chains, examples, schema, key)
    annotated = np.stack(
        [verify(chain, example, schema)[1] for chain, example in zip(chains, examples, strict=True)]
    )
    wrong = ~annotated & scores.known & (scores.score < 0.5)
    return [not row.any() for row in wrong]


def preference_pairs(
    examples: Sequence[Example], groups: Sequence[Sequence[Sample]], seed: int
) -> list[tuple[TokenizedChain, TokenizedChain]]:
    """Pairs of a rollout with the correct label and one without, all different, drawn at random."""
    rng = np.random.default_rng((seed, 0))
    pairs = {}
    for example, group in zip(examples, groups, strict=True):
        different = list({sample.text: sample for sample in group}.values())
        order = [different[n] for n in rng.permutation(len(different))]
        whole = [s for s in order if s.chain.well_formed and not s.truncated]
        correct = [s for s in whole if s.chain.label == example.label]
        wrong = [s for s in order if s.chain.label != example.label]
        for chosen, rejected in zip(correct, wrong, strict=False):
            key = example.uid, chosen.text, rejected.text
            pairs[key] = (
                TokenizedChain(example, chosen.tokens),
                TokenizedChain(example, rejected.tokens),
            )
    return list(pairs.values())


def shuffled(rows: Sequence[Any], size: int, step: int, seed: int) -> list[Any]:
    """Rows ``step * size`` and on of an endless series, every row once an epoch."""
    indices = np.arange(step * size, (step + 1) * size)
    epochs = np.unique(indices // len(rows))
    order = {n: np.random.default_rng((seed, 1, n)).permutation(len(rows)) for n in epochs}
    return [rows[order[index // len(rows)][index % len(rows)]] for index in indices]


def chain_batch(prompts: PromptFormat, chains: Sequence[TokenizedChain]) -> tuple[SftBatch, int]:
    """Chains after their prompts, to be trained on, and the number of prompts that were cut."""
    tokens = np.full((len(chains), prompts.completion_length), prompts.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for n, chain in enumerate(chains):
        tokens[n, : len(chain.tokens)] = chain.tokens
        mask[n, : len(chain.tokens)] = True
    return completion_batch(prompts, [chain.example for chain in chains], tokens, mask)
