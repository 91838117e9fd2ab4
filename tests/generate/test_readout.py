"""Label probabilities: those of whole verdicts, normalized over the label set."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import config

from she_jax.cot import CotSchema
from she_jax.generate.prompts import tokenizer_corpus, train_tokenizer
from she_jax.generate.readout import label_tokens, make_label_logits, make_label_readout
from she_jax.models.sharding import make_mesh
from she_jax.runs.config import parse
from she_jax.training.setup import make_language_model
from she_jax.types import Example, Rollout

PAIRS = [Example(uid=str(n), query="red mug", product={"title": f"mug no. {n}"}) for n in range(4)]


def chain(label, label_first):
    lines = ["query: mug", "product: mug 10", "attributes: good 1 => met"]
    lines.insert(0 if label_first else 3, f"label: {label}")
    return "\n".join(lines)


@pytest.fixture(scope="module", params=[("poor,fair,good", False), ("0-10", True), ("0-3", False)])
def written(request):
    """A language model, its parameters, and rollouts that write some of the labels."""
    labels, label_first = request.param
    schema = CotSchema.build(labels=labels, label_first=label_first)
    parsed = parse(config(model__completion_length=64), Path("unused"))
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    texts = [chain(label, label_first) for label in (*schema.labels.texts[:3], "none of these")]
    corpus = [chain(label, label_first) for label in schema.labels.texts]  # all labels are known
    tokenizer = train_tokenizer([*tokenizer_corpus(PAIRS), *corpus * 9], 330)
    lm, params = make_language_model(parsed.model, schema, mesh, tokenizer=tokenizer)
    params = jax.tree.map(lambda x: 3 * x, params)  # away from the uniform distribution
    prompts, _ = lm.prompts.encode_prompts(PAIRS)
    tokens, mask, cut = lm.prompts.encode_chains(texts)
    assert not cut
    rollout = Rollout(
        tokens=np.concatenate([prompts.tokens, tokens], axis=1),
        prompt_mask=np.concatenate([prompts.mask, np.zeros_like(mask)], axis=1),
        completion_mask=np.concatenate([np.zeros_like(prompts.mask), mask], axis=1),
        logps=np.zeros((4, prompts.tokens.shape[1] + tokens.shape[1]), np.float32),
    )
    return lm, params, rollout, [schema.parse(text) for text in texts], texts


def encoded(prompts, text, *, whole):
    """The tokens of a chain up to its label, with the token that ends a label of several."""
    if not whole:
        return prompts.encode([text])[0]
    if text.startswith("label"):
        return prompts.encode([f"{text}\n"])[0]
    return [*prompts.encode([text])[0], prompts.eos_ids[0]]


def test_a_labels_probability_is_that_of_its_whole_verdict(written):
    """Compared with the log-probability of each chain's text with each label in it."""
    lm, params, rollout, chains, texts = written
    starts, ids = label_tokens(lm.prompts, rollout, chains)
    labels = lm.prompts.schema.labels
    assert starts[:3].all()
    assert starts[3] == 0  # it has no label
    found = jax.jit(make_label_readout(lm))(params, rollout, starts, ids)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)
    forward = jax.jit(lm.model.forward)
    for row, before in enumerate(labels.texts[:3]):
        several = bool((ids[row] >= 0).sum(axis=1).max() > 1)
        scores = []
        for label in labels.texts:
            head, _, _ = texts[row].partition(f"label: {before}")
            completion = encoded(lm.prompts, f"{head}label: {label}", whole=several)
            prompt = rollout.tokens[row][rollout.prompt_mask[row]].tolist()
            row_tokens = [*prompt, *completion]
            tokens = jnp.array([[*row_tokens, *[0] * (128 - len(row_tokens))]])
            output = forward(params, tokens, jnp.arange(128)[None])
            logps = jax.nn.log_softmax(output.hidden[0] @ output.head)
            places = len(prompt) - 1 + jnp.arange(len(completion))
            scores.append(float(logps[places, jnp.array(completion)].sum()))
        expected = jax.nn.log_softmax(jnp.array(scores))
        np.testing.assert_allclose(found[row], expected, rtol=1e-3, atol=1e-4)


def test_a_label_that_comes_first_is_read_from_the_prompt_alone(written):
    lm, params, rollout, chains, _ = written
    if lm.prompts.schema.label_index:
        with pytest.raises(ValueError, match="the chain begins with 'query', not with the label"):
            make_label_logits(lm, 2)
        return
    logits = make_label_logits(lm, 3)(params, PAIRS)  # the last batch is padded
    starts, ids = label_tokens(lm.prompts, rollout, chains)
    by_chain = jax.jit(make_label_readout(lm))(params, rollout, starts, ids)
    np.testing.assert_allclose(logits[:3], by_chain[:3], rtol=1e-4, atol=1e-4)
    assert logits.shape == (4, len(lm.prompts.schema.labels.values))
