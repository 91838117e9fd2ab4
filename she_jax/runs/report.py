"""The page of a run, ``report.html``: results, curves, changed chains, rollouts, a legend."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from she_jax.evaluation.chains import KEPT, chains_file, compare_chains
from she_jax.evaluation.page import LONGEST, render
from she_jax.evaluation.report import before_after_rows, below_floor
from she_jax.runs.curves import HEIGHT, LEFT, WIDTH, draw_charts
from she_jax.runs.scalars import meaning
from she_jax.training.files import read_json_lines, write_text
from she_jax.training.workdir import read_recipe

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_CHANGED = 8  # pairs shown of each kind of change
MOST_PAGES = 3  # pages of rollouts: the first, the last and what is between them
PHASES = {
    "eval": "Validation",
    "rl": "Updates on rollouts",
    "rft": "Rejection-sampling fine-tuning",
    "dpo": "Direct preference optimization",
    "sft": "Cold start",
}
CHANGES = {
    "gained": "The label became right",
    "lost": "The label became wrong",
    "other": "Other changes",
}


def write_report(workdir: Path) -> None:
    """Writes the page of a finished run, from what its folder holds.

    What a run did not keep is left out of the page. Times are not on it, so that a resumed run has
    the page of an uninterrupted one.
    """
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    rows = read_json_lines(workdir / "metrics.jsonl")  # none where nothing was trained
    before, after = (
        read_json_lines(workdir / "eval" / chains_file(when)) for when in ("before", "after")
    )
    pages = sorted((workdir / "samples").glob("step_*.json"))
    head, *results = before_after_rows(summary["before"], summary)
    html = render(
        TEMPLATE,
        name=workdir.absolute().name,
        about=_about(read_recipe(workdir), summary),
        warning=below_floor(summary),
        headline=_headline(summary),
        head=head,
        results=results,
        curves=[(PHASES[phase], drawn) for phase, drawn in draw_charts(rows, [*PHASES]).items()],
        size=(WIDTH, HEIGHT, LEFT),
        changes=_changes(before, after),
        rollouts=[_page(json.loads(p.read_text(encoding="utf-8"))) for p in _spread(pages)],
        more_pages=max(0, len(pages) - MOST_PAGES),
        legend=_legend(rows),
        meaning=meaning,
    )
    write_text(workdir / REPORT, html)


def _about(recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """How the policy was trained, a sentence."""
    rl, start = recipe["rl"], recipe["init_from"]
    sft = f"from {start}" if start else f"a cold start of {recipe['sft']['steps']:,} updates"
    parts = [f"{recipe['model']['name']} on {recipe['data']['name']}, seed {recipe['seed']}", sft]
    if rl["steps"]:
        method = rl["estimator"].upper() if recipe["method"] == "rl" else recipe["method"].upper()
        parts.append(f"up to {rl['steps']:,} updates of {method.replace('_', ' ')}")
        parts.append(f"the best on validation is that after update {summary['checkpoint']:,}")
        parts.append(f"{summary['sampled_tokens']:,} tokens sampled")
    return "; ".join(parts) + "."


def _headline(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    before, floor = summary["before"], summary.get("floor", {})
    figures = []
    for key, title in (
        ("macro_f1", "macro F1"),
        ("accuracy", "accuracy"),
        ("outcome", "mean outcome reward"),
        ("right_for_wrong_reason", "right label for a wrong reason"),
        ("parse_rate", "chains that can be read"),
    ):
        if summary.get(key) is not None and before.get(key) is not None:
            figures.append((f"{before[key]:.3f} → {summary[key]:.3f}", title))
    if floor.get("macro_f1") is not None:
        figures.insert(1, (f"{floor['macro_f1']:.3f}", "macro F1 of the floor"))
    return figures


def _changes(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What training changed in the chains of the same pairs; None if they were not kept."""
    if not (before and after):
        return None
    changed = compare_chains(before, after)
    return {
        "pairs": len(after),
        "changed": sum(map(len, changed.values())),
        "all": len(after) < KEPT,
        "counts": [(title, len(changed[kind])) for kind, title in CHANGES.items()],
        "shown": {
            title: [_changed_pair(*pair) for pair in changed[kind][:MOST_CHANGED]]
            for kind, title in CHANGES.items()
            if changed[kind]
        },
    }


