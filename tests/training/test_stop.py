"""Stopping on a signal: recorded, acknowledged at once, and a second Ctrl-C aborts."""

import hashlib
import os
import signal
import sys
import threading

import pytest

from she_jax.training.stop import StopSignal


def test_stop_signal_records_sigterm_and_restores_the_handlers():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop
        assert stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert (stop.name, stop.exit_code) == ("SIGTERM", 143)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_second_interrupt_aborts(capfd):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert (bool(stop), stop.exit_code) == (True, 130)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    said = capfd.readouterr().err.splitlines()
    assert said == ["SIGINT: stopping after this step; again to abort", "SIGINT: aborting"]


def test_ctrl_c_is_acknowledged_while_a_step_is_computed(monkeypatch):
    """Before Python comes to call its handler, after which the signal is recorded."""
    recorded = []

    class Screen:
        def write(self, text):
            if text.strip():
                recorded.append(bool(stop))

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stderr", Screen())
    with StopSignal() as stop:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)  # like XLA: without bytecode or the GIL
    assert stop
    assert recorded == [False]


def test_the_pipe_of_an_event_loop_is_left_to_it():
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop
        assert os.read(read, 2) == bytes([signal.SIGTERM])
        assert signal.set_wakeup_fd(write) == write
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)
