"""The numerics guard beside the loop: a step at fault stops the attempt, skips its update, or rewinds the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megamask.config.schema.resilience import ResilienceConfig
from megamask.resilience.numerics import (
    REWIND,
    SKIPPED,
    BrokenRule,
    NumericsGuard,
    RewindError,
    StepNumbers,
    incident_fields,
    num_steps_needed,
    numerics_error,
    shown_ranges,
)
from megamask.runs.skips import Rewind
from megamask.tracking.journal.seek import find_step
from megamask.tracking.records import Step, read_record

if TYPE_CHECKING:
    from megamask.engine.step import StepReport
    from megamask.training.hooks import Recorder

Refusal = str
"""Why a rewind is not possible: a sentence that ends with a space."""


@dataclass(kw_only=True)
class StepGuard:
    """Judge of the steps of a loop; all ranks decide alike.

    Args:
        rules: of the attempt.
        recorder: gets the incident of a skipped update.
        rewind: makes a rewind hold: writes it into skips.json; or returns why it cannot. Collective.
    """

    rules: NumericsGuard
    recorder: Recorder
    rewind: Callable[[int, str], Rewind | Refusal]

    def accepts(self, step: int) -> Callable[[float, float], bool]:
        """Return whether a loss and a gradient norm of a step let its update be made."""
        return lambda loss, grad_norm: self.rules.broken_rule(step, loss, grad_norm) is None

    def refused(self, step: int, report: StepReport, samples: list[range]) -> None:
        """Act on a step whose update was not made. When this returns, the update is skipped and training goes on.

        Args:
            samples: sample indices of its batch.

        Raises:
            RewindError: the run goes on from an earlier step.
            RefusedStepError: the attempt ends with 66.
        """
        rule = self.rules.broken_rule(step, report.loss, report.grad_norm)
        numbers: dict[str, Any] = {"step": step, "loss": report.loss, "grad_norm": report.grad_norm, "rule": rule}
        numbers["sample_indices"] = [index for each in samples for index in each]
        policy = "stop" if rule is None else rule.policy  # no rule here: another rank found its own numbers at fault
        if policy == "skip":
            if self.rules.num_skipped_in_a_row < self.rules.settings.max_skips_in_a_row:
                self.recorder.append("incident", **incident_fields(incident=SKIPPED, **numbers))
                return
            limit = f"resilience.max_skips_in_a_row = {self.rules.settings.max_skips_in_a_row} updates were skipped. "
            raise numerics_error(because=limit, **numbers)
        if policy == "rewind" and rule is not None:
            self._rewind(step, rule, numbers)
        raise numerics_error(**numbers)

    def note(self, step: int, report: StepReport) -> None:
        """Remember a step that is over."""
        numbers = StepNumbers(step=step, loss=report.loss, grad_norm=report.grad_norm, is_taken=report.is_updated)
        self.rules.note(numbers)

    def _rewind(self, step: int, rule: BrokenRule, numbers: dict[str, Any]) -> NoReturn:
        rewind = self.rewind(step, rule.name)
        if isinstance(rewind, str):
            raise numerics_error(because=rewind, **numbers)
        fields = incident_fields(incident=REWIND, **numbers)
        fields |= {name: getattr(rewind, name) for name in ("back_to_step", "first_sample", "end_sample")}
        fields["rule"] = rule.name
        left_out = shown_ranges(rewind.samples)
        raise RewindError(
            f"{fields['problem']}. The run goes back to step {rewind.back_to_step} and leaves out samples {left_out}",
            hint="the next attempt, in the same processes, goes on from the newest checkpoint before them",
            incident=fields,
        )


def steps_before(run_dir: Path, step: int, settings: ResilienceConfig) -> list[StepNumbers]:
    """Return what the rules must know of the steps up to one, from the journal; a lost line is left out."""
    found = []
    for number in range(max(1, step + 1 - num_steps_needed(settings)), step + 1):
        line = find_step(run_dir, number)
        record = None if line is None else read_record(line)
        if isinstance(record, Step) and record.loss is not None and record.grad_norm is not None:
            is_taken = not record.is_skipped
            found.append(StepNumbers(step=number, loss=record.loss, grad_norm=record.grad_norm, is_taken=is_taken))
    return found
