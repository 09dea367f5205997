"""The numerics guard: which step is at fault, what follows, and the words and incidents for it.

A rule looks at a step's global loss and gradient norm, which are the same on every rank, and at those of the steps
before it, which the journal holds. So all ranks decide alike, and so does a later attempt that takes the step again.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megamask.config.schema.resilience import ResilienceConfig
from megamask.errors import NumericsError

NOT_FINITE, LOSS, GRAD_NORM = "not_finite", "loss", "grad_norm"
SKIPPED, REWIND, SPIKE = "update_skipped", "rewind", "spike"
_NAMED_SAMPLES = 16


class RefusedStepError(NumericsError):
    """A step at fault that ends the attempt with 66.

    Args:
        incident: the fields of the journal's incident, which the end of the attempt records.
    """

    def __init__(self, message: str, *, hint: str, incident: dict[str, Any]) -> None:
        super().__init__(message, hint=hint)
        self.incident = incident


class RewindError(RefusedStepError):
    """A step at fault after which the run goes on from an earlier step, in a new attempt of this process."""


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """Facts of a step that the rules use; `is_taken` is false where its update was skipped."""

    step: int
    loss: float
    grad_norm: float
    is_taken: bool = True


@dataclass(frozen=True, kw_only=True)
class BrokenRule:
    """The rule that a step breaks.

    Args:
        name: not_finite, loss or grad_norm.
        policy: of resilience.nonfinite or resilience.spike.
        median: of the steps before; None for not_finite.
        factor: how often it the step may be; None for not_finite.
    """

    name: str
    policy: str
    median: float | None = None
    factor: float | None = None


class NumericsGuard:
    """The rules of one attempt.

    Args:
        settings: of the attempt.
        before: the steps before its first one, as far back as `num_steps_needed`.
    """

    def __init__(self, settings: ResilienceConfig, before: Iterable[StepNumbers] = ()) -> None:
        self.settings = settings
        self._before = deque(before, maxlen=num_steps_needed(settings))

    def note(self, numbers: StepNumbers) -> None:
        """Remember a step that is over."""
        self._before.append(numbers)

    @property
    def num_skipped_in_a_row(self) -> int:
        """Updates that were skipped right before the next step."""
        count = 0
        for numbers in reversed(self._before):
            if numbers.is_taken:
                break
            count += 1
        return count

    def broken_rule(self, step: int, loss: float, grad_norm: float) -> BrokenRule | None:
        """The rule that the next step breaks, or None where its update is to be made."""
        settings = self.settings
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return BrokenRule(name=NOT_FINITE, policy=settings.nonfinite)
        if settings.spike == "ignore" or step <= settings.spike_window:
            return None
        window = [each for each in self._before if each.is_taken and each.step >= step - settings.spike_window]
        if not window:
            return None
        for name, value, factor in (
            (LOSS, loss, settings.spike_loss),
            (GRAD_NORM, grad_norm, settings.spike_grad_norm),
        ):
            median = statistics.median(getattr(each, name) for each in window)
            if factor is not None and value > factor * median:
                return BrokenRule(name=name, policy=settings.spike, median=median, factor=factor)
        return None


def num_steps_needed(settings: ResilienceConfig) -> int:
    """Return how many steps before the first one the rules look at; 0 where none does."""
    window = settings.spike_window if settings.spike != "ignore" else 0
    skips = settings.max_skips_in_a_row if "skip" in (settings.nonfinite, settings.spike) else 0
    return max(window, skips)


def incident_fields(
    *,
    step: int,
    loss: float,
    grad_norm: float,
    sample_indices: Sequence[int],
    rule: BrokenRule | None = None,
    incident: str = NOT_FINITE,
) -> dict[str, Any]:
    """The fields of the journal's incident: the update that was not made and every sample index of its batch."""
    return {
        "incident": incident,
        "problem": describe(step=step, loss=loss, grad_norm=grad_norm, sample_indices=sample_indices, rule=rule),
        "step": step,
        "loss": loss,
        "grad_norm": grad_norm,
        "sample_indices": [int(index) for index in sample_indices],
    }


def describe(
    *, step: int, loss: float, grad_norm: float, sample_indices: Sequence[int], rule: BrokenRule | None = None
) -> str:
    """One sentence: what is at fault, at which step, on which samples."""
    suspects = {"loss": loss, "gradient norm": grad_norm}
    culprits = " and ".join(f"{name} is {value}" for name, value in suspects.items() if not math.isfinite(value))
    if rule is not None and rule.median is not None and rule.factor is not None:
        name, value = ("loss", loss) if rule.name == LOSS else ("gradient norm", grad_norm)
        culprits = f"{name} is {value:.6g}, above {rule.factor:g} times {rule.median:.6g}, the median before it"
    return f"step {step}: the {culprits or 'step is not finite'}; samples {shown_ranges(sample_indices)}"


def numerics_error(
    *,
    step: int,
    loss: float,
    grad_norm: float,
    sample_indices: Sequence[int],
    rule: BrokenRule | None = None,
    because: str = "",
) -> RefusedStepError:
    """The error that ends the attempt with 66; its `incident` is journalled and nothing is saved.

    Args:
        step: 1-based number of the update that was not made.
        loss, grad_norm: as reported.
        sample_indices: global sample indices of the batch.
        rule: that the step breaks; None for not_finite.
        because: why the policy of the rule is not carried out, a sentence that ends with a space.
    """
    name = NOT_FINITE if rule is None or rule.name == NOT_FINITE else SPIKE
    incident = incident_fields(
        step=step, loss=loss, grad_norm=grad_norm, sample_indices=sample_indices, rule=rule, incident=name
    )
    policy = "resilience.nonfinite" if name == NOT_FINITE else "resilience.spike"
    return RefusedStepError(
        f"{incident['problem']}. {because}The update was not made and nothing was saved.",
        hint=f"`megamask inspect RUN --step {step}` shows the batch; a lower optimizer.learning_rate often helps; "
        f"{policy} can skip such a step or go back",
        incident=incident,
    )


def shown_ranges(indices: Sequence[int]) -> str:
    """Consecutive indices as first-last, at most a few ranges."""
    ranges: list[list[int]] = []
    for index in sorted(set(indices)):
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    named = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:_NAMED_SAMPLES]]
    return ", ".join(named) + (", ..." if len(ranges) > _NAMED_SAMPLES else "")
