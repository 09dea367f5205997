"""The deadline of a process that was asked to stop while its main thread takes no step of Python."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from megamask.resilience.stop_deadline import StoppedBeforeTraining

# A mutex that the thread holds already blocks it inside C: signal handlers do not run, as in a collective call.
SCRIPT = """
import ctypes, sys
from megamask.resilience.heartbeat import Heartbeat
from megamask.resilience.signals import StopRequest
from megamask.resilience.stop_deadline import StopDeadline
section, grace, budget = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
heartbeat = Heartbeat()
heartbeat.enter(section, 5)
libc = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)
def last_act(code, reason):
    print(code, reason, flush=True)
    raise RuntimeError("the last act fails, and the process ends all the same")
with StopRequest() as signals, StopDeadline(signals, heartbeat, grace_s=grace, save_budget_s=budget, last_act=last_act):
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


def run(section: str, *numbers: signal.Signals, grace: float = 0.5, budget: float = 0.0) -> tuple[int, str, float]:
    """Exit code, the reason that the last act got, and the seconds from the first signal to the end."""
    arguments = [sys.executable, "-c", SCRIPT, section, str(grace), str(budget)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    began = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output, time.monotonic() - began


@pytest.mark.parametrize(
    ("section", "number", "code", "words"),
    [
        ("rendezvous", signal.SIGTERM, 75, "75 SIGTERM asked for an end before training began (rendezvous)"),
        ("rendezvous", signal.SIGINT, 93, "93 SIGINT asked for an end before training began"),
        ("restore", signal.SIGUSR1, 75, "75 SIGUSR1 asked"),
        ("import", signal.SIGHUP, 75, "75 SIGHUP asked"),
        ("step", signal.SIGTERM, 71, "71 SIGTERM asked for an end, and"),
        ("evaluation", signal.SIGINT, 71, "still in its section 'evaluation'"),
        ("preview", signal.SIGTERM, 71, "checkpoints committed before are intact"),
    ],
)
def test_blocked_process_ends_after_a_signal_with_the_code_of_its_section(
    section: str, number: signal.Signals, code: int, words: str
) -> None:
    returncode, reason, _ = run(section, number)
    assert returncode == code
    assert words in reason


def test_save_under_way_gets_its_budget_and_no_more() -> None:
    returncode, reason, seconds = run("save", signal.SIGTERM, grace=0.2, budget=1.5)
    assert returncode == 71
    assert "'save'" in reason
    assert seconds > 1.5


def test_second_interrupt_ends_a_blocked_process_at_once() -> None:
    returncode, reason, _ = run("step", signal.SIGINT, signal.SIGINT, grace=600.0)
    assert (returncode, reason) == (130, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 93)])
def test_stop_before_training_carries_the_code_of_the_signal(number: signal.Signals, code: int) -> None:
    error = StoppedBeforeTraining(number, "rendezvous")
    assert error.exit_code == code
    assert "nothing was lost" in error.message
