"""A job that fails at the same step again and again is not started for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.errors import error_with_code
from megamask.launch.failures import RankExit
from megamask.launch.node import _after_history, _judge
from megamask.launch.placement import NodePlace
from megamask.launch.rank_folder import RankFolder
from megamask.launch.verdict import Verdict, append_history, is_without_progress
from megamask.resilience.heartbeat import VARIABLE as HEARTBEAT_VARIABLE
from megamask.resilience.heartbeat import Heartbeat
from megamask.runs.status import Status, write_status


def _starts(folder: Path, ends: list[tuple[int, int]], attempts: int = 3) -> list[int]:
    """Codes that a job leaves with whose starts would end with these codes at these steps."""
    folder.mkdir(parents=True)
    left = []
    for number, (code, step) in enumerate(ends):
        start = folder / f"slurm-7.{number}"
        verdict, _ = _after_history(start, Verdict(code=code, step=step), None, attempts)
        left.append(verdict.code)
    return left


@pytest.mark.promise("A job that fails three times in a row at the same step is not started again (93)")
@pytest.mark.parametrize(
    ("ends", "left"),
    [
        ([(1, 7), (71, 7), (74, 7)], [1, 71, 93]),
        ([(1, -1), (1, -1), (1, -1)], [1, 1, 93]),
        ([(1, 7), (1, 8), (1, 8), (1, 8)], [1, 1, 1, 93]),
        ([(1, 7), (75, 7), (1, 7), (1, 7), (1, 7)], [1, 75, 1, 1, 93]),  # a preemption means nothing for the run
        ([(75, 7)] * 5, [75] * 5),
        ([(2, 7)] * 4, [2] * 4),  # these codes stop the job by themselves
        ([(0, 7)] * 4, [0] * 4),
        ([(1, 7), (1, 7), (1, 7), (1, 7), (1, 7), (1, 7)], [1, 1, 93, 1, 1, 93]),  # submitted again by a person
    ],
)
def test_no_progress_ends_a_job(tmp_path: Path, ends: list[tuple[int, int]], left: list[int]) -> None:
    assert _starts(tmp_path / "run.launch", ends) == left


def test_number_of_attempts_is_the_settings(tmp_path: Path) -> None:
    assert _starts(tmp_path / "run.launch", [(1, 7)] * 5, attempts=5) == [1, 1, 1, 1, 93]


def test_message_names_the_step_the_code_and_the_last_failure(tmp_path: Path) -> None:
    folder = tmp_path / "slurm-7.2"
    for _ in range(2):
        append_history(folder, Verdict(code=1, step=7))
    verdict, failure = _after_history(folder, Verdict(code=1, step=7), error_with_code(1, "out of memory"), 3)
    assert failure is not None and verdict.code == int(failure.exit_code) == 93
    assert "3 starts of this job in a row failed at step 7, the last with exit code 1" in failure.message
    assert "out of memory" in failure.message


def test_damaged_history_does_not_end_a_job(tmp_path: Path) -> None:
    (tmp_path / "history").write_text("a b\n\nslurm-7.0 1 7\n")
    assert not is_without_progress(tmp_path / "slurm-7.1", Verdict(code=1, step=7), 3)


@pytest.mark.promise("the verdict of a superseded job has the step that its own ranks reached")
def test_verdict_of_a_superseded_job_has_its_own_step(tmp_path: Path) -> None:
    place = NodePlace(node=0, num_nodes=1, address="127.0.0.1", token="job-1.0")
    write_status(tmp_path, Status(attempt=2, phase="running", step=40))  # that of the attempt that took over
    fields = {"rank": 0, "pid": 1, "returncode": 93, "place_of_end": 0, "was_stopped": False, "report": None}
    for closed_step, step in ((12, 12), (None, -1)):
        ended = RankExit(**fields, stderr_tail="", closed_step=closed_step)  # type: ignore[arg-type]
        assert _judge(tmp_path / "launch", place, tmp_path, 1, 93, ended).step == step
    write_status(tmp_path, Status(attempt=1, phase="stopped", exit_code=93, step=41))
    assert _judge(tmp_path / "launch", place, tmp_path, 1, 93, ended).step == 41


def test_only_a_rank_that_closes_its_attempt_has_a_closed_step(tmp_path: Path) -> None:
    folder = RankFolder(tmp_path)
    variables = folder.prepare(0)
    heartbeat = Heartbeat(Path(variables[HEARTBEAT_VARIABLE]))
    heartbeat.enter("step", 7)
    assert folder.closed_step(0) is None
    heartbeat.enter("close")
    assert folder.closed_step(0) == 7
