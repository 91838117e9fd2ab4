"""Graceful stop of a run on SIGTERM or Ctrl-C."""

import signal
import threading
from typing import Any


class StopSignal:
    """Records SIGTERM or the first Ctrl-C, for the loop to stop on; a second Ctrl-C aborts.

    ::

        with StopSignal() as stop:
            for step in ...:
                ...
                if stop:
                    checkpoints.save(...)
                    raise SystemExit(stop.exit_code)

    ``exit_code`` is the shell's 128 + signal (143 for SIGTERM, 130 for Ctrl-C), so that a script
    does not mistake a stopped run for a finished one. Outside the main thread, where Python allows
    no signal handlers, no signal is recorded.
    """

    def __init__(self):
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
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
