"""Runs that train a scalar reward model, small and whole, and the scoring of rollouts with one."""

import dataclasses
import json
import shutil
import zlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from recipes import FOUR_STEPS, changed, config, good_rows, lines, make_dataset
from she_jax.runs.policy_run import INHERITED

from configs import scalar_reward
from she_jax.generate.language_model import LanguageModel
from she_jax.rewards.orm.dataset import (
    Outcome,
    OutcomeSampler,
    as_rollout,
    contrastive_pairs,
    read_outcomes,
)
from she_jax.rewards.orm.metrics import orm_metrics
from she_jax.rewards.orm.model import ORM, load_orm
from she_jax.runs import outcome_reward as scalar_training
from she_jax.runs.run import run
from she_jax.training.setup import make_policy
from she_jax.types import Example, Rollout

SCALAR_RUN = FOUR_STEPS | {
    "orm.pairs": 16,
    "orm.rollouts": 2,
    "orm.eval_pairs": 6,
    "orm.batch_size": 16,
}
SPLITS = ("train", "test", "test_longtail")


def chance(chain, example, *, truncated):
    """In place of the outcome: the chains of a policy of six steps are all wrong."""
    return zlib.crc32(f"{chain} {example.uid} {truncated}".encode()) % 2


def scalar_config(policy, **changes):
    return changed(scalar_reward.get_config(), SCALAR_RUN | {"checkpoint": str(policy)}, **changes)


@pytest.fixture(scope="module")
def scalar(policy, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("scalar") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scalar_training, "outcome_reward", chance)
        run(scalar_config(policy), workdir)
    return workdir


def outcomes(workdir, split="train"):
    return read_outcomes(workdir / "outcomes" / f"{split}.jsonl")


def test_a_run_leaves_what_it_should(scalar):
    summary = json.loads((scalar / "summary.json").read_text())
    assert tuple(summary) == SPLITS
    told = {"n", "right", "mixed", "all_right", "all_wrong"}
    assert summary["train"].keys() == told
    assert summary["train"]["n"] == 16 * 2 * 2  # pairs, chains, policies
    for split in SPLITS[1:]:
        assert summary[split]["n"] == 6 * 2 * 2
        assert set(summary[split]["by_source"]) == {"sft", "srpo"}
        for figures in (summary[split], *summary[split]["by_source"].values()):
            assert {"accuracy", "auroc", "ece", "ranking"} | told <= figures.keys()
    assert [(row["phase"], row["step"]) for row in lines(scalar)] == [
        ("scalar_reward", step) for step in (1, 2, 3, 4)
    ]
    assert lines(scalar)[0]["loss"] == pytest.approx(np.log(2))  # it begins at 1/2


def test_it_learns_from_no_query_of_the_other_splits(scalar):
    queries = {split: {one.example.query for one in outcomes(scalar, split)} for split in SPLITS}
    assert all(queries.values())
    assert not queries["train"] & (queries["test"] | queries["test_longtail"])
    assert all(one.example.uid.startswith("train-") for one in outcomes(scalar))


