"""Blocks of predictions: shared out, resumed, joined, and refused where something else is there."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from she_jax.cot import CotSchema
from she_jax.evaluation.decide import DecideConfig
from she_jax.evaluation.judge import Calibration, Evidence
from she_jax.generate.generator import Sample
from she_jax.runs import blocks
from she_jax.runs.blocks import Share
from she_jax.runs.predictions import OutputConfig, join_blocks, read_predictions
from she_jax.training.stop import StopSignal
from she_jax.types import Example, UserError

SCHEMA = CotSchema.build(labels="0-3")
EXAMPLES = [Example(uid=f"{n}", query=f"mug {n}", product={"title": "ß"}) for n in range(7)]
CHAIN = "query: a\nproduct: b\ncategory: match\nattributes: met\nlabel: {}"


class FakeDecider:
    """Decides by the length of a title, or by a random draw of the block."""

    def __init__(self, temperature=None):
        self.config = DecideConfig(samples=2, rule="majority", seed=3)
        self.labels, self.lm = (
            SCHEMA.labels,
            SimpleNamespace(prompts=SimpleNamespace(schema=SCHEMA)),
        )
        self.judged, self._temperature = [], temperature

    def chains_a_pair(self, rule):
        return 2

    def calibrate(self, source):
        return Calibration(temperature=self._temperature, review_below=0.7)

    def gather(self, pairs, rule, seed, show):
        self.judged += [pair.uid for pair in pairs]
        show(len(pairs))
        texts = [CHAIN.format((seed + int(pair.uid)) % 5) for pair in pairs]
        samples = [
            Sample(tokens=(), text=text, chain=SCHEMA.parse(text), truncated=False)
            for text in texts
        ]
        return Evidence(greedy=samples, samples=[[sample] * 2 for sample in samples])


def judge(folder, decider, content=None, run=True, **options):
    """What judges the examples into a folder, after its share is done."""
    config = OutputConfig(blocks=str(folder), **options)
    share = Share(decider, None, EXAMPLES, range(7), folder, config)
    share.claim(content or {"pairs": "p", "checkpoint": "c"})
    if run:
        with StopSignal() as stop:
            share.run("fakes", stop)
    return share


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 2)


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_parts_give_the_bytes_of_one_run_and_nothing_is_judged_twice(tmp_path, format):
    whole = judge(tmp_path / "whole", FakeDecider(), format=format)
    first, second = FakeDecider(), FakeDecider()
    shared = tmp_path / "shared"
    half = judge(shared, first, format=format, part=1, parts=2)
    assert [path.stem for path in half.blocks.missing()] == ["000000", "000002"]
    rest = judge(shared, second, format=format, part=0, parts=2)
    assert not rest.blocks.missing()
    assert (first.judged, second.judged) == (["2", "3", "6"], ["0", "1", "4", "5"])
    for share, name in ((whole, "whole"), (rest, "shared")):
        join_blocks(share.blocks.paths, tmp_path / f"{name}.{format}", SCHEMA.labels)
    joined = tmp_path / f"shared.{format}"
    assert joined.read_bytes() == (tmp_path / f"whole.{format}").read_bytes()
    lines = list(read_predictions(joined))
    assert lines == list(rest.blocks) == [whole.blocks[n] for n in range(7)]
    assert [line["uid"] for line in lines] == [example.uid for example in EXAMPLES]
    assert {line["label"] for line in lines} <= {None, 0, 1, 2, 3}
    third = FakeDecider()
    judge(shared, third, format=format)
    assert not third.judged
    assert [path.name for path in shared.iterdir() if path.name.startswith(".")] == [".lock"]


def test_both_formats_say_the_same(tmp_path):
    shares = [judge(tmp_path / f, FakeDecider(1.5), format=f) for f in ("jsonl", "parquet")]
    first, second = (list(share.blocks) for share in shares)
    assert first == second
    assert all(list(a) == list(b) for a, b in zip(first, second, strict=True))


def test_of_runs_that_begin_together_one_calibrates(tmp_path):
    class Slow(FakeDecider):
        def calibrate(self, source):
            fitted.append(self)
            time.sleep(0.1)
            return super().calibrate(source)

    fitted = []
    with ThreadPoolExecutor() as pool:
        parts = [
            pool.submit(judge, tmp_path, Slow(2.0 + n), part=n, parts=3, run=False)
            for n in range(3)
        ]
    (first,) = fitted
    assert {part.result().calibration.temperature for part in parts} == {first._temperature}


def test_what_was_fitted_first_serves_all(tmp_path):
    assert judge(tmp_path, FakeDecider(2.0), part=0, parts=2).calibration.temperature == 2
    assert judge(tmp_path, FakeDecider(3.0), part=1, parts=2).calibration.temperature == 2
    with pytest.raises(UserError, match=r"checkpoint: c in the folder, other now"):
        judge(tmp_path, FakeDecider(), {"pairs": "p", "checkpoint": "other"})


def test_options_that_cannot_be_are_refused():
    for options, message in (
        ({"format": "csv"}, "expected one of"),
        ({"part": 2, "parts": 2, "blocks": "x"}, "expected 0 to 1"),
        ({"parts": 2}, r"predict\.blocks=DIR"),
    ):
        with pytest.raises(ValueError, match=message):
            OutputConfig(**options)
