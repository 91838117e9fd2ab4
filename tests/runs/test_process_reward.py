"""Runs that train a process reward model, and runs that are rewarded by one: small and whole."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from recipes import FOUR_STEPS, changed, config, good_rows, lines, make_dataset

from she_jax.cot import CotSchema
from she_jax.generate.generator import Generator, Sample
from she_jax.generate.prompts import PromptFormat
from she_jax.recipes import reward_model
from she_jax.rewards.prm import model as prm_module
from she_jax.rewards.prm.model import PRM, load_prm
from she_jax.rewards.prm.step_query import StepQuery
from she_jax.rollouts import offline
from she_jax.runs import process_reward
from she_jax.runs.config import INHERITED, parse
from she_jax.runs.policy_data import drawn_examples
from she_jax.runs.run import run
from she_jax.training.logging import MetricsWriter
from she_jax.training.setup import split_mesh
from she_jax.types import Example, UserError

POLICY_RUN = {
    "rl__steps": 1,
    "rl__eval_every": 1,
    "eval__pass_k": 0,
}
PRM_RUN = FOUR_STEPS | {
    "reference_sft.steps": 3,
    "reference_sft.batch_size": 16,
    "reference_sft.checkpoint_every": 2,
    "prm.pairs": 24,
    "prm.policy_pairs": 16,
    "prm.eval_pairs": 6,
    "prm.batch_size": 16,
    "prm.votes": 2,
}
CHAIN = "query: mug\nproduct: mug\ncategory: => match\nattributes: => met\nlabel: 4"


def prm_config(policy, **changes):
    return changed(reward_model.get_config(), PRM_RUN | {"checkpoint": str(policy)}, **changes)


@pytest.fixture(scope="module")
def written():
    """Lets policies write a readable chain, which their few updates have not taught them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptFormat, "decode", lambda self, rollout: [CHAIN] * len(rollout.tokens))
        yield


@pytest.fixture
def warm_start(policy):
    """Changes for a run of one update that begins with the policy's cold start."""
    return POLICY_RUN | {"init_from": str(policy / "checkpoints" / "sft")}


@pytest.fixture
def readable(written, monkeypatch):
    """Makes every score known, which the few updates of the reward model do not."""
    monkeypatch.setattr(prm_module, "READABLE", 0.0)


@pytest.fixture(scope="module")
def prm_run(policy, written, tmp_path_factory):
    """The folder of a finished run that trained a process reward model."""
    workdir = tmp_path_factory.mktemp("prm") / "run"
    run(prm_config(policy), workdir)
    return workdir


def load(folder, tmp_path, **changes):
    """A process reward model, and the policy's mesh, of a run that is configured with it."""
    parsed = parse(config(reward__prm=str(folder), **changes), tmp_path)
    mesh, reward_mesh = split_mesh(parsed.mesh, parsed.reward.devices)
    reward = parsed.reward
    prm = load_prm(
        folder, parsed.schema, reward_mesh, batch_size=reward.batch_size, votes=reward.votes
    )
    return prm, mesh


def step_queries(workdir, split):
    with (workdir / "step_queries" / f"{split}.jsonl").open() as file:
        return [json.loads(line) for line in file]


def test_a_run_leaves_its_results(prm_run):
    summary = json.loads((prm_run / "summary.json").read_text())
    assert summary.keys() == {"direct", "critique_2"}
    for by_split in summary.values():
        assert by_split.keys() == {"test", "test_longtail"}
        for metrics in by_split.values():
            assert {"accuracy", "f1_incorrect", "auroc", "ece", "unreadable"} <= metrics.keys()
            assert {"query", "product", "category", "attributes", "label"} == set(
                metrics["by_step"]
            )
            assert {"gold", "policy"} <= metrics["by_source"].keys()
            assert metrics["policy_by_step"].keys() == metrics["by_step"].keys()
            assert metrics["policy_by_phase"].keys() == {"sft", "policy"}
            assert {"found", "spared", "wrong", "right"} == metrics["first_errors"].keys()
    steps = [(row["phase"], row["step"]) for row in lines(prm_run)]
    expected = [("reference", n) for n in (1, 2, 3)] + [("reward_model", n) for n in (1, 2, 3, 4)]
    assert steps == expected


