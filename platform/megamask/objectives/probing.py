"""Objectives that noise a row in parts and can score one part at a time, as measurements of a loss's variance do.

Shapes: b samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from torch import Tensor

from megamask.objectives.base import Key, Rows, Samples


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One scored part of each sample.

    Args:
        probability: float64 [b], mask probability of the part.
        num_eligible: int64 [b], of the part.
    """

    rows: Rows
    probability: Tensor
    num_eligible: Tensor


@runtime_checkable
class Probed(Protocol):
    """An objective whose mask probabilities lie in a window that its config chooses."""

    def unclipped(self) -> Self:
        """One view over the full range of noise, of the diffusion loss alone."""

    def seen(self, samples: Samples, key: Key) -> Samples:
        """The samples as the objective takes them."""

    def probe(self, samples: Samples, step: int, key: Key, *, block: Tensor) -> Probe:
        """Rows of one view in which one block of each sample is scored.

        Args:
            block: int64 [b], number of the block modulo the blocks of its row.
        """
