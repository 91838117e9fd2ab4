"""The records that pass from room to room.

Letters in shapes: N prompts, G samples a prompt (a group), B = N * G with a group's rows
contiguous, T tokens, S steps, P prompt length. One alignment rule holds everywhere: index ``[b,
t]`` speaks of the token *at* t. Only ``she_jax.rl.head`` shifts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query-product pair, on the host.

    Attributes:
      uid: unique within its data set.
      query: what the shopper typed.
      product: field name to text; ``title`` is always there.
      label: relevance class 1 (irrelevant) to 4 (excellent), or None where nobody judged the pair.
      steps: the truth of each step by its name (a verdict, or ``;``-separated items for a free
        step; see ``she_jax.rl.rewards``), or None where it is not known. The label is not among
        them.
      kind: kind of query (``plain``, ``negation``, ...); empty where unknown.
      annotations: names of the steps whose truth a human gave; the verifier knows these and no
        others.
      rationale: a whole chain for the cold start to imitate, right or wrong; None where there is
        none.
    """

    uid: str
    query: str
    product: Mapping[str, str]
    label: int | None = None
    steps: Mapping[str, str] | None = None
    kind: str = ""
    annotations: tuple[str, ...] = ()
    rationale: str | None = None


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row of input that was set aside: where it stands and what is wrong with it."""

    file: str
    line: int
    reason: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts, padded on the left. ``mask`` is True on real tokens."""

    tokens: Int[Array, "N P"]
    mask: Bool[Array, "N P"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampled sequences: a prompt padded on the left to P, then a completion padded on the right.

    ``completion_mask`` covers the sampled tokens, the end-of-sequence token included. ``logps``
    are the behaviour policy's log-probabilities at the sampling temperature, zero outside the
    completion.
    """

    tokens: Int[Array, "B T"]
    prompt_mask: Bool[Array, "B T"]
    completion_mask: Bool[Array, "B T"]
    logps: Float[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Rollouts seen as steps.

    ``step_ids`` names the step each token belongs to, -1 outside every step. ``step_mask`` says
    which steps a rollout has. ``verifier`` is the annotation's verdict on each step in [0, 1],
    good only where ``verifier_known``; ``model_score`` is the examiner's probability that the step
    is correct, good only where ``model_known``. ``outcome`` is the reward of the whole rollout in
    [0, 1].
    """

    step_ids: Int[Array, "B T"]
    step_mask: Bool[Array, "B S"]
    verifier: Float[Array, "B S"]
    verifier_known: Bool[Array, "B S"]
    model_score: Float[Array, "B S"]
    model_known: Bool[Array, "B S"]
    outcome: Float[Array, "B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Advantages:
    """What an estimator returns: a part for the whole rollout and one for each of its steps.

    Both carry their weights already; a token's advantage is their sum.
    """

    outcome: Float[Array, "B"]
    step: Float[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """What one policy update reads.

    Attributes:
      tokens: token ids.
      positions: position of each token in its own sequence, -1 on padding, which has no weight.
      weights: weight of each token in the loss, 0 where it is not trained; the loss divides once by
        their sum over the whole batch (see ``she_jax.rl.losses.token_weights``), if
        ``counts`` does not say otherwise.
      advantages: token advantages.
      old_logps: log-probabilities under the behaviour policy.
      ref_logps: log-probabilities under the frozen reference, or None for no KL term.
      counts: each row's share of what the loss is divided by, see
        ``she_jax.rl.losses.row_counts``; None stands for the sum of the row's weights.
      imitated: tokens that the behaviour policy has no say in: their ratio is 1, whatever
        ``old_logps`` are, and they have no KL term; None for none.
      temperature: sampling temperature of the behaviour policy; traced, so it may change freely.
      kl_weight: weight of the KL term; traced.
      prompt_length: no token before this index carries loss, so the output head skips them; static.
      group_size: the rows of a group, contiguous, are the same before ``prompt_length``: the model
        may read that part once; 1 says nothing of the kind; static.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    old_logps: Float[Array, "B T"]
    ref_logps: Float[Array, "B T"] | None = None
    counts: Float[Array, "B"] | None = None
    imitated: Bool[Array, "B T"] | None = None
    temperature: Float[Array, ""] | float = 1.0
    kl_weight: Float[Array, ""] | float = 0.0
    prompt_length: int = field(default=1, metadata={"static": True})
    group_size: int = field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SftBatch:
    """What one step of supervised fine-tuning reads; fields as in ``TrainBatch``.

    ``mask``, where there is one, says which tokens each token looks at, see
    ``she_jax.models.transformer.Model.forward``.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    mask: Bool[Array, "B T T"] | None = None
    prompt_length: int = field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DpoBatch:
    """What one step of direct preference optimization reads: pairs of completions of one prompt.

    A pair's rows stand one behind the other, the chosen one first.

    Attributes:
      tokens: prompts, padded on the left to ``prompt_length``, with their completions.
      positions: as in ``TrainBatch``.
      weights: 1 on the tokens of the completions, 0 elsewhere.
      ref_logps: log-probabilities under the frozen reference, at temperature 1.
      prompt_length: as in ``TrainBatch``.
      group_size: so many rows, contiguous, are the same before ``prompt_length``: the two of a
        pair, or those of several pairs of one prompt; static.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    ref_logps: Float[Array, "B T"]
    prompt_length: int = field(default=1, metadata={"static": True})
    group_size: int = field(default=2, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class OutcomeBatch:
    """What one update of a scalar reward model reads: whole chains, and how they came out.

    Attributes:
      tokens: prompts with their chains, as in ``Rollout``.
      positions: as in ``TrainBatch``.
      right: 1 for a chain that came out right, 0 for one that did not.
      group_size: 1 says that each chain stands for itself, 2 that the rows are pairs of a right
        chain and a wrong one behind it, to be told apart; static.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    right: Float[Array, "B"]
    group_size: int = field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that an update changes, and all that a checkpoint of the device side holds.

    ``key`` is a raw ``uint32[2]`` key (``jax.random.PRNGKey``), so that it is stored like any
    array.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    key: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LMOutput:
    """A language model's last hidden states and its output head, not multiplied out.

    ``[B, T, V]`` logits are the largest array of the whole program; who reads an ``LMOutput``
    decides which positions to multiply out, and in what chunks. ``logits = hidden @ head``.
    """

    hidden: Float[Array, "B T D"]
    head: Float[Array, "D V"]
