"""Work that a rank does beside training: one thread, one answer, no collective call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Generic, TypeVar

from megamask.checkpoint.agreement import CheckpointEngine, agree
from megamask.resilience import daemon_threads

Result = TypeVar("Result")
Gate = Callable[[], None]

# A write that hangs is left behind so long after it was called off; its thread ends with the process. Well below the
# time that launchers leave a rank whose peer has failed (30 s here and in torchrun).
_STOP_S = 5.0


class WorkStopped(Exception):
    """The work was called off between two of its parts; nobody is told."""


class WorkState(IntEnum):
    """Of one rank's work; the largest over all ranks is that of the whole."""

    DONE = 0
    RUNNING = 1
    FAILED = 2


class Work(Generic[Result]):
    """An action that runs in a thread of its own, or at once.

    The thread dies with its process, however that ends, and never keeps it from ending.

    Args:
        action: gets a function to call between two of its parts, which raises WorkStopped once the work is called off.
        in_thread: false runs the action before the constructor returns.
    """

    def __init__(self, action: Callable[[Gate], Result], *, in_thread: bool) -> None:
        self._action = action
        self._is_stopped = threading.Event()
        self._deadline: float | None = None
        self._is_over = threading.Event()
        self._failure: BaseException | None = None
        self._results: list[Result] = []
        if in_thread:
            # a daemon: a write that hangs must not keep the process from ending
            thread = threading.Thread(target=self._run, name="megamask-checkpoint", daemon=True)
            daemon_threads.watch(thread)
            thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            self._results.append(self._action(self._gate))
        except Exception as error:  # noqa: BLE001  told by `failures`, on every rank
            self._failure = error
        finally:
            del self._action  # and with it whatever memory it held
            self._is_over.set()

    def _gate(self) -> None:
        if self._is_stopped.is_set():
            raise WorkStopped

    @property
    def state(self) -> WorkState:
        """How far this rank's work is."""
        if not self._is_over.is_set():
            return WorkState.RUNNING
        return WorkState.DONE if self._results else WorkState.FAILED

    @property
    def failures(self) -> list[BaseException]:
        """What this rank's work failed with, if it did by itself."""
        failure = self._failure
        return [] if failure is None or isinstance(failure, WorkStopped) else [failure]

    @property
    def result(self) -> Result:
        """The answer of work that is done."""
        return self._results[0]

    def wait(self) -> None:
        """Waits for the end, whichever it is."""
        self._is_over.wait()

    def cancel(self) -> None:
        """Asks the work to end at its next gate, and waits for nothing."""
        self._is_stopped.set()
        if self._deadline is None:
            self._deadline = time.monotonic() + _STOP_S

    def stop(self) -> bool:
        """Calls the work off and waits a few seconds, in all calls together; returns whether it has ended."""
        self.cancel()
        deadline = self._deadline or 0.0
        return self._is_over.wait(max(0.0, deadline - time.monotonic()))


def all_done(engine: CheckpointEngine, work: Work[Result], *, wait: bool) -> bool:
    """Collective: whether the work of every rank is done.

    Args:
        wait: for this rank's own work, before asking the others.

    Raises:
        MegamaskError: some rank's work failed; every rank raises, after it called its own off.
    """
    if wait:
        work.wait()
    state = engine.max_over_ranks(int(work.state))
    if state == WorkState.FAILED:
        work.stop()
        agree(engine, work.failures)
        raise RuntimeError("a rank's work ended without a result")
    return state == WorkState.DONE
