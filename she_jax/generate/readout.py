"""What can be read off a rollout besides its text: label probabilities and an embedding."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from she_jax.cot import LABEL_STEP, Chain
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.prompts import PromptFormat
from she_jax.rl.steps import step_ids
from she_jax.types import Example, PromptBatch, Rollout


def label_tokens(
    prompts: PromptFormat, rollout: Rollout, chains: Sequence[Chain]
) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B K W"]]:
    """Where each chain's label begins, and the tokens that would write each of the labels there.

    Where labels of one character are one token each, W = 1. Others (``10``, ``fair``) have several,
    and the token that ends their line, since one may begin like another.

    Args:
      chains: of the rollout's first rows; the rest is skipped.

    Returns:
      Index of the label's first token in its row, 0 if there is none, and the token ids of the K
      labels in its place, padded with -1.
    """
    tokens, count = np.asarray(rollout.tokens), len(chains)
    lines = [chain.line_steps for chain in chains]
    mask = np.asarray(rollout.completion_mask)[:count]
    token_steps = step_ids(tokens[:count], mask, prompts.newlines(int(tokens.max()) + 1), lines)
    texts = prompts.schema.labels.texts
    single = all(len(text) == 1 for text in texts)
    places: list[tuple[int, list[list[int]]]] = [(0, [])] * count
    for row, chain in enumerate(chains):
        if chain.label is None:
            continue
        columns = np.flatnonzero(token_steps[row] == prompts.schema.label_index)
        place = prompts, tokens[row], columns, str(chain.label)
        places[row] = (single and _one_token(*place)) or _several_tokens(*place)
    width = max((len(ids) for _, labels in places for ids in labels), default=1)
    starts = np.zeros(len(tokens), np.int32)
    label_ids = np.full((len(tokens), len(texts), width), -1, np.int32)
    for row, (start, labels) in enumerate(places):
        starts[row] = start
        for k, ids in enumerate(labels):
            label_ids[row, k, : len(ids)] = ids
    return starts, label_ids


def _one_token(
    prompts: PromptFormat, tokens: np.ndarray, columns: np.ndarray, label: str
) -> tuple[int, list[list[int]]] | None:
    """The last token with the label in it, and the token with each of the labels in its place."""
    for column in columns[::-1]:
        piece = prompts.token_bytes[tokens[column]]
        pieces = [piece.replace(label.encode(), c.encode()) for c in prompts.schema.labels.texts]
        ids = [prompts.token_ids.get(piece, -1) for piece in pieces]
        if label.encode() in piece and min(ids) >= 0:
            return int(column), [[i] for i in ids]
    return None


def _several_tokens(
    prompts: PromptFormat, tokens: np.ndarray, columns: np.ndarray, label: str
) -> tuple[int, list[list[int]]]:
    """The token in which the label begins, and the tokens from there on with each of the labels."""
    pieces = [prompts.token_bytes[tokens[column]] for column in columns]
    line = b"".join(pieces)
    at = line.lower().rfind(label.lower().encode())
    if at < 0:  # it is written otherwise than in the set
        return 0, []
    ends = np.cumsum([len(piece) for piece in pieces])
    first = int(np.searchsorted(ends, at, side="right"))
    before = line[ends[first] - len(pieces[first]) : at].decode(errors="replace")
    is_last = prompts.schema.label_index == len(prompts.schema.steps) - 1
    end_text, end_ids = ("", [prompts.eos_ids[0]]) if is_last else ("\n", [])
    written = [f"{before}{text}{end_text}" for text in prompts.schema.labels.texts]
    return int(columns[first]), [ids + end_ids for ids in prompts.encode(written)]


def make_label_logits(
    lm: LanguageModel, batch_size: int
) -> Callable[[Any, Sequence[Example]], Float[np.ndarray, "N K"]]:
    """Makes the function that reads the labels' own probabilities off prompts, before any chain.

    It is one forward pass a pair (K passes where a label has several tokens), and says something
    only of a policy whose chains begin with the label.

    Args:
      lm: model and prompts.
      batch_size: pairs at a time, a multiple of the number of devices.

    Returns:
      (params, examples) -> the log-probabilities of the K labels, normalized over the set.

    Raises:
      ValueError: if the chain does not begin with the label.
    """
    prompts = lm.prompts
    if prompts.schema.label_index != 0:
        raise ValueError(
            f"the chain begins with {prompts.schema.names[0]!r}, not with the label: its label "
            "has no probability before the chain is written"
        )
    (written,) = prompts.encode([f"{LABEL_STEP}: {prompts.schema.labels.texts[0]}\n"])
    chain = prompts.schema.parse(f"{LABEL_STEP}: {prompts.schema.labels.texts[0]}\n")
    read_out = jax.jit(make_label_readout(lm))

    def label_logits(params: Any, examples: Sequence[Example]) -> Float[np.ndarray, "N K"]:
        parts = []
        for first in range(0, len(examples), batch_size):
            part = examples[first : first + batch_size]
            padded = [*part, *[part[-1]] * (batch_size - len(part))]
            rollout = _with_completion(prompts.encode_prompts(padded)[0], written)
            starts, label_ids = label_tokens(prompts, rollout, [chain] * batch_size)
            logps = read_out(params, rollout, starts, label_ids)
            parts.append(np.asarray(logps, np.float64)[: len(part)])
        return np.concatenate(parts)

    return label_logits


def _with_completion(batch: PromptBatch, completion: Sequence[int]) -> Rollout:
    """Rollouts with the same completion behind each prompt."""
    rows, width = len(batch.tokens), len(completion)
    tokens = np.pad(np.asarray(batch.tokens), ((0, 0), (0, width)))
    tokens[:, -width:] = completion
    mask = np.pad(np.asarray(batch.mask), ((0, 0), (0, width)))
    written = np.zeros_like(mask)
    written[:, -width:] = True
    arrays = {"tokens": tokens, "prompt_mask": mask, "completion_mask": written}
    logps = np.zeros((rows, tokens.shape[1]), np.float32)
    return Rollout(**arrays, logps=logps)  # pyright: ignore[reportArgumentType]


def make_label_readout(lm: LanguageModel) -> Callable[..., Float[Array, "B K"]]:
    """Makes the function that reads label probabilities from rollouts.

    Returns:
      (params, rollout, starts, label_ids) -> the log-probabilities of the K labels in the place of
      the written one (see ``label_tokens``), normalized over the set.
    """

    def read_out(params: Any, rollout: Rollout, starts: Array, label_ids: Array) -> Array:
        if label_ids.shape[2] > 1:
            logits = jax.lax.map(
                lambda ids: _continuation_logps(lm, params, rollout, starts, ids),
                jnp.swapaxes(label_ids, 0, 1),
            ).T
            return jax.nn.log_softmax(logits, axis=1)
        real = rollout.prompt_mask | rollout.completion_mask
        output = lm.model.forward(params, rollout.tokens, _positions(real))
        before = jnp.take_along_axis(output.hidden, jnp.maximum(starts - 1, 0)[:, None, None], 1)
        heads = output.head[:, label_ids[:, :, 0]]
        logits = jnp.einsum("bd,dbk->bk", before[:, 0], heads, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(logits, axis=1)

    return read_out


def make_embedding(lm: LanguageModel) -> Callable[[Any, Rollout], Float[Array, "B D"]]:
    """Makes the function (params, rollout) -> mean hidden state over the prompt and the chain."""

    def embed(params: Any, rollout: Rollout) -> Array:
        real = rollout.prompt_mask | rollout.completion_mask
        output = lm.model.forward(params, rollout.tokens, _positions(real))
        total = jnp.where(real[:, :, None], output.hidden.astype(jnp.float32), 0.0).sum(axis=1)
        return total / real.sum(1)[:, None]

    return embed


def _continuation_logps(
    lm: LanguageModel,
    params: Any,
    rollout: Rollout,
    starts: Int[Array, "B"],
    ids: Int[Array, "B W"],
) -> Float[Array, "B"]:
    """Log-probability of writing some tokens in place of all from ``starts`` on."""
    width = ids.shape[1]
    columns = starts[:, None] + jnp.arange(width)[None]
    rows = jnp.arange(len(starts))[:, None]
    tokens = jnp.pad(rollout.tokens, ((0, 0), (0, width)))
    real = jnp.pad(rollout.prompt_mask | rollout.completion_mask, ((0, 0), (0, width)))
    real &= jnp.arange(real.shape[1])[None] < starts[:, None]
    tokens = tokens.at[rows, columns].set(jnp.maximum(ids, 0))
    real = real.at[rows, columns].set(ids >= 0)
    output = lm.model.forward(params, tokens, _positions(real))
    before = jnp.take_along_axis(output.hidden, jnp.maximum(columns - 1, 0)[:, :, None], 1)
    logits = jnp.einsum("bwd,dv->bwv", before, output.head, preferred_element_type=jnp.float32)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(ids, 0)[:, :, None], 2)
    return jnp.where(ids >= 0, logps[:, :, 0], 0.0).sum(axis=1)


def _positions(real: Array) -> Int[Array, "B T"]:
    return jnp.where(real, jnp.cumsum(real, axis=1) - 1, -1)
