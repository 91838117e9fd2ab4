"""What can be read off a rollout besides its text: label probabilities and an embedding."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from she_jax.cot import LABELS, Chain
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.prompts import PromptFormat
from she_jax.rl.steps import step_ids
from she_jax.types import Rollout


def label_tokens(
    prompts: PromptFormat, rollout: Rollout, chains: Sequence[Chain]
) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B 4"]]:
    """The position of each chain's label token, and the token ids of the four classes there.

    Args:
      chains: of the rollout's first rows; the rest is skipped.

    Returns:
      Index of the label's token in its row, 0 if there is none, and the token ids that would write
      classes 1 to 4 in its place.
    """
    tokens, count = np.asarray(rollout.tokens), len(chains)
    lines = [chain.line_steps for chain in chains]
    mask = np.asarray(rollout.completion_mask)[:count]
    token_steps = step_ids(tokens[:count], mask, prompts.newlines(int(tokens.max()) + 1), lines)
    columns, class_ids = np.zeros(len(tokens), np.int32), np.zeros((len(tokens), 4), np.int32)
    for row, chain in enumerate(chains):
        digit = str(chain.label).encode()
        for column in np.flatnonzero(token_steps[row] == prompts.schema.names.index("label"))[::-1]:
            piece = prompts.token_bytes[tokens[row, column]]
            ids = [prompts.token_ids.get(piece.replace(digit, c.encode()), -1) for c in LABELS]
            if chain.label is not None and digit in piece and min(ids) >= 0:
                columns[row], class_ids[row] = column, ids
                break
    return columns, class_ids


def make_readout(
    lm: LanguageModel,
) -> Callable[..., tuple[Float[Array, "B 4"], Float[Array, "B D"]]]:
    """Makes the function that reads class probabilities and embeddings from rollouts.

    Returns:
      (params, rollout, columns, class_ids) -> the probabilities of the four classes at the label
      token (see ``label_tokens``), and the mean hidden state over the prompt and the chain.
    """

    def read_out(params: Any, rollout: Rollout, columns: Array, ids: Array) -> tuple[Array, Array]:
        real = rollout.prompt_mask | rollout.completion_mask
        position_ids = jnp.where(real, jnp.cumsum(real, axis=1) - 1, -1)
        output = lm.model.forward(params, rollout.tokens, position_ids)
        before = jnp.take_along_axis(output.hidden, jnp.maximum(columns - 1, 0)[:, None, None], 1)
        logits = jnp.einsum("bd,dbc->bc", before[:, 0], output.head[:, ids])
        total = jnp.where(real[:, :, None], output.hidden.astype(jnp.float32), 0.0).sum(axis=1)
        return jax.nn.softmax(logits.astype(jnp.float32), axis=1), total / real.sum(1)[:, None]

    return read_out
