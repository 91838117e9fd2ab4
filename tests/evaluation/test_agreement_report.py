"""The agreement report: its figures against the libraries, and what the page shows and escapes."""

import re

import krippendorff
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, ndcg_score

from she_jax.cot import LabelSet
from she_jax.evaluation.agreement_page import agreement_page, judged_row
from she_jax.evaluation.agreement_report import agreement_report, flagged, worst_disagreements
from she_jax.evaluation.judged import judged_pairs
from she_jax.types import Example

LABELS = LabelSet.parse("0-3")
SIZE = 240
WORDS = ("mug", "lamp", "sofa", "desk", "rug")


def pairs(seed=0, raters=3):
    rng = np.random.default_rng(seed)
    examples, lines = [], []
    for n in range(SIZE):
        query = f"{WORDS[n % 5]} {n // 12}"
        gold = int(rng.integers(0, 4))
        given = tuple(int(g) for g in rng.integers(0, 4, rng.integers(0, raters + 1)))
        product = {"title": f"{WORDS[int(rng.integers(0, 5))]} no. {n}"}
        examples.append(
            Example(uid=f"{n}", query=query, product=product, label=gold, raters=given, kind="k")
        )
        votes = rng.multinomial(8, rng.dirichlet(np.ones(4) + 3 * (np.arange(4) == gold)))
        label = int(votes.argmax())
        lines.append(
            {
                "uid": f"{n}",
                "label": label,
                "probabilities": dict(zip(LABELS.texts, votes / 8, strict=True)),
                "confidence": votes[label] / 8,
                "expected": float(votes @ np.arange(4) / 8),
                "review": False,
                "well_formed": True,
                "steps": [{"name": "label", "text": "", "verdict": str(label)}],
                "text": None,
                "truncated": False,
            }
        )
    return examples, lines


def unread(line):
    unknown = {"label": None, "probabilities": None, "confidence": None, "expected": None}
    return line | unknown | {"text": "<script>alert(1)</script>", "steps": []}


def judged(examples, lines, temperature=2.0):
    return judged_pairs(examples, lines, LABELS, samples=8, temperature=temperature)


def test_the_figures_equal_those_of_the_libraries():
    examples, lines = pairs()
    report = agreement_report(judged(examples, lines), [])
    gold = [e.label for e in examples]
    given = [line["label"] for line in lines]
    estimates = {k: v["estimate"] for k, v in report["metrics"]["judge"].items()}
    good = [[label >= 2 for label in side] for side in (gold, given)]
    expected = {
        "accuracy": accuracy_score(gold, given),
        "macro_f1": f1_score(gold, given, average="macro"),
        "good_f1": f1_score(*good),
        "kappa": cohen_kappa_score(gold, given),
        "quadratic_kappa": cohen_kappa_score(gold, given, weights="quadratic"),
        "alpha": krippendorff.alpha(
            [gold, given], value_domain=range(4), level_of_measurement="ordinal"
        ),
    }
    for name, value in expected.items():
        assert estimates[name] == pytest.approx(value), name
    counts = np.array([np.bincount(e.raters, minlength=4) for e in examples])
    alpha = krippendorff.alpha(
        value_counts=counts, value_domain=range(4), level_of_measurement="ordinal"
    )
    assert report["metrics"]["raters"]["alpha"]["estimate"] == pytest.approx(alpha)
    assert report["rated_twice"] == sum(len(e.raters) > 1 for e in examples)
    assert np.sum(report["confusion"]) == SIZE
    # With the temperature the expected grades change, and with them the order.
    plain = judged(examples, lines, temperature=None)
    scores = [line["expected"] for line in lines]
    by_query = {}
    for n, e in enumerate(examples):
        by_query.setdefault(e.query, []).append(n)
    values = [
        ndcg_score([[gold[n] for n in rows]], [[scores[n] for n in rows]], k=10)
        for rows in by_query.values()
        if len(rows) > 1 and any(gold[n] for n in rows)
    ]
    found = agreement_report(plain, [])["metrics"]["judge"]["ndcg@10"]["estimate"]
    assert found == pytest.approx(np.mean(values))


def test_answers_that_cannot_be_read_are_the_farthest_and_are_shown():
    examples, lines = pairs()
    lines[0], lines[1] = unread(lines[0]), unread(lines[1])
    case = judged(examples, lines)
    assert case.farthest[0] == (0 if examples[0].label >= 2 else 3)
    ranks = {"<i>a</i>": {n: n % 12 for n in range(SIZE)}, "b": {n: -n for n in range(24)}}
    report = agreement_report(case, [], ranks)
    assert report["systems"]["systems"]["b"]["n"] == 24
    assert report["unread"] == 2
    assert sum(row[4] for row in report["confusion"]) == 2
    page = agreement_page(report, case, "judged by <b>me</b>")
    assert "Answers that could not be read: 2" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "judged by &lt;b&gt;me" in page
    assert "&lt;i&gt;a&lt;/i&gt;" in page
    assert f"two orders of systems: {report['systems']['tau']:.3f}" in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)


