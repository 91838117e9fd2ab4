"""The examiner at work: batches, memory, votes, masks."""

import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from she_jax.cot import CotSchema
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.prompts import EOS, PAD, PromptFormat, positions, train_tokenizer
from she_jax.generate.sampler import jit_sample
from she_jax.models.decoder import ModelConfig, build_model, init_params
from she_jax.models.sharding import make_mesh, shardings
from she_jax.rewards.prm import model as module
from she_jax.rewards.prm.metrics import prm_diagnostics
from she_jax.rewards.prm.model import ProcessRewardModel, StepScores, score_steps
from she_jax.rewards.prm.step_query import VERDICT, StepQuery
from she_jax.types import Example, Rollout

SCHEMA = CotSchema()
LAMP = Example(uid="a", query="red lamp", product={"title": "navy lamp"})
KEY = jax.random.key(0)
STEPS = [
    StepQuery(example=LAMP, step="query", written=f"query: {text}")
    for text in ("lamp", "lamp; red", "lamp; red; oak", "lamp", "a longer one than the others are")
]


@pytest.fixture(scope="module")
def policy():
    """An examiner that has learnt nothing, on eight devices."""
    tokenizer = train_tokenizer(["query: lamp; red"], 280)
    vocab = tokenizer.get_vocab()
    prompts = PromptFormat(
        tokenizer=tokenizer,
        schema=SCHEMA,
        eos_ids=(vocab[EOS],),
        pad_id=vocab[PAD],
        prompt_length=40,
        completion_length=60,
    )
    config = ModelConfig(vocab_size=280, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32)
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    # Larger than at the start of training, so that what it says hangs on what it reads.
    params = jax.tree.map(lambda x: 8 * x, init_params(config, jax.random.PRNGKey(0)))
    params = jax.device_put(params, shardings(params, mesh))
    return LanguageModel(model=build_model(config), params=params, format=prompts, mesh=mesh)


@pytest.fixture
def readable(monkeypatch):
    """Takes whatever the model thinks of the two verdicts, though it thinks little of either."""
    monkeypatch.setattr(module, "READABLE", 0.0)


def new(policy, **changes):
    return ProcessRewardModel(policy, **{"answer_length": 48, "batch_size": 8} | changes)


@pytest.mark.usefixtures("readable")
def test_batched_scores_equal_those_one_by_one(policy):
    together = new(policy).score(STEPS, KEY)
    alone = [new(policy, batch_size=24).score([one], KEY) for one in STEPS]
    assert together.known.all()
    np.testing.assert_allclose(together.score, [one.score[0] for one in alone], atol=1e-5)
    assert np.ptp(together.score) > 0.1  # it hangs on what is asked
    assert ((together.score > 0) & (together.score < 1)).all()


CHAIN = ["query: lamp; red", "product: lamp; navy", "category: a / b => match", "label: 4"]


def chain_steps(lines=CHAIN):
    """An examination of each step of a chain."""
    return [
        StepQuery(
            example=LAMP, step=line.partition(":")[0], written="\n".join(lines[: n + 1]), chain="a"
        )
        for n, line in enumerate(lines)
    ]


@pytest.mark.usefixtures("readable")
def test_the_steps_of_a_chain_share_a_row_and_score_as_each_would_alone(policy):
    steps, rows = [*chain_steps(), *chain_steps(CHAIN[:1] + CHAIN[3:])[1:]], []
    examiner = new(policy)
    reads = examiner._verdict_scores
    examiner._verdict_scores = lambda tokens, *rest: rows.append(tokens) or reads(tokens, *rest)
    together = examiner.score(steps, KEY)
    assert len(rows) == 1
    assert len(np.unique(rows[0], axis=0)) == 2  # the last step follows another chain
    alone = [new(policy).score([one], KEY).score[0] for one in steps]
    np.testing.assert_allclose(together.score, alone, atol=1e-5)
    assert np.ptp(together.score) > 0.1


OWN = "query: lamp; red\nproduct: lamp; navy\ncategory: a / b => near\nattributes: => met\nlabel: 2"


def owns(policy, texts, monkeypatch):
    """An examiner that writes given chains of its own, and the pairs it is asked for."""
    examiner, asked = new(policy, reference_chains=True), []

    def reference_chains(examples):
        asked.extend(examples)
        return texts[: len(examples)]

    monkeypatch.setattr(examiner, "own_chains", reference_chains)
    return examiner, asked


@pytest.mark.usefixtures("readable")
def test_with_a_chain_of_its_own_it_reads_the_verdict_behind_what_differs(policy, monkeypatch):
    """Against the forward pass written out, a step at a time."""
    examiner, asked = owns(policy, [OWN], monkeypatch)
    steps = chain_steps()
    told = examiner.score(steps, KEY)
    assert asked == [LAMP]  # a pair once
    assert told.known.all()
    critiques = ["lamp; red", "lamp; navy", "lamp / lamp: near, not match", "near, met: 2, not 4"]
    assert examiner.remarks(steps) == critiques
    questions = examiner.format.questions(steps)
    for row, score in zip(examiner.format.critiqued(questions, critiques), told.score, strict=True):
        output = policy.model.forward(policy.params, jnp.array([row]), jnp.arange(len(row))[None])
        logits = np.asarray((output.hidden @ output.head)[0, -1])[list(examiner.format.rivals)]
        np.testing.assert_allclose(score, jax.nn.softmax(logits)[0], atol=1e-5)


