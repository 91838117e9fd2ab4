"""Metrics and progress of a run: ``metrics.jsonl``, TensorBoard events and console output."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text
from tensorboardX import SummaryWriter

from she_jax.training.files import without_unseen

_LOG = logging.getLogger("she_jax")
PLAIN_SECONDS = 10.0  # between lines if stdout is not a terminal
MIN_MEAN_STEPS = 40  # with fewer steps, a late compilation would dominate their mean duration


class MetricsWriter:
    """Writes one line per step to ``metrics.jsonl``, and events to ``tensorboard/<phase>``.

    A run saves ``lines`` in its checkpoints and passes it to ``keep`` when it resumes. What a
    killed run wrote after its last checkpoint, an incomplete last line included, is truncated, so
    that the file of a resumed run equals that of an uninterrupted one except for the ``time/``
    fields. The same steps are purged from TensorBoard.

    Args:
      workdir: the run's folder.

    Attributes:
      lines: number of lines of the phases so far.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._events_dir = Path(workdir) / "tensorboard"
        self._events: dict[str, SummaryWriter] = {}
        self._path = Path(workdir) / "metrics.jsonl"
        self._file: BinaryIO | None = None
        self.lines = 0

    def keep(self, lines: int) -> None:
        """Truncates the file to its first ``lines`` lines, after which ``write`` continues."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
        self._file.seek(0)
        kept = end = 0
        while kept < lines and self._file.readline().endswith(b"\n"):
            kept += 1
            end = self._file.tell()
        self._file.truncate(end)
        if kept < lines:
            message = "%s has %d whole lines, the checkpoint expects %d"
            _LOG.warning(message, self._path, kept, lines)
        self.lines = kept

    def write(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics of a step.

        Args:
          phase: ``sft``, ``rl``, ``eval``, ...
          step: step within the phase.
          values: number by name (Python's, numpy's or a JAX scalar). Names of timings start with
            ``time/``. NaN and infinities become null in the file and are omitted from the events.

        Raises:
          ValueError: if a value is not one number, or a name is ``phase`` or ``step``.
        """
        numbers: dict[str, int | float | None] = {}
        for name, value in values.items():
            if name in ("phase", "step") or getattr(value, "ndim", 0):
                raise ValueError(
                    f"metric {name!r}={value!r}: expected one number, not named 'phase' or 'step'"
                )
            number = value if type(value) is int else float(value)
            numbers[name] = number if math.isfinite(number) else None
        line = json.dumps({"phase": phase, "step": step, **numbers}, allow_nan=False)
        if self._file is None:
            self.keep(self.lines)
        assert self._file is not None
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self.lines += 1
        if phase not in self._events:
            # A purge drops every later step of its folder, so each phase has its own folder.
            self._events[phase] = SummaryWriter(str(self._events_dir / phase), purge_step=step)
        for name, number in numbers.items():
            if number is not None:
                self._events[phase].add_scalar(name, number, step)

    def close(self) -> None:
        """Flushes and closes the file and the events."""
        if self._file is not None:
            self._file.close()
        for events in self._events.values():
            events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Progress:
    """Shows the progress of one task: units done, time left, and the latest metrics.

    A live bar on a terminal; elsewhere (a CI log) a plain line at the start, at the end and about
    every ten seconds. ::

        with Progress("cold start", total=1200, done=resumed_step) as progress:
            for step in ...:
                progress.update(step + 1, loss=loss)

    Args:
      task: name of the task.
      total: number of units, None if unknown.
      done: number of units done already.
      alike: whether units take about equally long; otherwise no time left is shown.
      unit: what is counted, to show how many a second; "" to leave that out.
      console: where to show it; stdout if None.
    """

    def __init__(
        self,
        task: str,
        *,
        total: int | None,
        done: int = 0,
        alike: bool = True,
        unit: str = "",
        console: Console | None = None,
    ):
        self._total, self._done, self._alike, self._unit = total, done, alike, unit
        self._before = done
        self._console = console or Console()
        self._task = _encodable(task, self._console)
        self._started = self._shown = time.monotonic()
        self._history: list[tuple[float, int]] = []  # (time, units done)
        self._metrics = ""
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        self._started = self._shown = time.monotonic()
        if self._console.is_terminal or self._console.is_jupyter:
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rest]}", markup=False),
                console=self._console,
                refresh_per_second=2,
            )
            self._bar.start()
            self._bar.add_task(self._task, total=self._total, completed=self._done, rest="")
        else:
            self.print(self._counter())
        return self

    def update(self, done: int, **figures: float) -> None:
        """Sets the number of units done, and the latest metrics by name."""
        now = time.monotonic()
        if not self._history or done > self._done:
            self._history.append((now, done))
        self._done = done
        self._metrics = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, rest=self._status(now))
        elif now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            self.print(f"{self._counter()}  {self._status(now)}".rstrip())

    def print(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        _print(self._console, text)

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        seconds = time.monotonic() - self._started
        elapsed = f"{_clock(seconds)}  {self._rate(seconds, self._done - self._before)}".rstrip()
        if self._bar:
            self._bar.update(self._bar.task_ids[0], rest=f"took {elapsed}  {self._metrics}")
            self._bar.stop()
        else:
            end = "done" if kind is None else "stopped"
            self.print(f"{self._counter()}  {end}, took {elapsed}  {self._metrics}".rstrip())

    def _counter(self) -> str:
        return f"{self._task}: {self._done}" + ("" if self._total is None else f"/{self._total}")

    def _status(self, now: float) -> str:
        # From the later half of the steps: the first steps compile, once per shape.
        since, units = self._history[len(self._history) // 2]
        if not self._alike or self._total is None or self._done == units:
            return self._metrics
        pace = (now - since) / (self._done - units)
        if len(self._history) < MIN_MEAN_STEPS:  # a late compilation would dominate
            paces = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(self._history)]
            pace = min(pace, median(paces))
        rate = f"{self._rate(pace, 1)}  " if self._unit else ""
        return f"{_clock((self._total - self._done) * pace)} left  {rate}{self._metrics}"

    def _rate(self, seconds: float, units: int) -> str:
        """How many units a second; "" if that is not to be shown, or none was done."""
        return f"{units / seconds:.3g} {self._unit}/s" if self._unit and units and seconds else ""


def _short(value: float) -> str:
    return f"{float(value):.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def log(text: str) -> None:
    """Prints a line for the user."""
    _print(Console(), text)


def show(table: Table) -> None:
    """Prints a table for the user; its cells are made by ``cell``."""
    Console(highlight=False).print(table)


def cell(text: str) -> Text:
    """Text for a table as it stands: brackets in a name or a path are no markup of rich."""
    return Text(_encodable(text, Console()))


def _print(console: Console, text: str) -> None:
    text = _encodable(text, console)
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _encodable(text: str, console: Console) -> str:
    """The text with what a terminal would obey, or cannot show in its encoding, as escapes."""
    text = "\n".join(map(without_unseen, text.split("\n")))
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


def rows_table(title: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table for the console: a row per name, a column per metric, a dash for None."""
    # In 80 columns there is room for the names and the figures; longer headings are folded.
    figure = {"min_width": 5, "justify": "right", "overflow": "fold"}
    headings = [Column(cell(name.replace("_", " ")), **figure) for name in columns]
    style = {"box": box.SIMPLE, "padding": (0, 1, 0, 0)}
    table = Table(Column(no_wrap=True), *headings, title=cell(title), **style)
    for name, values in rows.items():
        cells = [values[column] for column in columns]
        table.add_row(
            cell(name),
            *("-" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells),
        )
    return table
