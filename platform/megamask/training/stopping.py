"""Reasons to stop, agreed by all ranks at the same step."""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

from megamask.errors import ExitCode
from megamask.runs.status import Phase


class StopReason(IntEnum):
    """Reason of an attempt's end; a larger one wins when ranks see different reasons at the same step."""

    NONE = 0
    STOP_AFTER_STEP = 1
    FINISHED = 2
    PREEMPTED = 3
    OPERATOR = 4
    SUPERSEDED = 5

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of an attempt that stops for this reason."""
        return {
            StopReason.PREEMPTED: ExitCode.PREEMPTED,
            StopReason.OPERATOR: ExitCode.DO_NOT_REQUEUE,
            StopReason.SUPERSEDED: ExitCode.DO_NOT_REQUEUE,
        }.get(self, ExitCode.DONE)

    @property
    def phase(self) -> Phase:
        """The phase that status.json shows after such an end."""
        if self is StopReason.FINISHED:
            return "done"
        return "preempted" if self is StopReason.PREEMPTED else "stopped"

    @property
    def description(self) -> str:
        """The reason in words, for status.json and the journal."""
        return {
            StopReason.FINISHED: "all steps are done",
            StopReason.STOP_AFTER_STEP: "training.stop_after_step is reached",
            StopReason.PREEMPTED: "a termination signal asked to save and leave",
            StopReason.OPERATOR: "an operator interrupted the run; it was saved",
            StopReason.SUPERSEDED: "a newer attempt has claimed the run",
        }[self]


class CutShort(Exception):
    """A measurement ends before its result, because the attempt was asked to end."""


class Collective(Protocol):
    """The engine as the agreement uses it."""

    def max_over_ranks(self, value: int) -> int:
        """The largest value over all ranks."""


class SignalSource(Protocol):
    """A rank's view of the signals it got."""

    @property
    def requested(self) -> int:
        """The exit code that signals ask for; 0 when none came."""


class SupersededCheck(Protocol):
    """Return whether a newer attempt has claimed the run."""

    def __call__(self) -> bool:
        """True when this attempt must stop without writing."""


class StopFlag:
    """Collects local wishes to stop and turns them into one answer on every rank.

    Args:
        signals: gives the exit code that signals ask for on this rank (0: none).
        is_superseded: whether a newer attempt has claimed the run; asked on rank 0 only.
        num_steps: training.steps. stop_after_step: training.stop_after_step.
    """

    def __init__(
        self,
        collective: Collective,
        *,
        signals: SignalSource,
        is_superseded: SupersededCheck,
        num_steps: int,
        stop_after_step: int | None,
    ) -> None:
        self._collective = collective
        self._signals = signals
        self._is_superseded = is_superseded
        self._num_steps = num_steps
        self._stop_after_step = stop_after_step
        self._is_cut_short = False

    def check(self) -> None:
        """Let every rank leave what it is doing between two passes of a measurement; collective.

        Raises:
            CutShort: on every rank, if a signal or a newer attempt asks any of them for an end. The attempt then ends
                as it was asked to, also at the last step.
        """
        is_asked = self._signals.requested != 0 or self._is_superseded()
        if self._collective.max_over_ranks(int(is_asked)):
            self._is_cut_short = True
            raise CutShort

    def agreed(self, step: int) -> StopReason:
        """The reason to stop after this step, the same on every rank; NONE to go on."""
        return StopReason(self._collective.max_over_ranks(int(self._local(step))))

    def _local(self, step: int) -> StopReason:
        if self._is_superseded():
            return StopReason.SUPERSEDED
        if step >= self._num_steps and not self._is_cut_short:
            return StopReason.FINISHED
        asked = self._signals.requested
        if asked == ExitCode.DO_NOT_REQUEUE:
            return StopReason.OPERATOR
        if asked:
            return StopReason.PREEMPTED
        if self._stop_after_step is not None and step >= self._stop_after_step:
            return StopReason.STOP_AFTER_STEP
        return StopReason.NONE
