"""Floating-point operations of a step, by what does them: matrices, attention and the head.

Rows and pairs of positions are counted apart: a complementary pair runs two rows of each sample, a doubled input twice
the positions, and attention counts the pairs of positions that see each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamask.models.counts import flops_per_token
from megamask.planning.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of forward and backward pass per clean token; a multiply-add counts two, recomputation nothing.

    Args:
        matrices: of the layers' matrices.
        attention: scores and mixture.
        head: of the scored positions.
    """

    matrices: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """Operations per clean token."""
        return self.matrices + self.attention + self.head


def work_per_token(subject: Subject) -> Work:
    """Count the operations of a step, divided by the tokens of its samples."""
    spec, shape = subject.spec, subject.shape
    positions_per_token = shape.num_views * shape.input_length / spec.max_sequence_length

    def training(scored: float, attended: float) -> float:
        return positions_per_token * (
            flops_per_token(spec, scored_fraction=scored, attended_fraction=attended).training
        )

    matrices = training(0.0, 0.0)
    return Work(
        matrices=matrices,
        attention=training(0.0, shape.attended_fraction) - matrices,
        head=training(shape.scored_fraction, 0.0) - matrices,
    )
