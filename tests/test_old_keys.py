"""Old config keys and values on the command line: the answer is the new one."""

import subprocess
import sys

import pytest
from recipes import ROOT

from she_jax.recipes import base, evidence, renamed, reward_model, scalar_reward, stage2
from she_jax.runs.launch import recipe_items


@pytest.mark.parametrize(
    ("recipe", "argument", "old", "new"),
    [
        ("stage1", "--config.rl.kl_weight=0.1", "rl.kl_weight", "rl.kl_coef"),
        ("stage1", "--noconfig.start", "start", "init_from"),
        ("stage2", "--config.before.rl.aim=hard", "before.rl.aim", "prerequisite.rl.difficulty"),
        ("curriculum", "--config.stages.stage1.rl.tol=0", "stages.stage1.rl.tol",
         "stages.stage1.rl.min_std"),
        ("reward_model", "--config.examiner.pairs=8", "examiner.pairs", "prm.pairs"),
        ("evidence", "--config.scalar.scalar.pairs=8", "scalar.scalar.pairs", "orm.orm.pairs"),
        ("stage1", "--config.method=online", "method=online", "method=rl"),
        ("curriculum", "--config.data.name=made", "data.name=made", "data.name=prepared"),
    ],
)  # fmt: skip
def test_an_old_name_is_answered_with_the_new_one(tmp_path, recipe, argument, old, new):
    command = [sys.executable, "launch.py", f"--config=configs/{recipe}.py"]
    command += [f"--workdir={tmp_path / 'run'}", argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == f"launch.py: --config.{old}: renamed, use --config.{new}\n"
    assert (done.stdout, done.returncode) == ("", 2)
    assert not (tmp_path / "run").exists()


def test_every_old_key_is_gone_and_every_new_key_is_there():
    recipes = (base, stage2, reward_model, scalar_reward, evidence)
    keys = {key for recipe in recipes for key in recipe_items(recipe.get_config())}
    assert keys.isdisjoint(renamed.KEYS)
    assert keys.issuperset(renamed.KEYS.values())


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("rl.negative", "rl.negative_advantage_weight"),
        ("before.before.start", "prerequisite.prerequisite.init_from"),
        ("examiner.solve.steps", "prm.reference_sft.steps"),
        ("reward.model", "reward.prm"),
        ("reward.model_weight", "reward.model_weight"),
        ("model.dim", "model.dim"),
        ("starts.main", "starts.main"),
        ("filter.tol", "filter.tol"),
    ],
)
def test_only_whole_parts_of_a_key_are_renamed(key, expected):
    assert renamed.new_key(key) == expected


def test_only_old_values_of_their_keys_are_renamed():
    assert renamed.new_value("recipe.data.name", "made") == "prepared"
    assert renamed.new_value("stages.stage2.method", "online") == "rl"
    for key, value in (("data.path", "made"), ("method", "dpo"), ("data.name", "")):
        assert renamed.new_value(key, value) is None
