"""Runs a recipe from a command line: ``--config=RECIPE --workdir=DIR --config.KEY=VALUE``.

Exit codes: 0 done; 1 invalid input (a message, no traceback); 2 invalid command line; 143 and 130
stopped by SIGTERM and by Ctrl-C, after saving. Repeating the command resumes the run.
"""

import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from she_jax.recipes.renamed import new_key, new_value
from she_jax.training.stop import leave_on_interrupt

FLAGS = flags.FLAGS

Run = Callable[[ConfigDict, Path], None]  # given the recipe and the run's folder


def launch(argv: list[str], others: Mapping[str, Run]) -> None:
    """Runs the recipe of a command line, and exits.

    Args:
      argv: the command line, the program's name first.
      others: what runs the kinds of recipe that ``she_jax.runs.run`` does not know.
    """
    config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "The run's folder; runs/<config name> if not given.")
    app.run(partial(_main, others), argv=argv, flags_parser=_parse_flags)


def exit_with(message: str, code: int) -> NoReturn:
    """Ends the program with a line on stderr."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def exit_in_a_line(workdir: str | Path) -> Iterator[None]:
    """Ends the program with a line: for what the user can correct, with code 1, and for Ctrl-C."""
    # Imported here, since it takes seconds: a wrong command line has failed by now.
    from she_jax.types import UserError

    try:
        yield
    except OSError as error:
        no_space = error.errno == errno.ENOSPC and not error.filename
        hint = f"; free space for {workdir}, then repeat the command" if no_space else ""
        place = f"{error.filename}: {error.strerror}" if error.filename else error
        exit_with(f"{place}{hint}", 1)
    except UserError as error:
        exit_with(str(error), 1)
    except KeyboardInterrupt:
        leave_on_interrupt()  # while threads end, too
        exit_with(f"interrupted; the same command goes on with what is saved in {workdir}", 130)


def recipe_items(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Every key of a recipe, with dots, to its value."""
    items: dict[str, Any] = {}
    for key, value in config.items():
        items[f"{prefix}{key}"] = value
        if isinstance(value, ConfigDict):
            items |= recipe_items(value, f"{prefix}{key}.")
    return items


def _main(others: Mapping[str, Run], argv: list[str]) -> None:
    if len(argv) > 1:
        exit_with(f"unexpected arguments {argv[1:]}: options start with --", 2)
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax and TFDS log a lot
    recipe, workdir = FLAGS.config, FLAGS.workdir or _default_workdir()
    if (devices := recipe.cpu_devices) < 1:
        exit_with(f"--config.cpu_devices={devices}: expected at least 1", 2)
    with exit_in_a_line(workdir):
        run = _find_run(recipe.get("kind"), others)
        _split_cpu(devices)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(recipe, Path(workdir))


def _find_run(kind: str | None, others: Mapping[str, Run]) -> Run:
    from she_jax.types import UserError

    if other := others.get(str(kind)):
        return other
    if kind == "evidence":
        raise UserError(
            "kind='evidence': the study needs a checkout of the repository, and there python "
            "launch.py --config=configs/evidence.py"
        )
    from she_jax.runs.run import run

    return run


def _split_cpu(devices: int) -> None:
    """Splits the CPU, if JAX uses it, into devices, unless the environment says otherwise."""
    import jax

    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not forced and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", devices)  # read once, when JAX looks for devices


def _default_workdir() -> str:
    """``runs/<config name>``; with an argument (``stage1.py:model=x``) ``runs/stage1-model-x``."""
    recipe = config_flags.get_config_filename(FLAGS["config"])
    name, colon, argument = recipe.partition(":")
    return f"runs/{Path(name).stem}" + re.sub(r"[^A-Za-z0-9.]+", "-", colon + argument)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; prints a one-line error and exits with code 2 if it is invalid."""
    try:
        remaining = FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        exit_with(_unknown_flag(error.flagname, argv), 2)
    except flags.Error as error:
        cause: BaseException = error
        while nested := cause.__cause__ or cause.__context__:
            cause = nested
        if "Traceback" in str(error) and not isinstance(cause, ValueError):
            raise  # a bug in the config file
        exit_with(str(cause if "Traceback" in str(error) else error), 2)
    except OSError as error:
        exit_with(str(error), 2)
    except (AttributeError, KeyError):
        if message := _unknown_key(argv):
            exit_with(message, 2)
        raise
    if FLAGS.config is None:
        exit_with("--config is missing: give a recipe, such as --config=configs/stage1.py", 2)
    name = config_flags.get_config_filename(FLAGS["config"]).partition(":")[0]
    if not Path(name).is_file():
        exit_with(f"--config={name}: there is no such file", 2)
    for key, value in recipe_items(FLAGS.config).items():
        if new := new_value(key, value):
            exit_with(f"--config.{key}={value}: renamed, use --config.{key}={new}", 2)
    return remaining


def _known_keys(argv: list[str]) -> list[str]:
    plain = flags.FlagValues()  # the config without the command line's changes
    config = config_flags.DEFINE_config_file("config", flag_values=plain, sys_argv=argv[:1])
    plain(argv, known_only=True)
    items = recipe_items(config.value or ConfigDict())
    return [key for key, value in items.items() if not isinstance(value, ConfigDict)]


def _unknown_flag(name: str, argv: list[str]) -> str:
    """What is said of ``--steps``: the keys that end so, or that are spelled like it."""
    try:
        known = _known_keys(argv)
    except Exception:  # of a recipe that cannot be read, which is said once the options are right
        known = []
    leaves = {key.rpartition(".")[2]: key for key in known} | {"workdir": "workdir"}
    keys = [key for key in known if name in (key, key.rpartition(".")[2])]
    keys = keys or [f"{name}.name"] * (f"{name}.name" in known)
    keys = keys or [leaves[near] for near in difflib.get_close_matches(name, leaves, n=1)]
    meant = [f"--{'config.' * (key != 'workdir')}{key}" for key in keys]
    hint = f"; is {' or '.join(meant)} meant?" if meant else ""
    return f"--{name}: there is no such option{hint}"


def _unknown_key(argv: list[str]) -> str | None:
    matches = [re.match(r"--?(?:no)?config\.([^=\[]+)", argument) for argument in argv]
    known = _known_keys(argv)
    for key in [match[1] for match in matches if match]:
        if key in known:
            continue
        if (new := new_key(key)) in known:
            return f"--config.{key}: renamed, use --config.{new}"
        near = difflib.get_close_matches(key, known, n=1, cutoff=0) or known[:1]
        return f"--config.{key}: there is no such key; the nearest one is --config.{near[0]}"
    return None