def test_the_pairs_of_a_sorted_file_are_drawn_from_all_of_it(tmp_path):
    """And so is the half of them that gives policy steps; neighbors have the same query."""
    rows = [
        replace(row, example=replace(row.example, query=f"q{n // 8}", label=1 + n // 200))
        for n, row in enumerate(good_rows(800))
    ]
    dataset, size = make_dataset(tmp_path, rows), process_reward.BLOCK_SIZE
    pairs = drawn_examples(dataset, "train", 160, shuffled=False, block_size=size)
    assert len({pair.uid for pair in pairs}) == 160
    for part in (pairs, pairs[:80]):
        assert min(np.bincount([pair.label for pair in part], minlength=5)[1:]) >= len(part) // 40
    assert min(np.unique([pair.query for pair in pairs], return_counts=True)[1]) >= 4
    first = drawn_examples(dataset, "train", 3, shuffled=True, block_size=size)
    assert first == [row.example for row in rows[:3]]


def test_it_learns_from_no_query_of_the_other_splits(prm_run):
    queries = {
        split: {record["query"] for record in step_queries(prm_run, split)}
        for split in ("train", "test", "test_longtail")
    }
    assert all(queries.values())
    assert not queries["train"] & (queries["test"] | queries["test_longtail"])
    assert all(record["uid"].startswith("train-") for record in step_queries(prm_run, "train"))


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(policy, prm_run, tmp_path, monkeypatch):
    for phase in ("reference", "reward_model"):
        kill_at(monkeypatch, 3, phase)
        with pytest.raises(KeyboardInterrupt):
            run(prm_config(policy), tmp_path / "run")
        monkeypatch.undo()
        assert not (tmp_path / "run" / PRM.file).exists()  # it describes finished training only
    run(prm_config(policy), tmp_path / "run")
    assert lines(tmp_path / "run") == lines(prm_run)
    for name in ("summary.json", PRM.file):
        assert (tmp_path / "run" / name).read_bytes() == (prm_run / name).read_bytes()


def test_without_annotated_steps_it_does_not_learn_to_write_chains(
    policy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(process_reward, "policy_samples", lambda *_: [])  # they take long
    labels_only = tmp_path / "policy"
    shutil.copytree(policy, labels_only)
    recipe = json.loads((labels_only / "config.json").read_text())
    recipe["shopworld"]["coverage"] = 0.0
    (labels_only / "config.json").write_text(json.dumps(recipe))
    run(prm_config(labels_only, sft__steps=1, prm__votes=0), tmp_path / "run")
    assert {row["phase"] for row in lines(tmp_path / "run")} == {"reward_model"}
    assert "the reward model does not learn to write chains" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / PRM.file).read_text())["reference_chains"] is False


def kill_at(monkeypatch, step, phase="rl"):
    """Kills the next runs right after they have written that step of a phase."""
    write = MetricsWriter.write

    def write_and_die(self, written_phase, number, values):
        write(self, written_phase, number, values)
        if (written_phase, number) == (phase, step):
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsWriter, "write", write_and_die)


@pytest.mark.usefixtures("readable")
def test_stage_1_runs_with_a_process_reward_model(warm_start, prm_run, tmp_path, capsys):
    """Only the label is annotated: the rewards of all other steps are the reward model's.

    It is refreshed once, from the annotated labels.
    """
    changes = warm_start | {
        "rl__steps": 2,
        "rl__eval_every": 2,
        "shopworld__coverage": 0.0,
        "reward__prm": str(prm_run),
        "reward__batch_size": 16,
        "reward__refresh_every": 1,
        "reward__refresh_steps": 2,
        "reward__refresh_batch_size": 8,
    }
    done = tmp_path / "run"
    run(config(**changes), done)
    assert "step 1: the reward model learned from" in capsys.readouterr().out
    for row in (row for row in lines(done) if row["phase"] == "rl"):
        assert row["prm/queries"] > 0
        assert row["prm/unreadable"] == 0
        for name in ("query", "product", "category", "attributes", "label"):
            assert 0 <= row[f"truth/{name}"] <= 1
            assert 0 < row[f"prm/{name}"] < 1
            assert (f"disagreement/{name}" in row) == (name == "label")
            if name != "label":  # without annotation it is unknown where credit belongs
                assert not {f"credit/{name}", f"wrong_sign/{name}"} & row.keys()
                assert row[f"reward/{name}"] == pytest.approx(row[f"prm/{name}"], abs=1e-6)
    assert "reward model:  0." in (done / "samples" / "step_000001.md").read_text()
    record = json.loads((done / "samples" / "step_000001.json").read_text())
    steps = [s for group in record["groups"] for r in group["rollouts"] for s in r["steps"]]
    sources = {(step["name"], *step["sources"]) for step in steps}
    assert ("query", "process reward model") in sources
    assert ("label", "verifier", "process reward model") in sources
    assert "process reward model 0." in (done / "report.html").read_text()


