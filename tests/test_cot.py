"""The chain of thought: parsing is defined for any text, and inverts writing."""

import json
import re
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from she_jax.cot import ATTRIBUTES, FOUR_GRADES, CotSchema, LabelSet, Step

OWN_STEPS = ("Plan: what to compare", "prüfen?: was dafür spricht => ja|nein|unstated", "label")
SCHEMAS = [
    CotSchema(),
    CotSchema.build(label_first=True),
    CotSchema.build(checks=2),
    CotSchema.build(steps=OWN_STEPS, labels="poor,fair,good"),
    CotSchema.build(labels="0-10"),
]
schemas = st.sampled_from(SCHEMAS)

# Text that resembles a chain often enough to reach every branch, and arbitrary text.
fragments = st.sampled_from(
    [
        *("query", "product", "category", "attributes", "label", "check_1", "Label "),
        *(":", ": ", "\n", "=>", " => ", "near", "met", "4", "MET.", "red; blue", "x", " "),
        *("\r", "\x00", "\u202e", "\u2028"),
    ]
)
texts = st.one_of(st.lists(fragments, max_size=40).map("".join), st.text(max_size=200))

# Allowed text of a step: one line.
free_text = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")), min_size=1, max_size=40
).filter(str.strip)


@st.composite
def written(draw):
    """A schema with texts and verdicts of a complete chain."""
    schema = draw(schemas)
    verdicts, bodies = {}, {}
    for step in schema.steps:
        if step.optional and draw(st.booleans()):
            continue
        if step.verdicts:
            verdicts[step.name] = draw(st.sampled_from(step.verdicts))
        if not step.verdicts or draw(st.booleans()):
            bodies[step.name] = draw(free_text)
    return schema, bodies, verdicts


@given(schemas, texts)
def test_any_text_can_be_parsed(schema, text):
    chain = schema.parse(text)
    assert len(chain.steps) == len(schema.steps)
    assert len(chain.line_steps) == text.count("\n") + 1
    assert chain.label is None or chain.label in schema.labels.values
    for step, parsed in zip(schema.steps, chain.steps, strict=True):
        if parsed is None:
            continue
        assert parsed.verdict is None or parsed.verdict in step.verdicts
        assert parsed.valid == (parsed.verdict is not None if step.verdicts else bool(parsed.text))


@given(schemas, texts)
def test_lines_and_steps_agree(schema, text):
    """A step is present if and only if a line belongs to it; lines follow the steps' order."""
    chain = schema.parse(text)
    owned = [k for k in chain.line_steps if k >= 0]
    assert set(owned) == {k for k, step in enumerate(chain.steps) if step is not None}
    assert owned == sorted(owned)
    assert all(-1 <= k < len(schema.steps) for k in chain.line_steps)


@given(schemas, texts)
def test_a_well_formed_chain_is_complete_and_has_a_label(schema, text):
    chain = schema.parse(text)
    if chain.well_formed:
        assert chain.label is not None
        for step, parsed in zip(schema.steps, chain.steps, strict=True):
            assert parsed.valid if parsed is not None else step.optional


@given(texts)
def test_a_stray_first_line_makes_the_chain_ill_formed_and_changes_no_step(text):
    schema = CotSchema()
    stray = schema.parse(f"well then\n{text}")
    plain = schema.parse(text)
    assert stray.steps == plain.steps
    assert stray.line_steps == (-1, *plain.line_steps)
    assert not stray.well_formed


@given(schemas, texts, texts)
def test_later_text_does_not_change_the_step_of_earlier_lines(schema, text, more):
    """So the step of a token does not depend on later tokens."""
    lines = schema.parse(text).line_steps
    assert schema.parse(f"{text}\n{more}").line_steps[: len(lines)] == lines


@given(written())
def test_a_written_chain_is_parsed_back(case):
    schema, bodies, verdicts = case
    text = schema.write(bodies, verdicts)
    chain = schema.parse(text)
    assert chain.well_formed
    assert chain.label == schema.labels.read(verdicts["label"])
    for step, parsed in zip(schema.steps, chain.steps, strict=True):
        if step.name not in bodies and step.name not in verdicts:
            assert parsed is None
            continue
        assert parsed.verdict == verdicts.get(step.name)
        body = " ".join(bodies.get(step.name, "").split()).replace("=>", "->")
        assert parsed.text == body


