"""Requests to stop that arrive as signals: handlers count them, the training loop reads them between two steps.

A scheduler signals a process twice (directly and through its launcher), so a handler may run any number of times.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any, Self

from megamask.errors import ExitCode

# SIGHUP comes from a terminal that closes, or from a lost ssh connection; under nohup it stays ignored.
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
STOP_SIGNALS = (*PREEMPTION_SIGNALS, signal.SIGINT)


def is_ignored(number: signal.Signals) -> bool:
    """Return whether this process was started with a signal ignored, as nohup does with SIGHUP; it then stays so."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


class StopRequest:
    """Counts the signals that ask for an end; use it as a context manager in the main thread.

    SIGTERM, SIGUSR1 and SIGHUP ask to save and end with 75 (requeue), SIGINT to save and end with 93 (do not requeue).
    A second SIGINT ends the process at once with 130, and nothing is saved.
    """

    def __init__(self) -> None:
        self._num_preemptions = 0
        self._num_interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.restore()

    def install(self) -> None:
        """Install the handlers; a second call does nothing.

        A launcher starts its ranks with these signals blocked, so that one that arrives before the handlers are
        installed stays pending. This call unblocks them.

        Raises:
            ValueError: not called from the main thread.
        """
        if self._previous:
            return
        for number in PREEMPTION_SIGNALS:
            if not is_ignored(number):
                self._previous[number] = signal.signal(number, self._on_preemption)
        self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def restore(self) -> None:
        """Restore the previous handlers; a second call does nothing."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def strongest(self) -> signal.Signals | None:
        """The signal that passes the request on to another process, or None."""
        if self._num_interrupts:
            return signal.SIGINT
        return signal.SIGTERM if self._num_preemptions else None

    @property
    def requested(self) -> int:
        """The requested exit code, 93 before 75, or 0; ranks agree on the maximum of theirs."""
        if self._num_interrupts:
            return int(ExitCode.DO_NOT_REQUEUE)
        if self._num_preemptions:
            return int(ExitCode.PREEMPTED)
        return 0

    def _on_preemption(self, _number: int, _frame: FrameType | None) -> None:
        self._num_preemptions += 1

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self._num_interrupts += 1
        if self._num_interrupts > 1:
            os._exit(int(ExitCode.INTERRUPTED_TWICE))  # at once: no handler, no flush, no wait for other ranks
