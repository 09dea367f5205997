"""Daemon threads that may still run when a process has finished its work.

Where the interpreter shuts down while such a thread is inside a C++ library, the thread is killed at its next step
into Python, and the process aborts (SIGABRT) in place of its exit code. A process with such a thread therefore
ends through `os._exit`.
"""

from __future__ import annotations

import threading

# A thread that has finished its work needs a moment to disappear.
_VANISH_S = 0.2
_watched: list[threading.Thread] = []


def watch(thread: threading.Thread) -> None:
    """Register a daemon thread before it starts."""
    _watched[:] = [known for known in _watched if known.is_alive()]
    _watched.append(thread)


def any_alive() -> bool:
    """Return whether a registered thread still runs."""
    for thread in _watched:
        if thread.is_alive():
            thread.join(_VANISH_S)
    return any(thread.is_alive() for thread in _watched)
