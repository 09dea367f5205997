"""Files and lines of a journal in order: the one reader of journal lines by offset.

Nothing here writes, and nothing here stops at a damaged line: every reader goes on with the intact ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamask.runs.layout import journal_folder

_BUFFER_BYTES = 2**16
_FILE_NAME = re.compile(r"attempt-(\d{4,})-(\d{3,})\.jsonl")

Record = dict[str, Any]


@dataclass(frozen=True, order=True, kw_only=True)
class JournalFile:
    """One file of a journal; sorting gives the order in which the files were written."""

    attempt: int
    rotation: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a journal file.

    Args:
        file: that holds it.
        offset: bytes before it in the file.
        data: its bytes without the newline.
        is_torn: the newline is missing, so a writer died (or is) in the middle of it.
    """

    file: JournalFile
    offset: int
    data: bytes
    is_torn: bool = False

    def record(self) -> Record | None:
        """Return the record on this line, or None if the line is torn or damaged."""
        return None if self.is_torn else parse(self.data)


def journal_files(run_dir: Path) -> list[JournalFile]:
    """Return all files of a run's journal, oldest first; empty when nothing was journalled."""
    folder = journal_folder(run_dir)
    if not folder.is_dir():
        return []
    matches = ((entry, _FILE_NAME.fullmatch(entry.name)) for entry in folder.iterdir())
    return sorted(
        JournalFile(attempt=int(match[1]), rotation=int(match[2]), path=entry) for entry, match in matches if match
    )


def parse(data: bytes) -> Record | None:
    """Return the record in a line's bytes, or None if they are not one (damage)."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, nested without end
        return None
    if not isinstance(record, dict):
        return None
    is_record = isinstance(record.get("seq"), int) and all(
        isinstance(record.get(name), str) for name in ("time", "kind", "prev")
    )
    return record if is_record else None


def lines_between(
    file: JournalFile, begin: int = 0, end: int | None = None, *, buffering: int = _BUFFER_BYTES
) -> Iterator[Line]:
    """Yield the lines of a file that begin in [begin, end), in order; a line that `begin` cuts is left out.

    Args:
        begin, end: byte offsets; no end is that of the file.
        buffering: bytes read at once; reading stops soon after `end`, or where the caller does.
    """
    with file.path.open("rb", buffering=buffering) as stream:
        if begin > 0:
            stream.seek(begin - 1)
            stream.readline()  # to the end of the line that holds the byte before
        offset = stream.tell()
        while end is None or offset < end:
            if not (data := stream.readline()):
                return
            yield Line(file=file, offset=offset, data=data.removesuffix(b"\n"), is_torn=not data.endswith(b"\n"))
            offset += len(data)


class Span:
    """Several files laid end to end as one range of bytes, in which no line goes from one file into the next.

    Sizes are taken when the span is made: what a writer adds later is not part of it.
    """

    def __init__(self, files: Sequence[JournalFile], *, buffering: int = _BUFFER_BYTES) -> None:
        self._files = files
        self._buffering = buffering
        self._begins = [0]
        for file in files:
            self._begins.append(self._begins[-1] + file.path.stat().st_size)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return self._begins[-1]

    def lines(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, Line]]:
        """Yield (offset in the span, line) for the lines that begin in [begin, end); no end is that of the span."""
        last = self.num_bytes if end is None else min(end, self.num_bytes)
        for file, low, high in zip(self._files, self._begins[:-1], self._begins[1:], strict=True):
            if high <= begin or low >= last:
                continue
            stop = min(high, last) - low
            for line in lines_between(file, max(0, begin - low), stop, buffering=self._buffering):
                yield low + line.offset, line


def read_lines(run_dir: Path) -> Iterator[Line]:
    """Yield every line of a run's journal in the order of writing, damaged and torn ones included."""
    for file in journal_files(run_dir):
        yield from lines_between(file)


def read_journal(run_dir: Path) -> Iterator[Record]:
    """Yield every intact record of a run's journal, over files and attempts, in order; damaged lines are left out."""
    for line in read_lines(run_dir):
        record = line.record()
        if record is not None:
            yield record


def steps(run_dir: Path) -> dict[int, Record]:
    """Return the step records of a run by step, ascending; of a repeated step that of the highest attempt."""
    return {step: record for step, (_, record) in steps_with_attempts(run_dir).items()}


def steps_with_attempts(run_dir: Path) -> dict[int, tuple[int, Record]]:
    """Return the attempt and the record of each step, as `steps` chooses them."""
    found: dict[int, tuple[int, Record]] = {}
    for line in read_lines(run_dir):
        record = line.record()
        if record is not None and record["kind"] == "step" and isinstance(record.get("step"), int):
            found[record["step"]] = line.file.attempt, record
    return dict(sorted(found.items()))


def tail(run_dir: Path, max_bytes: int) -> list[Line]:
    """Return the last lines of a journal, oldest first, reading no more than `max_bytes` from the ends of its files.

    At least the last line is complete, for any length: where the budget cuts a file's only line, that file is
    read from its beginning.
    """
    collected: list[Line] = []
    budget = max_bytes
    for file in reversed(journal_files(run_dir)):
        size = file.path.stat().st_size
        lines = list(lines_between(file, max(0, size - budget)))
        if not lines and size > 0:
            lines = list(lines_between(file))
        collected = lines + collected
        budget -= size
        if budget <= 0:
            break
    return collected


def line_number(line: Line) -> int:
    """Return the number of a line in its file, from 1; reads the file up to it."""
    with line.file.path.open("rb") as stream:
        return stream.read(line.offset).count(b"\n") + 1
