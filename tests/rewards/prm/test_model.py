"""Scores of a process reward model: batches, shared rows, reference chains, critiques."""

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
def untrained():
    """An untrained language model on eight devices, and its parameters."""
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
    # Larger than initial ones, so that its output depends on its input.
    params = jax.tree.map(lambda x: 8 * x, init_params(config, jax.random.PRNGKey(0)))
    params = jax.device_put(params, shardings(params, mesh))
    return LanguageModel(model=build_model(config), prompts=prompts, mesh=mesh), params


@pytest.fixture
def readable(monkeypatch):
    """Makes every score known, though the untrained model gives both verdicts a low probability."""
    monkeypatch.setattr(module, "READABLE", 0.0)


def new(untrained, **changes):
    return ProcessRewardModel(*untrained, **{"answer_length": 48, "batch_size": 8} | changes)


def verdict_probability(untrained, prm, row):
    """P(correct) after the tokens of a row, from the forward pass alone, without padding."""
    lm, params = untrained
    output = lm.model.forward(params, jnp.array([row]), jnp.arange(len(row))[None])
    logits = np.asarray((output.hidden @ output.head)[0, -1])
    correct, incorrect = np.exp(logits[list(prm.format.rivals)] - logits.max())
    return correct / (correct + incorrect)


@pytest.mark.usefixtures("readable")
def test_scores_of_a_batch_equal_those_of_single_step_queries(untrained):
    together = new(untrained).score(STEPS, KEY)
    alone = [new(untrained, batch_size=24).score([step], KEY).score[0] for step in STEPS]
    assert together.known.all()
    np.testing.assert_allclose(together.score, alone, atol=1e-5)
    assert np.ptp(together.score) > 0.1  # it depends on the step
    assert ((together.score > 0) & (together.score < 1)).all()


CHAIN = ["query: lamp; red", "product: lamp; navy", "category: a / b => match", "label: 4"]


def chain_steps(lines=CHAIN):
    """A step query for each step of a chain."""
    return [
        StepQuery(
            example=LAMP, step=line.partition(":")[0], written="\n".join(lines[: n + 1]), chain="a"
        )
        for n, line in enumerate(lines)
    ]


@pytest.mark.usefixtures("readable")
def test_the_steps_of_a_chain_share_a_row_and_score_as_if_alone(untrained):
    steps, rows = [*chain_steps(), *chain_steps(CHAIN[:1] + CHAIN[3:])[1:]], []
    prm = new(untrained)
    reads = prm._verdict_scores
    prm._verdict_scores = lambda tokens, *rest: rows.append(tokens) or reads(tokens, *rest)
    together = prm.score(steps, KEY)
    assert len(rows) == 1
    assert len(np.unique(rows[0], axis=0)) == 2  # the last step has a row of its chain
    alone = [new(untrained).score([step], KEY).score[0] for step in steps]
    np.testing.assert_allclose(together.score, alone, atol=1e-5)
    assert np.ptp(together.score) > 0.1


REFERENCE = """query: lamp; red
product: lamp; navy
category: a / b => near
attributes: => met
label: 2"""


def with_references(untrained, texts, monkeypatch):
    """A process reward model with given reference chains, and the pairs it writes them for."""
    prm, asked = new(untrained, reference_chains=True), []

    def reference_chains(examples):
        asked.extend(examples)
        return texts[: len(examples)]

    monkeypatch.setattr(prm, "reference_chains", reference_chains)
    return prm, asked


@pytest.mark.usefixtures("readable")
def test_with_a_reference_chain_the_verdict_follows_the_comparison(untrained, monkeypatch):
    """Against the forward pass alone, one step at a time."""
    prm, asked = with_references(untrained, [REFERENCE], monkeypatch)
    steps = chain_steps()
    scores = prm.score(steps, KEY)
    assert asked == [LAMP]  # each pair once
    assert scores.known.all()
    critiques = ["lamp; red", "lamp; navy", "lamp / lamp: near, not match", "near, met: 2, not 4"]
    assert prm.critiques(steps) == critiques
    rows = prm.format.critiqued(prm.format.questions(steps), critiques)
    expected = [verdict_probability(untrained, prm, row) for row in rows]
    np.testing.assert_allclose(scores.score, expected, atol=1e-5)


