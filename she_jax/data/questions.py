"""Examinations to token ids: what an examiner reads, what it is trained to answer.

The examinations of a chain are read in one row: the pair and the chain once, its trunk, and behind
it a branch for each examination, which sees the trunk as far as its own step and itself, and no
other branch. Every token sees what it would see alone in a row of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int

from she_jax.data.prompts import PromptFormat
from she_jax.examination import CRITIQUE, VERDICT, VERDICTS, Examination
from she_jax.types import PromptBatch, SftBatch

Ids: TypeAlias = list[int]
MARKS: tuple[str, ...] = (CRITIQUE, VERDICT)
VERDICT_WEIGHT = 8.0  # of the token that says correct or incorrect, where others weigh 1


@dataclass(frozen=True, kw_only=True)
class Question:
    """An examination as tokens: its pair, and the lines of its chain, the step's own last."""

    prompt: Ids
    lines: list[Ids]

    @property
    def ids(self) -> Ids:
        """All of it."""
        return [*self.prompt, *_joined(self.lines)]

    def follows(self, other: "Question") -> bool:
        """Whether this one is the other with more lines, or the same."""
        return self.prompt == other.prompt and self.lines[: len(other.lines)] == other.lines


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What follows a question in a packed row, and how much each token of it weighs."""

    question: Question
    ids: Ids
    weights: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows of branches on a trunk. ``ends`` are the columns of the branches' last tokens.

    A branch that its row had no room for has the column -1, like those that a row does not have.
    """

    tokens: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T T"]
    weights: Float32[np.ndarray, "B T"]
    ends: Int[np.ndarray, "B M"]


