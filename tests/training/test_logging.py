"""metrics.jsonl, TensorBoard events and progress."""

import io
import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from she_jax.evaluation.report import before_after_table
from she_jax.training import logging
from she_jax.training.logging import MetricsWriter, Progress, log, rows_table, show


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_a_line_of_flat_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("sft", 1, {"loss": jnp.float32(0.5), "tokens": 7, "time/seconds": 1.5})
        assert len(lines_of(tmp_path)) == 1, "flushed at once"
        writer.write("rl", 1, {"kl": np.float64(0.25), "parse_rate": jnp.ones(())})
        assert writer.lines == 2
    assert lines_of(tmp_path) == [
        {"phase": "sft", "step": 1, "loss": 0.5, "tokens": 7, "time/seconds": 1.5},
        {"phase": "rl", "step": 1, "kl": 0.25, "parse_rate": 1.0},
    ]


def test_nan_and_infinity_are_null(tmp_path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    with MetricsWriter(tmp_path) as writer:
        writer.write("sft", 1, {"a": math.nan, "b": jnp.inf, "c": np.float32(-np.inf)})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [line[k] for k in "abc"] == [None] * 3


@pytest.mark.parametrize("values", [{"step": 3}, {"phase": 1}, {"a": np.zeros(2)}])
def test_a_metric_that_is_not_one_number_is_an_error(tmp_path, values):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="expected one number"):
        writer.write("sft", 1, values)


def write_run(workdir, until, *, lines=0, seconds=1.0):
    """Two phases of four steps each with an evaluation between; stops after ``until`` lines."""
    plan = [("sft", s) for s in range(1, 5)] + [("eval", 4)] + [("rl", s) for s in range(1, 5)]
    with MetricsWriter(workdir) as writer:
        writer.keep(lines)
        for phase, step in plan[writer.lines : until]:
            values = {"loss": 1 / step, "time/seconds": seconds}
            writer.write(phase, step, values)
        return writer.lines


def without_times(workdir):
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")} for line in lines_of(workdir)
    ]


@pytest.mark.parametrize("saved", [0, 2, 4, 5, 7, 9])
def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path, saved):
    """Killed some lines after a checkpoint, in the same phase or a later one, with a torn line."""
    write_run(tmp_path / "whole", 9)
    write_run(tmp_path / "cut", min(saved + 3, 9))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "rl", "st')
    assert write_run(tmp_path / "cut", 9, lines=saved, seconds=2.0) == 9
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")
    seconds = [line["time/seconds"] for line in lines_of(tmp_path / "cut")]
    assert seconds == [1.0] * saved + [2.0] * (9 - saved)


def test_a_phase_that_is_done_is_kept_by_the_next_one(tmp_path):
    """A finished phase only sets ``lines``; the file is truncated by what comes next."""
    write_run(tmp_path, 6)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with MetricsWriter(tmp_path) as writer:
        writer.lines = 5
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        writer.write("rl", 1, {"loss": 1.0, "time/seconds": 1.0})
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        assert writer.lines == 6
        writer.keep(4)
        writer.write("rl", 1, {"loss": 1.0})
    assert [line["phase"] for line in lines_of(tmp_path)] == ["sft"] * 4 + ["rl"]


def test_a_file_shorter_than_its_checkpoint_expects_is_reported(tmp_path, caplog):
    write_run(tmp_path, 2)
    with MetricsWriter(tmp_path) as writer:
        writer.keep(5)
        assert writer.lines == 2
    assert "2 whole lines, the checkpoint expects 5" in caplog.text


