"""The page that people annotate on holds its pairs as data, and what a model wrote as text."""

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

from recipes import EXAMPLE

from she_jax.annotation.label_studio import label_studio_task, labeling_config
from she_jax.annotation.page import annotation_page
from she_jax.annotation.tasks import make_task
from she_jax.cot import CotSchema

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)> \u202egnp {{7*7}}"
SCHEMA = CotSchema.build(labels="0-2", steps=('né"<&: how', "size?: big => yes|no", "label"))


def task(uid="a", **step):
    written = [{"name": 'né"<&', "text": EVIL, "verdict": None}]
    line = {"steps": written, "label": 2, "confidence": 0.25, "probabilities": None}
    product = {"title": EVIL, "size": "3", "items": "x"}
    return make_task(
        replace(EXAMPLE, uid=uid, query=EVIL, product=product), line, SCHEMA, ("",) * 3
    )


def test_the_page_has_the_pairs_as_data_and_nothing_that_runs_but_its_script():
    page = annotation_page([task("a"), task("b")], SCHEMA, "a <b>judge</b>")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert "<" not in data
    first, second = json.loads(data)["tasks"]
    assert (first["uid"], second["uid"]) == ("a", "b")
    assert first["query"] == EVIL.replace("\u202e", "\\u202e")
    assert first["fields"][1:] == [["size", "3"], ["items", "x"]]
    steps = {step["name"]: step for step in first["steps"]}  # what the chain left out may stay out
    assert list(steps) == ['né"<&', "label"]
    assert steps['né"<&']["choices"] == [["correct", ""], ["incorrect", ""]]
    assert (steps["label"]["verdict"], len(steps["label"]["choices"])) == ("2", 3)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert "a &lt;b&gt;judge&lt;/b&gt;" in page
    assert not re.search(r"(src|href)=.?https?:", page)


def test_a_page_with_another_chain_keeps_its_own_answers():
    pages = [annotation_page([pair], SCHEMA, "") for pair in (task(), task("b"))]
    keys = [re.search(r'"set": "(\w+)"', page)[1] for page in pages]
    assert keys[0] != keys[1]


def test_label_studio_finds_every_field_and_control_that_a_task_names():
    config = ET.fromstring(labeling_config(SCHEMA))
    objects = {tag.get("name"): tag.get("value") for tag in config.iter("Text")}
    controls = {tag.get("name"): tag for tag in config.iter("Choices")}
    exported = label_studio_task(task(), SCHEMA, "model")
    assert {f"${name}" for name in exported["data"]} - {"$she_uid"} == set(objects.values())
    assert not {"id", "label"} & exported["data"].keys()
    (prediction,) = exported["predictions"]
    (result,) = prediction["result"]
    control = controls[result["from_name"]]
    assert control.get("toName") == result["to_name"] == "step_2"
    assert result["value"]["choices"][0] in [choice.get("value") for choice in control]
    assert prediction["score"] == 0.25
