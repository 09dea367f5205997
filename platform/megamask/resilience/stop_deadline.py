"""The end of a process that was asked to stop and cannot: it waits for its peers inside a C++ library.

Python runs a signal's handler in the main thread, between two steps of Python. A rank that waits in a collective call
takes none, so the handlers of `signals.py` do not run. The interpreter's own handler still writes the number of the
signal to a pipe; a thread reads it there, and ends the process when the time allowed is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Self

from megamask.config.schema.launch import LaunchConfig
from megamask.errors import ExitCode, MegamaskError
from megamask.resilience.heartbeat import BEFORE_TRAINING, Heartbeat
from megamask.resilience.signals import STOP_SIGNALS, StopRequest

# Before training nothing can be lost: a process that is asked to stop there has this long to do it in order.
STARTUP_GRACE_S = 3.0
_POLL_S = 0.1


class StoppedBeforeTraining(MegamaskError):
    """A signal asked for an end before training began: 75, or 93 for SIGINT. Nothing was lost."""

    def __init__(self, asked: signal.Signals, section: str) -> None:
        code, reason = ended_without_answer(asked, section, 0.0)
        super().__init__(reason)
        self.exit_code = ExitCode(code)


class StopDeadline:
    """Ends this process when it does not stop in time; use it as a context manager in the main thread.

    Args:
        signals: what was requested before the pipe was there.
        heartbeat: the section that the process is in.
        grace_s: from the first signal to the end, outside a save.
        save_budget_s: further seconds for a save that is under way when the grace is over.
        last_act: called with the exit code and a sentence, in this object's thread, right before the end. It writes
            what others must know; it may raise, and the process ends all the same.
    """

    def __init__(
        self,
        signals: StopRequest,
        heartbeat: Heartbeat,
        *,
        grace_s: float,
        save_budget_s: float,
        last_act: Callable[[int, str], None],
    ) -> None:
        self._signals = signals
        self._heartbeat = heartbeat
        self._grace_s = grace_s
        self._save_budget_s = save_budget_s
        self._last_act = last_act
        self._is_over = threading.Event()
        self._reader = self._writer = self._previous = -1
        self._num_interrupts = 0
        self._asked: signal.Signals | None = None

    @classmethod
    def of(
        cls, launch: LaunchConfig, signals: StopRequest, heartbeat: Heartbeat, *, last_act: Callable[[int, str], None]
    ) -> Self:
        """Return the deadline that the section `launch` of a config sets."""
        return cls(
            signals,
            heartbeat,
            grace_s=launch.stop_grace_s,
            save_budget_s=launch.effective_save_budget_s,
            last_act=last_act,
        )

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="megamask-stop-deadline", daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._is_over.set()
        signal.set_wakeup_fd(self._previous)
        os.close(self._writer)

    def _watch(self) -> None:
        asked_at: float | None = None
        while not self._is_over.wait(_POLL_S):
            self._read_signals()
            if self._asked is None:
                continue
            asked_at = time.monotonic() if asked_at is None else asked_at
            waited = time.monotonic() - asked_at
            section = self._heartbeat.mark.section
            if waited > self._allowed(section):
                self._end(section, waited)

    def _allowed(self, section: str) -> float:
        if section in BEFORE_TRAINING:
            return min(STARTUP_GRACE_S, self._grace_s)
        return self._grace_s + (self._save_budget_s if section == "save" else 0.0)

    def _read_signals(self) -> None:
        if self._asked is None:
            self._asked = self._signals.strongest
        with contextlib.suppress(OSError):
            for number in os.read(self._reader, 64):
                if number not in STOP_SIGNALS:
                    continue
                if number == signal.SIGINT:
                    self._num_interrupts += 1
                if self._asked != signal.SIGINT:
                    self._asked = signal.Signals(number)
        if self._num_interrupts > 1:
            os._exit(int(ExitCode.INTERRUPTED_TWICE))

    def _end(self, section: str, waited: float) -> None:
        code, reason = ended_without_answer(self._asked or signal.SIGTERM, section, waited)
        with contextlib.suppress(Exception):
            self._last_act(code, reason)
        os._exit(code)


def ended_without_answer(asked: signal.Signals, section: str, waited: float) -> tuple[int, str]:
    """Exit code and sentence of a process that had to be ended in a section, `waited` seconds after a signal.

    Before training the request itself is the reason: nothing was lost. Later it is a hang: what was not saved is lost.
    """
    if section in BEFORE_TRAINING:
        code = ExitCode.DO_NOT_REQUEUE if asked == signal.SIGINT else ExitCode.PREEMPTED
        return int(code), f"{asked.name} asked for an end before training began ({section}); nothing was lost"
    return int(ExitCode.HANG), (
        f"{asked.name} asked for an end, and {waited:.0f} s later this rank was still in its section {section!r}: "
        "it waits for another rank or for the storage. Nothing was saved; checkpoints committed before are intact"
    )
