"""Graceful stop of a run on SIGTERM or Ctrl-C."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def leave_on_interrupt() -> None:
    """From here on Ctrl-C ends the program at once, with a line and without a traceback.

    For the time of the imports and that after a run: nothing has begun, or all is saved.
    """
    signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: Any) -> None:
    os.write(2, f"{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(128 + number)


class StopSignal:
    """Records SIGTERM or the first Ctrl-C, for the loop to stop on; a second Ctrl-C aborts.

    ::

        with StopSignal() as stop:
            for step in ...:
                ...
                if stop:
                    checkpoints.save(...)
                    raise SystemExit(stop.exit_code)

    The first signal is acknowledged on stderr at once, even while a step is computed or compiled,
    when Python runs no signal handlers: a thread reads the signals that Python notes on a pipe.

    ``exit_code`` is the shell's 128 + signal (143 for SIGTERM, 130 for Ctrl-C), so that a script
    does not mistake a stopped run for a finished one. Outside the main thread, where Python allows
    no signal handlers, no signal is recorded.
    """

    def __init__(self):
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
            self._watch()
        return self

    def __exit__(self, *_) -> None:
        if self._pipe and self._thread:
            signal.set_wakeup_fd(-1)
            os.write(self._pipe[1], b"\0")  # no signal: ends the thread
            self._thread.join()
            for end in self._pipe:
                os.close(end)
            self._pipe = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __bool__(self) -> bool:
        return self._received is not None

    @property
    def name(self) -> str:
        """The signal's name, such as ``SIGTERM``; empty if none was received."""
        return self._received.name if self._received else ""

    @property
    def exit_code(self) -> int:
        """128 + the signal's number; 0 if none was received."""
        return 128 + self._received if self._received else 0

    def _receive(self, number: int, frame: Any) -> None:
        self._received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _watch(self) -> None:
        read, write = os.pipe()
        os.set_blocking(write, False)
        if (other := signal.set_wakeup_fd(write, warn_on_full_buffer=False)) != -1:
            signal.set_wakeup_fd(other)  # an event loop's, which needs it
            os.close(read)
            os.close(write)
            return
        self._pipe = read, write
        self._thread = threading.Thread(target=_acknowledge, args=(read,), daemon=True)
        self._thread.start()


def _acknowledge(pipe: int) -> None:
    """Says what each signal on the pipe does, until a zero byte."""
    seen: set[int] = set()
    while number := os.read(pipe, 1)[0]:
        if number not in (signal.SIGTERM, signal.SIGINT):
            continue
        again = "; again to abort" if number == signal.SIGINT else ""
        text = "aborting" if number in seen else f"stopping after this step{again}"
        seen.add(number)
        print(f"{signal.Signals(number).name}: {text}", file=sys.stderr, flush=True)