@given(written())
def test_a_truncated_chain_keeps_its_complete_steps(case):
    """Without its last line a chain loses only the last step, and is ill-formed."""
    schema, bodies, verdicts = case
    whole = schema.write(bodies, verdicts)
    cut, _, _ = whole.rpartition("\n")
    chain, full = schema.parse(cut), schema.parse(whole)
    last = max(full.line_steps)
    assert chain.steps == (*full.steps[:last], None, *full.steps[last + 1 :])
    assert not chain.well_formed


GOOD = """query: running shoes; red
product: trail shoes; navy
category: running shoes / trail shoes => near
attributes: red / navy => conflict
label: 2"""


def test_the_chain_of_the_docstring():
    chain = CotSchema().parse(GOOD)
    assert chain.well_formed
    assert chain.label == 2
    assert chain.line_steps == (0, 1, 2, 3, 4)
    assert [step.verdict for step in chain.steps] == [None, None, "near", "conflict", "2"]
    assert chain.steps[2].text == "running shoes / trail shoes"


def test_case_space_and_full_stop_are_ignored():
    chain = CotSchema().parse(GOOD.replace("label: 2", " LABEL :  2. ").replace("near", " Near."))
    assert chain.label == 2
    assert chain.well_formed


@pytest.mark.parametrize(
    ("change", "label"),
    [
        (("label: 2", "label: 2\nlabel: 3"), 2),  # twice: the first counts
        (("label: 2", "label: 2\nquery: again"), 2),  # out of order
        (("label: 2", "label: 5"), None),  # outside the set
        (("label: 2", ""), None),  # missing
        (("=> near", "=> nearly"), 2),  # unreadable
        (("running shoes; red", ""), 2),  # empty
    ],
)
def test_ill_formed_chains(change, label):
    chain = CotSchema().parse(GOOD.replace(*change, 1))
    assert not chain.well_formed
    assert chain.label == label


def test_a_line_without_a_step_name_continues_the_step_before():
    chain = CotSchema().parse(GOOD.replace(" => near", "\nand so: => near"))
    assert chain.line_steps == (0, 1, 2, 2, 3, 4)
    assert chain.well_formed
    assert chain.steps[2].verdict == "near"


def test_a_label_first_chain():
    schema = CotSchema.build(label_first=True)
    lines = GOOD.split("\n")
    assert schema.parse("\n".join([lines[-1], *lines[:-1]])).well_formed
    assert not schema.parse(GOOD).well_formed


@pytest.mark.parametrize("schema", [*SCHEMAS, CotSchema.build(steps=("plan", "solve"))])
def test_a_schema_reports_the_options_that_build_it(schema):
    options = json.loads(json.dumps(schema.options))
    assert CotSchema.build(**options) == schema


def test_the_steps_of_a_recipe():
    schema = SCHEMAS[3]
    assert [step.optional for step in schema.steps] == [False, True, False]
    assert schema.steps[1].verdicts == ("ja", "nein", "unstated")
    assert schema.steps[1].meaning == "was dafür spricht"
    chain = schema.parse("plan: size\nPRÜFEN: 40 x 60 => Ja.\nlabel: FAIR")
    assert chain.well_formed
    assert (chain.steps[1].verdict, chain.label) == ("ja", "fair")
    assert CotSchema.build(steps=("plan", "solve")).parse("plan: a\nsolve: 4").label is None
    with pytest.raises(ValueError, match="leave label_first and checks out"):
        CotSchema.build(steps=("plan",), checks=2)


