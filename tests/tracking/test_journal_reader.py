from __future__ import annotations

from pathlib import Path

import pytest

from megamask.tracking.journal import Journal
from megamask.tracking.journal_reader import journal_files, line_number, read_journal, steps, tail, verify_chain


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two attempts: steps 1 to 6 in small files, then 5 to 7 again."""
    with Journal.open(tmp_path, 1, rotate_bytes=500) as journal:
        for step in range(1, 7):
            journal.append("step", step=step, attempt=1)
    with Journal.open(tmp_path, 2) as journal:
        for step in range(5, 8):
            journal.append("step", step=step, attempt=2)
    return tmp_path


def change(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) >= 1
    path.write_bytes(data.replace(old, new, 1))


def test_journal_files_are_in_order_of_writing_beyond_four_digits(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    for name in (
        "attempt-10000-000",
        "attempt-0002-000",
        "attempt-0002-010",
        "attempt-0002-002",
        "attempt-0002-1000",
        "notes",
    ):
        (folder / f"{name}.jsonl").touch()
    assert [(file.attempt, file.rotation) for file in journal_files(tmp_path)] == [
        (2, 0),
        (2, 2),
        (2, 10),
        (2, 1000),
        (10000, 0),
    ]


def test_missing_journal_reads_as_empty(tmp_path: Path) -> None:
    assert journal_files(tmp_path) == []
    assert list(read_journal(tmp_path)) == []
    assert verify_chain(tmp_path) == []


def test_repeated_step_is_the_highest_attempts(run_dir: Path) -> None:
    assert {step: record["attempt"] for step, record in steps(run_dir).items()} == {
        1: 1,
        2: 1,
        3: 1,
        4: 1,
        5: 2,
        6: 2,
        7: 2,
    }


def test_reader_goes_on_after_damaged_lines(run_dir: Path) -> None:
    change(journal_files(run_dir)[0].path, b'"seq":1,', b'"seq";1,')
    assert [record["seq"] for record in read_journal(run_dir)] == list(range(2, 10))


@pytest.mark.parametrize("budget", [1, 150, 250, 600, 10**6])
def test_tail_ends_with_the_last_line_whatever_the_budget(run_dir: Path, budget: int) -> None:
    lines = tail(run_dir, budget)
    everything = tail(run_dir, 10**9)
    assert len(everything) == 9
    assert 1 <= len(lines) <= 9
    assert lines == everything[-len(lines) :]


def test_tail_keeps_a_line_that_fits_exactly(run_dir: Path) -> None:
    sizes = [len(line.data) + 1 for line in tail(run_dir, 10**9)]
    for count in (1, 2, 3):
        assert len(tail(run_dir, sum(sizes[-count:]))) == count
        assert len(tail(run_dir, sum(sizes[-count:]) - 1)) == max(count - 1, 3 if count == 1 else 1)


def test_tail_offsets_point_at_their_lines(run_dir: Path) -> None:
    for line in tail(run_dir, 700):
        data = line.file.path.read_bytes()
        assert data[line.offset :].startswith(line.data + b"\n")
        assert data.splitlines()[line_number(line) - 1] == line.data


def test_verify_finds_a_removed_line(run_dir: Path) -> None:
    path = journal_files(run_dir)[-1].path
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + third)
    assert [finding.line for finding in verify_chain(run_dir)] == [2]
    path.write_bytes(first + second + third)
    assert verify_chain(run_dir) == []


def test_verify_finds_a_wrong_count_on_a_line_whose_hashes_hold(run_dir: Path) -> None:
    change(journal_files(run_dir)[-1].path, b'"seq":9,', b'"seq":8,')
    assert [finding.problem for finding in verify_chain(run_dir)] == ["its seq is 8, after 8"]


def test_verify_finds_a_removed_file(run_dir: Path) -> None:
    journal_files(run_dir)[1].path.unlink()
    assert "line before it is not the one recorded" in str(verify_chain(run_dir)[0])


@pytest.mark.parametrize("position", range(0, 900, 37))
def test_verify_finds_a_flipped_bit_in_any_line_but_the_last(run_dir: Path, position: int) -> None:
    path = journal_files(run_dir)[0].path
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.write_bytes(data)
    assert verify_chain(run_dir) != []


def test_verify_finds_a_torn_line_and_a_forged_chain_start(run_dir: Path) -> None:
    path = journal_files(run_dir)[-1].path
    with path.open("ab") as file:
        file.write(b'{"seq":10,"time":"t","kind":"step","prev":"' + b"0" * 64 + b'"}\n{"seq"')
    forged, torn = verify_chain(run_dir)
    assert "without naming a damaged line" in forged.problem
    assert "torn" in torn.problem


def test_verify_finds_what_a_superseded_writer_added(tmp_path: Path) -> None:
    old = Journal.open(tmp_path, 1)
    old.append("step", step=1)
    with Journal.open(tmp_path, 2) as new:
        new.append("step", step=2)
    assert verify_chain(tmp_path) == []
    old.append("step", step=2)
    old.close()
    assert [finding.file for finding in verify_chain(tmp_path)] == ["attempt-0002-000.jsonl"]
