"""The block-size schedule: entries START:SIZE, from which completed step or token on blocks have which size."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

from megamask.config.rules.problem import Problem

_ENTRY = re.compile(r"(\d{1,15}):(\d{1,9}|L)")
_KEY = "objective.block_schedule"


def block_phases(entries: Sequence[str], sequence_length: int) -> list[tuple[int, int]]:
    """(start, block size) of each entry of a schedule without problems; L is the sequence length."""
    pairs = (entry.split(":") for entry in entries)
    return [(int(start), sequence_length if size == "L" else int(size)) for start, size in pairs]


def block_schedule_problems(entries: Sequence[str], sequence_length: int) -> Iterator[Problem]:
    """Entries of another form, starts that do not ascend from 0, sizes that do not fit a row."""
    for entry in entries:
        if not isinstance(entry, str) or _ENTRY.fullmatch(entry) is None:
            yield _problem(f"where {entry!r} is not an entry")
            return
    if not entries:
        return
    phases = block_phases(entries, sequence_length)
    starts = [start for start, _ in phases]
    if starts[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        yield _problem(f"whose starts are {', '.join(map(str, starts))}")
    for _, size in phases:
        if not 1 <= size <= sequence_length:
            yield _problem(f"but a block of {size} tokens does not fit training.sequence_length = {sequence_length}")


def _problem(because: str) -> Problem:
    return Problem(
        key=_KEY,
        because=because,
        allowed='a list of "START:SIZE" with starts that ascend from 0 and sizes from 1 to the sequence length, or L '
        'for it, as ["0:1", "1000:4", "2000:32", "4000:L", "9000:32"]',
    )
