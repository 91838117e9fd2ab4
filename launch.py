"""Runs a recipe: ``python launch.py --config=configs/stage1.py --workdir=DIR --config.KEY=VALUE``.

Exit codes: 0 done; 1 invalid input (a message, no traceback); 2 invalid command line; 143 and 130
stopped by SIGTERM and by Ctrl-C, after saving. Repeating the command resumes the run.
"""

import os
import signal
import sys


def _leave(number: int, frame: object) -> None:
    """Ends the program at once, without a traceback: nothing has begun, or all is saved."""
    os.write(2, b"launch.py: interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _leave)  # before the imports, which take seconds

# ruff: noqa: E402
import difflib
import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs.renamed import new_key, new_value

ROOT = Path(__file__).resolve().parent
FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; runs/<config name> if not given.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _exit_with(f"unexpected arguments {argv[1:]}: options start with --", 2)
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax and TFDS log a lot
    workdir = WORKDIR.value or default_workdir()
    if (devices := CONFIG.value.cpu_devices) < 1:
        _exit_with(f"--config.cpu_devices={devices}: expected at least 1", 2)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Read once, when JAX starts; no effect on an accelerator.
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(devices))
    # Imported here, since it takes seconds: a wrong command line has failed by now.
    from she_jax.types import UserError

    try:
        run = find_run(CONFIG.value.get("kind"))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(CONFIG.value, Path(workdir))
    except OSError as error:
        no_space = error.errno == errno.ENOSPC and not error.filename
        hint = f"; free space for {workdir}, then repeat the command" if no_space else ""
        _exit_with(f"{error}{hint}", 1)
    except UserError as error:
        _exit_with(str(error), 1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, _leave)  # while threads end, too
        _exit_with(f"interrupted; the same command goes on with what is saved in {workdir}", 130)


def find_run(kind: str | None) -> Callable[[ConfigDict, Path], None]:
    """Returns the function that runs a config of this kind, given the config and the run's folder.

    Raises:
      UserError: for the study of ``benchmarks/evidence`` where that folder is missing.
    """
    from she_jax.types import UserError

    if kind != "evidence":
        from she_jax.runs.run import run

        return run
    if not (ROOT / "benchmarks" / "evidence" / "run.py").is_file():
        raise UserError(
            f"kind='evidence': the study needs a checkout of the repository; {ROOT} has no "
            "benchmarks/evidence"
        )
    sys.path.insert(0, str(ROOT))  # whatever the working folder is
    from benchmarks.evidence.run import run_study

    return run_study


def default_workdir() -> str:
    """``runs/<config name>``; with an argument (``stage1.py:model=x``) ``runs/stage1-model-x``."""
    recipe = config_flags.get_config_filename(FLAGS["config"])
    name, colon, argument = recipe.partition(":")
    return f"runs/{Path(name).stem}" + re.sub(r"[^A-Za-z0-9.]+", "-", colon + argument)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; prints a one-line error and exits with code 2 if it is invalid."""
    try:
        remaining = FLAGS(argv)
    except flags.Error as error:
        cause: BaseException = error
        while nested := cause.__cause__ or cause.__context__:
            cause = nested
        if "Traceback" in str(error) and not isinstance(cause, ValueError):
            raise  # a bug in the config file
        _exit_with(str(cause if "Traceback" in str(error) else error), 2)
    except OSError as error:
        _exit_with(str(error), 2)
    except (AttributeError, KeyError):
        if message := _unknown_key(argv):
            _exit_with(message, 2)
        raise
    if FLAGS["config"].value is None:
        _exit_with("--config is missing: give a recipe, such as --config=configs/stage1.py", 2)
    name = config_flags.get_config_filename(FLAGS["config"]).partition(":")[0]
    if not Path(name).is_file():
        _exit_with(f"--config={name}: there is no such file", 2)
    for key, value in recipe_items(CONFIG.value).items():
        if new := new_value(key, value):
            _exit_with(f"--config.{key}={value}: renamed, use --config.{key}={new}", 2)
    return remaining


def _unknown_key(argv: list[str]) -> str | None:
    matches = [re.match(r"--?(?:no)?config\.([^=\[]+)", argument) for argument in argv]
    plain = flags.FlagValues()  # the config without the command line's changes
    config = config_flags.DEFINE_config_file("config", flag_values=plain, sys_argv=argv[:1])
    plain(argv, known_only=True)
    known = list(recipe_items(config.value))
    for key in [match[1] for match in matches if match]:
        if key in known:
            continue
        if (new := new_key(key)) in known:
            return f"--config.{key}: renamed, use --config.{new}"
        near = difflib.get_close_matches(key, known, n=1, cutoff=0) or known[:1]
        return f"--config.{key}: there is no such key; the nearest one is --config.{near[0]}"
    return None


def recipe_items(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Every key of a recipe, with dots, to its value."""
    items: dict[str, Any] = {}
    for key, value in config.items():
        items[f"{prefix}{key}"] = value
        if isinstance(value, ConfigDict):
            items |= recipe_items(value, f"{prefix}{key}.")
    return items


def _exit_with(message: str, code: int):
    print(f"launch.py: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
