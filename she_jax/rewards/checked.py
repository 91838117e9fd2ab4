"""A user's reward functions, with their results checked before anything is trained on them."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from she_jax.cot import Chain, CotSchema
from she_jax.rewards.verifier import OutcomeRewardFn, StepRewardFn
from she_jax.training.files import printable
from she_jax.types import Example, UserError


def checked_step_reward(function: Callable[..., Any], name: str, schema: CotSchema) -> StepRewardFn:
    """A user's step rewards, checked: rewards [B, S] in [0, 1] where known, and a mask [B, S].

    Args:
      function: see ``StepRewardFn``.
      name: for messages, such as ``reward.step=mypackage.rules:check``.
      schema: the S steps.

    Returns:
      The function; it raises UserError with the pair and the chain if ``function`` raises, returns
      other shapes, or a known reward outside [0, 1].
    """

    def step_reward(
        chains: Sequence[Chain], examples: Sequence[Example]
    ) -> tuple[np.ndarray, np.ndarray]:
        result = _call(function, name, schema, chains, examples)
        shape = len(chains), len(schema.steps)
        if not isinstance(result, tuple | list) or len(result) != 2:
            problem = f"returned {type(result).__name__}, expected a pair (rewards, mask)"
            _fail(name, problem, schema, chains[0], examples[0])
        try:
            rewards, known = np.asarray(result[0], np.float32), np.asarray(result[1], bool)
        except (TypeError, ValueError) as error:
            problem = f"returned what is not an array of numbers: {error}"
            _fail(name, problem, schema, chains[0], examples[0], error)
        if rewards.shape != shape or known.shape != shape:
            problem = (
                f"returned rewards {list(rewards.shape)} and mask {list(known.shape)}, expected "
                f"{list(shape)} each: a row per rollout, a column per step of {schema.names}"
            )
            _fail(name, problem, schema, chains[0], examples[0])
        wrong = known & ~((rewards >= 0) & (rewards <= 1))
        if wrong.any():
            row, step = np.argwhere(wrong)[0]
            problem = f"gave step {schema.names[step]!r} the reward {rewards[row, step]}"
            _fail(name, f"{problem}, expected one in [0, 1]", schema, chains[row], examples[row])
        return np.where(known, rewards, np.float32(0)), known

    return step_reward


def checked_outcome_reward(
    function: Callable[..., Any], name: str, schema: CotSchema
) -> OutcomeRewardFn:
    """A user's outcome rewards, checked: [B] in [0, 1]; otherwise as ``checked_step_reward``."""

    def outcome_reward(chains: Sequence[Chain], examples: Sequence[Example]) -> np.ndarray:
        result = _call(function, name, schema, chains, examples)
        try:
            rewards = np.asarray(result, np.float32)
        except (TypeError, ValueError) as error:
            problem = f"returned what is not an array of numbers: {error}"
            _fail(name, problem, schema, chains[0], examples[0], error)
        if rewards.shape != (len(chains),):
            problem = f"returned {list(rewards.shape)}, expected [{len(chains)}]: one per rollout"
            _fail(name, problem, schema, chains[0], examples[0])
        wrong = ~((rewards >= 0) & (rewards <= 1))
        if wrong.any():
            row = int(np.argmax(wrong))
            problem = f"gave a rollout the reward {rewards[row]}, expected one in [0, 1]"
            _fail(name, problem, schema, chains[row], examples[row])
        return rewards

    return outcome_reward


def _call(
    function: Callable[..., Any],
    name: str,
    schema: CotSchema,
    chains: Sequence[Chain],
    examples: Sequence[Example],
) -> Any:
    """The result; where the function raises, the first rollout for which it does is named."""
    try:
        return function(chains, examples)
    except Exception as error:
        row, cause = 0, error
        for n in range(len(chains)):
            try:
                function(chains[n : n + 1], examples[n : n + 1])
            except Exception as single:
                row, cause = n, single
                break
        trace = cause.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = "" if trace is None else f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
        problem = f"raised {type(cause).__name__}: {cause}{place}"
        _fail(name, problem, schema, chains[row], examples[row], cause)


def _fail(
    name: str,
    problem: str,
    schema: CotSchema,
    chain: Chain,
    example: Example,
    cause: Exception | None = None,
) -> NoReturn:
    steps = [
        f"{step}: {parsed.text}" + (f" => {parsed.verdict}" if parsed.verdict else "")
        for step, parsed in zip(schema.names, chain.steps, strict=True)
        if parsed is not None
    ]
    title = example.product.get("title", "")
    raise UserError(
        f"{name} {problem}\n"
        f"  pair {printable(example.uid)}: query {printable(example.query)!r}, "
        f"product {printable(title)!r}\n"
        f"  chain: {printable('; '.join(steps)) or '(no step could be read)'}"
    ) from cause
