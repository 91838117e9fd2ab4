"""Each way to grade, from a user's file to predictions in the user's values."""

import csv

import numpy as np
import pytest
from recipes import changed, config

import she_jax
from she_jax.cot import LABEL_STEP, CotSchema
from she_jax.data.dataset import open_split, prepare
from she_jax.data.loader import batches
from she_jax.data.rationales import write_chain
from she_jax.data.readers.judgments import TableConfig
from she_jax.data.readers.tables import Tables
from she_jax.evaluation.metrics import score
from she_jax.generate.prompts import instruction
from she_jax.rewards.verifier import outcome_reward, verify
from she_jax.runs.run import run

# How a file writes the labels, worst to best; what data.labels says; the values in and out.
SETS = {
    "0-3": (["0", "1", "2", "3"], "0-3", [0, 1, 2, 3]),
    "1-3": (["1.0", "2.0", "3.0"], "1-3", [1, 2, 3]),
    "5-1": (["5", "4", "3", "2", "1"], "5-1", [5, 4, 3, 2, 1]),
    "0-10": ([str(n) for n in range(11)], "0-10", list(range(11))),
    "binary": (["False", "True"], "False,True", ["False", "True"]),
    "words": (["poor", "FAIR", "good"], "poor,fair,good", ["poor", "fair", "good"]),
    "fractions": (["0", "0.50", "1.0"], "0,0.5,1", [0, 0.5, 1]),
    "esci": (["I", "c", "S", "E"], "esci", ["I", "C", "S", "E"]),
    "meanings": (["0", "1"], "0: off topic\n1: on topic", [0, 1]),
}


def write_table(path, texts, rows=60):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("query", "title", "label"))
        writer.writerows(
            (f"mug {n}", f"mug of kind {n}", texts[n % len(texts)]) for n in range(rows)
        )


@pytest.mark.parametrize("name", SETS)
def test_a_label_set_passes_through_everything_that_needs_no_model(name, tmp_path):
    texts, labels, values = SETS[name]
    write_table(tmp_path / "pairs.csv", texts)
    schema = CotSchema.build(labels=labels)
    settings = TableConfig(path=str(tmp_path / "pairs.csv"), chain=schema.options)
    dataset = prepare(Tables(data_dir=tmp_path / "data", config=settings))
    assert not dataset.bad_rows
    examples = [e for split in dataset.splits for e in open_split(dataset.path, split)]
    assert {(type(e.label), e.label) for e in examples} == {(type(v), v) for v in values}
    assert all(f"{value}" in instruction(schema) for value in values)
    rng = np.random.default_rng(0)
    chains = [schema.parse(write_chain(example, schema, rng)) for example in examples]
    assert all(chain.well_formed for chain in chains)
    assert [chain.label for chain in chains] == [example.label for example in examples]
    label = schema.names.index(LABEL_STEP)
    for chain, example in zip(chains, examples, strict=True):
        assert outcome_reward(chain, example) == 1
        rewards, known = verify(chain, example, schema)
        assert (rewards[label], known[label]) == (1, True)
    worst = schema.parse(write_chain(examples[0], schema, rng)).label
    other = next(e for e in examples if e.label != worst)
    assert outcome_reward(chains[0], other) == pytest.approx(0.1)
    metrics = score(chains, examples, schema)
    assert (metrics["macro_f1"], metrics["accuracy"], metrics["good_f1"]) == (1, 1, 1)
    assert list(metrics["f1"]) == [str(value) for value in values]
    assert np.shape(metrics["confusion"]) == (len(values), len(values) + 1)
    few = [e for e in examples if e.label == values[0]][:1]
    many = [e for e in examples if e.label == values[-1]]
    drawn = batches([*few, *many], 20, seed=0, balance=True)[0]
    assert sum(example.label == values[0] for example in drawn) == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_run_trains_and_predicts_with_a_label_set(name, tmp_path):
    texts, labels, values = SETS[name]
    write_table(tmp_path / "pairs.csv", texts, rows=120)
    small = {
        "data.name": "table",
        "data.path": str(tmp_path / "pairs.csv"),
        "data.labels": labels,
        "model.prompt_length": 0,
        "model.completion_length": 0,
        "model.vocab_size": 400,
        "rl.steps": 1,
        "rl.eval_every": 1,
        "eval.pass_k": 0,
        "export": True,
    }
    run(changed(config().unlock(), small), tmp_path / "run")
    rows = [{"query": "mug 1", "title": "mug of kind 1"}]
    for folder in (tmp_path / "run", tmp_path / "run" / "export"):
        (prediction,) = she_jax.load_judge(folder).predict(rows)
        assert prediction["label"] in (None, *values)
        shown = prediction["probabilities"]
        assert shown is None or list(shown) == [str(value) for value in values]
