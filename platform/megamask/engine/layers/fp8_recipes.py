"""Quantisation of an operand of a matrix product by the FP8 recipes, in plain torch on any device.

An operand is quantised and dequantised, and the product is computed in float32: up to the order of sums that is an FP8
product with float32 accumulation. Sources: Micikevicius et al., arXiv:2209.05433; DeepSeek-V3, arXiv:2412.19437,
section 3.3. The numbers follow Transformer Engine, which multiplies by the stored reciprocal of a scale when it
dequantises: dividing instead moves gradients by up to 4e-2.

Shapes: m rows, k columns; k is the inner dimension of the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TILE = 128
_FLOAT32_MAX = torch.finfo(torch.float32).max


def largest(dtype: torch.dtype) -> float:
    """The largest finite number of an FP8 format: 448 for E4M3, 57344 for E5M2."""
    return torch.finfo(dtype).max


def amax_of(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude, a float32 scalar."""
    return x.detach().abs().amax().float()


def scale_of(amax: torch.Tensor, limit: torch.Tensor | float, *, is_power_of_2: bool = False) -> torch.Tensor:
    """The factor that brings amax to the format's limit; 1 where amax is 0, finite where the quotient overflows."""
    scale = torch.where(amax > 0, limit / amax, torch.ones_like(amax)).clamp(max=_FLOAT32_MAX)
    return torch.exp2(torch.floor(torch.log2(scale))) if is_power_of_2 else scale


def per_tensor(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Quantise and dequantise with one scale, by default from the tensor itself; float32 of the same shape."""
    x = x.float()
    if scale is None:
        scale = scale_of(amax_of(x), largest(dtype))
    return _round_trip(x * scale, dtype) * (1 / scale)


def per_tile(x: torch.Tensor, dtype: torch.dtype, *, rows: int) -> torch.Tensor:
    """Quantise and dequantise with a power of two for each tile of rows x 128; float32 [m, k].

    Tiles at the edges are filled with zeros, so any shape is accepted; the kernels want multiples of 128.
    """
    num_rows, num_columns = x.shape
    padded = F.pad(x.float(), (0, -num_columns % TILE, 0, -num_rows % rows))
    tiles = padded.view(padded.size(0) // rows, rows, padded.size(1) // TILE, TILE)
    scale = scale_of(tiles.abs().amax((1, 3), keepdim=True), largest(dtype), is_power_of_2=True)
    return (_round_trip(tiles * scale, dtype) * (1 / scale)).view_as(padded)[:num_rows, :num_columns]


def _round_trip(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast and back. The clamp is needed: beyond the limit some versions of torch cast to NaN."""
    limit = largest(dtype)
    return x.clamp(-limit, limit).to(dtype).float()
