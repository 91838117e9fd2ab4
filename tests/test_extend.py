"""A user's own parts: the code of docs/extend.md runs, and what goes wrong in them is said."""

import importlib
import json
import re
import sys
from hashlib import sha256
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers
from recipes import ROOT, config, lines

import she_jax
from she_jax.cot import CotSchema
from she_jax.data.readers.custom import Custom
from she_jax.rewards.checked import checked_outcome_reward, checked_step_reward
from she_jax.runs.config import inherit, parse
from she_jax.runs.plugins import load_plugin, record_plugins
from she_jax.runs.run import run
from she_jax.types import Example, UserError

BLOCKS = dict(
    re.findall(
        r"^```python\n# (\w+\.py)\n(.*?)^```",
        (ROOT / "docs/extend.md").read_text(encoding="utf-8"),
        re.M | re.S,
    )
)
LOOPS = ("linen", "nnx", "equinox")
SCHEMA = CotSchema()
CHAIN = SCHEMA.parse("query: mug\nproduct: cup\ncategory: near\nattributes: met\nlabel: 3")
PAIR = Example(uid="p7", query="red mug", product={"title": "Blue \x1b[31mcup"}, label=2)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working folder with the page's modules, which are forgotten afterwards."""
    for name, code in BLOCKS.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if f"{name}.py" in BLOCKS or name == "broken":
            del sys.modules[name]


def test_the_page_shows_parts_and_loops_each_short():
    parts = {"rules.py", "pairs.py", "sums.py", "credit.py", "model.py"}
    loops = {"per_token.py", "task.py", *(f"{library}_loop.py" for library in LOOPS)}
    assert set(BLOCKS) == parts | loops
    for name, code in BLOCKS.items():
        limit = 21 if name in parts else 30
        assert len([line for line in code.splitlines() if line.strip()]) <= limit, name


def test_a_run_with_a_users_rewards_data_set_and_estimator(workplace, capsys):
    recipe = {
        "data__name": "pairs:Mugs",
        "reward__step": "rules:check",
        "reward__outcome": "rules:label_only",
        "rl__estimator": "credit:best_of_group",
        "model__completion_length": 0,
        "rl__steps": 1,
        "rl__group_size": 2,
        "eval__pass_k": 0,
    }
    run(config(**recipe), workplace / "run")
    metrics = [line for line in lines(workplace / "run") if line["phase"] == "rl"]
    assert 0 <= metrics[0]["reward"] <= 1
    tried = r"mean rewards of \d+ chains of the training pairs: query [^,]+, .*outcome \d\.\d\d"
    assert re.search(tried, " ".join(capsys.readouterr().out.split()))
    plugins = json.loads((workplace / "run/plugins.json").read_text())
    assert plugins["reward.step"]["name"] == "rules:check"
    assert len(plugins["rl.estimator"]["sha256"]) == 64
    # A reward model of this run reads the pairs from the disk: a checkpoint's files run no code.
    base = config().unlock()
    base.checkpoint = str(workplace / "run")
    whole = inherit(base.lock())
    assert whole.data.name == "prepared"
    assert whole.data.path == plugins["data.name"]["prepared"]
    # The source changed: the run goes on, and says so.
    with (workplace / "rules.py").open("a") as file:
        file.write("# another line\n")
    record_plugins(workplace / "run", parse(config(**recipe), workplace / "run").plugins)
    assert "reward.step=rules:check: its source changed" in capsys.readouterr().out