@pytest.mark.usefixtures("readable")
def test_rows_with_long_comparisons_are_wider_and_score_as_if_alone(untrained, monkeypatch):
    long = replace(LAMP, query="mug")  # its reference chain has many items
    much = REFERENCE.replace("lamp; red", "; ".join("abcde")).replace("navy", "; ".join("fghij"))
    steps = [
        replace(step, example=pair, chain=str(n))
        for n, pair in enumerate([LAMP] * 7 + [long, LAMP])
        for step in chain_steps([f"query: lamp; {n}", *CHAIN[1:]])
    ]
    prm, widths = with_references(untrained, [REFERENCE, much], monkeypatch)[0], []
    reads = prm._verdict_scores
    prm._verdict_scores = lambda tokens, *rest: widths.append(tokens.shape) or reads(tokens, *rest)
    together = prm.score(steps, KEY)
    (rows, wide), (same, narrow) = widths
    assert rows == same == 8
    assert wide > narrow
    for pair, reference in ((LAMP, REFERENCE), (long, much)):
        alone = with_references(untrained, [reference], monkeypatch)[0]
        indices = [n for n, step in enumerate(steps) if step.example is pair]
        scores = [alone.score([steps[n]], KEY).score[0] for n in indices]
        np.testing.assert_allclose(together.score[indices], scores, atol=1e-5)
    assert together.known.all()


@pytest.mark.usefixtures("readable")
def test_beside_an_unreadable_reference_chain_every_score_is_unknown(untrained, monkeypatch):
    mug = replace(LAMP, query="mug")
    prm, asked = with_references(untrained, ["no chain", REFERENCE], monkeypatch)
    scores = prm.score([*chain_steps(), replace(STEPS[0], example=mug)], KEY)
    assert asked == [LAMP, mug]
    assert scores.known.tolist() == [False] * 4 + [True]
    assert prm.critiques(chain_steps()) == [""] * 4


def test_the_reference_chain_is_the_greedy_one(untrained):
    lm, params = untrained
    (chain,) = set(new(untrained, reference_chains=True).reference_chains([LAMP, LAMP]) or [])
    sample = jit_sample(
        lm.model,
        group_size=1,
        max_new_tokens=lm.prompts.completion_length,
        eos_id=lm.prompts.eos_ids,
        pad_id=lm.prompts.pad_id,
    )
    rollout = sample(params, lm.prompts.encode_prompts([LAMP])[0], KEY, 0.0)
    assert chain == lm.prompts.decode(rollout)[0]
    assert new(untrained).reference_chains([LAMP]) is None


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize("votes", [0, 1])
def test_a_chain_that_is_too_long_is_unknown_and_the_others_are_not(untrained, votes):
    long = StepQuery(example=LAMP, step="query", written=f"query: {'why ' * 99}")
    prm = new(untrained, votes=votes)
    prm._sampler = writes(prm, [" near\nverdict: correct"])
    scores = prm.score([STEPS[0], long, STEPS[1]], KEY)
    assert scores.known.tolist() == [True, False, True]
    assert prm.critiques([long, STEPS[0]]) == ["", "near verdict: correct"]


@pytest.mark.usefixtures("readable")
def test_one_vote_is_the_greedy_critique_whatever_the_key(untrained):
    scores = [new(untrained, votes=1).score(STEPS, jax.random.key(n)) for n in range(2)]
    np.testing.assert_array_equal(scores[0].score, scores[1].score)
    np.testing.assert_array_equal(scores[0].known, scores[1].known)


@pytest.mark.usefixtures("readable")
def test_the_score_is_the_share_of_correct_among_the_two_verdicts(untrained):
    prm = new(untrained)
    (question,) = prm.format.questions(STEPS[1:2])
    row = [*question.ids, *prm.format.marks[VERDICT], *prm.format.before]
    score = prm.score(STEPS[1:2], KEY).score[0]
    np.testing.assert_allclose(score, verdict_probability(untrained, prm, row), atol=1e-5)


@pytest.mark.usefixtures("readable")
def test_equal_step_queries_are_scored_once_per_call(untrained):
    prm = new(untrained)
    first = prm.score(STEPS, KEY)
    assert (prm.asked, prm.repeated) == (4, 1)  # the first and the fourth are the same
    again = prm.score(STEPS, KEY)
    assert (prm.asked, prm.repeated) == (4, 1)  # nothing is kept between calls
    np.testing.assert_array_equal(again.score, first.score)
    assert prm._verdict_probabilities._cache_size() == 1  # one shape


def test_a_score_is_unknown_where_both_verdicts_are_improbable(untrained):
    """As they are to an untrained model."""
    scores = new(untrained).score(STEPS, KEY)
    assert not scores.known.any()
    assert not scores.score.any()


