"""Step queries as token ids: the input and the training targets of a process reward model.

The step queries of a chain are packed into one row. The trunk holds the query-product pair and the
chain, once. After it each step query has a branch, which attends to itself and to the trunk up to
its step, but to no other branch. Every token attends to the same tokens as in a row of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int

from she_jax.generate.language_model import LanguageModel, check_context
from she_jax.generate.prompts import PromptFormat
from she_jax.rewards.prm.step_query import CRITIQUE, VERDICT, VERDICTS, StepQuery
from she_jax.types import PromptBatch, SftBatch

Ids: TypeAlias = list[int]
MARKS: tuple[str, ...] = (CRITIQUE, VERDICT)
VERDICT_WEIGHT = 8.0  # loss weight of the verdict token; other answer tokens have weight 1


@dataclass(frozen=True, kw_only=True)
class StepQueryTokens:
    """A tokenized step query: the prompt, and the chain by line, ending with the step's line."""

    prompt: Ids
    lines: list[Ids]

    @property
    def ids(self) -> Ids:
        """Token ids of the prompt and all lines."""
        return [*self.prompt, *_flatten(self.lines)]

    def follows(self, other: "StepQueryTokens") -> bool:
        """Whether this query has the same prompt as ``other`` and begins with all of its lines."""
        return self.prompt == other.prompt and self.lines[: len(other.lines)] == other.lines


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Tokens that follow a tokenized step query in a packed row, and their loss weights."""

    question: StepQueryTokens
    ids: Ids
    loss_weights: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Packed rows, each a trunk with its branches.

    ``ends`` has the column of each branch's last token, -1 if it did not fit or does not exist.
    """

    tokens: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T T"]
    loss_weights: Float32[np.ndarray, "B T"]
    ends: Int[np.ndarray, "B M"]


