"""A model's vocabulary: its tokenizer, chat template and special tokens, read and checked."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from she_jax.models.chat import turn_end
from she_jax.models.huggingface import SPECIALS, StoredModel
from she_jax.models.tokenizer import control_tokens
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


def read_vocabulary(path: Path, stored: StoredModel) -> tuple[Vocabulary, list[str]]:
    """The vocabulary of a stored model, and what was set right to get it, for the user.

    The first of ``eos_ids`` is what the chat template writes behind an assistant's turn, then comes
    the tokenizer's own ``eos_token``, then whatever else is declared.

    Raises:
      UserError: if tokenizer and model do not belong together, or no end of sequence is declared.
    """
    rows = stored.config.vocab_size
    tokenizer, notes = _fit_rows(path, stored.tokenizer, rows)
    specials = {n: t for n, t in stored.specials.items() if tokenizer.token_to_id(t) is not None}
    ends = [tokenizer.token_to_id(specials.get("eos_token", "")), *stored.eos_ids]
    if stored.chat_template is not None:
        ends = [turn_end(stored.chat_template, specials, tokenizer), *ends]
    eos_ids = tuple(dict.fromkeys(index for index in ends if index is not None))
    if not eos_ids or not all(0 <= index < rows for index in eos_ids):
        raise UserError(
            f"{path}: end-of-sequence ids {list(eos_ids)}, expected at least one, below "
            f"{rows}; declare eos_token_id in generation_config.json"
        )
    pad_id = choose_pad(tokenizer, stored.pad_ids, eos_ids, rows)
    specials = {"eos_token": tokenizer.id_to_token(eos_ids[0])} | specials
    specials |= {"pad_token": tokenizer.id_to_token(pad_id)}
    vocabulary = Vocabulary(
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        pad_id=pad_id,
        chat_template=stored.chat_template,
        specials={name: text for name, text in specials.items() if text is not None},
    )
    return vocabulary, notes


def _fit_rows(path: Path, tokenizer: Tokenizer, rows: int) -> tuple[Tokenizer, list[str]]:
    """The tokenizer without control tokens beyond the rows of the model, which nothing writes."""
    beyond = {
        token: index
        for token, index in tokenizer.get_vocab(with_added_tokens=True).items()
        if index >= rows
    }
    if not beyond and tokenizer.get_vocab_size():
        return tokenizer, []
    if not beyond or not beyond.items() <= control_tokens(tokenizer).items():
        raise UserError(
            f"{path}: the tokenizer has ids up to {max(beyond.values(), default=-1)}, the model "
            f"has {rows} rows; they do not belong together"
        )
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    note = f"{path}: the tokens {sorted(beyond)} have no row in the model and are left out"
    return Tokenizer.from_str(json.dumps(state)), [note]


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


def special_texts(vocabulary: Vocabulary, rows: int) -> dict[str, str]:
    """Text of the special tokens, after checking that they exist and match the ids."""
    tokenizer, eos_ids, pad_id = vocabulary.tokenizer, vocabulary.eos_ids, vocabulary.pad_id
    ends = [token for index in eos_ids if (token := tokenizer.id_to_token(index)) is not None]
    if not ends or len(ends) < len(eos_ids):
        raise UserError(f"eos_ids={list(eos_ids)}: expected at least one, each a token")
    if not 0 <= pad_id < rows or pad_id in eos_ids:
        raise UserError(f"pad_id={pad_id}: expected an id below {rows}, not among eos_ids")
    for name, text in vocabulary.specials.items():
        if name not in SPECIALS or tokenizer.token_to_id(text) is None:
            raise UserError(f"specials {name}={text!r}: expected a token, and one of {SPECIALS}")
    texts = {"eos_token": ends[0]} | dict(vocabulary.specials)
    if texts["eos_token"] not in ends:
        raise UserError(f"eos_token {texts['eos_token']!r} is not among eos_ids={list(eos_ids)}")
    texts.pop("pad_token", None)
    pad = tokenizer.id_to_token(pad_id)
    return texts if pad is None else texts | {"pad_token": pad}
