"""The blocks of a prediction: written whole or not at all, by one run or by several.

A block is ``BLOCK`` pairs that follow one another. It has samples of its own, whichever blocks were
judged before it, and its pairs alone are batched together: so its bytes are the same whoever judges
it, and a killed run judges at most one block again.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from filelock import FileLock

from she_jax.data.dataset import ExampleSource
from she_jax.evaluation.decide import Decision
from she_jax.evaluation.judge import Calibration, judge
from she_jax.runs.decide import Decider
from she_jax.runs.load import Source
from she_jax.runs.predictions import OutputConfig, prediction, read_block, write_block
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, log
from she_jax.training.stop import StopSignal
from she_jax.types import UserError

BLOCK = 512  # pairs a file
_KEPT = 16  # files in memory
LOCK = ".lock"
IDENTITY_FILE = "identity.json"  # what the blocks of a folder are of


class Blocks(Sequence[dict[str, Any]]):
    """The predictions of some pairs in files of ``BLOCK``, read a file at a time.

    Args:
      folder: of the files.
      format: of the files, their suffix.
      size: number of pairs.

    Attributes:
      paths: of the files, whether they are there or not.
    """

    def __init__(self, folder: Path, format: str, size: int):
        count = -(-size // BLOCK)
        self.paths = [folder / f"{n:06d}.{format}" for n in range(count)]
        self._size, self._read = size, functools.lru_cache(maxsize=_KEPT)(read_block)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._size:
            raise IndexError(f"index {index} of {self._size} predictions")
        block, place = divmod(index, BLOCK)
        return self._read(self.paths[block])[place]

    def rows(self, block: int) -> range:
        """The indices of the pairs of a block."""
        return range(block * BLOCK, min((block + 1) * BLOCK, self._size))

    def missing(self) -> list[Path]:
        """The files that are not there."""
        return [path for path in self.paths if not path.is_file()]


class Share:
    """Judges blocks of pairs with a policy.

    Args:
      decider: the policy and its rule.
      source: where the policy is from.
      examples: of which some are judged.
      rows: these.
      folder: of the blocks.
      config: their format, and this run's share of them.

    Attributes:
      blocks: the predictions.
      calibration: how labels are decided on; that of the folder's first run serves all of them.
    """

    def __init__(
        self,
        decider: Decider,
        source: Source,
        examples: ExampleSource,
        rows: Sequence[int],
        folder: Path,
        config: OutputConfig,
    ):
        self._decider, self._source, self._folder = decider, source, folder
        self._examples, self._rows, self._config = examples, rows, config
        self.blocks = Blocks(folder, config.format, len(rows))

    def claim(self, content: Mapping[str, Any], fixed: Calibration | None = None) -> None:
        """Creates the folder, or checks that its blocks are of the same, and calibrates.

        Args:
          content: what the pairs and the policy are.
          fixed: in place of what is fitted on the run's validation pairs.

        Raises:
          UserError: if the folder has blocks of something else.
        """
        identity = {**content, "judged": len(self._rows), "decide": asdict(self._decider.config)}
        path = self._folder / IDENTITY_FILE
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / LOCK):  # of runs that begin together one calibrates
            if not path.is_file():
                calibration = fixed or self._decider.calibrate(self._source)
                claim = identity | {"calibration": calibration.to_json()}
                write_json(path, claim)
        saved = json.loads(path.read_text(encoding="utf-8"))
        fitted = saved.pop("calibration")
        self.calibration = Calibration(**fitted | {"decision": Decision(**fitted["decision"])})
        if others := [key for key in identity if saved.get(key) != identity[key]]:
            lines = [f"  {k}: {saved.get(k)} in the folder, {identity[k]} now" for k in others]
            raise UserError(
                f"{self._folder} holds predictions of something else:\n"
                + "\n".join(lines)
                + "\nGive another folder, or the values of these"
            )

    def write(self, block: int, show: Callable[[int], None]) -> None:
        """Judges a block and writes its file.

        Args:
          block: its number.
          show: called with the number of its pairs that are done.
        """
        decider, calibration = self._decider, self.calibration
        seed = int(np.random.SeedSequence((decider.config.seed, block)).generate_state(1)[0])
        pairs = [self._examples[self._rows[n]] for n in self.blocks.rows(block)]
        evidence = decider.gather(pairs, calibration.decision.rule, seed, show)
        judgments = judge(evidence, calibration, decider.labels)
        schema = decider.lm.prompts.schema
        lines = [prediction(*both, schema) for both in zip(pairs, judgments, strict=True)]
        path = self.blocks.paths[block]
        part = _unique_part(path)
        write_block(part, lines, decider.labels)
        part.replace(path)

    def run(self, name: str, stop: StopSignal) -> None:
        """Writes the blocks of this run's part that are missing.

        Args:
          name: of the pairs, to show.
          stop: checked between two blocks.

        Raises:
          SystemExit: after a signal, once a block is written.
        """
        config, blocks = self._config, self.blocks
        mine = range(config.part, len(blocks.paths), config.parts)
        done = sum(len(blocks.rows(n)) for n in mine if blocks.paths[n].is_file())
        total = sum(len(blocks.rows(n)) for n in mine)
        chains = self._decider.chains_a_pair(self.calibration.decision.rule)
        each = f"{chains} chain{'s' * (chains > 1)} a pair" if chains else "one pass a pair"
        task = f"judging {name}, {each}"
        with Progress(task, total=total, done=done, unit="pairs") as progress:
            for n in mine:
                if blocks.paths[n].is_file():
                    continue

                def show(more: int, done: int = done) -> None:
                    progress.update(done + more)

                self.write(n, show)
                done += len(blocks.rows(n))
                progress.update(done)
                if stop:
                    log(f"{stop.name}: the finished blocks are kept; the same command goes on")
                    raise SystemExit(stop.exit_code)


def _unique_part(path: Path) -> Path:
    """A name for a draft that no other process takes; it ends like the file's, which says how."""
    return path.with_name(f".{uuid4().hex}.{path.name}")
