"""Progress of a run: the mutable state of training besides the network and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Progress:
    """Counts of what has been done; the noise law makes generator states unnecessary.

    Args:
        step: completed optimizer steps, so the next one is step + 1.
        consumed_samples: samples used so far; also the first sample index of the next batch.
        consumed_tokens: clean eligible tokens used so far, each sample counted once.
        num_views: corrupted copies of each sample in the present step.
        other_views: tokens of all steps so far, times what their views had more than num_views, or less.
        loss: of the last update that this attempt made, nats per token; None before its first.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    num_views: int
    other_views: int = 0
    loss: float | None = None

    @property
    def processed_tokens(self) -> int:
        """Eligible tokens used so far, counting every view."""
        return self.consumed_tokens * self.num_views + self.other_views

    def enter(self, num_views: int) -> None:
        """The views of the steps from now on; what was processed before stays counted as it was."""
        self.other_views += self.consumed_tokens * (self.num_views - num_views)
        self.num_views = num_views

    def advance(self, *, global_batch_size: int, num_eligible: int, loss: float | None) -> None:
        """Count one completed step.

        Args:
            loss: None where the step's update was skipped.
        """
        self.step += 1
        self.consumed_samples += global_batch_size
        self.consumed_tokens += num_eligible
        self.loss = self.loss if loss is None else loss
