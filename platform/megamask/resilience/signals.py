"""Being asked to stop: signals are only counted here; the loop looks at them between two steps.

Schedulers signal a process twice (directly and through its launcher), so a handler may run any number of times.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any, Self

from megamask.errors import ExitCode

_PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_SIGNALS = (*_PREEMPTION_SIGNALS, signal.SIGINT)


class StopRequest:
    """Counts the signals that ask for an end; use it as a context manager in the main thread.

    SIGTERM and SIGUSR1 ask to save and end with 75 (requeue me), SIGINT to save and end with 93 (do not). A second
    SIGINT ends the process at once with 130, nothing saved.
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
        """Takes the handlers over; a second call does nothing.

        A launcher starts its ranks with these signals blocked, so that one that comes before the handlers waits for
        them; from here on they are delivered.

        Raises:
            ValueError: not called from the main thread.
        """
        if self._previous:
            return
        for number in _PREEMPTION_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_preemption)
        self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def restore(self) -> None:
        """Gives back the handlers that were there before; a second call does nothing."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def last_word(self) -> signal.Signals | None:
        """A signal that asks somebody else for the same."""
        if self._num_interrupts:
            return signal.SIGINT
        return signal.SIGTERM if self._num_preemptions else None

    @property
    def requested(self) -> int:
        """The exit code that was asked for, 93 before 75, or 0; ranks agree on the maximum of theirs."""
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