def _changed_pair(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    verdicts = [
        (name, old["verdicts"].get(name), new["truth"].get(name), verdict)
        for name, verdict in new["verdicts"].items()
    ]
    verdicts.append(("label", old["given"], new["label"], new["given"]))
    return {
        "query": new["query"],
        "title": new["product"].get("title", ""),
        "uid": new["uid"],
        "rows": [
            (name, _said(was, gold), "-" if gold is None else gold, _said(now, gold))
            for name, was, gold, now in verdicts
            if {was, gold, now} != {None}
        ],
        "texts": [
            (when, line["text"].split("\n")) for when, line in (("before", old), ("after", new))
        ],
    }


def _said(value: Any, gold: Any) -> str:
    """A verdict, and whether it is right where that is known."""
    text = "none" if value is None else str(value)
    return text if gold is None else f"{text} {'✓' if value == gold else '✗'}"


def _spread(pages: Sequence[Path]) -> list[Path]:
    """The first page, the last one and some between."""
    count = min(MOST_PAGES, len(pages))
    return [pages[n * (len(pages) - 1) // max(count - 1, 1)] for n in range(count)]


def _page(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of the rollouts of an update."""
    return {"step": record["step"], "groups": [_group(group) for group in record["groups"]]}


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    rollouts = group["rollouts"]
    values = [abs(a) for r in rollouts for a in (r["grpo"], *r["token_advantages"])]
    limit = max(values, default=0.0) or 1.0
    truth = [f"{name}: {value}" for name, value in group["truth"].items()]
    others = [n for n, r in enumerate(rollouts) if r["outcome"] != rollouts[0]["outcome"]]
    first = [0, *others[:1]] if len(rollouts) > 1 and others else [*range(len(rollouts))][:2]
    shown = [_rollout(n, rollout, limit) for n, rollout in enumerate(rollouts)]
    return {
        "query": group["query"],
        "product": [f"{name}: {text}" for name, text in group["product"].items()],
        "gold": [f"label: {'unknown' if group['label'] is None else group['label']}", *truth],
        "uid": group["uid"],
        "limit": f"{limit:.2f}",
        "first": [shown[n] for n in first],
        "rest": [rollout for n, rollout in enumerate(shown) if n not in first],
    }


def _rollout(n: int, rollout: Mapping[str, Any], limit: float) -> dict[str, Any]:
    """A rollout: each step with its tokens, then the tokens outside every step."""
    tokens = list(
        zip(rollout["token_steps"], rollout["tokens"], rollout["token_advantages"], strict=True)
    )
    grpo = rollout["grpo"]
    steps = [
        {
            "name": step["name"],
            "verdict": (step["verdict"] or "") if step["written"] else "missing",
            "reward": "unknown" if step["reward"] is None else f"{step['reward']:.2f}",
            "sources": ", ".join(f"{name} {v:.2f}" for name, v in step["sources"].items()),
            "advantage": "-" if step["advantage"] is None else f"{step['advantage']:+.2f}",
            "critique": step["critique"],
            "tokens": [_token(text, a, grpo, limit) for at, text, a in tokens if at == k],
        }
        for k, step in enumerate(rollout["steps"])
    ]
    return {
        "title": f"Rollout {n + 1}",
        "outcome": f"{rollout['outcome']:.2f}",
        "well_formed": rollout["well_formed"],
        "grpo": f"{grpo:+.2f}",
        "grpo_share": f"{abs(grpo) / limit:.2f}",
        "grpo_side": _side(grpo),
        "steps": steps,
        "outside": [_token(text, a, grpo, limit) for at, text, a in tokens if at < 0],
    }


def _token(text: str, advantage: float, grpo: float, limit: float) -> dict[str, str]:
    return {
        "text": text[:LONGEST] or "·",
        "side": _side(advantage),
        "share": f"{abs(advantage) / limit:.2f}",
        "title": f"{advantage:+.3f}, GRPO {grpo:+.3f}",
    }


def _side(advantage: float) -> str:
    return "up" if advantage > 0 else "down" if advantage < 0 else "flat"


def _legend(rows: Sequence[Mapping[str, Any]]) -> list[tuple[list[str], str, str]]:
    """(names, phases, meaning) of every scalar; those with one meaning share a line."""
    phases: dict[str, dict[str, None]] = {}
    names: dict[str, dict[str, None]] = {}
    for row in rows:
        for name in row.keys() - {"phase", "step"}:
            text = meaning(name)
            names.setdefault(text, {})[name] = None
            phases.setdefault(text, {})[row["phase"]] = None
    lines = [(sorted(names[text]), ", ".join(phases[text]), text) for text in names]
    return sorted(lines)
