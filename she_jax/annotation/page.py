"""The page on which people annotate: one file, no server, nothing from the network.

It holds the pairs as JSON and one script, which writes text as text and is allowed by its hash.
What is chosen is kept in the browser's storage and saved as JSONL, a line for each step (see
``she_jax.annotation.tasks``).
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from she_jax.annotation.tasks import CORRECT, INCORRECT, ChainStep, Task
from she_jax.cot import CotSchema, Step
from she_jax.evaluation.page import LONGEST, render
from she_jax.training.files import printable

TEMPLATE = Path(__file__).with_name("annotate.html.jinja")
SCRIPT = Path(__file__).with_name("annotate.js")


def annotation_page(tasks: Sequence[Task], schema: CotSchema, about: str) -> str:
    """The page as HTML.

    Args:
      tasks: the pairs, in the order in which they are shown.
      schema: the steps.
      about: whose chains they are.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    steps = {step.name: step for step in schema.steps}
    shown = [
        {
            "uid": task.uid,
            "query": _shown(task.example.query),
            "fields": [[_shown(k), _shown(v)] for k, v in task.example.product.items()],
            "kind": _shown(task.example.kind),
            "steps": [_step(step, steps[step.name], schema) for step in task.chain],
        }
        for task in tasks
    ]
    content = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
    data = {"set": content, "tasks": shown}  # what was chosen on another page is not taken over
    return render(
        TEMPLATE,
        about=about,
        pairs=len(tasks),
        data=data,
        script=Markup(script),
        digest=Markup(digest),
    )


def _step(written: ChainStep, step: Step, schema: CotSchema) -> dict[str, Any]:
    meanings = dict(zip(schema.labels.texts, schema.labels.meanings, strict=False))
    is_label = step.verdicts == schema.labels.texts
    choices = [
        [verdict, meanings.get(verdict, "") if is_label else ""]
        for verdict in step.verdicts or (CORRECT, INCORRECT)
    ]
    return {
        "name": step.name,
        "meaning": step.meaning,
        "text": _shown(written.text),
        "verdict": written.verdict,
        "free": not step.verdicts,
        "choices": choices,
    }


def _shown(text: str) -> str:
    """Text with its invisible characters as escapes, cut."""
    return printable(text, LONGEST)
