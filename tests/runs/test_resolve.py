"""What a recipe leaves to the pairs: the label set, read once and kept."""

import pytest
from recipes import config

from she_jax.runs.config import parse, plain
from she_jax.runs.resolve import resolve
from she_jax.training.workdir import claim_workdir
from she_jax.types import UserError


def write(path, labels):
    rows = "".join(f"q{n},Mug,{label}\n" for n, label in enumerate(labels))
    path.write_text(f"query,title,label\n{rows}")


def test_a_run_keeps_the_labels_that_it_began_with(tmp_path):
    pairs, workdir = tmp_path / "pairs.csv", tmp_path / "run"
    write(pairs, ["no", "yes"])
    recipe = config(data__name="table", data__path=str(pairs), data__labels="binary")
    resolved = resolve(recipe, workdir)
    assert resolved.data.labels == "no: not relevant\nyes: relevant"
    assert parse(resolved, workdir).schema.labels.values == ("no", "yes")
    claim_workdir(workdir, plain(resolved))
    write(pairs, ["false", "true"])
    assert resolve(recipe, workdir).data.labels.startswith("false")  # nothing depends on it yet
    (workdir / "checkpoints").mkdir()
    pairs.unlink()
    assert plain(resolve(recipe, workdir)) == plain(resolved)


def test_a_file_with_meanings_is_read(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("0: wrong  product\n\n1: fits\n2: perfect\n")
    recipe = config(data__labels=str(path))
    assert resolve(recipe, tmp_path / "run").data.labels == "0: wrong product\n1: fits\n2: perfect"
    path.write_text("0,1")
    with pytest.raises(UserError, match="expected a line 'value: meaning' for each label"):
        resolve(recipe, tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        resolve(config(data__labels=str(tmp_path / "none.txt")), tmp_path / "run")


def test_labels_that_say_nothing_stop_the_run_and_given_ones_stay(tmp_path):
    write(tmp_path / "pairs.csv", [0, 1, 2, 3])
    options = {"data__name": "table", "data__path": str(tmp_path / "pairs.csv")}
    with pytest.raises(UserError, match=r"--config\.data\.labels=0-3"):
        resolve(config(**options), tmp_path / "run")
    for given in (config(**options, data__labels="0-3"), config(**options, kind="evaluate")):
        assert resolve(given, tmp_path / "run") is given


@pytest.mark.parametrize(("name", "balance"), [("table", True), ("shopworld", False)])
def test_real_labels_are_drawn_in_equal_shares_if_nobody_says(tmp_path, name, balance):
    (tmp_path / "pairs.csv").touch()
    path = str(tmp_path / "pairs.csv") if name == "table" else ""
    recipe = config(data__name=name, data__path=path)
    assert parse(recipe, tmp_path).balance is balance
    for given in (True, False):
        changed = config(data__name=name, data__path=path, data__balance=given)
        assert parse(changed, tmp_path).balance is given
