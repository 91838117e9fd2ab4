"""The console script: ``she-jax train|check|evaluate|predict|filter|annotate|export``.

Each command becomes a recipe and its flags, which ``she_jax.runs.launch`` runs; so does
``launch.py`` in a checkout. Exit codes are those of ``she_jax.runs.launch``.
"""

import argparse
import ast
import difflib
import os
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from she_jax import __version__
from she_jax.recipes import renamed
from she_jax.runs.launch import exit_in_a_line, exit_with, launch

RECIPES = Path(renamed.__file__).parent  # in a checkout configs/
NO_RECIPES = ("__init__", "base", "renamed")
HELP = {"-h", "-help", "--help"}

TABLE = re.compile(r"\.(csv|tsv|tab|txt|parquet|pq|jsonl|ndjson|json)(\.gz)?$")

# What a first run changes; configs/base.py has every key.
KEYS = {
    "data.name": "shopworld, esci, wands, table, trec, prepared, or a class of your own",
    "data.path": "the file or folder of the pairs",
    "data.products": "a table of products, which docid finds",
    "data.columns": "label=rating,title=name,...: which column is what",
    "data.labels": "0-3, binary, poor,fair,good, ...: worst to best",
    "data.good": "the labels that count as relevant, such as 2,3; else the upper half",
    "model.name": "scratch, smollm2, a Hugging Face directory, a .gguf file, or ORGANIZATION/MODEL",
    "model.prompt_length": "tokens of query and product, as model.completion_length of the chain",
    "model.dtype": "float32, or bfloat16 on an accelerator",
    "seed": "of parameters, data order and sampling",
    "sft.steps": "updates of the cold start",
    "init_from": "RUN/checkpoints/sft of another run, in place of a cold start",
    "method": "rl, or sft or dpo on chains that are sampled once",
    "rl.steps": "updates after the cold start",
    "rl.estimator": "srpo, grpo, rloo, ... or a function of your own, module:name",
    "chain.steps": "a chain of other steps, each as its line: name: what to write => yes|no",
    "reward.step": "rewards of your own for the steps, module:name",
    "reward.outcome": "a reward of your own for the whole chain, module:name",
    "filter.pairs": "how many training pairs to measure and filter before RL",
    "reward.prm": "the run of a process reward model",
    "export": "true: also write a Hugging Face directory, RUN/export",
    "cpu_devices": "parts that the CPU is split into where there is no accelerator",
}

EXAMPLES = """\
examples:
  she-jax train stage1
  she-jax train stage1 --config.rl.estimator=grpo --config.rl.steps=40 --workdir=runs/grpo
  she-jax check judgments.csv --config.data.products=products.csv --config.data.labels=0-3
  she-jax train judgments.csv --config.data.products=products.csv --config.data.labels=0-3
  she-jax train pairs.jsonl --config.model.name=smollm2
  she-jax predict pairs.jsonl --checkpoint=runs/stage1
  she-jax train reward_model --config.checkpoint=runs/stage1
  she-jax annotate runs/stage1 --pairs=100
  she-jax annotate runs/stage1 --import annotated-by-ann.jsonl
  she-jax export --checkpoint=runs/stage1
"""


def run_command() -> None:
    """Runs the command of ``sys.argv``."""
    options, flags = _parser().parse_known_args()
    options.run(options, flags)


def help_text() -> str:
    """The recipes, a line each, and the keys that matter."""
    recipes = {path.stem: _first_line(path) for path in recipe_files()}
    keys = {f"--config.{key}": meaning for key, meaning in KEYS.items()}
    base = RECIPES / "base.py"
    return f"recipes:\n{_columns(recipes)}\n\nkeys that matter (all: {base}):\n{_columns(keys)}\n"


def recipe_files() -> list[Path]:
    """The files of the recipes, by name."""
    return sorted(path for path in RECIPES.glob("*.py") if path.stem not in NO_RECIPES)