@pytest.mark.usefixtures("readable")
def test_rejection_sampling_keeps_what_the_process_reward_model_accepts(
    warm_start, prm_run, tmp_path, monkeypatch, capsys
):
    """All labels are correct, and only the label is annotated."""
    scored = []

    def sample(self, params, examples, k, seed, show):
        texts = [CHAIN.replace("label: 4", f"label: {example.label}") for example in examples]
        chains = [self.prompts.schema.parse(text) for text in texts]
        rows = zip(texts, chains, strict=True)
        return [[Sample(tokens=(1, 2), text=t, chain=c, truncated=False)] * k for t, c in rows]

    def accept_the_first(rollouts, *args):
        assert len(accepted_by_prm(rollouts, *args)) == len(rollouts)
        scored.extend(example.uid for example, _ in rollouts)
        return [uid == scored[0] for uid in scored[-len(rollouts) :]]

    accepted_by_prm = offline.accepted_by_prm
    monkeypatch.setattr(offline, "accepted_by_prm", accept_the_first)
    monkeypatch.setattr(Generator, "sample", sample)
    changes = {"method": "sft", "shopworld__coverage": 0.0, "reward__prm": str(prm_run)}
    run(config(**warm_start | changes), tmp_path / "run")
    assert len(scored) > 1
    expected = "of these, 1 have no step that the process reward model calls wrong"
    assert expected in capsys.readouterr().out
    record = json.loads((tmp_path / "run/unsolved.json").read_text())
    assert set(record["seen"]) - set(record["unsolved"]) == {scored[0]}


@pytest.mark.slow
@pytest.mark.usefixtures("readable")
def test_the_process_reward_model_is_refreshed_and_a_resumed_run_continues_with_it(
    warm_start, prm_run, tmp_path, monkeypatch, capsys
):
    changes = warm_start | {
        "rl__steps": 3,
        "rl__eval_every": 3,
        "rl__checkpoint_every": 9,
        "reward__prm": str(prm_run),
        "reward__combine": "model_only",
        "reward__batch_size": 16,
        "reward__refresh_every": 1,
        "reward__refresh_steps": 2,
        "reward__refresh_batch_size": 8,
        "reward__devices": 4,
        "rl__group_size": 4,
        "rl__prompts": 4,
    }
    done = tmp_path / "run"
    run(config(**changes), done)
    assert "step 1: the reward model learned from 20 annotated steps of the policy" in (
        capsys.readouterr().out
    )
    assert sorted(path.name for path in (done / "checkpoints/prm").iterdir()) == ["1", "2"]
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(config(**changes), tmp_path / "again")
    run(config(**changes), tmp_path / "again")
    assert lines(tmp_path / "again") == lines(done)
    assert (tmp_path / "again/summary.json").read_bytes() == (done / "summary.json").read_bytes()
    shutil.rmtree(tmp_path / "again/checkpoints/prm")
    (tmp_path / "again/summary.json").unlink()
    shutil.rmtree(tmp_path / "again/checkpoints/policy/3")
    with pytest.raises(UserError, match="as refreshed at update 2 is not in"):
        run(config(**changes), tmp_path / "again")


