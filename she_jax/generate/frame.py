"""What stands around the query and the product of a prompt, as text and as tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from she_jax.models.chat import MARK, render_chat
from she_jax.models.tokenizer import PlainText, control_tokens
from she_jax.types import UserError

QUERY = "query:"
THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The texts before the query and after the product, and their control tokens.

    A control token parts the text on its sides, so what lies between two of them is encoded at
    once: ``begin``, then ``head``, query, product and ``tail`` as one text, then ``end``.

    Attributes:
      opening, closing: the whole texts.
      begin: token ids of the opening, up to its last control token at least.
      head, tail: what is left of opening and closing.
      end: token ids of the closing, from its first control token on.
      closed_thought: whether an empty thought stands in place of one that the template opens.
    """

    opening: str
    closing: str
    begin: tuple[int, ...]
    head: str
    tail: str
    end: tuple[int, ...]
    closed_thought: bool = False


def plain_frame(tokenizer: Tokenizer, instruction: str = "") -> Frame:
    """The frame for a model without a chat template.

    It begins with what the tokenizer's post-processor puts before every text.

    Args:
      tokenizer: of the model.
      instruction: before query and product, if there is one.
    """
    opening, closing = f"{instruction}\n\n{QUERY}" if instruction else QUERY, "\n\n"
    return Frame(
        opening=opening,
        closing=closing,
        begin=added_tokens(tokenizer)[0],
        head=opening,
        tail=closing,
        end=(),
    )


def chat_frame(
    tokenizer: Tokenizer,
    template: str,
    instruction: str,
    specials: Mapping[str, str],
    *,
    thinking: bool,
) -> Frame:
    """The frame that a chat template makes of a user's message.

    Args:
      tokenizer: of the model.
      template: jinja2 source.
      instruction: description of the task, before query and product.
      specials: texts of the special tokens that the template uses, by name.
      thinking: the template's ``enable_thinking``. If it is False and the template opens a thought
        nevertheless, the thought is closed: a chain does not come in the middle of it.

    Raises:
      UserError: if the template does not render, or not the message as it is.
    """
    content = f"{instruction}\n\n{QUERY}{MARK}"
    chat, variables = [{"role": "user", "content": content}], dict[str, Any](specials)
    text = render_chat(template, chat, enable_thinking=thinking, **variables)
    if text.count(content) != 1 or text.count(MARK) != 1:
        raise UserError(
            "the chat template leaves out the user's message, changes or repeats it: use another "
            "model"
        )
    opening, _, closing = text.partition(MARK)
    thought = closing.rfind(THINK)
    closes = not thinking and thought > closing.rfind(THINK_END)
    if closes:
        closing = f"{closing[:thought]}{THINK}\n\n{THINK_END}\n\n"
    bare = Tokenizer.from_str(tokenizer.to_str())
    bare.post_processor = None  # type: ignore[assignment] - it moves offsets
    control = set(control_tokens(tokenizer).values())
    before, after = bare.encode_batch([opening, closing], add_special_tokens=False)
    last = max((n for n, index in enumerate(before.ids) if index in control), default=-1)
    first = next((n for n, index in enumerate(after.ids) if index in control), len(after.ids))
    return Frame(
        opening=opening,
        closing=closing,
        begin=tuple(before.ids[: last + 1]),
        head=opening[before.offsets[last][1] if last >= 0 else 0 :],
        tail=closing[: after.offsets[first][0] if first < len(after.ids) else len(closing)],
        end=tuple(after.ids[first:]),
        closed_thought=closes,
    )


def settled(frame: Frame, plain: PlainText) -> Frame:
    """The frame with the text before ``query:`` as tokens, if no text after it can change them.

    Prompts are then encoded without their instruction, which is the same in all of them.
    """
    front, word, _ = frame.head.rpartition(QUERY)
    if not front:
        return frame
    begins = set()
    for probe in (" a", " 1", " ?", "'s", "\n", " "):
        whole, rest = plain.encode([f"{front}{word}{probe}", f"{word}{probe}"])
        begins.add(tuple(whole[: -len(rest)]) if whole[-len(rest) :] == rest else None)
    ids = begins.pop()
    if begins or ids is None:
        return frame
    return replace(frame, begin=(*frame.begin, *ids), head=word)


def added_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The token ids that the tokenizer's post-processor puts before and after every text."""
    encoding = tokenizer.encode("query")
    text = [n for n, special in enumerate(encoding.special_tokens_mask) if not special]
    ids = encoding.ids
    return tuple(ids[: text[0]]), tuple(ids[text[-1] + 1 :])
