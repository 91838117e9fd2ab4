"""The program ``she-jax``, also as ``python -m she_jax``."""

from she_jax.training.stop import leave_on_interrupt


def main() -> None:
    """Runs the command line."""
    leave_on_interrupt()
    from she_jax.runs.command import run_command

    run_command()


if __name__ == "__main__":
    main()
