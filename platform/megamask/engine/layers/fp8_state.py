"""Delayed scaling: the amax histories of a linear layer and the scales that follow from them.

Each operand (input, weight, gradient of the output) is quantised with a scale from the largest magnitudes of earlier
passes. Source: Micikevicius et al., arXiv:2209.05433, section 3.1; the order of updates is Transformer Engine's.

Shapes: H passes of history; operands in the order of OPERANDS.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from megamask.engine.layers.fp8_recipes import E4M3, E5M2, amax_of, largest, scale_of

OPERANDS = ("input", "weight", "gradient")
INPUT, WEIGHT, GRADIENT = range(3)
FORWARD, BACKWARD, ALL = slice(INPUT, GRADIENT), slice(GRADIENT, GRADIENT + 1), slice(INPUT, GRADIENT + 1)
_FORMATS: tuple[torch.dtype, ...] = (E4M3, E4M3, E5M2)


class Scales(Protocol):
    """The state of one linear layer, wherever it is kept: float32 histories [3, H] and scales [3]."""

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the histories and the scales; column 0 is the pass at hand, the last one the pass before it."""

    def write(self, amax_history: torch.Tensor, scale: torch.Tensor) -> None:
        """Replace both."""


class DelayedScales:
    """The state of one emulated linear layer, the same on all ranks that hold shards or copies of it.

    Args:
        history: H, passes that a scale looks back on.
        margin: a scale is divided by 2 to this power.
        group: ranks over which magnitudes are maxima: tensor-parallel and data-parallel ones.
    """

    def __init__(self, *, history: int, margin: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._margin = group, margin
        self.amax_history = torch.zeros(len(OPERANDS), history, device=device)
        self.scale = torch.ones(len(OPERANDS), device=device)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As Scales."""
        return self.amax_history.clone(), self.scale.clone()

    def write(self, amax_history: torch.Tensor, scale: torch.Tensor) -> None:
        """As Scales."""
        self.amax_history.copy_(amax_history)
        self.scale.copy_(scale)

    def see(self, operand: int, x: torch.Tensor) -> None:
        """Take the magnitudes of an operand into the pass at hand."""
        now = self.amax_history[operand, 0]
        now.copy_(torch.maximum(now, amax_of(x)))

    def update(self, operands: slice) -> None:
        """End a pass for some operands."""
        end_pass(self.amax_history, self.scale, operands, margin=self._margin, group=self._group)


def end_pass(
    amax_history: torch.Tensor, scale: torch.Tensor, operands: slice, *, margin: int, group: dist.ProcessGroup
) -> None:
    """Agree on the magnitudes of a pass over the ranks, set the scales, and move the histories on, in place.

    Shapes: amax_history [3, H], scale [3]; only the rows of `operands` change. A magnitude that is not finite, or a
    history of zeros, leaves its scale.
    """
    history, scales = amax_history[operands], scale[operands]
    latest = history[:, 0].clone()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(latest, op=dist.ReduceOp.MAX, group=group)
    history[:, 0] = latest
    amax = history.amax(dim=1)
    limits = torch.tensor([largest(dtype) for dtype in _FORMATS[operands]], device=scale.device)
    is_known = (amax > 0) & amax.isfinite()
    scales.copy_(torch.where(is_known, scale_of(amax, limits) / 2**margin, scales))
    history.copy_(history.roll(-1, dims=1))
    history[:, -1] = latest
    history[:, 0] = 0.0
