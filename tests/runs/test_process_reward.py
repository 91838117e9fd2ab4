"""Runs that train an examiner, and runs that are rewarded by one: small and whole."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from recipes import FOUR_STEPS, changed, config, good_rows, lines, make_dataset
from she_jax.runs.policy_run import INHERITED

from configs import reward_model
from she_jax.generate.generator import Generator, Sample
from she_jax.generate.prompts import PromptFormat
from she_jax.rewards.prm.metrics import calibration_error, first_errors, prm_metrics
from she_jax.rewards.prm.model import StepScores, load_prm
from she_jax.rewards.prm.step_query import StepQuery
from she_jax.rollouts import offline
from she_jax.runs import process_reward as reward_model_run
from she_jax.runs.process_reward import some_pairs
from she_jax.runs.run import run
from she_jax.training.setup import policy_mesh
from she_jax.types import Example

POLICY_RUN = {
    "rl__steps": 1,
    "rl__eval_every": 1,
    "eval__pass_k": 0,
}
EXAMINER_RUN = FOUR_STEPS | {
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
PAIR = Example(uid="a", query="mug", product={"title": "mug"})


def examiner_config(policy, **changes):
    return changed(reward_model.get_config(), EXAMINER_RUN | {"checkpoint": str(policy)}, **changes)


@pytest.fixture(scope="module")
def written():
    """Has policies write a chain that can be read, which their few steps have not taught them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptFormat, "texts", lambda self, rollout: [CHAIN] * len(rollout.tokens))
        yield


@pytest.fixture
def begun(policy):
    """Changes for a run of a few updates, that takes its cold start from the policy's."""
    return POLICY_RUN | {"start": str(policy / "checkpoints" / "sft")}


@pytest.fixture
def readable(written, monkeypatch):
    """And takes the examiner at its word, of which its few steps have taught it little."""
    from she_jax.train import examiner

    monkeypatch.setattr(examiner, "READABLE", 0.0)


