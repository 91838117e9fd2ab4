"""The examiner at work: it scores the steps of rollouts, a batch of questions at a time."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int

from she_jax.cot import Chain, CotSchema
from she_jax.data.examinations import FULL_MARKS
from she_jax.data.prompts import positions
from she_jax.data.questions import Branch, Question, QuestionFormat
from she_jax.examination import (
    CRITIQUE,
    VERDICT,
    Examination,
    read_answer,
    write_critique,
    written_steps,
)
from she_jax.models.sharding import batch_sharding
from she_jax.rl.sampling import jit_sample
from she_jax.train.predict import Judge
from she_jax.train.reward_folder import RewardFolder, tokenizer_digest
from she_jax.train.setup import Policy, examiner_mesh, make_policy
from she_jax.train.workdir import Config
from she_jax.types import Example

SOLVE = "solve"  # the phase in which an examiner learns to judge pairs
OWN_BATCH = 32  # pairs at a time for which it writes chains of its own
WIDTHS = 8  # sizes at most of the rows in which it reads verdicts; each is compiled ...
STEP = 16  # ... and they are no fewer tokens apart than that
READABLE = 0.5  # share of the probability that the two verdicts must hold between them
EXAMINER = RewardFolder(
    key="reward.model", kind="reward_model", name="examiner", identity="examiner.json"
)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the examiner says of some steps: P(correct), good only where ``known``."""

    score: Float32[np.ndarray, "..."]
    known: Bool[np.ndarray, "..."]


