"""Finding the record of one step in a journal of any length, reading a few KiB for each halving of it.

The step lines of one attempt ascend, so that its files, laid end to end, can be bisected over byte offsets. A line
decides where to go on only if the line after it holds its hash: a changed number cannot lead the search astray.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from megamask.storage.hashing import sha256_bytes
from megamask.tracking.journal.lines import Line, Record, Span, journal_files, lines_between, parse, tail
from megamask.tracking.records import AttemptStarted, read_record

_SCAN_BYTES = 2**13  # a range this small is read line by line
_BUFFER_BYTES = 2**12
_FIRST_TAIL_BYTES = 2**16


def find_step(run_dir: Path, step: int) -> Record | None:
    """The `step` record of a step; for a repeated step the one of the highest attempt. None if there is none.

    Damaged and torn lines are passed over, as by every reader: then the record of an older attempt counts.
    """
    found = find_step_and_attempt(run_dir, step)
    return None if found is None else found[1]


def find_step_and_attempt(run_dir: Path, step: int) -> tuple[int, Record] | None:
    """The number of the attempt whose record of a step holds, and the record, as `find_step`."""
    attempts = [list(files) for _, files in groupby(journal_files(run_dir), key=lambda file: file.attempt)]
    for files in reversed(attempts):
        found = _find_in_attempt(Span(files, buffering=_BUFFER_BYTES), step)
        if found is not None:
            return files[0].attempt, found
    return None


def last_step(run_dir: Path) -> Record | None:
    """The newest step record, searched from the journal's end; None where no step was journalled."""
    budget, size = _FIRST_TAIL_BYTES, sum(file.path.stat().st_size for file in journal_files(run_dir))
    while True:
        for line in reversed(tail(run_dir, budget)):
            record = line.record()
            if _step_of(record) is not None:
                return record
        if budget >= size:
            return None
        budget *= 8


def has_record(run_dir: Path, kind: str, step: int) -> bool:
    """Return whether a record of a kind names this step; read from the journal's end back to an earlier step."""
    budget, size = _FIRST_TAIL_BYTES, sum(file.path.stat().st_size for file in journal_files(run_dir))
    while True:
        for line in reversed(tail(run_dir, budget)):
            record = line.record()
            if record is not None and record["kind"] == kind and record.get("step") == step:
                return True
            if (found := _step_of(record)) is not None and found < step:
                return False
        if budget >= size:
            return False
        budget *= 8


def newest_start(run_dir: Path, *, before: int) -> AttemptStarted | None:
    """Return the `attempt_started` record of the newest attempt below a number that has one."""
    attempts = groupby(journal_files(run_dir), key=lambda file: file.attempt)
    for files in reversed([list(files) for number, files in attempts if number < before]):
        for line in lines_between(files[0], 0, _FIRST_TAIL_BYTES):
            record = line.record()
            if record is not None and isinstance(started := read_record(record), AttemptStarted):
                return started
    return None


def _find_in_attempt(span: Span, step: int) -> Record | None:
    """Bisects; lines that begin in [low, high) may be the one that is sought, those before are of earlier steps."""
    low, high = 0, span.num_bytes
    unconfirmed: Record | None = None
    # most attempts are left after one look at their first step, or at their last
    ends = [max(0, high - _SCAN_BYTES), 0]
    while low < high:
        is_short = high - low <= _SCAN_BYTES
        middle = low if is_short else ends.pop() if ends else (low + high) // 2
        pivot: _Seen | None = None
        for seen in _seen_lines(span, middle, high):
            if seen.step == step:
                if seen.is_confirmed:
                    return seen.record
                unconfirmed = seen.record
            if seen.step is not None and seen.is_confirmed and not is_short:
                pivot = seen
                break
        if is_short:
            break
        if pivot is None or pivot.step is None or pivot.step > step:
            high = middle
        else:
            low = pivot.end
    return unconfirmed


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A line on the way.

    Args:
        record: what it holds, None if it is damaged or torn.
        end: where the next line begins in the span.
        is_confirmed: the next line holds this one's hash, so that this one is as it was written.
    """

    record: Record | None
    end: int
    is_confirmed: bool

    @property
    def step(self) -> int | None:
        """The step that the line records; None for every other kind of line."""
        return _step_of(self.record)


def _seen_lines(span: Span, begin: int, end: int) -> Iterator[_Seen]:
    """Yield the lines that begin in [begin, end), each together with whether the line after it confirms it."""
    current: tuple[int, Line] | None = None
    for place, line in span.lines(begin):
        if current is not None:
            yield _seen(*current, line)
        if place >= end:
            return
        current = place, line
    if current is not None:
        yield _seen(*current, None)


def _seen(place: int, line: Line, following: Line | None) -> _Seen:
    record = line.record()
    is_confirmed = record is not None and following is not None and _names(following.data, line.data)
    return _Seen(record=record, end=place + len(line.data) + 1, is_confirmed=is_confirmed)


def _names(following: bytes, data: bytes) -> bool:
    """True if a line, torn or not, is a record whose `prev` is the hash of these bytes."""
    record = parse(following)
    return record is not None and record["prev"] == sha256_bytes(data)


def _step_of(record: Record | None) -> int | None:
    step = record.get("step") if record is not None and record["kind"] == "step" else None
    return step if isinstance(step, int) else None
