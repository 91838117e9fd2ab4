"""A small study that trains nothing: its config, and a folder with the files of its runs."""

import json

from ml_collections import ConfigDict

from she_jax.recipes import evidence as recipe

ARMS = {
    "srpo": {"seeds": 2, "tuned": False, "settings": {"shopworld.coverage": 1.0}},
    "grpo": {"seeds": 2, "tuned": False, "settings": {"rl.estimator": "grpo"}},
    "base": {"seeds": 2, "trained": False},
    "few": {"seeds": 2, "tuned": False, "start": "checks_2", "against": ()},
    "few_grpo": {"seeds": 2, "tuned": False, "start": "checks_2", "against": ("few",)},
    "half": {"tuned": False, "settings": {"shopworld.coverage": 0.5}},
}
PLOTS = {
    "curves": ("srpo", "grpo"),
    "confusion": ("base", "srpo"),
    "checks": (("SRPO", ("few", "srpo")), ("GRPO", ("few_grpo", "grpo"))),
    "coverage": (("SRPO", ("srpo", "half")), ("GRPO", ("grpo",))),
}


def small_config(arms, **changes):
    """The study's config with other arms: name to what differs from a tuned arm with one seed."""
    config = recipe.get_config().copy_and_resolve_references().unlock()
    main, specs = next(iter(arms)), {}
    for name, values in arms.items():
        spec = {
            "title": name,
            "table": "main",
            "start": "main",
            "seeds": 1,
            "tuned": True,
            "against": () if name == main else (main,),
            "trained": True,
            "settings": {},
            "stages": {},
        } | values
        spec["settings"] = recipe.nested(spec["settings"])
        spec["stages"] = {stage: recipe.nested(part) for stage, part in spec["stages"].items()}
        specs[name] = spec
    config.arms, config.order = ConfigDict(specs), tuple(specs)
    config.plots = {"curves": (), "confusion": (), "checks": (), "coverage": ()}
    config.seeds, config.rates = (0, 1), (1e-4, 3e-4)
    config.update(changes)
    return config.lock()


def scored(macro_f1):
    """Metrics as ``score`` has them; all of them follow from macro F1."""
    return {
        "macro_f1": macro_f1,
        "accuracy": macro_f1 + 0.01,
        "good_f1": None,
        "f1": {"1": macro_f1, "2": 0.25, "3": None, "4": 0.75},
        "step_accuracy": {"query": macro_f1, "category": macro_f1 + 0.1},
        "right_for_wrong_reason": 1 - macro_f1,
        "parse_rate": 1.0,
        "confusion": [[9, 1, 0, 0, 0], [2, 8, 0, 0, 0], [0, 0, 5, 5, 0], [0, 0, 0, 9, 1]],
        "n": 40,
        "by_kind": {},
    }


def write_run(folder, macro_f1, *, phase="rl", updates=12, sampled=5_000):
    """Writes a run's files: entropies 1, 2, ..., evaluated at first and every four updates."""
    folder.mkdir(parents=True)
    metrics = []
    if phase != "sft":
        metrics.append({"phase": "eval", "step": 0, "validation/macro_f1": 0.5})
    for step in range(1, updates + 1):
        line = {"phase": phase, "step": step, "entropy": float(step)}
        line |= {"loss": 0.5, "tokens": 100, "time/step": 0.5}
        line |= {"time/preparation": 2.0} if phase != "sft" and step == 1 else {}
        metrics.append(line)
        if step % 4 == 0 and phase != "sft":
            best = {"validation/macro_f1": macro_f1 - (updates - step) / 100}
            metrics.append({"phase": "eval", "step": step} | best)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    summary = scored(macro_f1) | {"longtail": scored(macro_f1 - 0.2), "before": {}}
    summary |= {"checkpoint": updates}
    summary |= {"sampled_tokens": sampled} if phase != "sft" else {}
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


def write_study(folder):
    """Writes the files of a whole study with two seeds; returns its config."""
    config = small_config(ARMS).unlock()
    config.plots = PLOTS
    scores = {
        "seed{}/srpo-0.0003": (0.8, 0.9),
        "seed{}/grpo-0.0003": (0.7, 0.76),
        "seed{}/few-0.0003": (0.8, 0.81),
        "seed{}/few_grpo-0.0003": (0.8, 0.8),
        "seed{}/half-0.0003": (0.75,),
    }
    for name, by_seed in scores.items():
        for seed, macro_f1 in enumerate(by_seed):
            write_run(folder / name.format(seed), macro_f1)
    for seed in (0, 1):
        write_run(folder / f"seed{seed}/start-main", 0.5, phase="sft")
    return config.lock()
