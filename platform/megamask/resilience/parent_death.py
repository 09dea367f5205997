"""Children that end with the process that started them, however it ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(expected_parent: int | None = None) -> bool:
    """Ask the kernel to kill this process (SIGKILL) when the thread that started it ends; Linux only.

    Called first thing in a child. The parent may have died before the call; then this process ends here, with a
    SIGKILL to itself, as it would have a moment later.

    Args:
        expected_parent: the parent's process id as the parent knows it; None takes the present one, which does
            not detect a parent that died before.

    Returns:
        Whether the kernel will do so; False where it cannot (not Linux), and the child goes on unprotected.
    """
    parent = os.getppid() if expected_parent is None else expected_parent
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def die_with_launcher() -> None:
    """Do so in a rank of this project's own launcher, which leaves its process id in MEGAMASK_PARENT_PID."""
    if parent := os.environ.get("MEGAMASK_PARENT_PID"):
        die_with_parent(int(parent))
