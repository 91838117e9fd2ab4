"""Pages of rollouts to read: every step with its text, verdict, reward and advantage."""

import os
from collections.abc import Mapping

import numpy as np

from she_jax.cot import CotSchema
from she_jax.rewards.prm.model import ProcessRewardModel, chain_step_queries
from she_jax.rollouts.batch import RolloutBatch
from she_jax.training.files import printable, write_text
from she_jax.types import Example


def write_rollouts(
    path: str | os.PathLike,
    step: int,
    schema: CotSchema,
    rollouts: RolloutBatch,
    prm: ProcessRewardModel | None = None,
    groups: int = 2,
) -> None:
    """Writes the first groups of a batch as a Markdown page, such as ``samples/step_000040.md``.

    Text from a model or a data set is in indented code blocks, one line each, with control,
    bidirectional and other invisible characters escaped, so that it cannot format the page.

    Args:
      path: the page.
      step: training step, for the heading.
      schema: the steps of the chain.
      rollouts: the batch. A step without a reward shows a dash, and the outcome's advantage.
      prm: its critique of each step is shown below the step.
      groups: how many groups.
    """
    size = len(rollouts.texts) // len(rollouts.examples)
    critiques = {} if prm is None else _critiques(rollouts, schema, prm, groups)
    lines = [f"# Rollouts of step {step}", ""]
    for n, example in enumerate(rollouts.examples[:groups]):
        lines += [f"## Group {n + 1}", "", *_example_lines(example), ""]
        for g in range(size):
            lines += _rollout_lines(f"{n + 1}.{g + 1}", n * size + g, schema, rollouts, critiques)
    write_text(path, "\n".join(lines))


def _rollout_lines(
    title: str,
    row: int,
    schema: CotSchema,
    rollouts: RolloutBatch,
    critiques: Mapping[tuple[int, int], str],
) -> list[str]:
    chain, outcome = rollouts.chains[row], rollouts.outcome[row]
    lines = [f"### Rollout {title}: outcome reward {outcome:.2f}", ""]
    lines.append("    reward  advantage  verdict      step")
    for k, name in enumerate(schema.names):
        parsed, known = chain.steps[k], rollouts.known[row, k]
        reward = f"{rollouts.rewards[row, k]:.2f}" if known else "-"
        advantage = f"{rollouts.advantages[row, k]:+.3f}" if known or parsed else "-"
        verdict = (parsed.verdict or "-") if parsed else "missing"
        text = printable(f"{name}: {parsed.text if parsed else ''}")
        lines.append(f"    {reward:>6}  {advantage:>9}  {verdict:<11}  {text}".rstrip())
        if critique := critiques.get((row, k)):
            lines.append(f"{'reward model:':>32}  {printable(critique)}")
    if not chain.well_formed:
        lines += ["", "    not well-formed; as written:"]
        written = rollouts.texts[row].split("\n")[:40]
        lines += [f"    | {printable(line)}".rstrip() for line in written]
    return [*lines, ""]


def _critiques(
    rollouts: RolloutBatch, schema: CotSchema, prm: ProcessRewardModel, groups: int
) -> dict[tuple[int, int], str]:
    """The PRM's score and critique of each step as text, by (row, step index)."""
    size = len(rollouts.texts) // len(rollouts.examples)
    examples = [example for example in rollouts.examples[:groups] for _ in range(size)]
    indices, queries = chain_step_queries(rollouts.chains[: size * groups], examples, schema)
    scores, known = map(np.asarray, (rollouts.steps.model_score, rollouts.steps.model_known))
    return {
        index: f"{f'{scores[index]:.2f}' if known[index] else 'unknown'} {text}"
        for index, text in zip(indices, prm.critiques(queries), strict=True)
    }


def _example_lines(example: Example) -> list[str]:
    steps = [f"{name}: {truth}" for name, truth in (example.steps or {}).items()]
    label = "unknown" if example.label is None else str(example.label)
    return [
        f"    uid      {printable(example.uid)}",
        f"    query    {printable(example.query)}",
        *(f"    product  {printable(f'{k}: {v}')}" for k, v in example.product.items()),
        f"    gold     label: {label}",
        *(f"    gold     {printable(line)}" for line in steps),
    ]
