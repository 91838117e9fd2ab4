"""The page of a run, from files written by hand: what it shows, what it leaves out, its safety."""

import html
import json
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import HOSTILE, Page

from she_jax.cot import CotSchema
from she_jax.evaluation.chains import compare_chains, write_chains
from she_jax.runs.curves import MOST_POINTS, draw_charts, ticks
from she_jax.runs.report import write_report
from she_jax.runs.scalars import CHARTS, TIMES, charts_of, meaning
from she_jax.training.files import read_json_lines
from she_jax.types import Example

SCHEMA = CotSchema()
GOOD = "query: mug\nproduct: cup\ncategory: match\nattributes: met\nlabel: 4"
RECIPE = {
    "kind": "train",
    "schema": 2,
    "seed": 3,
    "method": "rl",
    "init_from": "",
    "model": {"name": "scratch"},
    "data": {"name": "table"},
    "sft": {"steps": 20},
    "rl": {"steps": 2, "estimator": "dr_grpo"},
}
BEFORE = {"macro_f1": 0.4, "accuracy": 0.5, "parse_rate": 1.0, "n": 5}
AFTER = BEFORE | {"macro_f1": 0.75, "checkpoint": 2, "sampled_tokens": 12_345, "before": BEFORE}


def pairs(count, **fields):
    fields = {"query": "mug", "product": {"title": "cup"}, "label": 4} | fields
    return [Example(uid=f"u{n}", steps={"category": "match"}, **fields) for n in range(count)]


def chains_file(path, texts, **fields):
    chains = [SCHEMA.parse(text) for text in texts]
    write_chains(path, pairs(len(texts), **fields), chains, texts, SCHEMA)


def rollout(text, outcome, advantages):
    step = {"written": True, "text": "", "verdict": None, "reward": None, "sources": {}}
    steps = [
        step | {"name": "category", "advantage": advantages[0], "critique": f"see {text}"},
        step | {"name": "label", "written": False, "advantage": None, "critique": ""},
    ]
    steps[0] |= {"verdict": "near", "reward": 0.25, "sources": {"process reward model": 0.25}}
    return {
        "outcome": outcome, "grpo": 0.8, "well_formed": True, "text": text, "steps": steps,
        "tokens": [text, "near", ""], "token_steps": [0, 0, -1], "token_advantages": advantages,
    }  # fmt: skip


def run_folder(folder, rows=(), summary=AFTER, chains=None, rollouts=None, text="mug"):
    """A finished run's folder, with the page written."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(RECIPE))
    (folder / "summary.json").write_text(json.dumps(summary))
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for when, texts in (chains or {}).items():
        chains_file(folder / "eval" / f"chains_{when}.jsonl", texts, query=text)
    for step, group in (rollouts or {}).items():
        pair = {"uid": "u0", "query": text, "product": {"title": text}, "label": 4}
        record = {"step": step, "groups": [pair | {"truth": {"category": text}, "rollouts": group}]}
        (folder / "samples" / f"step_{step:06d}.json").write_text(json.dumps(record))
    write_report(folder)
    return Page(folder / "report.html")


def row(phase, step, **values):
    return {"phase": phase, "step": step} | {k.replace("__", "/"): v for k, v in values.items()}


def words_of(page):
    """The words of a page, a space for every tag."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", page.source)).split())


def titles(page):
    return [a["aria-label"].removeprefix("Chart: ") for tag, a in page.tags if tag == "svg"]


def test_a_page_begins_with_the_results_the_floor_and_a_warning(tmp_path):
    page = run_folder(tmp_path / "mugs", summary=AFTER | {"floor": {"macro_f1": 0.8}})
    words = words_of(page)
    for part in (
        "Report of mugs",
        "a cold start of 20 updates; up to 2 updates of DR GRPO",
        "after update 2; 12,345 tokens sampled.",
        "below the floor: macro F1 0.750, where a regression on word overlap has 0.800",
        "0.400 → 0.750 macro F1",
        "macro F1 0.800 0.400 0.750 +0.350",
    ):
        assert part in words, part
    for absent in (
        "Every scalar",
        "Learning curves",
        "Before and after on",
        "Rollouts, token",
        "<svg",
    ):
        assert absent not in page.source


