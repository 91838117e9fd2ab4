"""The console script: what its commands run, what they refuse, what the help says."""

from pathlib import Path

import pytest

from she_jax.recipes import base
from she_jax.runs import command
from she_jax.runs.launch import recipe_items


@pytest.fixture
def run(monkeypatch):
    """Runs a command line up to the launch of a recipe; returns the recipe's command line."""
    launched = []
    monkeypatch.setattr(command, "launch", lambda argv, others: launched.append(argv))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["she-jax", *arguments])
        command.run_command()
        (argv,) = launched
        return [argument.replace(f"{command.RECIPES}/", "") for argument in argv[1:]]

    return run


@pytest.mark.parametrize(
    ("arguments", "launched"),
    [
        ("train stage1", "--config=stage1.py"),
        ("train stage1:model=smollm2 --workdir w --config.seed 3",
         "--config=stage1.py:model=smollm2 --workdir=w --config.seed 3"),
        ("train my/recipe.py:a=b", "--config=my/recipe.py:a=b"),
        ("train my/pairs.jsonl --config.data.path=other.jsonl",
         "--config=stage1.py:data=table --config.data.path=my/pairs.jsonl --workdir=runs/pairs "
         "--config.data.path=other.jsonl"),
        ("check pairs.csv.gz --config.model.name=some/model",
         "--config=stage1.py:data=table,model=smollm2 --config.kind=check "
         "--config.data.path=pairs.csv.gz --workdir=runs/check-pairs "
         "--config.model.name=some/model"),
        ("predict pairs.jsonl --checkpoint=runs/a",
         "--config=evaluate.py --workdir=runs/predict-pairs --config.checkpoint=runs/a "
         "--config.data.name=table --config.data.path=pairs.jsonl"),
        ("evaluate pairs.jsonl --checkpoint=runs/a --workdir=w",
         "--config=evaluate.py --workdir=w --config.checkpoint=runs/a "
         "--config.data.name=table --config.data.path=pairs.jsonl"),
        ("filter --checkpoint=runs/a --workdir=w",
         "--config=filter.py --config.checkpoint=runs/a --workdir=w"),
        ("annotate runs/a --pairs=50",
         "--config=annotate.py --workdir=runs/a/annotate --config.checkpoint=runs/a "
         "--config.annotate.pairs=50"),
        ("annotate runs/a --table=new.csv --samples 4 --workdir=w --config.phase=sft",
         "--config=annotate.py --workdir=w --config.checkpoint=runs/a "
         "--config.annotate.samples=4 --config.data.name=table --config.data.path=new.csv "
         "--config.phase=sft"),
    ],
)  # fmt: skip
def test_a_command_is_a_recipe_and_its_flags(run, arguments, launched):
    assert run(*arguments.split()) == launched.split()


@pytest.mark.parametrize(
    ("reader", "files"),
    [
        ("esci", ["shopping_queries_dataset_examples.parquet"]),
        ("wands", ["query.csv", "product.csv", "label.csv"]),
        ("table", ["query.csv", "part-0.csv"]),
    ],
)
def test_a_folder_of_pairs_is_known_by_its_files(run, tmp_path, monkeypatch, reader, files):
    monkeypatch.chdir(tmp_path)
    for name in files:
        Path(name).touch()
    expected = (
        f"--config=stage1.py:data={reader} --config.data.path=. --workdir=runs/{tmp_path.name}"
    )
    assert run("train", ".") == expected.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("tran stage1", "invalid choice: 'tran' (choose from"),
        ("train", "required: RECIPE_OR_TABLE; see she-jax train --help"),
        ("train stge2", "stge2: neither a recipe's name or file (.py) nor a table"),
        ("train pairs.xls", "the recipes are annotate, curriculum"),
        ("predict pairs.jsonl", "required: --checkpoint"),
        ("filter", "required: --checkpoint"),
        ("annotate", "required: RUN; see she-jax annotate --help"),
        ("annotate a --import b --config.seed=1", "unexpected arguments ['--config.seed=1']"),
        ("export --checkpoint=a --config.seed=1", "unexpected arguments ['--config.seed=1']"),
    ],
)
def test_a_wrong_command_is_a_line_and_code_2(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments.split())
    assert error.value.code == 2
    written = capsys.readouterr().err
    assert message in written
    assert written.count("\n") == 1


def test_a_folder_without_a_run_is_not_exported(run, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        run("export", f"--workdir={tmp_path}")
    assert error.value.code == 1
    assert capsys.readouterr().err == (
        f"she-jax: {tmp_path}: there is no run; expected the folder of a policy's run\n"
    )


def test_annotations_are_imported_from_several_files(run, monkeypatch):
    imported = []
    module = "she_jax.runs.annotate_import.import_annotations"
    monkeypatch.setattr(module, lambda *given, **options: imported.append((given, options)))
    for line in (
        "--import a.jsonl b.json",
        "--import=a.jsonl b.json",
        "--import=a.jsonl --import=b.json",
    ):
        with pytest.raises(ValueError, match="not enough values"):  # nothing is launched
            run("annotate", "runs/a", *line.split())
    files = [Path("a.jsonl"), Path("b.json")]
    assert imported == [((Path("runs/a/annotate"), files), {"whole": False})] * 3


def test_the_help_lists_every_recipe_and_keys_that_exist(run, capsys):
    with pytest.raises(SystemExit) as error:
        run("train", "--help")
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert {path.stem for path in command.recipe_files()} >= {"stage1", "reward_model"}
    for path in command.recipe_files():
        assert f"\n  {path.stem} " in text
    assert recipe_items(base.get_config()).keys() >= command.KEYS.keys()
