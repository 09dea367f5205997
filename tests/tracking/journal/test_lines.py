from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megamask.tracking.journal import writer as journal_module
from megamask.tracking.journal.chain import overtaken, verify_chain
from megamask.tracking.journal.lines import journal_files, line_number, read_journal, steps, tail
from megamask.tracking.journal.seek import find_step
from megamask.tracking.journal.writer import Journal


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


@pytest.mark.promise("the hash chain reveals every changed line except the last")
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


def take_over(run_dir: Path, *, kept: int, beside: int) -> None:
    """Attempt 2 opens the journal after `kept` lines of attempt 1, which writes `beside` more before it notices."""
    old = Journal.open(run_dir, 1, rotate_bytes=500)
    for step in range(1, kept + 1):
        old.append("step", step=step, attempt=1)
    with Journal.open(run_dir, 2) as new:
        for step in range(kept + 1, kept + beside + 1):
            old.append("step", step=step, attempt=1)
        new.append("attempt_started", attempt=2)
        new.append("step", step=kept + 1, attempt=2)
    old.close()


@pytest.mark.promise("lines of an older attempt after a take-over are reported and are not damage")
@pytest.mark.parametrize("kept", [0, 1, 4])
@pytest.mark.parametrize("beside", [1, 2, 7])
def test_lines_beside_a_take_over_are_found_and_are_no_damage(tmp_path: Path, kept: int, beside: int) -> None:
    take_over(tmp_path, kept=kept, beside=beside)
    assert verify_chain(tmp_path) == []
    ranges = overtaken(tmp_path)
    assert {found.by for found in ranges} == {2}
    assert sum(found.last - found.first + 1 for found in ranges) == beside
    lines = {file.path.name: file.path.read_bytes().splitlines() for file in journal_files(tmp_path)}
    named = [line for found in ranges for line in lines[found.file][found.first - 1 : found.last]]
    assert [json.loads(line)["step"] for line in named] == list(range(kept + 1, kept + beside + 1))


@pytest.mark.promise(
    "the attempt after a take-over chains on the newest line, reports no damage, and the highest attempt of a "
    "step counts"
)
def test_attempt_after_a_take_over_chains_on_the_newest_and_names_no_damage(tmp_path: Path) -> None:
    take_over(tmp_path, kept=3, beside=2)
    newest = journal_files(tmp_path)[-1].path.read_bytes().splitlines()[-1]
    with Journal.open(tmp_path, 3) as journal:
        assert journal.head == (5, hashlib.sha256(newest).hexdigest())
        journal.append("step", step=5, attempt=3)
    assert verify_chain(tmp_path) == []
    assert [found.by for found in overtaken(tmp_path)] == [2]
    assert all(record["kind"] != "incident" for record in read_journal(tmp_path))
    holders = {step: record["attempt"] for step, record in steps(tmp_path).items()}
    assert holders == {1: 1, 2: 1, 3: 1, 4: 2, 5: 3}
    for step, attempt in holders.items():
        record = find_step(tmp_path, step)
        assert record is not None
        assert record["attempt"] == attempt


@pytest.mark.promise("opening finds the fork of a take-over that lies before the checked tail")
def test_opening_after_a_take_over_finds_the_fork_before_the_checked_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_over(tmp_path, kept=3, beside=2)
    size = sum(file.path.stat().st_size for file in journal_files(tmp_path)[-2:])
    monkeypatch.setattr(journal_module, "_TAIL_BYTES", size)
    assert len(tail(tmp_path, size)) < 5  # it begins after the line that attempt 2 chains on
    with Journal.open(tmp_path, 3) as journal:
        journal.append("step", step=5, attempt=3)
    assert all(record["kind"] != "incident" for record in read_journal(tmp_path))
    assert verify_chain(tmp_path) == []


@pytest.mark.promise("attempts that overtake one another leave one chain")
def test_attempts_that_overtake_one_another_leave_one_chain(tmp_path: Path) -> None:
    """Attempt 3 opens before attempt 2 has written; what it chains on is the chain, though attempt 2 left it."""
    first = Journal.open(tmp_path, 1)
    first.append("step", step=1)
    second = Journal.open(tmp_path, 2)
    first.append("step", step=2)
    with Journal.open(tmp_path, 3) as third:
        first.append("step", step=3)
        second.append("step", step=2)
        third.append("step", step=3)
    first.close()
    second.close()
    assert verify_chain(tmp_path) == []
    assert [(found.file[:12], found.first, found.last, found.by) for found in overtaken(tmp_path)] == [
        ("attempt-0001", 3, 3, 3),
        ("attempt-0002", 1, 1, 3),
    ]


@pytest.mark.promise("a changed line beside a take-over is detected, except the last of a branch")
@pytest.mark.parametrize("line", range(1, 9))
def test_verify_finds_a_changed_line_beside_a_take_over_but_the_last_of_a_branch(tmp_path: Path, line: int) -> None:
    old = Journal.open(tmp_path, 1)
    for step in (1, 2, 3):
        old.append("step", step=step)
    with Journal.open(tmp_path, 2) as new:
        for step in (4, 5, 6):
            old.append("step", step=step)
        for step in (4, 5):
            new.append("step", step=step)
    old.close()
    file = journal_files(tmp_path)[0 if line <= 6 else 1]
    lines = file.path.read_bytes().splitlines(keepends=True)
    number = (line - 1) % 6
    lines[number] = lines[number].replace(b'"kind":"step"', b'"kind":"stop"')
    file.path.write_bytes(b"".join(lines))
    assert (verify_chain(tmp_path) == []) == (line in (6, 8))


@pytest.mark.promise("a removed line beside a take-over is detected")
def test_verify_finds_a_removed_line_beside_a_take_over(tmp_path: Path) -> None:
    take_over(tmp_path, kept=2, beside=4)
    path = next(file.path for file in journal_files(tmp_path) if b'"step":4' in file.path.read_bytes())
    path.write_bytes(b"".join(line for line in path.read_bytes().splitlines(True) if b'"step":4' not in line))
    assert verify_chain(tmp_path) != []


def test_journal_without_a_take_over_has_nothing_beside_it(run_dir: Path) -> None:
    assert overtaken(run_dir) == []


@pytest.mark.promise("a damaged last line before a new attempt is not a take-over")
def test_damaged_last_line_before_a_new_attempt_is_no_take_over(run_dir: Path) -> None:
    path = [file for file in journal_files(run_dir) if file.attempt == 1][-1].path
    path.write_bytes(path.read_bytes().replace(b'"kind":"step"', b'"kind":"stop"'))
    assert verify_chain(run_dir) != []
    assert overtaken(run_dir) == []
