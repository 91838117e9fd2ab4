"""Encodes prompts and completions as token ids of fixed length, and decodes completions.

A prompt is one text, encoded at once: the frame's opening, the query, the product, the frame's
closing (see ``Frame``). The frame comes from the model's chat template, if it has one, and only it
holds control tokens. A product title that contains ``<|im_end|>`` is encoded as plain text.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from she_jax.cot import LABEL_STEP, CotSchema, Step
from she_jax.generate.frame import Frame, chat_frame, plain_frame, settled
from she_jax.models.chat import render
from she_jax.models.tokenizer import PlainText, token_bytes
from she_jax.types import Example, PromptBatch, Rollout, UserError

PAD, EOS = "<pad>", "<eos>"
_TASK = "Judge how well the product answers the query. Write these lines:"
SHARED = 32  # tokens that all prompts begin with, from which on it pays to read them once a batch
MIN_TEXT = 8  # tokens that a bucket must leave for the query and the product


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer; id 0 is ``<pad>`` and id 1 ``<eos>``.

    Args:
      texts: the training corpus.
      vocab_size: upper bound on the vocabulary size, at least 258 (the bytes and two specials).

    Raises:
      UserError: if ``vocab_size`` is below 258.
    """
    if vocab_size < 258:
        raise UserError(f"vocab_size={vocab_size}: 256 bytes and 2 special tokens need 258")
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
    """The query as written in a prompt."""
    return f" {example.query}"


def product_text(example: Example) -> str:
    """The product as written in a prompt, one line per field."""
    return "".join(f"\n{name}: {text}" for name, text in example.product.items())


def instruction(schema: CotSchema) -> str:
    """The description of the task in the prompt of an instruction-tuned model.

    A template of one's own (``schema.instruction``) has the variables ``steps`` (each with
    ``name``, ``meaning``, ``verdicts``, ``optional``), ``labels`` (worst to best, each with
    ``value`` and ``meaning``), and ``lines``, the steps as the default text has them.

    Raises:
      UserError: if the template cannot be rendered.
    """
    labels = schema.labels
    meanings = labels.meanings or ("worst", *[""] * (len(labels.values) - 2), "best")
    described = [
        f"{text} {meaning}" for text, meaning in zip(labels.texts, meanings, strict=True) if meaning
    ]
    scale = f"{'|'.join(labels.texts)} ({', '.join(reversed(described))})"
    lines = [
        f"{LABEL_STEP}: {scale}" if step.name == LABEL_STEP else _described(step)
        for step in schema.steps
    ]
    if not schema.instruction:
        return "\n".join([_TASK, *lines])
    named = zip(labels.values, labels.meanings or [""] * len(labels.values), strict=True)
    text = render(
        schema.instruction,
        "chain.instruction",
        steps=[asdict(step) for step in schema.steps],
        labels=[{"value": value, "meaning": meaning} for value, meaning in named],
        lines=lines,
    )
    return text.strip()


