"""Byte-level BPE tokenizers: bytes of a token, control tokens, text from outside, word splits."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate

from tokenizers import Encoding, Regex, Tokenizer, decoders, pre_tokenizers

from she_jax.types import UserError

# The word split of the models' tokenizer.json files; %s quantifies the digits of one word.
_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_END = "<|endoftext|>"


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary represents (GPT-2's table).

    Printable Latin-1 characters represent themselves. The characters from U+0100 on represent the
    other bytes, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def token_bytes(tokenizer: Tokenizer, size: int | None = None) -> list[bytes]:
    """The bytes that each token id represents.

    The joined bytes of a text's token ids are the text in UTF-8 (after the tokenizer's normalizer,
    if any). Decoding id by id would garble a character that is split between two tokens. Characters
    missing from the vocabulary are lost when encoding (SmolLM2's lacks six control characters and
    some planes beyond U+40000).

    Args:
      tokenizer: a byte-level BPE tokenizer.
      size: length of the result, for a model whose embedding has more rows than the tokenizer has
        tokens.

    Returns:
      One entry per token id; ``b""`` for special tokens and for ids that are no token.

    Raises:
      UserError: if the tokenizer is not byte-level, or ``size`` is less than its vocabulary.
    """
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    needed = max(vocab.values(), default=-1) + 1
    if size is not None and size < needed:
        raise UserError(f"size={size}: the tokenizer has ids up to {needed - 1}")
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise UserError(
            f"tokenizer decoder {type(tokenizer.decoder).__name__}: expected ByteLevel; "
            "token bytes are defined for byte-level BPE tokenizers only"
        )
    alphabet = _byte_alphabet()
    added = tokenizer.get_added_tokens_decoder()
    table = [b""] * (needed if size is None else size)
    for token, index in vocab.items():
        if index in added:
            table[index] = b"" if added[index].special else added[index].content.encode()
        elif all(char in alphabet for char in token):
            table[index] = bytes(alphabet[char] for char in token)
        else:
            raise UserError(f"token {index} {token!r} is not written in the byte-level alphabet")
    return table


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens that frame text and are none themselves, by name.

    All added tokens, special or not, except those that are not special and spell one character or
    white space: some tokenizers keep rare letters and runs of blanks among their added tokens.
    """
    added = tokenizer.get_added_tokens_decoder()
    return {
        token.content: index
        for index, token in added.items()
        if token.special or not (len(token.content) == 1 or token.content.isspace())
    }


class PlainText:
    """Encodes text from outside, in which the name of a control token is text like any other.

    Such a name and the text on its sides are encoded apart, as transformers' chats are with
    ``sanitize_control_tokens=True``.

    Raises:
      UserError: if the tokenizer's merges write a control token.
    """

    def __init__(self, tokenizer: Tokenizer):
        control = control_tokens(tokenizer)
        names = sorted(control, key=len, reverse=True)
        self._names = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in control]
        state["post_processor"] = None  # it adds tokens, and moves offsets
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        for name, ids in zip(names, self.encode(names), strict=True):
            if control[name] in ids:
                raise UserError(f"tokenizer: plain text becomes its control token {name!r}")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        return [[i for _, piece in row for i in piece.ids] for row in self._pieces(texts)]

    def starts(self, texts: Sequence[str]) -> list[list[int]]:
        """The character at which each token of each text begins."""
        return [
            [start + offset for start, piece in row for offset, _ in piece.offsets]
            for row in self._pieces(texts)
        ]

    def _pieces(self, texts: Sequence[str]) -> Iterator[list[tuple[int, Encoding]]]:
        """The encoded pieces of each text, and where they begin in it."""
        rows = [self._names.split(text) for text in texts]
        flat = [piece for row in rows for piece in row]
        encodings = iter(self._tokenizer.encode_batch(flat, add_special_tokens=False))
        for row in rows:
            starts = accumulate(map(len, row), initial=0)
            yield [(start, next(encodings)) for start, _ in zip(starts, row, strict=False)]


def split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    """The word split of Qwen2 (``digits=""``) and Llama 3 (``"{1,3}"``, the digits of one word)."""
    words = pre_tokenizers.Split(Regex(_WORD_PATTERN % digits), behavior="isolated")
    return pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def is_qwen2(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer equals the one that transformers 5 builds for every model of type qwen2.

    Whatever ``tokenizer.json`` says, transformers takes no more than vocabulary, merges, added
    tokens and post-processor from it.
    """
    state = json.loads(tokenizer.to_str())
    model, pre = state["model"], state["pre_tokenizer"] or {}
    parts = [{**part, "trim_offsets": None} for part in pre.get("pretokenizers", [])]
    expected = json.loads(split_words("").__getstate__())["pretokenizers"]
    options = ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    return (
        state["normalizer"] == {"type": "NFC"}
        and parts == [{**part, "trim_offsets": None} for part in expected]
        and not any(model.get(name) for name in (*options, *affixes))
        and tokenizer.token_to_id(_QWEN2_END) is not None  # added otherwise
    )
