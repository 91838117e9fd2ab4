"""Filters the training pairs of a run: a data set of the pairs worth training on, and a report."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from rich.console import Console

from she_jax.data.dataset import (
    ExampleBuilder,
    ExampleConfig,
    Prepared,
    fingerprint,
    open_split,
    prepare,
)
from she_jax.data.intake import Row
from she_jax.filtering.measure import filter_prompts
from she_jax.runs.policy_run import begin
from she_jax.training.files import write_json
from she_jax.training.logging import Progress
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import Config


class Filtered(ExampleBuilder):
    """A data set of which a filter kept some training pairs; the other splits are whole."""

    origin: Prepared
    kept: Sequence[int]

    def rows(self) -> Iterator[Row]:
        """The kept training pairs in the order of their rows, then the other splits."""
        for split in sorted(self.origin.splits, key=lambda name: (name != "train", name)):
            source = open_split(self.origin.path, split)
            for row in self.kept if split == "train" else range(len(source)):
                yield Row(split=split, example=source[row])


@dataclass(kw_only=True, eq=False)
class FilteredConfig(ExampleConfig):
    """What it was made of: the fingerprint of the pairs, and a digest of the rows that stay."""

    origin: str = ""
    kept: str = ""


def run_filter(config: Config, workdir: Path) -> None:
    """Filters the training pairs of a policy's run with its best policy: a data set and a report.

    ``filtered/`` holds the data set, for ``--config.data.name=made``; ``filter/report.html`` says
    what went and why.
    """
    done = workdir / "summary.json"
    if not done.is_file():
        with StopSignal() as stop:
            made, policy, _ = begin(config, workdir, "filter's policy", ("srpo", "sft"))
            kept = filter_prompts(config, workdir, policy, policy.params, made, stop)
            if kept is None:
                return
            digest = sha256(json.dumps(kept.rows).encode()).hexdigest()[:16]
            own = FilteredConfig(origin=fingerprint(made), kept=digest)
            builder = Filtered(data_dir=workdir / "filtered", config=own)
            builder.origin, builder.kept = made, kept.rows
            with Progress("writing the filtered set", total=None) as progress:
                written = prepare(builder, progress.update)
                progress.update(sum(written.splits.values()))
            report = json.loads((workdir / "filter" / "report.json").read_text(encoding="utf-8"))
            write_json(done, report | {"data": str(written.path)})
    figures = json.loads(done.read_text(encoding="utf-8"))
    console = Console(highlight=False)
    console.print(f"kept {figures['kept']:,} of {figures['pairs']:,} pairs", soft_wrap=True)
    console.print(f"report: {workdir / 'filter' / 'report.html'}", soft_wrap=True)
    console.print(
        f"train on them: --config.data.name=made --config.data.path={figures['data']}",
        soft_wrap=True,
    )