class Examiner:
    """A language model that examines steps.

    The score of a step is the probability of ``correct`` against ``incorrect`` as the verdict:
    read directly, all steps of a chain in one row, or behind a critique: its most likely one, or
    each of several that it samples, the scores averaged. It is unknown where the two verdicts hold
    less than ``READABLE`` of the probability, where no critique can be read, or where a chain is
    longer than chains may be. Questions are told apart by their tokens, and in one call each is
    asked once. Batches have one shape, or one of ``WIDTHS`` where verdicts are read.

    Args:
      policy: the examiner's model, parameters, prompts and devices.
      answer_length: see ``QuestionFormat``.
      batch_size: chains at a time, or questions where critiques are wanted.
      votes: critiques a step; 0 reads the verdict directly, 1 takes the most likely critique.
      own_chain: without votes, it writes the most likely chain of its own for each pair and reads
        the verdict behind the critique that ``write_critique`` makes of the two chains. Unknown
        where its own chain is not well formed.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        answer_length: int,
        batch_size: int,
        votes: int = 0,
        own_chain: bool = False,
    ):
        self.format = QuestionFormat(prompts=policy.format, answer_length=answer_length)
        self.asked = self.repeated = 0  # of the last call: put to the model, and asked before
        self.policy, self._votes = policy, votes
        devices = policy.mesh.shape["data"] * policy.mesh.shape["fsdp"]
        self._branches = len(policy.format.schema.steps)  # questions of one chain, read in a row
        self._batch_size = math.ceil(batch_size / devices) * devices
        self._share = jax.jit(self._verdict_share)
        self._judge = Judge(policy, OWN_BATCH) if own_chain else None
        self._compares = own_chain and not votes
        self._sampler = jit_sample(
            policy.model,
            group_size=max(votes, 1),
            max_new_tokens=answer_length,
            eos_id=policy.format.eos_ids,
            pad_id=policy.format.pad_id,
            mesh=policy.mesh,
        )

    def learnt(self, params: Any) -> None:
        """Takes other parameters."""
        self.policy = replace(self.policy, params=params)

    def score(self, examinations: Sequence[Examination], key: Array) -> Scores:
        """Scores examinations, whatever their truth; ``[n]`` arrays.

        Nothing is remembered from call to call: beside other questions the same one may score
        another last bit, and a run that is resumed must score as one that was not.

        Args:
          examinations: the steps; those of one chain, in order, are read together.
          key: of the critiques, consumed.
        """
        questions = self.format.questions(examinations) if examinations else []
        marks = [_digest(question.ids) for question in questions]
        asked = {
            mark: (question, examination)
            for mark, question, examination in zip(marks, questions, examinations, strict=True)
            if self.format.fits(question)
        }
        self.asked, self.repeated = len(asked), len(questions) - len(asked)
        ask = [question for question, _ in asked.values()]
        if self._votes:
            fresh = self._by_critiques(ask, key)
        elif self._compares:
            fresh = self._by_comparison(ask, [one for _, one in asked.values()])
        else:
            asked_for = [*self.format.marks[VERDICT], *self.format.before]
            branches = [Branch(question=question, ids=asked_for) for question in ask]
            fresh = self._read(branches, len(asked_for))
        told = dict(zip(asked, fresh, strict=True))
        scores = np.array([told.get(mark, math.nan) for mark in marks], np.float32)
        known = ~np.isnan(scores)
        return Scores(score=np.where(known, scores, 0.0).astype(np.float32), known=known)

    def remarks(self, examinations: Sequence[Examination]) -> list[str]:
        """What it says of each step; "" where it has nothing to say.

        A critique and a verdict in the most likely words; or, where it compares with a chain of its
        own, what sets the two apart, which is what the score rests on.
        """
        questions = self.format.questions(examinations) if examinations else []
        fit = [n for n, question in enumerate(questions) if self.format.fits(question)]
        answers: list[str] = []
        if self._compares:
            answers = [
                critique or "" for critique in self._critiques([examinations[n] for n in fit])
            ]
        else:
            for part in self._parts([questions[n] for n in fit]):
                answers += self._said(part, jax.random.key(0), 0.0)[:: max(self._votes, 1)]
        remarks = [""] * len(questions)
        for n, text in zip(fit, answers, strict=False):
            remarks[n] = " ".join(text.split())
        return remarks

    def own_chains(self, examples: Sequence[Example]) -> list[str] | None:
        """The chain that it writes of each pair; None where it has none of its own."""
        if self._judge is None:
            return None
        texts: list[str] = []
        rows = range(len(examples))
        for part, rollout, _ in self._judge.read(self.policy.params, examples, rows):
            texts += self.policy.format.texts(rollout)[: len(part)]
        return texts

    def _by_comparison(
        self, questions: Sequence[Question], examinations: Sequence[Examination]
    ) -> list[float]:
        """P(correct) behind a critique that compares the step with its own chain; NaN for none."""
        critiques = enumerate(self._critiques(examinations))
        told = {n: critique for n, critique in critiques if critique is not None}
        branches = [self.format.compared(questions[n], own) for n, own in told.items()]
        asked_for = len(self.format.marks[CRITIQUE]) + len(self.format.before)
        room = self.format.answer_length + asked_for
        shares = np.full(len(questions), np.nan)
        shares[[*told]] = self._read(branches, room)
        return shares.tolist()

    def _critiques(self, examinations: Sequence[Examination]) -> list[str | None]:
        """What sets each step apart from its own chain; None where that is not well formed."""
        schema = self.policy.format.schema
        pairs = {_pair(one.example): one.example for one in examinations}
        texts = self.own_chains([*pairs.values()]) or []
        own = dict(zip(pairs, map(schema.parse, texts), strict=True))
        critiques: list[str | None] = []
        for one in examinations:
            chain = own[_pair(one.example)]
            written = schema.parse(one.written).steps[schema.names.index(one.step)]
            if written is None or not chain.well_formed:
                critiques.append(None)
            else:
                critiques.append(write_critique(one.step, said(chain, schema), written))
        return critiques

    def _read(self, branches: Sequence[Branch], size: int) -> list[float]:
        """P(correct) behind each branch, of no more tokens than ``size``; NaN for unreadable."""
        rows: list[list[Branch]] = []
        for n, branch in enumerate(branches):
            following = n and branch.question.follows(branches[n - 1].question)
            if following and len(rows[-1]) < self._branches:
                rows[-1].append(branch)
            else:
                rows.append([branch])
        # The longest rows together, so that the others are read in less room.
        needs = [self.format.size(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda n: -needs[n])
        longest = self.format.trunk_length + self._branches * size
        unit = max(math.ceil(longest / WIDTHS), STEP)
        read: dict[int, list[float]] = {}
        for part in self._parts(order):
            width = unit * math.ceil(needs[part[0]] / unit)
            packed = self.format.pack([rows[n] for n in part], width)
            ends = np.full((len(part), self._branches), -1, np.int32)
            ends[:, : packed.ends.shape[1]] = packed.ends
            shares = self._verdicts(packed.tokens, packed.positions, ends, packed.mask)
            for n, own in zip(part, shares, strict=True):
                read[n] = own[: len(rows[n])].tolist()
        return [share for n in range(len(rows)) for share in read[n]]

    def _by_critiques(self, questions: Sequence[Question], key: Array) -> list[float]:
        """Mean P(correct) over the critiques that can be read; NaN where none can."""
        texts: list[str] = []
        for n, part in enumerate(self._parts(questions)):
            texts += self._said(part, jax.random.fold_in(key, n), float(self._votes > 1))
        voters = [row for row in range(len(questions)) for _ in range(self._votes)]
        answers = [read_answer(text) for text in texts[: len(voters)]]
        read = [(row, answer[0]) for row, answer in zip(voters, answers, strict=True) if answer]
        votes: list[list[float]] = [[] for _ in questions]
        rows = self.format.critiqued([questions[row] for row, _ in read], [c for _, c in read])
        length = self.format.question_length + self.format.answer_length
        shares: list[float] = []
        for part in self._parts(rows):
            batch = self.format.padded(part, length)
            tokens, place = np.asarray(batch.tokens), positions(batch.mask)
            ends = np.full((len(part), 1), length - 1, np.int32)
            shares += self._verdicts(tokens, place, ends)[:, 0].tolist()
        for (row, _), share in zip(read, shares, strict=False):
            votes[row] += [] if math.isnan(share) else [share]
        return [float(np.mean(own)) if own else math.nan for own in votes]

    def _said(self, questions: Sequence[Question], key: Array, temperature: float) -> list[str]:
        """The answers to a batch of questions, with a critique, as text; each G times."""
        asked, mesh = self.format.marks[CRITIQUE], self.policy.mesh
        key = jax.device_put(key, NamedSharding(mesh, PartitionSpec()))
        rows = [[*question.ids, *asked] for question in questions]
        batch = self.format.padded(rows, self.format.question_length)
        rollout = self._sampler(self.policy.params, batch, key, temperature)
        return self.policy.format.texts(jax.device_get(rollout))

    def _parts(self, rows: Sequence[Any]) -> list[Sequence[Any]]:
        """Batches of one size, the last one filled up with repetitions."""
        size = self._batch_size
        filled = [*rows, *[rows[-1]] * (-len(rows) % size)] if rows else []
        return [filled[first : first + size] for first in range(0, len(filled), size)]

    def _verdicts(
        self,
        tokens: Int[np.ndarray, "B T"],
        place: Int[np.ndarray, "B T"],
        ends: Int[np.ndarray, "B M"],
        mask: Bool[np.ndarray, "B T T"] | None = None,
    ) -> Float32[np.ndarray, "B M"]:
        """P(correct) behind each end; NaN where it cannot be read, or there is no end."""
        rows = jax.device_put((tokens, place, ends, mask), batch_sharding(self.policy.mesh))
        share, mass = jax.device_get(self._share(self.policy.params, *rows))
        return np.where((mass >= READABLE) & (ends >= 0), share, np.nan)

    def _verdict_share(
        self, params: Any, tokens: Array, place: Array, ends: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """P(correct) among the two verdicts, and what they hold of the whole probability."""
        output = self.policy.model.forward(params, tokens, place, mask=mask)
        hidden = jnp.take_along_axis(output.hidden, jnp.maximum(ends, 0)[:, :, None], axis=1)
        logits = jnp.einsum("bmd,dv->bmv", hidden, output.head)
        logps = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        both = logps[:, :, jnp.asarray(self.format.rivals)]
        return jax.nn.softmax(both, axis=-1)[:, :, 0], jnp.exp(both).sum(axis=-1)


def examine_chains(
    examiner: Examiner,
    chains: Sequence[Chain],
    examples: Sequence[Example],
    schema: CotSchema,
    key: Array,
) -> Scores:
    """Scores every step of every rollout; ``[B, S]`` arrays. The key is consumed.

    A step that cannot be read is wrong without asking; one that a chain lacks is unknown.
    """
    shape = len(chains), len(schema.steps)
    known = np.array([[step is not None for step in chain.steps] for chain in chains])
    score = np.zeros(shape, np.float32)
    where, questions = chain_examinations(chains, examples, schema)
    told = examiner.score(questions, key)
    for place, value, ok in zip(where, told.score, told.known, strict=True):
        score[place], known[place] = value, ok
    return Scores(score=score, known=known)


def chain_examinations(
    chains: Sequence[Chain], examples: Sequence[Example], schema: CotSchema
) -> tuple[list[tuple[int, int]], list[Examination]]:
    """The steps of chains that can be read: row and step index, and the examination of each."""
    where = [
        (b, k)
        for b, chain in enumerate(chains)
        for k, parsed in enumerate(chain.steps)
        if parsed is not None and parsed.valid
    ]
    return where, [
        Examination(
            example=examples[b],
            step=schema.names[k],
            written=written_steps(chains[b], schema, k),
            chain=str(b),
        )
        for b, k in where
    ]


def contradictions(
    verifier: Float32[np.ndarray, "B S"],
    verifier_known: Bool[np.ndarray, "B S"],
    told: Scores,
    schema: CotSchema,
) -> dict[str, float]:
    """What the examiner thinks of each step, and how often the verifier says the opposite.

    The verifier calls a step correct for full marks, the examiner from one half on. A policy that
    learns to please the examiner shows here: the score rises and so does the disagreement.

    Returns:
      ``examiner/<step>``, its mean score where it has one; ``disagreement/<step>``, the share of
      the opposite among the steps of which both speak; ``examiner`` and ``disagreement``, the same
      over all steps.
    """
    both = verifier_known & told.known
    apart = both & ((verifier >= FULL_MARKS) != (told.score >= 0.5))
    columns = {f"/{name}": slice(k, k + 1) for k, name in enumerate(schema.names)}
    figures = {}
    for name, own in (columns | {"": slice(None)}).items():
        if known := told.known[:, own].sum():
            score = np.where(told.known, told.score, 0.0)[:, own].sum() / known
            figures[f"examiner{name}"] = float(score)
        if count := both[:, own].sum():
            figures[f"disagreement{name}"] = float(apart[:, own].sum() / count)
    return figures


# -------------------------------------------------------------------------- on the disk


def describe_examiner(policy: Policy) -> dict[str, str]:
    """What ``examiner.json`` holds: by what a folder's parts are known to fit together."""
    return {"tokenizer": tokenizer_digest(policy)}


