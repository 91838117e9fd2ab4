"""Chat templates: rendering as transformers does, and the end of an assistant's turn."""

import pytest
from recipes import byte_level
from tokenizers import AddedToken

from she_jax.models.chat import render_chat, turn_end

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_render_chat_follows_the_conventions_of_transformers():
    """Blocks leave no line behind, tojson does not escape, loops have break, variables arrive."""
    template = (
        "{{ bos_token }}\n"
        "{% for message in messages %}\n"
        "    {% if loop.index == 3 %}{% break %}{% endif %}\n"
        "{{ message['role'] }}: {{ message | tojson }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = [{"role": "user", "content": text} for text in ("<ñ>", "b", "c")]
    written = render_chat(template, messages, bos_token="<s>")
    assert written == (
        "<s>\n"
        'user: {"role": "user", "content": "<ñ>"}\n'
        'user: {"role": "user", "content": "b"}\n'
        "assistant:"
    )
    assert "assistant" not in render_chat(template, messages, add_generation_prompt=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
    ],
)
def test_render_chat_runs_in_a_sandbox_and_reports_failures(template):
    with pytest.raises((ValueError, TypeError), match="chat template"):
        render_chat(template, [{"role": "user", "content": "x"}])


def test_the_generation_tag_marks_the_assistant_and_writes_nothing():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}: {% endif %}"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert render_chat(template, messages) == "a: b"


@pytest.mark.filterwarnings("ignore")  # of what transformers imports
@pytest.mark.parametrize("wrap", ["{% generation %}TEXT{% endgeneration %}", "{{ [1] | tojson }}"])
def test_templates_render_as_in_transformers(wrap):
    from transformers.utils.chat_template_utils import render_jinja_template

    text = "{% set x = m.content %}\n    {{- x }}\n\n   {% if true %}\n  y {% endif %}"
    template = f"{{% for m in messages %}}{wrap.replace('TEXT', text)}{{% endfor %}}"
    messages = [{"role": "user", "content": " <a> "}]
    theirs, _ = render_jinja_template([messages], chat_template=template)
    assert render_chat(template, messages) == theirs[0]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML.replace("<|im_end|>", "\n<|im_end|>"), "<|im_end|>"),
        (CHATML.replace("<|im_end|>", "{{ eos_token }}"), "</s>"),
        (CHATML.replace("<|im_end|>", ""), None),  # a line break and the next turn
        (CHATML.replace("<|im_end|>", " END"), None),
        ("{% if messages[1] %}{{ raise_exception('no turns') }}{% endif %}", None),
    ],
)
def test_a_turn_ends_with_the_token_that_the_template_writes(template, end):
    names = ["<|im_start|>", "<|im_end|>", "</s>"]
    tokenizer = byte_level(added=[AddedToken(name, special=True) for name in names])
    index = turn_end(template, {"eos_token": "</s>"}, tokenizer)
    assert (index and tokenizer.id_to_token(index)) == end
