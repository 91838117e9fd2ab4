"""Examinations to token ids: what an examiner reads, what it is trained to answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from she_jax.data.prompts import PromptFormat, positions
from she_jax.examination import CRITIQUE, VERDICT, VERDICTS, Examination
from she_jax.types import PromptBatch, SftBatch

Rows = list[list[int]]
MARKS: tuple[str, ...] = (CRITIQUE, VERDICT)


@dataclass(frozen=True, kw_only=True)
class QuestionFormat:
    """How examinations become tokens for one examiner.

    A question is the prompt that the policy had, the chain and what is asked for (``CRITIQUE`` or
    ``VERDICT``).

    Attributes:
      prompts: of the examiner: its tokenizer, and the lengths of a prompt and of a chain.
      answer_length: tokens that an answer may have, its end included, A.
      question_length: tokens that a question may have, Q.
      before: tokens with which both verdicts begin, as a rule none.
      rivals: the first token in which they differ, of ``correct`` and of ``incorrect``.

    Raises:
      ValueError: if ``answer_length`` leaves no room for a critique.
    """

    prompts: PromptFormat
    answer_length: int
    question_length: int = field(init=False)
    before: tuple[int, ...] = field(init=False)
    rivals: tuple[int, int] = field(init=False)
    _verdicts: Rows = field(init=False, repr=False)
    _mark: list[int] = field(init=False, repr=False)  # between a critique and a verdict

    def __post_init__(self):
        verdicts = self.prompts.encode([f" {verdict}" for verdict in VERDICTS])
        asked, mark = self.prompts.encode(MARKS)
        shared = 0
        while verdicts[0][shared] == verdicts[1][shared]:
            shared += 1
        needed = len(mark) + max(map(len, verdicts)) + 2
        if self.answer_length < needed:
            raise ValueError(
                f"answer_length={self.answer_length}: a verdict takes {needed - 1} tokens with its "
                f"end; set {needed + 16} or more, to leave room for a critique"
            )
        length = self.prompts.prompt_length + self.prompts.completion_length
        set_field = object.__setattr__
        set_field(self, "question_length", length + max(len(asked), len(mark)) + shared)
        set_field(self, "before", tuple(verdicts[0][:shared]))
        set_field(self, "rivals", (verdicts[0][shared], verdicts[1][shared]))
        set_field(self, "_verdicts", verdicts)
        set_field(self, "_mark", mark)

    def questions(self, examinations: Sequence[Examination], asked: Sequence[str]) -> Rows:
        """The questions, as long as they are.

        Where the pair is too long, the product gives way, then the query (see ``PromptFormat``);
        where the chain is, its beginning, since the step under examination is its end.

        Args:
          examinations: at least one.
          asked: ``CRITIQUE`` or ``VERDICT`` for each.
        """
        pairs, _ = self.prompts.prompts([one.example for one in examinations])
        written = self.prompts.encode([one.written for one in examinations])
        marks = dict(zip(MARKS, self.prompts.encode(MARKS), strict=True))
        room = self.prompts.completion_length
        return [
            [*np.asarray(tokens)[np.asarray(mask)].tolist(), *chain[-room:], *marks[ask]]
            for tokens, mask, chain, ask in zip(
                pairs.tokens, pairs.mask, written, asked, strict=True
            )
        ]

    def critiqued(self, questions: Rows, critiques: Sequence[str]) -> Rows:
        """Questions that asked for a critique, with one, and the verdict next."""
        said = self.prompts.encode([f" {critique}" for critique in critiques])
        room = self.answer_length - len(self._mark)
        return [[*row, *ids[:room], *self._mark] for row, ids in zip(questions, said, strict=True)]

    def answers(self, examinations: Sequence[Examination], asked: Sequence[str]) -> Rows:
        """The answers to learn, ended; a critique that is too long loses its end."""
        said = self.prompts.encode([f" {one.critique}" for one in examinations])
        rows = []
        for one, critique, ask in zip(examinations, said, asked, strict=True):
            end = [*self._verdicts[not one.correct], self.prompts.eos_ids[0]]
            room = self.answer_length - len(self._mark) - len(end)
            rows.append(end if ask == VERDICT else [*critique[:room], *self._mark, *end])
        return rows

    def padded(self, rows: Rows, length: int) -> PromptBatch:
        """Rows padded on the left to a length, so that the last column is what comes next from."""
        tokens = np.full((len(rows), length), self.prompts.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for own, real, ids in zip(tokens, mask, rows, strict=True):
            own[length - len(ids) :], real[length - len(ids) :] = ids, True
        return PromptBatch(tokens=tokens, mask=mask)  # pyright: ignore[reportArgumentType]

    def sft_batch(self, examinations: Sequence[Examination], asked: Sequence[str]) -> SftBatch:
        """Questions, padded on the left to Q, and answers, on the right to A; only these weigh."""
        asks = self.padded(self.questions(examinations, asked), self.question_length)
        tokens = np.full((len(examinations), self.answer_length), self.prompts.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(self.answers(examinations, asked)):
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        return SftBatch(
            tokens=jnp.asarray(np.concatenate([asks.tokens, tokens], axis=1)),
            positions=jnp.asarray(positions(np.concatenate([asks.mask, mask], axis=1))),
            weights=jnp.pad(jnp.asarray(mask, jnp.float32), ((0, 0), (asks.tokens.shape[1], 0))),
            prompt_length=self.question_length,
        )
