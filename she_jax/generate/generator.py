"""Generation with a policy: greedy chains, sampled completions, and a file of predictions."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console

from she_jax.cot import LABELS, Chain
from she_jax.data.dataset import ExampleSource, open_split, spread_out
from she_jax.generate.prompts import PromptFormat
from she_jax.generate.sampler import jit_sample
from she_jax.rl.steps import step_ids
from she_jax.evaluation.metrics import pass_at_k, score
from she_jax.training.logging import Progress, say
from she_jax.rollouts.page import write_json
from she_jax.training.setup import Policy, load_policy, make_data
from she_jax.training.workdir import Config
from she_jax.types import Example, Rollout

Show = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sampled completion: its tokens with the end-of-sequence token, its text, its parsed chain.

    ``truncated`` means that it has no end-of-sequence token.
    """

    tokens: tuple[int, ...]
    text: str
    chain: Chain
    truncated: bool


class Judge:
    """Generator of a policy's chains, batch by batch, greedy or sampled, with any parameters.

    Args:
      policy: model, prompts and devices; its parameters are not used.
      batch_size: completions per batch; the last batch is padded with repetitions.
    """

    def __init__(self, policy: Policy, batch_size: int):
        self.format, self._policy = policy.format, policy
        self._devices = policy.mesh.shape["data"] * policy.mesh.shape["fsdp"]
        self._batch_size = self._round_up(batch_size)
        self._samplers: dict[int, Callable[..., Rollout]] = {}
        self._reported_cut = False

    def _round_up(self, rows: int) -> int:
        """The next multiple of the number of devices, at least one row each."""
        return max(1, math.ceil(rows / self._devices)) * self._devices

    def read(
        self, params: Any, examples: Sequence[Example] | ExampleSource, rows: Sequence[int]
    ) -> Iterator[tuple[Sequence[Example], Rollout, list[Chain]]]:
        """Yields examples, greedy rollouts (on the host, padded) and chains, batch by batch."""
        size = self._batch_size
        for first in range(0, len(rows), size):
            part = [examples[row] for row in rows[first : first + size]]
            rollout = self._generate(self._sampler(1), params, part, size, jax.random.key(0), 0.0)
            yield part, rollout, self._parse(rollout)[: len(part)]

    def chains(self, params: Any, examples: Sequence[Example], show: Show) -> list[Chain]:
        """The greedy chain of each pair. ``show`` is called with the number of finished pairs.

        Pairs are batched by query length: longer queries have longer chains, and a batch takes as
        long as its longest chain.
        """
        rows = sorted(range(len(examples)), key=lambda row: len(examples[row].query))
        chains: list[Chain] = []
        for _, _, batch_chains in self.read(params, examples, rows):
            chains += batch_chains
            show(len(chains))
        return [chains[index] for index in np.argsort(rows)]

    def pass_at(
        self, params: Any, examples: Sequence[Example], k: int, seed: int, show: Show
    ) -> dict[str, float]:
        """pass@k of the label, over k chains per pair sampled at temperature 1.

        Returns:
          ``pass_at_<k>``, and ``sampled_accuracy``, the share of correct labels among all chains.
          Both are over the pairs that have a label; empty if there are none.
        """
        groups = self.samples(params, examples, k, seed, show)
        correct = np.array(
            [
                [sample.chain.label == example.label for sample in group]
                for group, example in zip(groups, examples, strict=True)
                if example.label is not None
            ]
        )
        if not correct.size:
            return {}
        return {f"pass_at_{k}": pass_at_k(correct), "sampled_accuracy": float(correct.mean())}

    def samples(
        self, params: Any, examples: Sequence[Example], k: int, seed: int, show: Show
    ) -> list[list[Sample]]:
        """k completions of each pair, sampled at temperature 1."""
        sampler, size = self._sampler(k), self._round_up(self._batch_size // k)
        groups: list[list[Sample]] = []
        for first in range(0, len(examples), size):
            part = examples[first : first + size]
            key = jax.random.fold_in(jax.random.key(seed), first)
            samples = self._to_samples(self._generate(sampler, params, part, size, key, 1.0))
            groups += [samples[n * k : (n + 1) * k] for n in range(len(part))]
            show(len(groups))
        return groups

    def _sampler(self, group_size: int) -> Callable[..., Rollout]:
        if group_size not in self._samplers:  # each compiles once
            self._samplers[group_size] = jit_sample(
                self._policy.model,
                group_size=group_size,
                max_new_tokens=self.format.completion_length,
                eos_id=self.format.eos_ids,
                pad_id=self.format.pad_id,
                mesh=self._policy.mesh,
            )
        return self._samplers[group_size]

    def _generate(
        self,
        sampler: Callable[..., Rollout],
        params: Any,
        part: Sequence[Example],
        size: int,
        key: Array,
        temperature: float,
    ) -> Rollout:
        padded = [*part, *[part[-1]] * (size - len(part))]
        prompts, cut = self.format.prompts(padded)
        if cut and not self._reported_cut:
            self._reported_cut = True
            say(
                f"{cut} of {len(padded)} pairs do not fit into model.prompt_length="
                f"{self.format.prompt_length}: their product texts are truncated"
            )
        return jax.device_get(sampler(params, prompts, key, temperature))

    def _parse(self, rollout: Rollout) -> list[Chain]:
        return [self.format.schema.parse(text) for text in self.format.texts(rollout)]

    def _to_samples(self, rollout: Rollout) -> list[Sample]:
        rows = zip(np.asarray(rollout.tokens), np.asarray(rollout.completion_mask), strict=True)
        completions = [tuple(tokens[mask].tolist()) for tokens, mask in rows]
        texts, truncated = self.format.texts(rollout), self.format.truncated(rollout).tolist()
        return [
            Sample(tokens=ids, text=text, chain=self.format.schema.parse(text), truncated=no_end)
            for ids, text, no_end in zip(completions, texts, truncated, strict=True)
        ]


def evaluate(config: Config, workdir: Path) -> None:
    """Writes a checkpoint's predictions for a data set, and their metrics if it has labels.

    ``predictions.jsonl`` has one line per pair: ``uid``, ``label`` (null if unreadable),
    ``probabilities`` of the four classes given the reasoning before the label, ``well_formed`` and
    ``steps`` (each with its name, text and verdict). The metrics are in ``summary.json``.

    Raises:
      ValueError: if the folder holds the predictions of other pairs or of another checkpoint.
    """
    console = Console(highlight=False)
    final, sources = workdir / "predictions.jsonl", workdir / "judged.json"
    policy, source = load_policy(config)
    settings = config.copy_and_resolve_references()
    settings.chain.update(policy.format.schema.switches)  # the data set follows the policy's chain
    dataset = make_data(settings, workdir)
    inputs = {"pairs": str(dataset.path), "checkpoint": source}
    if final.is_file():
        if json.loads(sources.read_text(encoding="utf-8")) != inputs:
            raise ValueError(
                f"{final} holds predictions of other pairs or of another checkpoint (see "
                f"{sources}): give a new folder with --workdir"
            )
        console.print(f"all is done: the predictions are in {final}", soft_wrap=True)
        return
    write_json(sources, inputs)
    examples = open_split(dataset.path, config.data.eval_split)
    rows = spread_out(len(examples), config.data.eval_pairs)
    generator = Judge(policy, config.eval.batch_size)
    read_out = jax.jit(make_look(policy))
    labeled: list[tuple[Chain, Example]] = []
    draft = workdir / "predictions.jsonl.part"
    with (
        draft.open("w", encoding="utf-8") as file,
        Progress(f"evaluating {config.data.name}", total=len(rows)) as progress,
    ):
        done = 0
        for part, rollout, chains in generator.read(policy.params, examples, rows):
            columns, class_ids = label_tokens(policy.format, rollout, chains)
            by_row = np.asarray(read_out(policy.params, rollout, columns, class_ids)[0])
            for example, chain, probs, column in zip(part, chains, by_row, columns, strict=False):
                probabilities = probs if column else None
                file.write(json.dumps(_prediction(example, chain, probabilities, policy.format)))
                file.write("\n")
            labeled += [(c, e) for c, e in zip(chains, part, strict=True) if e.label is not None]
            done += len(part)
            progress.update(done)
    if labeled:
        chains, pairs = zip(*labeled, strict=True)
        metrics = score(chains, pairs, policy.format.schema)
        write_json(workdir / "summary.json", metrics)
        console.print(f"macro F1 {metrics['macro_f1']:.3f}, accuracy {metrics['accuracy']:.3f}")
    draft.replace(final)
    console.print(f"predictions: {final}", soft_wrap=True)


def label_tokens(
    prompts: PromptFormat, rollout: Rollout, chains: Sequence[Chain]
) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B 4"]]:
    """The position of each chain's label token, and the token ids of the four classes there.

    Args:
      chains: of the rollout's first rows; the rest is skipped.

    Returns:
      Index of the label's token in its row, 0 if there is none, and the token ids that would write
      classes 1 to 4 in its place.
    """
    tokens, count = np.asarray(rollout.tokens), len(chains)
    lines = [chain.line_steps for chain in chains]
    padded = np.full((count, max(map(len, lines))), -1)
    for row, line_steps in zip(padded, lines, strict=True):
        row[: len(line_steps)] = line_steps
    mask = np.asarray(rollout.completion_mask)[:count]
    token_steps = step_ids(tokens[:count], mask, prompts.newlines(int(tokens.max()) + 1), padded)
    columns, class_ids = np.zeros(len(tokens), np.int32), np.zeros((len(tokens), 4), np.int32)
    for row, chain in enumerate(chains):
        digit = str(chain.label).encode()
        for column in np.flatnonzero(token_steps[row] == prompts.schema.names.index("label"))[::-1]:
            piece = prompts.token_bytes[tokens[row, column]]
            ids = [prompts.token_ids.get(piece.replace(digit, c.encode()), -1) for c in LABELS]
            if chain.label is not None and digit in piece and min(ids) >= 0:
                columns[row], class_ids[row] = column, ids
                break
    return columns, class_ids


def make_look(
    policy: Policy,
) -> Callable[..., tuple[Float[Array, "B 4"], Float[Array, "B D"]]]:
    """Makes the function that reads class probabilities and embeddings from rollouts.

    Returns:
      (params, rollout, columns, class_ids) -> the probabilities of the four classes at the label
      token (see ``label_tokens``), and the mean hidden state over the prompt and the chain.
    """

    def read_out(params: Any, rollout: Rollout, columns: Array, ids: Array) -> tuple[Array, Array]:
        real = rollout.prompt_mask | rollout.completion_mask
        position_ids = jnp.where(real, jnp.cumsum(real, axis=1) - 1, -1)
        output = policy.model.forward(params, rollout.tokens, position_ids)
        before = jnp.take_along_axis(output.hidden, jnp.maximum(columns - 1, 0)[:, None, None], 1)
        logits = jnp.einsum("bd,dbc->bc", before[:, 0], output.head[:, ids])
        total = jnp.where(real[:, :, None], output.hidden.astype(jnp.float32), 0.0).sum(axis=1)
        return jax.nn.softmax(logits.astype(jnp.float32), axis=1), total / real.sum(1)[:, None]

    return read_out


def _prediction(
    example: Example, chain: Chain, probabilities: np.ndarray | None, prompts: PromptFormat
) -> dict[str, Any]:
    """A line of ``predictions.jsonl``."""
    steps = [
        {"name": name, "text": step.text, "verdict": step.verdict}
        for name, step in zip(prompts.schema.names, chain.steps, strict=True)
        if step is not None
    ]
    by_label = None
    if probabilities is not None:
        by_label = {c: round(float(p), 6) for c, p in zip(LABELS, probabilities, strict=True)}
    return {
        "uid": example.uid,
        "label": chain.label,
        "probabilities": by_label,
        "well_formed": chain.well_formed,
        "steps": steps,
    }