def find_recipe(target: str) -> str:
    """The file of a recipe with its argument, ``DIR/stage1.py:model=smollm2``.

    Args:
      target: a recipe's name (``stage1:model=smollm2``) or its path (``my/recipe.py``).

    Raises:
      ValueError: if there is no recipe of that name.
    """
    name, colon, argument = target.partition(":")
    if name.endswith(".py"):
        return target
    names = [path.stem for path in recipe_files()]
    if name in names:
        return f"{RECIPES / name}.py{colon}{argument}"
    near = difflib.get_close_matches(name, names, n=1)
    raise ValueError(
        f"{target}: neither a recipe's name or file (.py) nor a table (.csv, .tsv, .parquet, "
        f".jsonl, also .gz) nor a folder; "
        + (f"the nearest recipe is {near[0]}" if near else f"the recipes are {', '.join(names)}")
    )


def pairs_reader(target: str) -> str | None:
    """The ``data.name`` for a table, a folder of its parts, or ESCI's or WANDS's folder.

    Args:
      target: a path; what is no path, such as a recipe's name, gives None.
    """
    if TABLE.search(target):
        return "table"
    if not (folder := Path(target)).is_dir():
        return None
    if (folder / "shopping_queries_dataset_examples.parquet").exists():
        return "esci"
    wands = all((folder / f"{name}.csv").exists() for name in ("query", "product", "label"))
    return "wands" if wands else "table"


def recipe_for(reader: str, flags: Sequence[str]) -> str:
    """The recipe for pairs, with the sizes and rates of a pretrained model if one is named."""
    option = "--config.model.name"  # its value behind = or as the next argument
    models = [flag.partition("=")[2] for flag in flags if flag.startswith(f"{option}=")]
    models += [value for flag, value in pairwise(flags) if flag == option]
    pretrained = ",model=smollm2" if models and models[-1] != "scratch" else ""
    return f"stage1:data={reader}{pretrained}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="she-jax",
        description="Train a language model to judge, step by step, whether a product answers a "
        "shopper's query. Every command but export takes any --config.KEY=VALUE.",
        epilog=f"{help_text()}\n{EXAMPLES}",
    )
    parser.add_argument("--version", action="version", version=f"she_jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace, list[str]], None], about: str):
        epilog = parser.epilog if name == "train" else None
        command = commands.add_parser(name, help=about, description=about, epilog=epilog)
        command.set_defaults(run=run, command=name)
        return command

    for name, about in (
        ("train", "run a recipe, or the recipe for a table of pairs"),
        ("check", "look at the pairs of a recipe or a table before anything is trained"),
    ):
        command = add(name, _train, about)
        command.add_argument(
            "target", metavar="RECIPE_OR_TABLE", help="a recipe, a table, or a folder"
        )
        command.add_argument("--workdir", metavar="DIR", help="the run's folder, or runs/NAME")
        if name == "check":
            about = "also run two updates of each phase, and say how long all would take"
            command.add_argument("--time", action="store_true", help=about)
    for name, about in (
        ("evaluate", "a checkpoint's metrics on a table with labels, and its predictions"),
        ("predict", "a checkpoint's predictions for a table, with or without labels"),
    ):
        command = add(name, _predict, about)
        command.add_argument("table", metavar="TABLE")
        command.add_argument("--checkpoint", metavar="DIR", required=True, help="a run, or a model")
        command.add_argument("--workdir", metavar="DIR", help=f"runs/{name}-TABLE if not given")
    command = add(
        "filter", _filter, "choose the training pairs of a run that are worth training on"
    )
    command.add_argument("--checkpoint", metavar="DIR", required=True, help="the policy's run")
    _add_annotate(add("annotate", _annotate, "choose pairs for people to annotate step by step"))
    command = add("export", _export, "write the best policy of a run as a Hugging Face directory")
    command.add_argument(
        "--checkpoint", "--workdir", dest="run_folder", metavar="DIR", required=True, help="the run"
    )
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="",
        help="of the weights; by default that of the model that the run began with",
    )
    return parser


