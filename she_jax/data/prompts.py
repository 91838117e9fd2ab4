"""Examples to token ids and back: what the policy reads, what it writes, in fixed buckets.

A prompt is five pieces, ``opening, query, middle, product, closing``. The three that are not text
of the shop come from the chat template where the model has one, and only they may hold special
tokens: a product title that spells ``<|im_end|>`` is read as those letters.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from she_jax.cot import CotSchema
from she_jax.models.tokenizer import render_chat, token_bytes
from she_jax.types import Example, PromptBatch, Rollout

PAD, EOS = "<pad>", "<eos>"
MIN_TEXT = 8  # tokens that a bucket must leave for the query and the product
_MEANINGS = {
    "query": "what is asked: product type; required attributes; excluded ones",
    "product": "what is offered",
    "category": "asked type / offered type => {verdicts}",
    "attributes": "each asked attribute / the offered one => {verdicts}",
    "label": "{verdicts} (4 excellent, 3 related, 2 mismatch, 1 irrelevant)",
}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer; id 0 is ``<pad>`` and id 1 ``<eos>``.

    Args:
      texts: what it should write briefly.
      vocab_size: its size at most, 258 (the bytes and the two specials) at least.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size}: 256 bytes and 2 special tokens need 258")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def query_text(example: Example) -> str:
    """The query as it stands in a prompt."""
    return f" {example.query}"


def product_text(example: Example) -> str:
    """The product as it stands in a prompt, a line a field."""
    return "".join(f"\n{name}: {text}" for name, text in example.product.items())


def instruction(schema: CotSchema) -> str:
    """What a model that follows instructions is told of the task."""
    lines = []
    for step in schema.steps:
        meaning = _MEANINGS.get(step.name, "one asked attribute / the offered one => {verdicts}")
        lines.append(f"{step.name}: {meaning.format(verdicts='|'.join(step.verdicts))}")
    return "Judge how well the product answers the query. Write these lines:\n" + "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How examples become tokens for one model and one schema.

    Attributes:
      tokenizer: byte-level BPE.
      schema: the steps of the chain.
      eos_ids: tokens that end a completion; the first one is what training writes.
      pad_id: padding.
      prompt_length: tokens a prompt may have, P.
      completion_length: tokens a chain may have, its end included, C.
      chat_template: jinja2 source; None for a model without one, which is not told the task.
      specials: text of the special tokens that the template asks for.

    Raises:
      ValueError: if ``prompt_length`` leaves no room beside the instruction.
    """

    tokenizer: Tokenizer
    schema: CotSchema
    eos_ids: tuple[int, ...]
    pad_id: int
    prompt_length: int
    completion_length: int
    chat_template: str | None = None
    specials: Mapping[str, str] = field(default_factory=dict)
    _plain: Tokenizer = field(init=False, repr=False)  # reads special tokens as plain letters
    _pieces: tuple[list[int], ...] = field(init=False, repr=False)
    token_bytes: list[bytes] = field(init=False, repr=False)  # what each token id stands for
    token_ids: dict[bytes, int] = field(init=False, repr=False)  # the reverse

    def __post_init__(self):
        plain = Tokenizer.from_str(self.tokenizer.to_str())
        plain.encode_special_tokens = True
        frame = tuple(self._encode(self.tokenizer, self.frame()))
        size = sum(map(len, frame))
        if self.prompt_length < size + MIN_TEXT:
            raise ValueError(
                f"prompt_length={self.prompt_length}: the instruction takes {size} tokens, and the "
                f"query and product need {MIN_TEXT} at least; set {size + 64} or more"
            )
        object.__setattr__(self, "_plain", plain)
        object.__setattr__(self, "_pieces", frame)
        table = token_bytes(self.tokenizer)
        object.__setattr__(self, "token_bytes", table)
        object.__setattr__(self, "token_ids", {piece: i for i, piece in enumerate(table)})

    def frame(self) -> list[str]:
        """The texts before the query, between it and the product, and behind that."""
        if self.chat_template is None:
            return ["query:", "", "\n\n"]
        marks = ("\ue000", "\ue001")  # private use: no template writes them
        content = f"{instruction(self.schema)}\n\nquery:{marks[0]}{marks[1]}"
        chat = [{"role": "user", "content": content}]
        specials: dict[str, Any] = dict(self.specials)
        text = render_chat(self.chat_template, chat, **specials)
        before, found, rest = text.partition(marks[0])
        between, found_too, after = rest.partition(marks[1])
        if not (found and found_too):
            raise ValueError("the chat template leaves out the user's message: use another model")
        return [before, between, after]

    @staticmethod
    def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        # The pieces meet inside a prompt, so none of them gets a beginning or an end of its own.
        return [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that are no part of the template; special tokens are plain letters."""
        distinct = list(dict.fromkeys(texts))  # an examiner asks of the same lines over and over
        coded = dict(zip(distinct, self._encode(self._plain, distinct), strict=True))
        return [[*coded[text]] for text in texts]

    def newlines(self, vocab_size: int) -> Int[np.ndarray, "V"]:
        """How many newlines each token id holds, for ``she_jax.rl.steps.step_ids``."""
        counts = np.zeros(vocab_size, np.int32)
        held = [piece.count(b"\n") for piece in self.token_bytes[:vocab_size]]
        counts[: len(held)] = held
        return counts

    def prompts(self, examples: Sequence[Example]) -> tuple[PromptBatch, int]:
        """Prompts, padded on the left to P.

        Where one is too long, the product gives way first, from its end; then the query, down to a
        half of what there is room for.

        Returns:
          The batch, and how many prompts were cut.
        """
        opening, middle, closing = self._pieces
        room = self.prompt_length - len(opening) - len(middle) - len(closing)
        queries = self.encode([query_text(example) for example in examples])
        products = self.encode([product_text(example) for example in examples])
        tokens = np.full((len(examples), self.prompt_length), self.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        cut = 0
        for row, (query, product) in enumerate(zip(queries, products, strict=True)):
            cut += len(query) + len(product) > room
            query = query[: max(room - len(product), room // 2)]
            ids = [*opening, *query, *middle, *product[: room - len(query)], *closing]
            tokens[row, -len(ids) :] = ids
            mask[row, -len(ids) :] = True
        return PromptBatch(tokens=tokens, mask=mask), cut  # pyright: ignore[reportArgumentType]

    def chains(
        self, chains: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B C"], Bool[np.ndarray, "B C"], int]:
        """Chains as completions, ended and padded on the right to C.

        Returns:
          Token ids, the mask of real tokens, and how many chains were cut (they have no end).
        """
        tokens = np.full((len(chains), self.completion_length), self.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        cut = 0
        for row, ids in enumerate(self.encode(chains)):
            ids = [*ids, self.eos_ids[0]]
            cut += len(ids) > self.completion_length
            ids = ids[: self.completion_length]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return tokens, mask, cut

    def texts(self, rollout: Rollout) -> list[str]:
        """What the completions say, byte for byte but for bytes that are not UTF-8."""
        table = self.token_bytes
        tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.completion_mask)
        return [
            b"".join(table[t] if t < len(table) else b"" for t in row[own]).decode(
                "utf-8", "replace"
            )
            for row, own in zip(tokens, mask, strict=True)
        ]

    def truncated(self, rollout: Rollout) -> Bool[np.ndarray, "B"]:
        """Which rollouts ran out of tokens before their end."""
        ended = np.isin(np.asarray(rollout.tokens), self.eos_ids)
        return np.logical_not((ended & np.asarray(rollout.completion_mask)).any(axis=1))


def training_texts(examples: Iterable[Example]) -> Iterator[str]:
    """What a tokenizer for these examples should write briefly: their prompts and chains."""
    for example in examples:
        yield f"query:{query_text(example)}{product_text(example)}\n\n"
        if example.rationale:
            yield example.rationale


def positions(mask: Any) -> Int[np.ndarray, "B T"]:
    """Position of each real token among the real ones of its row; -1 on padding."""
    mask = np.asarray(mask)
    return np.where(mask, np.cumsum(mask, axis=1) - 1, -1).astype(np.int32)
