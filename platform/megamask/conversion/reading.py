"""Facts of how an objective reads a row, under the names of published configurations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamask.models.context import BlockPattern, Causal
from megamask.models.families.base import AttentionKind
from megamask.objectives.base import Objective

_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class RowReading:
    """Facts that a decoder needs.

    Args:
        has_shift: whether the logits at a position predict the token after it.
        block_size: tokens of a diffusion block; None for another kind of model.
    """

    attention: AttentionKind
    has_shift: bool
    block_size: int | None


def reading_of(objective: Objective) -> RowReading:
    """The facts, from the objective's own decoder."""
    row = torch.zeros(1, _LENGTH, dtype=torch.int64)
    reading = objective.decoder.reading(row, torch.ones_like(row, dtype=torch.bool))
    pattern = reading.context.pattern
    kind: AttentionKind = "bidirectional"
    if isinstance(pattern, Causal):
        kind = "causal"
    elif isinstance(pattern, BlockPattern):
        kind = "block_causal"
    return RowReading(
        attention=kind,
        has_shift=reading.shift == 1,
        block_size=pattern.block_size if isinstance(pattern, BlockPattern) else None,
    )
