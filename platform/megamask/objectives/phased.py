"""An objective whose phases follow one another: each step has the objective of its phase (schedule.py).

A network is measured, decoded and exported as the phase that it was last trained in (`shifted.at_step`). By itself the
objective has the bound and decoder of the last phase; its record has all phases. Sizes are those of the largest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megamask.models.context import Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Bound, Decoder, Key, Objective, Rows, Samples
from megamask.objectives.shapes import ObjectiveShape
from megamask.objectives.terms import Term

PHASES_KEY = "phases"
"""Key of an objective's record: the records of its phases, with their first steps."""


@dataclass(frozen=True, kw_only=True)
class PhasedObjective:
    """Objectives by their first step.

    Args:
        phases: (first step, objective), ascending, the first at step 1; all with the same ids outside the softmax.
    """

    phases: tuple[tuple[int, Objective], ...]

    def at(self, step: int) -> Objective:
        """The objective of the step's phase."""
        return [objective for first, objective in self.phases if first <= step][-1]

    @property
    def last(self) -> Objective:
        """The objective of the last phase."""
        return self.phases[-1][1]

    @property
    def name(self) -> str:
        """Of the last phase."""
        return self.last.name

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids that all phases know."""
        return self.last.vocabulary

    @property
    def terms(self) -> Sequence[Term]:
        """Of the last phase; a step takes those of `at`."""
        return self.last.terms

    @property
    def num_parts(self) -> int:
        """Of the last phase; a step takes those of `at`."""
        return self.last.num_parts

    @property
    def needs_mask_token(self) -> bool:
        """True if a phase's rows contain the mask token."""
        return any(objective.needs_mask_token for _, objective in self.phases)

    @property
    def excluded_ids(self) -> frozenset[int]:
        """The same in all phases."""
        return self.last.excluded_ids

    @property
    def bound(self) -> Bound:
        """Of the last phase."""
        return self.last.bound

    @property
    def decoder(self) -> Decoder:
        """Of the last phase."""
        return self.last.decoder

    def shape(self, sequence_length: int) -> ObjectiveShape:
        """Of the phase with the most positions."""
        shapes = [objective.shape(sequence_length) for _, objective in self.phases]
        return max(shapes, key=lambda shape: (shape.num_views * shape.input_length, shape.scored_positions))

    def seen(self, samples: Samples, key: Key) -> Samples:
        """As every phase sees them."""
        return self.last.seen(samples, key)

    def context(self, samples: Samples, step: int, key: Key) -> Context:
        """Of the step's phase."""
        return self.at(step).context(samples, step, key)

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """Of the step's phase."""
        return self.at(step).rows(samples, step, key)

    def details(self, samples: Samples, step: int, key: Key) -> list[dict[str, Any]]:
        """Of the step's phase."""
        return self.at(step).details(samples, step, key)

    def record(self) -> dict[str, Any]:
        """Of the last phase, and each phase's own with its first step."""
        return {
            **self.last.record(),
            PHASES_KEY: [{"first_step": first, **objective.record()} for first, objective in self.phases],
        }
