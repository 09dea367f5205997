from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamask.tracking.journal import seek as journal_seek
from megamask.tracking.journal.lines import Record, journal_files, steps
from megamask.tracking.journal.seek import find_step, last_step
from megamask.tracking.journal.writer import Journal


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture
def small_scans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ranges that are read line by line shrink to a line or two, so that small journals are bisected too."""
    monkeypatch.setattr(journal_seek, "_SCAN_BYTES", 300)
    monkeypatch.setattr(journal_seek, "_BUFFER_BYTES", 256)
    monkeypatch.setattr(journal_seek, "_FIRST_TAIL_BYTES", 200)
    yield


@st.composite
def attempts(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Attempts of a run: each begins at or before the step after the last one, and writes other lines in between."""
    plan: list[dict[str, Any]] = []
    reached = 0
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(max(0, reached - 12), reached))
        count = draw(st.integers(0, 30))
        others = draw(st.dictionaries(st.integers(0, count), st.integers(1, 8), max_size=4))
        plan.append(
            {"start": start, "count": count, "others": others, "rotate": draw(st.sampled_from([400, 1500, 10**6]))}
        )
        reached = max(reached, start + count)
    return plan


def write(run_dir: Path, plan: list[dict[str, Any]]) -> None:
    for number, attempt in enumerate(plan, start=1):
        with Journal.open(run_dir, number, rotate_bytes=attempt["rotate"]) as journal:
            journal.append("attempt_started", attempt=number)
            for place in range(attempt["count"] + 1):
                for _ in range(attempt["others"].get(place, 0)):
                    journal.append("checkpoint_started", step=attempt["start"] + place)
                if place < attempt["count"]:
                    journal.append("step", step=attempt["start"] + place + 1, attempt=number)


def broken(line: bytes) -> bytes:
    return line.replace(b'"kind":', b'"kind";', 1)


def renumbered(line: bytes) -> bytes:
    """Still JSON: a step line that claims to be far from its place."""
    return line.replace(b'"step":', b'"step":9000', 1)


def joined(line: bytes) -> bytes:
    return line.removesuffix(b"\n")


def zeroed(line: bytes) -> bytes:
    return b"\0" * len(line)


def swollen(line: bytes) -> bytes:
    return b"x" * 2000 + b"\n"


DAMAGES: list[Callable[[bytes], bytes]] = [broken, renumbered, joined, zeroed, swollen]


def damage(run_dir: Path, where: int, change: Callable[[bytes], bytes]) -> None:
    """Changes one line of the journal, counted through all its files."""
    for file in journal_files(run_dir):
        lines = file.path.read_bytes().splitlines(keepends=True)
        if where < len(lines):
            lines[where] = change(lines[where])
            file.path.write_bytes(b"".join(lines))
            return
        where -= len(lines)


def linear_oracle(run_dir: Path, written: list[bytes]) -> dict[int, Record]:
    """Step records by step, from every line that is still as it was written; the highest attempt's come last."""
    genuine, found = set(written), {}
    for path in sorted((run_dir / "journal").iterdir()):
        for line in path.read_bytes().splitlines(keepends=True):
            record = json.loads(line) if line in genuine else {"kind": None}
            if record["kind"] == "step":
                found[record["step"]] = record
    return found


