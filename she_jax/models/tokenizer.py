"""A model's vocabulary: bytes of a token id, chat templates, choice of a padding id.

Every tokenizer here is a ``tokenizers.Tokenizer``. Encode text from ``render_chat`` with
``add_special_tokens=False``, since the template has already written the special tokens.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders

from she_jax.types import UserError


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A model's tokenizer, special tokens and chat template.

    Attributes:
      tokenizer: the tokenizer, without truncation or padding.
      eos_ids: tokens that end a sequence, usually the main one first; at least one.
      pad_id: padding, never one of ``eos_ids`` (see ``choose_pad``); may be an id that is no token.
      chat_template: jinja2 source for ``render_chat``, or None.
      specials: text of ``bos_token``, ``eos_token``, ``pad_token`` and ``unk_token``, of those that
        are declared; chat templates use them.
    """

    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    pad_id: int
    chat_template: str | None = None
    specials: Mapping[str, str] = field(default_factory=dict)


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


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Renders a conversation with a model's chat template.

    The template comes with a model's weights and is not trusted: it runs in jinja2's immutable
    sandbox and sees only its arguments, no clock and no files.

    Args:
      template: jinja2 source, ``Vocabulary.chat_template``.
      messages: ``{"role": ..., "content": ...}`` each, in order.
      add_generation_prompt: end with the opening of the assistant's turn.
      variables: other variables of the template, usually ``**Vocabulary.specials``.

    Raises:
      UserError: if the template is invalid, does something the sandbox forbids, or rejects the
        messages.
    """

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        loader=jinja2.DictLoader({}),  # an include fails with a clear error
    )
    # jinja2's own tojson escapes for HTML, which would change the text of tool calls.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"chat template: {error}") from error


def choose_pad(
    tokenizer: Tokenizer, declared: Iterable[int | None], eos_ids: Sequence[int], vocab_size: int
) -> int:
    """Chooses a padding id that is not an end-of-sequence id.

    Models often declare one token for both, and a sampler that masks padding would then never end.
    The first of these that exists is chosen: a declared id outside ``eos_ids``, a special token
    with ``pad`` in its name, ``<|endoftext|>`` or ``<unk>``, any other special token (the highest,
    since the low ones open sequences and turns), an embedding row that is no token.

    Raises:
      UserError: if none of them exists.
    """
    for index in declared:
        if index is not None and 0 <= index < vocab_size and index not in eos_ids:
            return index
    added = tokenizer.get_added_tokens_decoder()
    names = {i: t.content for i, t in added.items() if t.special and i not in eos_ids}
    tokens = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    candidates = [
        *(i for i, name in names.items() if "pad" in name.lower()),
        *(i for i, name in names.items() if name in ("<|endoftext|>", "<unk>")),
        *sorted(names, reverse=True),
        *range(tokens, min(tokens + 1, vocab_size)),
    ]
    if not candidates:
        raise UserError(
            f"no padding token: all special tokens end a sequence (ids {list(eos_ids)}); "
            "add a special token to the tokenizer and declare it as pad_token"
        )
    return candidates[0]
