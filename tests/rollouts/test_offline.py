"""Learning from chains kept: which ones, in which order, and whole small runs."""

import json
import os
import shutil
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from recipes import config, lines

from she_jax.cot import CotSchema
from she_jax.data.shopworld.builder import World, generate
from she_jax.generate.generator import Generator, Sample
from she_jax.rewards.prm.model import StepScores
from she_jax.rollouts import online
from she_jax.rollouts.offline import agreeing, approved, offline_prompts, preferred, shuffled
from she_jax.rollouts.prompt_source import make_pool
from she_jax.runs.run import run
from she_jax.runs.validate import _check_method

SCHEMA = CotSchema()
GOLD = World(seed=4, pairs=(40, 0, 0, 0), chains="gold")


def sample(text, tokens=(1, 2), truncated=False):
    return Sample(tokens=tokens, text=text, chain=SCHEMA.parse(text), truncated=truncated)


def spoilt(text, name, verdict):
    """A chain with another verdict of a step."""
    rows = [line.split(": ", 1) for line in text.split("\n")]
    told = {key: rest for key, rest in rows}
    head = told[name].rpartition("=> ")[0]
    told[name] = f"{head}=> {verdict}" if head else verdict
    return "\n".join(f"{key}: {rest}" for key, rest in told.items())


@pytest.fixture(scope="module")
def pairs():
    return list(generate(GOLD, "train"))


def test_only_chains_that_agree_with_all_that_humans_said_are_kept_and_each_once(pairs):
    example = next(e for e in pairs if e.label == 4)
    good = example.rationale
    rows = [
        sample(good),
        sample(good, tokens=(1, 2)),
        sample(spoilt(good, "category", "near")),  # the right label for a wrong reason
        sample(spoilt(good, "label", "3")),
        sample(good, truncated=True),
        sample("label: 4"),
    ]
    kept = agreeing([example], [rows], SCHEMA)
    assert [(one.uid, own) for one, own in kept] == [(example.uid, rows[0])]


class Doubter:
    """An examiner that doubts the steps of some names and has no answer to those of others."""

    def __init__(self, wrong=(), unread=()):
        self._wrong, self._unread = wrong, unread

    def score(self, examinations, key):
        del key
        steps = [one.step for one in examinations]
        score = np.array([0.4 if step in self._wrong else 0.6 for step in steps], np.float32)
        return StepScores(score=score, known=np.array([step not in self._unread for step in steps]))


@pytest.mark.parametrize(
    ("examiner", "fine"),
    [
        (Doubter(), True),
        (Doubter(wrong=("query",)), False),
        (Doubter(unread=("query",)), True),  # nobody says that it is wrong
        (Doubter(wrong=("category", "label")), True),  # of which humans have spoken
    ],
)
def test_the_examiner_speaks_of_what_humans_did_not_look_at(pairs, examiner, fine):
    few = replace(pairs[0], annotations=("category",))
    told = [(few, sample(few.rationale)), (pairs[1], sample(pairs[1].rationale))]
    # Of the second pair humans looked at all.
    assert approved(told, examiner, SCHEMA, jax.random.key(0)) == [fine, True]


def test_a_preference_is_a_right_and_a_wrong_rollout_and_no_rollout_is_used_twice(pairs):
    right = [pairs[0].rationale, pairs[0].rationale.replace("category: ", "category: so ")]
    wrong = [spoilt(right[0], "label", str(pairs[0].label % 4 + 1)), "no chain", "no chain"]
    rows = [sample(text, tokens=(n,)) for n, text in enumerate([*right, *wrong])]
    found = preferred([pairs[0]], [rows], seed=0)
    assert len(found) == 2
    assert {better.tokens for better, _ in found} == {(0,), (1,)}
    assert {worse.tokens for _, worse in found} <= {(2,), (3,), (4,)}
    assert len({worse.tokens for _, worse in found}) == 2
    assert preferred([pairs[0]], [rows[:2]], seed=0) == []
    cut = [sample(right[0], truncated=True), rows[2]]  # right as far as it goes, but without an end
    assert preferred([pairs[0]], [cut], seed=0) == []
    assert preferred([pairs[0]], [rows[2:]], seed=0) == []