@pytest.mark.usefixtures("readable")
def test_long_comparisons_are_read_in_more_room_than_short_ones(policy, monkeypatch):
    """And score as they would alone."""
    long = replace(LAMP, query="mug")  # of which its own chain says much
    much = OWN.replace("lamp; red", "; ".join("abcde")).replace("navy", "; ".join("fghij"))
    steps = [
        replace(one, example=pair, chain=str(n))
        for n, pair in enumerate([LAMP] * 7 + [long, LAMP])
        for one in chain_steps([f"query: lamp; {n}", *CHAIN[1:]])
    ]
    examiner, widths = owns(policy, [OWN, much], monkeypatch)[0], []
    reads = examiner._verdict_scores
    examiner._verdict_scores = lambda tokens, *rest: (
        widths.append(tokens.shape) or reads(tokens, *rest)
    )
    together = examiner.score(steps, KEY)
    (rows, wide), (same, narrow) = widths
    assert rows == same == 8
    assert wide > narrow
    for pair, own in ((LAMP, OWN), (long, much)):
        alone = owns(policy, [own], monkeypatch)[0]
        mine = [n for n, one in enumerate(steps) if one.example is pair]
        scores = [alone.score([steps[n]], KEY).score[0] for n in mine]
        np.testing.assert_allclose(together.score[mine], scores, atol=1e-5)
    assert together.known.all()


@pytest.mark.usefixtures("readable")
def test_beside_an_own_chain_that_cannot_be_read_all_is_unknown(policy, monkeypatch):
    mug = replace(LAMP, query="mug")
    examiner, asked = owns(policy, ["no chain", OWN], monkeypatch)
    told = examiner.score([*chain_steps(), replace(STEPS[0], example=mug)], KEY)
    assert asked == [LAMP, mug]
    assert told.known.tolist() == [False] * 4 + [True]
    assert examiner.remarks(chain_steps()) == [""] * 4


def test_its_own_chain_is_the_most_likely_one(policy):
    (own,) = set(new(policy, reference_chains=True).reference_chains([LAMP, LAMP]) or [])
    rollout = jit_sample(
        policy.model,
        group_size=1,
        max_new_tokens=policy.format.completion_length,
        eos_id=policy.format.eos_ids,
        pad_id=policy.format.pad_id,
    )(policy.params, policy.format.prompts([LAMP])[0], KEY, 0.0)
    assert own == policy.format.texts(rollout)[0]
    assert new(policy).reference_chains([LAMP]) is None


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize("votes", [0, 1])
def test_a_chain_beyond_its_length_is_unknown_and_the_others_are_not(policy, votes):
    long = StepQuery(example=LAMP, step="query", written=f"query: {'why ' * 99}")
    examiner = new(policy, votes=votes)
    examiner._sampler = writes(examiner, [" near\nverdict: correct"])
    told = examiner.score([STEPS[0], long, STEPS[1]], KEY)
    assert told.known.tolist() == [True, False, True]
    assert examiner.remarks([long, STEPS[0]]) == ["", "near verdict: correct"]


@pytest.mark.usefixtures("readable")
def test_one_vote_is_the_most_likely_critique_whatever_the_key(policy):
    scores = [new(policy, votes=1).score(STEPS, jax.random.key(n)) for n in range(2)]
    np.testing.assert_array_equal(scores[0].score, scores[1].score)
    np.testing.assert_array_equal(scores[0].known, scores[1].known)


@pytest.mark.usefixtures("readable")
def test_the_score_is_the_share_of_correct_among_the_two_verdicts(policy):
    """Against the forward pass written out, without padding."""
    examiner = new(policy)
    question = examiner.format.questions(STEPS[1:2])[0]
    row = [*question.ids, *examiner.format.marks[VERDICT], *examiner.format.before]
    tokens, place = jnp.array([row]), jnp.arange(len(row))[None]
    output = policy.model.forward(policy.params, tokens, place)
    logits = (output.hidden @ output.head)[0, -1]
    right, wrong = np.exp(np.asarray(logits)[list(examiner.format.rivals)] - logits.max())
    score = examiner.score(STEPS[1:2], KEY).score[0]
    np.testing.assert_allclose(score, right / (right + wrong), atol=1e-5)


@pytest.mark.usefixtures("readable")
def test_in_one_call_each_question_is_asked_once(policy):
    examiner = new(policy)
    first = examiner.score(STEPS, KEY)
    assert (examiner.asked, examiner.repeated) == (4, 1)  # the first and the fourth are the same
    again = examiner.score(STEPS, KEY)
    assert (examiner.asked, examiner.repeated) == (4, 1)  # and nothing is remembered
    np.testing.assert_array_equal(again.score, first.score)
    assert examiner._verdict_probabilities._cache_size() == 1  # one shape