def test_the_pairs_of_a_sorted_file_are_from_all_over_it(tmp_path, monkeypatch):
    given = [
        dataclasses.replace(row, example=dataclasses.replace(row.example, label=1 + n // 200))
        for n, row in enumerate(good_rows(800))
    ]
    seen = []

    def samples(own, examples, *_):
        seen.extend(examples)
        return []

    monkeypatch.setattr(scalar_training, "policy_samples", samples)
    own = ConfigDict({"data": {"name": "jsonl"}, "scalar": {"rollouts": 2, "batch_size": 2}})
    scalar_training.outcomes(own, tmp_path, make_dataset(tmp_path, given), "train", 160)
    assert len({pair.uid for pair in seen}) == 160
    assert min(np.bincount([pair.label for pair in seen], minlength=5)[1:]) >= 20  # 40 in the mean


def test_outcomes_are_the_tokens_that_were_sampled(scalar):
    prompts = make_policy(config(), scalar).format
    found = outcomes(scalar)
    rollout = as_rollout(found, prompts)
    assert prompts.texts(rollout) == [one.text for one in found]
    asked, _ = prompts.prompts([one.example for one in found])
    np.testing.assert_array_equal(rollout.tokens[:, : prompts.prompt_length], asked.tokens)
    np.testing.assert_array_equal(rollout.prompt_mask[:, : prompts.prompt_length], asked.mask)
    lengths = [len(one.tokens) for one in found]
    np.testing.assert_array_equal(rollout.completion_mask.sum(axis=1), lengths)


def test_a_resumed_run_equals_the_uninterrupted_one(policy, scalar, tmp_path, monkeypatch):
    from she_jax.train import metrics

    monkeypatch.setattr(scalar_training, "outcome_reward", chance)
    written = metrics.MetricsWriter.write

    def die(self, phase, step, values):
        written(self, phase, step, values)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsWriter, "write", die)
        with pytest.raises(KeyboardInterrupt):
            run(scalar_config(policy), tmp_path / "run")
    run(scalar_config(policy), tmp_path / "run")
    assert lines(tmp_path / "run") == lines(scalar)
    for name in ("summary.json", *(f"outcomes/{split}.jsonl" for split in SPLITS)):
        assert (tmp_path / "run" / name).read_bytes() == (scalar / name).read_bytes()


def test_outcomes_go_with_one_config(policy, scalar, tmp_path):
    """Chains that were sampled otherwise are not trained on."""
    for name in ("config.json", "outcomes"):
        (tmp_path / name).symlink_to(scalar / name)
    with pytest.raises(ValueError, match=r"scalar\.rollouts: 2 in the workdir, 3 now"):
        run(scalar_config(policy, orm__rollouts=3), tmp_path)


def test_it_learns_pairwise(policy, scalar, tmp_path, monkeypatch, capsys):
    """Of the chains that are there; to sample them anew takes long."""
    whole = scalar_training.outcomes

    def copied(own, workdir, made, split, pairs):
        (workdir / "outcomes").mkdir(exist_ok=True)
        shutil.copy(scalar / "outcomes" / f"{split}.jsonl", workdir / "outcomes")
        return whole(own, workdir, made, split, pairs)

    monkeypatch.setattr(scalar_training, "outcomes", copied)
    run(scalar_config(policy, orm__loss="pairwise"), tmp_path / "run")
    assert lines(tmp_path / "run")[0]["loss"] == pytest.approx(np.log(2))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    counts = summary["train"]
    assert counts["mixed"] + counts["all_right"] + counts["all_wrong"] == 16
    assert "test, pairwise" in capsys.readouterr().out


def test_it_scores_rollouts_whatever_their_number_and_padding(scalar):
    made = config(reward__orm=str(scalar), reward__batch_size=16)
    policy = make_policy(made, scalar)
    reward = load_orm(made, policy)
    rollout = as_rollout(outcomes(scalar, "test"), policy.format)  # 24 of them, so two batches
    scores = reward.score(rollout)
    assert scores.shape == (24,)
    assert scores.dtype == np.float32
    assert ((scores > 0) & (scores < 1)).all()
    assert len(np.unique(scores)) > 1
    few = jax.tree.map(lambda x: x[5:8], rollout)
    np.testing.assert_allclose(reward.score(few), scores[5:8], rtol=1e-5)
    wide = Rollout(
        **{name: np.pad(x, ((0, 0), (3, 2))) for name, x in vars(jax.device_get(few)).items()}
    )
    np.testing.assert_allclose(reward.score(wide), scores[5:8], rtol=1e-5)
    figures = json.loads((scalar / "summary.json").read_text())["test"]
    right = [one.right for one in outcomes(scalar, "test")]
    assert np.mean((scores >= 0.5) == right) == pytest.approx(figures["accuracy"])


def test_a_policy_is_rewarded_by_its_score(scalar, tmp_path):
    changes = {"rl__steps": 1, "rl__eval_every": 1, "eval__pass_k": 0}
    made = config(reward__orm=str(scalar), reward__batch_size=16, **changes)
    run(made, tmp_path / "run")
    (row,) = (row for row in lines(tmp_path / "run") if row["phase"] == "srpo")
    assert 0 < row["reward"] < 1
    assert row["outcome"] == 0  # the verifier's: nothing is well formed yet
    assert row["zero_variance"] == 1  # and by its word no group tells anything
    assert row["grad_norm"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reward__orm": "nowhere"}, FileNotFoundError, "scalar=nowhere: there is no scalar re"),
        ({"reward__orm": "POLICY"}, ValueError, "is a run of kind 'train', not 'scalar_reward'"),
        ({"reward__prm": "SCALAR"}, ValueError, "is a run of kind 'scalar_reward', not 'reward_"),
        (
            {"reward__orm": "SCALAR", "chain__checks": 2},
            ValueError,
            r"is for chains of the steps \('query', .*and the policy writes \('query', .*check_1",
        ),
    ],
)
def test_a_wrong_folder_is_an_error_before_anything_is_made(
    policy, scalar, tmp_path, changes, error, message
):
    places = {"POLICY": str(policy), "SCALAR": str(scalar)}
    changes = {k: places.get(v, v) for k, v in changes.items()}
    with pytest.raises(error, match=message):
        run(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_an_error(scalar, tmp_path):
    made = config(reward__orm=str(scalar))
    own = make_policy(made, scalar)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", ORM.identity, "checkpoints", "summary.json"):
        (other / name).symlink_to(scalar / name)
    tokenizer = json.loads((scalar / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    stranger = make_policy(made, other)
    with pytest.raises(
        ValueError, match=r"reads other tokens than the policy writes \(another tok"
    ):
        load_orm(made, stranger)
    chatty = LanguageModel(**vars(own) | {"format": dataclasses.replace(own.format, eos_ids=(7,))})
    with pytest.raises(ValueError, match=r"\(another eos_ids\)"):
        load_orm(made, chatty)
    with pytest.raises(ValueError, match="tokenizer is not the one it was trained with"):
        load_orm(config(reward__orm=str(other)), stranger)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orm__loss": "listwise"}, "orm.loss='listwise': expected one of"),
        ({"orm__rollouts": 0}, "orm.rollouts=0: expected at least 1"),
        (
            {"orm__loss": "pairwise", "sft__batch_size": 9, "sft__micro_batches": 3}
            | {"mesh__fsdp": 1, "mesh__tensor": 8},
            "sft.batch_size=9: chains come in pairs",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(policy, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(scalar_config(policy, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_recipe_has_no_keys_for_what_is_the_policys():
    assert not set(INHERITED) & set(scalar_reward.get_config())


def outcome(uid, right, source="sft"):
    pair = Example(uid=uid, query="mug", product={"title": "mug"})
    return Outcome(example=pair, source=source, tokens=(5,), text="mug", right=right)


def test_figures_by_hand():
    pool = [
        *(outcome("a", True), outcome("a", False), outcome("a", False, "srpo")),
        *(outcome("b", True), outcome("b", True, "srpo"), outcome("b", False, "srpo")),
        *(outcome("c", True), outcome("d", False)),
    ]
    score = np.array([0.7, 0.2, 0.8, 0.6, 0.4, 0.6, 0.9, 0.1], np.float32)
    figures = orm_metrics(pool, score)
    assert (figures["n"], figures["right"]) == (8, 0.5)
    assert (figures["mixed"], figures["all_right"], figures["all_wrong"]) == (2, 1, 1)
    assert figures["accuracy"] == 5 / 8
    # Pair a: above one of two; pair b: a tie and one below.
    assert figures["ranking"] == (1 + 0 + 0.5 + 0) / 4
    own = figures["by_source"]["srpo"]
    assert (own["n"], own["mixed"], own["all_wrong"]) == (3, 1, 1)
    assert own["ranking"] == 0
    assert orm_metrics(pool[6:], score[6:])["ranking"] is None


def test_draws_of_pairs_are_a_right_and_a_wrong_chain_of_one_pair():
    pool = [outcome("a", True), outcome("b", False), outcome("b", True), outcome("b", True)]
    assert contrastive_pairs(pool) == ([([2, 3], [1])], 1, 0)
    drawn = OutcomeSampler(pool, "pairwise").draw(40, np.random.default_rng(0))
    assert [one.right for one in drawn] == [True, False] * 20
    assert {id(one) for one in drawn} == {id(one) for one in pool[1:]}
    drawn = OutcomeSampler(pool, "pointwise").draw(40, np.random.default_rng(0))
    assert {id(one) for one in drawn} == {id(one) for one in pool}
    with pytest.raises(ValueError, match="no chains: raise"):
        OutcomeSampler([], "pointwise")
    with pytest.raises(ValueError, match="no pair with a right and a wrong chain: raise scalar"):
        OutcomeSampler(pool[:2], "pairwise")
