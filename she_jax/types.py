"""The records that pass between modules.

Letters in shapes: N prompts, G samples per prompt (a group), B = N * G rows with the rows of a
group contiguous, T tokens, S steps, P prompt length. One alignment rule holds everywhere: index
``[b, t]`` refers to the token *at* t. Only ``she_jax.rl.logprobs`` shifts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int

Label: TypeAlias = int | float | str  # a relevance class, see ``she_jax.cot.LabelSet``


class UserError(ValueError):
    """Something that the user can correct: its message says what was found, expected, and to do.

    The command line prints it as one line; every other exception keeps its traceback.
    """


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query-product pair, on the host.

    Attributes:
      uid: unique within its dataset.
      query: the shopper's search query.
      product: text by field name. A pair that is read from a file has a ``title``; in a task of
        your own it may be empty.
      label: a value of the label set (by default 1, irrelevant, to 4, excellent), or None if the
        pair is unlabeled.
      steps: ground truth by step name, without the label: a verdict, or ``;``-separated items for a
        free-text step (see ``she_jax.rewards.verifier``). None if unknown.
      kind: kind of query (``plain``, ``negation``, ...); empty if unknown.
      annotations: names of the steps that a human annotated. Besides the label, the verifier has
        ground truth for these only.
      rationale: a whole chain for the cold start to imitate, correct or not; None if there is none.
      raters: the labels that single raters gave the pair, in the order of their columns.
    """

    uid: str
    query: str
    product: Mapping[str, str]
    label: Label | None = None
    steps: Mapping[str, str] | None = None
    kind: str = ""
    annotations: tuple[str, ...] = ()
    rationale: str | None = None
    raters: tuple[Label, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row of input that was rejected: its file, its line and the reason."""

    file: str
    line: int
    reason: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts, padded on the left. ``mask`` is True on tokens, False on padding."""

    tokens: Int[Array, "N P"]
    mask: Bool[Array, "N P"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampled sequences: a prompt padded on the left to P, then a completion padded on the right.

    ``completion_mask`` covers the sampled tokens, the end-of-sequence token included. ``logps`` are
    log-probabilities under the behavior policy at the sampling temperature, 0 outside the
    completion.
    """

    tokens: Int[Array, "B T"]
    prompt_mask: Bool[Array, "B T"]
    completion_mask: Bool[Array, "B T"]
    logps: Float[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The steps of a batch of rollouts, with their rewards.

    Attributes:
      step_ids: index of the step each token belongs to, -1 outside every step.
      step_mask: True where the rollout has the step, or its absence has a reward.
      verifier: the verifier's reward of each step, in [0, 1]; valid only where ``verifier_known``.
      verifier_known: True where an annotation allows the verifier to score the step.
      model_score: the process reward model's probability that the step is correct; valid only
        where ``model_known``.
      model_known: True where the process reward model scored the step.
      outcome: reward of the whole rollout, in [0, 1].
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
    """The advantage of each rollout as a whole, and of each of its steps.

    Both are already weighted. The advantage of a token is the sum of its rollout's and its step's.
    """

    outcome: Float[Array, "B"]
    step: Float[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """The inputs of one policy update.

    Attributes:
      tokens: token ids.
      positions: position of each token in its sequence, -1 on padding, whose weight is 0.
      loss_weights: loss weight of each token, 0 where it is not trained. The loss is divided once
        by their sum over the whole batch (see ``she_jax.rl.losses.token_weights``), or by the sum
        of ``denominator`` if present.
      advantages: advantage of each token.
      old_logps: log-probabilities under the behavior policy.
      ref_logps: log-probabilities under the frozen reference policy, or None for no KL term.
      denominator: what each row adds to the denominator of the loss (see
        ``she_jax.rl.losses.loss_denominators``); None for the sum of the row's weights.
      imitation_mask: True on tokens of self-imitation: their ratio is 1, whatever ``old_logps``
        are, and they have no KL term; None for no such tokens.
      temperature: sampling temperature of the behavior policy, > 0; traced, so that it may change.
      kl_coef: weight of the KL term, >= 0, read where there are ``ref_logps``; traced.
      prompt_length: no token before this index carries loss, so the output head skips them; static.
      group_size: number of contiguous rows that are equal before ``prompt_length``, a part that the
        model may then compute once (see ``she_jax.make_update_step``); 1 for no such rows, or a
        model that ignores it; static. It need not be that of the estimator.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    loss_weights: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    old_logps: Float[Array, "B T"]
    ref_logps: Float[Array, "B T"] | None = None
    denominator: Float[Array, "B"] | None = None
    imitation_mask: Bool[Array, "B T"] | None = None
    temperature: Float[Array, ""] | float = 1.0
    kl_coef: Float[Array, ""] | float = 0.01
    prompt_length: int = field(default=1, metadata={"static": True})
    group_size: int = field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SftBatch:
    """The inputs of one step of supervised fine-tuning; fields as in ``TrainBatch``.

    ``mask`` gives the tokens that each token attends to; None for causal attention. See
    ``she_jax.models.decoder.Model.forward``.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    loss_weights: Float[Array, "B T"]
    mask: Bool[Array, "B T T"] | None = None
    prompt_length: int = field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DpoBatch:
    """The inputs of one step of direct preference optimization: pairs of completions of one prompt.

    The two rows of a pair are adjacent, the chosen completion first.

    Attributes:
      tokens: prompts, padded on the left to ``prompt_length``, with their completions.
      positions: as in ``TrainBatch``.
      loss_weights: 1 on the tokens of the completions, 0 elsewhere.
      ref_logps: log-probabilities under the frozen reference policy, at temperature 1.
      prompt_length: as in ``TrainBatch``.
      group_size: number of contiguous rows that are equal before ``prompt_length``: the two rows of
        a pair, or those of several pairs of one prompt; static.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    loss_weights: Float[Array, "B T"]
    ref_logps: Float[Array, "B T"]
    prompt_length: int = field(default=1, metadata={"static": True})
    group_size: int = field(default=2, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class OrmBatch:
    """The inputs of one update of the outcome reward model: whole chains and their correctness.

    Attributes:
      tokens: prompts with their chains, as in ``Rollout``.
      positions: as in ``TrainBatch``.
      right: 1 for a chain with a correct outcome, else 0.
      group_size: 1 for independent chains; 2 for pairs to compare, a correct chain followed by an
        incorrect one; static.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    right: Float[Array, "B"]
    group_size: int = field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that an update changes: the device side of a checkpoint.

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
    """A language model's last hidden states and its output head: ``logits = hidden @ head``.

    The [B, T, V] logits would be the largest array of the program. The consumer chooses which of
    them to compute, and in what chunks.
    """

    hidden: Float[Array, "B T D"]
    head: Float[Array, "D V"]
