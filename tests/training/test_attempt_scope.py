from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megamask.errors import StorageError
from megamask.runs.rank_files import read_rank_failures
from megamask.training import attempt_scope
from megamask.training.attempt import FollowerAttempt
from megamask.training.progress import Progress


@pytest.mark.promise("a failing rank publishes its reason before it aborts a save")
def test_failing_rank_tells_its_reason_before_it_gives_up_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded_by_then: list[int] = []

    def give_up(committer: Any, error: BaseException) -> None:
        recorded_by_then.extend(failure.exit_code for failure in read_rank_failures(tmp_path, 1).values())

    monkeypatch.setattr(attempt_scope, "end_saving", give_up)
    committer: Any = object()
    scope = attempt_scope.AttemptScope(
        run_dir=tmp_path,
        rank=1,
        progress=Progress(num_views=1),
        known=FollowerAttempt(tmp_path, "r", 1),
        committer=committer,
    )
    error = StorageError("the disk is full")
    assert scope.failed(error) is error
    assert recorded_by_then == [74]
