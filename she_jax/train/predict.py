"""Asking a policy: greedy chains for judging, sampled ones for pass@k, a file of judgements."""

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
from she_jax.data.prompts import PromptFormat
from she_jax.rl.sampling import jit_sample
from she_jax.rl.steps import step_ids
from she_jax.train.evaluate import pass_at_k, score
from she_jax.train.metrics import Progress, say
from she_jax.train.report import write_json
from she_jax.train.setup import Policy, load_policy, make_data
from she_jax.train.workdir import Config
from she_jax.types import Example, Rollout

Show = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A completion that a policy sampled: its tokens, end included, what they say, the chain in it.

    ``truncated`` says that it ran out of tokens before its end.
    """

    tokens: tuple[int, ...]
    text: str
    chain: Chain
    truncated: bool


class Judge:
    """Reads chains off a policy, a batch at a time, whatever its parameters are at the moment.

    Args:
      policy: model, prompts and devices; its parameters are not read.
      batch_size: pairs at a time; the last batch is filled up with repetitions.
    """

    def __init__(self, policy: Policy, batch_size: int):
        self.format, self._policy = policy.format, policy
        self._devices = policy.mesh.shape["data"] * policy.mesh.shape["fsdp"]
        self._batch_size = self._shared_out(batch_size)
        self._samplers: dict[int, Callable[..., Rollout]] = {}
        self._told = False  # that prompts are cut

    def _shared_out(self, rows: int) -> int:
        """So many rows, or the few more that every device needs to have as many."""
        return max(1, math.ceil(rows / self._devices)) * self._devices

    def read(
        self, params: Any, examples: Sequence[Example] | ExampleSource, rows: Sequence[int]
    ) -> Iterator[tuple[Sequence[Example], Rollout, list[Chain]]]:
        """Greedy rollouts, on the host, and their chains, for a batch of rows after another."""
        size = self._batch_size
        for first in range(0, len(rows), size):
            part = [examples[row] for row in rows[first : first + size]]
            rollout = self._ask(self._sampler(1), params, part, size, jax.random.key(0), 0.0)
            yield part, rollout, self._parse(rollout)[: len(part)]

    def chains(self, params: Any, examples: Sequence[Example], show: Show) -> list[Chain]:
        """The greedy chain of each pair. ``show`` is told how many pairs are done.

        Pairs with queries of one length go together: the more a query asks, the longer the chain,
        and a batch is read as long as its longest one takes.
        """
        rows = sorted(range(len(examples)), key=lambda row: len(examples[row].query))
        chains: list[Chain] = []
        for _, _, more in self.read(params, examples, rows):
            chains += more
            show(len(chains))
        return [chains[place] for place in np.argsort(rows)]

    def pass_at(
        self, params: Any, examples: Sequence[Example], k: int, seed: int, show: Show
    ) -> dict[str, float]:
        """How often the right label is among k chains sampled at temperature 1.

        Returns:
          ``pass_at_<k>``, and ``sampled_accuracy``, the share of right labels among all k; of the
          pairs that have a label, and nothing where none has.
        """
        groups = self.samples(params, examples, k, seed, show)
        correct = np.array(
            [
                [sample.chain.label == example.label for sample in own]
                for own, example in zip(groups, examples, strict=True)
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
        sampler, size = self._sampler(k), self._shared_out(self._batch_size // k)
        groups: list[list[Sample]] = []
        for first in range(0, len(examples), size):
            part = examples[first : first + size]
            key = jax.random.fold_in(jax.random.key(seed), first)
            samples = self._samples(self._ask(sampler, params, part, size, key, 1.0))
            groups += [samples[n * k : (n + 1) * k] for n in range(len(part))]
            show(len(groups))
        return groups

    def _sampler(self, group_size: int) -> Callable[..., Rollout]:
        if group_size not in self._samplers:  # each is compiled once
            self._samplers[group_size] = jit_sample(
                self._policy.model,
                group_size=group_size,
                max_new_tokens=self.format.completion_length,
                eos_id=self.format.eos_ids,
                pad_id=self.format.pad_id,
                mesh=self._policy.mesh,
            )
        return self._samplers[group_size]

    def _ask(
        self,
        sampler: Callable[..., Rollout],
        params: Any,
        part: Sequence[Example],
        size: int,
        key: Array,
        temperature: float,
    ) -> Rollout:
        filled = [*part, *[part[-1]] * (size - len(part))]
        prompts, cut = self.format.prompts(filled)
        if cut and not self._told:
            self._told = True
            say(
                f"{cut} of {len(filled)} pairs do not fit into model.prompt_length="
                f"{self.format.prompt_length}: the ends of their products are not read"
            )
        return jax.device_get(sampler(params, prompts, key, temperature))

    def _parse(self, rollout: Rollout) -> list[Chain]:
        return [self.format.schema.parse(text) for text in self.format.texts(rollout)]

    def _samples(self, rollout: Rollout) -> list[Sample]:
        rows = zip(np.asarray(rollout.tokens), np.asarray(rollout.completion_mask), strict=True)
        own = [tuple(tokens[mask].tolist()) for tokens, mask in rows]
        texts, cut = self.format.texts(rollout), self.format.truncated(rollout).tolist()
        return [
            Sample(tokens=ids, text=text, chain=self.format.schema.parse(text), truncated=short)
            for ids, text, short in zip(own, texts, cut, strict=True)
        ]


def evaluate(config: Config, workdir: Path) -> None:
    """Judges a set with a checkpoint: ``predictions.jsonl``, and ``summary.json`` for its labels.

    A line a pair: ``uid``, ``label`` (null where the chain cannot be read), ``probabilities`` of
    the four classes given the reasoning before the label, ``well_formed`` and ``steps`` (each with
    its name, text and verdict).
    """
    console = Console(highlight=False)
    final, sources = workdir / "predictions.jsonl", workdir / "judged.json"
    policy, source = load_policy(config)
    asked = config.copy_and_resolve_references()
    asked.chain.update(policy.format.schema.switches)  # what is made or read follows its chain
    made = make_data(asked, workdir)
    inputs = {"pairs": str(made.path), "checkpoint": source}
    if final.is_file():
        if json.loads(sources.read_text(encoding="utf-8")) != inputs:
            raise ValueError(
                f"{final} holds judgements of other pairs or of another checkpoint (see "
                f"{sources}): give a new folder with --workdir"
            )
        console.print(f"all is done: the judgements are in {final}", soft_wrap=True)
        return
    write_json(sources, inputs)
    examples = open_split(made.path, config.data.eval_split)
    rows = spread_out(len(examples), config.data.eval_pairs)
    judge = Judge(policy, config.eval.batch_size)
    look = jax.jit(make_look(policy))
    labelled: list[tuple[Chain, Example]] = []
    draft = workdir / "predictions.jsonl.part"
    with (
        draft.open("w", encoding="utf-8") as file,
        Progress(f"judging {config.data.name}", total=len(rows)) as progress,
    ):
        done = 0
        for part, rollout, chains in judge.read(policy.params, examples, rows):
            where, rivals = label_tokens(policy.format, rollout, chains)
            shares = np.asarray(look(policy.params, rollout, where, rivals)[0])
            for example, chain, share, found in zip(part, chains, shares, where, strict=False):
                file.write(
                    json.dumps(_line(example, chain, share if found else None, policy.format))
                )
                file.write("\n")
            labelled += [(c, e) for c, e in zip(chains, part, strict=True) if e.label is not None]
            done += len(part)
            progress.update(done)
    if labelled:
        chains, pairs = zip(*labelled, strict=True)
        figures = score(chains, pairs, policy.format.schema)
        write_json(workdir / "summary.json", figures)
        console.print(f"macro F1 {figures['macro_f1']:.3f}, accuracy {figures['accuracy']:.3f}")
    draft.replace(final)
    console.print(f"judgements: {final}", soft_wrap=True)


def label_tokens(
    prompts: PromptFormat, rollout: Rollout, chains: Sequence[Chain]
) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B 4"]]:
    """Where each chain writes its label, and the tokens that would have written the four classes.

    Args:
      chains: of the rollout's first rows; the rest is skipped.

    Returns:
      Index of the label's token in its row, 0 where there is none; and the ids for classes 1 to 4.
    """
    tokens, count = np.asarray(rollout.tokens), len(chains)
    lines = [chain.line_steps for chain in chains]
    padded = np.full((count, max(map(len, lines))), -1)
    for row, steps in zip(padded, lines, strict=True):
        row[: len(steps)] = steps
    mask = np.asarray(rollout.completion_mask)[:count]
    owners = step_ids(tokens[:count], mask, prompts.newlines(int(tokens.max()) + 1), padded)
    where, rivals = np.zeros(len(tokens), np.int32), np.zeros((len(tokens), 4), np.int32)
    for row, chain in enumerate(chains):
        digit = str(chain.label).encode()
        for column in np.flatnonzero(owners[row] == prompts.schema.names.index("label"))[::-1]:
            piece = prompts.token_bytes[tokens[row, column]]
            ids = [prompts.token_ids.get(piece.replace(digit, c.encode()), -1) for c in LABELS]
            if chain.label is not None and digit in piece and min(ids) >= 0:
                where[row], rivals[row] = column, ids
                break
    return where, rivals


def make_look(
    policy: Policy,
) -> Callable[..., tuple[Float[Array, "B 4"], Float[Array, "B D"]]]:
    """Makes the function that looks at rollouts through the policy.

    Returns:
      (params, rollout, where, rivals) -> the probabilities of the four classes at the label's token
      (see ``label_tokens``), and the mean of the hidden states over the prompt and the chain.
    """

    def look(params: Any, rollout: Rollout, where: Array, rivals: Array) -> tuple[Array, Array]:
        real = rollout.prompt_mask | rollout.completion_mask
        place = jnp.where(real, jnp.cumsum(real, axis=1) - 1, -1)
        output = policy.model.forward(params, rollout.tokens, place)
        before = jnp.take_along_axis(output.hidden, jnp.maximum(where - 1, 0)[:, None, None], 1)
        logits = jnp.einsum("bd,dbc->bc", before[:, 0], output.head[:, rivals])
        total = jnp.where(real[:, :, None], output.hidden.astype(jnp.float32), 0.0).sum(axis=1)
        return jax.nn.softmax(logits.astype(jnp.float32), axis=1), total / real.sum(1)[:, None]

    return look


def _line(
    example: Example, chain: Chain, share: np.ndarray | None, prompts: PromptFormat
) -> dict[str, Any]:
    steps = [
        {"name": name, "text": step.text, "verdict": step.verdict}
        for name, step in zip(prompts.schema.names, chain.steps, strict=True)
        if step is not None
    ]
    chances = None
    if share is not None:
        chances = {label: round(float(p), 6) for label, p in zip(LABELS, share, strict=True)}
    return {
        "uid": example.uid,
        "label": chain.label,
        "probabilities": chances,
        "well_formed": chain.well_formed,
        "steps": steps,
    }
