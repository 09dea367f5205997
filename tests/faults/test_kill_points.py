"""SIGKILL at every named point of a commit, of a prune and of the sweep: what is visible is complete, and work goes on.

A fork of this process does the work with the product's own functions and is killed at a fault point; this process then
looks at what is left, as the next attempt does. Between two points there may be several file operations; the model of
a disk in test_commit_model.py stops a commit after each single one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask.checkpoint.commit import begin
from megamask.checkpoint.integrity import verify_folder
from megamask.checkpoint.reader import candidates
from megamask.checkpoint.retention import prune, sweep
from megamask.storage import fault_points
from support.saving import save_once

COMMIT_POINTS = [
    "checkpoint.begun",
    "checkpoint.share_taken",
    "checkpoint.state_written",
    "checkpoint.documents_written",
    "checkpoint.file_flushed",
    "checkpoint.share_flushed",
    "checkpoint.state_checked",
    "checkpoint.flushed",
    "checkpoint.claim_checked",
    "COMMIT.json.created",
    "COMMIT.json.written",
    "COMMIT.json.linked",
    "COMMIT.json.temporary_removed",
    "COMMIT.json.flushed",
    "latest.created",
    "latest.written",
    "latest.replaced",
    "latest.flushed",
]
PRUNE_POINTS = ["prune.commit_removed", "prune.invisible", "prune.content_removed", "prune.removed"]
SWEEP_POINTS = ["sweep.renamed", "sweep.content_removed", "sweep.flushed"]
VISIBLE = COMMIT_POINTS.index("COMMIT.json.linked")  # from here on the new commit may be seen

Work = Callable[[Path], object]


def commit_20(run_dir: Path) -> None:
    save_once(run_dir, step=20, attempt=1)


def prune_to_one(run_dir: Path) -> None:
    prune(run_dir, 1, run_id="r")


def sweep_as_second(run_dir: Path) -> None:
    sweep(run_dir, 2)


def points_of(work: Work, run_dir: Path) -> list[str]:
    """The fault points that the work reaches, in order."""
    reached: list[str] = []
    fault_points.follow(reached.append)
    try:
        work(run_dir)
    finally:
        fault_points.disarm()
    return reached


def kill_at(work: Work, run_dir: Path, point: str, *, occurrence: int = 1) -> bool:
    """Does the work in a fork that dies when it reaches the point for the n-th time; False if it never did."""
    child = os.fork()
    if child == 0:
        left = [occurrence]

        def die() -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            fault_points.arm(point, die)
            work(run_dir)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def visible_steps(run_dir: Path) -> list[int]:
    """Steps of what a reader sees, newest first; each of them verified byte for byte."""
    return [verify_folder(folder).step for folder in candidates(run_dir)]


def goes_on(run_dir: Path) -> None:
    """The next attempt sweeps, saves and prunes, and leaves no trace of the killed one."""
    before = visible_steps(run_dir)
    sweep(run_dir, 2)
    assert visible_steps(run_dir) == before
    save_once(run_dir, step=30, attempt=2)
    assert visible_steps(run_dir) == [30, *before]
    prune(run_dir, 1, run_id="r")
    folders = [path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()]
    assert folders == ["step-00000030-a0002"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a commit of step 10."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_once(folder, step=10, attempt=1)
    return folder


@pytest.mark.promise(
    "SIGKILL at every named point of a commit leaves it complete or invisible, and the previous one intact"
)
def test_every_named_point_is_reached_and_in_this_order(run_dir: Path) -> None:
    assert list(dict.fromkeys(points_of(commit_20, run_dir))) == COMMIT_POINTS
    assert points_of(prune_to_one, run_dir) == PRUNE_POINTS
    begin(run_dir, 30, 1)
    assert points_of(sweep_as_second, run_dir) == SWEEP_POINTS


@pytest.mark.promise(
    "SIGKILL at every named point of a commit leaves it complete or invisible, and the previous one intact"
)
@pytest.mark.parametrize("point", COMMIT_POINTS)
def test_killed_commit_is_whole_or_invisible_and_the_one_before_stays(run_dir: Path, point: str) -> None:
    occurrence = 0
    while kill_at(commit_20, run_dir, point, occurrence=(occurrence := occurrence + 1)):
        steps = visible_steps(run_dir)
        assert steps == ([20, 10] if COMMIT_POINTS.index(point) >= VISIBLE else [10])
        if steps[0] == 20:
            break
    assert occurrence > (0 if 20 in visible_steps(run_dir) else 1), "the point was never reached"
    goes_on(run_dir)


@pytest.mark.promise(
    "SIGKILL at every named point of a prune or sweep shows nothing half-removed, and the next attempt finishes"
)
@pytest.mark.parametrize("point", PRUNE_POINTS)
def test_killed_prune_keeps_what_was_to_be_kept_and_shows_nothing_half_removed(run_dir: Path, point: str) -> None:
    commit_20(run_dir)
    assert kill_at(prune_to_one, run_dir, point)
    assert visible_steps(run_dir) == [20]
    goes_on(run_dir)


@pytest.mark.promise(
    "SIGKILL at every named point of a prune or sweep shows nothing half-removed, and the next attempt finishes"
)
@pytest.mark.parametrize("point", SWEEP_POINTS)
def test_killed_sweep_is_finished_by_the_next(run_dir: Path, point: str) -> None:
    (begin(run_dir, 20, 1) / "state-00000.safetensors").write_bytes(b"half")
    assert kill_at(sweep_as_second, run_dir, point)
    assert visible_steps(run_dir) == [10]
    goes_on(run_dir)
