"""Pages of rollouts, the table of before and after, and files written whole."""

import json

import numpy as np
import pytest
from rich.console import Console

from she_jax.cot import CotSchema
from she_jax.evaluation.report import before_after_table
from she_jax.rollouts.batch import RolloutBatch
from she_jax.rollouts.page import write_rollouts
from she_jax.rollouts.records import PageParts
from she_jax.training import files
from she_jax.training.files import write_json, write_text
from she_jax.types import Example, StepBatch, TrainBatch

SCHEMA = CotSchema()
GOOD = "query: shoes\nproduct: boots\ncategory: shoes / boots => near\nattributes: met\nlabel: 3"


def page_of(path, texts, query="shoes", unknown=(), groups=1, prm=None):
    """The page of some rollouts, the same number for each group."""
    example = Example(
        uid="u1", query=query, product={"title": "Boots"}, label=3, steps={"category": "near"}
    )
    rows = len(texts)
    chains = [SCHEMA.parse(text) for text in texts]
    known = np.array([[step is not None for step in chain.steps] for chain in chains])
    known[:, list(unknown)] = False
    by_verifier = np.zeros((rows, 5), bool)
    by_verifier[:, 2] = True  # the category
    steps = StepBatch(
        step_ids=np.tile([-1, 0, 0, 2, -1, -1], (rows, 1)),
        step_mask=known,
        verifier=np.ones((rows, 5), np.float32),
        verifier_known=by_verifier,
        model_score=np.full((rows, 5), 0.25, np.float32),
        model_known=known,
        outcome=np.zeros(rows, np.float32),
    )
    by_token = np.tile([0, 0.5, 0.5, -1, 0.25, 0], (rows, 1)).astype(np.float32)
    batch = TrainBatch(  # a token of the prompt, four that were sampled, one of padding
        tokens=np.tile([9, 1, 2, 3, 4, 0], (rows, 1)),
        positions=np.tile([0, 1, 2, 3, 4, -1], (rows, 1)),
        loss_weights=by_token,
        advantages=by_token,
        old_logps=by_token,
    )
    rollouts = RolloutBatch(
        batch=batch,
        metrics={},
        examples=[example] * groups,
        texts=texts,
        chains=chains,
        steps=steps,
        outcome=np.arange(rows) / rows,
        rewards=np.full((rows, 5), 0.5),
        known=known,
        advantages=np.linspace(-1, 1, rows * 5).reshape(rows, 5),
        informative=np.ones(groups, bool),
    )
    parts = PageParts(
        schema=SCHEMA,
        pieces=lambda ids: [f"<{n}>" for n in ids],
        grpo=lambda outcome: outcome - 1,
        prm=prm,
    )
    write_rollouts(path, 40, rollouts, parts)
    return path.read_text(encoding="utf-8")


def test_a_page_shows_the_pair_and_each_step(tmp_path):
    page = page_of(tmp_path / "samples" / "step_000040.md", [GOOD, "label: 2"])
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


def test_a_step_without_a_reward_shows_the_advantage_of_the_outcome(tmp_path):
    lines = page_of(tmp_path / "page.md", [GOOD], unknown=[1]).splitlines()
    assert "         -     -0.500  -            product: boots" in lines
    assert "      0.50     +0.000  near         category: shoes / boots" in lines


def test_a_page_shows_the_first_groups(tmp_path):
    """Of three groups of two rollouts, the first two, and each with its own rollouts."""
    texts = [GOOD.replace("boots", f"boot{n}") for n in range(6)]
    page = page_of(tmp_path / "page.md", texts, groups=3)
    assert [f"product: boot{n}" in page for n in range(6)] == [True] * 4 + [False] * 2
    titles = [line for line in page.splitlines() if line.startswith("###")]
    assert titles == [
        "### Rollout 1.1: outcome reward 0.00",
        "### Rollout 1.2: outcome reward 0.17",
        "### Rollout 2.1: outcome reward 0.33",
        "### Rollout 2.2: outcome reward 0.50",
    ]


def test_the_same_is_kept_token_by_token_beside_the_page(tmp_path):
    page_of(tmp_path / "step_000040.md", [GOOD, "label: 2"], unknown=[1])
    record = json.loads((tmp_path / "step_000040.json").read_text())
    (group,) = record["groups"]
    assert (record["step"], group["uid"], group["truth"]) == (40, "u1", {"category": "near"})
    first, second = group["rollouts"]
    assert (first["grpo"], second["grpo"], second["outcome"]) == (-1.0, -0.5, 0.5)
    assert first["tokens"] == ["<1>", "<2>", "<3>", "<4>"]
    assert first["token_steps"] == [0, 0, 2, -1]
    assert first["token_advantages"] == [0.5, 0.5, -1.0, 0.25]
    assert [step["sources"] for step in first["steps"][:3]] == [
        {"process reward model": 0.25}, {}, {"verifier": 1.0, "process reward model": 0.25},
    ]  # fmt: skip
    assert (first["steps"][1]["reward"], first["steps"][2]["reward"]) == (None, 0.5)
    assert (second["steps"][0]["written"], second["steps"][0]["sources"]) == (False, {})


class Critic:
    """A process reward model whose critique names the step, with what must not act on a page."""

    def critiques(self, step_queries):
        return [f"{query.step} of row {query.chain}\n# so be it" for query in step_queries]


def test_the_critique_of_a_reward_model_is_below_its_step(tmp_path):
    texts = ["query: shoes\nlabel: 2", "label: 3", "label: 4"]
    lines = page_of(tmp_path / "page.md", texts, unknown=[0], groups=3, prm=Critic()).splitlines()
    for step, critique in (
        ("query: shoes", "unknown query of row 0\\n# so be it"),
        ("label:", "0.25 label of row 0\\n# so be it"),
    ):
        row = next(n for n, line in enumerate(lines) if line.endswith(f"  {step}"))
        assert lines[row + 1] == f"{'reward model:':>32}  {critique}"
    assert sum("reward model:" in line for line in lines) == 3  # two groups, of three


HOSTILE = [
    "label: 4\n```\n# Heading\n<script>alert(1)</script>\n```",
    "query: \x1b[31mred\u202e gnp.exe\x00 \u200b\u2028# new\nlabel: 1\r# x\x0c# y\x85# z",
    "query: \ud800 lone surrogate\n</code></pre><img src=x onerror=alert(1)>\n\n\n# after blanks",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_model_cannot_act_on_the_page(tmp_path, text):
    """Every line but the page's headings is code (four spaces), without invisible characters."""
    page = page_of(tmp_path / "page.md", [text], query=text)
    for line in page.splitlines():
        heading = line.startswith(("# Rollouts of", "## Group", "### Rollout"))
        assert line == "" or heading or line.startswith("    "), line
    assert not [c for c in page if c != "\n" and (ord(c) < 32 or c in "\x7f\x85\u202e\u200b\u2028")]


def test_long_text_is_cut_and_says_so(tmp_path):
    page = page_of(tmp_path / "page.md", ["label: " + "x" * 100_000])
    assert len(page) < 5_000
    assert "characters)" in page


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
        ["F1 of class 1", "0.100", "0.300", "+0.200"],
        ["F1 of class 2", "-", "0.200", "-"],
        ["step category", "0.250", "0.250", "+0.000"],
        ["pairs", "2000", "2000", ""],
    ):
        assert row in rows, rows
    assert not any("good F1" in row for row in rows)  # nothing is known of it


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

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
