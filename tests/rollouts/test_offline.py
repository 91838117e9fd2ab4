"""Training on chains that exist before the first update: which ones, their order, small runs."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from recipes import assert_same_run, config, lines

from she_jax.cot import CotSchema
from she_jax.data.shopworld.builder import World, generate
from she_jax.generate.generator import Generator, Sample
from she_jax.rewards.prm.model import StepScores
from she_jax.rollouts.offline import (
    OfflineConfig,
    accepted_by_prm,
    correct_rollouts,
    offline_prompts,
    preference_pairs,
    shuffled,
)
from she_jax.rollouts.prompt_source import PromptConfig, read_unsolved, unsolved_prompts
from she_jax.runs.config import parse
from she_jax.runs.run import run
from she_jax.runs.validate import _check_method
from she_jax.training.logging import MetricsWriter
from she_jax.types import UserError

SCHEMA = CotSchema()
GOLD = World(seed=4, pairs=(40, 0, 0, 0), chains="gold")


def sample(text, tokens=(1, 2), truncated=False):
    return Sample(tokens=tokens, text=text, chain=SCHEMA.parse(text), truncated=truncated)


def with_verdict(text, name, verdict):
    """A chain with another verdict of a step."""
    steps = dict(line.split(": ", 1) for line in text.split("\n"))
    head = steps[name].rpartition("=> ")[0]
    steps[name] = f"{head}=> {verdict}" if head else verdict
    return "\n".join(f"{key}: {rest}" for key, rest in steps.items())


@pytest.fixture(scope="module")
def pairs():
    return list(generate(GOLD, "train"))


def test_rollouts_that_agree_with_the_whole_annotation_are_kept_each_once(pairs):
    example = next(e for e in pairs if e.label == 4)
    good = example.rationale
    rows = [
        sample(good),
        sample(good, tokens=(1, 2)),
        sample(with_verdict(good, "category", "near")),  # the correct label for a wrong reason
        sample(with_verdict(good, "label", "3")),
        sample(good, truncated=True),
        sample("label: 4"),
    ]
    kept = correct_rollouts([example], [rows], SCHEMA)
    assert [(pair.uid, rollout) for pair, rollout in kept] == [(example.uid, rows[0])]


class Prm:
    """A process reward model that calls some steps wrong and has no score for others."""

    def __init__(self, wrong=(), unknown=()):
        self._wrong, self._unknown = wrong, unknown

    def score(self, step_queries, key):
        del key
        steps = [step_query.step for step_query in step_queries]
        score = np.array([0.4 if step in self._wrong else 0.6 for step in steps], np.float32)
        known = np.array([step not in self._unknown for step in steps])
        return StepScores(score=score, known=known)


@pytest.mark.parametrize(
    ("prm", "accepted"),
    [
        (Prm(), True),
        (Prm(wrong=("query",)), False),
        (Prm(unknown=("query",)), True),  # nobody says that it is wrong
        (Prm(wrong=("category", "label")), True),  # both annotated
    ],
)
def test_a_process_reward_model_decides_on_steps_that_are_not_annotated(pairs, prm, accepted):
    few = replace(pairs[0], annotations=("category",))
    rollouts = [(few, sample(few.rationale)), (pairs[1], sample(pairs[1].rationale))]
    # Of the second pair all steps are annotated.
    assert accepted_by_prm(rollouts, prm, SCHEMA, jax.random.key(0)) == [accepted, True]


def test_a_preference_pair_is_a_correct_and_a_wrong_rollout_and_no_rollout_is_used_twice(pairs):
    correct = [pairs[0].rationale, pairs[0].rationale.replace("category: ", "category: so ")]
    label = str(pairs[0].label % 4 + 1)
    wrong = [with_verdict(correct[0], "label", label), "no chain", "no chain"]
    rows = [sample(text, tokens=(n,)) for n, text in enumerate([*correct, *wrong])]
    preferences = preference_pairs([pairs[0]], [rows], seed=0)
    assert len(preferences) == 2
    assert {chosen.tokens for chosen, _ in preferences} == {(0,), (1,)}
    assert {rejected.tokens for _, rejected in preferences} <= {(2,), (3,), (4,)}
    assert len({rejected.tokens for _, rejected in preferences}) == 2
    assert preference_pairs([pairs[0]], [rows[:2]], seed=0) == []
    cut = [sample(correct[0], truncated=True), rows[2]]  # correct, but without an end
    assert preference_pairs([pairs[0]], [cut], seed=0) == []
    assert preference_pairs([pairs[0]], [rows[2:]], seed=0) == []


def test_equal_preference_pairs_count_once(pairs):
    correct = sample(pairs[0].rationale, tokens=(0,))
    texts = ["no chain", "no chain", "none"]
    wrong = [sample(text, tokens=(n,)) for n, text in enumerate(texts, 1)]
    # Twice the same correct rollout: another wrong one makes no second pair.
    assert len(preference_pairs([pairs[0]], [[correct, correct, *wrong]], seed=0)) == 1
    # Twice the same prompt, with the same rollouts.
    assert len(preference_pairs([pairs[0]] * 2, [[correct, wrong[0]]] * 2, seed=0)) == 1
    other = sample(pairs[1].rationale, tokens=(9,))
    groups = [[correct, wrong[0]], [other, wrong[0]]]
    assert len(preference_pairs(pairs[:2], groups, seed=0)) == 2


def test_each_row_comes_once_an_epoch_and_the_order_is_a_function_of_the_step():
    rows = list(range(10))
    series = [row for step in range(5) for row in shuffled(rows, 4, step, seed=3)]
    assert sorted(series[:10]) == sorted(series[10:]) == rows
    assert series[:10] != series[10:]
    assert shuffled(rows, 4, 2, seed=3) == series[8:12]


@pytest.mark.parametrize("balance", [False, True])
def test_the_prompts_are_those_that_online_training_draws(pairs, balance):
    prompts = parse(config(rl__steps=3, data__balance=balance), Path("unused")).prompts
    pool = prompts.pool(pairs, {})
    online = [example.uid for _ in range(3) for example in pool.draw()]
    assert [example.uid for example in offline_prompts(prompts, 0, pairs)] == online
    assert len(set(online)) == 3 * prompts.prompts
    few = offline_prompts(prompts, prompts.prompts + 1, pairs)  # offline.pairs
    assert [example.uid for example in few] == online[: prompts.prompts + 1]


def test_unsolved_prompts_and_new_ones_come_in_the_given_shares(pairs):
    source = pairs[:20]
    uids = [example.uid for example in source]
    unsolved, seen = set(uids[:6]), set(uids[:12])  # and so eight are new

    def drawn(count, share, seed=0):
        stage = PromptConfig(prompts=1, steps=count, seed=seed, unsolved_share=share)
        rows = unsolved_prompts(unsolved, seen, source, stage)
        drawn_uids = [example.uid for example in rows]
        assert len(set(drawn_uids)) == len(drawn_uids)
        assert not set(drawn_uids) & (seen - unsolved)
        return drawn_uids, len(set(drawn_uids) & unsolved)

    assert drawn(4, 1.0)[1] == 4
    assert drawn(4, 0.5)[1] == 2
    assert drawn(8, 1.0)[1] == 6  # no more are unsolved: new ones make up for them
    drawn_uids, again = drawn(12, 0.25)  # no more are new: unsolved ones make up for them
    assert (len(drawn_uids), again) == (12, 4)
    assert len(drawn(99, 0.5)[0]) == 6 + 8  # no more are left
    assert drawn(8, 0.5) == drawn(8, 0.5)
    assert drawn(8, 0.5) != drawn(8, 0.5, seed=1)
    stage = PromptConfig(prompts=8, steps=1, seed=0, unsolved_share=1.0)
    with pytest.raises(UserError, match="found a correct chain for every pair"):
        unsolved_prompts(set(), set(uids), source, stage)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_number_of_rows_that_does_not_divide_into_twos_is_refused(method):
    recipe = config(method=method, rl__prompts=3, rl__group_size=3)
    with pytest.raises(UserError, match=f"= 9 rows: method='{method}' takes them two by two"):
        _check_method(parse(recipe, Path("unused")))


@pytest.mark.parametrize(
    ("config_class", "values", "message"),
    [
        (OfflineConfig, {"chains": "mine"}, "offline.chains='mine': expected one of"),
        (OfflineConfig, {"pairs": -1}, "offline.pairs=-1: expected 0"),
        (OfflineConfig, {"beta": 0.0}, "offline.beta=0.0: expected a positive"),
        (OfflineConfig, {"beta": float("nan")}, "offline.beta=nan: expected a positive"),
        (PromptConfig, {"difficulty": "odd"}, "rl.difficulty='odd': expected one of"),
        (PromptConfig, {"unsolved_share": 1.5}, "rl.unsolved_share=1.5: expected a share"),
    ],
)
def test_values_out_of_range_are_refused(config_class, values, message):
    sizes = {
        OfflineConfig: {
            "group_size": 2, "rows": 4, "micro_batches": 1, "pairs": 0, "seed": 0, "batch_size": 2
        },
        PromptConfig: {"prompts": 2, "steps": 1, "seed": 0},
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        config_class(**sizes[config_class] | values)


# ------------------------------------------------------------------------------- whole runs


def encoded(generator, texts):
    """Samples with these texts, their tokens cut to what a completion may have, and their end."""
    ids, end = generator.prompts.encode(texts), generator.prompts.eos_ids[0]
    return [sample(text, (*row[-20:], end)) for text, row in zip(texts, ids, strict=True)]


def half_correct(self, params, examples, k, seed, show):
    """Samples the gold chain, and one with a wrong label. The small policy writes no chain."""
    return [
        encoded(self, [e.rationale, with_verdict(e.rationale, "label", str(e.label % 4 + 1))])
        for e in examples
    ]


def recipe_from(policy, method, **changes):
    """A run that starts from the cold start of a small policy, on pairs with gold chains."""
    start = {"init_from": str(policy / "checkpoints" / "sft"), "method": method}
    return config(**start | {"shopworld__chains": "gold", "eval__pass_k": 0} | changes)


@pytest.fixture
def sampled(monkeypatch):
    monkeypatch.setattr(Generator, "sample", half_correct)


@pytest.fixture(scope="module")
def dpo(policy, tmp_path_factory):
    """The folder of an uninterrupted DPO run, not to be changed."""
    workdir = tmp_path_factory.mktemp("dpo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "sample", half_correct)
        run(recipe_from(policy, "dpo"), workdir)
    return workdir


def check_offline_run(workdir, phase, sampled):
    """Returns the metrics of the updates."""
    summary = json.loads((workdir / "summary.json").read_text())
    assert (summary["sampled_tokens"] > 0) == sampled
    rows = [row for row in lines(workdir) if row["phase"] == phase]
    assert [row["step"] for row in rows] == [*range(1, len(rows) + 1)]
    assert {row["phase"] for row in lines(workdir)} == {phase, "eval"}
    if sampled:  # the chains took a while, before the first update
        whole = (workdir / "metrics.jsonl").read_text().splitlines()
        seconds = [json.loads(line).get("time/preparation", 0.0) for line in whole]
        assert sum(seconds) == max(seconds) > 0.0
    return rows


@pytest.mark.parametrize("chains", ["written", "rejection"])
def test_rejection_sampling_leaves_the_files_of_a_run(policy, tmp_path, sampled, chains):
    run(recipe_from(policy, "sft", offline__chains=chains, rl__steps=3), tmp_path / "run")
    rows = check_offline_run(tmp_path / "run", "rft", sampled=chains == "rejection")
    assert len(rows) == 3
    assert (tmp_path / "run" / "unsolved.json").is_file() == (chains == "rejection")


def test_dpo_leaves_the_files_of_a_run(dpo):
    rows = check_offline_run(dpo, "dpo", sampled=True)
    assert len(rows) == 4
    assert rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)  # the policy is its reference
    assert rows[1]["loss"] != rows[0]["loss"]


@pytest.mark.slow
def test_trap_11_a_dpo_run_stopped_while_sampling_and_killed_later_equals_an_uninterrupted_one(
    policy, dpo, tmp_path, sampled, monkeypatch, capsys
):
    def signaled(self, params, examples, k, seed, show):
        os.kill(os.getpid(), signal.SIGTERM)
        show(1)
        raise AssertionError("it continues to sample")

    recipe, workdir = recipe_from(policy, "dpo"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "sample", signaled)
        with pytest.raises(SystemExit) as left:
            run(recipe, workdir)
    assert left.value.code == 143
    assert "SIGTERM: the same command samples these rollouts anew" in capsys.readouterr().out
    assert not (workdir / "summary.json").exists()

    write = MetricsWriter.write

    def die(self, phase, step, values):
        write(self, phase, step, values)
        if (phase, step) == ("dpo", 3):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", die)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, workdir)
    run(recipe, workdir)
    assert_same_run(workdir, dpo)


def test_a_run_whose_updates_are_done_samples_no_more(policy, dpo, tmp_path, monkeypatch):
    """Killed between its last checkpoint and its summary."""
    shutil.copytree(dpo, tmp_path / "run")
    summary = tmp_path / "run" / "summary.json"
    summary.unlink()
    monkeypatch.delattr(Generator, "sample")
    run(recipe_from(policy, "dpo"), tmp_path / "run")
    assert summary.read_bytes() == (dpo / "summary.json").read_bytes()


def test_a_run_continues_with_the_chains_it_began_with_or_not_at_all(
    policy, dpo, tmp_path, monkeypatch
):
    shutil.copytree(dpo, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "policy" / "4")

    def reversed_groups(self, *args):
        return half_correct(self, *args)[::-1]

    monkeypatch.setattr(Generator, "sample", reversed_groups)
    with pytest.raises(UserError, match="not those of the last checkpoint"):
        run(recipe_from(policy, "dpo"), tmp_path / "run")


@pytest.mark.slow
def test_rl_can_train_on_the_prompts_that_rejection_sampling_left_unsolved(
    policy, tmp_path, monkeypatch
):
    def two_labels(self, params, examples, k, seed, show):
        """All rollouts of two labels are correct, and none of the others."""
        texts = [e.rationale if e.label in (1, 4) else "no chain" for e in examples]
        return [[rollout] * k for rollout in encoded(self, texts)]

    small = {"rl__steps": 2}
    sft = {"rl__prompts": 16, "rl__group_size": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "sample", two_labels)
        run(recipe_from(policy, "sft", **small, **sft), tmp_path / "sft")
    record = json.loads((tmp_path / "sft" / "unsolved.json").read_text())
    unsolved, seen = record["unsolved"], record["seen"]
    assert 0 < len(unsolved) < len(seen) == 2 * 16
    checkpoints = str(tmp_path / "sft" / "checkpoints" / "policy")
    assert read_unsolved(checkpoints) == (set(unsolved), set(seen))

    after = {"init_from": checkpoints, "rl__unsolved_share": 1.0} | small
    prompts, pool = [], PromptConfig.pool

    def recorded_pool(self, source, rates):
        prompts.extend(source)
        return pool(self, source, rates)

    with monkeypatch.context() as patch:
        patch.setattr(PromptConfig, "pool", recorded_pool)
        run(recipe_from(policy, "rl", **after), tmp_path / "rl")
    assert prompts
    assert {example.uid for example in prompts} <= set(unsolved)
    assert {example.label for example in prompts} == {2, 3}

    with pytest.MonkeyPatch.context() as patch:  # a second round, with few unsolved prompts
        patch.setattr(Generator, "sample", two_labels)
        run(recipe_from(policy, "sft", **after, **sft), tmp_path / "again")
    again = json.loads((tmp_path / "again" / "unsolved.json").read_text())
    new = set(again["seen"]) - set(seen)
    assert set(again["seen"]) > set(seen)
    assert len(new) == 2 * 16 - len(unsolved)
    # The earlier ones are still unsolved, and so are some of the new ones.
    assert set(unsolved) < set(again["unsolved"]) < set(unsolved) | new

    with pytest.raises(UserError, match="needs the pairs of that run"):
        run(recipe_from(policy, "rl", **after, shopworld__seed=7), tmp_path / "others")
    with pytest.raises(FileNotFoundError, match=r"has no unsolved\.json"):
        run(recipe_from(policy, "rl", **small, rl__unsolved_share=1.0), tmp_path / "online")
    for other in ({"init_from": ""}, {"filter__pairs": 8}):
        with pytest.raises(UserError, match="takes the prompts that an earlier rejection sampling"):
            run(recipe_from(policy, "rl", **after | other), tmp_path / "neither")


def test_a_pair_without_a_label_is_not_an_unsolved_one(policy, tmp_path, monkeypatch, capsys):
    prompts = []

    def one_label(self, params, examples, k, seed, show):
        prompts.extend(examples)
        texts = [e.rationale if e.label == 4 else "no chain" for e in examples]
        return [[rollout] for rollout in encoded(self, texts)]

    monkeypatch.setattr(Generator, "sample", one_label)
    run(recipe_from(policy, "sft", shopworld__annotated=0.5), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "unsolved.json").read_text())
    assert set(record["unsolved"]) == {e.uid for e in prompts if e.label in (1, 2, 3)}
    unlabeled = {example.uid for example in prompts if example.label is None}
    assert unlabeled
    assert unlabeled < set(record["seen"])
    message = f"{len(unlabeled)} of {len(record['seen'])} pairs have no label"
    assert message in capsys.readouterr().out


def test_a_policy_without_any_correct_rollout_is_an_error(policy, tmp_path, monkeypatch):
    def no_chain(self, params, examples, k, seed, show):
        return [[sample("no chain")] * k for _ in examples]

    monkeypatch.setattr(Generator, "sample", no_chain)
    for method, message in (("sft", "no rollout is correct"), ("dpo", "no group has both")):
        with pytest.raises(UserError, match=message):
            run(recipe_from(policy, method, shopworld__chains="teacher"), tmp_path / method)


@pytest.mark.parametrize("coverage", [1.0, 0.5])
def test_without_updates_a_run_ends_with_the_cold_start(policy, tmp_path, monkeypatch, coverage):
    """And the same pairs are not evaluated again, however many of their steps are annotated."""
    monkeypatch.delattr(Generator, "greedy")
    changes = {"shopworld__chains": "teacher", "shopworld__coverage": coverage, "rl__steps": 0}
    run(recipe_from(policy, "rl", **changes), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before = json.loads((policy / "eval" / "before.json").read_text())
    assert summary == before | {"before": before}
    assert np.isfinite(summary["macro_f1"])
    validation = "eval/step_000000_validation.json"  # for runs that start from it
    assert (tmp_path / "run" / validation).read_text() == (policy / validation).read_text()
    assert not (tmp_path / "run" / "checkpoints" / "policy").exists()
