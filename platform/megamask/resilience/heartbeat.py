"""The progress mark of a rank: which step, in which section, since when; readable while the rank is stuck.

A launcher gives each rank a small file, which the rank maps into its memory. The mark is written by storing a few
bytes, so another process can read it even when this one hangs inside a C++ library or is stopped.
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
# In the order in which an attempt passes through them; steps, evaluations, previews and saves alternate.
SECTIONS = ("import", "rendezvous", "restore", "step", "evaluation", "preview", "save", "close")
# Nothing can be lost here: no step has been taken since the newest checkpoint.
BEFORE_TRAINING = frozenset({"import", "rendezvous", "restore"})
_MARK = struct.Struct("<8sQqqdQ")  # magic, sequence, step, section, seconds of the monotonic clock, sequence again
_MAGIC = b"MEGABEAT"
_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Progress of a rank.

    Args:
        step: the step it is taking, or has completed last.
        section: one of SECTIONS.
        since: seconds of this machine's monotonic clock when it entered.
    """

    step: int
    section: str
    since: float

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
        self._sequence = 0
        if path is not None:
            # a launcher that has gone away takes its file along: the mark is a help only
            with contextlib.suppress(OSError, ValueError), path.open("r+b") as file:
                self._mapped = mmap.mmap(file.fileno(), _SIZE)
        self.mark = Mark(step=0, section="import", since=time.monotonic())
        self._write()

    @classmethod
    def of_environment(cls) -> Heartbeat:
        """The mark of a rank in the file that its launcher named."""
        name = os.environ.get(VARIABLE)
        return cls(Path(name) if name else None)

    def enter(self, section: str, step: int | None = None) -> None:
        """Mark the beginning of a section; `step` None keeps the step."""
        step = self.mark.step if step is None else step
        self.mark = Mark(step=step, section=section, since=time.monotonic())
        self._write()

    def _write(self) -> None:
        if self._mapped is None:
            return
        self._sequence += 1
        mark = self.mark
        packed = _MARK.pack(_MAGIC, self._sequence, mark.step, SECTIONS.index(mark.section), mark.since, self._sequence)
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
        magic, before, step, section, since, after = _MARK.unpack_from(content)
        if magic != _MAGIC:
            return None
        if before == after and 0 <= section < len(SECTIONS):
            return Mark(step=step, section=SECTIONS[section], since=since)
    return None
