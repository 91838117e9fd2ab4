"""What a policy could learn from its own rollouts: right in one of k, where greedy is wrong.

    python benchmarks/headroom.py --checkpoint=runs/stage1 --phase=sft

A verdict that no rollout of a group has right earns nothing from any advantage, and one that all
have right neither. For each step, the label, and the chain as a whole (every step whose truth is
known, and the label), on the evaluation split: the share of pairs for which the greedy chain has it
right, the mean share of k rollouts at temperature 1 that do, the share of pairs with one such
rollout at least (pass@k), and with some but not all, whose groups have something to tell apart.
Beside them the share of pairs whose greedy chain has the right label although this step's verdict,
the first of its wrong ones, is not. Below, what the rollouts say of a step by what is true of it.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from jaxtyping import Bool
from ml_collections import ConfigDict

from she_jax.cot import Chain, CotSchema
from she_jax.evaluation.evaluate import take
from she_jax.evaluation.metrics import correct_verdicts
from she_jax.generate.generator import Generator
from she_jax.rewards.verifier import FULL_REWARD, fully_annotated, verify
from she_jax.training.logging import Progress
from she_jax.training.setup import load_policy, make_data
from she_jax.types import Example

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Folder of a policy's run.", required=True)
flags.DEFINE_enum("phase", "srpo", ["srpo", "sft"], "Its best policy, or its cold start.")
flags.DEFINE_integer("k", 8, "Rollouts a pair.", lower_bound=1)
flags.DEFINE_integer("pairs", 512, "Judge so many pairs.", lower_bound=1)
flags.DEFINE_integer("batch", 256, "Rows at a time.", lower_bound=1)
WHOLE = "whole chain"


def right(chain: Chain, example: Example, schema: CotSchema) -> dict[str, bool]:
    """Whether each step whose truth is known is right, the label among them, and all of them."""
    rewards, _ = verify(chain, fully_annotated(example), schema)
    names = [n for n in schema.names if n in (example.steps or {}) or n == "label"]
    told = {name: bool(rewards[schema.names.index(name)] >= FULL_REWARD) for name in names}
    return told | {WHOLE: all(told.values())}


def shares(
    names: Sequence[str],
    greedy: Sequence[dict[str, bool]],
    sampled: Sequence[Sequence[dict[str, bool]]],
) -> dict[str, tuple[float, float, float, float]]:
    """For each of the names: greedy, mean over rollouts, pass@k, and the share of mixed groups."""
    table = {}
    for name in [one for one in names if any(one in told for told in greedy)]:
        own = [n for n, told in enumerate(greedy) if name in told]
        rolls: Bool[np.ndarray, "N K"] = np.array([[one[name] for one in sampled[n]] for n in own])
        some, every = rolls.any(axis=1), rolls.all(axis=1)
        first = np.mean([greedy[n][name] for n in own])
        table[name] = tuple(map(float, (first, rolls.mean(), some.mean(), (some & ~every).mean())))
    return table


def first_wrong(chain: Chain, example: Example, schema: CotSchema) -> str | None:
    """The first step with a verdict, the label aside, that is wrong though the label is right."""
    if chain.label != example.label:
        return None
    told = correct_verdicts(chain, example, schema)
    return next((name for name, right_one in told.items() if not right_one), None)


def said(
    examples: Sequence[Example], groups: Sequence[Sequence[Chain]], schema: CotSchema
) -> dict[tuple[str, str], Counter[str]]:
    """How often rollouts give each verdict, by step and true verdict."""
    table: dict[tuple[str, str], Counter[str]] = {}
    for number, step in enumerate(schema.steps):
        for example, group in zip(examples, groups, strict=True):
            truth = (example.steps or {}).get(step.name)
            if step.verdicts and truth is not None:
                parsed = [chain.steps[number] for chain in group]
                verdicts = [(one and one.verdict) or "none" for one in parsed]
                table.setdefault((step.name, truth), Counter()).update(verdicts)
    return table


def main(_: Sequence[str]) -> None:
    """Prints the tables."""
    logging.set_verbosity(logging.WARNING)  # Orbax and TFDS tell much
    folder = Path(FLAGS.checkpoint)
    path = folder / "config.json"
    config: Any = ConfigDict(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
    if config.get("kind") != "train":
        hint = "give the folder of a policy's run; of a curriculum, that of a stage"
        raise app.UsageError(f"--checkpoint={folder}: no policy was trained there; {hint}")
    config.checkpoint = str(folder)
    policy, source = load_policy(config, (FLAGS.phase,))
    examples = take(make_data(config, folder), config.data.eval_split, FLAGS.pairs)
    examples = [one for one in examples if one.label is not None]
    judge, schema = Generator(policy, FLAGS.batch), policy.format.schema
    with Progress(f"greedy chains of {source}", total=len(examples)) as progress:
        greedy = judge.chains(policy.params, examples, progress.update)
    with Progress(f"{FLAGS.k} rollouts each", total=len(examples)) as progress:
        groups = judge.samples(policy.params, examples, FLAGS.k, config.seed, progress.update)
    told = shares(
        (*schema.names, WHOLE),
        [right(chain, one, schema) for chain, one in zip(greedy, examples, strict=True)],
        [
            [right(sample.chain, one, schema) for sample in group]
            for group, one in zip(groups, examples, strict=True)
        ],
    )
    firsts = [first_wrong(c, one, schema) for c, one in zip(greedy, examples, strict=True)]
    print(f"\n| {len(examples)} pairs | greedy | sampled | pass@{FLAGS.k} | mixed | wrong reason |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, figures in told.items():
        reasons = sum(one is not None if name == WHOLE else one == name for one in firsts)
        shown = (*figures, reasons / len(examples))
        print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shown) + " |")
    print("\n| step | truth | rollouts | what they say |\n| --- | --- | --- | --- |")
    chains = [[sample.chain for sample in group] for group in groups]
    for (name, truth), counts in said(examples, chains, schema).items():
        every = counts.total()
        shares_said = ", ".join(f"{v} {n / every:.3f}" for v, n in counts.most_common())
        print(f"| {name} | {truth} | {every} | {shares_said} |")


if __name__ == "__main__":
    app.run(main)
