from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.checkpoint.background import WorkStopped
from megamask.checkpoint.commit import Commit, FileDigest
from megamask.checkpoint.integrity import digest_and_flush, problems, share, verify_folder
from megamask.errors import CheckpointIntegrityError

MakeCommit = Callable[..., Commit]


def test_digest_is_size_and_sha256_of_the_content(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    assert digest_and_flush(tmp_path, "a") == FileDigest(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@given(
    sizes=st.lists(st.integers(0, 10**6), min_size=1, max_size=40),
    world_size=st.integers(1, 9),
)
def test_each_file_is_verified_by_exactly_one_rank(sizes: list[int], world_size: int) -> None:
    files = {f"f{n:02}": FileDigest(num_bytes=size, sha256="0" * 64) for n, size in enumerate(sizes)}
    commit = _commit(files)
    shares = [share(commit, rank, world_size) for rank in range(world_size)]
    assert sorted(name for part in shares for name in part) == sorted(files)
    weights = [sum(files[name].num_bytes for name in part) for part in shares]
    assert max(weights) - min(weights) <= max(sizes)


def _commit(files: dict[str, FileDigest]) -> Commit:
    return Commit(
        folder=Path("x"),
        digest="",
        step=1,
        attempt=1,
        run_id="",
        files=files,
        parent=None,
        state={},
        corpora={},
        laws={},
        journal={},
    )


def test_whole_checkpoint_verifies_and_a_stray_file_is_ignored(commit_step: MakeCommit) -> None:
    commit = commit_step(20)
    (commit.folder / "notes.txt").write_text("a person's note")
    assert verify_folder(commit.folder) == commit


@pytest.mark.parametrize("name", ["weights.bin", "tokenizer/tokenizer.json"])
def test_flipped_byte_is_noticed_and_its_file_named(
    commit_step: MakeCommit, flip_byte: Callable[..., None], name: str
) -> None:
    commit = commit_step(20)
    flip_byte(commit.folder / name, 1)
    with pytest.raises(CheckpointIntegrityError, match=f"{name} has sha256"):
        verify_folder(commit.folder)


def test_truncated_file_is_noticed_and_named(commit_step: MakeCommit) -> None:
    commit = commit_step(20)
    (commit.folder / "weights.bin").write_bytes(b"short")
    with pytest.raises(CheckpointIntegrityError, match=r"weights\.bin has 5 bytes, COMMIT\.json has 3000"):
        verify_folder(commit.folder)


def test_missing_file_is_noticed_and_named(commit_step: MakeCommit) -> None:
    commit = commit_step(20)
    (commit.folder / "weights.bin").unlink()
    with pytest.raises(CheckpointIntegrityError, match=r"weights\.bin cannot be opened"):
        verify_folder(commit.folder)


def test_link_to_the_same_bytes_is_refused(commit_step: MakeCommit, tmp_path: Path) -> None:
    commit = commit_step(20)
    (commit.folder / "weights.bin").rename(tmp_path / "moved")
    (commit.folder / "weights.bin").symlink_to(tmp_path / "moved")
    assert len(problems(commit, ["weights.bin"])) == 1
    with pytest.raises(CheckpointIntegrityError, match=r"weights\.bin is a link"):
        verify_folder(commit.folder)


def test_linked_folder_is_refused(commit_step: MakeCommit, tmp_path: Path) -> None:
    commit = commit_step(20)
    (commit.folder / "tokenizer").rename(tmp_path / "moved")
    (commit.folder / "tokenizer").symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointIntegrityError, match="tokenizer is a link"):
        verify_folder(commit.folder)


def test_named_pipe_is_refused_without_waiting_for_a_writer(commit_step: MakeCommit) -> None:
    commit = commit_step(20)
    (commit.folder / "weights.bin").unlink()
    os.mkfifo(commit.folder / "weights.bin")
    with pytest.raises(CheckpointIntegrityError, match="not a plain file"):
        verify_folder(commit.folder)


def test_message_names_three_problems_and_counts_the_rest(commit_step: MakeCommit) -> None:
    commit = commit_step(20)
    for name in commit.files:
        (commit.folder / name).unlink()
    with pytest.raises(CheckpointIntegrityError, match=r"tokenizer\.json.*; weights\.bin"):
        verify_folder(commit.folder)


@pytest.mark.promise("hashing of a saved file can be cancelled at every MiB")
def test_hashing_what_was_saved_can_be_ended_at_every_mib(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(5 << 20))
    calls: list[int] = []

    def end_at_the_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise WorkStopped

    with pytest.raises(WorkStopped):
        digest_and_flush(tmp_path, "a", end_at_the_third)
    assert len(calls) == 3
