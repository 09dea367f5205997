"""stdout and stderr of a process whose terminal may close, whose disk may fill, and whose encoding may be poor."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
from collections.abc import Iterable
from typing import IO, TextIO


def prepare() -> None:
    """Make every character printable: one that the stream's encoding lacks is written as an escape."""
    for stream in _streams():
        with contextlib.suppress(OSError, ValueError):  # a closed stream
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")


def write_line(text: str, stream: IO[str]) -> None:
    """Write a line and flush it. A reader that has gone away (`| head`, a closed terminal) is not an error.

    Raises:
        OSError: stdout is a file that cannot take the line, as on a full disk. On stderr the same is ignored, because
            nothing is left to report it to.
    """
    try:
        stream.write(f"{text.rstrip()}\n")
        stream.flush()
    except OSError as error:
        is_answer = stream is not sys.stderr and not _has_no_reader(error, stream)
        _silence(stream)
        if is_answer:
            raise
    except ValueError:  # closed by this process
        return


def settle() -> None:
    """Flush what is left, so that the interpreter's own flush at the end cannot change the exit code."""
    for stream in _streams():
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            _silence(stream)


def _streams() -> Iterable[TextIO]:
    return (stream for stream in (sys.stdout, sys.stderr) if stream is not None)


def _has_no_reader(error: OSError, stream: IO[str]) -> bool:
    if isinstance(error, BrokenPipeError):
        return True
    with contextlib.suppress(OSError, ValueError):
        return error.errno == errno.EIO and stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)  # a terminal that closed
    return False


def _silence(stream: IO[str]) -> None:
    """Points the stream's descriptor at the null device: what is still in its buffer can then be flushed."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
