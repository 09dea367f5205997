"""A rank that waits for the storage, in a restore or a save, ends after a signal, and its exit code is true."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megamask.audit.run import verify_run
from support.command import checkpoints, command, environment, tiny
from support.faulty_main import start_with_fault

pytestmark = pytest.mark.multiprocess


def _signalled_while_held(
    arguments: list[str], tmp_path: Path, point: str, *, nth: int = 1
) -> tuple[int, str, dict[str, Any]]:
    """Start a run that waits at a point for ever, asks for its end there; returns its code, stderr, status."""
    folder, run_dir = tmp_path / f"held-{nth}", tmp_path / "run"
    folder.mkdir()
    fault = {"point": point, "action": "hold", "nth": nth, "rank": None, "folder": str(folder), "run_dir": str(run_dir)}
    process = start_with_fault(["train", *arguments], fault)
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("held-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, stderr, json.loads((run_dir / "status.json").read_text())


@pytest.mark.promise("a rank that waits for the storage ends on SIGTERM: in a restore with 75, in a save with 71")
def test_restore_that_hangs_ends_on_a_signal_with_75(small_corpus: Path, tmp_path: Path) -> None:
    arguments = tiny(small_corpus, tmp_path, "run", "launch.stop_grace_s=2")
    first = subprocess.run(
        command("train", *arguments, "training.stop_after_step=2"), env=environment(), capture_output=True
    )
    assert first.returncode == 0
    code, stderr, status = _signalled_while_held(arguments, tmp_path, "checkpoint.verified")
    assert (code, status["phase"], status["exit_code"]) == (75, "preempted", 75), stderr
    assert "asked for an end before training began (restore); nothing was lost" in stderr
    assert status["step"] is None, "the run had come to step 2"
    assert verify_run(tmp_path / "run")["findings"] == []


@pytest.mark.promise("a rank that waits for the storage ends on SIGTERM: in a restore with 75, in a save with 71")
def test_save_that_hangs_ends_after_its_budget_with_71_and_loses_no_checkpoint(
    small_corpus: Path, tmp_path: Path
) -> None:
    settings = ["checkpoint.every_steps=2", "checkpoint.asynchronous=false", "launch.stop_grace_s=1"]
    arguments = tiny(small_corpus, tmp_path, "run", *settings, "launch.save_budget_s=1")
    code, stderr, status = _signalled_while_held(arguments, tmp_path, "checkpoint.flushed", nth=2)
    assert (code, status["phase"], status["exit_code"]) == (71, "failed", 71), stderr
    assert "still in its section 'save'" in stderr
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-00000002-a0001"]
    done = subprocess.run(command("train", *arguments), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