@pytest.fixture(scope="module")
def examiner(policy, written, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("examiner") / "run"
    run(examiner_config(policy), workdir)
    return workdir


def examinations(workdir, split):
    with (workdir / "examinations" / f"{split}.jsonl").open() as file:
        return [json.loads(line) for line in file]


def test_an_examiner_run_leaves_what_it_should(examiner):
    summary = json.loads((examiner / "summary.json").read_text())
    assert summary.keys() == {"direct", "critique_2"}
    for way in summary.values():
        assert way.keys() == {"test", "test_longtail"}
        for figures in way.values():
            assert {"accuracy", "f1_incorrect", "auroc", "ece", "unreadable"} <= figures.keys()
            assert {"query", "product", "category", "attributes", "label"} == set(
                figures["by_step"]
            )
            assert {"gold", "policy"} <= figures["by_source"].keys()
            assert figures["policy_by_step"].keys() == figures["by_step"].keys()
            assert figures["policy_by_phase"].keys() == {"sft", "srpo"}
            assert {"found", "spared", "wrong", "right"} == figures["first_errors"].keys()
    done = [(row["phase"], row["step"]) for row in lines(examiner)]
    assert done == [("solve", n) for n in (1, 2, 3)] + [("reward_model", n) for n in (1, 2, 3, 4)]


def test_the_pairs_of_a_sorted_file_are_from_all_over_it(tmp_path):
    """And half of them for the policies' steps too; their neighbours have the same query."""
    given = [
        replace(row, example=replace(row.example, query=f"q{n // 8}", label=1 + n // 200))
        for n, row in enumerate(good_rows(800))
    ]
    own = config(data__name="jsonl")
    pairs = some_pairs(own, make_dataset(tmp_path, given), "train", 160)
    assert len({pair.uid for pair in pairs}) == 160
    for some in (pairs, pairs[:80]):
        assert min(np.bincount([pair.label for pair in some], minlength=5)[1:]) >= len(some) // 40
    assert min(np.unique([pair.query for pair in pairs], return_counts=True)[1]) >= 4
    assert some_pairs(config(), make_dataset(tmp_path, given), "train", 3) == [
        g.example for g in given[:3]
    ]


def test_it_learns_from_no_query_of_the_other_splits(examiner):
    queries = {
        split: {one["query"] for one in examinations(examiner, split)}
        for split in ("train", "test", "test_longtail")
    }
    assert all(queries.values())
    assert not queries["train"] & (queries["test"] | queries["test_longtail"])
    assert all(one["uid"].startswith("train-") for one in examinations(examiner, "train"))


def test_a_resumed_examiner_equals_the_uninterrupted_one(policy, examiner, tmp_path, monkeypatch):
    for phase in ("solve", "reward_model"):
        dies_at(monkeypatch, 3, phase)
        with pytest.raises(KeyboardInterrupt):
            run(examiner_config(policy), tmp_path / "run")
        monkeypatch.undo()
    run(examiner_config(policy), tmp_path / "run")
    assert lines(tmp_path / "run") == lines(examiner)
    assert (tmp_path / "run/summary.json").read_bytes() == (examiner / "summary.json").read_bytes()


def test_an_examiner_of_labels_alone_is_not_taught_to_judge(policy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reward_model_run, "policy_samples", lambda *_: [])  # they take long
    bare = tmp_path / "policy"
    shutil.copytree(policy, bare)
    told = json.loads((bare / "config.json").read_text())
    told["shopworld"]["coverage"] = 0.0
    (bare / "config.json").write_text(json.dumps(told))
    run(examiner_config(bare), tmp_path / "run")
    assert {row["phase"] for row in lines(tmp_path / "run")} == {"reward_model"}
    assert "does not learn to judge pairs" in capsys.readouterr().out


def dies_at(monkeypatch, step, phase="srpo"):
    """Kills the next runs right after they have written that step of a phase."""
    from she_jax.train import metrics

    written = metrics.MetricsWriter.write

    def die(self, own, number, values):
        written(self, own, number, values)
        if (own, number) == (phase, step):
            raise KeyboardInterrupt

    monkeypatch.setattr(metrics.MetricsWriter, "write", die)


def assert_resumes(changes, done, again, monkeypatch, step):
    """A run that is killed and started again equals the uninterrupted one."""
    with monkeypatch.context() as patch:
        dies_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            run(config(**changes), again)
    run(config(**changes), again)
    assert lines(done) == lines(again)
    assert (done / "summary.json").read_bytes() == (again / "summary.json").read_bytes()


@pytest.mark.usefixtures("readable")
def test_stage_1_runs_and_resumes_with_an_examiner(begun, examiner, tmp_path, monkeypatch):
    """Nothing but the label is annotated: all else is the examiner's word."""
    changes = begun | {
        "rl__steps": 2,
        "rl__eval_every": 2,
        "shopworld__coverage": 0.0,
        "reward__prm": str(examiner),
        "reward__batch_size": 16,
    }
    done = tmp_path / "run"
    run(config(**changes), done)
    for row in (row for row in lines(done) if row["phase"] == "srpo"):
        assert row["examiner/asked"] > 0
        assert row["examiner/unreadable"] == 0
        for name in ("query", "product", "category", "attributes", "label"):
            assert 0 <= row[f"truth/{name}"] <= 1
            assert 0 < row[f"examiner/{name}"] < 1
            assert (f"disagreement/{name}" in row) == (name == "label")
            if name != "label":  # nobody annotated it, so nobody knows where its credit belongs
                assert not {f"credit/{name}", f"astray/{name}"} & row.keys()
                assert row[f"reward/{name}"] == pytest.approx(row[f"examiner/{name}"], abs=1e-6)
    assert "examiner:  0." in (done / "samples" / "step_000001.md").read_text()
    assert_resumes(changes, done, tmp_path / "again", monkeypatch, 2)


@pytest.mark.usefixtures("readable")
def test_an_sft_imitates_what_the_examiner_approves_of(
    begun, examiner, tmp_path, monkeypatch, capsys
):
    """All labels are right, and nothing but the label is annotated."""
    asked = []

    def samples(self, params, examples, k, seed, show):
        texts = [CHAIN.replace("label: 4", f"label: {example.label}") for example in examples]
        chains = [self.format.schema.parse(text) for text in texts]
        rows = zip(texts, chains, strict=True)
        return [[Sample(tokens=(1, 2), text=t, chain=c, truncated=False)] * k for t, c in rows]

    def approved(told, *own):
        assert len(plain(told, *own)) == len(told)
        asked.extend(one.uid for one, _ in told)
        return [uid == asked[0] for uid in asked[-len(told) :]]

    plain = offline.approved
    monkeypatch.setattr(offline, "approved", approved)
    monkeypatch.setattr(Generator, "samples", samples)
    changes = {"method": "sft", "shopworld__coverage": 0.0, "reward__prm": str(examiner)}
    run(config(**begun | changes), tmp_path / "run")
    assert len(asked) > 1
    assert "of these, 1 have no step that the examiner calls wrong" in capsys.readouterr().out
    told = json.loads((tmp_path / "run/missed.json").read_text())
    assert set(told["met"]) - set(told["missed"]) == {asked[0]}


@pytest.mark.usefixtures("readable")
def test_an_examiner_is_refreshed_and_a_resumed_run_goes_on_with_it(
    begun, examiner, tmp_path, monkeypatch, capsys
):
    changes = begun | {
        "rl__steps": 3,
        "rl__eval_every": 3,
        "rl__checkpoint_every": 9,
        "reward__prm": str(examiner),
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
    assert "step 1: the examiner learned from 20 annotated steps of the policy" in (
        capsys.readouterr().out
    )
    assert sorted(path.name for path in (done / "checkpoints/examiner").iterdir()) == ["1", "2"]
    with monkeypatch.context() as patch:  # without a refresh the scores are others
        patch.setitem(changes, "reward__refresh_every", 0)
        run(config(**changes), tmp_path / "stale")
    scores = [
        [row["examiner"] for row in lines(folder) if row["phase"] == "srpo"]
        for folder in (done, tmp_path / "stale")
    ]
    assert scores[0][0] == scores[1][0]
    assert scores[0][1] != scores[1][1]
    assert_resumes(changes, done, tmp_path / "again", monkeypatch, 3)
    (tmp_path / "again/summary.json").unlink()  # as after a kill while the result was judged
    run(config(**changes), tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/examiner")
    (tmp_path / "again/summary.json").unlink()
    shutil.rmtree(tmp_path / "again/checkpoints/srpo/3")
    with pytest.raises(ValueError, match="as refreshed at update 2 is not in"):
        run(config(**changes), tmp_path / "again")


def test_an_examiner_has_devices_of_its_own(examiner):
    """And says the same there, but for rounding."""
    told, devices = [], []
    steps = [
        StepQuery(example=PAIR, step="query", written=f"query: {text}")
        for text in ("mug", "red mug", "cup")
    ]
    for apart in (0, 2):
        made = config(reward__prm=str(examiner), reward__devices=apart)
        own = load_prm(made)
        told.append(own.score(steps, jax.random.key(0)).score)
        key = jax.device_put(jax.random.key(0), jax.devices()[0])  # as a run's: on the policy's
        asked = load_prm(config(reward__prm=str(examiner), reward__votes=2, reward__devices=apart))
        assert asked.score(steps, key).score.shape == (3,)
        devices.append(set(own.policy.mesh.devices.flat))
        assert len(policy_mesh(made).devices.flat) == 8 - apart
        assert bool(devices[-1] & set(policy_mesh(made).devices.flat)) == (not apart)
    np.testing.assert_allclose(told[0], told[1], atol=1e-5)
    assert len(devices[1]) == 2
    with pytest.raises(ValueError, match="devices=8: there are 8, and the policy needs one"):
        policy_mesh(config(reward__devices=8))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reward__prm": "nowhere"}, FileNotFoundError, "reward.prm=nowhere: there is no exam"),
        ({"reward__prm": "POLICY"}, ValueError, "is a run of kind 'train', not 'reward_model'"),
        (
            {"reward__prm": "EXAMINER", "chain__checks": 2},
            ValueError,
            r"is for chains of the steps \('query', .*and the policy writes \('query', .*check_1",
        ),
        ({"reward__combine": "best"}, ValueError, "reward.combine='best': expected one of"),
        ({"reward__combine": "model_only"}, ValueError, "'model_only' needs an examiner"),
        ({"reward__model_weight": 1.5}, ValueError, "model_weight=1.5: expected a share"),
        ({"reward__votes": -1}, ValueError, "votes=-1: expected 0"),
        ({"reward__refresh_every": -1}, ValueError, "refresh_every=-1: expected 0"),
        ({"reward__refresh_every": 5}, ValueError, "refresh_every=5 needs an examiner"),
        ({"reward__devices": 4}, ValueError, "devices=4 needs an examiner"),
        ({"reward__devices": -1}, ValueError, "devices=-1: there are 8"),
        (
            {
                "reward__prm": "EXAMINER",
                "reward__refresh_every": 1,
                "reward__refresh_batch_size": 9,
            },
            ValueError,
            "batch of 9 rows over data x fsdp = 8 devices",
        ),
    ],
)
def test_a_wrong_examiner_is_an_error_before_anything_is_made(
    policy, examiner, tmp_path, changes, error, message
):
    places = {"POLICY": str(policy), "EXAMINER": str(examiner)}
    changes = {k: places.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(error, match=message):
        run(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_examiner_with_another_tokenizer_is_an_error(examiner, tmp_path):
    from she_jax.rewards.prm.model import load_prm

    other = tmp_path / "examiner"
    other.mkdir()
    for name in ("config.json", "prm.json", "checkpoints", "summary.json"):
        (other / name).symlink_to(examiner / name)
    tokenizer = json.loads((examiner / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    made = config(reward__prm=str(other))
    load_prm(made)  # the same one in other white space is the same one
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="tokenizer is not the one it was trained with"):
        load_prm(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prm__room": 60}, "prm.room=60: expected at least 80, for two answers"),
        ({"prm__votes": -1}, "prm.votes=-1: expected 0"),
    ],
)
def test_an_examiner_that_could_not_be_trained_is_an_error(policy, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        run(examiner_config(policy, **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "checkpoint=nowhere: there is no run there"),
        ("EXAMINER", ValueError, "no policy was trained there"),
    ],
)
def test_an_examiner_wants_a_policys_run(examiner, tmp_path, checkpoint, error, message):
    place = str(examiner) if checkpoint == "EXAMINER" else checkpoint
    with pytest.raises(error, match=message):
        run(examiner_config(place), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_recipe_has_no_keys_for_what_is_the_policys():
    """So that setting one is an error instead of being overruled."""
    assert not set(INHERITED) & set(reward_model.get_config())


def step(name, correct, source="policy", chain="a/sft/0", annotated=True):
    own = {"source": source, "chain": chain, "annotated": annotated}
    return StepQuery(example=PAIR, step=name, written="", correct=correct, **own)


def test_figures_by_hand():
    pool = [
        step("query", True),
        step("query", False, annotated=False),
        step("label", False),
        step("label", False, "verdict"),
        step("label", True, "gold"),
    ]
    told = StepScores(
        score=np.array([0.9, 0.2, 0.6, 0.1, 0.0], np.float32),
        known=np.array([True, True, True, True, False]),
    )
    figures = prm_metrics(pool, told)
    assert (figures["n"], figures["unreadable"]) == (5, 1)
    assert figures["accuracy"] == 3 / 4
    assert figures["f1_incorrect"] == pytest.approx(2 * 2 / (2 * 2 + 0 + 1))
    assert figures["auroc"] == 1
    assert figures["agreement"] == 2 / 3  # the verifier does not speak of the second one
    assert figures["by_step"]["label"]["accuracy"] == 1 / 2
    assert figures["by_step"]["label"]["auroc"] is None  # the right one could not be read
    assert figures["by_source"]["gold"]["accuracy"] is None
    assert figures["policy_by_step"]["label"]["n"] == 1
    assert figures["policy_by_phase"]["sft"]["n"] == 3


def test_calibration_error_by_hand():
    right = np.array([True, False, True, True])
    score = np.array([0.95, 0.91, 0.42, 1.0], np.float32)
    # The last bin: 2 right of 3, mean score 0.953; another: 1 of 1 at 0.42.
    expected = (abs(2 - 2.86) + abs(1 - 0.42)) / 4
    assert calibration_error(right, score) == pytest.approx(expected, abs=1e-6)


def test_first_errors_by_hand():
    truths = {"found": [1, 0, 0], "late": [0, 1, 0], "early": [1, 0, 1], "clean": [1, 1, 1]}
    scores = {
        "found": [0.9, 0.1, 0.9],
        "late": [0.9, 0.9, 0.1],
        "early": [0.1, 0.1, 0.9],
        "clean": [0.9, 0.9, 0.9],
    }
    pool = [step("query", bool(t), chain=name) for name, own in truths.items() for t in own]
    score = np.array([s for own in scores.values() for s in own], np.float32)
    told = StepScores(score=score, known=np.ones(12, bool))
    assert first_errors(pool, told) == {
        "found": pytest.approx(1 / 3),
        "spared": 1.0,
        "wrong": 3,
        "right": 1,
    }
    silent = StepScores(score=score, known=np.zeros(12, bool))
    assert first_errors(pool, silent)["found"] == 0
