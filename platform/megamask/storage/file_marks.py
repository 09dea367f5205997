"""Marks by which a process knows that a file is still the one that it read."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Clocks of file systems tick in milliseconds, and a file may be changed twice in one tick without a trace. A file that
# was changed this long ago cannot have been: the next change of it shows.
_SETTLED_NS = 2_000_000_000


def settled_mark(path: Path) -> tuple[int, ...] | None:
    """Return (device, inode, size, times) of a file or folder, (0,) for one that is missing.

    None where it was changed so lately that another change might leave the same mark.
    """
    try:
        found = os.lstat(path)
    except OSError:
        return (0,)
    if abs(time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns)) < _SETTLED_NS:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
