"""Label probabilities: those of whole labels, normalized over the label set."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import config

from she_jax.cot import CotSchema
from she_jax.generate.prompts import tokenizer_corpus, train_tokenizer
from she_jax.generate.readout import label_tokens, make_label_logits
from she_jax.models.sharding import make_mesh
from she_jax.runs.config import parse
from she_jax.training.setup import make_language_model
from she_jax.types import Example

PAIRS = [
    Example(uid=str(n), query="red mug", product={"title": "mug " * n or "jug"}) for n in range(4)
]


def language_model(labels, **chain):
    """A language model whose tokenizer knows all labels, and its parameters."""
    schema = CotSchema.build(labels=labels, **chain)
    recipe = config(model__completion_length=64, model__prompt_length=96)
    parsed = parse(recipe, Path("unused"))
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    corpus = [f"label: {label}\nquery: mug" for label in schema.labels.texts]
    tokenizer = train_tokenizer([*tokenizer_corpus(PAIRS), *corpus * 9], 330)
    lm, params = make_language_model(parsed.model, schema, mesh, tokenizer=tokenizer)
    return lm, jax.tree.map(lambda x: 3 * x, params)  # away from the uniform distribution


@pytest.mark.parametrize(("labels", "width"), [("0-3", 1), ("poor,fair,good", 0), ("0-10", 0)])
def test_a_label_that_comes_first_has_the_probability_of_its_text(labels, width):
    """Compared with the log-probability of the text itself, behind each prompt by itself."""
    task = "Judge the pair with care, as a buyer would."
    lm, params = language_model(labels, label_first=True, instruction=task)
    prompts, texts = lm.prompts, lm.prompts.schema.labels.texts
    assert prompts.shared > 32
    before, ids = label_tokens(prompts)
    assert ids.shape[0] == len(texts)
    assert not width or ids.shape[1] == width
    expected = np.zeros((4, len(texts)))
    batch, _ = prompts.encode_prompts(PAIRS)
    forward = jax.jit(lm.model.forward)
    for row, k in np.ndindex(expected.shape):
        completion = [*before, *ids[k][ids[k] >= 0].tolist()]
        text = prompts.encode([f"label: {texts[k]}\n"])[0]
        assert text[: len(completion)] == completion
        assert len(text) - len(completion) == (ids.shape[1] == 1)  # all but the end of the line
        tokens = [*np.asarray(batch.tokens)[row][np.asarray(batch.mask)[row]].tolist(), *completion]
        padded = jnp.array([[*tokens, *[0] * (160 - len(tokens))]])
        output = forward(params, padded, jnp.arange(160)[None])
        logps = jax.nn.log_softmax(output.hidden[0] @ output.head)
        places = len(tokens) - len(completion) - 1 + jnp.arange(len(completion))
        expected[row, k] = logps[places, jnp.array(completion)][len(before) :].sum()
    logits = make_label_logits(lm, 2, print)(params, PAIRS)
    np.testing.assert_allclose(logits, jax.nn.log_softmax(expected), rtol=1e-3, atol=1e-4)


def test_a_label_that_comes_last_has_no_probability_before_its_chain():
    lm, _ = language_model("0-3")
    with pytest.raises(ValueError, match="the chain begins with 'query', not with the label"):
        make_label_logits(lm, 2, print)
