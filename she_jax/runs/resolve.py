"""What a recipe leaves to the user's files is read there once, and kept in ``config.json``."""

import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from she_jax.data.dataset import open_prepared
from she_jax.data.label_choice import resolve_labels
from she_jax.data.readers.columns import columns_there
from she_jax.data.readers.records import column_names
from she_jax.data.readers.table_files import table_parts
from she_jax.data.sources import TABLES
from she_jax.runs.config import Recipe, data_config
from she_jax.training.logging import log
from she_jax.training.workdir import ARTIFACTS, read_recipe
from she_jax.types import UserError

SHOPWORLD = {"prompt_length": 32, "completion_length": 72}  # a few of its prompts are cut
JUDGING = ("evaluate", "annotate")  # kinds whose pairs a policy judges


def resolve(recipe: Recipe, workdir: Path) -> Recipe:
    """The recipe with its label set as text, and with what is known already.

    That are the lengths, and for an evaluation the columns of the policy's run. The set is that of
    a file with meanings, or found in the pairs. A run that has begun keeps the set and the lengths
    that it began with, so that its source may be gone.

    Raises:
      FileNotFoundError: if the file that ``data.labels`` names is missing.
      UserError: if the pairs do not say which set their labels are of.
    """
    recipe = _columns(_instruction(_lengths(recipe, workdir)), workdir)
    text = recipe.data.labels
    if recipe.data.name == "prepared" and not text:
        return _with_labels(recipe, open_prepared(recipe.data.path).labels)
    from_file = bool(re.fullmatch(r"[^\n]*(/[^\n]*|\.(txt|md|labels))", text))
    from_pairs = (
        recipe.data.name in TABLES
        and recipe.kind not in JUDGING  # there the pairs follow the chain of the policy
        and text.lower() in ("", "binary")
    )
    if not (from_file or from_pairs):
        return recipe
    labels = _stored(recipe, workdir)
    if labels is None and from_file:
        labels = _read(Path(text))
    elif labels is None:
        try:
            labels = resolve_labels(data_config(recipe, workdir), text)
        except UserError:
            raise
        except ValueError as error:  # a dataclass's check of itself
            raise UserError(str(error)) from error
    return _with_labels(recipe, labels)


def columns_of(checkpoint: str, path: str, products: str, given: str) -> str:
    """``data.columns`` of a policy's run, as far as other tables have these columns.

    Args:
      checkpoint: a run's folder; a model in files has no columns.
      path: the judgments.
      products: their products; "" without.
      given: what is said of these tables, which comes first.

    Raises:
      FileNotFoundError: if a table is missing.
    """
    if not (Path(checkpoint) / "config.json").is_file():
        return given
    columns = read_recipe(Path(checkpoint)).get("data", {}).get("columns", "")
    tables = [column_names(table_parts(table)) for table in (path, products) if table and columns]
    return ",".join(filter(None, (given, columns_there(columns, *tables, but=given))))


def _columns(recipe: Recipe, workdir: Path) -> Recipe:
    """The recipe of an evaluation with the columns that the policy's run was given."""
    data = recipe.data
    if recipe.kind not in JUDGING or data.name not in ("table", "jsonl"):
        return recipe
    try:
        columns = columns_of(recipe.checkpoint, data.path, data.products, data.columns)
    except FileNotFoundError:  # the tables are gone; what was prepared of them may suffice
        stored = read_recipe(workdir) if (workdir / "config.json").is_file() else {}
        columns = stored.get("data", {}).get("columns", data.columns)
    if columns == data.columns:
        return recipe
    log(f"columns, as in {recipe.checkpoint}: {columns}")
    resolved: Any = ConfigDict(recipe.to_dict())
    resolved.data.columns = columns
    return resolved.lock()


def _lengths(recipe: Recipe, workdir: Path) -> Recipe:
    """The recipe with the lengths of ShopWorld, or those that this run or ``init_from`` found."""
    if recipe.kind not in ("train", "check", "time"):
        return recipe
    earlier = [Path(recipe.init_from).absolute().parent.parent] if recipe.init_from else []
    is_small = recipe.data.name == "shopworld" and recipe.model.name == "scratch"
    found = dict(SHOPWORLD) if is_small else {}
    for folder in (*earlier, workdir):
        has_results = any((folder / name).exists() for name in ARTIFACTS)
        if has_results and (folder / "config.json").is_file():
            found |= {name: read_recipe(folder).get("model", {}).get(name, 0) for name in SHOPWORLD}
    if not found or all(recipe.model[name] for name in SHOPWORLD):
        return recipe
    resolved: Any = ConfigDict(recipe.to_dict())
    for name, length in found.items():
        resolved.model[name] = resolved.model[name] or length
    return resolved.lock()


def _instruction(recipe: Recipe) -> Recipe:
    """The recipe with the instruction's text in place of its file."""
    given = recipe.chain.instruction
    if "\n" in given or not given.endswith((".jinja", ".jinja2", ".j2", ".txt", ".md")):
        return recipe
    resolved: Any = ConfigDict(recipe.to_dict())
    resolved.chain.instruction = Path(given).read_text(encoding="utf-8")
    return resolved.lock()


def _with_labels(recipe: Recipe, labels: str) -> Recipe:
    resolved: Any = ConfigDict(recipe.to_dict())
    resolved.data.labels = labels
    return resolved.lock()


def _stored(recipe: Recipe, workdir: Path) -> str | None:
    """The set that a run has begun with, if its pairs are those of the recipe or were moved."""
    if not any((workdir / name).exists() for name in ARTIFACTS):
        return None
    if not (workdir / "config.json").is_file():
        return None
    data = read_recipe(workdir).get("data", {})
    there = [key for key in ("path", "products") if Path(recipe.data[key]).exists()]
    same = all(data.get(key) == recipe.data[key] for key in ("name", "columns", *there))
    return data.get("labels") or None if same else None


def _read(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"data.labels={path} is not UTF-8: {error}") from error
    labels = "\n".join(" ".join(line.split()) for line in lines if line.strip())
    if ":" not in labels:
        raise UserError(f"data.labels={path}: expected a line 'value: meaning' for each label")
    return labels
