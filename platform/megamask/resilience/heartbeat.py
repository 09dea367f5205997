"""The progress mark of a rank: which step, in which section, since when; readable while the rank is stuck.

A launcher gives each rank a small file, which the rank maps into its memory. The mark is written by storing a few
bytes, so another process can read it even when this one hangs inside a C++ library or is stopped. It changes when the
rank enters a section; a rank that makes no progress leaves the mark as it is, so no thread has to keep it alive.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "MEGAMASK_HEARTBEAT"
# In the order in which an attempt passes through them. From "step" to "agreement", where all ranks agree on whether to
# go on, they alternate.
SECTIONS = ("import", "rendezvous", "restore", "step", "evaluation", "preview", "save", "agreement", "close")
# Nothing can be lost here: no step has been taken since the newest checkpoint.
BEFORE_TRAINING = frozenset({"import", "rendezvous", "restore"})
# The first steps of an attempt compile kernels and allocate memory; the later ones are much shorter.
FIRST_STEPS = 2
# magic, sequence, step, section, seconds of the monotonic clock, steps begun, longest stay in s, sequence again
_MARK = struct.Struct("<8sQqqdqdQ")
_MAGIC = b"MEGABEAT"
_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Progress of a rank.

    Args:
        step: the step it is taking, or has completed last.
        section: one of SECTIONS.
        since: seconds of this machine's monotonic clock when it entered.
        num_steps: steps begun by this process.
        longest_s: longest completed stay in this section so far; the first steps are left out.
        sequence: number of marks written before; 0 for a mark that was not read from a file.
    """

    step: int
    section: str
    since: float
    num_steps: int = 0
    longest_s: float = 0.0
    sequence: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """Marks in the order of progress: of two ranks the smaller one is behind."""
        return self.step, SECTIONS.index(self.section)


class Heartbeat:
    """The mark of this process.

    Args:
        path: the file that the launcher gave, or None: then only this process can read the mark.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._mapped: mmap.mmap | None = None
        self._longest = dict.fromkeys(SECTIONS, 0.0)
        if path is not None:
            # a launcher that has gone away takes its file along: the mark is a help only
            with contextlib.suppress(OSError, ValueError), path.open("r+b") as file:
                self._mapped = mmap.mmap(file.fileno(), _SIZE)
        self.mark = Mark(step=0, section="import", since=time.monotonic(), sequence=1)
        self._write()

    @classmethod
    def of_environment(cls) -> Heartbeat:
        """The mark of a rank in the file that its launcher named."""
        name = os.environ.get(VARIABLE)
        return cls(Path(name) if name else None)

    def enter(self, section: str, step: int | None = None) -> None:
        """Mark the beginning of a section; `step`, the number of a step that begins, None keeps it."""
        now, left = time.monotonic(), self.mark
        if left.section != "step" or left.num_steps > FIRST_STEPS:
            self._longest[left.section] = max(self._longest[left.section], now - left.since)
        self.mark = Mark(
            step=left.step if step is None else step,
            section=section,
            since=now,
            num_steps=left.num_steps + (step is not None and section == "step"),
            longest_s=self._longest[section],
            sequence=left.sequence + 1,
        )
        self._write()

    def _write(self) -> None:
        if self._mapped is None:
            return
        mark, section = self.mark, SECTIONS.index(self.mark.section)
        facts = (mark.step, section, mark.since, mark.num_steps, mark.longest_s)
        packed = _MARK.pack(_MAGIC, mark.sequence, *facts, mark.sequence)
        self._mapped[: len(packed)] = packed


def make_file(path: Path) -> None:
    """Make the file of a rank that is about to start."""
    path.write_bytes(bytes(_SIZE))


def read_mark(path: Path) -> Mark | None:
    """The mark in a rank's file, or None before the rank's first one, or where the file cannot be read."""
    for _ in range(3):  # a mark that is just being written differs at its two ends
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if len(content) < _MARK.size:
            return None
        magic, sequence, step, section, since, num_steps, longest_s, after = _MARK.unpack_from(content)
        if magic != _MAGIC:
            return None
        if sequence == after and 0 <= section < len(SECTIONS):
            return Mark(
                step=step,
                section=SECTIONS[section],
                since=since,
                num_steps=num_steps,
                longest_s=longest_s,
                sequence=sequence,
            )
    return None
