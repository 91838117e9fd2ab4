"""The jobs of the study: their order, what they need, their configs, the choice of a rate."""

from dataclasses import replace
from pathlib import Path

import pytest
from small_study import small_config
from stand_in import write_metrics

from benchmarks.evidence.plan import (
    Job,
    best_rate,
    chosen_job,
    job_config,
    plan_jobs,
    rate_scores,
    rates_to_try,
    selected_arms,
)
from she_jax.recipes import evidence as recipe
from she_jax.recipes import stage1


def names(config):
    return [job.name for job in plan_jobs(config, config.order)]


# ---------------------------------------------------------------------- the plan


def test_cold_starts_come_first_then_the_rates_of_the_first_seed_then_the_other_seeds():
    config = small_config({"base": {"trained": False, "seeds": 2}, "grpo": {"seeds": 2}})
    assert names(config) == [
        "seed0/start-main",
        "seed1/start-main",
        "seed0/grpo-0.0001",
        "seed0/grpo-0.0003",
        "seed1/grpo-rate",
    ]
    last = plan_jobs(config, config.order)[-1]
    assert last.needs == ("seed1/start-main",)
    assert last.after == ("seed0/grpo-0.0001", "seed0/grpo-0.0003")


def test_an_arm_with_the_rate_of_another_needs_its_runs():
    """Also if no other arm is selected. Its cold start is run as well."""
    config = small_config({"grpo": {}, "other": {"start": "checks_2", "tuned": "grpo"}})
    jobs = plan_jobs(config, ["other"])
    assert [job.name for job in jobs] == [
        "seed0/start-main",
        "seed0/grpo-0.0001",
        "seed0/grpo-0.0003",
        "seed0/start-checks_2",
        "seed0/other-rate",
    ]
    assert (jobs[-1].rate_arm, jobs[-1].needs) == ("grpo", ("seed0/start-checks_2",))


def test_reward_models_come_before_the_arms_that_need_them():
    """The process one once, of the first seed; the outcome one for each seed: it reads tokens."""
    settings = {"reward.prm": recipe.PRM, "reward.orm": recipe.ORM}
    config = small_config({"arm": {"seeds": 2, "tuned": False, "settings": settings}})
    jobs = plan_jobs(config, config.order)
    assert [job.name for job in jobs] == [
        "seed0/start-main",
        "prm-main",
        "seed0/orm-main",
        "seed0/arm-0.0003",
        "seed1/start-main",
        "seed1/orm-main",
        "seed1/arm-0.0003",
    ]
    assert jobs[-1].needs == (
        "seed1/start-main",
        "seed0/start-main",
        "prm-main",
        "seed1/orm-main",
    )
    arm = job_config(config, Path("runs/x"), jobs[-1])
    assert arm.reward.prm == "runs/x/prm-main"
    assert arm.reward.orm == "runs/x/seed1/orm-main"
    prm = job_config(config, Path("runs/x"), jobs[1])
    assert (prm.kind, prm.checkpoint) == ("reward_model", "runs/x/seed0/start-main")
    orm = job_config(config, Path("runs/x"), jobs[-2])
    assert (orm.kind, orm.checkpoint) == ("scalar_reward", "runs/x/seed1/start-main")


def test_a_job_is_the_recipe_with_what_its_arm_changes():
    settings = {"rl.srpo.w_step": 0.5}
    config = small_config({"arm": {"start": "checks_2", "settings": settings, "seeds": 2}})
    job = Job(kind="arm", target="arm", seed=1, rate=1e-3)
    arm = job_config(config, Path("w"), job)
    assert (arm.rl.srpo.w_step, arm.rl.learning_rate, arm.chain.checks) == (0.5, 1e-3, 2)
    assert (arm.seed, arm.shopworld.seed, arm.data.dir) == (1, 1, "w/data")
    assert arm.init_from == "w/seed1/start-checks_2/checkpoints/sft"
    start = job_config(config, Path("w"), Job(kind="start", target="checks_2", seed=1))
    assert (start.init_from, start.rl.steps, start.data.dir) == ("", 0, arm.data.dir)
    assert arm.sft == start.sft
    assert config.recipe.rl.srpo.w_step == 1.0  # the recipe itself is unchanged


