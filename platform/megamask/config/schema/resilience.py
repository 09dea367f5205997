"""Policies for a step whose numbers are not finite, or far from those of the steps before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.problem import Problem
from megamask.config.schema.field import operational
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig(Section):
    """The numerics guard: rules for a step at fault, and what follows. Every decision is in the journal.

    The rules look at the global loss and gradient norm, which are the same on every rank, and at the journal's lines of
    the steps before, so that a step that is trained again is judged alike. They may differ with every attempt: what a
    rewind left out stays in skips.json.
    """

    nonfinite: str = operational(
        "what follows a loss or gradient norm that is not finite: stop ends with 66; skip takes the step without its "
        "update; rewind goes back resilience.rewind_steps steps and leaves their samples out for good",
        default="stop",
        choices=("stop", "skip", "rewind"),
    )
    spike: str = operational(
        "what follows a loss or gradient norm beyond resilience.spike_loss or spike_grad_norm; ignore takes the step",
        default="ignore",
        choices=("ignore", "stop", "skip", "rewind"),
    )
    spike_loss: float | None = operational(
        "a step is a spike if its loss is above this many times the median of the resilience.spike_window steps before "
        "it; null for no such rule",
        default=2.0,
        minimum=1.0,
    )
    spike_grad_norm: float | None = operational(
        "a step is a spike if its gradient norm is above this many times the median of the resilience.spike_window "
        "steps before it; null for no such rule",
        default=10.0,
        minimum=1.0,
    )
    spike_window: int = operational(
        "steps before a step whose medians are taken, without those whose update was skipped; the first steps of a "
        "run, as many, are not spikes",
        default=100,
        minimum=3,
        unit="steps",
    )
    max_skips_in_a_row: int = operational(
        "updates that may be skipped one after the other; the next step at fault ends with 66", default=5, minimum=1
    )
    rewind_steps: int = operational(
        "steps whose samples a rewind leaves out: the one at fault and those right before it. Training goes on from "
        "the newest checkpoint before them",
        default=10,
        minimum=1,
        unit="steps",
    )
    max_rewinds: int = operational(
        "rewinds of a run, all attempts together; after them a step at fault ends with 66", default=3, minimum=1
    )

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """A rule for spikes without a limit, and rewinds without anything to go back to."""
        if self.spike != "ignore" and self.spike_loss is None and self.spike_grad_norm is None:
            yield Problem(
                key="resilience.spike",
                because="but resilience.spike_loss and resilience.spike_grad_norm are both null: nothing would be one",
                allowed="ignore, or a number for one of the two",
            )
        if "rewind" in (self.nonfinite, self.spike) and config.checkpoint.every_steps is None:
            yield Problem(
                key="resilience.nonfinite" if self.nonfinite == "rewind" else "resilience.spike",
                because="but checkpoint.every_steps is null, so that there is nothing to go back to",
                allowed="stop or skip, or a number of steps for checkpoint.every_steps",
            )
