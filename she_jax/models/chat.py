"""Chat templates: rendering, and the token that ends an assistant's turn."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from she_jax.models.tokenizer import control_tokens
from she_jax.types import UserError

MARK = "\ue000"  # stands for a text; private use, so that no template writes it


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``, with which templates mark what the assistant wrote; no text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


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

    environment = _sandbox()

    # jinja2's own tojson escapes for HTML, which would change the text of tool calls.
    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"chat template: {error}") from error


def render(template: str, name: str, **variables: Any) -> str:
    """Renders any other template that may come with a downloaded model, in the same sandbox.

    Raises:
      UserError: if it is invalid, or does something the sandbox forbids; begins with ``name``.
    """
    try:
        return _sandbox().from_string(template).render(**variables)
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"{name}: {error}") from error


def _sandbox() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        loader=jinja2.DictLoader({}),  # an include fails with a clear error
    )


def turn_end(template: str, specials: Mapping[str, str], tokenizer: Tokenizer) -> int | None:
    """The control token that a template writes behind an assistant's text, or None.

    None, too, for a template that renders no assistant's message.
    """
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    try:
        text = render_chat(template, chat, add_generation_prompt=False, **specials)
    except UserError:
        return None
    behind = text.partition(MARK)[2].lstrip()
    ids = tokenizer.encode(behind, add_special_tokens=False).ids
    return ids[0] if ids and ids[0] in control_tokens(tokenizer).values() else None