@pytest.mark.parametrize(
    ("text", "values", "good"),
    [
        ("1-4", (1, 2, 3, 4), (3, 4)),
        ("0-3", (0, 1, 2, 3), (2, 3)),
        ("5-1", (5, 4, 3, 2, 1), (2, 1)),  # 1 is the best
        ("0-10", tuple(range(11)), (6, 7, 8, 9, 10)),
        ("binary", (0, 1), (1,)),
        ("no, yes", ("no", "yes"), ("yes",)),
        ("0,0.5,1", (0, 0.5, 1), (1,)),
        ("poor,fair,good", ("poor", "fair", "good"), ("good",)),
        ("esci", ("I", "C", "S", "E"), ("S", "E")),
        ("0: off topic\n1: on topic", (0, 1), (1,)),
    ],
)
def test_label_sets(text, values, good):
    labels = LabelSet.parse(text)
    assert (labels.values, labels.good) == (values, good)
    assert LabelSet.parse(labels.text, ",".join(map(str, good))) == labels
    assert [type(labels.read(str(value))) for value in values] == [type(v) for v in values]
    assert [labels.index(f" {value} ") for value in values] == list(range(len(values)))
    assert all(CotSchema.build(labels=text).parse(f"label: {v}").label == v for v in values)


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("0-3", "2.0", 2),  # as pandas writes a whole number beside a gap
        ("0-3", np.int64(2), 2),
        ("0-3", Decimal("2"), 2),
        ("0-3", 0, 0),
        ("0,0.5,1", ".50", 0.5),
        ("poor,fair,good", " FAIR", "fair"),
        ("1-4", "E", 4),
        ("esci", "4", "E"),
        ("0-3", "2.5", None),
        ("0-3", "4", None),
        ("0-3", "", None),
        ("0-3", "٣", None),
        ("0-3", float("nan"), None),
        ("0-3", True, None),
    ],
)
def test_what_a_file_says_for_a_label(text, value, expected):
    labels = LabelSet.parse(text)
    if expected is None:
        with pytest.raises(ValueError, match=r"unknown label: .*expected 0, 1, 2, 3"):
            labels.read(value)
    else:
        assert labels.read(value) == expected


@pytest.mark.parametrize(
    ("text", "good", "message"),
    [
        ("7", "", "at least two"),
        ("yes,YES", "", "all different"),
        ("a|b,c", "", "without"),
        ("0-3", "5", "unknown label: '5'"),
        ("0: bad\n1:", "", "a line 'value: meaning' for each"),
    ],
)
def test_labels_that_are_no_set(text, good, message):
    with pytest.raises(ValueError, match=message):
        LabelSet.parse(text, good)


def test_only_known_sets_imply_verdicts_and_other_chains_may_leave_them_out():
    assert LabelSet.parse("esci").implied["E"] == {"category": "match", "attributes": "met"}
    schema = CotSchema.build(labels="0-3")
    assert not schema.labels.implied
    assert [s.name for s in schema.steps if s.optional] == ["category", "attributes"]


def test_optional_checks_may_be_missing():
    schema = CotSchema.build(checks=2)
    assert schema.names[3:5] == ("check_1", "check_2")
    chain = schema.parse(
        GOOD.replace("attributes:", "check_2: red / navy => conflict\nattributes:")
    )
    assert chain.well_formed
    assert chain.steps[3] is None
    assert chain.steps[4].verdict == "conflict"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            (Step(name="a"), Step(name="a"), Step(name="label", verdicts=FOUR_GRADES.texts)),
            "only once",
        ),
        ((Step(name="A b"), Step(name="label", verdicts=FOUR_GRADES.texts)), "single words"),
        ((Step(name="a=>b"), Step(name="c/d")), "['a=>b', 'c/d']"),
        ((Step(name="category", verdicts=("near", "Near")),), "cannot be told apart"),
        ((Step(name="label", verdicts=ATTRIBUTES),), "expected the verdicts ('1', '2', '3', '4')"),
        ((), "at least one"),
        (("plan: how",), "build it from lines with CotSchema.build(steps="),
    ],
)
def test_an_invalid_schema_is_refused(steps, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CotSchema(steps=steps)


def test_a_single_text_is_no_list_of_lines():
    with pytest.raises(ValueError, match=r"expected several lines, such as steps=\('plan: how',\)"):
        CotSchema.build(steps="plan: how")


@pytest.mark.parametrize(
    ("texts", "verdicts", "message"),
    [
        ({}, {"label": "2"}, "step 'query' has no text and no verdict"),
        ({"query": "x", "product": "y"}, {"category": "far"}, "verdict 'far' not in"),
        ({"query": "x", "product": "y", "category": "z"}, {}, "verdict None not in"),
        ({"colour": "red"}, {}, "steps ['colour'] are not in the schema"),
    ],
)
def test_an_invalid_chain_is_not_written(texts, verdicts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CotSchema().write(texts, verdicts)