def test_a_chain_of_ones_own_without_a_label_trains_by_its_reward(workplace):
    recipe = {
        "data__name": "sums:Sums",
        "reward__outcome": "sums:correct",
        "chain__steps": ("plan: how", "check: the other way => same|other", "answer: the sum"),
        "model__completion_length": 0,
        "rl__steps": 3,
        "rl__eval_every": 3,
    }
    run(config(**recipe), workplace / "run")
    rows = [line for line in lines(workplace / "run") if line["phase"] == "rl"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    summary = json.loads((workplace / "run" / "summary.json").read_text())
    assert 0 <= summary["outcome"] <= 1
    assert summary["macro_f1"] is None
    for missing in ({"reward__outcome": ""}, {"method": "sft"}):
        with pytest.raises(UserError, match=r"no step 'label', so its outcome is not known"):
            run(config(**recipe | missing), workplace / "other")
    with pytest.raises(UserError, match=r"no step 'label': set filter.pairs=0"):
        run(config(**recipe, filter__pairs=8), workplace / "other")
    # Another outcome from the same cold start: nothing is taken over, and all is tried at once.
    (workplace / "broken.py").write_text(
        "def always(chains, examples):\n    return [1.0] * len(chains)\n\n\n"
        "def long(chains, examples):\n    return [1.0] * 99\n"
    )
    recipe |= {"init_from": str(workplace / "run" / "checkpoints" / "sft"), "rl__steps": 0}
    run(config(**recipe | {"reward__outcome": "broken:always"}), workplace / "always")
    assert json.loads((workplace / "always" / "summary.json").read_text())["outcome"] == 1
    with pytest.raises(UserError, match=r"broken:long returned \[99\], expected \[65\]"):
        run(config(**recipe | {"reward__outcome": "broken:long"}), workplace / "long")
    assert not (workplace / "long" / "checkpoints").exists()


def test_the_model_of_the_page_takes_an_update():
    names: dict = {}
    exec(compile(BLOCKS["model.py"], "model.py", "exec"), names)
    tokens = jax.numpy.arange(12).reshape(2, 6)
    batch = she_jax.TrainBatch(
        tokens=tokens,
        positions=jax.numpy.tile(jax.numpy.arange(6), (2, 1)),
        loss_weights=jax.numpy.ones((2, 6)),
        advantages=jax.numpy.ones((2, 6)),
        old_logps=she_jax.token_logps(names["forward"](names["params"], tokens, tokens), tokens)[0],
    )
    state, metrics = names["update"](names["state"], batch)
    assert state.step == 1
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("library", LOOPS)
def test_a_loop_of_the_page_learns(workplace, monkeypatch, library):
    if library == "equinox":
        pytest.importorskip("equinox")
    monkeypatch.syspath_prepend(workplace)
    loop = importlib.import_module(f"{library}_loop")
    assert loop.reward > 0.9  # chance is a quarter
    if library == "nnx":  # other masks are not mistaken for another policy
        tokens = jax.numpy.zeros((2, 5), int)
        logps = [loop.dropout_logps(loop.model, tokens, jax.random.key(n)) for n in range(2)]
        assert abs(logps[0] - logps[1]).max() > 1e-3
        assert loop.sums["logp_gap_max"] == 0


def test_advantages_of_tokens_follow_the_steps_of_the_text(workplace, monkeypatch):
    """By ids as by offsets, for a tokenizer whose tokens hold newlines and whole words."""
    monkeypatch.syspath_prepend(workplace)
    per_token = importlib.import_module("per_token")
    attributes = ("red unstated => unstated", "red met => met", "red => met", "=> met")
    texts = [
        f"query: red mug\nproduct: cup\n\ncategory: near\nattributes: {text}\nlabel: {label}"
        for text, label in zip(attributes, (2, 2, 3, 4), strict=True)
    ]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    encoded = tokenizer.encode_batch(texts)
    width = max(len(row.ids) for row in encoded) + 2
    ids, steps = np.zeros((4, width), int), np.full((4, width), -1)
    for row, (text, tokens) in enumerate(zip(texts, encoded, strict=True)):
        ids[row, : len(tokens.ids)] = tokens.ids
        lines = per_token.schema.parse(text).line_steps
        starts = [*(start for start, _ in tokens.offsets), len(text)]  # the end token's, too
        steps[row, : len(starts)] = [lines[text.count("\n", 0, start)] for start in starts]
    newlines = per_token.newline_counts(tokenizer, tokenizer.get_vocab_size())
    got = per_token.advantages(texts, ids, steps >= 0, newlines, [PAIR] * 4, group_size=4)
    assert not got[steps < 0].any()
    by_step = np.array([[got[row][steps[row] == k].mean() for k in range(5)] for row in range(4)])
    np.testing.assert_allclose(got, np.where(steps < 0, 0, np.take_along_axis(by_step, steps, 1)))
    # The outcomes are 1, 1, 0, 0, and so are the attributes; no other reward differs.
    golden = [[1, 1, 1, 2, 1], [1, 1, 1, 2, 1], [-1, -1, -1, -2, -1], [-1, -1, -1, -2, -1]]
    np.testing.assert_allclose(by_step, golden, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:check", "there is no module 'nowhere', neither in "),
        ("rules:chek", "rules has no function or class 'chek'; it has "),
        ("rules:STEPS", "rules has no function or class 'STEPS'"),
        ("broken:check", "its import failed: ZeroDivisionError"),
    ],
)
def test_a_name_that_cannot_be_imported(workplace, name, message):
    (workplace / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=re.escape(f"reward.step={name}: ")) as error:
        load_plugin("reward.step", name)
    assert message in str(error.value)


