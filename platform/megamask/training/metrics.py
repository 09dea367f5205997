"""Record of one step: the fields of a journal's step line, the same on every rank."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megamask.data.content import batch_digest, content_digest
from megamask.data.skipped import SKIPS_NOTHING, SkippedSamples
from megamask.objectives.shapes import ObjectiveShape
from megamask.training.progress import Progress

if TYPE_CHECKING:
    from megamask.engine.step import StepReport

PHASES = ("data", "forward_backward", "optimizer", "other")


class PhaseClock:
    """Monotonic seconds by phase; what is between two laps belongs to the later one's name."""

    def __init__(self) -> None:
        self._mark = time.monotonic()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
        now = time.monotonic()
        self.seconds[phase] += now - self._mark
        self._mark = now

    def lap_step(self, report: StepReport) -> None:
        """Split the time since the last lap as the engine measured it; the rest of it is `other`."""
        now = time.monotonic()
        elapsed, self._mark = now - self._mark, now
        self.seconds["forward_backward"] += report.forward_backward_s
        self.seconds["optimizer"] += report.optimizer_s
        self.seconds["other"] += max(0.0, elapsed - report.forward_backward_s - report.optimizer_s)

    def take(self) -> dict[str, float]:
        """The seconds by phase since the last call, in PHASES order."""
        taken, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return {phase: round(seconds, 6) for phase, seconds in taken.items()}


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held: of its GPU by torch's allocator, on a CPU resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One completed step: the journal's fields and the raw report."""

    report: StepReport
    fields: dict[str, Any] = field(repr=False)


def step_record(
    progress: Progress,
    report: StepReport,
    *,
    global_batch_size: int,
    learning_rate: float,
    clock: PhaseClock,
    shape: ObjectiveShape,
    peak_seconds_per_token: float | None = None,
    peak_memory_bytes: int | None = None,
    skipped: SkippedSamples = SKIPS_NOTHING,
) -> StepRecord:
    """The record of the step that progress has just counted.

    Args:
        global_batch_size: samples of this step.
        shape: of the objective.
        peak_seconds_per_token: what one processed position would take if all ranks' devices ran at their named peak,
            bidirectional attention counted in full; None where the peak is not known, and mfu is null.
        peak_memory_bytes: of the rank that needed most so far.
        skipped: sample indices that the run leaves out.
    """
    seconds = clock.take()
    total = sum(seconds.values())
    processed = global_batch_size * shape.num_views * shape.input_length
    mfu = None
    if peak_seconds_per_token is not None and total > 0:
        mfu = processed * peak_seconds_per_token / total
    fields = {
        "step": progress.step,
        "loss": report.loss,
        "loss_terms": dict(report.loss_terms),
        "nelbo_nats_per_token": report.nelbo_nats_per_token,
        "loss_by_noise_level": report.loss_by_noise_level,
        "grad_norm": report.grad_norm,
        "learning_rate": learning_rate,
        "global_batch_size": global_batch_size,
        "consumed_samples": progress.consumed_samples,
        "consumed_tokens": progress.consumed_tokens,
        "processed_tokens": progress.processed_tokens,
        "masked_tokens": report.masked_tokens,
        "masked_tokens_by_noise_level": report.masked_tokens_by_noise_level,
        "batch_digest": batch_digest(progress.consumed_samples - global_batch_size, global_batch_size, skipped),
        "content_digest": content_digest(report.content_sum),
        "seconds": seconds,
        "tokens_per_second": report.num_eligible / total if total > 0 else None,
        "mfu": mfu,
        "peak_memory_bytes": peak_memory_bytes,
    }
    if shape.corrupts == "none":  # elsewhere masked_tokens_by_noise_level counts what is scored
        fields["scored_tokens"] = report.scored_tokens
    if not report.is_updated:
        fields["is_skipped"] = True
    if report.expert_counts is not None:
        fields |= router_statistics(report.expert_counts)
    return StepRecord(report=report, fields=fields)


def router_statistics(counts: list[list[int]]) -> dict[str, list[float | int | None]]:
    """The spread of a step's tokens over the experts of each layer: null for a layer without experts.

    Args:
        counts: tokens by layer and expert.
    """
    fullest = [max(layer) * len(layer) / sum(layer) if sum(layer) else None for layer in counts]
    idle = [layer.count(0) if sum(layer) else None for layer in counts]
    return {"router_max_load": list(fullest), "router_idle_experts": list(idle)}
