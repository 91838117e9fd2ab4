"""Runs a recipe: ``python launch.py --config=configs/stage1.py --workdir=DIR --config.KEY=VALUE``.

The console script ``she-jax`` runs the same; this file also runs the study of ``benchmarks/``,
which is in no package. Exit codes: see ``she_jax.runs.launch``.
"""

import sys
from pathlib import Path
from typing import Any

from she_jax.training.stop import leave_on_interrupt

ROOT = Path(__file__).resolve().parent


def main() -> None:
    """Runs the command line."""
    leave_on_interrupt()
    from she_jax.runs.command import HELP, help_text
    from she_jax.runs.launch import launch

    if HELP & set(sys.argv):
        print(__doc__, help_text(), sep="\n")
        return
    study = (ROOT / "benchmarks" / "evidence" / "run.py").is_file()
    launch(sys.argv, {"evidence": run_study} if study else {})


def run_study(recipe: Any, workdir: Path) -> None:
    """Runs ``configs/evidence.py``."""
    sys.path.insert(0, str(ROOT))  # whatever the working folder is
    from benchmarks.evidence import run

    run.run_study(recipe, workdir)


if __name__ == "__main__":
    main()
