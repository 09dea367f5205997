"""Threads that a process may end without: whoever ends it must then spare them the interpreter's own farewell."""

from __future__ import annotations

import threading

# A thread that has done its work is given so long to vanish.
_VANISH_S = 0.2
_watched: list[threading.Thread] = []


def watch(thread: threading.Thread) -> None:
    """Remembers a daemon thread, before it starts, that may still be inside a library's own code when all else is done.

    Where the interpreter shuts down under such a thread, it kills it at its next step into Python; inside C++ that
    aborts the process (SIGABRT), whatever exit code was meant.
    """
    _watched[:] = [known for known in _watched if known.is_alive()]
    _watched.append(thread)


def has_left_any() -> bool:
    """Whether a watched thread is still there."""
    for thread in _watched:
        if thread.is_alive():
            thread.join(_VANISH_S)
    return any(thread.is_alive() for thread in _watched)
