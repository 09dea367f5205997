"""The progress mark: written by mapping, read by another process."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megamask.resilience.heartbeat import SECTIONS, VARIABLE, Heartbeat, Mark, make_file, read_mark


def test_mark_travels_through_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "beat"
    make_file(path)
    assert read_mark(path) is None
    monkeypatch.setenv(VARIABLE, str(path))
    heartbeat = Heartbeat.of_environment()
    assert read_mark(path) == heartbeat.mark
    assert heartbeat.mark.section == "import"
    for section in SECTIONS:
        before = time.monotonic()
        heartbeat.enter(section, step=7)
        mark = read_mark(path)
        assert mark == heartbeat.mark
        assert mark is not None and (mark.step, mark.section) == (7, section)
        assert before <= mark.since <= time.monotonic()
    heartbeat.enter("step")
    assert heartbeat.mark.step == 7


def test_rank_that_is_behind_has_the_smaller_place() -> None:
    behind, ahead = Mark(step=3, section="step", since=9.0), Mark(step=3, section="save", since=1.0)
    assert behind.place < ahead.place < Mark(step=4, section="step", since=0.0).place


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"MEGABEAT"])
def test_foreign_or_short_file_holds_no_mark(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "beat").write_bytes(content)
    assert read_mark(tmp_path / "beat") is None
    assert read_mark(tmp_path / "none") is None


def test_rank_without_a_file_still_knows_its_own_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    heartbeat = Heartbeat.of_environment()
    heartbeat.enter("save", 3)
    assert (heartbeat.mark.section, heartbeat.mark.step) == ("save", 3)