@pytest.mark.parametrize("stages", [{}, {"a": {}}])
def test_a_jobs_seed_is_added_to_those_of_the_config(stages):
    """None is ignored: another prm.seed is another process reward model, of the same pairs."""
    config = small_config({"arm": {"stages": stages}}).unlock()
    config.update_from_flattened_dict({"prm.seed": 30, "orm.seed": 40})
    arm, prm, orm = (
        job_config(config, Path("w"), Job(kind=kind, target=target, seed=1, rate=1e-4))
        for kind, target in (("arm", "arm"), ("prm", "main"), ("orm", "main"))
    )
    first = arm.stages.a if stages else arm
    assert (arm.seed, first.seed, first.shopworld.seed) == (1, 1, 1)
    assert (prm.seed, orm.seed) == (31, 41)
    config.recipe.shopworld.seed = 2
    with pytest.raises(ValueError, match=r"shopworld\.seed=2: expected 0, they are those of seeds"):
        job_config(config, Path("w"), Job(kind="start", target="main", seed=1))


def test_an_arm_without_seeds_is_run_on_request_only():
    config = small_config({"base": {"trained": False}, "grpo": {"seeds": 0}})
    assert [job.target for job in plan_jobs(config, selected_arms(config))] == ["main"]
    with pytest.raises(ValueError, match=r"'grpo' has no seeds .*; set --config.arms.grpo.seeds"):
        selected_arms(small_config({"grpo": {"seeds": 0}}, only="grpo"))


def test_the_stages_of_a_curriculum_keep_the_proportions_of_their_rates():
    stages = {"a": {"rl.steps": 40}, "b": {"rl.steps": 20, "rl.learning_rate": 1e-4}}
    config = small_config({"she": {"stages": stages}})
    run = job_config(config, Path("w"), Job(kind="arm", target="she", seed=0, rate=6e-4))
    assert run.kind == "curriculum"
    assert [stage.rl.learning_rate for stage in run.stages.values()] == pytest.approx([6e-4, 2e-4])
    assert [stage.rl.steps for stage in run.stages.values()] == [40, 20]
    assert run.stages.a.init_from == "w/seed0/start-main/checkpoints/sft"
    assert run.stages.b.init_from == ""


def test_a_stage_may_name_a_reward_model():
    """The reward model is trained before the arm, as if the settings named it."""
    stages = {"a": {}, "b": {"reward.prm": recipe.PRM}}
    config = small_config({"she": {"stages": stages, "tuned": False}})
    job = plan_jobs(config, config.order)[-1]
    assert job.needs == ("seed0/start-main", "prm-main")
    run = job_config(config, Path("w"), job)
    assert [stage.reward.prm for stage in run.stages.values()] == ["", "w/prm-main"]


@pytest.mark.parametrize("arg", ["", "model=smollm2,data=esci", "data=jsonl"])
def test_every_job_of_the_real_recipe_has_a_config(arg):
    """No two jobs have the same name, and no arm changes a key that the recipe does not have."""
    config = recipe.get_config(arg)
    assert len(config.order) == len(recipe.OTHER_PAIRS if arg else recipe.ARMS)
    assert selected_arms(config) == list(config.order)
    jobs = plan_jobs(config, config.order)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        before = {earlier.name for earlier in jobs[: jobs.index(job)]}
        assert before.issuperset(job.needs + job.after)
        assert job_config(config, Path("w"), replace(job, rate=job.rate or 1e-4)).is_locked


def test_other_pairs_are_learned_from_in_four_ways_at_the_sizes_of_stage_1():
    arg = "model=smollm2,data=esci"
    config, single = recipe.get_config(arg), stage1.get_config(arg)
    assert config.order == ("cold_start", "grpo", "srpo", "sft", "dpo")
    assert {arm.seeds for arm in config.arms.values()} == {3}
    for name in config.order[1:]:
        run = job_config(config, Path("w"), Job(kind="arm", target=name, seed=1, rate=1e-5))
        assert (run.model, run.sft, run.data.name) == (single.model, single.sft, "esci")
        assert (run.rl.prompts, run.rl.steps) == (single.rl.prompts, single.rl.steps)
        prompts = (run.rl.difficulty, run.rl.dynamic_sampling_rounds, run.filter.pairs)
        assert prompts == ("even", 0, 0)


