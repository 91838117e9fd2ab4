"""The report of a filter: its numbers, plots and examples, and its safety."""

import json
import math
import unicodedata
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from recipes import HOSTILE, Page

from she_jax.filtering import page as filter_page
from she_jax.filtering import select as filtering
from she_jax.filtering.records import PromptRecord, write_records
from she_jax.filtering.report import write_filter_report
from she_jax.filtering.select import REASONS, FilterConfig, Quota, Selection

STEPS = ("category", "label")
NONE = (None, None)


def record(row, label="4", kind="plain", right=(), paths=None, rates=NONE, texts=None, **fields):
    fields = {"uid": f"u{row}", "query": "shoes", "title": "Boots", "confidence": 0.5} | fields
    return PromptRecord(
        row=row,
        label=label,
        kind=kind,
        right=tuple(map(bool, right)),
        paths=tuple(paths if paths is not None else "a" * len(right)),
        step_rates=rates,
        texts=tuple(texts if texts is not None else ["a b c"] * len(right)),
        embedding=np.zeros(2, np.float16),
        **fields,
    )


def report_of(folder, records, reasons, *, shards=1, quotas=(), duplicates=None, **config):
    """The report of some records and the reason of each, from shards in reversed order."""
    folder.mkdir(exist_ok=True)
    paths = []
    for k in range(shards):
        paths.insert(0, folder / f"{k}.parquet")
        write_records(paths[0], records[k::shards], STEPS)
    survey = filtering.merge([filtering.survey(path) for path in paths])
    codes = np.array([REASONS.index(name) for name in reasons], np.int8)
    selection = Selection(reason=codes, cluster=np.zeros(len(codes), np.int32), quotas=quotas)
    return write_filter_report(
        folder,
        survey=survey,
        selection=selection,
        config=FilterConfig(**config),
        step_names=STEPS,
        duplicates=None if duplicates is None else np.array(duplicates, np.int64),
        shards=paths,
    )


def strict_json(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} in report.json")

    text = (folder / "report.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


def by_hand():
    """Seven pairs whose metrics are computed by hand, and the reason of each."""
    abc, mixed = ["a b c"] * 4, ["a b c", "a b c", "d e f", "d e f"]
    return [
        record(0, right=(1, 1, 1, 1), texts=abc, rates=(1.0, None)),
        record(1, right=(1, 1, 0, 0), paths="aabb", texts=mixed, rates=(0.5, 0.5)),
        record(
            2,
            label="1",
            kind="negation",
            right=(0, 0, 0, 1),
            paths="abcc",
            texts=["a b c", "d e f", "g h i", "j k l"],
            rates=(None, 0.25),
        ),
        record(3, label="1", kind="negation", right=(0, 0, 0, 0), texts=abc, rates=(0.0, 0.0)),
        record(4, label="2", kind=""),
        record(5, label=None),
        record(7),
    ], ["easy", "kept", "kept", "hard", "confident", "unlabeled", "duplicate"]


def test_a_report_by_hand(tmp_path):
    quotas = (
        Quota(cell="class 4, plain, medium", wanted=3, available=1, kept=1),
        Quota(cell="class 1, negation, hard", wanted=1, available=1, kept=1),
    )
    records, reasons = by_hand()
    config = {"low": 0.1, "high": 0.9, "confidence": 0.7, "size": 4, "front": ("negation",)}
    report = report_of(tmp_path, records, reasons, quotas=quotas, duplicates=[7, 9], **config)
    assert report == strict_json(tmp_path)
    assert (report["pairs"], report["kept"], report["unrecorded_duplicates"]) == (8, 2, 1)
    assert report["measured"] == {"before": 4, "after": 2}
    assert report["by_reason"] == dict.fromkeys(REASONS, 0) | {
        "kept": 2,
        "duplicate": 2,
        "confident": 1,
        "unlabeled": 1,
        "easy": 1,
        "hard": 1,
    }
    none = dict.fromkeys(REASONS[1:], 0)
    assert report["by_class"] == {
        "1": {"kept": 1, "dropped": 1, "dropped_by_reason": none | {"hard": 1}},
        "2": {"kept": 0, "dropped": 1, "dropped_by_reason": none | {"confident": 1}},
        "4": {"kept": 1, "dropped": 2, "dropped_by_reason": none | {"easy": 1, "duplicate": 1}},
        "unknown": {"kept": 0, "dropped": 1, "dropped_by_reason": none | {"unlabeled": 1}},
    }
    assert list(report["by_class"]) == ["1", "2", "4", "unknown"]
    three = none | {"easy": 1, "unlabeled": 1, "duplicate": 1}
    assert report["by_kind"] == {
        "": {"kept": 0, "dropped": 1, "dropped_by_reason": none | {"confident": 1}},
        "negation": {"kept": 1, "dropped": 1, "dropped_by_reason": none | {"hard": 1}},
        "plain": {"kept": 1, "dropped": 3, "dropped_by_reason": three},
    }
    assert report["difficulty"] == {
        "easy": {"before": 1, "after": 0},
        "medium": {"before": 1, "after": 1},
        "hard": {"before": 2, "after": 1},
    }
    # Pass rates 1, 1/2, 1/4, 0; entropies 0, ln 2, 1.5 ln 2, 0; bigrams 2/8, 4/8, 8/8, 2/8.
    bit = math.log(2)
    assert report["pass_rate"] == {"before": 0.4375, "after": 0.375}
    assert report["path_entropy"] == pytest.approx({"before": 0.625 * bit, "after": 1.25 * bit})
    assert report["single_path"] == {"before": 0.5, "after": 0.0}
    assert report["distinct_2"] == {"before": 0.5, "after": 0.75}
    assert report["step_pass_rates"] == {
        "category": {"before": 0.5, "after": 0.5},
        "label": {"before": 0.25, "after": 0.375},
    }
    assert report["pass_rate_histogram"] == {
        "from": [0, 0.25, 0.5, 0.75, 1],
        "to": [0, 0.25, 0.5, 0.75, 1],
        "before": [1, 1, 1, 0, 1],
        "after": [0, 1, 1, 0, 0],
    }
    entropies = report["path_entropy_histogram"]  # of ln 4 nats at most: ln 2 is the sixth tenth
    assert entropies["before"] == [2, 0, 0, 0, 0, 1, 0, 1, 0, 0]
    assert entropies["after"] == [0, 0, 0, 0, 0, 1, 0, 1, 0, 0]
    assert entropies["to"][-1] == pytest.approx(2 * bit, abs=1e-6)
    assert report["quotas"] == 2
    assert report["unmet_quotas"] == [
        {"cell": "class 4, plain, medium", "wanted": 3, "available": 1, "kept": 1}
    ]
    assert report["thresholds"]["high"] == 0.9
    assert report["thresholds"]["front"] == ["negation"]


def test_pass_rates_of_different_numbers_of_rollouts_share_ten_bins(tmp_path):
    rates = [(7, 10), (3, 10), (1, 3), (5, 5), (0, 2)]
    records = [
        record(row, right=[1] * good + [0] * (n - good)) for row, (good, n) in enumerate(rates)
    ]
    report = report_of(tmp_path, records, ["kept"] * 4 + ["quota"])
    bins = report["pass_rate_histogram"]
    assert bins["from"] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert bins["to"][-1] == 1
    assert bins["before"] == [1, 0, 0, 2, 0, 0, 0, 1, 0, 1]
    assert bins["after"] == [0, 0, 0, 2, 0, 0, 0, 1, 0, 1]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    """For any split into shards, and for any settings of matplotlib."""
    records, reasons = by_hand()
    names = ("report.json", "report.html")
    report_of(tmp_path / "single", records, reasons, shards=1)
    first = [(tmp_path / "single" / name).read_bytes() for name in names]
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": None, "svg.fonttype": "none"}):
        report_of(tmp_path / "three", records, reasons, shards=3)
        assert matplotlib.rcParams["font.size"] == 20  # and they are unchanged
    assert [(tmp_path / "three" / name).read_bytes() for name in names] == first
    assert not list(tmp_path.glob("*/*.part"))


TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "b", "br"}
TAGS |= {"table", "tr", "th", "td", "img", "article", "code", "bdi", "details", "summary", "pre"}


