"""The chain of hashes over a journal: whether it holds, and where one attempt took over from another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from megamask.storage.hashing import sha256_bytes
from megamask.tracking.journal.lines import (
    JournalFile,
    Line,
    Record,
    journal_files,
    line_number,
    lines_between,
    read_lines,
)

CHAIN_START = "0" * 64
DAMAGE_INCIDENT = "journal_damaged"
_LAST_LINES_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something in a journal that is not as it was written; line numbers begin with 1."""

    file: str
    line: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.problem}"


def chain_problem(record: Record | None, previous: bytes | None) -> str | None:
    """Return the fault of a record that follows the line `previous` (None: nothing precedes it), or None.

    A record that opens a new chain after damage is in order; the damage itself is named at its own line.
    """
    if record is None:
        return "not a journal record"
    prev = record["prev"]
    if prev == CHAIN_START:
        is_opening = previous is None or (record["kind"] == "incident" and record.get("incident") == DAMAGE_INCIDENT)
        return None if is_opening else "the chain starts anew without naming a damaged line"
    if previous is None:
        return "the first record names a predecessor that is not there"
    if prev != sha256_bytes(previous):
        return "the hash of the line before it is not the one recorded here: one of the two was changed"
    return None


@dataclass(frozen=True, kw_only=True)
class Fork:
    """The point at which an attempt's chain leaves that of an older one, which wrote on briefly after the take-over.

    Args:
        attempt: the newer one.
        line: what its first line chains on; None where nothing was written when it opened the journal.
    """

    attempt: int
    line: Line | None


@dataclass(frozen=True, kw_only=True)
class Overtaken:
    """Lines [first, last] of a file that are outside the chain: attempt `by` had opened the journal before them.

    They are what the older attempt did, and no damage; only the newest of them may be changed unseen.
    """

    file: str
    first: int
    last: int
    by: int

    def __str__(self) -> str:
        lines = f"line {self.first}" if self.first == self.last else f"lines {self.first}-{self.last}"
        return f"{self.file}, {lines}: written after attempt {self.by} had taken over"


def find_fork(opening: Line, earlier: Sequence[Line]) -> Fork | None:
    """The fork at an attempt's first line, which does not chain on the line before it; None if it is none.

    Args:
        opening: the first line of the attempt.
        earlier: lines of older attempts among which the one that it chains on is sought.
    """
    record = opening.record()
    if record is None:
        return None
    if record["prev"] == CHAIN_START:
        return Fork(attempt=opening.file.attempt, line=None) if record["seq"] == 1 else None
    for line in reversed(earlier):
        if not line.is_torn and sha256_bytes(line.data) == record["prev"]:
            return Fork(attempt=opening.file.attempt, line=line)
    return None


def forks(run_dir: Path) -> dict[int, Fork]:
    """The forks of a journal by the newer attempt; reads little where there is none."""
    found: dict[int, Fork] = {}
    earlier: list[JournalFile] = []
    for attempt, group in groupby(journal_files(run_dir), key=lambda file: file.attempt):
        files = list(group)
        opening = next((line for file in files for line in lines_between(file)), None)
        if opening is None:
            continue
        before = next((line for file in reversed(earlier) if (line := _last_whole_line(file)) is not None), None)
        if before is not None and chain_problem(opening.record(), before.data) is not None:
            for file in reversed(earlier):
                if (fork := find_fork(opening, list(lines_between(file)))) is not None:
                    found[attempt] = fork
                    break
        earlier += files
    return found


def overtaken(run_dir: Path) -> list[Overtaken]:
    """Lines that older attempts wrote after a newer one had opened the journal, oldest first; often none."""
    found = forks(run_dir)
    if not found:
        return []
    files = [file for file in journal_files(run_dir) if file.path.stat().st_size > 0]
    beside: list[Overtaken] = []
    while files:
        newest = files[-1].attempt
        files = [file for file in files if file.attempt < newest]
        if (fork := found.get(newest)) is None:
            continue
        kept = fork.line
        while files and (kept is None or files[-1] > kept.file):
            beside.append(_beside(files.pop(), 0, by=newest))
        if kept is not None and line_number(kept) < _num_lines(kept.file):
            beside.append(_beside(kept.file, line_number(kept), by=newest))
    return beside[::-1]


def _beside(file: JournalFile, num_kept: int, *, by: int) -> Overtaken:
    return Overtaken(file=file.path.name, first=num_kept + 1, last=_num_lines(file), by=by)


def _num_lines(file: JournalFile) -> int:
    return sum(1 for _ in lines_between(file))


def _last_whole_line(file: JournalFile) -> Line | None:
    """The last line that has its end; reads the end of the file, and all of it where that is one long line."""
    for start in (max(0, file.path.stat().st_size - _LAST_LINES_BYTES), 0):
        for line in reversed(list(lines_between(file, start))):
            if not line.is_torn:
                return line
    return None


def verify_chain(run_dir: Path) -> list[Finding]:
    """Check every line of a run's journal against the chain; an empty list means that it is as written.

    Found are damaged, changed, missing and torn lines. A torn last line is a finding too: of a run that is alive, read
    again. What an older attempt wrote after a newer one had taken over is none: see `overtaken`.
    """
    branches = forks(run_dir)
    findings: list[Finding] = []
    previous: bytes | None = None
    last_seq = 0
    number, file = 0, None
    for line in read_lines(run_dir):
        number = number + 1 if line.file == file else 1
        if (file is None or line.file.attempt > file.attempt) and (fork := branches.get(line.file.attempt)) is not None:
            previous = None if fork.line is None else fork.line.data
            last_seq = _seq_of(fork.line)
        file = line.file
        record = line.record()
        problem = "torn: it has no end" if line.is_torn else chain_problem(record, previous)
        if problem is None and record is not None and record["seq"] != last_seq + 1 and record["prev"] != CHAIN_START:
            problem = f"its seq is {record['seq']}, after {last_seq}"
        if problem is not None:
            findings.append(Finding(file=line.file.path.name, line=number, problem=problem))
        if record is not None:
            last_seq = record["seq"]
        if not line.is_torn:
            previous = line.data
    return findings


def _seq_of(line: Line | None) -> int:
    record = None if line is None else line.record()
    return 0 if record is None else int(record["seq"])