@pytest.mark.promise("the search for a step finds what a linear reader finds, with repeated, rotated or damaged lines")
@settings(max_examples=150)
@given(plan=attempts(), damages=st.lists(st.tuples(st.integers(0, 120), st.sampled_from(DAMAGES)), max_size=5))
def test_found_step_is_that_of_a_linear_reader_whatever_is_damaged(
    plan: list[dict[str, Any]],
    damages: list[tuple[int, Callable[[bytes], bytes]]],
    tmp_path_factory: pytest.TempPathFactory,
    fast_disk: None,
    small_scans: None,
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    write(run_dir, plan)
    written = [line for file in journal_files(run_dir) for line in file.path.read_bytes().splitlines(keepends=True)]
    for where, change in damages:
        damage(run_dir, where, change)
    expected = linear_oracle(run_dir, written)
    for step in range(-1, max(expected, default=0) + 3):
        assert find_step(run_dir, step) == expected.get(step), step


@settings(max_examples=30)
@given(plan=attempts(), damages=st.lists(st.tuples(st.integers(0, 120), st.sampled_from(DAMAGES)), max_size=3))
def test_last_step_is_the_newest_record_of_a_step(
    plan: list[dict[str, Any]],
    damages: list[tuple[int, Callable[[bytes], bytes]]],
    tmp_path_factory: pytest.TempPathFactory,
    fast_disk: None,
    small_scans: None,
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    write(run_dir, plan)
    for where, change in damages:
        damage(run_dir, where, change)
    newest = None
    for path in sorted((run_dir / "journal").iterdir()):
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            newest = record if record["kind"] == "step" else newest
    assert last_step(run_dir) == newest


def test_journal_without_the_step_finds_nothing(tmp_path: Path) -> None:
    assert find_step(tmp_path, 1) is None
    assert last_step(tmp_path) is None
    with Journal.open(tmp_path, 1) as journal:
        journal.append("attempt_started", attempt=1)
    assert find_step(tmp_path, 1) is None
    assert last_step(tmp_path) is None


def test_torn_line_of_a_live_writer_is_passed_over(tmp_path: Path) -> None:
    with Journal.open(tmp_path, 1) as journal:
        journal.append("step", step=1)
        journal.append("step", step=2)
    [file] = journal_files(tmp_path)
    file.path.write_bytes(file.path.read_bytes()[:-1])
    assert find_step(tmp_path, 2) is None
    found = find_step(tmp_path, 1)
    assert found is not None
    assert found == last_step(tmp_path) == steps(tmp_path)[1]


FIELDS = {"loss_terms": {"nelbo": 5.4321}, "seconds": dict.fromkeys(("data", "forward_backward", "other"), 0.012345)}


@pytest.fixture(scope="module")
def long_journals(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Journals of 2,000 and of 40,000 steps in several files, with lines of about the length of a real one."""
    folders = {}
    for count in (2_000, 40_000):
        run_dir = folders[count] = tmp_path_factory.mktemp(f"journal-{count}")
        with Journal.open(run_dir, 1, rotate_bytes=2**21) as journal:
            for step in range(1, count + 1):
                journal.append("step", step=step, batch_digest="0123456789abcdef" * 20, **FIELDS)
                if step % 100 == 0:
                    journal.append("evaluation", step=step, nelbo_nats_per_token=1.5)
    return folders


def bytes_read(action: Callable[[], object]) -> int:
    """Bytes that this process asked the system for meanwhile, cached or not."""

    def counted() -> int:
        with Path("/proc/self/io").open() as stream:
            return next(int(line.split()[1]) for line in stream if line.startswith("rchar"))

    empty = -counted() + counted()
    before = counted()
    action()
    return counted() - before - empty


@pytest.mark.promise("finding a step reads a few KiB for each halving of the journal")
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
def test_finding_a_step_reads_a_few_kib_for_each_halving_of_the_journal(long_journals: dict[int, Path]) -> None:
    def most(count: int) -> int:
        wanted = [1, 2, count // 3, count // 2 + 1, count - 1, count, count + 1]
        return max(bytes_read(lambda step=step: find_step(long_journals[count], step)) for step in wanted)

    sizes = {
        count: sum(file.path.stat().st_size for file in journal_files(long_journals[count]))
        for count in (2_000, 40_000)
    }
    assert sizes[40_000] > 20 * 2**20
    for count, size in sizes.items():
        halvings = (size // journal_seek._SCAN_BYTES).bit_length()
        assert most(count) <= (halvings + 3) * 3 * journal_seek._SCAN_BYTES
    assert most(40_000) < sizes[40_000] / 60
    assert bytes_read(lambda: last_step(long_journals[40_000])) <= 2 * journal_seek._FIRST_TAIL_BYTES


def test_every_sampled_step_of_a_long_journal_is_found(long_journals: dict[int, Path]) -> None:
    for step in (1, 2, 777, 20_000, 39_999, 40_000):
        found = find_step(long_journals[40_000], step)
        assert found is not None
        assert found["step"] == step
    assert find_step(long_journals[40_000], 40_001) is None


def test_newer_attempt_that_began_earlier_holds(tmp_path: Path) -> None:
    with Journal.open(tmp_path, 1, rotate_bytes=500) as journal:
        for step in range(1, 41):
            journal.append("step", step=step, attempt=1)
    with Journal.open(tmp_path, 2) as journal:
        for step in range(11, 21):
            journal.append("step", step=step, attempt=2)
    found = {step: (find_step(tmp_path, step) or {}).get("attempt") for step in range(1, 42)}
    assert found == {step: 2 if 11 <= step <= 20 else 1 for step in range(1, 41)} | {41: None}