def test_charts_without_anything_to_show_are_left_out(tmp_path):
    rows = [row("sft", step, loss=1.0 / step, cut_prompts=0, grad_norm=None) for step in (1, 2)]
    rows += [row("eval", step, validation__macro_f1=0.5) for step in (0, 2)]
    rows += [row("rl", 1, reward=0.1, reward__label=0.0, time__step=3.0, mystery=1.0)]
    page = run_folder(tmp_path / "run", rows)
    assert titles(page) == ["Labels on validation", "Reward of the rollouts", "Loss"]
    words = words_of(page)
    assert "loss 1 → 0.5" in words
    assert "nan" not in words
    for name in ("cut_prompts", "time/step", "reward/label"):  # all are in the legend
        assert f"{name} ({'sft' if name == 'cut_prompts' else 'rl'}) {meaning(name)}" in words
    assert "mystery (rl) unknown" in words


def test_the_pairs_that_training_changed_are_shown_by_what_it_did_to_them(tmp_path):
    wrong, near = GOOD.replace("label: 4", "label: 3"), GOOD.replace("match", "near")
    before = [GOOD, wrong, GOOD, wrong, "no chain"]
    after = [GOOD, GOOD, near, GOOD, wrong]
    for when, texts in (("before", before), ("after", after)):
        chains_file(tmp_path / when, texts)
    sides = [read_json_lines(tmp_path / when) for when in ("before", "after")]
    changed = compare_chains(*sides)
    uids = {kind: [new["uid"] for _, new in found] for kind, found in changed.items()}
    assert uids == {"gained": ["u1", "u3"], "lost": [], "other": ["u2", "u4"]}
    assert compare_chains(sides[1], sides[0])["lost"][0][0]["given"] == 4
    page = run_folder(tmp_path / "run", chains={"before": before, "after": after})
    words = words_of(page)
    for part in (
        "Of 5 pairs the label or a verdict changed in 4.",
        "The label became right 2 The label became wrong 0 Other changes 2",
        "category match ✓ match near ✗",
        "label 3 ✗ 4 4 ✓",
        "label none ✗ 4 3 ✗",
    ):
        assert part in words, part
    alone = run_folder(tmp_path / "alone", chains={"before": before})
    assert "Before and after on" not in alone.source


def test_of_a_label_that_nobody_knows_a_change_is_neither_good_nor_bad(tmp_path):
    for when, label in (("before", 4), ("after", 3)):
        chains_file(tmp_path / when, [GOOD.replace("4", str(label))], label=None)
    changed = compare_chains(*(read_json_lines(tmp_path / when) for when in ("before", "after")))
    assert {kind: len(found) for kind, found in changed.items()} == {
        "gained": 0, "lost": 0, "other": 1,
    }  # fmt: skip


def test_every_token_shows_its_advantage_beside_that_of_grpo(tmp_path):
    group = [rollout("cat", 1.0, [1.6, -0.4, 0.0]), rollout("dog", 1.0, [0.0, 0.0, 0.0])]
    group += [rollout("fox", 0.0, [0.0, 0.0, 0.0])] * 2
    page = run_folder(tmp_path / "run", rollouts={n: group for n in (1, 5, 10, 15, 20)})
    tokens = [attrs for tag, attrs in page.tags if tag == "i" and "style" in attrs]
    assert tokens[:3] == [
        {"class": "up", "style": "--a:1.00", "title": "+1.600, GRPO +0.800"},
        {"class": "down", "style": "--a:0.25", "title": "-0.400, GRPO +0.800"},
        {"class": "flat", "style": "--a:0.00", "title": "+0.000, GRPO +0.800"},
    ]
    assert len(tokens) == 3 * 4 * 3  # pages, rollouts, tokens
    assert {"class": "rollout gup", "style": "--g:0.50"} in [a for tag, a in page.tags if a]
    words = words_of(page)
    assert [f"Update {n} " in words for n in (1, 5, 10, 15, 20)] == [True, False, True, False, True]
    assert "2 more pages are in samples/" in words
    fact = "category near · reward 0.25 (process reward model 0.25) · advantage +1.60 (GRPO +0.80)"
    assert f"outcome reward 1.00 {fact} cat near reward model: see cat" in words
    assert "label missing · reward unknown · advantage - (GRPO +0.80) outside every step ·" in words
    shown, folded = words.partition("2 more of its rollouts")[::2]
    assert ("see fox" in shown, "see dog" in shown) == (True, False)  # those that differ go first
    assert "see dog" in folded


TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "h4", "p", "div", "b"}
TAGS |= {
    "br",
    "table",
    "tr",
    "th",
    "td",
    "article",
    "code",
    "bdi",
    "details",
    "summary",
    "pre",
    "i",
}
TAGS |= {"span", "figure", "figcaption", "svg", "path", "text", "g", "polyline", "circle"}


def test_texts_of_data_and_model_are_escaped_on_the_page(tmp_path):
    group = [rollout(HOSTILE, 1.0, [1.0, -1.0, 0.0])]
    wrong = GOOD.replace("label: 4", f"label: 3\n</pre>{HOSTILE}")
    page = run_folder(
        tmp_path / "run",
        [{"phase": "rl", "step": 1, f"reward/{HOSTILE.replace('/', '')}": 1.0}],
        chains={"before": [wrong], "after": [GOOD]},
        rollouts={1: group},
        text=HOSTILE,
    )
    assert {tag for tag, _ in page.tags} <= TAGS
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
    assert all(unicodedata.category(c) not in ("Cf", "Cs", "Cc") or c == "\n" for c in page.source)
    shown = (
        "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;\\u202edesrever\\u2066\\x00"
    )
    # Changed pair and its chain; query, product, truth, critique and token of the rollouts.
    assert page.text.count(shown) == 7
    assert page.text.count(shown.replace("/", "")) == 4  # the curve, its point, its key, the legend
    again = (tmp_path / "run" / "report.html").read_bytes()
    write_report(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_bytes() == again


def test_long_curves_are_means_of_several_updates_and_are_drawn_to_their_end(tmp_path):
    rows = [row("sft", n + 1, loss=float(n % 2)) for n in range(2 * MOST_POINTS)]
    page = run_folder(tmp_path / "run", rows)
    (line,) = (attrs["points"] for tag, attrs in page.tags if tag == "polyline")
    assert len(line.split()) == MOST_POINTS
    assert "loss 0.5 → 0.5 (a point: the mean of 2 updates)" in words_of(page)


def test_a_step_has_one_color_in_all_charts():
    rows = [row("eval", 0, validation__step__category=0.5)]
    rows += [row("rl", 1, reward=1, reward__query=1, reward__category=1, credit__category=1)]
    charts = draw_charts(rows, ["rl", "eval"])
    colors = {}
    for chart in (chart for phase in charts.values() for chart in phase):
        for line in chart.lines:
            colors.setdefault(line.name.rpartition("/")[2], set()).add(line.color)
    assert len(colors["category"]) == 1
    assert not colors["category"] & (colors["query"] | colors["reward"])


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low, width):
    places = ticks(low, low + width)
    assert 2 <= len(places) <= 7
    assert low - 1e-6 * width <= places[0] + 1e-9 * abs(low)
    assert places[-1] <= low + width + 1e-6 * width + 1e-9 * abs(low)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("prm/queries", "different questions"),  # not the score of a step of that name
        ("prm/category", "mean score of this step"),
        ("validation/step/check_1", "share of correct verdicts"),
        ("reward/", ""),
        ("mystery/category", ""),
    ],
)
def test_a_scalar_goes_by_its_name_or_by_its_step(name, words):
    assert words in meaning(name)
    assert bool(meaning(name)) == bool(words)


def test_every_scalar_is_in_one_chart():
    names = [name for group in CHARTS.values() for name in group]
    assert len(set(names)) == len(names)
    assert not set(names) & set(TIMES)
    drawn = charts_of([name.replace("<step>", "label") for name in names])
    assert [len(group) for group in drawn.values()] == [len(group) for group in CHARTS.values()]
