"""Goodput: every second of a run has one cause, and repeated steps are lost time."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from megamask.audit import goodput as subject

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
STEP = {"data": 0.5, "forward_backward": 8.0, "optimizer": 1.0, "other": 0.5}


def line(kind: str, at: float, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "seq": 1, "time": (BEGIN + timedelta(seconds=at)).isoformat(), **values}


def attempt(number: int, at: float, *, resumed: int | None = None, restore: float = 0.0) -> dict[str, Any]:
    """An attempt whose process started 20 s before its first line."""
    commit = None if resumed is None else {"step": resumed, "checkpoint": f"step-{resumed}", "digest": "0" * 64}
    startup = {"imports": 5.0, "engine": 15.0 - restore, "restore": restore, "total": 20.0}
    values = {"attempt": number, "resumed_from": commit, "restore_s": restore or None, "startup_s": startup}
    return line("attempt_started", at, **values)


def steps(first: int, last: int, at: float) -> list[dict[str, Any]]:
    return [line("step", at + 10 * (step - first + 1), step=step, seconds=STEP) for step in range(first, last + 1)]


# Five steps, killed after a commit of step 3; resumed 100 s later from step 3, two steps, an evaluation, the end.
STORY = [
    attempt(1, 20),
    *steps(1, 3, 20),
    line("checkpoint_committed", 54, step=3, stall_s=4.0),
    *steps(4, 5, 54),
    attempt(2, 194, resumed=3, restore=7.0),
    *steps(4, 5, 194),
    line("evaluation", 220, step=5, seconds={"evaluation": 6.0}),
    line("attempt_ended", 221, attempt=2, exit_code=0),
]


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    def run(lines: list[dict[str, Any]]) -> dict[str, Any]:
        monkeypatch.setattr(subject, "read_journal", lambda run_dir: iter(lines))
        return subject.goodput(Path("run"))

    return run


@pytest.mark.promise(
    "`megamask status --goodput` accounts for every second of a run: productive, lost, restore, save, waiting."
)
def test_every_second_has_one_cause(account) -> None:
    found = account(STORY)
    assert found["productive_s"] == 50  # steps 1 to 3 of the first attempt, 4 and 5 of the second
    assert found["lost_s"] == 20  # steps 4 and 5 of the first
    assert found["save_s"] == 4
    assert found["restore_s"] == 7
    assert found["startup_s"] == 20 + 13
    assert found["evaluation_s"] == 6
    assert found["waiting_s"] == 100  # the second process started at 174, the first one's last sign was at 74
    assert found["other_s"] == 1  # from the evaluation to the end
    assert found["total_s"] == 221
    assert found["goodput"] == pytest.approx(50 / 221)


def test_attempts_add_up_to_the_run(account) -> None:
    found = account(STORY)
    assert [row["attempt"] for row in found["attempts"]] == [1, 2]
    assert [(row["first_step"], row["last_step"]) for row in found["attempts"]] == [(1, 5), (4, 5)]
    assert [row["exit_code"] for row in found["attempts"]] == [None, 0]
    for name in ("productive_s", "lost_s", "waiting_s", "total_s"):
        assert sum(row[name] for row in found["attempts"]) == pytest.approx(found[name])


def test_an_attempt_that_starts_from_nothing_loses_all_steps_before_it(account) -> None:
    found = account([attempt(1, 20), *steps(1, 4, 20), attempt(2, 200), *steps(1, 2, 200)])
    assert (found["lost_s"], found["productive_s"]) == (40, 20)


def test_a_later_attempt_that_falls_back_further_loses_the_steps_of_both(account) -> None:
    lines = [attempt(1, 20), *steps(1, 4, 20), attempt(2, 200, resumed=4), *steps(5, 6, 200)]
    found = account([*lines, attempt(3, 400, resumed=2), *steps(3, 6, 400)])
    assert (found["lost_s"], found["productive_s"]) == (20 + 20, 60)


def test_a_run_without_a_line_has_no_goodput(account) -> None:
    found = account([])
    assert found["goodput"] is None and found["attempts"] == []
