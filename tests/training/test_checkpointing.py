"""Checkpoints beside the loop: what is journalled when pruning fails, and how a save is given up."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megamask.checkpoint.reader import candidates
from megamask.config.schema.checkpoint import CheckpointConfig
from megamask.errors import SupersededError
from megamask.storage import documents
from megamask.training.attempt import FollowerAttempt
from megamask.training.checkpointing import CheckpointCommitter, _PendingSave
from megamask.training.progress import Progress
from support.model_documents import model_document
from support.thread_world import ThreadEngine, ThreadWorld


class RecordingAttempt(FollowerAttempt):
    """Rank 0's view, with the journal as a list."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, "r", 1)
        self.records: list[dict[str, Any]] = []
        self.claim_check: Callable[[], None] = lambda: None

    def append(self, kind: str, **fields: Any) -> None:
        self.records.append({"kind": kind, **fields})

    def check_claim(self) -> None:
        self.claim_check()

    def of_pruning(self) -> list[tuple[int, str, str | None]]:
        """Step of the commit, or 0 for an incident; the kind; of which checkpoint."""
        records = [record for record in self.records if record["kind"] in ("checkpoint_pruned", "incident")]
        return [(r.get("step", 0), r.get("incident", r["kind"]), r["checkpoint"]) for r in records]


@pytest.fixture
def view(tmp_path: Path) -> RecordingAttempt:
    (tmp_path / "run").mkdir()
    return RecordingAttempt(tmp_path / "run")


@pytest.fixture(params=[True, False], ids=["beside", "blocking"])
def committer(request: pytest.FixtureRequest, view: RecordingAttempt, tmp_path: Path) -> CheckpointCommitter:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    return CheckpointCommitter(
        ThreadEngine(ThreadWorld(1), 0),  # type: ignore[arg-type]
        view,
        CheckpointConfig(keep_last=1, asynchronous=request.param),
        model=model_document(),
        tokenizer_folder=tmp_path / "tokenizer",
        corpora={},
        seed=7,
        num_steps=100,
        parent=None,
    )


def save(committer: CheckpointCommitter, *steps: int) -> None:
    for step in steps:
        committer.begin(Progress(num_views=2, step=step), None)
        committer.finish()


def folder(step: int) -> str:
    return f"step-{step:08d}-a0001"


@pytest.mark.promise("a failed prune is an incident and is retried after the next commit")
@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EIO, errno.EBUSY])
def test_checkpoint_that_cannot_be_pruned_is_an_incident_and_tried_again_after_the_next_commit(
    committer: CheckpointCommitter, view: RecordingAttempt, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = Path.unlink

    def refuse(path: Path, **options: bool) -> None:
        if path.parent.name == folder(10) and path.name == "COMMIT.json":
            raise OSError(number, "not this one", str(path))
        real(path, **options)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", refuse)
        save(committer, 10, 20, 30)
    first, *_ = incidents = [record for record in view.records if record["kind"] == "incident"]
    assert len(incidents) == 2 and folder(10) in first["problem"]
    save(committer, 40)
    assert [path.name for path in candidates(view.run_dir)] == [folder(40)]
    pruned = [name for _, kind, name in view.of_pruning() if kind == "checkpoint_pruned"]
    assert sorted(pruned) == [folder(10), folder(20), folder(30)]


@pytest.mark.promise("a failed listing of checkpoints is an incident, and nothing is pruned")
def test_checkpoint_that_cannot_be_looked_at_is_an_incident_and_nothing_is_pruned(
    committer: CheckpointCommitter, view: RecordingAttempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = documents.read_plain

    def unreadable(path: Path, max_bytes: int) -> bytes:
        if path.parent.name == folder(10):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, max_bytes)

    with monkeypatch.context() as broken:
        broken.setattr(documents, "read_plain", unreadable)
        save(committer, 10, 20)
    assert view.of_pruning() == [(0, "prune_failed", None)] * 2
    assert "input/output error" in view.records[-1]["problem"]
    save(committer, 30)
    assert view.of_pruning()[2:] == [(30, "checkpoint_pruned", folder(10)), (30, "checkpoint_pruned", folder(20))]


@pytest.mark.promise("only a newer attempt ends the pruning one")
def test_attempt_that_is_superseded_while_it_prunes_ends(
    committer: CheckpointCommitter, view: RecordingAttempt
) -> None:
    save(committer, 10)
    looks: list[int] = []

    def superseded() -> None:
        looks.append(1)
        if len(looks) > 1:  # the commit of step 20 itself is made
            raise SupersededError("attempt 2 owns the run")

    view.claim_check = superseded
    with pytest.raises(SupersededError):
        save(committer, 20)
    assert [path.name for path in candidates(view.run_dir)] == [folder(20), folder(10)]


@pytest.mark.promise("all pending work is cancelled before anything is waited for")
def test_everything_is_called_off_before_anything_is_waited_for(committer: CheckpointCommitter) -> None:
    calls: list[str] = []
    pruning: Any = SimpleNamespace(stop=lambda: calls.append("pruning waited for"))
    save: Any = SimpleNamespace(
        cancel=lambda: calls.append("save cancelled"), abort=lambda together: calls.append("save waited for")
    )
    committer._pruning, committer._pending = (10, pruning), _PendingSave(save=save)
    committer.abort(together=False)
    assert calls == ["save cancelled", "pruning waited for", "save waited for"]