def test_no_arm_is_given_more_rows_or_rollouts_than_another():
    config = recipe.get_config()
    for name, arm in config.arms.items():
        if not arm.trained:
            continue
        job = Job(kind="arm", target=name, seed=0, rate=1e-4)
        run = job_config(config, Path("w"), job)
        stages = list(run.stages.values()) if arm.stages else [run]
        whole = arm.table in ("main", "a fifth annotated", "checks")
        updates = config.recipe.rl.steps // (1 if whole else 4)
        assert sum(stage.rl.steps for stage in stages) == updates, name
        assert {stage.rl.prompts * stage.rl.group_size for stage in stages} == {64}, name
        sampled = [s for s in stages if s.method != "sft" or s.offline.chains == "rejection"]
        assert not any(
            s.offline.pairs or s.rl.dynamic_sampling_rounds or s.filter.pairs for s in sampled
        ), name


def test_srpo_ignores_negative_advantages_and_other_estimators_do_not():
    config, checked = recipe.get_config(), []
    for name, arm in config.arms.items():
        run = job_config(config, Path("w"), Job(kind="arm", target=name, seed=0, rate=1e-4))
        for stage in list(run.stages.values()) if arm.stages else [run]:
            if arm.trained and stage.method == "rl":
                positive_only = (stage.rl.estimator == "srpo") != name.endswith(("_sign", "_signs"))
                assert stage.rl.negative_advantage_weight == (0 if positive_only else 1), name
                checked.append(name)
    assert {"annotated_srpo", "srpo_both_signs", "grpo_one_sign", "she"} <= set(checked)


# ---------------------------------------------------------------------- the rates


def test_the_rate_with_the_best_validation_score_is_chosen(tmp_path):
    config = small_config({"grpo": {"seeds": 2}}, rates=(1e-3, 3e-4, 1e-4))
    assert chosen_job(config, "grpo", {}).rate is None
    for rate, score in ((1e-3, 0.5), (3e-4, 0.7), (1e-4, 0.6)):
        write_metrics(tmp_path / f"seed0/grpo-{rate:g}", score)
    scores = rate_scores(config, tmp_path, "grpo")
    assert scores == {1e-4: 0.6, 3e-4: 0.7, 1e-3: 0.5}
    assert chosen_job(config, "grpo", scores).name == "seed0/grpo-0.0003"


def test_a_rate_with_a_score_of_zero_was_tried_too(tmp_path):
    config = small_config({"grpo": {}}, rates=(1e-4,))
    write_metrics(tmp_path / "seed0/grpo-0.0001", 0.0)
    assert rate_scores(config, tmp_path, "grpo") == {1e-4: 0.0}


def test_of_rates_with_the_same_score_the_lowest_is_chosen():
    assert best_rate({3e-4: 0.7, 1e-4: 0.7, 1e-3: 0.6}) == 1e-4


@pytest.mark.parametrize(
    ("known", "rates"),
    [
        ((), (2, 3, 4)),
        ((0, 0, 7, 8, 7, 0, 0), (2, 3, 4)),
        ((0, 0, 0, 0, 1, 2, 1), (2, 3, 4, 5, 6)),  # 5 is best, and 6 shows that it is
        ((9, 8, 7, 6, 5, 4, 3), (0, 1, 2, 3, 4)),
        ((9, 3, 7, 6, 5, 4, 3), (1, 2, 3, 4)),  # 0 is not tried, so its score is never known
        ((8, 8, 8, 8, 8, 8, 8), (0, 1, 2, 3, 4)),
        ((None, None, None, None, 1, 0, 0), (2, 3, 4, 5)),
    ],
)
def test_rates_are_tried_outwards_as_long_as_the_outermost_is_best(known, rates):
    config = small_config({"grpo": {}}, rates=(6.0, 5.0, 0.0, 1.0, 2.0, 3.0, 4.0))
    scores = {float(n): score for n, score in enumerate(known) if score is not None}
    assert rates_to_try(config, scores) == list(rates)


def test_few_rates_are_all_tried():
    for rates in ((1e-4,), (1e-4, 3e-4), (3e-5, 1e-4, 3e-4)):
        config = small_config({"grpo": {}}, rates=rates)
        assert rates_to_try(config, {}) == list(rates)
        assert [job.after for job in plan_jobs(config, ["grpo"])] == [()] * (1 + len(rates))


def test_the_best_score_is_that_of_all_stages(tmp_path):
    config = small_config({"she": {}}, rates=(1e-4,))
    folder = tmp_path / "seed0/she-0.0001"
    for stage, score in (("stage1", 0.8), ("stage2", 0.7)):
        write_metrics(folder / stage, score)
    (folder / "summary.json").write_text("{}")
    assert rate_scores(config, tmp_path, "she") == {1e-4: 0.8}
