from __future__ import annotations

from pathlib import Path

import pytest

from megamask.runs.layout import attempt_folder
from megamask.runs.rank_files import RankFailure, read_rank_failures, write_rank_failure


def test_rank_failures_read_back_by_rank(tmp_path: Path) -> None:
    assert read_rank_failures(tmp_path, 1) == {}
    assert write_rank_failure(tmp_path, 1, rank=3, exit_code=66, reason="loss is nan", node="n3")
    assert write_rank_failure(tmp_path, 1, rank=100000, exit_code=1, reason="bug", node="n9")
    write_rank_failure(tmp_path, 2, rank=0, exit_code=64, reason="another attempt", node="n0")
    assert read_rank_failures(tmp_path, 1) == {
        3: RankFailure(rank=3, exit_code=66, reason="loss is nan", node="n3"),
        100000: RankFailure(rank=100000, exit_code=1, reason="bug", node="n9"),
    }
    assert (tmp_path / "attempts/0001/rank-00003.json").exists()


def test_first_failure_of_a_rank_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert write_rank_failure(tmp_path, 1, rank=0, exit_code=64, reason="first")
    assert not write_rank_failure(tmp_path, 1, rank=0, exit_code=1, reason="second")
    assert read_rank_failures(tmp_path, 1)[0].reason == "first"
    assert caplog.text == ""


def test_rank_failure_never_raises_when_storage_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "attempts").write_text("a file where a folder should be")
    assert not write_rank_failure(tmp_path, 1, rank=0, exit_code=74, reason="full")
    assert "could not record its exit code 74" in caplog.text


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"rank":0,"exit_code":"x","reason":"","node":""}'])
def test_damaged_rank_file_is_left_out(tmp_path: Path, content: bytes) -> None:
    write_rank_failure(tmp_path, 1, rank=1, exit_code=70, reason="sound")
    (attempt_folder(tmp_path, 1) / "rank-00000.json").write_bytes(content)
    assert list(read_rank_failures(tmp_path, 1)) == [1]
