"""Error and incident of a loss or gradient that is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megamask.errors import NumericsError

INCIDENT = "not_finite"
_NAMED_SAMPLES = 16


class NotFiniteError(NumericsError):
    """A step whose loss or gradient norm is not finite.

    Args:
        incident: the fields of the journal's incident, which the end of the attempt records.
    """

    def __init__(self, message: str, *, hint: str, incident: dict[str, Any]) -> None:
        super().__init__(message, hint=hint)
        self.incident = incident


def incident_fields(*, step: int, loss: float, grad_norm: float, sample_indices: Sequence[int]) -> dict[str, Any]:
    """The fields of the journal's incident: the step that was not taken and every sample index of its batch."""
    return {
        "incident": INCIDENT,
        "problem": describe(step=step, loss=loss, grad_norm=grad_norm, sample_indices=sample_indices),
        "step": step,
        "loss": loss,
        "grad_norm": grad_norm,
        "sample_indices": [int(index) for index in sample_indices],
    }


def describe(*, step: int, loss: float, grad_norm: float, sample_indices: Sequence[int]) -> str:
    """One sentence: what is not finite, at which step, on which samples."""
    suspects = {"loss": loss, "gradient norm": grad_norm}
    culprits = " and ".join(f"{name} is {value}" for name, value in suspects.items() if not math.isfinite(value))
    return f"step {step}: the {culprits or 'step is not finite'}; samples {_ranges(sample_indices)}"


def numerics_error(*, step: int, loss: float, grad_norm: float, sample_indices: Sequence[int]) -> NotFiniteError:
    """The error that ends the attempt with 66; its `incident` is journalled and nothing is saved.

    Args:
        step: 1-based number of the update that was not made.
        loss, grad_norm: as reported; at least one is not finite.
        sample_indices: global sample indices of the batch.
    """
    incident = incident_fields(step=step, loss=loss, grad_norm=grad_norm, sample_indices=sample_indices)
    return NotFiniteError(
        f"{incident['problem']}. The update was not made and nothing was saved.",
        hint=f"`megamask inspect RUN --step {step}` shows the batch; a lower optimizer.learning_rate often helps",
        incident=incident,
    )


def _ranges(indices: Sequence[int]) -> str:
    """Consecutive indices as first-last, at most a few ranges."""
    ranges: list[list[int]] = []
    for index in sorted(set(indices)):
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    named = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:_NAMED_SAMPLES]]
    return ", ".join(named) + (", ..." if len(ranges) > _NAMED_SAMPLES else "")
