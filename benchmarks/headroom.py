"""What a policy could learn from its rollouts: greedy chains against the best of k samples.

    python benchmarks/headroom.py --checkpoint=runs/stage1 --phase=sft

Where all rollouts of a group have a verdict right, or all have it wrong, no advantage distinguishes
them. The first table has a row for each step, for the label, and for the whole chain (every step
whose truth is known, and the label), over pairs of the evaluation split: the share of pairs whose
greedy chain is correct; the mean share of correct rollouts among k at temperature 1; pass@k, the
share of pairs with at least one correct rollout; and "mixed", the share with some but not all
correct. The last column is the share of pairs whose greedy chain has the correct label, and this
step as the first wrong one. The second table counts the rollouts' verdicts by step and truth.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from jaxtyping import Bool

from she_jax.cot import Chain, CotSchema
from she_jax.evaluation.evaluate import evenly_spaced
from she_jax.evaluation.metrics import correct_verdicts
from she_jax.generate.generator import Generator
from she_jax.rewards.verifier import FULL_REWARD, fully_annotated, verify
from she_jax.runs.config import TrainConfig, read_run
from she_jax.runs.load import PHASES, load_policy
from she_jax.training.logging import Progress
from she_jax.training.setup import prepare_dataset, split_mesh
from she_jax.types import Example

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Folder of a policy's run.", required=True)
flags.DEFINE_enum("phase", PHASES[0], PHASES, "Its best policy, or its cold start.")
flags.DEFINE_integer("k", 8, "Rollouts per pair.", lower_bound=1)
flags.DEFINE_integer("pairs", 512, "Number of pairs to evaluate.", lower_bound=1)
flags.DEFINE_integer("batch", 256, "Rows at a time.", lower_bound=1)
WHOLE = "whole chain"


def correct_steps(chain: Chain, example: Example, schema: CotSchema) -> dict[str, bool]:
    """Whether each step with known truth is correct, the label among them, and all of them."""
    rewards, _ = verify(chain, fully_annotated(example), schema)
    names = [n for n in schema.names if n in (example.steps or {}) or n == "label"]
    correct = {name: bool(rewards[schema.names.index(name)] >= FULL_REWARD) for name in names}
    return correct | {WHOLE: all(correct.values())}


def shares(
    names: Sequence[str],
    greedy: Sequence[dict[str, bool]],
    sampled: Sequence[Sequence[dict[str, bool]]],
) -> dict[str, tuple[float, float, float, float]]:
    """For each name: greedy, mean over rollouts, pass@k, and the share of mixed groups.

    Args:
      names: steps; those whose truth is never known are left out.
      greedy: ``correct_steps`` of each pair's greedy chain.
      sampled: ``correct_steps`` of each pair's rollouts.
    """
    table = {}
    for name in names:
        pairs = [n for n, correct in enumerate(greedy) if name in correct]
        if not pairs:
            continue
        rollouts: Bool[np.ndarray, "N K"] = np.array(
            [[correct[name] for correct in sampled[n]] for n in pairs]
        )
        some, every = rollouts.any(axis=1), rollouts.all(axis=1)
        greedy_share = np.mean([greedy[n][name] for n in pairs])
        values = greedy_share, rollouts.mean(), some.mean(), (some & ~every).mean()
        table[name] = tuple(map(float, values))
    return table


def first_wrong(chain: Chain, example: Example, schema: CotSchema) -> str | None:
    """The first step with a wrong verdict, in a chain with the correct label; None for others."""
    if chain.label != example.label:
        return None
    verdicts = correct_verdicts(chain, example, schema)
    return next((name for name, correct in verdicts.items() if not correct), None)


def verdict_counts(
    examples: Sequence[Example], groups: Sequence[Sequence[Chain]], schema: CotSchema
) -> dict[tuple[str, str], Counter[str]]:
    """How often rollouts give each verdict, by step and true verdict."""
    table: dict[tuple[str, str], Counter[str]] = {}
    for number, step in enumerate(schema.steps):
        for example, group in zip(examples, groups, strict=True):
            truth = (example.steps or {}).get(step.name)
            if step.verdicts and truth is not None:
                parsed = [chain.steps[number] for chain in group]
                verdicts = [(result and result.verdict) or "none" for result in parsed]
                table.setdefault((step.name, truth), Counter()).update(verdicts)
    return table


def main(_: Sequence[str]) -> None:
    """Prints the tables."""
    logging.set_verbosity(logging.WARNING)  # Orbax and TFDS log a lot
    folder = Path(FLAGS.checkpoint)
    config = read_run(folder) if (folder / "config.json").is_file() else None
    if not isinstance(config, TrainConfig):
        raise app.UsageError(
            f"--checkpoint={folder}: no policy was trained there; give the folder of a policy's "
            "run, of a curriculum that of a stage"
        )
    mesh, _ = split_mesh(config.mesh, 0)
    lm, params, source = load_policy(config, str(folder), mesh, (FLAGS.phase,))
    dataset = prepare_dataset(config.data)
    examples = evenly_spaced(dataset, config.evaluation.split, FLAGS.pairs)
    examples = [example for example in examples if example.label is not None]
    generator, schema = Generator(lm, FLAGS.batch), lm.prompts.schema
    with Progress(f"greedy chains of {source}", total=len(examples)) as progress:
        greedy = generator.greedy(params, examples, progress.update)
    with Progress(f"{FLAGS.k} rollouts each", total=len(examples)) as progress:
        samples = generator.sample(params, examples, FLAGS.k, config.seed, progress.update)
    groups = [[sample.chain for sample in group] for group in samples]
    table = shares(
        (*schema.names, WHOLE),
        [correct_steps(chain, pair, schema) for chain, pair in zip(greedy, examples, strict=True)],
        [
            [correct_steps(chain, pair, schema) for chain in group]
            for group, pair in zip(groups, examples, strict=True)
        ],
    )
    wrong = [first_wrong(chain, pair, schema) for chain, pair in zip(greedy, examples, strict=True)]
    print(f"\n| {len(examples)} pairs | greedy | sampled | pass@{FLAGS.k} | mixed | wrong reason |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, values in table.items():
        count = sum(step is not None if name == WHOLE else step == name for step in wrong)
        cells = (*values, count / len(examples))
        print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in cells) + " |")
    print("\n| step | truth | rollouts | their verdicts |\n| --- | --- | --- | --- |")
    for (name, truth), counts in verdict_counts(examples, groups, schema).items():
        total = counts.total()
        verdicts = ", ".join(f"{v} {n / total:.3f}" for v, n in counts.most_common())
        print(f"| {name} | {truth} | {total} | {verdicts} |")


if __name__ == "__main__":
    app.run(main)
