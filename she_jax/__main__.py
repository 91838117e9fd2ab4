"""The program ``she-jax``, also as ``python -m she_jax``."""

import sys

from she_jax import lacking
from she_jax.training.stop import leave_on_interrupt


def main() -> None:
    """Runs the command line."""
    leave_on_interrupt()
    try:
        from she_jax.runs.command import run_command
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("she_jax"):
            raise
        sys.exit(f"she-jax: {lacking(error)}")
    run_command()


if __name__ == "__main__":
    main()