def test_a_preference_that_is_met_again_is_one_preference(pairs):
    right = sample(pairs[0].rationale, tokens=(0,))
    wrong = [
        sample(text, tokens=(n,)) for n, text in enumerate(["no chain", "no chain", "none"], 1)
    ]
    # Twice the same right rollout: another wrong one makes no second pair.
    assert len(preferred([pairs[0]], [[right, right, *wrong]], seed=0)) == 1
    # Twice the same prompt, with the same rollouts.
    assert len(preferred([pairs[0]] * 2, [[right, wrong[0]]] * 2, seed=0)) == 1
    other = sample(pairs[1].rationale, tokens=(9,))
    assert len(preferred(pairs[:2], [[right, wrong[0]], [other, wrong[0]]], seed=0)) == 2


def test_each_row_comes_once_a_round_and_the_order_is_a_function_of_the_step():
    rows = list(range(10))
    series = [row for step in range(5) for row in shuffled(rows, 4, step, seed=3)]
    assert sorted(series[:10]) == sorted(series[10:]) == rows
    assert series[:10] != series[10:]
    assert shuffled(rows, 4, 2, seed=3) == series[8:12]


@pytest.fixture
def sampled(monkeypatch):
    """A policy that writes the truth, and a wrong label as often: the small one writes nothing."""

    def samples(self, params, examples, k, seed, show):
        groups = []
        for example in examples:
            good = example.rationale
            bad = spoilt(good, "label", str(example.label % 4 + 1))
            ids = [self.format.encode([text])[0][-20:] for text in (good, bad)]
            own = zip(ids, (good, bad), strict=True)
            groups.append([sample(text, tuple(tokens)) for tokens, text in own])
        return groups

    monkeypatch.setattr(Generator, "samples", samples)


