from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask.checkpoint.commit import Commit, begin
from megamask.checkpoint.reader import candidates, find, resolve, verify_checkpoint
from megamask.errors import CheckpointIntegrityError, UsageError

MakeCommit = Callable[..., Commit]


def test_candidates_are_newest_first_by_step_then_attempt(commit_step: MakeCommit, run_dir: Path) -> None:
    for step, attempt in [(20, 1), (40, 1), (20, 2), (40, 2), (30, 3)]:
        commit_step(step, attempt)
    names = [folder.name for folder in candidates(run_dir)]
    assert names == [
        f"step-000000{step}-a000{attempt}" for step, attempt in [(40, 2), (40, 1), (30, 3), (20, 2), (20, 1)]
    ]


def test_folder_without_commit_is_invisible(commit_step: MakeCommit, run_dir: Path) -> None:
    commit = commit_step(20)
    (begin(run_dir, 40, 1) / "weights.bin").write_bytes(b"half")
    (run_dir / "checkpoints" / "latest").write_text("step-00000040-a0001\n")
    assert candidates(run_dir) == [commit.folder]
    assert resolve(run_dir) == commit.folder


def test_latest_is_only_a_hint(commit_step: MakeCommit, run_dir: Path) -> None:
    commit = commit_step(20)
    for text in ["step-00000001-a0001", "../../outside", "\0"]:
        (run_dir / "checkpoints" / "latest").write_text(text)
        assert resolve(run_dir) == commit.folder
    (run_dir / "checkpoints" / "latest").unlink()
    assert resolve(run_dir) == commit.folder


def test_linked_folder_is_no_candidate(commit_step: MakeCommit, run_dir: Path, tmp_path: Path) -> None:
    older = commit_step(20)
    shutil.move(commit_step(40).folder, tmp_path / "moved")
    (run_dir / "checkpoints" / "step-00000040-a0001").symlink_to(tmp_path / "moved")
    assert candidates(run_dir) == [older.folder]


def test_find_falls_back_to_the_one_before_and_says_what_was_damaged(
    commit_step: MakeCommit, run_dir: Path, flip_byte: Callable[..., None]
) -> None:
    older, newer = commit_step(20), commit_step(40)
    flip_byte(newer.folder / "weights.bin")
    commit, incidents = find(run_dir)
    assert commit == older
    assert [record["checkpoint"] for record in incidents] == ["step-00000040-a0001"]
    assert "weights.bin" in incidents[0]["problem"]


def test_find_ends_with_integrity_error_when_none_verifies(
    commit_step: MakeCommit, run_dir: Path, flip_byte: Callable[..., None]
) -> None:
    for step in (20, 40):
        flip_byte(commit_step(step).folder / "COMMIT.json")
    with pytest.raises(CheckpointIntegrityError, match=r"2 checkpoint\(s\) and none verifies"):
        find(run_dir)


def test_dangling_commit_link_counts_as_damage_and_not_as_absence(commit_step: MakeCommit, run_dir: Path) -> None:
    folder = commit_step(20).folder
    (folder / "COMMIT.json").unlink()
    (folder / "COMMIT.json").symlink_to("nowhere")
    with pytest.raises(CheckpointIntegrityError, match="is a link"):
        find(run_dir)


@pytest.mark.promise("a checkpoint folder copied elsewhere is complete")
def test_folder_copied_elsewhere_under_another_name_is_complete(commit_step: MakeCommit, tmp_path: Path) -> None:
    shutil.copytree(commit_step(20).folder, tmp_path / "my-model")
    assert resolve(tmp_path / "my-model") == tmp_path / "my-model"
    assert verify_checkpoint(tmp_path / "my-model", lambda commit: None)["step"] == 20


def test_named_folder_is_never_replaced_by_another(commit_step: MakeCommit, flip_byte: Callable[..., None]) -> None:
    commit_step(20)
    newer = commit_step(40)
    flip_byte(newer.folder / "weights.bin")
    with pytest.raises(CheckpointIntegrityError, match=r"weights\.bin"):
        resolve(newer.folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "is not a folder"),
        (lambda path: path.mkdir(), "neither a run directory nor a checkpoint folder"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "no committed checkpoint yet"),
    ],
)
def test_path_that_means_no_checkpoint_is_a_usage_error(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    make(tmp_path / "x")
    with pytest.raises(UsageError, match=words):
        resolve(tmp_path / "x")


def test_unfinished_save_is_called_so(run_dir: Path) -> None:
    with pytest.raises(UsageError, match="did not finish"):
        resolve(begin(run_dir, 20, 1))


def test_verify_checkpoint_reports_what_it_read(commit_step: MakeCommit, run_dir: Path) -> None:
    commit_step(20)
    commit = commit_step(40)
    expected = {
        "path": str(commit.folder),
        "step": 40,
        "digest": commit.digest,
        "files": 2,
        "bytes": 3002,
        "ok": True,
    }
    assert verify_checkpoint(run_dir, lambda commit: None) == expected
    assert verify_checkpoint(commit.folder, lambda commit: None) == expected


def test_verify_checkpoint_of_a_run_does_not_fall_back(
    commit_step: MakeCommit, run_dir: Path, flip_byte: Callable[..., None]
) -> None:
    commit_step(20)
    flip_byte(commit_step(40).folder / "weights.bin")
    with pytest.raises(CheckpointIntegrityError, match=r"step-00000040-a0001 is damaged: weights\.bin"):
        verify_checkpoint(run_dir, lambda commit: None)
