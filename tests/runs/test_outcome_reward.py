"""Runs that train an outcome reward model, small and whole, and the scoring of rollouts with it."""

import dataclasses
import json
import shutil
import types
import zlib

import jax
import numpy as np
import pytest
from recipes import (
    FOUR_STEPS,
    changed,
    config,
    good_rows,
    lines,
    make_dataset,
    untrained_policy,
)

from she_jax.recipes import scalar_reward
from she_jax.rewards.orm.dataset import as_rollout, read_outcomes
from she_jax.rewards.orm.model import ORM, load_orm
from she_jax.runs import outcome_reward as orm_training
from she_jax.runs.config import INHERITED
from she_jax.runs.run import run
from she_jax.training.logging import MetricsWriter
from she_jax.types import Rollout, UserError

ORM_RUN = FOUR_STEPS | {
    "orm.pairs": 16,
    "orm.rollouts": 2,
    "orm.eval_pairs": 6,
    "orm.batch_size": 16,
}
SPLITS = ("train", "test", "test_longtail")


def random_outcome(chain, example, *, truncated):
    """Replaces the outcome reward: all chains of a policy of six steps are incorrect."""
    return zlib.crc32(f"{chain} {example.uid} {truncated}".encode()) % 2


def orm_config(policy, **changes):
    return changed(scalar_reward.get_config(), ORM_RUN | {"checkpoint": str(policy)}, **changes)


@pytest.fixture(scope="module")
def orm_run(policy, tmp_path_factory):
    """The folder of a finished run that trained an outcome reward model."""
    workdir = tmp_path_factory.mktemp("orm") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orm_training, "outcome_reward", random_outcome)
        run(orm_config(policy), workdir)
    return workdir


def read_chains(workdir, split="train"):
    return read_outcomes(workdir / "chains" / f"{split}.jsonl")


def test_a_run_leaves_its_results(orm_run):
    summary = json.loads((orm_run / "summary.json").read_text())
    assert tuple(summary) == SPLITS
    counts = {"n", "right", "mixed", "all_right", "all_wrong"}
    assert summary["train"].keys() == counts
    assert summary["train"]["n"] == 16 * 2 * 2  # pairs, chains, policies
    for split in SPLITS[1:]:
        assert summary[split]["n"] == 6 * 2 * 2
        assert set(summary[split]["by_source"]) == {"sft", "policy"}
        for metrics in (summary[split], *summary[split]["by_source"].values()):
            assert {"accuracy", "auroc", "ece", "ranking"} | counts <= metrics.keys()
    assert [(row["phase"], row["step"]) for row in lines(orm_run)] == [
        ("scalar_reward", step) for step in (1, 2, 3, 4)
    ]
    assert lines(orm_run)[0]["loss"] == pytest.approx(np.log(2))  # all probabilities begin at 1/2


def test_it_learns_from_no_query_of_the_other_splits(orm_run):
    queries = {
        split: {chain.example.query for chain in read_chains(orm_run, split)} for split in SPLITS
    }
    assert all(queries.values())
    assert not queries["train"] & (queries["test"] | queries["test_longtail"])
    assert all(chain.example.uid.startswith("train-") for chain in read_chains(orm_run))


