"""How many tokens prompts and completions need, measured on the pairs that a policy learns from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from she_jax.data.dataset import ExampleSource, evenly_spaced_rows
from she_jax.data.rationales import write_chain
from she_jax.generate.prompts import MIN_TEXT, PromptFormat
from she_jax.types import Example, UserError

PAIRS = 4_000  # measured at most, evenly spaced
STEP = 32  # lengths are multiples of it
LONGEST = {True: 256, False: 64}  # prompt, of a pretrained model and of one from scratch
NO_CHAINS = 128  # completion, where no pair has a chain to measure
MAX_CUT = 0.01  # share of the chains that may not fit
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tokens of the pairs' prompts and of their chains, the end token included.

    Attributes:
      prompts: of each measured pair.
      chains: of each measured pair that has a label or a chain.
    """

    prompts: Sequence[int]
    chains: Sequence[int]

    def percentiles(self) -> dict[str, list[int]]:
        """The ``PERCENTILES`` of both, by name; without those of which there are none."""
        both = {"prompt": self.prompts, "completion": self.chains}
        return {
            name: [math.ceil(value) for value in np.percentile(sizes, PERCENTILES)]
            for name, sizes in both.items()
            if len(sizes)
        }


def measure(prompts: PromptFormat, source: Sequence[Example] | ExampleSource) -> Sizes:
    """The sizes of evenly spaced pairs. Chains are written as for the cold start, with seed 0.

    Args:
      prompts: its lengths do not matter.
      source: the pairs.
    """
    examples = [source[row] for row in evenly_spaced_rows(len(source), PAIRS)]
    chains, rng = [], np.random.default_rng(0)
    for example in examples:
        try:
            chains.append(write_chain(example, prompts.schema, rng))
        except ValueError:  # it has neither a label nor a chain
            continue
    return Sizes(
        prompts=prompts.prompt_sizes(examples).tolist(),
        chains=[len(ids) + 1 for ids in prompts.encode(chains)],
    )


def choose_lengths(
    prompts: PromptFormat, sizes: Sizes, *, pretrained: bool, context: int
) -> tuple[int, int]:
    """The lengths P and C that most pairs need, multiples of ``STEP``.

    C fits 99% of the chains. P fits 95% of the prompts, up to a limit: longer products are cut.

    Args:
      prompts: gives the size of what stands around query and product.
      sizes: of the training pairs.
      pretrained: whether the model was, so that it is large; the limit is ``LONGEST`` of this.
      context: of the model, positions.
    """
    completion = _up(np.percentile(sizes.chains, 99)) if len(sizes.chains) else NO_CHAINS
    frame = int(prompts.prompt_sizes([Example(uid="", query="", product={})])[0])
    limit = max(LONGEST[pretrained], _up(frame + 2 * MIN_TEXT))
    limit = min(limit, (context - completion) // STEP * STEP)
    prompt = max(_up(np.percentile(sizes.prompts, 95)), _up(frame + MIN_TEXT))
    return min(prompt, limit), completion


def longer_prompts(sizes: Sizes, prompt_length: int, context: int) -> str:
    """How many prompts are longer than a length, and which one most fit in; "" if most fit.

    Args:
      sizes: of the training pairs.
      prompt_length: P.
      context: of the model, positions.
    """
    longer = np.mean(np.array(sizes.prompts) > prompt_length) if len(sizes.prompts) else 0.0
    enough = min(_up(np.percentile(sizes.prompts, 95)), context) if longer else prompt_length
    if longer <= 0.1 or enough <= prompt_length:
        return ""
    return (
        f"{longer:.0%} of the prompts are longer than {prompt_length} tokens and lose their end; "
        f"--config.model.prompt_length={enough} fits 95%, and takes more time"
    )


def check_lengths(sizes: Sizes, completion_length: int) -> None:
    """Checks that nearly all chains of the training pairs fit, since a cut one teaches nothing.

    Raises:
      UserError: if more than ``MAX_CUT`` of them do not.
    """
    cut = np.mean(np.array(sizes.chains) > completion_length) if len(sizes.chains) else 0.0
    if cut > MAX_CUT:
        needed = _up(np.percentile(sizes.chains, 99))
        raise UserError(
            f"model.completion_length={completion_length}: {cut:.0%} of the chains to learn from "
            f"are longer, and would be cut before their label; expected {needed}, or 0 to measure"
        )


def _up(size: float) -> int:
    return math.ceil(size / STEP) * STEP
