"""Rotary positions, SwiGLU and the noise's rounds compiled by torch, each to one kernel in each direction.

The formulas are those of operators.py and philox.py without their savings, because the compiler makes one pass over
memory of them anyway. Values are computed in float32 and rounded once at the end. The noise is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megamask.diffusion import philox

BACKEND = "inductor"


def turn(x: Tensor, cosine: Tensor, sine: Tensor, *, sign: int) -> Tensor:
    """Turn the first channels by the angles, in float32; the result has the format of x and is contiguous.

    Shapes: x [b, h, s, d] or [s, b, h, d]; cosine and sine broadcast with it, [..., c/2] for the first c channels.
    """
    kernel = _compiled(_turn if sign > 0 else _turn_back)
    turned: Tensor = kernel(x, cosine, sine)
    return turned


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up. Shapes: x [..., 2n] -> [..., n]."""
    gated: Tensor = _compiled(_swiglu)(x)
    return gated


def swiglu_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of `swiglu` by x, [..., 2n]."""
    of_x: Tensor = _compiled(_swiglu_gradient)(x, gradient)
    return of_x


def compile_noise(device: torch.device) -> None:
    """Make the words of the noise law by one kernel on devices of that type; their bits stay the same."""
    philox.rounds_by_device[device.type] = _compiled(philox.rounds)


def plain_noise(device: torch.device) -> None:
    """Undo `compile_noise`, which holds for the process."""
    philox.rounds_by_device.pop(device.type, None)


@functools.cache
def _compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(formula, backend=BACKEND)
    return compiled


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = cosine.size(-1)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)


def _turn_back(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return _turn(x, cosine, -sine)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def _swiglu_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    wide, share = gradient.float(), torch.sigmoid(gate)
    of_gate = wide * up * share * (1 + gate * (1 - share))
    return torch.cat((of_gate, wide * gate * share), dim=-1).to(x.dtype)
