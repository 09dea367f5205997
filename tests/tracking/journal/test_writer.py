from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.errors import StorageError, SupersededError
from megamask.tracking.journal import writer as journal_module
from megamask.tracking.journal.chain import verify_chain
from megamask.tracking.journal.lines import read_journal
from megamask.tracking.journal.writer import Journal, plain
from megamask.tracking.records import RECORDS


def file_of(run_dir: Path, attempt: int = 1, rotation: int = 0) -> Path:
    return run_dir / "journal" / f"attempt-{attempt:04d}-{rotation:03d}.jsonl"


def write_attempt(run_dir: Path, attempt: int, steps: range) -> None:
    with Journal.open(run_dir, attempt) as journal:
        journal.append("attempt_started", attempt=attempt)
        for step in steps:
            journal.append("step", step=step, loss=1.0 / step)


def test_journal_line_has_the_published_form(tmp_path: Path) -> None:
    with Journal.open(tmp_path, 1) as journal:
        journal.append("run_started", run_id="ab")
        journal.append("step", step=1, loss=2.5, grad_norm=math.nan, seconds={"data": math.inf})
    first, second = file_of(tmp_path).read_bytes().splitlines()
    record = json.loads(second)
    assert list(record)[:4] == ["seq", "time", "kind", "prev"]
    assert record["seq"] == 2
    assert record["kind"] == "step"
    assert record["prev"] == hashlib.sha256(first).hexdigest()
    assert json.loads(first)["prev"] == "0" * 64
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", record["time"])
    assert (record["grad_norm"], record["seconds"]) == ("nan", {"data": "inf"})


def test_journal_append_returns_what_a_reader_gets(tmp_path: Path) -> None:
    with Journal.open(tmp_path, 1) as journal:
        written = [journal.append("step", step=1, loss=-math.inf, sizes=(1, 2)), journal.incident("x", "a problem")]
    assert list(read_journal(tmp_path)) == written


def test_journal_head_is_the_last_lines_hash(tmp_path: Path) -> None:
    with Journal.open(tmp_path, 1) as journal:
        assert journal.head == (0, "0" * 64)
        journal.append("step", step=1)
        last = file_of(tmp_path).read_bytes().removesuffix(b"\n")
        assert journal.head == (1, hashlib.sha256(last).hexdigest())


def test_journal_refuses_unknown_kinds_and_reserved_fields(tmp_path: Path) -> None:
    with Journal.open(tmp_path, 1) as journal:
        with pytest.raises(ValueError, match="unknown kind of journal record 'stepp'; allowed: attempt_ended"):
            journal.append("stepp")
        with pytest.raises(ValueError, match="prev"):
            journal.append("step", prev="x")
        with pytest.raises(TypeError, match="cannot hold a PosixPath"):
            journal.append("step", path=tmp_path)
    assert list(read_journal(tmp_path)) == []
    assert len(RECORDS) == 12


def test_journal_chain_runs_across_rotation_and_attempts(tmp_path: Path) -> None:
    with Journal.open(tmp_path, 1, rotate_bytes=400) as journal:
        for step in range(1, 9):
            journal.append("step", step=step, loss=0.5)
    with Journal.open(tmp_path, 2, rotate_bytes=400) as journal:
        journal.append("attempt_started", attempt=2)
    names = sorted(path.name for path in (tmp_path / "journal").iterdir())
    assert names[:2] == ["attempt-0001-000.jsonl", "attempt-0001-001.jsonl"]
    assert names[-1] == "attempt-0002-000.jsonl"
    assert all((tmp_path / "journal" / name).stat().st_size <= 400 for name in names)
    assert verify_chain(tmp_path) == []
    assert [record["seq"] for record in read_journal(tmp_path)] == list(range(1, 10))


def test_journal_line_longer_than_the_limit_gets_a_file_of_its_own(tmp_path: Path) -> None:
    with Journal.open(tmp_path, 1, rotate_bytes=200) as journal:
        journal.incident("long", "x" * 500)
        journal.incident("long", "x" * 500)
        journal.append("step", step=1)
        journal.append("step", step=2, text="x" * 200)
    assert [record["seq"] for record in read_journal(tmp_path)] == [1, 2, 3, 4]
    assert [len(path.read_bytes().splitlines()) for path in sorted((tmp_path / "journal").iterdir())] == [1, 1, 1, 1]


