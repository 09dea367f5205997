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

# A write that hangs is abandoned this long after it was cancelled; its thread ends with the process. Well below the
# time that launchers leave a rank whose peer has failed (30 s here and in torchrun).
_STOP_S = 5.0


class WorkStopped(Exception):
    """The work was cancelled between two of its parts; this is not reported as a failure."""


class WorkState(IntEnum):
    """State of one rank's work; the largest over all ranks is the state of the job."""

    DONE = 0
    RUNNING = 1
    FAILED = 2


class Work(Generic[Result]):
    """An action that runs in a thread of its own, or at once.

    The thread dies with its process, however that ends, and never keeps it from ending.

    Args:
        action: gets a function to call between two of its parts, which raises WorkStopped once the work is cancelled.
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
        except Exception as error:  # noqa: BLE001  `failures` raises it on every rank
            self._failure = error
        finally:
            del self._action  # frees the memory that it holds
            self._is_over.set()

    def _gate(self) -> None:
        if self._is_stopped.is_set():
            raise WorkStopped

    @property
    def state(self) -> WorkState:
        """State of this rank's work."""
        if not self._is_over.is_set():
            return WorkState.RUNNING
        return WorkState.DONE if self._results else WorkState.FAILED

    @property
    def failures(self) -> list[BaseException]:
        """The error of this rank's work, if it failed without being cancelled."""
        failure = self._failure
        return [] if failure is None or isinstance(failure, WorkStopped) else [failure]

    @property
    def result(self) -> Result:
        """The answer of work that is done."""
        return self._results[0]

    def wait(self) -> None:
        """Wait for the end of the work, successful or not."""
        self._is_over.wait()

    def cancel(self) -> None:
        """Ask the work to end at its next gate, without waiting for it."""
        self._is_stopped.set()
        if self._deadline is None:
            self._deadline = time.monotonic() + _STOP_S

    def stop(self) -> bool:
        """Cancel the work and wait a few seconds, over all calls together. Return whether it has ended."""
        self.cancel()
        deadline = self._deadline or 0.0
        return self._is_over.wait(max(0.0, deadline - time.monotonic()))


def all_done(engine: CheckpointEngine, work: Work[Result], *, wait: bool) -> bool:
    """Return whether the work of every rank is done; collective.

    Args:
        wait: for this rank's own work, before asking the others.

    Raises:
        MegamaskError: some rank's work failed; every rank raises, after it cancelled its own.
    """
    if wait:
        work.wait()
    state = engine.max_over_ranks(int(work.state))
    if state == WorkState.FAILED:
        work.stop()
        agree(engine, work.failures)
        raise RuntimeError("a rank's work ended without a result")
    return state == WorkState.DONE
