"""Clocks jump. Order comes from numbers, durations from a monotonic clock; the time of day is for people."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Self

import pytest

from megamask.checkpoint.reader import candidates
from megamask.checkpoint.retention import prune, sweep
from megamask.runs import status as status_room
from megamask.runs.status import Status, read_status, write_status
from megamask.tracking.journal import writer as journal_room
from megamask.tracking.journal.chain import verify_chain
from megamask.tracking.journal.lines import read_journal, steps
from megamask.tracking.journal.writer import Journal
from megamask.training.metrics import PhaseClock
from support.command import ROOT
from support.saving import save_once

NO_DURATION = {
    # compared for equality only: a weight file that was changed is not the one that an interrupted import read
    (
        "importing.py",
        "weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in folder.weight_files()]",
    ),
    # which copies of blocks a full cache gives up first; a wrong choice is fetched again, and batches are the same
    ("block_cache.py", "found.append((status.st_mtime_ns, status.st_size, path))"),
    # the check of the clock itself against that of the storage
    ("host.py", "before = time.time()"),
    ("host.py", "after = time.time()"),
    ("host.py", 'written = (probe / "now").stat().st_mtime'),
    # whether a file was changed so lately that its times may hide a second change; if not sure, it is read again
    ("file_marks.py", "if abs(time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns)) < _SETTLED_NS:"),
    ("file_marks.py", "return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)"),
    # times that are written down: of a point in MLflow, and of the last step and the last writing for Prometheus
    ("results.py", "now = int(time.time() * 1000)"),
    ("metrics_file.py", "self._stepped_at = time.time()"),
    ("metrics_file.py", '"megamask_written_timestamp_seconds": time.time(),'),
}
"""The only lines that read a time of day for more than to write it down, by file; none is a duration or a claim."""


class JumpingClock(datetime):
    """Each look is an hour before the one before."""

    looks = 0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        JumpingClock.looks += 1
        return cls(2026, 1, 1, tzinfo=tz) - timedelta(hours=JumpingClock.looks)


@pytest.mark.promise("a clock that jumps back changes no order, no duration and no claim")
def test_journal_of_a_clock_that_jumps_back_keeps_its_order_and_its_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_room, "datetime", JumpingClock)
    for attempt in (1, 2):
        with Journal.open(tmp_path, attempt) as journal:
            for step in (attempt, attempt + 1):
                journal.append("step", step=step, loss=float(attempt))
    records = list(read_journal(tmp_path))
    assert [record["time"] for record in records] == sorted((record["time"] for record in records), reverse=True)
    assert [record["seq"] for record in records] == [1, 2, 3, 4]
    assert verify_chain(tmp_path) == []
    assert {step: record["loss"] for step, record in steps(tmp_path).items()} == {1: 1.0, 2: 2.0, 3: 2.0}


def test_status_written_later_holds_whatever_its_time_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_room, "datetime", JumpingClock)
    write_status(tmp_path, Status(attempt=1, phase="running", step=1))
    write_status(tmp_path, Status(attempt=1, phase="running", step=2))
    status = read_status(tmp_path)
    assert status is not None
    assert status.step == 2


@pytest.mark.promise("a clock that jumps back changes no order, no duration and no claim")
def test_retention_and_reading_go_by_step_and_attempt_not_by_file_times(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for number, step in enumerate((10, 20, 30)):
        folder = save_once(run_dir, step=step, attempt=1).folder
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (2_000_000_000 - number, 2_000_000_000 - number))
    assert [folder.name[5:13] for folder in candidates(run_dir)] == ["00000030", "00000020", "00000010"]
    assert prune(run_dir, 1, run_id="r") == ["step-00000010-a0001", "step-00000020-a0001"]
    assert sweep(run_dir, 2) == []


@pytest.mark.promise("a clock that jumps back changes no order, no duration and no claim")
def test_durations_never_come_from_the_time_of_day() -> None:
    """No product code reads a clock that may jump, but to write it down for people, and in the lines named above."""
    readings: dict[str, int] = {}
    for path in (path for root in ("platform", "pipelines") for path in (ROOT / root).rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"\btime\.time(_ns)?\(|st_[amc]time|getmtime|utcnow", line):
                assert (path.name, line.strip()) in NO_DURATION, f"{path}: {line}"
            if "datetime.now(" in line:
                readings[path.name] = readings.get(path.name, 0) + 1
                # ages of what another process wrote, which are only shown
                is_shown_age = path.name == "state.py" and line.strip() == "now = datetime.now(UTC)"
                assert is_shown_age or "strftime(" in line or "isoformat(" in line, f"{path}: {line}"
    assert readings, "nothing was looked at"


def test_phases_of_a_step_are_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Callable[[], float] = JumpingClock.now().timestamp
    monkeypatch.setattr("time.time", clock)
    phases = PhaseClock()
    phases.lap("data")
    phases.lap("other")
    assert all(seconds >= 0 for seconds in phases.take().values())
