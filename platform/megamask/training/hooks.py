"""Observers of training: the journal, in-training evaluation, checkpoints, status. None can change the loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from megamask.config.schema.checkpoint import CheckpointConfig
from megamask.config.schema.evaluation import EvaluationConfig
from megamask.storage.fault_points import reached
from megamask.training.metrics import StepRecord
from megamask.training.progress import Progress
from megamask.training.stopping import StopReason


class Recorder(Protocol):
    """Destination of records: rank 0's journal; the other ranks' recorder drops them."""

    def append(self, kind: str, **fields: Any) -> None:
        """Append one record."""


class StepJournal:
    """Writes each step's line."""

    section = "step"

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_start(self, progress: Progress) -> None:
        """No work: a hook like this one acts after steps only."""

    def after_step(self, progress: Progress, record: StepRecord) -> None:
        """One `step` line."""
        self._recorder.append("step", **record.fields)

    def on_stop(self, progress: Progress, reason: StopReason) -> None:
        """Nothing: the attempt's last line is written when its checkpoint is committed."""


class PeriodicEvaluation:
    """Measures the likelihood bound every n steps, forward-only under the run's layout.

    A measurement that a signal cut short leaves no line; the attempt that resumes at that step makes it first.

    Args:
        measure: evaluates on every rank together and returns the journal's fields, or None if it was cut short.
        has_line: whether the journal has an `evaluation` line of a step, on every rank alike.
    """

    section = "evaluation"

    def __init__(
        self,
        recorder: Recorder,
        evaluation: EvaluationConfig,
        measure: Callable[[], Mapping[str, Any] | None] | None,
        has_line: Callable[[int], bool] = lambda step: True,
    ) -> None:
        self._recorder = recorder
        self._every = evaluation.every_steps if measure is not None else None
        self._measure = measure
        self._has_line = has_line
        self._latest: tuple[int, Mapping[str, Any]] | None = None

    def on_start(self, progress: Progress) -> None:
        """The `evaluation` line of the step that the attempt resumes at, if the attempt before left it out."""
        if progress.step and self._is_due(progress.step) and not self._has_line(progress.step):
            self._evaluate(progress.step)

    def after_step(self, progress: Progress, record: StepRecord) -> None:
        """An `evaluation` line when it is due."""
        if self._is_due(progress.step):
            self._evaluate(progress.step)

    def _is_due(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def _evaluate(self, step: int) -> None:
        fields = None if self._measure is None else self._measure()
        reached("evaluation.measured")
        if fields is not None:
            self._recorder.append("evaluation", step=step, **fields)
            self._latest = step, fields

    def on_stop(self, progress: Progress, reason: StopReason) -> None:
        """Nothing: evaluation is due by step only, so that a restart changes no record."""

    def bound_at(self, step: int) -> dict[str, float] | None:
        """The bound and its standard error, nats per token, if they were measured at this very step.

        Where the kind of bound changes during the run, `bound_from_step` too.
        """
        if self._latest is None or self._latest[0] != step:
            return None
        names = ("nelbo_nats_per_token", "standard_error", "bound_from_step")
        return {name: float(self._latest[1][name]) for name in names if name in self._latest[1]}


class Committer(Protocol):
    """Saver of checkpoints: one at a time, on every rank together."""

    def begin(self, progress: Progress, evaluation: Mapping[str, float] | None) -> None:
        """Start a save, after the end of the one before."""

    def poll(self) -> None:
        """Announce a save that has become visible; raise its failure."""

    def finish(self) -> None:
        """Wait for what is on its way."""

    def commit(self, progress: Progress, evaluation: Mapping[str, float] | None) -> None:
        """Save and return when the checkpoint is visible."""

    def abort(self, *, together: bool) -> None:
        """Give up what is on its way."""


class PeriodicCheckpoint:
    """Saves a checkpoint every n steps and commits one at the end of an attempt.

    Args:
        bound_at: the bound measured at a step, if it was; asked at the step itself.
        committed_step: the step of the newest commit when the attempt begins.
    """

    section = "save"

    def __init__(
        self,
        checkpoint: CheckpointConfig,
        committer: Committer,
        *,
        bound_at: Callable[[int], Mapping[str, float] | None],
        committed_step: int,
    ) -> None:
        self._every = checkpoint.every_steps
        self._committer = committer
        self._bound_at = bound_at
        self._saved_step = committed_step

    def on_start(self, progress: Progress) -> None:
        """No work: a hook like this one acts after steps only."""

    def after_step(self, progress: Progress, record: StepRecord) -> None:
        """Poll the pending save, and start one when it is due."""
        self._committer.poll()
        if self._every is not None and progress.step % self._every == 0:
            self._committer.begin(progress, self._bound_at(progress.step))
            self._saved_step = progress.step

    def on_stop(self, progress: Progress, reason: StopReason) -> None:
        """Finish the pending save and commit the last step, unless a newer attempt owns the run."""
        if reason is StopReason.SUPERSEDED:
            self._committer.abort(together=True)
            return
        self._committer.finish()
        if progress.step > self._saved_step:
            self._committer.commit(progress, self._bound_at(progress.step))


class StatusFile:
    """Keeps status.json at the last completed step, at most once in a while.

    Args:
        write: replaces status.json with phase running and this step.
        every_s: shortest time between two writes.
    """

    section = "step"

    def __init__(
        self, write: Callable[[int], None], *, clock: Callable[[], float] = time.monotonic, every_s: float = 5.0
    ) -> None:
        self._write = write
        self._clock = clock
        self._every_s = every_s
        self._last: float | None = None

    def on_start(self, progress: Progress) -> None:
        """No work: a hook like this one acts after steps only."""

    def after_step(self, progress: Progress, record: StepRecord) -> None:
        """Write if the last write is long enough ago."""
        now = self._clock()
        if self._last is None or now - self._last >= self._every_s:
            self._write(progress.step)
            self._last = now

    def on_stop(self, progress: Progress, reason: StopReason) -> None:
        """Nothing: the final status is written when the attempt closes."""