@dataclass(frozen=True, kw_only=True)
class QuestionFormat:
    """How examinations become tokens for one examiner.

    A question is the prompt that the policy had, the chain and what is asked for (``CRITIQUE`` or
    ``VERDICT``).

    Attributes:
      prompts: of the examiner: its tokenizer, and the lengths of a prompt and of a chain.
      answer_length: tokens that an answer may have, its end included, A.
      question_length: tokens that a question may have with what is asked, Q.
      trunk_length: tokens that a trunk may have.
      before: tokens with which both verdicts begin, as a rule none.
      rivals: the first token in which they differ, of ``correct`` and of ``incorrect``.

    Raises:
      ValueError: if ``answer_length`` leaves no room for a critique.
    """

    prompts: PromptFormat
    answer_length: int
    question_length: int = field(init=False)
    trunk_length: int = field(init=False)
    before: tuple[int, ...] = field(init=False)
    rivals: tuple[int, int] = field(init=False)
    marks: dict[str, Ids] = field(init=False, repr=False)
    _verdicts: list[Ids] = field(init=False, repr=False)

    def __post_init__(self):
        verdicts = self.prompts.encode([f" {verdict}" for verdict in VERDICTS])
        marks = dict(zip(MARKS, self.prompts.encode(MARKS), strict=True))
        shared = 0
        while verdicts[0][shared] == verdicts[1][shared]:
            shared += 1
        needed = len(marks[VERDICT]) + max(map(len, verdicts)) + 2
        if self.answer_length < needed:
            raise ValueError(
                f"answer_length={self.answer_length}: a verdict takes {needed - 1} tokens with its "
                f"end; set {needed + 16} or more, to leave room for a critique"
            )
        length = self.prompts.prompt_length + self.prompts.completion_length
        set_field = object.__setattr__
        set_field(self, "trunk_length", length)
        set_field(self, "question_length", length + max(map(len, marks.values())) + shared)
        set_field(self, "before", tuple(verdicts[0][:shared]))
        set_field(self, "rivals", (verdicts[0][shared], verdicts[1][shared]))
        set_field(self, "marks", marks)
        set_field(self, "_verdicts", verdicts)

    def questions(self, examinations: Sequence[Examination]) -> list[Question]:
        """The questions, as long as they are but for pairs that are too long.

        Of these the product gives way, then the query (see ``PromptFormat``). Each line of a chain
        is encoded by itself, so that a chain's beginning has the same tokens whatever follows.

        Args:
          examinations: at least one.
        """
        pairs, _ = self.prompts.prompts([one.example for one in examinations])
        lines = [one.written.split("\n") if one.written else [] for one in examinations]
        lines = [[f"\n{line}" if n else line for n, line in enumerate(own)] for own in lines]
        coded = iter(self.prompts.encode([line for own in lines for line in own]))
        return [
            Question(
                prompt=np.asarray(tokens)[np.asarray(mask)].tolist(),
                lines=[next(coded) for _ in own],
            )
            for tokens, mask, own in zip(pairs.tokens, pairs.mask, lines, strict=True)
        ]

    def fits(self, question: Question) -> bool:
        """Whether its chain is no longer than a chain may be."""
        return sum(map(len, question.lines)) <= self.prompts.completion_length

    def compared(self, question: Question, critique: str) -> Branch:
        """A question with a critique, and the verdict next."""
        ids = self.critiqued([question], [critique])[0][len(question.ids) :]
        return Branch(question=question, ids=ids)

    def critiqued(self, questions: Sequence[Question], critiques: Sequence[str]) -> list[Ids]:
        """Questions with a critique, and the verdict next."""
        said = self.prompts.encode([f" {critique}" for critique in critiques])
        mark, end = self.marks[VERDICT], self.before
        room = self.answer_length - len(mark)
        return [
            [*question.ids, *self.marks[CRITIQUE], *ids[:room], *mark, *end]
            for question, ids in zip(questions, said, strict=True)
        ]

    def answers(
        self, examinations: Sequence[Examination], questions: Sequence[Question]
    ) -> list[Branch]:
        """To each examination two branches to learn: the verdict alone, and behind a critique.

        The verdict is one token beside many, and it is what an examiner is for: it weighs
        ``VERDICT_WEIGHT``. A critique that is too long loses its end.
        """
        said = self.prompts.encode([f" {one.critique}" for one in examinations])
        branches = []
        for one, question, critique in zip(examinations, questions, said, strict=True):
            end = [*self._verdicts[not one.correct], self.prompts.eos_ids[0]]
            weights = [1.0] * len(end)
            weights[len(self.before)] = VERDICT_WEIGHT
            mark = self.marks[VERDICT]
            critique = critique[: self.answer_length - len(mark) - len(end)]
            for asked, before in ((mark, []), (self.marks[CRITIQUE], [*critique, *mark])):
                ids = [*asked, *before, *end]
                weighed = [*[0.0] * len(asked), *[1.0] * len(before), *weights]
                branches.append(Branch(question=question, ids=ids, weights=weighed))
        return branches

    def _own_branch(self, prompt: Ids, chain: Ids) -> Branch:
        """A chain behind the prompt, whose last token is in the branch: the first one's input."""
        chain = [*chain, self.prompts.eos_ids[0]][: self.prompts.completion_length]
        question = Question(prompt=prompt[:-1], lines=[])
        return Branch(
            question=question, ids=[prompt[-1], *chain], weights=[0.0] + [1.0] * len(chain)
        )

    def pack(
        self, rows: Sequence[Sequence[Branch]], width: int, before: int | None = None
    ) -> Packed:
        """Rows of branches whose questions have a pair in common.

        The trunk is the longest question as far as a chain may be long; the lines in which another
        one differs stand in its own branch.

        Args:
          rows: at least one branch each.
          width: tokens of a row; branches that find no room are left out.
          before: the column at which the branches of all rows begin, the trunks being padded on the
            left; None has each row begin with its trunk and its branches follow.
        """
        shape = len(rows), width
        tokens = np.full(shape, self.prompts.pad_id, np.int32)
        positions, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        mask = np.zeros((*shape, width), bool)
        ends = np.full((len(rows), max(map(len, rows))), -1, np.int32)
        tri = np.tri(width, dtype=bool)
        for b, row in enumerate(rows):
            trunk, added = self._laid(row)
            own = trunk.ids
            column = len(own) if before is None else before
            first = column - len(own)
            cells = slice(first, column)
            tokens[b, cells], positions[b, cells] = own, np.arange(len(own))
            mask[b, cells, cells] = tri[: len(own), : len(own)]
            for n, (branch, (start, ids)) in enumerate(zip(row, added, strict=True)):
                size = len(ids)
                if column + size > width:
                    continue
                cells = slice(column, column + size)
                tokens[b, cells], positions[b, cells] = ids, np.arange(start, start + size)
                mask[b, cells, first : first + start] = True
                mask[b, cells, cells] = tri[:size, :size]
                column += size
                if branch.weights:
                    weights[b, column - len(branch.weights) : column] = branch.weights
                ends[b, n] = column - 1
        return Packed(tokens=tokens, positions=positions, mask=mask, weights=weights, ends=ends)

    def size(self, row: Sequence[Branch]) -> int:
        """Tokens that a row of ``pack`` takes, its trunk and its branches."""
        trunk, added = self._laid(row)
        return len(trunk.ids) + sum(len(ids) for _, ids in added)

    def _laid(self, row: Sequence[Branch]) -> tuple[Question, list[tuple[int, Ids]]]:
        """The trunk of a row; and of each branch how much of it it sees, and what it adds."""
        longest = max((one.question for one in row), key=lambda question: len(question.lines))
        trunk, added = self._trunk(longest), []
        for branch in row:
            lines = branch.question.lines
            shared = _in_common(trunk.lines, lines)
            seen = len(branch.question.prompt) + sum(map(len, lines[:shared]))
            added.append((seen, [*_joined(lines[shared:]), *branch.ids]))
        return trunk, added

    def _trunk(self, question: Question) -> Question:
        """The question with as many of its lines as a chain may have tokens for."""
        count, left = 0, self.prompts.completion_length
        while count < len(question.lines) and (left := left - len(question.lines[count])) >= 0:
            count += 1
        return Question(prompt=question.prompt, lines=question.lines[:count])

    def padded(self, rows: Sequence[Ids], length: int) -> PromptBatch:
        """Rows padded on the left to a length, so that the last column is what comes next from."""
        tokens = np.full((len(rows), length), self.prompts.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for own, real, ids in zip(tokens, mask, rows, strict=True):
            own[length - len(ids) :], real[length - len(ids) :] = ids, True
        return PromptBatch(tokens=tokens, mask=mask)  # pyright: ignore[reportArgumentType]

    def sft_batch(
        self,
        chains: Sequence[Sequence[Examination]],
        room: int,
        rng: np.random.Generator,
        own: Sequence[str] | None = None,
    ) -> tuple[SftBatch, int]:
        """A row for the examinations of each chain; only their answers weigh, and own chains.

        Args:
          chains: examinations of the same pair, at least one each.
          room: tokens for the answers of a row.
          rng: consumed; which of them are left out where the room is short.
          own: the chain that the examiner should write of each pair itself, "" for none; there is
            room for it besides.

        Returns:
          The batch, and how many answers were left out.
        """
        questions = iter(self.questions([one for chain in chains for one in chain]))
        rows = []
        for chain in chains:
            branches = self.answers(chain, [next(questions) for _ in chain])
            rows.append([branches[n] for n in rng.permutation(len(branches))])
        if own is not None:
            room += self.prompts.completion_length + 1
            for row, ids in zip(rows, self.prompts.encode(own), strict=True):
                row[:0] = [self._own_branch(row[0].question.prompt, ids)] if ids else []
        packed = self.pack(rows, self.trunk_length + room, before=self.trunk_length)
        batch = SftBatch(
            tokens=jnp.asarray(packed.tokens),
            positions=jnp.asarray(packed.positions),
            weights=jnp.asarray(packed.weights),
            mask=jnp.asarray(packed.mask),
            prompt_length=self.trunk_length,
        )
        return batch, sum(map(len, rows)) - int((packed.ends >= 0).sum())


def _joined(lines: Sequence[Ids]) -> Ids:
    return [token for line in lines for token in line]


def _in_common(lines: Sequence[Ids], others: Sequence[Ids]) -> int:
    """How many lines the two begin with alike."""
    count = 0
    while count < min(len(lines), len(others)) and lines[count] == others[count]:
        count += 1
    return count
