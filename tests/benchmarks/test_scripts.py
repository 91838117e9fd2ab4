"""The scripts beside the study: each imports, and what it runs or measures fits the library."""

import importlib
import json
import sys
from collections import Counter

import jax
import pytest
from absl import flags
from ml_collections import config_flags
from recipes import ROOT

from she_jax.annotation.tasks import json_lines, make_task, task_to_json
from she_jax.runs.config import parse


@pytest.fixture
def load_script():
    """Imports a script and parses its flags, which are removed again: scripts share their names."""
    before = set(flags.FLAGS)

    def load(name, *arguments):
        sys.modules.pop(f"benchmarks.{name}", None)
        module = importlib.import_module(f"benchmarks.{name}")
        flags.FLAGS([name, *arguments])
        return module

    yield load
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def parse_command(recipe, values, workdir):
    """The parsed recipes of a command line with these values: one, or one per stage."""
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    command = ["launch.py", f"--config={ROOT / 'configs' / recipe}", *arguments]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    values(command)
    stages = config.value.stages.values() if "stages" in config.value else [config.value]
    return [parse(stage, workdir) for stage in stages]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_the_arms_of_the_coverage_script_have_valid_recipes(load_script, tmp_path):
    script = load_script("coverage", "--steps=7", "--stage1=s{seed}", "--prm=p{seed}")
    for combine, share in script.ARMS:
        values = script.settings("1", combine, share)
        (config,) = parse_command("stage1.py", values, tmp_path)
        assert config.init_from.endswith("/s1/checkpoints/sft")
        assert (config.online.steps, config.seed) == (7, 1)
        assert (config.reward.combine, config.data.world.annotated) == (combine, share)
        assert config.reward.prm.endswith("/p1" if combine != "verifier_only" else "")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_arms_of_the_curriculum_script_have_as_many_updates(load_script, tmp_path):
    script = load_script("curriculum", "--stage1=s{seed}")
    for arm in script.ARMS:
        recipe, values = script.settings(arm, "1")
        stages = parse_command(recipe, values, tmp_path)
        assert len(stages) == (1 if arm in ("no_curriculum", "plain") else 3)
        assert sum(stage.online.steps for stage in stages) == sum(script.UPDATES)
        assert stages[0].init_from.endswith("/s1/checkpoints/sft")
        sampled = any(stage.online.dynamic_sampling_rounds for stage in stages)
        assert sampled == (arm not in ("no_difficulty", "plain"))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_annotation_script_flips_a_tenth_and_trains_on_the_chosen_pairs(load_script, tmp_path):
    sizes = ("--pairs=20", "--candidates=300", "--evaluated=4,6", "--steps=7", "--stage1=s")
    script = load_script("annotation", f"--runs={tmp_path}", *sizes)
    examples = list(script.generate(script.world(), "train"))
    truth = {e.uid: e.steps | {"label": str(e.label)} for e in examples}
    line = {"steps": [], "label": 4, "confidence": None, "probabilities": None}
    tasks = [make_task(example, line, script.SCHEMA, ("",) * 3) for example in examples]
    said = list(script.annotations(tasks, truth))
    assert {row["step"] for row in said} == {"query", "product", "category", "attributes"}
    wrong = [row["value"] != truth[row["uid"]][row["step"]] for row in said]
    assert 0.07 < sum(wrong) / 600 < 0.13  # of the verdicts; the free text is right
    folder = tmp_path / "annotate"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text(json_lines(map(task_to_json, tasks[:20])))
    (folder / "choice.json").write_text(json.dumps({"chain": script.SCHEMA.options}))
    for count in (0, 5):
        table = script.arm_table(tmp_path, count)
        rows = [json.loads(row) for row in table.read_text().splitlines()]
        assert Counter(row["split"] for row in rows) == {"train": 20, "validation": 4, "test": 6}
        assert sum("steps" in row for row in rows) == count + 10
        assert all("label" in row for row in rows)
    (config,) = parse_command("stage1.py", script.settings(table), tmp_path)
    assert (config.online.steps, config.data.path) == (7, str(table))


def test_the_shares_of_the_headroom_script_by_hand(load_script):
    """Two rollouts of three pairs; of the third pair the truth of the step is not known."""
    script = load_script("headroom", "--checkpoint=x")
    greedy = [{"step": True, "label": True}, {"step": False, "label": True}, {"label": False}]
    sampled = [
        [{"step": True, "label": True}, {"step": True, "label": False}],
        [{"step": True, "label": False}, {"step": False, "label": False}],
        [{"label": True}, {"label": True}],
    ]
    table = script.shares(("step", "other", "label"), greedy, sampled)
    assert list(table) == ["step", "label"]
    assert table["step"] == (1 / 2, 3 / 4, 1, 1 / 2)
    assert table["label"] == pytest.approx((2 / 3, 1 / 2, 2 / 3, 1 / 3))


def test_the_rl_step_script_calls_the_library(load_script, monkeypatch):
    """Its calls are traced, not compiled."""
    sizes = {"layers": 1, "dim": 16, "ffn": 16, "heads": 2, "kv_heads": 1, "head_dim": 8}
    sizes |= {"vocab": 32, "prompts": 8, "group": 2, "prompt_len": 4, "new_tokens": 4, "micro": 1}
    sections = ("rollout", "logprobs", "train")
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    script = load_script("rl_step", *arguments, f"--sections={','.join(sections)}")

    def traced(call, _):
        jax.eval_shape(call)
        return {"seconds": {"median": 2.0}}

    rates = {"matmul_flops_per_s": 1e9, "bytes_per_s": 1e9}
    monkeypatch.setattr(script, "machine_rates", lambda dtype: rates)
    monkeypatch.setattr(script, "timed", traced)
    with jax.numpy_rank_promotion("allow"):
        result = script.measure()
    assert {name: result[name]["tokens_per_s"] for name in sections} == dict.fromkeys(sections, 32)


@pytest.mark.parametrize("name", ["filtering", "scaling"])
def test_a_script_imports(load_script, name):
    assert callable(load_script(name).main)
