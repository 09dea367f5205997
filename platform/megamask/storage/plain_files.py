"""Reading of untrusted files: plain files of a bounded size, never a link or a device."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


class NotPlainError(ValueError):
    """A name of something other than a plain file, or a file that is larger than it may be."""


def open_plain(path: Path) -> int:
    """Return a descriptor for reading a plain file.

    Raises:
        FileNotFoundError: nothing has that name.
        NotPlainError: a link, a folder, a device or a pipe; it was not read.
        OSError: the storage refuses.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotPlainError(f"{path} is a link") from error
        if error.errno == errno.ENXIO:  # a socket
            raise NotPlainError(f"{path} is not a plain file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotPlainError(f"{path} is not a plain file")
    return descriptor


def read_plain(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a plain file, which is refused by its size before any is read; raises as `open_plain`."""
    with os.fdopen(open_plain(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise NotPlainError(f"{path} has {size} bytes, more than the {max_bytes} that such a file can have")
        return file.read(size)