def load_examiner(config: Config) -> Examiner:
    """The examiner that ``config.reward.model`` names.

    Raises:
      FileNotFoundError, ValueError: as ``RewardFolder.check`` and ``RewardFolder.restore``.
    """
    folder = Path(config.reward.model)
    own = EXAMINER.check(folder, config)
    policy = make_policy(own, folder, mesh=examiner_mesh(config))
    return Examiner(
        EXAMINER.restore(folder, policy, describe_examiner(policy)),
        answer_length=own.examiner.answer_length,
        batch_size=config.reward.batch_size,
        votes=config.reward.votes,
        own_chain=writes_own_chain(folder),
    )


def writes_own_chain(folder: Path) -> bool:
    """Whether the examiner of a folder learnt to judge pairs, and so has chains of its own."""
    return (folder / "checkpoints" / SOLVE).is_dir()


def said(chain: Chain, schema: CotSchema) -> dict[str, str]:
    """What a chain says of each step, as annotation would: a verdict, or the items."""
    return {
        step.name: str(parsed.verdict) if step.verdicts else parsed.text
        for step, parsed in zip(schema.steps, chain.steps, strict=True)
        if parsed is not None
    }


def _pair(example: Example) -> tuple[str, ...]:
    return example.query, *(text for field in example.product.items() for text in field)


def _digest(row: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(row, np.int32).tobytes(), digest_size=16).digest()
