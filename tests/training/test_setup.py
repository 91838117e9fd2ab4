"""What a model in files says on its way to a language model."""

import shutil

import pytest
from recipes import GOLDEN, config

from she_jax.cot import CotSchema
from she_jax.models.sharding import make_mesh
from she_jax.runs.config import parse
from she_jax.training.setup import make_language_model


@pytest.fixture
def make(tmp_path):
    """A language model from a copy of a golden checkpoint, with files that differ."""

    def language_model(changes=(), **lengths):
        folder = shutil.copytree(GOLDEN / "llama", tmp_path / "llama")
        for name, text in dict(changes).items():
            (folder / name).write_text(text)
        settings = {f"model__{name}": value for name, value in lengths.items()}
        model = parse(config(model__name=str(folder), **settings), tmp_path).model
        return make_language_model(model, CotSchema(), make_mesh(data=-1))

    return language_model


def test_sequences_beyond_the_context_are_refused_with_the_figures(make):
    with pytest.raises(ValueError, match=r"take 65 tokens together, .* trained on 64 at most"):
        make(prompt_length=40, completion_length=25)


def test_an_error_of_a_chat_template_names_the_model(make):
    with pytest.raises(ValueError, match=r"llama: chat template: .*unknown tag 'oops'"):
        make({"chat_template.jinja": "{% oops %}"}, prompt_length=40, completion_length=24)
