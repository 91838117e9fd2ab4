"""Scores the steps of rollouts with a generative process reward model (PRM)."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int

from she_jax.cot import Chain, CotSchema
from she_jax.generate.generator import Generator
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.prompts import positions
from she_jax.generate.sampler import jit_sample
from she_jax.models.sharding import batch_sharding
from she_jax.rewards.artifact import RewardArtifact
from she_jax.rewards.prm.packing import Branch, StepQueryTokens, step_query_format
from she_jax.rewards.prm.step_query import (
    CRITIQUE,
    VERDICT,
    StepQuery,
    read_answer,
    write_critique,
    written_steps,
)
from she_jax.types import Example

REFERENCE = "reference"  # the training phase in which the PRM learns to write chains itself
REFERENCE_BATCH = 32  # pairs per batch when it writes reference chains
MAX_WIDTHS = 8  # maximum number of row widths for scoring verdicts; each is compiled
WIDTH_STEP = 16  # minimum difference between two widths, tokens
READABLE = 0.5  # minimum total probability of the two verdicts for a score to be known
PRM = RewardArtifact(
    key="reward.prm", kind="reward_model", name="process reward model", file="prm.json"
)


@dataclass(frozen=True, kw_only=True)
class StepScores:
    """Scores of steps by a process reward model: P(correct) in [0, 1], valid if ``known``."""

    score: Float32[np.ndarray, "..."]
    known: Bool[np.ndarray, "..."]


class ProcessRewardModel:
    """A generative process reward model, which SHE calls the examiner.

    The score of a step is the probability of the verdict ``correct``, normalized over ``correct``
    and ``incorrect``. The verdict follows the step query directly, with all steps of a chain packed
    into one row, or it follows a critique: the greedy one, or each of several sampled ones, whose
    scores are averaged. The score is unknown if the two verdicts have less than ``READABLE`` of the
    probability, if no critique can be parsed, or if the chain exceeds the maximum length. Step
    queries with equal tokens are scored once per call. Batches have one shape, or at most
    ``MAX_WIDTHS`` shapes when verdicts are scored in packed rows.

    Args:
      lm: the PRM's model, prompts and mesh.
      params: its parameters.
      answer_length: see ``StepQueryFormat``.
      batch_size: chains per batch, or step queries per batch if critiques are sampled.
      votes: critiques per step; 0 scores the verdict directly, 1 uses the greedy critique.
      reference_chains: if ``votes`` is 0, the model greedily writes a reference chain for each
        pair, and the verdict follows the critique that ``write_critique`` builds from the two
        chains. The score is unknown if the reference chain is not well formed.
    """

    def __init__(
        self,
        lm: LanguageModel,
        params: Any,
        *,
        answer_length: int,
        batch_size: int,
        votes: int = 0,
        reference_chains: bool = False,
    ):
        self.format = step_query_format(lm, answer_length)
        self.asked = self.repeated = 0  # in the last call: distinct queries; repeated or too long
        self.lm, self.params, self._votes = lm, params, votes
        devices = lm.mesh.shape["data"] * lm.mesh.shape["fsdp"]
        self._branches = len(lm.prompts.schema.steps)  # maximum step queries per packed row
        self._batch_size = math.ceil(batch_size / devices) * devices
        self._verdict_probabilities = jax.jit(self._compute_verdict_probabilities)
        self._generator = Generator(lm, REFERENCE_BATCH) if reference_chains else None
        self._uses_references = reference_chains and not votes
        self._sampler = jit_sample(
            lm.model,
            group_size=max(votes, 1),
            max_new_tokens=answer_length,
            eos_id=lm.prompts.eos_ids,
            pad_id=lm.prompts.pad_id,
            mesh=lm.mesh,
        )

    def set_params(self, params: Any) -> None:
        """Replaces the parameters."""
        self.params = params

    def score(self, step_queries: Sequence[StepQuery], key: Array) -> StepScores:
        """Scores n step queries; their ``correct`` is not read.

        Nothing is cached between calls: in another batch the same step query may differ in the last
        bit of its score, so a cache would make a resumed run differ from an uninterrupted one.

        Args:
          step_queries: the steps; consecutive ones of the same chain, in order, share a row.
          key: for sampling critiques, consumed.
        """
        questions = self.format.questions(step_queries) if step_queries else []
        digests = [_digest(question.ids) for question in questions]
        distinct = {
            digest: (question, step_query)
            for digest, question, step_query in zip(digests, questions, step_queries, strict=True)
            if self.format.fits(question)
        }
        self.asked, self.repeated = len(distinct), len(questions) - len(distinct)
        unscored = [question for question, _ in distinct.values()]
        if self._votes:
            values = self._score_with_critiques(unscored, key)
        elif self._uses_references:
            values = self._score_with_references(
                unscored, [query for _, query in distinct.values()]
            )
        else:
            prompt = [*self.format.marks[VERDICT], *self.format.before]
            branches = [Branch(question=question, ids=prompt) for question in unscored]
            values = self._score_branches(branches, len(prompt))
        by_digest = dict(zip(distinct, values, strict=True))
        scores = np.array([by_digest.get(digest, math.nan) for digest in digests], np.float32)
        known = ~np.isnan(scores)
        return StepScores(score=np.where(known, scores, 0.0).astype(np.float32), known=known)

    def critiques(self, step_queries: Sequence[StepQuery]) -> list[str]:
        """Returns the critique of each step as text, "" if there is none.

        This is the greedy critique with its verdict. If reference chains are used, it is the
        critique that compares the step with the reference chain, on which the score is based.
        """
        questions = self.format.questions(step_queries) if step_queries else []
        fitting = [n for n, question in enumerate(questions) if self.format.fits(question)]
        answers: list[str] = []
        if self._uses_references:
            critiques = self._reference_critiques([step_queries[n] for n in fitting])
            answers = [critique or "" for critique in critiques]
        else:
            for batch in self._batches([questions[n] for n in fitting]):
                samples = self._sample(batch, jax.random.key(0), 0.0)
                answers += samples[:: max(self._votes, 1)]
        remarks = [""] * len(questions)
        for n, text in zip(fitting, answers, strict=False):
            remarks[n] = " ".join(text.split())
        return remarks

    def reference_chains(self, examples: Sequence[Example]) -> list[str] | None:
        """Returns the greedy reference chain for each pair, None if the model writes none."""
        if self._generator is None:
            return None
        texts: list[str] = []
        rows = range(len(examples))
        for batch, rollout in self._generator.greedy_rollouts(self.params, examples, rows):
            texts += self.lm.prompts.decode(rollout)[: len(batch)]
        return texts

    def _score_with_references(
        self, questions: Sequence[StepQueryTokens], step_queries: Sequence[StepQuery]
    ) -> list[float]:
        """Returns P(correct) after a critique from the reference chain; NaN if unknown."""
        all_critiques = enumerate(self._reference_critiques(step_queries))
        critiques = {n: critique for n, critique in all_critiques if critique is not None}
        branches = [self.format.compared(questions[n], text) for n, text in critiques.items()]
        prompt_length = len(self.format.marks[CRITIQUE]) + len(self.format.before)
        max_length = self.format.answer_length + prompt_length
        scores = np.full(len(questions), np.nan)
        scores[[*critiques]] = self._score_branches(branches, max_length)
        return scores.tolist()

    def _reference_critiques(self, step_queries: Sequence[StepQuery]) -> list[str | None]:
        """Returns the critique of each step against its reference chain.

        It is None if that chain is not well formed or the step cannot be read.
        """
        schema = self.lm.prompts.schema
        pairs = {_pair_key(step_query.example): step_query.example for step_query in step_queries}
        texts = self.reference_chains([*pairs.values()]) or []
        references = dict(zip(pairs, map(schema.parse, texts), strict=True))
        critiques: list[str | None] = []
        for step_query in step_queries:
            reference = references[_pair_key(step_query.example)]
            written = schema.parse(step_query.written).steps[schema.names.index(step_query.step)]
            if written is None or not reference.well_formed:
                critiques.append(None)
            else:
                critiques.append(
                    write_critique(step_query.step, stated_values(reference, schema), written)
                )
        return critiques

    def _score_branches(self, branches: Sequence[Branch], max_length: int) -> list[float]:
        """Returns P(correct) after each branch of up to ``max_length`` tokens; NaN if unknown."""
        rows: list[list[Branch]] = []
        for n, branch in enumerate(branches):
            following = n and branch.question.follows(branches[n - 1].question)
            if following and len(rows[-1]) < self._branches:
                rows[-1].append(branch)
            else:
                rows.append([branch])
        # The longest rows are batched together, so that the other batches can be narrower.
        sizes = [self.format.size(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda n: -sizes[n])
        longest = self.format.trunk_length + self._branches * max_length
        unit = max(math.ceil(longest / MAX_WIDTHS), WIDTH_STEP)
        scores: dict[int, list[float]] = {}
        for batch in self._batches(order):
            width = unit * math.ceil(sizes[batch[0]] / unit)
            packed = self.format.pack([rows[n] for n in batch], width)
            ends = np.full((len(batch), self._branches), -1, np.int32)
            ends[:, : packed.ends.shape[1]] = packed.ends
            row_scores = self._verdict_scores(packed.tokens, packed.positions, ends, packed.mask)
            for n, branch_scores in zip(batch, row_scores, strict=True):
                scores[n] = branch_scores[: len(rows[n])].tolist()
        return [score for n in range(len(rows)) for score in scores[n]]

    def _score_with_critiques(
        self, questions: Sequence[StepQueryTokens], key: Array
    ) -> list[float]:
        """Returns the mean P(correct) over the critiques that can be parsed; NaN if none can."""
        texts: list[str] = []
        for n, batch in enumerate(self._batches(questions)):
            texts += self._sample(batch, jax.random.fold_in(key, n), float(self._votes > 1))
        rows = [row for row in range(len(questions)) for _ in range(self._votes)]
        answers = [read_answer(text) for text in texts[: len(rows)]]
        critiques = [(row, answer[0]) for row, answer in zip(rows, answers, strict=True) if answer]
        prompts = self.format.critiqued(
            [questions[row] for row, _ in critiques], [critique for _, critique in critiques]
        )
        length = self.format.question_length + self.format.answer_length
        scores: list[float] = []
        for part in self._batches(prompts):
            batch = self.format.padded(part, length)
            tokens, position_ids = np.asarray(batch.tokens), positions(batch.mask)
            ends = np.full((len(part), 1), length - 1, np.int32)
            scores += self._verdict_scores(tokens, position_ids, ends)[:, 0].tolist()
        votes: list[list[float]] = [[] for _ in questions]
        for (row, _), score in zip(critiques, scores, strict=False):
            votes[row] += [] if math.isnan(score) else [score]
        return [float(np.mean(row_votes)) if row_votes else math.nan for row_votes in votes]

    def _sample(
        self, questions: Sequence[StepQueryTokens], key: Array, temperature: float
    ) -> list[str]:
        """Samples answers with a critique for a batch of step queries, ``max(votes, 1)`` each."""
        mark, mesh = self.format.marks[CRITIQUE], self.lm.mesh
        key = jax.device_put(key, NamedSharding(mesh, PartitionSpec()))
        rows = [[*question.ids, *mark] for question in questions]
        batch = self.format.padded(rows, self.format.question_length)
        rollout = self._sampler(self.params, batch, key, temperature)
        return self.lm.prompts.decode(jax.device_get(rollout))

    def _batches(self, rows: Sequence[Any]) -> list[Sequence[Any]]:
        """Splits rows into batches of one size; the last one is padded with its last row."""
        size = self._batch_size
        padded = [*rows, *[rows[-1]] * (-len(rows) % size)] if rows else []
        return [padded[first : first + size] for first in range(0, len(padded), size)]

    def _verdict_scores(
        self,
        tokens: Int[np.ndarray, "B T"],
        position_ids: Int[np.ndarray, "B T"],
        ends: Int[np.ndarray, "B M"],
        mask: Bool[np.ndarray, "B T T"] | None = None,
    ) -> Float32[np.ndarray, "B M"]:
        """Returns P(correct) after each column in ``ends``; NaN if unknown or ``ends`` is -1."""
        rows = jax.device_put((tokens, position_ids, ends, mask), batch_sharding(self.lm.mesh))
        score, mass = jax.device_get(self._verdict_probabilities(self.params, *rows))
        return np.where((mass >= READABLE) & (ends >= 0), score, np.nan)

    def _compute_verdict_probabilities(
        self, params: Any, tokens: Array, position_ids: Array, ends: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """Returns P(correct) normalized over the two verdicts, and their total probability."""
        output = self.lm.model.forward(params, tokens, position_ids, mask=mask)
        hidden = jnp.take_along_axis(output.hidden, jnp.maximum(ends, 0)[:, :, None], axis=1)
        logits = jnp.einsum("bmd,dv->bmv", hidden, output.head)
        logps = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        verdict_logps = logps[:, :, jnp.asarray(self.format.rivals)]
        mass = jnp.exp(verdict_logps).sum(axis=-1)
        return jax.nn.softmax(verdict_logps, axis=-1)[:, :, 0], mass


def score_steps(
    prm: ProcessRewardModel,
    chains: Sequence[Chain],
    examples: Sequence[Example],
    schema: CotSchema,
    key: Array,
) -> StepScores:
    """Scores every step of every rollout with a process reward model; ``[B, S]`` arrays.

    A step that cannot be parsed scores 0 without running the model. A step that a chain lacks is
    unknown. The key is consumed.
    """
    shape = len(chains), len(schema.steps)
    known = np.array([[step is not None for step in chain.steps] for chain in chains])
    score = np.zeros(shape, np.float32)
    indices, step_queries = chain_step_queries(chains, examples, schema)
    scores = prm.score(step_queries, key)
    for index, step_score, step_known in zip(indices, scores.score, scores.known, strict=True):
        score[index], known[index] = step_score, step_known
    return StepScores(score=score, known=known)


def chain_step_queries(
    chains: Sequence[Chain], examples: Sequence[Example], schema: CotSchema
) -> tuple[list[tuple[int, int]], list[StepQuery]]:
    """Returns the (row, step index) and the step query of each readable step of the chains."""
    indices = [
        (b, k)
        for b, chain in enumerate(chains)
        for k, parsed in enumerate(chain.steps)
        if parsed is not None and parsed.valid
    ]
    return indices, [
        StepQuery(
            example=examples[b],
            step=schema.names[k],
            written=written_steps(chains[b], schema, k),
            chain=str(b),
        )
        for b, k in indices
    ]


# -------------------------------------------------------------------------- on the disk


def load_prm(
    folder: Path, schema: CotSchema, mesh: Mesh, *, batch_size: int, votes: int = 0
) -> ProcessRewardModel:
    """Loads the process reward model of a folder.

    Args:
      folder: of a finished run of ``configs/reward_model.py``.
      schema: the steps of the chains to be scored.
      mesh: the devices.
      batch_size, votes: as for ``ProcessRewardModel``.

    Raises:
      FileNotFoundError, UserError: as ``RewardArtifact.check`` and ``RewardArtifact.load``.
    """
    description = PRM.check(folder, schema)
    return ProcessRewardModel(
        *PRM.load(folder, description, mesh),
        answer_length=description["answer_length"],
        batch_size=batch_size,
        votes=votes,
        reference_chains=description["reference_chains"],
    )


def stated_values(chain: Chain, schema: CotSchema) -> dict[str, str]:
    """Returns a chain's verdict or items by step name, in the format of an annotation."""
    return {
        step.name: str(parsed.verdict) if step.verdicts else parsed.text
        for step, parsed in zip(schema.steps, chain.steps, strict=True)
        if parsed is not None
    }


def _pair_key(example: Example) -> tuple[str, ...]:
    return example.query, *(text for field in example.product.items() for text in field)


def _digest(row: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(row, np.int32).tobytes(), digest_size=16).digest()