def test_the_pairs_of_a_sorted_file_are_drawn_from_all_of_it(tmp_path, monkeypatch):
    rows = [
        dataclasses.replace(row, example=dataclasses.replace(row.example, label=1 + n // 200))
        for n, row in enumerate(good_rows(800))
    ]
    drawn = []

    def samples(config, examples, *_):
        drawn.extend(examples)
        return []

    monkeypatch.setattr(orm_training, "policy_samples", samples)
    config = types.SimpleNamespace(
        data=types.SimpleNamespace(shuffled=False),
        orm=types.SimpleNamespace(rollouts=2, batch_size=2),
    )
    orm_training.policy_chains(config, tmp_path, make_dataset(tmp_path, rows), "train", 160)
    assert len({pair.uid for pair in drawn}) == 160
    counts = np.bincount([pair.label for pair in drawn], minlength=5)[1:]  # 40 on average
    assert min(counts) >= 20


def test_chains_are_the_tokens_that_were_sampled(orm_run):
    prompts = untrained_policy(orm_run)[0].prompts
    chains = read_chains(orm_run)
    rollout = as_rollout(chains, prompts)
    assert prompts.decode(rollout) == [chain.text for chain in chains]
    batch, _ = prompts.encode_prompts([chain.example for chain in chains])
    np.testing.assert_array_equal(rollout.tokens[:, : prompts.prompt_length], batch.tokens)
    np.testing.assert_array_equal(rollout.prompt_mask[:, : prompts.prompt_length], batch.mask)
    lengths = [len(chain.tokens) for chain in chains]
    np.testing.assert_array_equal(rollout.completion_mask.sum(axis=1), lengths)


@pytest.mark.slow  # one loop trains everything, and tests/training/test_loop.py resumes it
def test_a_resumed_run_equals_the_uninterrupted_one(policy, orm_run, tmp_path, monkeypatch):
    monkeypatch.setattr(orm_training, "outcome_reward", random_outcome)
    write = MetricsWriter.write

    def write_and_die(self, phase, step, values):
        write(self, phase, step, values)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(orm_config(policy), tmp_path / "run")
    assert not (tmp_path / "run" / ORM.file).exists()  # it describes finished training only
    run(orm_config(policy), tmp_path / "run")
    assert lines(tmp_path / "run") == lines(orm_run)
    for name in ("summary.json", ORM.file, *(f"chains/{split}.jsonl" for split in SPLITS)):
        assert (tmp_path / "run" / name).read_bytes() == (orm_run / name).read_bytes()


def test_chains_that_were_sampled_with_another_config_are_not_trained_on(policy, orm_run, tmp_path):
    for name in ("config.json", "chains"):
        (tmp_path / name).symlink_to(orm_run / name)
    with pytest.raises(UserError, match=r"orm\.rollouts: 2 in the workdir, 3 now"):
        run(orm_config(policy, orm__rollouts=3), tmp_path)


def test_it_learns_pairwise(policy, orm_run, tmp_path, monkeypatch, capsys):
    """From the chains of the other run, since sampling takes long."""
    policy_chains = orm_training.policy_chains

    def copied(config, workdir, dataset, split, pairs):
        (workdir / "chains").mkdir(exist_ok=True)
        shutil.copy(orm_run / "chains" / f"{split}.jsonl", workdir / "chains")
        return policy_chains(config, workdir, dataset, split, pairs)

    monkeypatch.setattr(orm_training, "policy_chains", copied)
    run(orm_config(policy, orm__loss="pairwise"), tmp_path / "run")
    assert lines(tmp_path / "run")[0]["loss"] == pytest.approx(np.log(2))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    counts = summary["train"]
    assert counts["mixed"] + counts["all_right"] + counts["all_wrong"] == 16
    assert "test, pairwise" in capsys.readouterr().out


def test_it_scores_rollouts_whatever_their_number_and_padding(orm_run):
    lm, _ = untrained_policy(orm_run)
    orm = load_orm(orm_run, lm, 16)
    chains = read_chains(orm_run, "test")
    rollout = as_rollout(chains, lm.prompts)  # 24 rows, so two batches
    scores = orm.score(rollout)
    assert scores.shape == (24,)
    assert scores.dtype == np.float32
    assert ((scores > 0) & (scores < 1)).all()
    assert len(np.unique(scores)) > 1
    few = jax.tree.map(lambda x: x[5:8], rollout)
    np.testing.assert_allclose(orm.score(few), scores[5:8], rtol=1e-5)
    wide = Rollout(
        **{name: np.pad(x, ((0, 0), (3, 2))) for name, x in vars(jax.device_get(few)).items()}
    )
    np.testing.assert_allclose(orm.score(wide), scores[5:8], rtol=1e-5)
    metrics = json.loads((orm_run / "summary.json").read_text())["test"]
    right = [chain.right for chain in chains]
    assert np.mean((scores >= 0.5) == right) == pytest.approx(metrics["accuracy"])


def test_a_policy_is_rewarded_by_its_score(orm_run, tmp_path):
    changes = {"rl__steps": 1, "rl__eval_every": 1, "eval__pass_k": 0}
    run(config(reward__orm=str(orm_run), reward__batch_size=16, **changes), tmp_path / "run")
    (row,) = (row for row in lines(tmp_path / "run") if row["phase"] == "rl")
    assert 0 < row["reward"] < 1
    assert row["outcome"] == 0  # the verifier's: no chain is well formed yet
    assert row["zero_variance"] == 1  # by the verifier no group is informative
    assert row["grad_norm"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reward__orm": "nowhere"}, FileNotFoundError, "orm=nowhere: there is no outcome reward"),
        ({"reward__orm": "POLICY"}, UserError, "is a run of kind 'train', not 'scalar_reward'"),
        ({"reward__prm": "ORM"}, UserError, "is a run of kind 'scalar_reward', not 'reward_model"),
        (
            {"reward__orm": "ORM", "chain__checks": 2},
            UserError,
            r"is for chains of the steps \('query', .*and the policy writes \('query', .*check_1",
        ),
    ],
)
def test_a_wrong_folder_is_an_error_before_anything_is_written(
    policy, orm_run, tmp_path, changes, error, message
):
    folders = {"POLICY": str(policy), "ORM": str(orm_run)}
    changes = {k: folders.get(v, v) for k, v in changes.items()}
    with pytest.raises(error, match=message):
        run(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_an_error(orm_run, tmp_path):
    lm, _ = untrained_policy(orm_run)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", ORM.file, "checkpoints", "summary.json"):
        (other / name).symlink_to(orm_run / name)
    tokenizer = json.loads((orm_run / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    stranger, _ = untrained_policy(other)
    for folder in (orm_run, other):
        with pytest.raises(
            UserError, match=r"reads other tokens than the policy writes \(another tokenizer\)"
        ):
            load_orm(folder, stranger, 16)
    chatty = dataclasses.replace(lm, prompts=dataclasses.replace(lm.prompts, eos_ids=(7,)))
    with pytest.raises(UserError, match=r"\(another eos_ids\)"):
        load_orm(orm_run, chatty, 16)
    with pytest.raises(UserError, match="tokenizer is not the one it was trained with"):
        load_orm(other, lm, 16)


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
def test_values_that_cannot_work_are_errors_before_anything_is_written(
    policy, tmp_path, changes, message
):
    with pytest.raises(UserError, match=message):
        run(orm_config(policy, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_recipe_has_no_keys_for_what_is_the_policys():
    assert not set(INHERITED) & set(scalar_reward.get_config())