def test_no_step_queries(untrained):
    assert new(untrained).score([], KEY).score.shape == (0,)


def writes(prm, votes):
    """A sampler that writes given answers, in turn, one for each vote of each step query."""
    prompts, length = prm.format.prompts, prm.format.answer_length

    def sampler(params, batch, key, temperature):
        del params, key, temperature
        count, width = batch.tokens.shape
        texts = (votes * count)[: count * max(prm._votes, 1)]
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
def test_the_score_is_the_mean_over_the_readable_critiques(untrained):
    prm = new(untrained, votes=3)
    answers = [" near\nverdict: correct", "no verdict", " far\nverdict: incorrect"]
    prm._sampler = writes(prm, answers)
    scores = prm.score(STEPS[:1], KEY)
    questions = prm.format.questions(STEPS[:1])
    rows = prm.format.critiqued(questions * 8, ["near", "far"] * 4)
    length = prm.format.question_length + prm.format.answer_length
    batch = prm.format.padded(rows, length)
    ends = np.full((8, 1), length - 1, np.int32)
    tokens, position_ids = np.asarray(batch.tokens), positions(batch.mask)
    expected = prm._verdict_scores(tokens, position_ids, ends)[:2, 0]
    assert expected[0] != expected[1]
    np.testing.assert_allclose(scores.score, [np.mean(expected)], rtol=1e-6)
    assert scores.known.all()


@pytest.mark.usefixtures("readable")
def test_without_a_readable_critique_the_step_is_unknown(untrained):
    prm = new(untrained, votes=2)
    prm._sampler = writes(prm, ["no verdict", "\nverdict: perhaps"])
    assert not prm.score(STEPS, KEY).known.any()


@pytest.mark.usefixtures("readable")
def test_sampled_critiques_are_a_function_of_the_key(untrained):
    """So that a resumed run scores as an uninterrupted one."""
    prm = new(untrained, votes=2, answer_length=20)
    first = prm.score(STEPS, KEY)
    again = prm.score(STEPS, KEY)
    np.testing.assert_array_equal(first.score, again.score)
    np.testing.assert_array_equal(first.known, again.known)


def stub(value=0.75):
    """Gives every step query the same score, and keeps the step queries."""
    seen = []

    def score(step_queries, key):
        del key
        seen.extend(step_queries)
        shape = len(step_queries)
        return StepScores(score=np.full(shape, value, np.float32), known=np.ones(shape, bool))

    return types.SimpleNamespace(score=score, seen=seen)


def test_chains_with_missing_repeated_reordered_and_unreadable_steps_have_defined_scores():
    texts = [
        "query: lamp\nproduct: lamp\ncategory: => match\nattributes: => met\nlabel: 4",
        "product: lamp\nquery: too late\ncategory: => match\ncategory: => near\nlabel: nine",
        "",
    ]
    prm = stub()
    scores = score_steps(prm, [SCHEMA.parse(t) for t in texts], [LAMP] * 3, SCHEMA, KEY)
    np.testing.assert_array_equal(
        scores.known,
        [[True] * 5, [False, True, True, False, True], [False] * 5],
    )
    np.testing.assert_array_equal(scores.score[0], [0.75] * 5)
    # The unreadable label scores 0 without a step query.
    np.testing.assert_array_equal(scores.score[1], [0, 0.75, 0.75, 0, 0])
    assert [step_query.step for step_query in prm.seen] == [*SCHEMA.names, "product", "category"]
    assert prm.seen[-1].written == "product: lamp\ncategory: match"


def test_diagnostics_by_hand():
    scores = StepScores(
        score=np.array([[0.9, 0.2, 0.0], [0.7, 0.6, 0.4]], np.float32),
        known=np.array([[True, True, False], [True, True, True]]),
    )
    verifier = np.array([[1, 1, 1], [0.5, 1, 0]], np.float32)
    known = np.array([[True, True, True], [True, False, False]])
    schema = types.SimpleNamespace(names=("a", "b", "c"))
    metrics = prm_diagnostics(verifier, known, scores, schema)  # pyright: ignore
    # A reward of 1/2 is not correct, so the score of 0.7 disagrees with it.
    assert metrics == pytest.approx(
        {
            "prm/a": 0.8,
            "disagreement/a": 0.5,
            "prm/b": 0.4,
            "disagreement/b": 1.0,
            "prm/c": 0.4,
            "prm": (0.9 + 0.2 + 0.7 + 0.6 + 0.4) / 5,
            "disagreement": 2 / 3,
        }
    )