def test_queries_of_the_training_pairs_are_counted_and_left_out():
    examples, lines = pairs()
    train = [e for e in examples if e.query.startswith("mug")]
    report = agreement_report(judged(examples, lines), train)
    assert report["seen"] == len(train)
    assert {"judge", "unseen", "floor", "raters"} == report["metrics"].keys()
    rest = [n for n, e in enumerate(examples) if not e.query.startswith("mug")]
    expected = np.mean([examples[n].label == lines[n]["label"] for n in rest])
    assert report["metrics"]["unseen"]["accuracy"]["estimate"] == pytest.approx(expected)
    page = agreement_page(report, judged(examples, lines), "")
    assert "floor, unseen queries" in page
    assert f"{len(train)} of the {SIZE} pairs have a query that the judge was trained or" in page
    everything = {example.query for example in examples}
    report = agreement_report(judged(examples, lines), train, known=everything)
    assert report["seen"] == SIZE
    page = agreement_page(report, judged(examples, lines), "")
    assert "so nothing here says how far it agrees on other queries" in page


def test_votes_that_could_not_be_read_are_none():
    """One read vote of eight: the report's confidence is the issued one, (1 + 1) / (1 + 4)."""
    examples, lines = pairs()
    lines[0] |= {"probabilities": {"0": 0, "1": 0, "2": 1, "3": 0}, "label": 2, "votes": 1}
    assert judged(examples, lines, 1.0).confident[0].tolist() == [0.2, 0.2, 0.4, 0.2]


def test_a_limit_that_was_fitted_elsewhere_is_tried_on_these_pairs():
    examples, lines = pairs()
    lines[0] = unread(lines[0])
    case = judged(examples, lines)
    tried = flagged(case, 0.5)
    sure = [n for n in range(1, SIZE) if lines[n]["confidence"] >= 0.5]
    assert tried["pairs"] == SIZE - len(sure)
    right = [lines[n]["label"] == examples[n].label for n in sure]
    assert tried["accuracy"] == pytest.approx(np.mean(right))
    assert flagged(case, 2.0) == {"limit": 2.0, "pairs": SIZE, "accuracy": None}
    page = agreement_page(agreement_report(case, []) | {"flagged": tried}, case, "")
    assert f"a human looks at {tried['pairs']} of {SIZE} pairs" in page


def test_without_votes_there_is_no_calibration_and_the_page_says_how_to_get_it():
    examples, lines = pairs()
    silent = [{**line, "probabilities": None, "confidence": None} for line in lines]
    case = judged(examples, silent, None)
    report = agreement_report(case, [])
    assert report["calibration"] is report["review"] is None
    page = agreement_page(report, case, "")
    assert "--config.decide.samples=8" in page
    assert "<img" not in page


def test_pairs_of_one_class_without_raters_make_a_report():
    examples, lines = pairs(raters=0)
    same = [Example(uid=e.uid, query=e.query, product=e.product, label=0) for e in examples]
    report = agreement_report(judged(same, lines), [])
    assert "raters" not in report["metrics"]
    assert report["metrics"]["judge"]["good_auc"]["estimate"] is None
    fitted = {"label_mix": dict(zip(report["labels"], (0.8, 0.1, 0.1, 0), strict=True))}
    report["decide"] = {"about": fitted}
    page = agreement_page(report, judged(same, lines), "")
    assert "(0: 100%, 1: 0%, 2: 0%, 3: 0%) are another mix than those that threshold" in page
    fitted["label_mix"]["0"] = 0.9
    assert "another mix" not in agreement_page(report, judged(same, lines), "")
    assert "AUC of good</bdi></td><td><bdi>-" in page


def test_the_temperature_and_the_review_are_those_of_the_votes():
    examples, lines = pairs()
    report = agreement_report(judged(examples, lines, temperature=1.0), [])
    before, after = (report["calibration"][side] for side in ("before", "after"))
    assert before["log_loss"] is None  # a class without a vote occurs
    assert after["log_loss"] > 0
    assert sum(point["n"] for point in after["curve"]) == SIZE
    limits = report["review"]["limits"]
    assert limits["0.95"]["pairs"] <= limits["0.99"]["pairs"] <= SIZE


def test_the_worst_disagreements_come_first_and_the_surest_of_them():
    examples, lines = pairs()
    case = judged(examples, lines)
    worst = worst_disagreements(case)
    gaps = [abs(examples[n].label - lines[n]["label"]) for n in worst]
    assert len(worst) == 50
    assert gaps == sorted(gaps, reverse=True)
    sure = [lines[n]["confidence"] for n in worst if gaps[worst.index(n)] == gaps[0]]
    assert sure == sorted(sure, reverse=True)
    row = judged_row(examples[3], lines[3])
    assert row["human"] == examples[3].label
    assert row["chain"] == f"label: {lines[3]['label']}"
