"""What watches training: the journal, in-training evaluation, checkpoints, status. None can change the loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from megamask.config.schema.checkpoint import CheckpointConfig
from megamask.config.schema.evaluation import EvaluationConfig
from megamask.training.metrics import StepRecord
from megamask.training.progress import Progress
from megamask.training.stopping import StopReason


class Recorder(Protocol):
    """Where records go: rank 0's journal; the other ranks' recorder drops them."""

    def append(self, kind: str, **fields: Any) -> None:
        """Appends one record."""


class StepJournal:
    """Writes each step's line."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def after_step(self, progress: Progress, record: StepRecord) -> None:
        """One `step` line."""
        self._recorder.append("step", **record.fields)

    def on_stop(self, progress: Progress, reason: StopReason) -> None:
        """Nothing: the attempt's last line is written when its checkpoint is committed."""


class PeriodicEvaluation:
    """Measures the likelihood bound every n steps, forward-only under the run's layout.

    Args:
        measure: evaluates on every rank together and returns the journal's fields.
    """

    def __init__(
        self, recorder: Recorder, evaluation: EvaluationConfig, measure: Callable[[], Mapping[str, Any]] | None
    ) -> None:
        self._recorder = recorder
        self._every = evaluation.every_steps if measure is not None else None
        self._measure = measure

    def after_step(self, progress: Progress, record: StepRecord) -> None:
        """An `evaluation` line when it is due."""
        if self._measure is not None and self._every is not None and progress.step % self._every == 0:
            self._recorder.append("evaluation", step=progress.step, **self._measure())

    def on_stop(self, progress: Progress, reason: StopReason) -> None:
        """Nothing: evaluation is due by step only, so that a restart changes no record."""


class PeriodicCheckpoint:
    """Commits a checkpoint every n steps and at the end of an attempt.

    Args:
        commit: saves and publishes on every rank together.
        committed_step: the step of the newest commit when the attempt begins.
    """

    def __init__(self, checkpoint: CheckpointConfig, commit: Callable[[Progress], None], committed_step: int) -> None:
        self._every = checkpoint.every_steps
        self._commit = commit
        self._committed_step = committed_step

    def after_step(self, progress: Progress, record: StepRecord) -> None:
        """Commits when it is due."""
        if self._every is not None and progress.step % self._every == 0:
            self._save(progress)

    def on_stop(self, progress: Progress, reason: StopReason) -> None:
        """The last step of an attempt always commits, unless a newer attempt owns the run."""
        if reason is not StopReason.SUPERSEDED and progress.step > self._committed_step:
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        self._commit(progress)
        self._committed_step = progress.step


class StatusFile:
    """Keeps status.json at the last completed step, at most once in a while.

    Args:
        write: replaces status.json with phase running and this step.
        every_s: shortest time between two writes.
    """

    def __init__(
        self, write: Callable[[int], None], *, clock: Callable[[], float] = time.monotonic, every_s: float = 5.0
    ) -> None:
        self._write = write
        self._clock = clock
        self._every_s = every_s
        self._last: float | None = None

    def after_step(self, progress: Progress, record: StepRecord) -> None:
        """Writes if the last write is long enough ago."""
        now = self._clock()
        if self._last is None or now - self._last >= self._every_s:
            self._write(progress.step)
            self._last = now

    def on_stop(self, progress: Progress, reason: StopReason) -> None:
        """Nothing: the final status is written when the attempt closes."""
