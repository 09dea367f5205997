"""The training loop, on one screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from megamask.config.schema.roots import TrainConfig
from megamask.data.loader import Batch, Loader
from megamask.objectives.shapes import ObjectiveShape
from megamask.resilience.heartbeat import Heartbeat
from megamask.storage.fault_points import reached
from megamask.training.batch_size import batch_size_at
from megamask.training.guarding import StepGuard
from megamask.training.metrics import PhaseClock, StepRecord, peak_memory_bytes, step_record
from megamask.training.progress import Progress
from megamask.training.schedules import learning_rate
from megamask.training.stopping import StopFlag, StopReason

if TYPE_CHECKING:
    from megamask.engine.engine import Engine


class Hook(Protocol):
    """Something that watches training on every rank; it can never change the loss.

    `section` is where a rank is while the hook works (megamask.resilience.heartbeat.SECTIONS).
    """

    section: str

    def on_start(self, progress: Progress) -> None:
        """Called once, before the first step of an attempt."""

    def after_step(self, progress: Progress, record: StepRecord) -> None:
        """Called after each completed step."""

    def on_stop(self, progress: Progress, reason: StopReason) -> None:
        """Called once, after the last step of an attempt that ends as agreed."""


@dataclass(kw_only=True)
class TrainingRun:
    """Parts of the loop. Hooks run in order: the journal first, checkpoints last.

    Args:
        guard: decides about steps whose numbers are at fault.
        shape_at: of the objective at a step, from 1.
        peak_seconds_per_token: of a shape, as `step_record` takes it.
    """

    config: TrainConfig
    engine: Engine
    loader: Loader
    progress: Progress
    stop: StopFlag
    hooks: Sequence[Hook]
    guard: StepGuard
    shape_at: Callable[[int], ObjectiveShape]
    peak_seconds_per_token: Callable[[ObjectiveShape], float | None]
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    def next_batch(self) -> Batch:
        """This rank's share of the next global batch, arithmetic on consumed_samples; those after it are read ahead."""
        training, first = self.config.training, self.progress.consumed_samples
        size = batch_size_at(first, training)
        batch = self.loader.batch(first, size, self.engine.members(size))
        for _ in range(self.config.data.read_ahead_batches):
            first += size
            size = batch_size_at(first, training)
            self.loader.prefetch(first, size, self.engine.members(size))
        return batch


def train(run: TrainingRun) -> StopReason:
    """Train until the last step or until all ranks agree on another reason to stop. Return that reason.

    Raises:
        RefusedStepError: a step is at fault, on every rank alike; the network was not updated. A RewindError asks for
            another attempt.
    """
    training, progress, clock = run.config.training, run.progress, PhaseClock()
    for hook in run.hooks:
        run.heartbeat.enter(hook.section)
        hook.on_start(progress)
    while (reason := run.stop.agreed(progress.step)) is StopReason.NONE:
        step = progress.step + 1
        run.heartbeat.enter("step", step)
        size = batch_size_at(progress.consumed_samples, training)
        rate = learning_rate(step, run.config.optimizer, training)
        clock.lap("other")
        batch = run.next_batch()
        reached("step.batch_read")
        clock.lap("data")
        report = run.engine.step(batch, step=step, learning_rate=rate, accepts=run.guard.accepts(step))
        clock.lap_step(report)
        if not report.is_updated:
            run.guard.refused(step, report, run.loader.skipped.segments(progress.consumed_samples, size))
        run.guard.note(step, report)
        shape = run.shape_at(step)
        progress.enter(shape.num_views)
        loss = report.loss if report.is_updated else None
        progress.advance(global_batch_size=size, num_eligible=report.num_eligible, loss=loss)
        record = step_record(
            progress,
            report,
            global_batch_size=size,
            learning_rate=rate,
            clock=clock,
            shape=shape,
            peak_seconds_per_token=run.peak_seconds_per_token(shape),
            peak_memory_bytes=run.engine.max_over_ranks(peak_memory_bytes()),
            skipped=run.loader.skipped,
        )
        if len(run.loader.sources) > 1:
            record.fields["consumed_by_source"] = run.loader.consumed(progress.consumed_samples)
        for hook in run.hooks:
            run.heartbeat.enter(hook.section)
            hook.after_step(progress, record)
        run.heartbeat.enter("agreement")
    for hook in run.hooks:
        run.heartbeat.enter(hook.section)
        hook.on_stop(progress, reason)
    return reason