def test_texts_of_data_and_model_are_escaped_on_the_page(tmp_path):
    clean = HOSTILE.replace("\ud800", "")  # which parquet cannot hold either
    hostile = record(
        0,
        kind=clean,
        right=(1, 0),
        paths=(clean, "b"),
        texts=(f"label: 4\n</pre>{clean}", f"</details>\r{clean}"),
        uid=clean,
        query=clean,
        title=clean,
    )
    quotas = (Quota(cell=f"class 4, {HOSTILE}", wanted=2, available=1, kept=1),)
    report_of(tmp_path, [hostile], ["kept"], quotas=quotas, front=(HOSTILE,))
    page = Page(tmp_path / "report.html")
    assert {tag for tag, _ in page.tags} <= TAGS
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert tag != "img" or attrs["src"].startswith("data:image/svg+xml;base64,")
    assert all(unicodedata.category(c) not in ("Cf", "Cs", "Cc") or c == "\n" for c in page.source)
    shown = (
        "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;\\u202edesrever\\u2066\\x00"
    )
    # Kind twice, query, title, uid, path, two texts; cell of a quota and kind in front.
    assert page.text.count(shown) == 10
    assert f"label: 4\n</pre>{shown}" in page.text
    assert "</details>\\r<script>" in page.text
    strict_json(tmp_path)


@pytest.mark.parametrize("kind", ["$\\frac{$", "\x00\x1b", "否定", "x" * 200, ""])
def test_plots_are_drawn_for_any_name_of_a_kind(tmp_path, kind):
    report_of(tmp_path, [record(0, kind=kind, right=(1, 0), paths="ab")], ["kept"])
    plots = Page(tmp_path / "report.html").plots
    assert list(plots) == [
        "Plot: What became of the 1 pairs",
        "Plot: Pass rates before and after the filter",
        "Plot: Path entropy before and after the filter",
        "Plot: Pairs by class",
        "Plot: Pairs by kind of query",
    ]
    for svg in plots.values():
        tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(svg).iter()}
        assert "path" in tags
        assert not tags & {"script", "image", "foreignObject", "a"}


