"""Runs a recipe: ``python launch.py --config=configs/stage1.py --workdir=DIR --config.KEY=VALUE``.

The console script ``she-jax`` runs the same; this file also runs the study of ``benchmarks/``,
which is in no package. Exit codes: see ``she_jax.runs.launch``.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from she_jax.runs.command import HELP, help_text
from she_jax.runs.launch import launch

ROOT = Path(__file__).resolve().parent


def run_study(config: ConfigDict, workdir: Path) -> None:
    """Runs ``configs/evidence.py``."""
    sys.path.insert(0, str(ROOT))  # whatever the working folder is
    from benchmarks.evidence import run

    run.run_study(config, workdir)


if __name__ == "__main__":
    if HELP & set(sys.argv):
        sys.exit(print(__doc__, help_text(), sep="\n"))
    study = (ROOT / "benchmarks" / "evidence" / "run.py").is_file()
    launch(sys.argv, {"evidence": run_study} if study else {})
