"""Progress of a preparation as lines of text."""

from __future__ import annotations

import time
from collections.abc import Callable


class ProgressLines:
    """Progress as lines: documents, bytes and the time that is probably left, at most one line in `every_s`.

    Args:
        write: takes a line without its end.
        every_s: seconds between two lines; a preparation that takes less prints none.
    """

    def __init__(
        self, write: Callable[[str], None], *, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._every_s = every_s
        self._clock = clock
        self._shown = clock()
        self._phase = ""
        self._began = 0.0

    def __call__(self, phase: str, documents: int, done: int, total: int | None) -> None:
        """Note where a phase is."""
        now = self._clock()
        if phase != self._phase:
            self._phase, self._began = phase, now
        if now - self._shown < self._every_s:
            return
        self._shown = now
        spent = now - self._began
        if total is None:
            self._write(f"{phase}: {spent:.0f} s so far")
            return
        left = f"about {spent * (total - done) / done:.0f} s left" if done and spent else "time left unknown"
        self._write(
            f"{phase}: {documents} documents, {done / 1e6:.1f} of {total / 1e6:.1f} MB "
            f"({100 * done / total if total else 100:.0f} %), {left}"
        )
