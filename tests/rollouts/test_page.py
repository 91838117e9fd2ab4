"""Pages of rollouts, the table of before and after, and files written whole."""

import json

import ml_collections
import numpy as np
import pytest
from rich.console import Console

from she_jax.cot import CotSchema
from she_jax.evaluation.report import before_after_table
from she_jax.rollouts import page as report
from she_jax.rollouts.page import write_rollouts
from she_jax.training.files import write_json, write_text
from she_jax.training.workdir import claim_workdir
from she_jax.types import Example

SCHEMA = CotSchema()
GOOD = "query: shoes\nproduct: boots\ncategory: shoes / boots => near\nattributes: met\nlabel: 3"


def samples(path, texts, query="shoes", unknown=()):
    example = Example(
        uid="u1", query=query, product={"title": "Boots"}, label=3, steps={"category": "near"}
    )
    rows = len(texts)
    known = np.array([[c is not None for c in SCHEMA.parse(t).steps] for t in texts])
    known[:, list(unknown)] = False
    write_rollouts(
        path,
        step=40,
        schema=SCHEMA,
        examples=[example],
        texts=texts,
        chains=[SCHEMA.parse(text) for text in texts],
        rewards=np.full((rows, 5), 0.5),
        advantages=np.linspace(-1, 1, rows * 5).reshape(rows, 5),
        step_mask=known,
        outcomes=np.arange(rows) / rows,
    )
    return path.read_text(encoding="utf-8")


def test_a_page_shows_the_pair_and_each_step(tmp_path):
    page = samples(tmp_path / "samples" / "step_000040.md", [GOOD, "label: 2"])
    assert page.startswith("# Rollouts of step 40\n")
    for line in (
        "    query    shoes",
        "    product  title: Boots",
        "    gold     label: 3",
        "    gold     category: near",
        "### Rollout 1.1: outcome reward 0.00",
        "### Rollout 1.2: outcome reward 0.50",
        "      0.50     -1.000  -            query: shoes",
        "      0.50     -0.556  near         category: shoes / boots",
        "         -          -  missing      category:",
        "    not well-formed; as written:",
        "    | label: 2",
    ):
        assert line in page.splitlines(), line


def test_a_step_that_nobody_rewards_shows_the_advantage_that_the_outcome_gives_it(tmp_path):
    lines = samples(tmp_path / "page.md", [GOOD], unknown=[1]).splitlines()
    assert "         -     -0.500  -            product: boots" in lines
    assert "      0.50     +0.000  near         category: shoes / boots" in lines


HOSTILE = [
    "label: 4\n```\n# Heading\n<script>alert(1)</script>\n```",
    "query: \x1b[31mred\u202e gnp.exe\x00 \u200b\u2028# new\nlabel: 1\r# x\x0c# y\x85# z",
    "query: \ud800 lone surrogate\n</code></pre><img src=x onerror=alert(1)>\n\n\n# after blanks",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_writes_cannot_act_on_the_page(tmp_path, text):
    """Every line but our own headings is code (four spaces), and nothing unseen is left in."""
    page = samples(tmp_path / "page.md", [text], query=text)
    for line in page.splitlines():
        ours = line.startswith(("# Rollouts of", "## Group", "### Rollout"))
        assert line == "" or ours or line.startswith("    "), line
    assert not [c for c in page if c != "\n" and (ord(c) < 32 or c in "\x7f\x85\u202e\u200b\u2028")]


def test_long_text_is_cut_and_says_so(tmp_path):
    page = samples(tmp_path / "page.md", ["label: " + "x" * 100_000])
    assert len(page) < 5_000
    assert "characters)" in page


def test_rollouts_must_divide_among_examples(tmp_path):
    with pytest.raises(ValueError, match="0 chains for 1 examples"):
        write_rollouts(
            tmp_path / "x.md", step=1, schema=SCHEMA,
            examples=[Example(uid="u", query="q", product={"title": "t"})],
            texts=["label: 1"], chains=[], rewards=np.zeros((1, 5)), advantages=np.zeros((1, 5)),
            step_mask=np.zeros((1, 5), bool), outcomes=np.zeros(1),
        )  # fmt: skip


def test_before_after_table():
    before = {
        "macro_f1": 0.5, "accuracy": 0.6, "good_f1": None, "f1": {"1": 0.1, "2": None},
        "step_accuracy": {"category": 0.25}, "parse_rate": 1.0, "n": 2000,
    }  # fmt: skip
    after = {**before, "macro_f1": 0.75, "f1": {"1": 0.3, "2": 0.2}}
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(before_after_table(before, after))
    rows = [
        [c.strip() for c in line.split("│")[1:-1]] for line in console.export_text().splitlines()
    ]
    for row in (
        ["macro F1", "0.500", "0.750", "+0.250"],
        ["good F1", "-", "-", "-"],
        ["F1 of class 1", "0.100", "0.300", "+0.200"],
        ["F1 of class 2", "-", "0.200", "-"],
        ["step category", "0.250", "0.250", "+0.000"],
        ["pairs", "2000", "2000", ""],
    ):
        assert row in rows, rows


def test_json_holds_arrays_and_no_nan(tmp_path):
    write_json(
        tmp_path / "a" / "x.json", {1: np.arange(2), "f": np.float32(0.5), "t": (1, float("nan"))}
    )
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {
        "1": [0, 1], "f": 0.5, "t": [1, None],
    }  # fmt: skip


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"


def config(**changes):
    base = ml_collections.ConfigDict({"seed": 0, "optim": {"lr": 1e-3, "betas": (0.9, 0.99)}})
    base.update_from_flattened_dict(changes)
    return base


def test_a_workdir_is_claimed_once_and_known_again(tmp_path):
    claim_workdir(tmp_path / "run", config())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optim"]["betas"] == [
        0.9,
        0.99,
    ]
    (tmp_path / "run" / "metrics.jsonl").touch()
    claim_workdir(tmp_path / "run", config())


def test_a_changed_config_lists_every_key_that_differs(tmp_path):
    claim_workdir(tmp_path, config())
    (tmp_path / "checkpoints").mkdir()
    other = config(**{"seed": 1, "optim.lr": 2e-3})
    other.extra = {"flag": True}
    with pytest.raises(ValueError, match="another config") as error:
        claim_workdir(tmp_path, other)
    message = str(error.value)
    assert "seed: 0 in the workdir, 1 now" in message
    assert "optim.lr: 0.001 in the workdir, 0.002 now" in message
    assert "extra.flag: absent in the workdir, true now" in message
    assert "betas" not in message
    assert "--workdir" in message


def test_a_folder_in_which_nothing_was_made_takes_another_config(tmp_path):
    claim_workdir(tmp_path, config())
    claim_workdir(tmp_path, config(seed=1))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


def test_a_folder_of_other_files_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        claim_workdir(tmp_path, config())
    with pytest.raises(ValueError, match="is a file"):
        claim_workdir(tmp_path / "thesis.tex", config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_kill_while_claiming_and_a_spoilt_config(tmp_path):
    (tmp_path / "config.json.part").write_text('{"se')
    claim_workdir(tmp_path, config())
    (tmp_path / "config.json").write_text('{"se')
    with pytest.raises(ValueError, match="not JSON"):
        claim_workdir(tmp_path, config())