def read_events(folder):
    """The events of a phase, oldest file first (TFRecord framing: length, crc, data, crc)."""
    for path in sorted(folder.glob("events.*"), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_events_of_a_resumed_phase_purge_the_repeated_steps(tmp_path):
    write_run(tmp_path, 8)
    write_run(tmp_path, 9, lines=6)
    events = list(read_events(tmp_path / "tensorboard" / "rl"))
    purges = [e.step for e in events if e.HasField("session_log")]
    assert purges[-1] == 2, "step 1 is of the first part, steps from 2 on are repeated"
    losses = [(e.step, e.summary.value[0].simple_value) for e in events if e.HasField("summary")]
    assert (4, 0.25) in losses
    sft = [e for e in read_events(tmp_path / "tensorboard" / "sft") if e.HasField("session_log")]
    assert len(sft) == 1, "a phase that is not resumed keeps all its events"


def plain(task, total, monkeypatch, clock, **kwargs):
    monkeypatch.setattr(logging.time, "monotonic", lambda: clock[0])
    output = io.StringIO()
    return Progress(task, total=total, console=Console(file=output, width=60), **kwargs), output


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(monkeypatch):
    clock = [0.0]
    progress, output = plain("cold start", 100, monkeypatch, clock, done=20)
    with progress:
        for step in range(21, 101):
            clock[0] += 1.0
            progress.update(step, loss=1.23456, reward=jnp.float32(0.5))
    lines = output.getvalue().splitlines()
    assert lines[0] == "cold start: 20/100"
    assert lines[1] == "cold start: 30/100  1:10 left  loss 1.235  reward 0.5"
    assert lines[-1] == "cold start: 100/100  done, took 1:20  loss 1.235  reward 0.5"
    assert len(lines) == 10, "long lines are not wrapped, and there is one each ten seconds"


def test_the_first_steps_which_compile_do_not_enter_the_time_left(monkeypatch):
    clock = [0.0]
    progress, output = plain("rl", 12, monkeypatch, clock)
    with progress:
        for step in (1, 2):  # of two shapes
            clock[0] += 60.0
            progress.update(step)
        for step in range(3, 8):
            clock[0] += 2.0
            progress.update(step)
    assert "rl: 2/12\n" in output.getvalue()
    assert "rl: 7/12  0:10 left" in output.getvalue()


def test_a_late_compilation_does_not_dominate_the_time_left(monkeypatch):
    clock = [0.0]
    progress, output = plain("cold start", 1_812, monkeypatch, clock)
    with progress:
        for step in range(1, 13):
            clock[0] += 9.0 if step in (1, 2, 9) else 0.5
            progress.update(step)
        clock[0] += 10.0
        progress.update(13)
    assert "cold start: 13/1812  15:00 left" in output.getvalue()


def test_units_of_unequal_length_show_no_time_left(monkeypatch):
    clock = [0.0]
    progress, output = plain("evidence", 4, monkeypatch, clock, alike=False)
    with progress:
        for done in (1, 2):
            clock[0] += 600.0
            progress.update(done)
    assert "evidence: 2/4\n" in output.getvalue()
    assert "left" not in output.getvalue()


def test_progress_of_an_unknown_length(monkeypatch):
    clock = [0.0]
    progress, output = plain("data", None, monkeypatch, clock)
    with progress:
        for done in (1, 2):
            clock[0] += 10.0
            progress.update(done)
    assert output.getvalue().splitlines() == [
        "data: 0",
        "data: 1",
        "data: 2",
        "data: 2  done, took 0:20",
    ]


def test_progress_reports_that_it_was_stopped(monkeypatch):
    progress, output = plain("rl", 10, monkeypatch, [0.0])
    error = RuntimeError()
    progress.__enter__().update(3)
    progress.__exit__(RuntimeError, error, None)
    assert "rl: 3/10  stopped, took 0:00" in output.getvalue()


def test_progress_on_a_terminal_is_a_bar_with_the_metrics():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    with Progress("rl", total=4, console=console) as progress:
        progress.update(1, reward=0.25)
        progress.print("saved [step 1]")
        progress.update(4, reward=0.75)
    text = output.getvalue()
    assert "saved [step 1]" in text
    for word in ("rl", "4/4", "reward 0.75", "took 0:0"):
        assert word in text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert logging._clock(seconds) == text


OUTSIDE = "runs/[best] [/b] :smile: \x1b[31m\u202e\udcff ü机"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "runs/[best] [/b] :smile: \\x1b[31m\\u202e\\udcff ü机"),
        ("ascii", "runs/[best] [/b] :smile: \\x1b[31m\\u202e\\udcff \\xfc\\u673a"),
    ],
)
def test_text_from_outside_reaches_any_screen_as_it_stands(monkeypatch, encoding, shown):
    """Without markup, emoji codes, control characters, or an error of the encoding."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "200")
    log(OUTSIDE)
    with Progress(OUTSIDE, total=1) as progress:
        progress.print(OUTSIDE)
    bar = Console(file=screen, force_terminal=True, color_system=None, width=200)
    with Progress(OUTSIDE, total=1, console=bar) as progress:
        progress.update(1)
    show(rows_table(OUTSIDE, [OUTSIDE], {OUTSIDE: {OUTSIDE: 0.5}}))
    metrics = {"macro_f1": 0.5, "f1": {OUTSIDE: 0.5}}
    show(before_after_table(metrics, metrics))
    screen.seek(0)
    text = screen.read()
    for start in ("runs", f"{shown}: 0/1", f"{shown} ━", f"F1 of class {shown}"):
        assert start.replace("━", "-" if encoding == "ascii" else "━") in text, start
    assert text.count(shown) >= 9
    assert "0.500" in text
