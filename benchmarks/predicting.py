"""Judges the blocks of a prediction on Apache Beam's or Ray's workers.

    pip install apache-beam ray        # either, in an environment of its own
    python benchmarks/predicting.py --table=more.csv --checkpoint=runs/stage1 \\
        --blocks=/shared/blocks --on=ray --workers=4      # or --on=beam plus Beam's own flags
    she-jax predict more.csv --checkpoint=runs/stage1 --config.predict.blocks=/shared/blocks

The elements are the numbers of the blocks that are missing; each worker loads the policy once and
writes the files of its blocks. The last line finds all of them and writes what is made of them.
"""

import sys
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from she_jax.recipes import evaluate
from she_jax.runs.blocks import Share
from she_jax.runs.config import parse
from she_jax.runs.predict import open_job
from she_jax.runs.resolve import resolve

FLAGS = flags.FLAGS
flags.DEFINE_string("table", None, "The pairs.", required=True)
flags.DEFINE_string("checkpoint", None, "The policy's run.", required=True)
flags.DEFINE_string("blocks", None, "Folder of the blocks, which all workers see.", required=True)
flags.DEFINE_integer("samples", 0, "Chains a pair that vote.")
flags.DEFINE_enum("on", "beam", ["beam", "ray"], "Whose workers.")
flags.DEFINE_integer("workers", 2, "Of Ray; Beam has flags of its own.")

Options = tuple[str, str, str, int]  # table, checkpoint, blocks, samples


def open_share(options: Options) -> Share:
    """Loads what judges the blocks."""
    table, checkpoint, blocks, samples = options
    recipe: Any = ConfigDict(evaluate.get_config().to_dict())
    recipe.checkpoint, recipe.data.name, recipe.data.path = checkpoint, "table", table
    recipe.predict.blocks, recipe.decide.samples = blocks, samples
    recipe.data.dir = f"{blocks}.data"  # prepared once
    config: Any = parse(resolve(recipe.lock(), Path(blocks)), Path(blocks))
    return open_job(config, Path(blocks)).share()


def with_beam(missing: list[int], options: Options, beam_flags: list[str]) -> None:
    """Judges blocks with the runner that Beam's flags name."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    class Judge(beam.DoFn):
        """Writes the files of blocks, and yields their numbers of pairs."""

        def setup(self):
            self._share = open_share(options)

        def process(self, block: int):
            self._share.write(block, lambda done: None)
            yield len(self._share.blocks.rows(block))

    with beam.Pipeline(options=PipelineOptions(beam_flags)) as pipeline:
        blocks = pipeline | beam.Create(missing) | beam.Reshuffle()
        total = blocks | beam.ParDo(Judge()) | beam.CombineGlobally(sum)
        _ = total | beam.Map(lambda count: print(f"the pipeline judged {count} pairs"))


def with_ray(missing: list[int], options: Options, workers: int) -> None:
    """Judges blocks in Ray's worker processes."""
    import ray
    from ray.util import ActorPool

    class Judge:
        """Writes the files of blocks, and returns their numbers of pairs."""

        def __init__(self):
            self._share = open_share(options)

        def write(self, block: int) -> int:
            self._share.write(block, lambda done: None)
            return len(self._share.blocks.rows(block))

    ray.init(num_cpus=workers)
    actor: Any = ray.remote(num_cpus=1)(Judge)
    pool = ActorPool([actor.remote() for _ in range(workers)])
    counts = pool.map_unordered(lambda judge, block: judge.write.remote(block), missing)
    print(f"Ray judged {sum(counts)} pairs")


def main() -> None:
    beam_flags = FLAGS(sys.argv, known_only=True)[1:]
    table, checkpoint, blocks = (
        str(Path(path).absolute()) for path in (FLAGS.table, FLAGS.checkpoint, FLAGS.blocks)
    )
    options = table, checkpoint, blocks, FLAGS.samples
    share = open_share(options)  # the pairs are prepared, and the folder claimed
    missing = [n for n, path in enumerate(share.blocks.paths) if not path.is_file()]
    clock = time.perf_counter()
    if FLAGS.on == "ray":
        with_ray(missing, options, FLAGS.workers)
    else:
        with_beam(missing, options, beam_flags)
    print(f"{len(missing)} blocks in {time.perf_counter() - clock:.1f} s")


if __name__ == "__main__":
    main()
