"""A user's own reward, estimator or data set, named in a recipe as ``package.module:name``.

Only a recipe or the command line may name one, never the files of a checkpoint: whoever loads a
downloaded run must not run its code.
"""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from she_jax.training.files import write_json
from she_jax.training.logging import log
from she_jax.types import Advantages, UserError

PLUGIN_FILE = "plugins.json"  # in a run's folder: names, and hashes of their source files


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """An object that a recipe names.

    Attributes:
      setting: the config key.
      name: ``package.module:name``.
      value: the object, callable.
      digest: SHA-256 of the module's source file.
    """

    setting: str
    name: str
    value: Callable[..., Any]
    digest: str


def is_plugin(name: str) -> bool:
    """Whether a setting names a Python object, not one of its built-in values."""
    return ":" in name


def load_plugin(setting: str, name: str) -> Plugin:
    """Imports the object that a setting names, from the working folder or the installed packages.

    Args:
      setting: the config key, for messages.
      name: ``package.module:name``.

    Raises:
      UserError: if the module or the name does not exist, is not callable, or fails to import.
    """
    module_name, _, attribute = name.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(
                f"{setting}={name}: there is no module {error.name!r}, neither in {folder} nor "
                "among the installed packages; expected package.module:name"
            ) from error
        raise UserError(f"{setting}={name}: its import failed: {error}") from error
    except Exception as error:
        raise UserError(
            f"{setting}={name}: its import failed: {type(error).__name__}: {error}"
        ) from error
    value = getattr(module, attribute, None)
    if not callable(value):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(
            f"{setting}={name}: {module_name} has no function or class {attribute!r}; it has "
            f"{', '.join(names) or 'none'}"
        )
    source = getattr(module, "__file__", None)  # built-in: none
    digest = hashlib.sha256(Path(source).read_bytes() if source else b"").hexdigest()
    return Plugin(setting=setting, name=name, value=value, digest=digest)


def record_plugins(workdir: Path, plugins: Mapping[str, Plugin]) -> None:
    """Keeps names and hashes of a run's plugins in its folder; logs if a source file changed."""
    path = workdir / PLUGIN_FILE
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for setting, plugin in plugins.items():
        before = saved.get(setting, {}).get("sha256", plugin.digest)
        if before != plugin.digest:
            log(
                f"{setting}={plugin.name}: its source changed since this run began (SHA-256 "
                f"{before[:12]} then, {plugin.digest[:12]} now); the run continues with the new one"
            )
        record = {"name": plugin.name, "sha256": plugin.digest}
        saved[setting] = saved.get(setting, {}) | record
    if saved:
        write_json(path, saved)


def recorded(workdir: Path, setting: str) -> dict[str, str]:
    """Name and hash of the object that a run's setting named; empty for a built-in value."""
    path = workdir / PLUGIN_FILE
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return saved.get(setting, {})


def record_dataset(workdir: Path, path: Path) -> None:
    """Keeps where a run's data set lies if a plugin wrote it, for the runs that build on it."""
    file = workdir / PLUGIN_FILE
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "data.name" in saved:
        saved["data.name"]["prepared"] = str(path)
        write_json(file, saved)


def checked_estimator(plugin: Plugin) -> Callable[..., Advantages]:
    """A user's estimator, with the shapes of its result checked.

    It is called as ``she_jax.srpo_advantages`` is: (step_rewards [B, S], step_mask [B, S], outcome
    [B], group_size=, step_tokens= [B, S], min_std=) -> ``Advantages``. It is traced by ``jax.jit``.
    """

    def estimator(step_rewards: Any, step_mask: Any, outcome: Any, **options: Any) -> Advantages:
        advantages = plugin.value(step_rewards, step_mask, outcome, **options)
        name, expected = f"{plugin.setting}={plugin.name}", (outcome.shape, step_rewards.shape)
        if not isinstance(advantages, Advantages):
            raise UserError(
                f"{name} returned {type(advantages).__name__}: expected she_jax.Advantages with "
                f"outcome {list(expected[0])} and step {list(expected[1])}"
            )
        if (shapes := (advantages.outcome.shape, advantages.step.shape)) != expected:
            raise UserError(
                f"{name} returned outcome {list(shapes[0])} and step {list(shapes[1])}: expected "
                f"{list(expected[0])} and {list(expected[1])}"
            )
        return advantages

    return estimator