def test_of_many_kinds_only_the_largest_are_shown(tmp_path):
    sizes = [2] * 12 + [1] * 30
    kinds = [f"kind {k:02}" for k, size in enumerate(sizes) for _ in range(size)]
    records = [record(row, kind=kind) for row, kind in enumerate(kinds)]
    report = report_of(tmp_path, records, ["kept"] * len(kinds))
    page = Page(tmp_path / "report.html")
    assert len(report["by_kind"]) == 42
    assert "Plot: Pairs by kind of query: the 12 largest of 42" in page.plots
    assert "kind 39" in page.text
    assert "2 smaller ones are in report.json" in page.text


def test_no_rollouts_and_nothing_kept(tmp_path):
    report = report_of(tmp_path, [record(0, label=None)], ["unlabeled"])
    assert strict_json(tmp_path) == report
    assert report["kept"] == 0
    for name in ("pass_rate", "path_entropy", "single_path", "distinct_2"):
        assert report[name] == {"before": None, "after": None}
    assert report["step_pass_rates"]["label"] == {"before": None, "after": None}
    assert sum(report["pass_rate_histogram"]["before"]) == 0
    page = Page(tmp_path / "report.html")
    assert "- → -" in page.text
    assert not any("Pass rates" in title for title in page.plots)
    assert "nan" not in page.text.lower()


@pytest.mark.parametrize(
    ("quotas", "words"),
    [
        ((), "No size was configured, so there were no quotas."),
        ((Quota(cell="all", wanted=1, available=1, kept=1),), "None: all 1 were met."),
        ((Quota(cell="class 3, question, hard", wanted=5, available=1, kept=1),), "class 3, ques"),
        ((Quota(cell="q", wanted=5, available=1, kept=1),) * 43, "3 more are in report.json."),
    ],
)
def test_quotas_that_could_not_be_met_are_listed(tmp_path, quotas, words):
    report_of(tmp_path, [record(0, right=(1, 0))], ["kept"], quotas=quotas)
    assert words in Page(tmp_path / "report.html").text


def test_examples_of_each_reason_are_few_and_spread_over_the_rows(tmp_path):
    reasons = [name for name in REASONS for _ in range(9)]
    records = [record(row, query=f"query {row};", right=(0, 1)) for row in range(len(reasons))]
    report_of(tmp_path, records, reasons, shards=2)
    text = Page(tmp_path / "report.html").text.partition("Examples")[2]
    for k, name in enumerate(REASONS):
        start = text.index(name.replace("_", " ").capitalize())
        shown = [n for n in range(9) if f"query {9 * k + n};" in text]
        assert shown == [1, 4, 7]
        assert text.index(f"query {9 * k + 1};") > start


def test_an_example_shows_two_rollouts_that_differ(tmp_path):
    texts = ("first try", "second try", "third try")
    pair = record(0, right=(0, 0, 1), paths="aba", texts=texts)
    report_of(tmp_path / "outcome", [pair], ["kept"])
    page = Page(tmp_path / "outcome" / "report.html").text
    assert "1 of 3 rollouts right" in page
    assert "2 × a, 1 × b" in page
    assert "wrongfirst tryrightthird try" in page
    assert "second try" not in page
    report_of(tmp_path / "path", [record(0, right=(0, 0, 0), paths="aab", texts=texts)], ["kept"])
    page = Page(tmp_path / "path" / "report.html").text
    assert "wrongfirst trywrongthird try" in page
    assert "second try" not in page


def test_long_texts_are_cut(tmp_path):
    report_of(tmp_path, [record(0, right=(1,), texts=["gnome " * 10_000])], ["kept"])
    assert Page(tmp_path / "report.html").text.count("gnome") == filter_page.LONGEST // 6


def test_shards_other_than_the_surveyed_ones_are_refused(tmp_path):
    for name, rows, steps in (("a", (0, 1), STEPS), ("b", (2, 5), STEPS), ("c", (2,), ("x", "y"))):
        write_records(tmp_path / name, [record(row) for row in rows], steps)
    whole = filtering.merge([filtering.survey(tmp_path / name) for name in "ab"])

    def write(survey, *shards):
        n = len(survey.row)
        write_filter_report(
            tmp_path / "out",
            survey=survey,
            selection=Selection(
                reason=np.zeros(n, np.int8), cluster=np.zeros(n, np.int32), quotas=()
            ),
            config=FilterConfig(),
            step_names=STEPS,
            duplicates=None,
            shards=[tmp_path / name for name in shards],
        )

    with pytest.raises(ValueError, match=r"2 of the survey's 4 pairs .* such as row 2"):
        write(whole, "a")
    with pytest.raises(ValueError, match="b has row 2, which the survey lacks"):
        write(filtering.survey(tmp_path / "a"), "a", "b")
    with pytest.raises(ValueError, match=r"c has the steps \('x', 'y'\), expected"):
        write(whole, "a", "c")
    assert not (tmp_path / "out").exists()
    write(whole, "b", "a")
    assert (tmp_path / "out" / "report.html").exists()
