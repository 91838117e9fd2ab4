"""Label Studio: the labeling config, tasks with the policy's verdicts as predictions, its export.

Data fields begin with ``she_``, controls with ``human_`` (and ``items_``, what is typed): of fields
called ``id`` or ``label`` Label Studio's short exports make an answer.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from typing import Any

from she_jax.annotation.tasks import CORRECT, INCORRECT, Opinion, Task, make_opinion
from she_jax.cot import CotSchema

HUMAN, ITEMS = "human_", "items_"
ITEMS_HINT = "the right items, with ; between them"


def labeling_config(schema: CotSchema) -> str:
    """The labeling config, XML to paste into a project: a choice for each step."""
    view, single = ET.Element("View"), {"choice": "single-radio", "showInline": "true"}
    typed = {"maxSubmissions": "1", "editable": "true", "placeholder": ITEMS_HINT}
    for name in ("query", "product"):
        ET.SubElement(view, "Header", value=name.capitalize())
        ET.SubElement(view, "Text", name=name, value=f"$she_{name}")
    for number, step in enumerate(schema.steps):
        title = f"{step.name}: {step.meaning}" if step.meaning else step.name
        to = f"step_{number}"
        ET.SubElement(view, "Header", value=title)
        ET.SubElement(view, "Text", name=to, value=f"$she_{to}")
        control = {"name": f"{HUMAN}{step.name}", "toName": to}
        choices = ET.SubElement(view, "Choices", control | single)
        for verdict in step.verdicts or (CORRECT, INCORRECT):
            ET.SubElement(choices, "Choice", value=verdict)
        if not step.verdicts:
            ET.SubElement(view, "TextArea", {"name": f"{ITEMS}{step.name}", "toName": to} | typed)
    ET.indent(view)
    return ET.tostring(view, encoding="unicode") + "\n"


def label_studio_task(task: Task, schema: CotSchema, model: str) -> dict[str, Any]:
    """A task to import, with the policy's verdicts as predictions.

    Args:
      task: the pair and its chain.
      schema: the steps; a field for each, also for those that this chain lacks.
      model: who made the predictions.
    """
    product = "\n".join(f"{name}: {text}" for name, text in task.example.product.items())
    data = {"she_uid": task.uid, "she_query": task.example.query, "she_product": product}
    shown = {name: task.step(name) for name in schema.names}
    for number, step in enumerate(shown.values()):
        data[f"she_step_{number}"] = step.line if step.text or step.verdict else "(not written)"
    results = [
        {
            "id": f"{HUMAN}{number}",
            "from_name": f"{HUMAN}{name}",
            "to_name": f"step_{number}",
            "type": "choices",
            "value": {"choices": [step.verdict]},
        }
        for number, (name, step) in enumerate(shown.items())
        if step.verdict is not None
    ]
    prediction: dict[str, Any] = {"model_version": model, "result": results}
    if task.confidence is not None:
        prediction["score"] = task.confidence
    return {"data": data, "predictions": [prediction] if results else []}


def label_studio_opinions(
    row: Mapping[str, Any], tasks: Mapping[str, Task], schema: CotSchema
) -> Iterator[Opinion | ValueError]:
    """What a task of the JSON export states; a ValueError for each part that cannot be used.

    Canceled annotations state nothing, and neither do predictions.
    """
    data, annotations = row.get("data"), row.get("annotations")
    if not isinstance(data, Mapping) or not isinstance(annotations, list):
        yield ValueError("not a task of Label Studio's JSON export (JSON-MIN and CSV lack parts)")
        return
    task = tasks.get(str(data.get("she_uid", "")))
    if task is None:
        yield ValueError(f"uid {data.get('she_uid')!r} is not among the pairs of this folder")
        return
    for annotation in annotations:
        if annotation.get("was_cancelled"):
            continue
        try:
            yield from _opinions(annotation, task, schema)
        except (AttributeError, KeyError, TypeError) as error:
            yield ValueError(f"an annotation cannot be read: {type(error).__name__}: {error}")


def _opinions(
    annotation: Mapping[str, Any], task: Task, schema: CotSchema
) -> Iterator[Opinion | ValueError]:
    steps = {step.name: step for step in schema.steps}
    who = annotation.get("completed_by")
    if isinstance(who, Mapping):
        who = who.get("email") or who.get("id")
    annotator = who if "@" in str(who) else f"label studio {who}"
    at = annotation.get("updated_at") or annotation.get("created_at")
    said: dict[str, dict[str, Any]] = {}  # by step: its choice, and what was typed
    for region in annotation["result"]:
        name, value = str(region.get("from_name", "")), region["value"]
        if name.startswith(ITEMS) and value.get("text"):
            text = value["text"]
            items = "; ".join(text) if isinstance(text, list) else str(text)
            said.setdefault(name.removeprefix(ITEMS), {})["value"] = items
        elif name.startswith(HUMAN) and value.get("choices"):
            step, choice = name.removeprefix(HUMAN), value["choices"][0]
            free = step in steps and not steps[step].verdicts
            key, stated = ("correct", choice == CORRECT) if free else ("value", choice)
            said.setdefault(step, {})[key] = stated
        elif not name.startswith((ITEMS, HUMAN)):
            yield ValueError(f"{name!r} is no control of label_studio.xml")
    for step, stated in said.items():
        try:
            yield make_opinion(task, steps.get(step), annotator, at, **stated)
        except ValueError as error:
            yield ValueError(f"step {step!r}: {error}")