@pytest.mark.promise("a torn last line is cut off and named")
@pytest.mark.parametrize("num_lost", [1, 30])
def test_torn_last_line_is_cut_off_and_named_by_the_next_attempt(tmp_path: Path, num_lost: int) -> None:
    write_attempt(tmp_path, 1, range(1, 4))
    path = file_of(tmp_path)
    data = path.read_bytes()[:-num_lost]
    path.write_bytes(data)
    torn = data[data.rindex(b"\n") + 1 :]
    with Journal.open(tmp_path, 2) as journal:
        assert journal.head[0] == 4
    incident = list(read_journal(tmp_path))[-1]
    assert incident["incident"] == "journal_torn_line"
    assert incident["file"] == "attempt-0001-000.jsonl"
    assert (incident["num_bytes"], incident["sha256"]) == (len(torn), hashlib.sha256(torn).hexdigest())
    assert path.read_bytes() == data[: -len(torn)]
    assert verify_chain(tmp_path) == []


def test_journal_of_one_torn_line_starts_again(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    file_of(tmp_path).write_bytes(b'{"seq":1,"ti')
    with Journal.open(tmp_path, 2) as journal:
        journal.append("step", step=1)
    assert [record["kind"] for record in read_journal(tmp_path)] == ["incident", "step"]
    assert verify_chain(tmp_path) == []


def test_torn_line_longer_than_the_checked_tail_keeps_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_attempt(tmp_path, 1, range(1, 3))
    file_of(tmp_path, rotation=1).write_bytes(b'{"seq":4,"x":"' + b"y" * 3000)
    monkeypatch.setattr(journal_module, "_TAIL_BYTES", 1000)
    Journal.open(tmp_path, 2).close()
    assert [record["seq"] for record in read_journal(tmp_path)] == [1, 2, 3, 4]
    assert verify_chain(tmp_path) == []


@pytest.mark.promise("a damaged line never stops training")
@pytest.mark.parametrize(
    ("line", "found", "replacement"),
    [
        (2, b'"kind":', b'"kind";'),  # no longer JSON
        (2, b'"loss":', b'"lost":'),  # still JSON: the next line's prev differs
        (4, b'"seq":4', b'"seq";4'),  # the last line
    ],
)
def test_damaged_line_starts_a_new_chain_that_names_it(
    tmp_path: Path, line: int, found: bytes, replacement: bytes
) -> None:
    write_attempt(tmp_path, 1, range(1, 4))
    lines = file_of(tmp_path).read_bytes().splitlines(keepends=True)
    assert found in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(found, replacement)
    file_of(tmp_path).write_bytes(b"".join(lines))
    write_attempt(tmp_path, 2, range(4, 6))
    incident = next(record for record in read_journal(tmp_path) if record["kind"] == "incident")
    assert incident["incident"] == "journal_damaged"
    assert incident["prev"] == "0" * 64
    named = incident["damaged"][0]
    assert named["file"] == "attempt-0001-000.jsonl"
    assert named["line"] in (line, line + 1)
    assert any(finding.line in (line, line + 1) for finding in verify_chain(tmp_path))


def test_damage_is_named_once_and_not_by_every_later_attempt(tmp_path: Path) -> None:
    write_attempt(tmp_path, 1, range(1, 4))
    path = file_of(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"kind":"step"', b'"kind";"step"', 1))
    write_attempt(tmp_path, 2, range(4, 6))
    write_attempt(tmp_path, 3, range(6, 8))
    assert [record["incident"] for record in read_journal(tmp_path) if record["kind"] == "incident"] == [
        "journal_damaged"
    ]


def test_opening_reads_only_the_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_attempt(tmp_path, 1, range(1, 200))
    seen = 0
    parse = journal_module.Line.record

    def counting(line: journal_module.Line) -> object:
        nonlocal seen
        seen += 1
        return parse(line)

    monkeypatch.setattr(journal_module, "_TAIL_BYTES", 2000)
    monkeypatch.setattr(journal_module.Line, "record", counting)
    with Journal.open(tmp_path, 2) as journal:
        assert journal.head[0] == 200
    assert 0 < seen < 20


def test_older_attempt_may_not_write_when_a_newer_one_has(tmp_path: Path) -> None:
    write_attempt(tmp_path, 2, range(1, 2))
    with pytest.raises(SupersededError, match="attempt 2 has begun"):
        Journal.open(tmp_path, 1)
    assert not file_of(tmp_path, 1).exists()


@pytest.mark.promise("a reader that raises never reaches training")
def test_subscriber_that_raises_never_reaches_training(tmp_path: Path) -> None:
    seen: list[int] = []
    calls = 0

    def broken(_record: dict[str, object]) -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("a broken display")

    with Journal.open(tmp_path, 1) as journal:
        journal.subscribe(broken)
        journal.subscribe(lambda record: seen.append(record["step"]))
        journal.append("step", step=1)
        journal.append("step", step=2)
    assert seen == [1, 2]
    assert calls == 1


def test_closed_journal_refuses_and_closes_twice(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, 1)
    journal.append("step", step=1)
    journal.sync()
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match="closed"):
        journal.append("step", step=2)


@pytest.mark.promise("a full disk tears no line of the journal, and the next attempt continues it")
def test_full_disk_leaves_no_torn_line_and_the_next_attempt_continues(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel take a part of the line, as a disk does that fills up; in a process of its own."""
    script = f"""
import os, resource, sys
from pathlib import Path
from megamask.errors import StorageError
from megamask.tracking.journal.writer import Journal
journal = Journal.open(Path({str(tmp_path)!r}), 1)
journal.append("step", step=1)
size = Path({str(file_of(tmp_path))!r}).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        journal.append("step", step=2, text="x" * 200)
    except StorageError as error:
        print(error.message, Path({str(file_of(tmp_path))!r}).stat().st_size == size, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append("step", step=3)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
try:
    journal.append("step", step=4)
except StorageError:
    os._exit(74)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 74, done.stderr
    first, second = done.stdout.splitlines()
    assert "attempt-0001-000.jsonl: only 50 of" in first
    assert "attempt-0001-000.jsonl" in second
    assert first.endswith("True")
    assert second.endswith("True")
    assert [record["step"] for record in read_journal(tmp_path)] == [1, 3]
    assert verify_chain(tmp_path) == []
    write_attempt(tmp_path, 2, range(4, 6))
    assert [record["step"] for record in read_journal(tmp_path) if record["kind"] == "step"] == [1, 3, 4, 5]
    assert verify_chain(tmp_path) == []


def test_refused_write_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(tmp_path, 1)

    def refuse(_descriptor: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(StorageError, match="the disk is full"):
        journal.append("step", step=1)
    monkeypatch.undo()
    assert journal.append("step", step=1)["seq"] == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(fields=st.dictionaries(st.text(alphabet="abcxyz", min_size=1), json_values, max_size=4))
def test_plain_value_survives_strict_json(fields: dict[str, object]) -> None:
    value = plain(fields)
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert plain(value) == value


def test_journal_stays_usable_when_the_next_file_cannot_be_opened(tmp_path, monkeypatch):
    journal = Journal.open(tmp_path, 1, rotate_bytes=1)
    journal.append("incident", incident="first", problem="x")
    real = os.open

    def full(path, flags, *mode, **options):
        if str(path).endswith("-001.jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, flags, *mode, **options)

    with monkeypatch.context() as disk:
        disk.setattr(os, "open", full)
        with pytest.raises(StorageError):
            journal.append("incident", incident="lost", problem="x")
    journal.append("incident", incident="second", problem="x")
    journal.close()
    assert [record["incident"] for record in read_journal(tmp_path)] == ["first", "second"]
    assert verify_chain(tmp_path) == []


@pytest.mark.promise("the durable head is a flushed line, also with another writer")
def test_durable_head_names_a_flushed_line_although_another_thread_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.open(tmp_path, 1) as journal:
        journal.append("step", step=1)
        flushed, others = journal.head, []

        def sync_then_another_thread_writes() -> None:
            others.append(threading.Thread(target=lambda: journal.append("incident", incident="x", problem="y")))
            others[0].start()
            others[0].join(1)  # it may only write when the head is read

        with monkeypatch.context() as crowded:
            crowded.setattr(journal, "sync", sync_then_another_thread_writes)
            assert journal.durable_head() == flushed
        others[0].join()
        assert journal.head[0] == 2
