from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamask.resilience.parent_death import die_with_parent

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's prctl is Linux only")

PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
os.kill(os.getpid(), 9)
"""
CHILD = """
import sys, time
from megamask.resilience.parent_death import die_with_parent
print(die_with_parent(int(sys.argv[1])), flush=True)
time.sleep(60)
"""


def has_ended(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_child_ends_when_its_parent_is_killed() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    pid, was_set = done.stdout.split()
    assert was_set == "True"
    deadline = time.monotonic() + 20
    while not has_ended(int(pid)):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)


def test_child_ends_at_once_when_its_parent_was_gone_before() -> None:
    script = "from megamask.resilience.parent_death import die_with_parent; die_with_parent(1 << 22); print('alive')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_elsewhere_nothing_is_asked_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert die_with_parent(os.getpid()) is False
