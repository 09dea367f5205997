from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.reader import candidates
from megamask.checkpoint.retention import mark_damaged
from megamask.config.schema.checkpoint import CheckpointConfig
from megamask.errors import SupersededError
from megamask.training.attempt import FollowerAttempt
from megamask.training.checkpointing import CheckpointCommitter
from support.model_documents import model_document
from support.saving import save_once
from support.thread_world import ThreadEngine, ThreadWorld


class RecordedFollower(FollowerAttempt):
    """An attempt that remembers what it was to journal; a newer one may come before the n-th look at the claims."""

    def __init__(self, run_dir: Path, *, superseded_at: int | None = None) -> None:
        super().__init__(run_dir, "r", 2)
        self.lines: list[tuple[str, Any]] = []
        self._superseded_at = superseded_at
        self._num_looks = 0

    def append(self, kind: str, **fields: Any) -> None:
        self.lines.append((kind, fields.get("checkpoint", fields.get("incident"))))

    def check_claim(self) -> None:
        self._num_looks += 1
        if self._num_looks == self._superseded_at:
            raise SupersededError("superseded")


@pytest.fixture
def commits(tmp_path: Path) -> list[Commit]:
    """Of steps 10 to 40, in a run directory."""
    (tmp_path / "run").mkdir()
    return [save_once(tmp_path / "run", step=step, attempt=1) for step in (10, 20, 30, 40)]


def prune(attempt: FollowerAttempt, resumed: Commit, *, keep_last: int = 1, rank: int = 0) -> None:
    CheckpointCommitter(
        ThreadEngine(ThreadWorld(2), rank),  # type: ignore[arg-type]
        attempt,
        CheckpointConfig(keep_last=keep_last),
        model=model_document(),
        tokenizer_folder=attempt.run_dir,
        corpora={"main": "c" * 64},
        seed=7,
        num_steps=100,
        parent=resumed.digest,
    ).prune_before_training(resumed)


def steps(run_dir: Path) -> list[int]:
    return [int(folder.name[5:13]) for folder in candidates(run_dir)]


@pytest.mark.promise(
    "a restart prunes by the present policy before it trains and journals it; the checkpoints it resumed from or "
    "skipped remain"
)
def test_restart_prunes_by_the_present_policy_before_it_trains_and_journals_it(commits: list[Commit]) -> None:
    attempt = RecordedFollower(commits[0].folder.parents[1])
    prune(attempt, commits[3], keep_last=3)
    assert steps(attempt.run_dir) == [40, 30, 20]
    prune(attempt, commits[3], keep_last=1)
    assert steps(attempt.run_dir) == [40]
    assert attempt.lines == [("checkpoint_pruned", commit.folder.name) for commit in commits[:3]]


@pytest.mark.promise(
    "a restart prunes by the present policy before it trains and journals it; the checkpoints it resumed from or "
    "skipped remain"
)
def test_restart_never_prunes_what_it_resumed_from_nor_what_it_passed_over(commits: list[Commit]) -> None:
    """40 did not verify, 30 was restored; a policy that counted differently would still leave both."""
    attempt = RecordedFollower(commits[0].folder.parents[1])
    mark_damaged(commits[3].folder)
    prune(attempt, commits[2])
    assert steps(attempt.run_dir) == [40, 30]
    save_once(attempt.run_dir, step=50, attempt=1)
    prune(attempt, commits[2])
    assert steps(attempt.run_dir) == [50, 40, 30]


@pytest.mark.promise(
    "a storage that refuses a removal before training is only an incident; a newer attempt's claim ends the pruning"
)
def test_prune_that_the_storage_refuses_before_training_is_an_incident_and_no_more(
    commits: list[Commit], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = RecordedFollower(commits[0].folder.parents[1])
    unlink = Path.unlink

    def refuse(path: Path, **options: bool) -> None:
        if "step-00000020" in str(path):
            raise OSError(5, os.strerror(5), str(path))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    prune(attempt, commits[3])
    gone = [("checkpoint_pruned", commits[n].folder.name) for n in (0, 2)]
    assert attempt.lines == [*gone, ("incident", commits[1].folder.name)]
    assert steps(attempt.run_dir) == [40, 20]


@pytest.mark.promise(
    "a storage that refuses a removal before training is only an incident; a newer attempt's claim ends the pruning"
)
def test_restart_stops_pruning_when_a_newer_attempt_has_claimed_the_run(commits: list[Commit]) -> None:
    attempt = RecordedFollower(commits[0].folder.parents[1], superseded_at=2)
    prune(attempt, commits[3])
    assert attempt.lines == [("checkpoint_pruned", commits[0].folder.name)]
    assert steps(attempt.run_dir) == [40, 30, 20]


@pytest.mark.promise(
    "a storage that refuses a removal before training is only an incident; a newer attempt's claim ends the pruning"
)
def test_only_rank_0_prunes_before_training(commits: list[Commit]) -> None:
    attempt = RecordedFollower(commits[0].folder.parents[1])
    prune(attempt, commits[3], rank=1)
    assert (steps(attempt.run_dir), attempt.lines) == ([40, 30, 20, 10], [])
