"""Following a journal from a remembered place, for readers that send it elsewhere."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from megamask.tracking.journal.lines import JournalFile, Line, Record, journal_files, lines_between

_READ_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in a journal: every complete line before it was read.

    Args:
        file: name of the journal file; None is the very beginning.
        offset: bytes of it that were read.
    """

    file: str | None = None
    offset: int = 0


def read_new(run_dir: Path, position: Position, *, max_bytes: int = _READ_BYTES) -> tuple[list[Record], Position]:
    """The next records after a position, about `max_bytes` at most, and the position after them.

    Damaged lines are left out. A line without its end is left for the next call while its file is the newest; once a
    newer file exists it is a torn one, which the journal cuts off, and is passed over.

    Returns:
        Records in order (perhaps none although there are more: damaged lines only) and the new position; the same
        position means that nothing was added.
    """
    files = journal_files(run_dir)
    index = next((i for i, file in enumerate(files) if file.path.name == position.file), None)
    if index is None:
        if not files:
            return [], position
        index, position = 0, Position(file=files[0].path.name)
    lines = _complete_lines(files[index], position.offset, max_bytes)
    if not lines and index + 1 < len(files):
        index, position = index + 1, Position(file=files[index + 1].path.name)
        lines = _complete_lines(files[index], 0, max_bytes)
    records = [record for line in lines if (record := line.record()) is not None]
    offset = lines[-1].offset + len(lines[-1].data) + 1 if lines else position.offset
    return records, Position(file=files[index].path.name, offset=offset)


def _complete_lines(file: JournalFile, offset: int, max_bytes: int) -> list[Line]:
    lines = lines_between(file, offset, offset + max_bytes)
    return list(itertools.takewhile(lambda line: not line.is_torn, lines))
