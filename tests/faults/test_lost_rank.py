"""A rank that is killed by the system is reported by its signal, and not as a bug of those it left alone."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from support.command import checkpoints, journal, megamask, start, tiny

KILLED = "killed by SIGKILL (9); the kernel's OOM killer is the usual cause"


def rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(entry.removeprefix(b"RANK=")) for entry in environment if entry.startswith(b"RANK="))


@pytest.mark.promise("a killed rank is named with its signal in every report of the end")
@pytest.mark.multiprocess
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_killed_rank_is_named_with_its_signal_wherever_the_end_is_reported(
    tmp_path: Path, small_corpus: Path, victim: int
) -> None:
    run_dir = tmp_path / "run"
    arguments = tiny(small_corpus, tmp_path, "run", "training.steps=1000000", "checkpoint.every_steps=5")
    launcher = start("train", *arguments, "layout.data_parallel_size=2", "--json")
    try:
        deadline = time.monotonic() + 120
        while not (run_dir.is_dir() and checkpoints(run_dir)):
            assert time.monotonic() < deadline, "no commit within 120 s"
            time.sleep(0.05)
        ranks = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        os.kill({rank_of(pid): pid for pid in ranks}[victim], signal.SIGKILL)
        stdout, stderr = launcher.communicate(timeout=200)
    finally:
        launcher.kill()
    assert launcher.returncode == 1, stderr
    assert "bug in megamask" not in stderr
    assert f"rank {victim} was {KILLED}" in json.loads(stdout.splitlines()[-1])["error"]
    files = {path.name: json.loads(path.read_text()) for path in (run_dir / "attempts" / "0001").glob("rank-*.json")}
    assert {name: (left["exit_code"], left["reason"]) for name, left in files.items()} == {
        f"rank-{victim:05d}.json": (1, KILLED)
    }
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["phase"], status["exit_code"]) == ("failed", 1)
    assert f"rank {victim}" in status["reason"]
    assert KILLED in status["reason"]
    ends = [line["reason"] for line in journal(run_dir) if line["kind"] == "attempt_ended"]
    assert ends == ([] if victim == 0 else [f"rank {victim}: {KILLED}"])
    assert KILLED[:20] in megamask("status", run_dir).stdout
