"""``she-jax predict`` killed at random moments leaves the bytes of an uninterrupted run."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from recipes import ROOT, config

from she_jax.runs.run import run

KILLS = 10
PAIRS = 4_000  # eight blocks, some seconds of judging


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A small run, and a table to judge."""
    folder = tmp_path_factory.mktemp("kill")
    run(config(), folder / "run")
    with (folder / "pairs.csv").open("w") as file:
        file.write("query,docid,title,label\n")
        file.writelines(f"mug {n % 400},d{n},Red mug {n},{n % 4 + 1}\n" for n in range(PAIRS))
        file.write("mug 0,d0,a repetition,1\nno title,d,,\n")
    return folder


def start(folder, workdir, format):
    command = [sys.executable, "-m", "she_jax", "predict", str(folder / "pairs.csv")]
    options = [f"--checkpoint={folder / 'run'}", f"--workdir={workdir}"]
    options += [f"--config.predict.format={format}", "--config.eval.batch_size=128"]
    silent = subprocess.DEVNULL
    return subprocess.Popen([*command, *options], cwd=ROOT, stdout=silent, stderr=silent)


def written(workdir):
    """What a prediction leaves, but the pairs that it prepared and the notes on where it is."""
    files = [path for path in workdir.rglob("*") if path.is_file()]
    names = {path: path.relative_to(workdir).as_posix() for path in files}
    return {
        name: path.read_bytes()
        for path, name in names.items()
        if not name.startswith(("data/", ".lock", "config.json", "contents.json", "inputs.json"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_ten_kills_leave_the_bytes_of_an_uninterrupted_run(judge, tmp_path, format):
    since = time.monotonic()
    whole = start(judge, tmp_path / "whole", format)
    assert whole.wait() == 0
    seconds = time.monotonic() - since
    rng, kills, done = random.Random(format), 0, tmp_path / "out" / f"predictions.{format}"
    while kills < KILLS:
        process = start(judge, tmp_path / "out", format)
        try:
            process.wait(rng.uniform(0.2, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
        if done.is_file():  # killed at its end, or not at all: once more from the beginning
            assert written(tmp_path / "out").keys() >= {done.name, "judged.csv"}
            if kills < KILLS:
                done.unlink()
    last = start(judge, tmp_path / "out", format)
    assert last.wait() == 0
    expected, found = written(tmp_path / "whole"), written(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    assert json.loads(found["agreement.json"])["pairs"] == PAIRS
