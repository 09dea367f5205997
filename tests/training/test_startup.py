"""Seconds of an attempt's start, by phase."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from megamask.training import startup
from megamask.training.startup import StartupClock
from support.command import environment


@pytest.mark.promise("the time to start, by phase, and to restore is journalled")
def test_phases_add_up_and_the_total_counts_from_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(startup.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(startup, "own_age", lambda: 3.0)
    clock = StartupClock()
    for name, taken in (("imports", 2.0), ("engine", 5.0), ("restore", 0.5)):
        with clock.phase(name):
            now[0] += taken
        now[0] += 1.0  # of no phase
    assert clock.seconds() == {"imports": 5.0, "engine": 5.0, "restore": 0.5, "total": 13.5}


def test_age_is_that_of_the_process_and_not_of_its_parent() -> None:
    script = "from megamask.resilience.process_facts import own_age; print(own_age())"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True)
    assert 0 <= float(done.stdout) <= time.monotonic() - started + 0.02  # the system counts in ticks of 10 ms
