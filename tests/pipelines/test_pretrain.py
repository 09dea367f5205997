from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megamask.errors import StorageError
from megamask.runs.rank_files import read_rank_failures
from megamask.training.attempt import AttemptView
from megamask_pipelines import pretrain


@pytest.mark.promise("a failing rank publishes its reason before it aborts a save")
def test_failing_rank_tells_its_reason_before_it_gives_up_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_by_then: list[int] = []

    def give_up(committer: Any, error: BaseException) -> None:
        told_by_then.extend(failure.exit_code for failure in read_rank_failures(tmp_path, 1).values())

    monkeypatch.setattr(pretrain, "end_saving", give_up)
    job: Any = SimpleNamespace(
        _committer=object(), _view=AttemptView(tmp_path, "r", 1), _run_dir=tmp_path, _rank=1, _attempt=None
    )
    error = StorageError("the disk is full")
    assert pretrain.Job.failed(job, error) is error
    assert told_by_then == [74]
