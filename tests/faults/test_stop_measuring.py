"""A signal during a long evaluation ends it within the grace period; what was left out is made by the next attempt."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.command import checkpoints, command, environment, journal, start, tiny

pytestmark = pytest.mark.multiprocess

# Thousands of passes: far longer than the grace period, which is 2 s.
LONG = ["evaluation.every_steps=3", "evaluation.rows=40", "evaluation.draws=500", "launch.stop_grace_s=2"]
SHORT = ["evaluation.every_steps=3", "evaluation.rows=4", "evaluation.draws=1"]


@pytest.mark.promise("a signal during an evaluation or a preview saves a checkpoint and ends with 75")
@pytest.mark.parametrize("last", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_signal_during_a_long_evaluation_saves_and_the_next_attempt_makes_it(
    small_corpus: Path, tmp_path: Path, last: int
) -> None:
    """The evaluation is due at step 3, which is also the last step of the shorter run."""
    run_dir = tmp_path / "run"
    settings = [f"training.steps={last}", "checkpoint.every_steps=100", "optimizer.decay_steps=1"]
    process = start("train", *tiny(small_corpus, tmp_path, "run", *settings, *LONG))
    try:
        deadline = time.monotonic() + 120
        while not (run_dir.is_dir() and any(line.get("step") == 3 for line in journal(run_dir))):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, stderr
    assert [folder.name for folder in checkpoints(run_dir)] == ["step-00000003-a0001"]
    assert not [line for line in journal(run_dir) if line["kind"] == "evaluation"]

    again = command("train", *tiny(small_corpus, tmp_path, "run", *settings, *SHORT))
    done = subprocess.run(again, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    evaluations = [line["step"] for line in journal(run_dir) if line["kind"] == "evaluation"]
    assert evaluations == [3, 6][: last // 3]
    assert journal(run_dir)[-1]["kind"] == "run_completed"
    verified = subprocess.run(command("verify", "run", str(run_dir)), env=environment(), capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout + verified.stderr


@pytest.mark.promise("a signal during an evaluation or a preview saves a checkpoint and ends with 75")
@pytest.mark.slow
def test_signal_during_a_long_preview_saves_and_ends_with_75(small_corpus: Path, tmp_path: Path) -> None:
    """Thousands of passes, shared by two ranks."""
    run_dir = tmp_path / "run"
    settings = ["training.steps=1000000", "checkpoint.every_steps=100", "layout.data_parallel_size=2"]
    settings += ["preview.every_steps=3", f"preview.prompts={['a'] * 400}", "preview.num_tokens=48"]
    process = start("train", *tiny(small_corpus, tmp_path, "run", *settings, "launch.stop_grace_s=60"))
    try:
        deadline = time.monotonic() + 300
        while not (run_dir.is_dir() and any(line.get("step") == 3 for line in journal(run_dir))):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 75, stderr
    assert [folder.name for folder in checkpoints(run_dir)] == ["step-00000003-a0001"]
    assert not [line for line in journal(run_dir) if line["kind"] == "sample_preview"]
