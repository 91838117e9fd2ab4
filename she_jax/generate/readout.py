"""What can be read off a policy besides its text: label probabilities and an embedding."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from she_jax.cot import LABEL_STEP
from she_jax.generate.batching import by_length
from she_jax.generate.generator import cut_sentence
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.prompts import PromptFormat
from she_jax.generate.sampler import prefill
from she_jax.models.sharding import batch_sharding
from she_jax.types import Example, PromptBatch, Rollout


def label_tokens(prompts: PromptFormat) -> tuple[list[int], Int[np.ndarray, "K W"]]:
    """The tokens of a chain that begins with its label: those before it, and those of each label.

    Where labels differ in one token, W = 1. Others (``10``, ``fair``) have several, and the token
    that ends their line, since one may begin like another.

    Returns:
      The token ids before the labels, and the token ids of the K labels, padded with -1.
    """
    texts = prompts.schema.labels.texts
    written = prompts.encode([f"{LABEL_STEP}: {text}\n" for text in texts])
    columns = [len({*ids}) for ids in zip(*written, strict=False)]
    start = next((n for n, distinct in enumerate(columns) if distinct > 1), len(columns))
    before, rest = written[0][:start], [ids[start:] for ids in written]
    if all(len(ids) == 2 and ids[1] == rest[0][1] for ids in rest):
        rest = [ids[:1] for ids in rest]
    label_ids = np.full((len(rest), max(map(len, rest))), -1, np.int32)
    for k, ids in enumerate(rest):
        label_ids[k, : len(ids)] = ids
    return before, label_ids


def make_label_logits(
    lm: LanguageModel, batch_size: int, warn: Callable[[str], None]
) -> Callable[[Any, Sequence[Example]], Float[np.ndarray, "N K"]]:
    """Makes the function that reads the labels' own probabilities off prompts, before any chain.

    A prompt is read once, and what all prompts begin with once a batch. It says something only of a
    policy whose chains begin with the label.

    Args:
      lm: model and prompts.
      batch_size: pairs at a time, a multiple of the number of devices.
      warn: called once, with a message, when prompts are first cut.

    Returns:
      (params, examples) -> the log-probabilities of the K labels, normalized over the set.

    Raises:
      ValueError: if the chain does not begin with the label.
    """
    prompts, model = lm.prompts, lm.model
    if prompts.schema.label_index != 0:
        raise ValueError(
            f"the chain begins with {prompts.schema.names[0]!r}, not with the label: its label "
            "has no probability before the chain is written"
        )
    before, label_ids = label_tokens(prompts)

    warned: list[bool] = []

    @jax.jit
    def read_out(params: Any, batch: PromptBatch) -> Array:
        weights = model.decoding_params(params)
        out, caches = prefill(model, weights, batch, prompts.shared)
        hidden, ids = out.hidden[:, -1], jnp.asarray(label_ids)
        if label_ids.shape[1] == 1:
            heads = out.head[:, ids[:, 0]]
            logits = jnp.einsum("bd,dk->bk", hidden, heads, preferred_element_type=jnp.float32)
            return jax.nn.log_softmax(logits, axis=1)
        # The labels are the group of their prompt: each is read behind it.
        rows, (count, width) = len(hidden), label_ids.shape
        following = jnp.tile(ids[:, 1:], (rows, 1))
        lengths = jnp.repeat(batch.mask.sum(axis=1), count)[:, None]
        places = jnp.where(following >= 0, lengths + jnp.arange(width - 1)[None], -1)
        empty = model.init_cache(rows * count, width - 1)
        tokens = jnp.maximum(following, 0)
        rest, _ = model.decode(weights, tokens, places, empty, 0, caches)
        first = jnp.repeat(hidden, count, axis=0)[:, None]
        states = jnp.concatenate([first, rest.hidden], axis=1)
        logits = jnp.einsum("bwd,dv->bwv", states, out.head, preferred_element_type=jnp.float32)
        wanted = jnp.tile(ids, (rows, 1))[:, :, None]
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(wanted, 0), axis=2)
        total = jnp.where(wanted >= 0, logps, 0.0).sum(axis=(1, 2))
        return jax.nn.log_softmax(total.reshape(rows, count), axis=1)

    def label_logits(params: Any, examples: Sequence[Example]) -> Float[np.ndarray, "N K"]:
        logits = np.zeros((len(examples), len(label_ids)))
        encoded, cut = prompts.encode_prompts(examples)
        if cut and not warned:
            warned.append(True)
            warn(cut_sentence(prompts, examples))
        for rows, batch in by_length(encoded, batch_size):
            placed = jax.device_put(_followed(batch, before), batch_sharding(lm.mesh))
            logits[rows] = np.asarray(read_out(params, placed), np.float64)[: len(rows)]
        return logits

    return label_logits


def _followed(batch: PromptBatch, ids: Sequence[int]) -> PromptBatch:
    """The prompts, each followed by the same tokens."""
    tokens = np.pad(np.asarray(batch.tokens), ((0, 0), (0, len(ids))))
    tokens[:, tokens.shape[1] - len(ids) :] = ids
    mask = np.pad(np.asarray(batch.mask), ((0, 0), (0, len(ids))), constant_values=True)
    return PromptBatch(tokens=tokens, mask=mask)  # pyright: ignore[reportArgumentType]


def make_embedding(lm: LanguageModel) -> Callable[[Any, Rollout], Float[Array, "B D"]]:
    """Makes the function (params, rollout) -> mean hidden state over the prompt and the chain."""

    def embed(params: Any, rollout: Rollout) -> Array:
        real = rollout.prompt_mask | rollout.completion_mask
        positions = jnp.where(real, jnp.cumsum(real, axis=1) - 1, -1)
        output = lm.model.forward(params, rollout.tokens, positions)
        total = jnp.where(real[:, :, None], output.hidden.astype(jnp.float32), 0.0).sum(axis=1)
        return total / real.sum(1)[:, None]

    return embed
