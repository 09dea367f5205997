from __future__ import annotations

from pathlib import Path

import pytest

from megamask.tracking.journal.tail import Position, read_new
from megamask.tracking.journal.writer import Journal


def read_all(run_dir: Path, position: Position, *, max_bytes: int = 2**20) -> tuple[list[int], Position]:
    """The steps of everything after a position, as a follower collects them."""
    found: list[int] = []
    while True:
        records, after = read_new(run_dir, position, max_bytes=max_bytes)
        if after == position:
            return found, position
        found += [record["step"] for record in records if record["kind"] == "step"]
        position = after


def test_follower_sees_each_record_once_over_files_and_attempts(tmp_path: Path) -> None:
    assert read_new(tmp_path, Position()) == ([], Position())
    position = Position()
    seen: list[int] = []
    for attempt in (1, 2):
        with Journal.open(tmp_path, attempt, rotate_bytes=300) as journal:
            for step in range(5 * attempt, 5 * attempt + 5):
                journal.append("step", step=step)
                if step % 3 == 0:
                    steps, position = read_all(tmp_path, position)
                    seen += steps
    steps, position = read_all(tmp_path, position)
    assert seen + steps == list(range(5, 15))
    assert read_all(tmp_path, position) == ([], position)


@pytest.mark.parametrize("piece", [1, 100, 1000])
def test_long_backlog_is_read_in_pieces(tmp_path: Path, piece: int) -> None:
    with Journal.open(tmp_path, 1) as journal:
        for step in range(20):
            journal.append("step", step=step, text="x" * (step * 20))
    assert read_all(tmp_path, Position(), max_bytes=piece)[0] == list(range(20))
    records, _ = read_new(tmp_path, Position(), max_bytes=piece)
    assert len(records) < 20


def test_line_without_its_end_waits_until_it_has_one(tmp_path: Path) -> None:
    with Journal.open(tmp_path, 1) as journal:
        journal.append("step", step=1)
        journal.append("step", step=2)
    path = tmp_path / "journal" / "attempt-0001-000.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    steps, position = read_all(tmp_path, Position())
    assert steps == [1]
    path.write_bytes(data)
    assert read_all(tmp_path, position)[0] == [2]


def test_torn_end_of_an_older_file_is_passed_over(tmp_path: Path) -> None:
    for attempt in (1, 2):
        with Journal.open(tmp_path, attempt) as journal:
            journal.append("step", step=attempt)
    path = tmp_path / "journal" / "attempt-0001-000.jsonl"
    path.write_bytes(path.read_bytes() + b'{"seq"')
    assert read_all(tmp_path, Position())[0] == [1, 2]


def test_damaged_lines_do_not_stop_the_follower(tmp_path: Path) -> None:
    with Journal.open(tmp_path, 1) as journal:
        for step in (1, 2, 3):
            journal.append("step", step=step)
    path = tmp_path / "journal" / "attempt-0001-000.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"seq":2', b'"seq";2'))
    assert read_all(tmp_path, Position())[0] == [1, 3]


def test_position_in_a_file_that_is_gone_begins_again(tmp_path: Path) -> None:
    with Journal.open(tmp_path, 1) as journal:
        journal.append("step", step=1)
    assert read_all(tmp_path, Position(file="attempt-0009-000.jsonl", offset=7))[0] == [1]


@pytest.mark.promise("MLflow's follower reads overtaken lines once and continues with the newer attempt")
def test_follower_sees_what_stands_beside_a_take_over_and_goes_on_with_the_newer_attempt(tmp_path: Path) -> None:
    old = Journal.open(tmp_path, 1)
    old.append("step", step=1)
    records, position = read_new(tmp_path, Position())
    with Journal.open(tmp_path, 2) as new:
        old.append("step", step=2)
        new.append("step", step=2)
    old.close()
    assert [record["seq"] for record in records] == [1]
    seen = []
    for _ in range(3):
        records, position = read_new(tmp_path, position)
        seen += [(record["seq"], record["step"]) for record in records]
    assert seen == [(2, 2), (2, 2)]
    assert position.file == "attempt-0002-000.jsonl"
