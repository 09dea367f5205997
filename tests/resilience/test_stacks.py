"""Stacks of a process that does not answer: asked for from outside, read without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamask.resilience.stacks import (
    VARIABLE,
    ask_for_stacks,
    innermost_frames,
    process_state,
    wait_for_stacks,
    waits_for_others,
)

SCRIPT = """
import threading, time
from megamask.resilience.stacks import offer_stacks
offer_stacks()
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def stuck_here():
    print("ready", flush=True)
    time.sleep(60)
stuck_here()
"""


def started(script: str, stacks: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, VARIABLE: str(stacks)}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_process_gives_its_stacks_and_goes_on(tmp_path: Path) -> None:
    process = started(SCRIPT, tmp_path / "stacks")
    try:
        ask_for_stacks(process.pid)
        stacks = wait_for_stacks(tmp_path / "stacks", 10)
        frame = innermost_frames(stacks)[0]
        assert frame.function == "stuck_here"
        assert stacks.count("hread 0x") == 2
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_stopped_process_answers_when_it_goes_on(tmp_path: Path) -> None:
    process = started(SCRIPT, tmp_path / "stacks")
    try:
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while not process_state(process.pid).startswith("T"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ask_for_stacks(process.pid)
        assert wait_for_stacks(tmp_path / "stacks", 0.3) == ""
        process.send_signal(signal.SIGCONT)
        assert "stuck_here" in wait_for_stacks(tmp_path / "stacks", 10)
    finally:
        process.kill()
        process.wait()


def test_process_without_a_handler_is_not_ended_by_the_question(tmp_path: Path) -> None:
    process = started("import time; print('ready', flush=True); time.sleep(60)", tmp_path / "stacks")
    try:
        ask_for_stacks(process.pid)
        time.sleep(0.3)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("file", "waits"),
    [
        ("/opt/torch/distributed/distributed_c10d.py", True),
        ("/opt/megatron/core/pipeline_parallel/p2p_communication.py", True),
        ("/opt/megamask/data/reader.py", False),
    ],
)
def test_main_thread_decides_whether_a_rank_waits_for_others(file: str, waits: bool) -> None:
    stacks = (
        "Thread 0x01 (most recent call first):\n"
        '  File "/opt/torch/distributed/other.py", line 1 in background\n\n'
        "Current thread 0x02 (most recent call first):\n"
        f'  File "{file}", line 7 in innermost\n'
        '  File "/opt/megamask/training/loop.py", line 8 in train\n'
    )
    frames = innermost_frames(stacks)
    assert str(frames[0]).startswith("innermost (")
    assert waits_for_others(frames) is waits


def test_process_that_is_gone_has_neither_state_nor_stacks(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    ask_for_stacks(process.pid)
    assert process_state(process.pid) == "gone"
    assert innermost_frames(wait_for_stacks(tmp_path / "none", 0.1)) == []
