"""megatron-core's parallel linear layers with FP8 matrix products emulated on any device.

What those classes do with ranks stays theirs: only the product inside, `_forward_impl`, is another one. Activations and
weights are quantised to E4M3. Gradients are quantised to E5M2 (tensorwise, delayed), or to E4M3 (blockwise).

Shapes: s sequence, b rows, n = s*b positions, k input features, o output features of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megamask.engine.layers.feed_forward import FeedForward
from megamask.engine.layers.fp8_recipes import E4M3, E5M2, TILE, per_tensor, per_tile
from megamask.engine.layers.fp8_state import BACKWARD, FORWARD, GRADIENT, INPUT, WEIGHT, DelayedScales


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Input and weight of a product as quantised, float32: for the forward pass, and for the weight's gradient.

    Shapes: input and input_for_weight [n, k]; weight [o, k].
    """

    input: torch.Tensor
    input_for_weight: torch.Tensor
    weight: torch.Tensor


class Quantization(Protocol):
    """A recipe, at work in one linear layer."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, *, is_training: bool) -> Operands:
        """Quantise input [n, k] and weight [o, k]."""

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise the gradient [n, o] of the output, for the input's gradient and for the weight's."""

    def begin_step(self) -> None:
        """Note that the weight has changed since the last pass."""


class Tensorwise:
    """One scale for each tensor, from its own magnitudes."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, *, is_training: bool) -> Operands:
        """Both in E4M3."""
        del is_training
        quantised = per_tensor(x, E4M3)
        return Operands(input=quantised, input_for_weight=quantised, weight=per_tensor(weight, E4M3))

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E5M2, the same for both products."""
        quantised = per_tensor(gradient, E5M2)
        return quantised, quantised

    def begin_step(self) -> None:
        """Nothing is kept."""


class Blockwise:
    """A power of two for each 1 x 128 values along a product's inner dimension, and for each 128 x 128 of a weight."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, *, is_training: bool) -> Operands:
        """All in E4M3; the weight's gradient sums over positions, so the input is quantised along them once more."""
        del is_training
        return Operands(
            input=per_tile(x, E4M3, rows=1),
            input_for_weight=per_tile(x.t(), E4M3, rows=1).t(),
            weight=per_tile(weight, E4M3, rows=TILE),
        )

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E4M3, along features and along positions."""
        return per_tile(gradient, E4M3, rows=1), per_tile(gradient.t(), E4M3, rows=1).t()

    def begin_step(self) -> None:
        """Nothing is kept."""


class Delayed:
    """One scale for each tensor, from the magnitudes of earlier passes.

    The weight is quantised in the first training pass of a step and kept for the others. A pass without gradients
    changes nothing. While `is_calibrating`, magnitudes are recorded and nothing is quantised.
    """

    def __init__(self, scales: DelayedScales) -> None:
        self.scales = scales
        self.is_calibrating = False
        self._weight: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, weight: torch.Tensor, *, is_training: bool) -> Operands:
        """Both in E4M3, by the scales of earlier passes."""
        scales = self.scales
        if not is_training:
            quantised = per_tensor(x, E4M3, scales.scale[INPUT])
            return Operands(
                input=quantised, input_for_weight=quantised, weight=per_tensor(weight, E4M3, scales.scale[WEIGHT])
            )
        quantised = x.float() if self.is_calibrating else per_tensor(x, E4M3, scales.scale[INPUT])
        if self._weight is None:
            self._weight = (
                weight.detach().float() if self.is_calibrating else per_tensor(weight, E4M3, scales.scale[WEIGHT])
            )
            scales.see(WEIGHT, weight)
        scales.see(INPUT, x)
        if not self.is_calibrating:
            scales.update(FORWARD)
        return Operands(input=quantised, input_for_weight=quantised, weight=self._weight)

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E5M2, the same for both products."""
        scales = self.scales
        quantised = gradient.float() if self.is_calibrating else per_tensor(gradient, E5M2, scales.scale[GRADIENT])
        scales.see(GRADIENT, gradient)
        if not self.is_calibrating:
            scales.update(BACKWARD)
        return quantised, quantised

    def begin_step(self) -> None:
        """Forget the weight of the step before."""
        self._weight = None


class _Product(torch.autograd.Function):
    """input weight^T, with the collectives that megatron-core's product has around it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        quantization: Quantization,
        group: dist.ProcessGroup | None,
        is_gathered: bool,
        is_reduced: bool,
        is_training: bool,
    ) -> torch.Tensor:
        ctx.quantization, ctx.group, ctx.format = quantization, group, x.dtype
        ctx.is_gathered, ctx.is_reduced = is_gathered, is_reduced
        if is_gathered:  # sequence parallelism: this rank holds a part of the sequence
            assert group is not None
            complete = x.new_empty(x.size(0) * group.size(), *x.shape[1:])
            dist.all_gather_into_tensor(complete, x.contiguous(), group=group)
            x = complete
        operands = quantization.forward(x.reshape(-1, x.size(-1)), weight, is_training=is_training)
        ctx.save_for_backward(operands.input_for_weight, operands.weight)
        return (operands.input @ operands.weight.t()).to(x.dtype).view(*x.shape[:-1], weight.size(0))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        for_input, for_weight = ctx.quantization.backward(gradient.reshape(-1, gradient.size(-1)))
        of_input = (for_input @ weight).to(ctx.format).view(*gradient.shape[:-1], -1)
        if ctx.is_gathered:
            part = of_input.new_empty(of_input.size(0) // ctx.group.size(), *of_input.shape[1:])
            dist.reduce_scatter_tensor(part, of_input.contiguous(), group=ctx.group)
            of_input = part
        elif ctx.is_reduced:
            dist.all_reduce(of_input, group=ctx.group)
        return of_input, (for_weight.t() @ x).to(ctx.format), None, None, None, None, None


class Emulated:
    """Replaces the product of a parallel linear layer once a recipe is set; computes as usual while there is none."""

    quantization: Quantization | None = None
    tp_group: dist.ProcessGroup | None

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, bias: Any = None, **options: Any
    ) -> torch.Tensor:
        if self.quantization is None:
            usual: torch.Tensor = super()._forward_impl(  # type: ignore[misc]
                input=input, weight=weight, bias=bias, **options
            )
            return usual
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input,
            weight,
            self.quantization,
            self.tp_group,
            options["sequence_parallel"],
            options["allreduce_dgrad"],
            torch.is_grad_enabled(),
        )
        return product if bias is None else product + bias


class EmulatedColumnParallelLinear(Emulated, ColumnParallelLinear):  # type: ignore[misc]
    """A column-parallel linear layer whose products an FP8 recipe quantises."""


class EmulatedRowParallelLinear(Emulated, RowParallelLinear):  # type: ignore[misc]
    """A row-parallel linear layer whose products an FP8 recipe quantises."""


class EmulatedFeedForward(FeedForward):
    """The feed-forward part with both products emulated."""

    column, row = EmulatedColumnParallelLinear, EmulatedRowParallelLinear
