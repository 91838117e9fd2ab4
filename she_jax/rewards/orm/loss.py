"""The outcome reward model (ORM): a language model with a value vector, one score per chain.

SHE (arXiv 2510.07972) calls it the scalar reward model and compares its generative process reward
model with it. The parameters are ``{"model": those of a language model, "value": [D]}``.
sigmoid(score) is the probability that the chain is correct.

Reconstruction: how the paper's scalar reward model is built and trained could not be obtained. This
one follows the literature, Cobbe et al. (arXiv 2110.14168) and Ouyang et al. (arXiv 2203.02155).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int

from she_jax.rl.checks import checked
from she_jax.rl.update import Metrics, gradient_step
from she_jax.types import LMOutput, OrmBatch, TrainState

Forward = Callable[..., LMOutput]


def init_orm_params(params: Any, dim: int) -> dict[str, Any]:
    """Returns initial ORM parameters with a zero value: every score is 0, probability 1/2.

    Args:
      params: parameters of the language model.
      dim: size D of its hidden states.
    """
    return {"model": params, "value": jnp.zeros(dim, jnp.float32)}


def chain_scores(
    forward: Forward,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float32[Array, "B"]:
    """Returns the score s of each chain, a logit, from the hidden state h at its last token.

        s[b] = h[b, last(b)] . value

    The last token is the one with the highest position: the end-of-sequence token if present. The
    vocabulary's logits are never formed.

    Args:
      forward: a language model, (params, tokens, positions) to its hidden states.
      params: see ``init_orm_params``.
      tokens: prompts with their chains, padded on both sides.
      positions: position of each token in its own sequence, -1 on padding.

    Returns:
      Scores in (-inf, inf); their sigmoid is a probability.
    """
    hidden = forward(params["model"], tokens, positions).hidden
    last = jnp.argmax(positions, axis=1)
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return jnp.einsum("bd,d->b", final, params["value"], preferred_element_type=jnp.float32)


def pointwise_loss(
    scores: Float[Array, "B"], right: Float[Array | np.ndarray, "B"]
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns the binary cross-entropy of the outcomes, as (sum, count).

        sum = -sum_b right[b] log sigmoid(s[b]) + (1 - right[b]) log(1 - sigmoid(s[b])),  count = B

    A verifier of whole solutions, trained to predict whether the final answer is correct: Cobbe et
    al. (arXiv 2110.14168), section 4, here scored at the last token only and without their
    language-modeling loss. Zhang et al. (arXiv 2408.15240) train their discriminative verifier with
    this loss.

    Args:
      scores: logits.
      right: 1 for a correct chain, 0 for an incorrect one.
    """
    losses = optax.sigmoid_binary_cross_entropy(scores.astype(jnp.float32), jnp.asarray(right))
    return losses.sum(), jnp.float32(scores.shape[0])


def pairwise_loss(
    chosen: Float[Array, "M"], rejected: Float[Array, "M"]
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns the Bradley-Terry negative log-likelihood of the chosen chains, as (sum, count).

        sum = -sum_m log sigmoid(chosen[m] - rejected[m]),  count = M

    Ouyang et al. (arXiv 2203.02155), section 3.5, equation 1. It determines the scores of a prompt
    only up to a constant, so their sigmoid ranks its chains and need not be calibrated.

    Args:
      chosen: scores of the chosen chains.
      rejected: scores of the rejected chains of the same prompts.
    """
    losses = -jax.nn.log_sigmoid((chosen - rejected).astype(jnp.float32))
    return losses.sum(), jnp.float32(chosen.shape[0])


def make_orm_step(
    forward: Forward, optimizer: optax.GradientTransformation, *, micro_batches: int = 1
) -> Callable[[TrainState, OrmBatch], tuple[TrainState, Metrics]]:
    """Returns the update step of an outcome reward model; model and value are trained together.

    The loss is ``pointwise_loss`` for a batch of single chains and ``pairwise_loss`` for a batch of
    pairs (``group_size`` 2). The result does not depend on the number of micro-batches.

    Args:
      forward: a language model, (params, tokens, positions) to its hidden states.
      optimizer: any optax transformation; ``state.opt_state`` is its ``init(state.params)``.
      micro_batches: number of parts in which the batch is processed, >= 1.

    Returns:
      A pure function (state, batch) -> (state, metrics), with the metrics ``loss``, ``accuracy``
      (share of chains classified correctly at probability 1/2, or of pairs ranked correctly),
      ``grad_norm`` and ``tokens``. It raises ValueError if the batch does not divide into the
      micro-batches.

    Raises:
      ValueError: if ``micro_batches`` is below 1.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches}: expected at least 1")

    def loss_sum(params: Any, batch: OrmBatch) -> tuple[Float[Array, ""], Metrics]:
        scores = chain_scores(forward, params, batch.tokens, batch.positions)
        if batch.group_size == 2:
            chosen, rejected = scores[0::2], scores[1::2]
            total, count = pairwise_loss(chosen, rejected)
            is_correct = chosen > rejected
        else:
            total, count = pointwise_loss(scores, batch.right)
            is_correct = (scores >= 0) == (batch.right > 0)
        return total, {"count": count, "accuracy": is_correct.sum(dtype=jnp.float32)}

    @checked
    def update(state: TrainState, batch: OrmBatch) -> tuple[TrainState, Metrics]:
        state, metrics = gradient_step(loss_sum, optimizer, state, batch, micro_batches)
        return state, metrics | {"tokens": (batch.positions >= 0).sum().astype(jnp.float32)}

    return update
