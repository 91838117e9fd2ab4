"""Draws the README's picture: a chain, its step rewards, and the advantage of every token.

    python -m benchmarks.chain_picture

writes ``docs/chain.png``. The rewards are the verifier's and the advantages SRPO's, for a group of
four rollouts of one pair; words stand for tokens.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from she_jax import CotSchema, Example, srpo_advantages, token_advantages
from she_jax.rewards.verifier import FULL_REWARD, annotation_reward, label_reward

OUTPUT = Path(__file__).parents[1] / "docs" / "chain.png"
PAIR = Example(
    uid="lamp",
    query="bedside lamp not red",
    product={"title": "crimson standing lamp"},
    label=2,
    steps={
        "query": "table lamp; not red",
        "product": "floor lamp; red",
        "category": "near",
        "attributes": "conflict",
    },
    annotations=("query", "product", "category", "attributes"),
)
HEAD = "query: asks for table lamp; not red\nproduct: offers floor lamp; red\n"
NEAR = "category: table lamp in lighting / floor lamp in lighting => near\n"
MATCH = "category: table lamp in lighting / floor lamp in lighting => match\n"
CONFLICT, MET = "attributes: not red / red => conflict\n", "attributes: not red / red => met\n"
GROUP = (  # the first one is shown
    HEAD + NEAR + MET + "label: 3",
    HEAD + NEAR + CONFLICT + "label: 2",
    HEAD + MATCH + CONFLICT + "label: 2",
    HEAD + MATCH + MET + "label: 4",
)


def main() -> None:
    """Computes the credit of the group and draws its first rollout."""
    schema, size = CotSchema(), len(GROUP)
    chains, examples = [schema.parse(text) for text in GROUP], [PAIR] * size
    rewards, known = annotation_reward(schema)(chains, examples)
    outcome = label_reward()(chains, examples)
    advantages = srpo_advantages(rewards, known, outcome, group_size=size, correct_from=FULL_REWARD)
    lines = [line.split() for line in GROUP[0].split("\n")]
    step_ids = np.repeat(np.arange(len(lines)), [len(words) for words in lines])[None]
    mask = np.ones(step_ids.shape, bool)
    first = type(advantages)(outcome=advantages.outcome[:1], step=advantages.step[:1])
    by_token = np.asarray(token_advantages(first, step_ids, mask))[0]
    draw(lines, rewards[0], by_token, float(outcome[0])).savefig(
        OUTPUT, dpi=160, metadata={"Software": None}
    )
    print(f"wrote {OUTPUT}")


def draw(
    lines: list[list[str]], rewards: np.ndarray, by_token: np.ndarray, outcome: float
) -> Figure:
    """One line a step: its words on their advantage's color, then reward and advantage."""
    figure = Figure(figsize=(9.2, 2.2))
    axis = figure.add_axes((0.01, 0.02, 0.98, 0.96))
    axis.set(xlim=(0, 100), ylim=(len(lines) + 1.1, -0.9))
    axis.axis("off")
    colors, limit = matplotlib.colormaps["RdYlGn"], max(1.0, float(np.abs(by_token).max()))
    norm, token = TwoSlopeNorm(vcenter=0.0, vmin=-limit * 1.6, vmax=limit * 1.6), 0
    for column, title in ((82, "step reward"), (94, "advantage")):
        axis.text(column, -0.3, title, ha="center", fontsize=9, color="#555555")
    title = f"query: {PAIR.query}   product: {PAIR.product['title']}"
    axis.text(1, -0.3, title, fontsize=9, color="#555555")
    for row, words in enumerate(lines):
        column = 1.0
        for word in words:
            box = {"facecolor": colors(norm(by_token[token])), "edgecolor": "none", "pad": 1.6}
            axis.text(column, row + 0.6, word, fontsize=9, family="monospace", bbox=box)
            column += 0.835 * (len(word) + 1) + 0.35  # monospace, and the box around it
            token += 1
        axis.text(82, row + 0.6, f"{rewards[row]:.0f}", ha="center", fontsize=9)
        axis.text(94, row + 0.6, f"{by_token[token - 1]:+.2f}", ha="center", fontsize=9)
    axis.text(1, len(lines) + 0.7, f"outcome reward {outcome:.1f}", fontsize=9, color="#555555")
    return figure


if __name__ == "__main__":
    main()
