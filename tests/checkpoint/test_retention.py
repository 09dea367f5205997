from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask.checkpoint import retention
from megamask.checkpoint.commit import Commit, begin
from megamask.checkpoint.reader import candidates, resolve
from megamask.checkpoint.retention import mark_damaged, prune, sweep
from megamask.errors import StorageError, SupersededError, UsageError

MakeCommit = Callable[..., Commit]


def _names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


def test_prune_keeps_the_newest_and_returns_the_others_oldest_first(commit_step: MakeCommit, run_dir: Path) -> None:
    for step in (10, 20, 30, 40):
        commit_step(step)
    assert prune(run_dir, 2, run_id="r") == ["step-00000010-a0001", "step-00000020-a0001"]
    assert _names(run_dir) == ["step-00000030-a0001", "step-00000040-a0001"]
    assert prune(run_dir, 2, run_id="r") == []


@pytest.mark.promise("removal begins with COMMIT.json")
def test_prune_removes_the_commit_before_anything_else(
    commit_step: MakeCommit, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_step(10)
    commit_step(20)
    with monkeypatch.context() as held:
        held.setattr(retention.shutil, "rmtree", lambda path, **options: None)  # another process has its files open
        assert prune(run_dir, 1, run_id="r") == ["step-00000010-a0001"]
    assert [folder.name for folder in candidates(run_dir)] == ["step-00000020-a0001"]
    assert (run_dir / "checkpoints" / "step-00000010-a0001" / "weights.bin").exists()
    assert sweep(run_dir, 2) == ["step-00000010-a0001"]
    assert not (run_dir / "checkpoints" / "step-00000010-a0001").exists()


@pytest.mark.promise("a damaged checkpoint never displaces a good one")
def test_prune_never_lets_a_damaged_checkpoint_push_out_a_good_one(
    commit_step: MakeCommit, run_dir: Path, flip_byte: Callable[..., None]
) -> None:
    good = commit_step(10)
    for step in (20, 30):
        commit_step(step)
    flip_byte(run_dir / "checkpoints" / "step-00000020-a0001" / "weights.bin")
    mark_damaged(run_dir / "checkpoints" / "step-00000020-a0001")  # known from loading, in any attempt
    flip_byte(run_dir / "checkpoints" / "step-00000030-a0001" / "COMMIT.json")  # seen at a glance
    assert prune(run_dir, 1, run_id="r") == [
        "step-00000020-a0001",
        "step-00000030-a0001",
    ]
    assert resolve(run_dir) == good.folder
    assert not list((run_dir / "checkpoints").glob("*.damaged"))  # a mark goes with its folder


@pytest.mark.promise("exactly the newest, every n-th, the best and the pinned checkpoints are kept")
def test_prune_keeps_multiples_the_best_and_the_pinned(commit_step: MakeCommit, run_dir: Path) -> None:
    for step, bound in ((10, 4.0), (20, 2.0), (30, None), (40, 3.0), (50, None), (60, None)):
        commit_step(step, bound=bound)
    pin = run_dir / "checkpoints" / "step-00000010-a0001.pinned"
    pin.touch()
    gone = prune(run_dir, 1, run_id="r", keep_every_steps=25, keep_best=1)
    assert gone == ["step-00000030-a0001", "step-00000040-a0001"]
    pin.unlink()
    assert prune(run_dir, 1, run_id="r", keep_every_steps=25, keep_best=1) == ["step-00000010-a0001"]
    assert [folder.name[:13] for folder in candidates(run_dir)] == ["step-00000060", "step-00000050", "step-00000020"]


@pytest.mark.promise("a pin takes effect immediately; a sweep does not remove it")
def test_pin_that_comes_while_pruning_still_holds(commit_step: MakeCommit, run_dir: Path) -> None:
    for step in (10, 20, 30):
        commit_step(step)

    def pin_the_next() -> None:
        (run_dir / "checkpoints" / "step-00000020-a0001.pinned").touch()

    assert prune(run_dir, 1, run_id="r", gate=pin_the_next) == ["step-00000010-a0001"]
    assert len(candidates(run_dir)) == 2


@pytest.mark.promise("a superseded attempt prunes nothing more")
def test_prune_ends_before_the_next_removal_when_a_newer_attempt_has_claimed_the_run(
    commit_step: MakeCommit, run_dir: Path
) -> None:
    for step in (10, 20, 30):
        commit_step(step)

    def superseded() -> None:
        raise SupersededError("attempt 2 owns the run")

    with pytest.raises(SupersededError):
        prune(run_dir, 1, run_id="r", gate=superseded)
    assert len(candidates(run_dir)) == 3


@pytest.mark.promise("an unreadable storage ends with 74; no older checkpoint is used, none is pruned")
def test_prune_removes_nothing_when_the_storage_does_not_let_it_look(
    commit_step: MakeCommit, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        commit_step(step)
    real = os.open

    def unreadable(path: Path, flags: int, *arguments: int) -> int:
        if Path(path).parent.name == "step-00000030-a0001":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, flags, *arguments)

    with monkeypatch.context() as broken:
        broken.setattr(os, "open", unreadable)
        with pytest.raises(StorageError, match="input/output error"):
            prune(run_dir, 1, run_id="r")
    assert len(candidates(run_dir)) == 3


def test_prune_leaves_everything_while_too_few_are_good(commit_step: MakeCommit, run_dir: Path) -> None:
    commit_step(10)
    (commit_step(20).folder / "weights.bin").write_bytes(b"short")
    assert prune(run_dir, 2, run_id="r") == []
    assert len(_names(run_dir)) == 2


def test_prune_refuses_to_keep_none(commit_step: MakeCommit, run_dir: Path) -> None:
    commit_step(10)
    with pytest.raises(UsageError, match="keep_last is 0"):
        prune(run_dir, 0, run_id="r")
    assert len(candidates(run_dir)) == 1


def test_sweep_removes_unfinished_saves_of_older_attempts_only(commit_step: MakeCommit, run_dir: Path) -> None:
    commit_step(10, attempt=1)
    for step, attempt in [(20, 1), (20, 2), (20, 3), (30, 4)]:
        (begin(run_dir, step, attempt) / "half").write_text("half")
    assert sweep(run_dir, 3) == ["step-00000020-a0001", "step-00000020-a0002"]
    assert _names(run_dir) == ["step-00000010-a0001", "step-00000020-a0003", "step-00000030-a0004"]


def test_sweep_finishes_a_sweep_that_was_killed(run_dir: Path) -> None:
    folder = begin(run_dir, 20, 1)
    folder.rename(folder.with_name(".removing-step-00000020-a0001.0123abcd"))
    assert sweep(run_dir, 2) == ["step-00000020-a0001"]
    assert _names(run_dir) == []


def test_sweep_puts_back_a_folder_that_was_committed_under_its_hands(
    commit_step: MakeCommit, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = commit_step(20)
    answers = iter([False, True])  # the writer commits between the look and the rename
    monkeypatch.setattr(retention, "has_commit", lambda folder: next(answers))
    assert sweep(run_dir, 2) == []
    assert resolve(run_dir) == commit.folder


@pytest.mark.promise("a pin takes effect immediately; a sweep does not remove it")
def test_sweep_leaves_pins_and_foreign_files_alone(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "notes").mkdir()
    (tmp_path / "outside").mkdir()
    (run_dir / "checkpoints" / "step-00000020-a0001").symlink_to(tmp_path / "outside")
    for pinned in ("step-00000010-a0001", "step-00000030-a0001"):
        (run_dir / "checkpoints" / f"{pinned}.pinned").touch()
    (begin(run_dir, 30, 1) / "half").touch()  # a pin makes no checkpoint of a save that did not finish
    (run_dir / "checkpoints" / ".removing-").mkdir()
    assert sweep(run_dir, 9) == ["step-00000030-a0001"]
    assert (tmp_path / "outside").is_dir()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        ".removing-",
        "notes",
        "step-00000010-a0001.pinned",
        "step-00000020-a0001",
        "step-00000030-a0001.pinned",
    ]


def test_sweep_of_a_new_run_does_nothing(run_dir: Path) -> None:
    assert sweep(run_dir, 1) == []


@pytest.mark.promise("pruning neither counts nor removes a foreign checkpoint")
def test_prune_neither_counts_nor_removes_what_another_run_committed(commit_step: MakeCommit, run_dir: Path) -> None:
    for step in (10, 20):
        commit_step(step)
    for step in (5, 30, 40):
        commit_step(step, run_id="other")
    assert prune(run_dir, 1, run_id="r") == ["step-00000010-a0001"]
    assert [int(name[5:13]) for name in _names(run_dir)] == [5, 20, 30, 40]


@pytest.mark.promise("a checkpoint that cannot be removed does not block the others")
def test_prune_tells_what_the_storage_does_not_let_go_and_removes_the_others(
    commit_step: MakeCommit, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        commit_step(step)
    real, refusals = Path.unlink, []

    def refuse(path: Path, **options: bool) -> None:
        if path.parent.name == "step-00000010-a0001":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path, **options)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", refuse)
        gone = prune(
            run_dir, 1, run_id="r", on_refusal=lambda folder, error: refusals.append((folder.name, error.message))
        )
        with pytest.raises(StorageError, match="permission denied"):
            prune(run_dir, 1, run_id="r")
    assert gone == ["step-00000020-a0001"]
    assert [name for name, _ in refusals] == ["step-00000010-a0001"] and "permission denied" in refusals[0][1]
    assert prune(run_dir, 1, run_id="r") == ["step-00000010-a0001"]


@pytest.mark.promise("a mark without its folder is removed")
def test_sweep_removes_the_mark_of_a_damaged_checkpoint_that_is_gone(commit_step: MakeCommit, run_dir: Path) -> None:
    there = commit_step(10).folder
    for name in (there.name, "step-00000005-a0001", "step-00000005-a0002", "notes"):
        mark_damaged(there.with_name(name))
    assert sweep(run_dir, 2) == []
    marks = sorted(path.name for path in there.parent.glob("*.damaged"))
    assert marks == ["notes.damaged", "step-00000005-a0002.damaged", "step-00000010-a0001.damaged"]