@dataclass(frozen=True, kw_only=True)
class StepQueryFormat:
    """Tokenization and packing of step queries for one process reward model.

    A step query is the policy's prompt, the chain, and a mark of what comes next (``CRITIQUE`` or
    ``VERDICT``).

    Attributes:
      prompts: the PRM's tokenizer and its prompt and chain lengths.
      answer_length: maximum tokens of an answer, its end-of-sequence token included, A.
      question_length: maximum tokens of a step query with its mark, Q.
      trunk_length: maximum tokens of a trunk.
      before: tokens with which both verdicts begin, usually none.
      rivals: the first token in which the verdicts differ, of ``correct`` and of ``incorrect``.
      marks: token ids of ``CRITIQUE`` and of ``VERDICT``.

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

    def questions(self, step_queries: Sequence[StepQuery]) -> list[StepQueryTokens]:
        """Tokenizes step queries; only the prompt of a pair is truncated.

        If a prompt is too long, product and query are truncated (see
        ``PromptFormat``). Each line of a chain is encoded separately, so that the beginning of a
        chain has the same tokens whatever follows.

        Args:
          step_queries: at least one.
        """
        pairs, _ = self.prompts.encode_prompts([step_query.example for step_query in step_queries])
        texts = [step_query.written for step_query in step_queries]
        chains = [text.split("\n") if text else [] for text in texts]
        chains = [[f"\n{line}" if n else line for n, line in enumerate(c)] for c in chains]
        encoded = iter(self.prompts.encode([line for lines in chains for line in lines]))
        return [
            StepQueryTokens(
                prompt=np.asarray(tokens)[np.asarray(mask)].tolist(),
                lines=[next(encoded) for _ in lines],
            )
            for tokens, mask, lines in zip(pairs.tokens, pairs.mask, chains, strict=True)
        ]

    def fits(self, question: StepQueryTokens) -> bool:
        """Whether the chain of a step query is within the maximum chain length."""
        return sum(map(len, question.lines)) <= self.prompts.completion_length

    def compared(self, question: StepQueryTokens, critique: str) -> Branch:
        """Returns a branch with a critique, up to where the verdict comes next."""
        ids = self.critiqued([question], [critique])[0][len(question.ids) :]
        return Branch(question=question, ids=ids)

    def critiqued(
        self, questions: Sequence[StepQueryTokens], critiques: Sequence[str]
    ) -> list[Ids]:
        """Returns step queries with a critique, up to where the verdict comes next."""
        encoded = self.prompts.encode([f" {critique}" for critique in critiques])
        mark, shared = self.marks[VERDICT], self.before
        max_length = self.answer_length - len(mark)
        return [
            [*question.ids, *self.marks[CRITIQUE], *ids[:max_length], *mark, *shared]
            for question, ids in zip(questions, encoded, strict=True)
        ]

    def answers(
        self, step_queries: Sequence[StepQuery], questions: Sequence[StepQueryTokens]
    ) -> list[Branch]:
        """Returns two training branches per step query: verdict only, and critique with verdict.

        The verdict token has the loss weight ``VERDICT_WEIGHT``: it is one token among many, and
        the one that the score depends on. The end of a critique that is too long is dropped.
        """
        encoded = self.prompts.encode([f" {step_query.critique}" for step_query in step_queries])
        branches = []
        for step_query, question, critique in zip(step_queries, questions, encoded, strict=True):
            verdict = [*self._verdicts[not step_query.correct], self.prompts.eos_ids[0]]
            verdict_weights = [1.0] * len(verdict)
            verdict_weights[len(self.before)] = VERDICT_WEIGHT
            mark = self.marks[VERDICT]
            critique = critique[: self.answer_length - len(mark) - len(verdict)]
            for prompt, text in ((mark, []), (self.marks[CRITIQUE], [*critique, *mark])):
                ids = [*prompt, *text, *verdict]
                weights = [*[0.0] * len(prompt), *[1.0] * len(text), *verdict_weights]
                branches.append(Branch(question=question, ids=ids, loss_weights=weights))
        return branches

    def _chain_branch(self, prompt: Ids, chain: Ids) -> Branch:
        """Returns a branch that is trained to write a chain, given the prompt only.

        It begins with the last token of the prompt, from which the chain's first is predicted.
        """
        chain = [*chain, self.prompts.eos_ids[0]][: self.prompts.completion_length]
        question = StepQueryTokens(prompt=prompt[:-1], lines=[])
        return Branch(
            question=question, ids=[prompt[-1], *chain], loss_weights=[0.0] + [1.0] * len(chain)
        )

    def pack(
        self, rows: Sequence[Sequence[Branch]], width: int, branch_start: int | None = None
    ) -> Packed:
        """Packs rows of branches; the step queries of a row share their query-product pair.

        The trunk is the longest step query of the row, cut to the maximum length of a chain. Lines
        in which another step query differs from it are part of that one's branch.

        Args:
          rows: at least one branch each.
          width: tokens of a row; branches that do not fit are left out.
          branch_start: column at which the branches of all rows begin, the trunks being padded on
            the left. If None, each row begins with its trunk, directly followed by its branches.
        """
        shape = len(rows), width
        tokens = np.full(shape, self.prompts.pad_id, np.int32)
        positions, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        mask = np.zeros((*shape, width), bool)
        ends = np.full((len(rows), max(map(len, rows))), -1, np.int32)
        tri = np.tri(width, dtype=bool)
        for b, row in enumerate(rows):
            trunk, suffixes = self._split_row(row)
            size = len(trunk.ids)
            column = size if branch_start is None else branch_start
            first = column - size
            cells = slice(first, column)
            tokens[b, cells], positions[b, cells] = trunk.ids, np.arange(size)
            mask[b, cells, cells] = tri[:size, :size]
            for n, (branch, (start, ids)) in enumerate(zip(row, suffixes, strict=True)):
                size = len(ids)
                if column + size > width:
                    continue
                cells = slice(column, column + size)
                tokens[b, cells], positions[b, cells] = ids, np.arange(start, start + size)
                mask[b, cells, first : first + start] = True
                mask[b, cells, cells] = tri[:size, :size]
                column += size
                if branch.loss_weights:
                    weights[b, column - len(branch.loss_weights) : column] = branch.loss_weights
                ends[b, n] = column - 1
        return Packed(
            tokens=tokens, positions=positions, mask=mask, loss_weights=weights, ends=ends
        )

    def size(self, row: Sequence[Branch]) -> int:
        """Returns the number of tokens that ``pack`` needs for a row, trunk and branches."""
        trunk, suffixes = self._split_row(row)
        return len(trunk.ids) + sum(len(ids) for _, ids in suffixes)

    def _split_row(self, row: Sequence[Branch]) -> tuple[StepQueryTokens, list[tuple[int, Ids]]]:
        """Returns the trunk of a row, and each branch's prefix length in it and suffix after it."""
        longest = max((branch.question for branch in row), key=lambda question: len(question.lines))
        trunk, suffixes = self._trunk(longest), []
        for branch in row:
            lines = branch.question.lines
            shared = _common_prefix_length(trunk.lines, lines)
            prefix = len(branch.question.prompt) + sum(map(len, lines[:shared]))
            suffixes.append((prefix, [*_flatten(lines[shared:]), *branch.ids]))
        return trunk, suffixes

    def _trunk(self, question: StepQueryTokens) -> StepQueryTokens:
        """Returns the step query without the last lines that exceed the maximum chain length."""
        count, left = 0, self.prompts.completion_length
        while count < len(question.lines) and (left := left - len(question.lines[count])) >= 0:
            count += 1
        return StepQueryTokens(prompt=question.prompt, lines=question.lines[:count])

    def padded(self, rows: Sequence[Ids], length: int) -> PromptBatch:
        """Pads rows on the left to a length, so that the last column predicts the next token."""
        tokens = np.full((len(rows), length), self.prompts.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row_tokens, row_mask, ids in zip(tokens, mask, rows, strict=True):
            row_tokens[length - len(ids) :], row_mask[length - len(ids) :] = ids, True
        return PromptBatch(tokens=tokens, mask=mask)  # pyright: ignore[reportArgumentType]

    def sft_batch(
        self,
        chains: Sequence[Sequence[StepQuery]],
        answer_budget: int,
        rng: np.random.Generator,
        reference_chains: Sequence[str] | None = None,
    ) -> tuple[SftBatch, int]:
        """Builds a training batch, one row per chain; only answers and reference chains have loss.

        Args:
          chains: step queries of one pair each, at least one each.
          answer_budget: tokens for the answers of a row.
          rng: consumed; decides which answers are left out if the budget is too small.
          reference_chains: the chain that the PRM should write for each pair itself, "" for none.
            The row is widened for it.

        Returns:
          The batch, and the number of answers that were left out.
        """
        questions = iter(self.questions([step_query for chain in chains for step_query in chain]))
        rows = []
        for chain in chains:
            branches = self.answers(chain, [next(questions) for _ in chain])
            rows.append([branches[n] for n in rng.permutation(len(branches))])
        width = self.trunk_length + answer_budget
        if reference_chains is not None:
            width += self.prompts.completion_length + 1
            for row, ids in zip(rows, self.prompts.encode(reference_chains), strict=True):
                row[:0] = [self._chain_branch(row[0].question.prompt, ids)] if ids else []
        packed = self.pack(rows, width, branch_start=self.trunk_length)
        batch = SftBatch(
            tokens=jnp.asarray(packed.tokens),
            positions=jnp.asarray(packed.positions),
            loss_weights=jnp.asarray(packed.loss_weights),
            mask=jnp.asarray(packed.mask),
            prompt_length=self.trunk_length,
        )
        return batch, sum(map(len, rows)) - int((packed.ends >= 0).sum())


def step_query_format(lm: LanguageModel, answer_length: int) -> StepQueryFormat:
    """The format of a process reward model, all of whose sequences fit into its context.

    Raises:
      UserError: if they do not.
    """
    form = StepQueryFormat(prompts=lm.prompts, answer_length=answer_length)
    check_context(lm.model.config, form.trunk_length + answer_length)
    return form


def _flatten(lines: Sequence[Ids]) -> Ids:
    return [token for line in lines for token in line]


def _common_prefix_length(lines: Sequence[Ids], others: Sequence[Ids]) -> int:
    """Returns how many leading lines ``lines`` and ``others`` share."""
    count = 0
    while count < min(len(lines), len(others)) and lines[count] == others[count]:
        count += 1
    return count