def _described(step: Step) -> str:
    """A step's line; the checks are as many as there are attributes, other optional ones say so."""
    line = step.line.replace("?:", ":", 1)
    return f"{line} (optional)" if step.optional and not step.name.startswith("check_") else line


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """Converts between texts and token ids for one model and one schema.

    Attributes:
      tokenizer: byte-level BPE.
      schema: the steps of the chain.
      eos_ids: tokens that end a completion; training targets end with the first.
      pad_id: padding token.
      prompt_length: maximum number of tokens in a prompt, P.
      completion_length: maximum number of tokens in a chain, including its end token, C.
      chat_template: jinja2 source, or None for a model without one, which gets only an
        instruction that the schema brings.
      specials: texts of the special tokens that the template uses, by name.
      thinking: whether the template may ask the model to think before it writes its chain.
      frame: what stands around query and product.
      token_bytes: the bytes of each token id.
      token_ids: the inverse of ``token_bytes``.

    Raises:
      UserError: if ``prompt_length`` leaves fewer than ``MIN_TEXT`` tokens beside the frame, or if
        the chat template drops the user's message.
    """

    tokenizer: Tokenizer
    schema: CotSchema
    eos_ids: tuple[int, ...]
    pad_id: int
    prompt_length: int
    completion_length: int
    chat_template: str | None = None
    specials: Mapping[str, str] = field(default_factory=dict)
    thinking: bool = False
    frame: Frame = field(init=False, repr=False)
    _plain: PlainText = field(init=False, repr=False)
    token_bytes: list[bytes] = field(init=False, repr=False)
    token_ids: dict[bytes, int] = field(init=False, repr=False)

    def __post_init__(self):
        if self.chat_template is None:
            own = instruction(self.schema) if self.schema.instruction else ""
            frame = plain_frame(self.tokenizer, own)
        else:
            frame = chat_frame(
                self.tokenizer,
                self.chat_template,
                instruction(self.schema),
                self.specials,
                thinking=self.thinking,
            )
        plain = PlainText(self.tokenizer)
        object.__setattr__(self, "frame", settled(frame, plain))
        object.__setattr__(self, "_plain", plain)
        size = len(self._framed([("", "")])[0])
        if self.prompt_length < size + MIN_TEXT:
            raise UserError(
                f"prompt_length={self.prompt_length}: the instruction takes {size} tokens, and the "
                f"query and product need {MIN_TEXT} at least; set {size + 64} or more"
            )
        table = token_bytes(self.tokenizer)
        object.__setattr__(self, "token_bytes", table)
        object.__setattr__(self, "token_ids", {piece: i for i, piece in enumerate(table)})

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts outside the frame. Control tokens are encoded as plain text."""
        distinct = list(dict.fromkeys(texts))  # the prompts of a reward model repeat many lines
        ids = dict(zip(distinct, self._plain.encode(distinct), strict=True))
        return [[*ids[text]] for text in texts]

    @property
    def shared(self) -> int:
        """Number of tokens that all prompts begin with, 0 if they are too few to be read apart."""
        return len(self.frame.begin) if len(self.frame.begin) >= SHARED else 0

    def newlines(self, vocab_size: int) -> Int[np.ndarray, "V"]:
        """Number of newlines in each token, int32, for ``she_jax.rl.steps.step_ids``."""
        counts = [token.count(b"\n") for token in self.token_bytes[:vocab_size]]
        padded = np.zeros(vocab_size, np.int32)
        padded[: len(counts)] = counts
        return padded

    def encode_prompts(self, examples: Sequence[Example]) -> tuple[PromptBatch, int]:
        """Encodes prompts, padded on the left to P.

        If a prompt is too long, its query is cut to the tokens that the product leaves, but to no
        less than half of the available ones. Then the product is cut to the rest. Both texts lose
        their end. Of a chat, what is left is encoded like any other text, since others send texts;
        without a chat template, the tokens that are left stay as they are.

        Returns:
          The batch, and the number of prompts that were cut.
        """
        prompts, cut = self._cut(examples)
        tokens = np.full((len(examples), self.prompt_length), self.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(prompts):
            tokens[row, -len(ids) :] = ids
            mask[row, -len(ids) :] = True
        return PromptBatch(tokens=tokens, mask=mask), cut  # pyright: ignore[reportArgumentType]

    def _cut(self, examples: Sequence[Example]) -> tuple[list[list[int]], int]:
        """The token ids of prompts, none longer than P, and how many of them were cut."""
        texts = [(query_text(example), product_text(example)) for example in examples]
        prompts = self._framed(texts)
        too_long = [row for row, ids in enumerate(prompts) if len(ids) > self.prompt_length]
        cut = len(too_long)
        if self.chat_template is None:
            for row in too_long:
                prompts[row] = self._shorten_tokens(*texts[row], prompts[row])
            too_long = []
        while too_long:  # a text that ends elsewhere may have other, and more, tokens at its end
            shorter = self._shorten([texts[row] for row in too_long])
            for row, text, ids in zip(too_long, shorter, self._framed(shorter), strict=True):
                texts[row], prompts[row] = text, ids
            too_long = [row for row in too_long if len(prompts[row]) > self.prompt_length]
        return prompts, cut

    def prompt_sizes(self, examples: Sequence[Example]) -> Int[np.ndarray, "N"]:
        """The number of tokens that each prompt takes, however long."""
        texts = [(query_text(example), product_text(example)) for example in examples]
        return np.array([len(ids) for ids in self._framed(texts)], int)

    def _whole(self, query: str, product: str) -> str:
        return f"{self.frame.head}{query}{product}{self.frame.tail}"

    def _framed(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """The token ids of whole prompts, from the texts of query and product."""
        begin, end = self.frame.begin, self.frame.end
        whole = [self._whole(query, product) for query, product in texts]
        return [[*begin, *ids, *end] for ids in self._plain.encode(whole)]

    def _shorten(self, texts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The texts of prompts that are too long, cut to the tokens that there are for them."""
        frame, shorter = self.frame, []
        encoded = self._plain.starts([self._whole(query, product) for query, product in texts])
        for (query, product), starts in zip(texts, encoded, strict=True):
            edges = np.cumsum([len(frame.head), len(query), len(product)])
            query_stop, middle, product_stop, last = self._limits(starts, edges)
            query_end = starts[query_stop] if query_stop < middle else edges[1]
            product_end = starts[product_stop] if product_stop < last else edges[2]
            query = query[: query_end - edges[0]].rstrip()
            shorter.append((query, product[: product_end - edges[1]].rstrip()))
        return shorter

    def _shorten_tokens(self, query: str, product: str, ids: Sequence[int]) -> list[int]:
        """The token ids of a prompt that is too long, without the last of query and product."""
        (starts,) = self._plain.starts([self._whole(query, product)])
        edges = np.cumsum([len(self.frame.head), len(query), len(product)])
        query_stop, middle, product_stop, last = (
            len(self.frame.begin) + index for index in self._limits(starts, edges)
        )
        return [*ids[:query_stop], *ids[middle:product_stop], *ids[last:]]

    def _limits(
        self, starts: Sequence[int], edges: Int[np.ndarray, "3"]
    ) -> tuple[int, int, int, int]:
        """Where the query's tokens are cut and where they end, then the same of the product's.

        Args:
          starts: the character at which each token of the text begins.
          edges: the characters at which the query begins, and at which query and product end.
        """
        first, middle, last = map(int, np.searchsorted(starts, edges))
        room = self.prompt_length - len(self.frame.begin) - len(self.frame.end)
        room -= len(starts) - (last - first)
        kept = min(middle - first, max(room - (last - middle), room // 2))
        return first + kept, middle, min(middle + room - kept, last), last

    def encode_chains(
        self, chains: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B C"], Bool[np.ndarray, "B C"], int]:
        """Encodes chains as completions with an end token, padded on the right to C.

        Returns:
          Token ids, the mask of real tokens, and the number of chains that were cut, which have no
          end token.
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

    def decode(self, rollout: Rollout) -> list[str]:
        """Decodes the completions; bytes that are not UTF-8 become U+FFFD."""
        table = self.token_bytes
        tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.completion_mask)
        return [
            b"".join(table[t] if t < len(table) else b"" for t in row[row_mask]).decode(
                "utf-8", "replace"
            )
            for row, row_mask in zip(tokens, mask, strict=True)
        ]

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token of a completion adds; joined they are what ``decode`` gives.

        A character of several tokens is added by the last of them.
        """
        decoder, table = codecs.getincrementaldecoder("utf-8")("replace"), self.token_bytes
        last = len(tokens) - 1
        return [
            decoder.decode(table[t] if t < len(table) else b"", final=n == last)
            for n, t in enumerate(tokens)
        ]

    def truncated(self, rollout: Rollout) -> Bool[np.ndarray, "B"]:
        """True for rollouts whose completion has no end token."""
        ended = np.isin(np.asarray(rollout.tokens), self.eos_ids)
        return np.logical_not((ended & np.asarray(rollout.completion_mask)).any(axis=1))


def tokenizer_corpus(examples: Iterable[Example]) -> Iterator[str]:
    """Yields the prompts and rationales of examples, to train a tokenizer on."""
    for example in examples:
        yield f"query:{query_text(example)}{product_text(example)}\n\n"
        if example.rationale:
            yield example.rationale


def positions(mask: Any) -> Int[np.ndarray, "B T"]:
    """Position of each real token in its row, counted without padding; -1 on padding."""
    mask = np.asarray(mask)
    return np.where(mask, np.cumsum(mask, axis=1) - 1, -1).astype(np.int32)