def test_a_built_in_module_has_no_source_to_hash():
    assert load_plugin("reward.outcome", "itertools:count").digest == sha256(b"").hexdigest()


def test_pairs_that_raise_name_the_split_and_the_place():
    class Mine:
        def examples(self, split):
            yield PAIR
            raise KeyError("price")

    rows = Custom.rows(SimpleNamespace(pairs=Mine, builder_config=SimpleNamespace(pairs="my:Mine")))
    assert next(rows).example is PAIR
    message = r"data.name=my:Mine raised KeyError: 'price' \(split train, after example 1\)"
    with pytest.raises(UserError, match=message):
        next(rows)


def raising(chains, examples):
    raise KeyError("brand")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raising, "raised KeyError: 'brand'"),
        (lambda c, e: np.zeros((1, 5)), "returned ndarray, expected a pair"),
        (lambda c, e: (np.zeros((1, 4)), np.ones((1, 4))), "returned rewards [1, 4] and mask"),
        (lambda c, e: (np.full((1, 5), 1.5), np.ones((1, 5))), "gave step 'query' the reward 1.5"),
        (lambda c, e: (np.full((1, 5), np.nan), np.ones((1, 5))), "the reward nan"),
        (lambda c, e: ([[0.5, 1]], [[1], [1, 0]]), "returned what is not an array of numbers"),
    ],
)
def test_step_rewards_of_the_wrong_form_name_the_pair_and_the_chain(function, message):
    checked = checked_step_reward(function, "reward.step=rules:check", SCHEMA)
    with pytest.raises(UserError, match=r"reward\.step=rules:check ") as error:
        checked([CHAIN], [PAIR])
    text = str(error.value)
    assert message in text
    assert "pair p7: query 'red mug'" in text
    assert "category:  => near" in text
    assert "\x1b" not in text  # what a data set wrote cannot act on the screen


def test_unknown_step_rewards_may_be_anything():
    known = np.array([[True, False, False, False, False]])
    checked = checked_step_reward(
        lambda c, e: (np.array([[0.5, 7.0, np.nan, -1.0, 2.0]]), known), "name", SCHEMA
    )
    rewards, mask = checked([CHAIN], [PAIR])
    np.testing.assert_array_equal(rewards, [[0.5, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask, known)


def test_the_rollout_that_made_a_function_fail_is_named():
    def fails_on_two(chains, examples):
        if any(example.uid == "p2" for example in examples):
            raise ValueError("no price")
        return np.zeros(len(chains))

    examples = [Example(uid=f"p{n}", query="q", product={"title": "t"}) for n in range(4)]
    checked = checked_outcome_reward(fails_on_two, "reward.outcome=rules:price", SCHEMA)
    with pytest.raises(UserError, match=r"raised ValueError: no price .*\n  pair p2: "):
        checked([CHAIN] * 4, examples)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], "returned [1], expected [2]"),
        ([0.5, -1.0], "gave a rollout the reward -1.0"),
        ([0.5, "high"], "returned what is not an array of numbers"),
    ],
)
def test_outcome_rewards_of_the_wrong_form(values, message):
    checked = checked_outcome_reward(lambda c, e: values, "reward.outcome=rules:price", SCHEMA)
    with pytest.raises(UserError, match=re.escape(message)):
        checked([CHAIN] * 2, [PAIR] * 2)


def test_an_estimator_that_returns_something_else(workplace):
    (workplace / "broken.py").write_text("def mine(r, m, o, **options):\n    return o\n")
    recipe = config(rl__estimator="broken:mine")
    estimator = parse(recipe, workplace / "run").credit.estimator
    with pytest.raises(UserError, match=r"rl\.estimator=broken:mine returned ndarray"):
        estimator(np.zeros((4, 2)), np.ones((4, 2), bool), np.zeros(4), group_size=2)


def test_methods_without_rollouts_take_no_users_reward(workplace):
    recipe = config(method="dpo", reward__outcome="rules:label_only", rl__group_size=2)
    with pytest.raises(UserError, match="takes its chains by labels and annotation"):
        run(recipe, workplace / "run")
