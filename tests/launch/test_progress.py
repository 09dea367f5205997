"""A job that fails at the same step again and again is not started for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.errors import error_with_code
from megamask.launch.node import _after_history
from megamask.launch.verdict import Verdict, append_history, is_without_progress


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
        ([(1, 7), (75, 7), (1, 7), (1, 7), (1, 7)], [1, 75, 1, 1, 93]),  # a preemption says nothing of the run
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
