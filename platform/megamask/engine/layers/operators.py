"""RMSNorm, rotary positions and SwiGLU with gradients written out: few passes over memory, nothing kept twice.

Composed of torch's own operations each of them would store several intermediate tensors and go over memory two to
three times as often. Statistics and gradients of the norm are computed in float32 in every format.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from megamask.engine.layers import compiled


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467). Shapes: x [..., n], weight [n]."""
    if x.is_cuda:
        fused: torch.Tensor = F.rms_norm(x, weight.shape, weight, eps)  # one kernel each way
        return fused
    normed: torch.Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        length: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """With y = s*x*w: dw = sum s*x*g, dx = s*w*g - x * s^3/n * sum(w*x*g)."""
        x, weight, scale = ctx.saved_tensors
        wide, wide_weight, gradient = x.float(), weight.float(), gradient.float()
        size = x.size(-1)
        products = (gradient * wide).reshape(-1, size)
        flat_scale = scale.reshape(-1)
        of_weight = flat_scale @ products
        inner = (products @ wide_weight).view(scale.shape).mul_(scale**3).div_(-size)
        of_x = (gradient * wide_weight).mul_(scale).addcmul_(wide, inner)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None


def rotary_angles(
    positions: torch.Tensor | None,
    length: int,
    *,
    channels: int,
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position's angles position * theta^(-2c/d); computed in float32, rounded to dtype.

    Shapes: positions int64 [b, s] -> [b, 1, s, d/2] each; None means 0 to length - 1 in every row -> [s, d/2] each.

    Args:
        channels: d, of one head.
    """
    if positions is None:
        return _angles_in_order(length, channels, theta, device, dtype)
    return _angles(positions.unsqueeze(1), channels, theta, dtype)


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], *, is_compiled: bool = False) -> torch.Tensor:
    """Rotary positions (RoFormer, arXiv:2104.09864): turn the channel pairs (c, c + d/2) by their position's angle.

    Shapes: x [s, b, h, d] -> [b, h, s, d]; angles as `rotary_angles` returns them. Channels beyond those that the
    angles are for stay as they are.

    Args:
        is_compiled: by one kernel (compiled.py), which takes float32 angles and rounds once.
    """
    x = x.permute(1, 2, 0, 3)
    if is_compiled:
        by_kernel: torch.Tensor = _RotateCompiled.apply(x, *angles)  # type: ignore[no-untyped-call]
        return by_kernel
    channels = 2 * angles[0].size(-1)
    turned: torch.Tensor = _Rotate.apply(x[..., :channels], *angles)  # type: ignore[no-untyped-call]
    return turned if channels == x.size(-1) else torch.cat((turned, x[..., channels:]), dim=-1)


@functools.lru_cache(maxsize=8)
def _angles_in_order(
    length: int, channels: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return _angles(torch.arange(length, device=device), channels, theta, dtype)


def _angles(
    positions: torch.Tensor, channels: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
    angle = positions.float().unsqueeze(-1) / theta**exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(x, cosine, sine, torch.empty(x.shape, dtype=x.dtype, device=x.device), sign=1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        b, h, s, d = gradient.shape
        out = torch.empty((s, b, h, d), dtype=gradient.dtype, device=gradient.device).permute(1, 2, 0, 3)
        return _turn(gradient, cosine, sine, out, sign=-1), None, None


class _RotateCompiled(torch.autograd.Function):
    """As _Rotate, over all channels."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return compiled.turn(x, cosine, sine, sign=1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient is made in the order of memory that the layer's projection reads, [s, b, h, d]."""
        cosine, sine = (_by_position(tensor) for tensor in ctx.saved_tensors)
        turned = compiled.turn(gradient.permute(2, 0, 1, 3), cosine, sine, sign=-1)
        return turned.permute(1, 2, 0, 3), None, None


def _by_position(angles: torch.Tensor) -> torch.Tensor:
    """[s, d/2] or [b, 1, s, d/2] -> [s, b or 1, 1, d/2]."""
    return angles[:, None, None] if angles.dim() == 2 else angles.permute(2, 0, 1, 3)


def _turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, out: torch.Tensor, *, sign: int) -> torch.Tensor:
    for own, other, to, turn in zip(x.chunk(2, -1), x.chunk(2, -1)[::-1], out.chunk(2, -1), (-sign, sign), strict=True):
        torch.mul(own, cosine, out=to)
        to.addcmul_(other, sine, value=turn)
    return out


def swiglu(x: torch.Tensor, *, is_compiled: bool = False) -> torch.Tensor:
    """silu(gate) * up (arXiv:2002.05202). Shapes: x [..., 2n], gate and up side by side -> [..., n].

    Args:
        is_compiled: by one kernel in each direction (compiled.py), which rounds once.
    """
    gated: torch.Tensor = _SwiGLU.apply(x, is_compiled)  # type: ignore[no-untyped-call]
    return gated


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, is_compiled: bool) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.is_compiled = is_compiled
        if is_compiled:
            return compiled.swiglu(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.is_compiled:
            return compiled.swiglu_gradient(x, gradient), None
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        of_gate, of_up = out.chunk(2, -1)
        torch.mul(gradient, F.silu(gate), out=of_up)
        torch.mul(torch.ops.aten.silu_backward(gradient, gate), up, out=of_gate)
        return out, None
