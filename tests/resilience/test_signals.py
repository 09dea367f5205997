from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from megamask.resilience.signals import StopRequest


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([], 0),
        ([signal.SIGTERM], 75),
        ([signal.SIGUSR1], 75),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1], 75),
        ([signal.SIGINT], 93),
        ([signal.SIGTERM, signal.SIGINT], 93),
        ([signal.SIGINT, signal.SIGTERM, signal.SIGTERM], 93),
    ],
)
def test_stop_request_names_the_exit_code(numbers: list[signal.Signals], code: int) -> None:
    with StopRequest() as stop:
        for number in numbers:
            os.kill(os.getpid(), number)
        assert stop.requested == code


def test_stop_request_gives_the_old_handlers_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    stop = StopRequest()
    stop.install()
    stop.install()
    assert signal.getsignal(signal.SIGTERM) == stop._on_preemption
    stop.restore()
    stop.restore()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


@pytest.mark.promise("a second SIGINT ends at once with 130")
def test_second_interrupt_ends_at_once_with_130() -> None:
    script = """
import os, signal
from megamask.resilience.signals import StopRequest
try:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        print(stop.requested, flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        print("still here", flush=True)
finally:
    print("cleaned up", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "93\n")


def test_closed_terminal_asks_for_a_save_and_nohup_for_nothing() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == 75
        assert stop.strongest == signal.SIGTERM
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested == 0
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)
