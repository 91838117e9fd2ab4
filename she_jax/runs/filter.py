"""Filters the training pairs of a run: a data set of the pairs worth training on, and a report."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from she_jax.cot import LabelSet
from she_jax.data.dataset import (
    ExampleBuilder,
    ExampleConfig,
    PreparedDataset,
    fingerprint,
    open_split,
    prepare,
)
from she_jax.data.intake import Row
from she_jax.filtering.measure import filter_prompts
from she_jax.runs.config import FilterRunConfig
from she_jax.runs.load import PHASES
from she_jax.runs.policy_data import start_from_policy
from she_jax.runs.validate import check_front
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, log
from she_jax.training.stop import StopSignal


class Filtered(ExampleBuilder):
    """A data set of which a filter kept some training pairs; the other splits are whole."""

    origin: PreparedDataset
    kept: Sequence[int]

    def rows(self) -> Iterator[Row]:
        """The kept training pairs in the order of their rows, then the other splits."""
        for split in sorted(self.origin.splits, key=lambda name: (name != "train", name)):
            source = open_split(self.origin.path, split)
            for row in self.kept if split == "train" else range(len(source)):
                yield Row(split=split, example=source[row])


@dataclass(kw_only=True, eq=False)
class FilteredConfig(ExampleConfig):
    """What it was made of: the fingerprint of the pairs, and a digest of the rows that stay.

    Their texts have been cleaned, and their labels are of the set ``labels``.
    """

    origin: str = ""
    kept: str = ""
    labels: str = "1-4"
    markup: bool = False

    @property
    def label_set(self) -> LabelSet:
        return LabelSet.parse(self.labels)

    @property
    def needs_title(self) -> bool:
        return False


def filter_run(config: FilterRunConfig, workdir: Path) -> None:
    """Filters the training pairs of a policy's run with its best policy: a data set and a report.

    ``filtered/`` holds the data set, for ``--config.data.name=prepared``; ``filter/report.html``
    shows what was dropped and why.
    """
    summary = workdir / "summary.json"
    if not summary.is_file():
        with StopSignal() as stop:
            dataset, lm, params = start_from_policy(config, workdir, "filter's policy", PHASES)
            check_front(dataset, config.filter.front)
            folder = workdir / "filter"
            kept = filter_prompts(folder, lm, params, dataset, config.measure, config.filter, stop)
            if kept is None:
                return
            digest = sha256(json.dumps(kept.rows).encode()).hexdigest()[:16]
            options = FilteredConfig(
                origin=fingerprint(dataset), kept=digest, labels=dataset.labels
            )
            builder = Filtered(data_dir=workdir / "filtered", config=options)
            builder.origin, builder.kept = dataset, kept.rows
            with Progress("writing the filtered set", total=None) as progress:
                filtered = prepare(builder, progress.update)
                progress.update(sum(filtered.splits.values()))
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            write_json(summary, report | {"data": str(filtered.path)})
    results = json.loads(summary.read_text(encoding="utf-8"))
    path = shlex.quote(results["data"])
    log(f"kept {results['kept']:,} of {results['pairs']:,} pairs")
    log(f"report: {workdir / 'filter' / 'report.html'}")
    log(f"train on them: --config.data.name=prepared --config.data.path={path}")