def test_a_verdict_that_cannot_be_read_is_unknown(policy):
    """An untrained model gives the two verdicts next to nothing."""
    told = new(policy).score(STEPS, KEY)
    assert not told.known.any()
    assert not told.score.any()


def test_nothing_to_examine(policy):
    assert new(policy).score([], KEY).score.shape == (0,)


def writes(examiner, votes):
    """A sampler that writes given answers, ``votes`` for each question in turn."""
    prompts, length = examiner.format.prompts, examiner.format.answer_length

    def sampler(params, batch, key, temperature):
        del params, key, temperature
        count, width = batch.tokens.shape
        texts = (votes * count)[: count * max(examiner._votes, 1)]
        tokens = np.zeros((len(texts), width + length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, text in enumerate(texts):
            ids = [*prompts.encode([text])[0], prompts.eos_ids[0]]
            tokens[row, width : width + len(ids)] = ids
            mask[row, width : width + len(ids)] = True
        blank = np.zeros(tokens.shape)
        return Rollout(tokens=tokens, prompt_mask=blank > 0, completion_mask=mask, logps=blank)

    return sampler


@pytest.mark.usefixtures("readable")
def test_votes_are_averaged_over_the_critiques_that_can_be_read(policy):
    examiner = new(policy, votes=3)
    answers = [" near\nverdict: correct", "no verdict", " far\nverdict: incorrect"]
    examiner._sampler = writes(examiner, answers)
    told = examiner.score(STEPS[:1], KEY)
    question = examiner.format.questions(STEPS[:1])
    rows = examiner.format.critiqued(question * 8, ["near", "far"] * 4)
    length = examiner.format.question_length + examiner.format.answer_length
    batch = examiner.format.padded(rows, length)
    ends = np.full((8, 1), length - 1, np.int32)
    tokens, place = np.asarray(batch.tokens), positions(batch.mask)
    expected = examiner._verdict_scores(tokens, place, ends)[:2, 0]
    assert expected[0] != expected[1]
    np.testing.assert_allclose(told.score, [np.mean(expected)], rtol=1e-6)
    assert told.known.all()


@pytest.mark.usefixtures("readable")
def test_without_a_readable_critique_the_step_is_unknown(policy):
    examiner = new(policy, votes=2)
    examiner._sampler = writes(examiner, ["no verdict", "\nverdict: perhaps"])
    assert not examiner.score(STEPS, KEY).known.any()


@pytest.mark.usefixtures("readable")
def test_sampled_critiques_are_a_function_of_the_key(policy):
    """A resumed run has nothing in memory, and must score alike."""
    examiner = new(policy, votes=2, answer_length=20)
    first = examiner.score(STEPS, KEY)
    again = examiner.score(STEPS, KEY)
    np.testing.assert_array_equal(first.score, again.score)
    np.testing.assert_array_equal(first.known, again.known)


def stub(score=0.75):
    """Scores every question alike, and keeps what it was asked."""
    seen = []

    def answer(questions, key):
        del key
        seen.extend(questions)
        shape = len(questions)
        return StepScores(score=np.full(shape, score, np.float32), known=np.ones(shape, bool))

    return types.SimpleNamespace(score=answer, seen=seen)


def test_chains_with_missing_repeated_reordered_and_unreadable_steps_have_defined_scores():
    texts = [
        "query: lamp\nproduct: lamp\ncategory: => match\nattributes: => met\nlabel: 4",
        "product: lamp\nquery: too late\ncategory: => match\ncategory: => near\nlabel: nine",
        "",
    ]
    examiner = stub()
    told = score_steps(examiner, [SCHEMA.parse(t) for t in texts], [LAMP] * 3, SCHEMA, KEY)
    np.testing.assert_array_equal(
        told.known,
        [[True] * 5, [False, True, True, False, True], [False] * 5],
    )
    np.testing.assert_array_equal(told.score[0], [0.75] * 5)
    # The unreadable label is wrong without asking.
    np.testing.assert_array_equal(told.score[1], [0, 0.75, 0.75, 0, 0])
    assert [one.step for one in examiner.seen] == [*SCHEMA.names, "product", "category"]
    assert examiner.seen[-1].written == "product: lamp\ncategory: match"


def test_contradictions():
    told = StepScores(
        score=np.array([[0.9, 0.2, 0.0], [0.7, 0.6, 0.4]], np.float32),
        known=np.array([[True, True, False], [True, True, True]]),
    )
    verifier = np.array([[1, 1, 1], [0.5, 1, 0]], np.float32)
    known = np.array([[True, True, True], [True, False, False]])
    schema = types.SimpleNamespace(names=("a", "b", "c"))
    figures = prm_diagnostics(verifier, known, told, schema)  # pyright: ignore
    # Half marks are not correct, so the examiner's 0.7 contradicts them.
    assert figures == pytest.approx(
        {
            "examiner/a": 0.8,
            "disagreement/a": 0.5,
            "examiner/b": 0.4,
            "disagreement/b": 1.0,
            "examiner/c": 0.4,
            "examiner": (0.9 + 0.2 + 0.7 + 0.6 + 0.4) / 5,
            "disagreement": 2 / 3,
        }
    )