@pytest.mark.parametrize(
    ("method", "chains"), [("sft", "written"), ("sft", "rejection"), ("dpo", "rejection")]
)
def test_an_offline_run_leaves_what_a_run_leaves(policy, tmp_path, sampled, method, chains):
    changes = {
        "start": str(policy / "checkpoints" / "sft"),
        "method": method,
        "offline__chains": chains,
        "shopworld__chains": "gold",
        "eval__pass_k": 0,
        "rl__steps": 3,
    }
    run(config(**changes), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["sampled_tokens"] > 0) == (chains == "rejection")
    rows = [row for row in lines(tmp_path / "run") if row["phase"] == "srpo"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    if chains == "rejection":  # what it learns from took a while
        whole = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        spent = [json.loads(line).get("time/lessons", 0.0) for line in whole]
        assert sum(spent) == max(spent) > 0.0
    if method == "dpo":  # the first update has the rate 0
        assert rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
        assert rows[2]["loss"] != rows[0]["loss"]


def test_srpo_can_take_up_the_prompts_that_an_sft_sampled_in_vain(policy, tmp_path, monkeypatch):
    def samples(self, params, examples, k, seed, show):  # some are right, those of two classes
        texts = [e.rationale if e.label in (1, 4) else "no chain" for e in examples]
        ids = self.format.encode(texts)
        return [[sample(t, tuple(own[-20:]))] * k for t, own in zip(texts, ids, strict=True)]

    begin = {"start": str(policy / "checkpoints" / "sft"), "shopworld__chains": "gold"}
    small = {"eval__pass_k": 0, "rl__steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "samples", samples)
        sft = {"method": "sft", "rl__prompts": 16, "rl__group_size": 1}
        run(config(**begin, **small, **sft), tmp_path / "sft")
    told = json.loads((tmp_path / "sft" / "missed.json").read_text())
    missed = told["missed"]
    assert 0 < len(missed) < len(told["met"]) == 2 * 16
    met, plain = [], online.make_pool

    def make_pool(config, source, rates):
        met.extend(source)
        return plain(config, source, rates)

    monkeypatch.setattr(online, "make_pool", make_pool)
    after = begin | {
        "start": str(tmp_path / "sft" / "checkpoints" / "srpo"),
        "rl__unsolved_share": 1.0,
    }
    run(config(**after, **small), tmp_path / "srpo")
    assert {example.uid for example in met} <= set(missed)
    assert {example.label for example in met} == {2, 3}

    with pytest.MonkeyPatch.context() as patch:  # a second round, of whose prompts few are missed
        patch.setattr(Generator, "samples", samples)
        run(config(**after, **small, **sft), tmp_path / "again")
    again = json.loads((tmp_path / "again" / "missed.json").read_text())
    new = set(again["met"]) - set(told["met"])
    assert set(again["met"]) > set(told["met"])
    assert len(new) == 2 * 16 - len(missed)
    assert set(missed) < set(again["missed"]) < set(missed) | new  # these it finds none of either

    with pytest.raises(ValueError, match="wants the pairs of that run"):
        run(config(**after, **small, shopworld__seed=7), tmp_path / "others")
    with pytest.raises(FileNotFoundError, match=r"has no missed\.json"):
        run(config(**begin, **small, rl__unsolved_share=1.0), tmp_path / "online")
    with pytest.raises(ValueError, match="found a right chain for every pair"):
        online.unsolved_prompts(set(), {example.uid for example in met}, met, 8, 1.0, seed=0)
    for other in ({"start": ""}, {"filter__pairs": 8}):
        with pytest.raises(ValueError, match="takes the prompts that an SFT"):
            run(config(**after | other, **small), tmp_path / "neither")


@pytest.mark.parametrize("balance", [False, True])
def test_the_prompts_are_those_that_learning_online_draws(pairs, balance):
    own = config(rl__steps=3, data__balance=balance)
    pool = make_pool(own, pairs, {})
    online = [one.uid for _ in range(3) for one in pool.draw()]
    assert [one.uid for one in offline_prompts(own, pairs)] == online
    assert len(set(online)) == 3 * own.rl.prompts


def test_missed_prompts_and_new_ones_come_in_the_shares_that_are_asked_for(pairs):
    source = pairs[:20]
    uids = [example.uid for example in source]
    missed, met = set(uids[:6]), set(uids[:12])  # and so eight are new

    def drawn(count, share, seed=0):
        rows = online.unsolved_prompts(missed, met, source, count, share, seed=seed)
        own = [example.uid for example in rows]
        assert len(set(own)) == len(own)
        assert not set(own) & (met - missed)
        return own, len(set(own) & missed)

    assert drawn(4, 1.0)[1] == 4
    assert drawn(4, 0.5)[1] == 2
    assert drawn(8, 1.0)[1] == 6  # no more were missed: new ones make it up
    own, again = drawn(12, 0.25)  # no more are new: missed ones make it up
    assert (len(own), again) == (12, 4)
    assert len(drawn(99, 0.5)[0]) == 6 + 8  # no more are left
    assert drawn(8, 0.5) == drawn(8, 0.5)
    assert drawn(8, 0.5) != drawn(8, 0.5, seed=1)


def test_trap_11_a_resumed_dpo_run_equals_the_uninterrupted_one(
    policy, tmp_path, sampled, monkeypatch
):
    from she_jax.train import metrics

    start = str(policy / "checkpoints" / "sft")
    changes = {"start": start, "method": "dpo", "shopworld__chains": "gold", "eval__pass_k": 0}
    run(config(**changes), tmp_path / "whole")
    written = metrics.MetricsWriter.write

    def die(self, phase, step, values):
        written(self, phase, step, values)
        if (phase, step) == ("srpo", 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(metrics.MetricsWriter, "write", die)
    with pytest.raises(KeyboardInterrupt):
        run(config(**changes), tmp_path / "run")
    monkeypatch.setattr(metrics.MetricsWriter, "write", written)
    run(config(**changes), tmp_path / "run")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    one, other = (tmp_path / name / "summary.json" for name in ("run", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_whose_updates_are_done_samples_no_more(policy, tmp_path, sampled, monkeypatch):
    """Killed between its last checkpoint and its summary."""
    start = str(policy / "checkpoints" / "sft")
    changes = {"start": start, "method": "dpo", "shopworld__chains": "gold", "eval__pass_k": 0}
    run(config(**changes, rl__steps=2), tmp_path / "run")
    summary = tmp_path / "run" / "summary.json"
    before = summary.read_bytes()
    summary.unlink()
    monkeypatch.setattr(Generator, "samples", None)
    run(config(**changes, rl__steps=2), tmp_path / "run")
    assert summary.read_bytes() == before


def test_a_run_goes_on_with_the_chains_it_began_with_or_not_at_all(policy, tmp_path, sampled):
    start = str(policy / "checkpoints" / "sft")
    changes = {"start": start, "method": "dpo", "shopworld__chains": "gold", "eval__pass_k": 0}
    run(config(**changes), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "srpo" / "4")
    whole = Generator.samples

    def others(self, *args):
        return whole(self, *args)[::-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "samples", others)
        with pytest.raises(ValueError, match="not those of the last checkpoint"):
            run(config(**changes), tmp_path / "run")


def test_a_signal_is_heard_while_rollouts_are_sampled(policy, tmp_path, sampled, capsys):
    def signalled(self, params, examples, k, seed, show):
        os.kill(os.getpid(), signal.SIGTERM)
        show(1)
        raise AssertionError("it samples on")

    start = str(policy / "checkpoints" / "sft")
    changes = {"start": start, "method": "dpo", "shopworld__chains": "gold", "eval__pass_k": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "samples", signalled)
        with pytest.raises(SystemExit) as left:
            run(config(**changes), tmp_path / "run")
    assert left.value.code == 143
    assert "SIGTERM: the same command samples these rollouts anew" in capsys.readouterr().out
    run(config(**changes), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_pair_without_a_label_is_not_one_that_was_missed(policy, tmp_path, monkeypatch, capsys):
    met = []

    def samples(self, params, examples, k, seed, show):
        met.extend(examples)
        texts = [one.rationale if one.label == 4 else "no chain" for one in examples]
        ids = self.format.encode(texts)
        return [[sample(t, tuple(own[-20:]))] for t, own in zip(texts, ids, strict=True)]

    monkeypatch.setattr(Generator, "samples", samples)
    changes = {"start": str(policy / "checkpoints" / "sft"), "method": "sft", "eval__pass_k": 0}
    changes |= {"shopworld__chains": "gold", "shopworld__annotated": 0.5}
    run(config(**changes, offline__chains="rejection"), tmp_path / "run")
    told = json.loads((tmp_path / "run" / "missed.json").read_text())
    assert set(told["missed"]) == {one.uid for one in met if one.label in (1, 2, 3)}
    silent = {one.uid for one in met if one.label is None}
    assert silent
    assert silent < set(told["met"])
    assert f"{len(silent)} of {len(told['met'])} pairs have no label" in capsys.readouterr().out


def test_a_policy_that_never_agrees_is_said(policy, tmp_path, monkeypatch):
    def samples(self, params, examples, k, seed, show):
        return [[sample("no chain")] * k for _ in examples]

    monkeypatch.setattr(Generator, "samples", samples)
    for method, message in (("sft", "no rollout is right"), ("dpo", "no group has both")):
        changes = {"start": str(policy / "checkpoints" / "sft"), "method": method}
        with pytest.raises(ValueError, match=message):
            run(config(**changes, eval__pass_k=0), tmp_path / method)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_rows_that_are_no_pairs_are_refused(method):
    with pytest.raises(ValueError, match=f"= 9 rows: method='{method}' takes them two by two"):
        _check_method(config(method=method, rl__prompts=3, rl__group_size=3))


@pytest.mark.parametrize("coverage", [1.0, 0.5])
def test_without_updates_a_run_ends_with_the_cold_start(policy, tmp_path, monkeypatch, coverage):
    """And the same pairs are not judged again, however many of their steps are annotated."""
    monkeypatch.delattr(Generator, "chains")
    changes = {"start": str(policy / "checkpoints" / "sft"), "rl__steps": 0, "eval__pass_k": 0}
    run(config(**changes, shopworld__coverage=coverage), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before = json.loads((policy / "eval" / "before.json").read_text())
    assert summary == before | {"before": before}
    assert np.isfinite(summary["macro_f1"])
    validation = "eval/step_000000_validation.json"  # for who begins with it
    assert (tmp_path / "run" / validation).read_text() == (policy / validation).read_text()
    assert not (tmp_path / "run" / "checkpoints" / "srpo").exists()
