"""Human-readable output of a run: pages of rollouts, the before-after table and JSON files."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from she_jax.cot import Chain, CotSchema
from she_jax.training.files import shown, write_text
from she_jax.types import Example


def write_samples(
    path: str | os.PathLike,
    *,
    step: int,
    schema: CotSchema,
    examples: Sequence[Example],
    texts: Sequence[str],
    chains: Sequence[Chain],
    rewards: Float[np.ndarray, "B S"],
    advantages: Float[np.ndarray, "B S"],
    step_mask: Bool[np.ndarray, "B S"],
    outcomes: Float[np.ndarray, "B"],
    remarks: Mapping[tuple[int, int], str] | None = None,
) -> None:
    """Writes groups of rollouts as a Markdown page, such as ``samples/step_000040.md``.

    Text from a model or a data set is in indented code blocks, one line each, with control,
    bidirectional and other invisible characters escaped, so that it cannot format the page.

    Args:
      path: the page.
      step: training step, for the heading.
      schema: the chain's S steps.
      examples: the N pairs shown.
      texts: the B = N * G completions, a group's rows contiguous.
      chains: the parsed completions.
      rewards: step rewards in [0, 1].
      advantages: the advantage of each step's tokens in the loss, from step and outcome rewards.
      step_mask: which steps have a reward; the others show a dash and the outcome's advantage.
      outcomes: outcome rewards in [0, 1].
      remarks: a process reward model's critique of a step, by row and step index, shown below it.

    Raises:
      ValueError: if the examples do not have equal numbers of rollouts.
    """
    if not examples or len(texts) % len(examples) or len(texts) != len(chains):
        raise ValueError(
            f"{len(texts)} texts and {len(chains)} chains for {len(examples)} examples: "
            "expected the same number of rollouts for each example"
        )
    group = len(texts) // len(examples)
    lines = [f"# Rollouts of step {step}", ""]
    for n, example in enumerate(examples):
        lines += [f"## Group {n + 1}", "", *_example_lines(example), ""]
        for g in range(group):
            b = n * group + g
            lines += [f"### Rollout {n + 1}.{g + 1}: outcome reward {outcomes[b]:.2f}", ""]
            lines.append("    reward  advantage  verdict      step")
            for k, name in enumerate(schema.names):
                parsed, has_reward = chains[b].steps[k], step_mask[b, k]
                reward = f"{rewards[b, k]:.2f}" if has_reward else "-"
                advantage = f"{advantages[b, k]:+.3f}" if has_reward or parsed else "-"
                verdict = (parsed.verdict or "-") if parsed else "missing"
                text = shown(f"{name}: {parsed.text if parsed else ''}")
                lines.append(f"    {reward:>6}  {advantage:>9}  {verdict:<11}  {text}".rstrip())
                if remark := (remarks or {}).get((b, k)):
                    lines.append(f"{'examiner:':>32}  {shown(remark)}")
            if not chains[b].well_formed:
                lines += ["", "    not well-formed; as written:"]
                lines += [f"    | {shown(line)}".rstrip() for line in texts[b].split("\n")[:40]]
            lines.append("")
    write_text(path, "\n".join(lines))


def _example_lines(example: Example) -> list[str]:
    steps = [f"{name}: {truth}" for name, truth in (example.steps or {}).items()]
    label = "unknown" if example.label is None else str(example.label)
    return [
        f"    uid      {shown(example.uid)}",
        f"    query    {shown(example.query)}",
        *(f"    product  {shown(f'{k}: {v}')}" for k, v in example.product.items()),
        f"    gold     label: {label}",
        *(f"    gold     {shown(line)}" for line in steps),
    ]