@pytest.mark.slow
@pytest.mark.usefixtures("readable")
def test_a_refreshed_process_reward_model_gives_other_scores(
    warm_start, prm_run, tmp_path, monkeypatch
):
    changes = warm_start | {"rl__steps": 3, "reward__prm": str(prm_run)}
    changes |= {"reward__combine": "model_only", "reward__refresh_steps": 2}
    scores = []
    for every in (0, 1):
        with monkeypatch.context() as patch:
            kill_at(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                run(config(**changes, reward__refresh_every=every), tmp_path / str(every))
        rows = lines(tmp_path / str(every))
        scores.append([row["prm"] for row in rows if row["phase"] == "rl"])
    assert scores[0][0] == scores[1][0]
    assert scores[0][1] != scores[1][1]


def test_a_process_reward_model_may_have_separate_devices(prm_run, tmp_path):
    """Its scores are the same there, except for rounding."""
    scores, devices = [], []
    pair = Example(uid="a", query="mug", product={"title": "mug"})
    steps = [
        StepQuery(example=pair, step="query", written=f"query: {text}")
        for text in ("mug", "red mug", "cup")
    ]
    for count in (0, 2):
        prm, mesh = load(prm_run, tmp_path, reward__devices=count)
        scores.append(prm.score(steps, jax.random.key(0)).score)
        key = jax.device_put(jax.random.key(0), jax.devices()[0])  # as a run's: on the policy's
        voting, _ = load(prm_run, tmp_path, reward__votes=2, reward__devices=count)
        assert voting.score(steps, key).score.shape == (3,)
        devices.append(set(prm.lm.mesh.devices.flat))
        assert len(mesh.devices.flat) == 8 - count
        assert bool(devices[-1] & set(mesh.devices.flat)) == (not count)
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    assert len(devices[1]) == 2
    with pytest.raises(UserError, match="devices=8: there are 8, and the policy needs one"):
        load(prm_run, tmp_path, reward__devices=8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reward__prm": "nowhere"}, FileNotFoundError, "reward.prm=nowhere: there is no process"),
        ({"reward__prm": "POLICY"}, UserError, "is a run of kind 'train', not 'reward_model'"),
        (
            {"reward__prm": "PRM", "chain__checks": 2},
            UserError,
            r"is for chains of the steps \('query', .*and the policy writes \('query', .*check_1",
        ),
        ({"reward__combine": "best"}, UserError, "reward.combine='best': expected one of"),
        ({"reward__combine": "model_only"}, UserError, "'model_only' needs a process reward model"),
        ({"reward__votes": -1}, UserError, "votes=-1: expected 0"),
        ({"reward__refresh_every": -1}, UserError, "refresh_every=-1: expected 0"),
        ({"reward__refresh_every": 5}, UserError, "refresh_every=5 needs a process reward model"),
        ({"reward__devices": 4}, UserError, "devices=4 needs a process reward model"),
        ({"reward__prm": "PRM", "reward__devices": -1}, UserError, "devices=-1: there are 8"),
        (
            {
                "reward__prm": "PRM",
                "reward__refresh_every": 1,
                "reward__refresh_batch_size": 9,
            },
            UserError,
            "batch of 9 rows over data x fsdp = 8 devices",
        ),
    ],
)
def test_a_wrong_reward_is_an_error_before_anything_is_written(
    policy, prm_run, tmp_path, changes, error, message
):
    folders = {"POLICY": str(policy), "PRM": str(prm_run)}
    changes = {k: folders.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(error, match=message):
        run(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_describes_itself_and_keeps_its_tokenizer(prm_run, tmp_path):
    """Of the recipe only the kind of run is read."""
    folder = tmp_path / "prm"
    folder.mkdir()
    for name in ("checkpoints", "summary.json"):
        (folder / name).symlink_to(prm_run / name)
    (folder / "config.json").write_text(json.dumps({"kind": "reward_model"}))
    tokenizer = json.loads((prm_run / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(FileNotFoundError, match="is not done: start the command"):
        load(folder, tmp_path)
    (folder / PRM.file).symlink_to(prm_run / PRM.file)
    load(folder, tmp_path)  # white space in the tokenizer's file makes no difference
    with pytest.raises(UserError, match=r"is for the verdicts .* of the step 'label', and the pol"):
        PRM.check(folder, CotSchema.build(labels="1-5"))
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="tokenizer is not the one it was trained with"):
        load(folder, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prm__room": 60}, "prm.room=60: expected at least 80, for two answers"),
        ({"prm__votes": -1}, "prm.votes=-1: expected 0"),
    ],
)
def test_values_out_of_range_are_errors(policy, tmp_path, changes, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        run(prm_config(policy, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "checkpoint=nowhere: there is no run there"),
        ("PRM", UserError, "no policy was trained there"),
    ],
)
def test_a_process_reward_model_needs_a_policys_run(prm_run, tmp_path, checkpoint, error, message):
    folder = prm_run if checkpoint == "PRM" else Path(checkpoint)
    with pytest.raises(error, match=message):
        run(prm_config(folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_recipe_has_no_keys_for_what_is_the_policys():
    """So that setting such a key is an error, not ignored."""
    assert not set(INHERITED) & set(reward_model.get_config())