def _add_annotate(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", metavar="RUN", help="a policy's run, or predictions")
    command.add_argument("--pairs", metavar="N", type=int, help="how many to choose (100)")
    command.add_argument("--table", metavar="FILE", help="choose from a table's pairs")
    command.add_argument("--samples", metavar="K", type=int, help="chains a pair that vote (8)")
    about = "where what is annotated is, or RUN/annotate"
    command.add_argument("--workdir", metavar="DIR", help=about)
    about = "merge what annotators saved: the page's files, Label Studio's JSON, TRL's format"
    command.add_argument(
        "--import", dest="files", metavar="FILE", nargs="+", action="extend", help=about
    )
    about = "with --import: also write all pairs of the run, these annotations among them"
    command.add_argument("--all", dest="whole", action="store_true", help=about)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=form, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        exit_with(f"{message}; see {self.prog} --help", 2)


def _train(options: argparse.Namespace, flags: list[str]) -> None:
    target, workdir, data = options.target, options.workdir, []
    stem = _stem(target)
    if options.command == "check":  # in a folder of its own: that of a run belongs to its recipe
        data = [f"--config.kind={'time' if options.time else 'check'}"]
        workdir = workdir or f"runs/check-{stem}"
    try:
        is_recipe = target.partition(":")[0] in [path.stem for path in recipe_files()]
        if not is_recipe and (reader := pairs_reader(target)):
            workdir = workdir or f"runs/{stem}"
            data = [*data, f"--config.data.path={target}"]
            target = recipe_for(reader, flags)
        recipe = find_recipe(target)
    except ValueError as error:
        exit_with(str(error), 2)
    folder = [f"--workdir={workdir}"] if workdir else []
    launch(["she-jax", f"--config={recipe}", *data, *folder, *flags], {})


def _predict(options: argparse.Namespace, flags: list[str]) -> None:
    table, stem = options.table, _stem(options.table)
    given = {
        "config": RECIPES / "evaluate.py",
        "workdir": options.workdir or f"runs/{options.command}-{stem}",
        "config.checkpoint": options.checkpoint,
        "config.data.name": pairs_reader(table) or "table",
        "config.data.path": table,
    }
    launch(["she-jax", *(f"--{name}={value}" for name, value in given.items()), *flags], {})


def _filter(options: argparse.Namespace, flags: list[str]) -> None:
    recipe = f"--config={RECIPES / 'filter.py'}"
    launch(["she-jax", recipe, f"--config.checkpoint={options.checkpoint}", *flags], {})


def _annotate(options: argparse.Namespace, flags: list[str]) -> None:
    folder = options.workdir or os.path.join(options.run_folder, "annotate")
    if options.files is not None:
        files = [*options.files, *(flag for flag in flags if flag[0] != "-")]
        if others := [flag for flag in flags if flag[0] == "-"]:
            exit_with(f"annotate --import: unexpected arguments {others}", 2)
        with exit_in_a_line(folder):
            from she_jax.runs.annotate_import import import_annotations

            import_annotations(Path(folder), [Path(file) for file in files], whole=options.whole)
        return
    given = {
        "config": RECIPES / "annotate.py",
        "workdir": folder,
        "config.checkpoint": options.run_folder,
        "config.annotate.pairs": options.pairs,
        "config.annotate.samples": options.samples,
        "config.data.name": options.table and (pairs_reader(options.table) or "table"),
        "config.data.path": options.table,
    }
    said = [f"--{name}={value}" for name, value in given.items() if value is not None]
    launch(["she-jax", *said, *flags], {})


def _export(options: argparse.Namespace, flags: list[str]) -> None:
    if flags:
        exit_with(f"export: unexpected arguments {flags}", 2)
    with exit_in_a_line(options.run_folder):
        from she_jax.runs.export import export_run

        print(f"exported: {export_run(Path(options.run_folder), options.dtype)}")


def _stem(target: str) -> str:
    """The name of a table or folder, for that of a run."""
    return re.sub(r"[^\w.]+", "-", TABLE.sub("", Path(os.path.abspath(target)).name)).strip("-")


def _first_line(recipe: Path) -> str:
    text = ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _columns(rows: dict[str, str]) -> str:
    width = max(map(len, rows)) + 2
    return "\n".join(f"  {name:{width}}{text}" for name, text in rows.items())
