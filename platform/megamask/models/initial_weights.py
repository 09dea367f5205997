"""Initial weights by the noise law: every layout starts from the same network.

Each element is an integer function of (run.seed, canonical name, row-major place of the element), so a rank makes just
the part that it owns. Names and shapes are those of models/shapes.py. The law is in docs/architecture.md, "Initial
weights".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megamask.diffusion.philox import Purpose, philox4x32
from megamask.models.shapes import CanonicalTensor, TensorKind, canonical_tensors
from megamask.models.spec import ModelSpec
from megamask.storage.hashing import hash_of, key_of

WEIGHTS_LAW_VERSION = 1

# A sum of twelve uniform 16-bit integers has this mean, and this standard deviation: twelve times (65536^2 - 1) / 12.
_MEAN_OF_TWELVE = 393210
_STD_OF_TWELVE = math.sqrt(65536**2 - 1)
_ELEMENTS_AT_A_TIME = 1 << 20  # bounds the temporaries to about 100 MiB


def initial_tensor(
    seed: int,
    name: str,
    spec: ModelSpec,
    index: tuple[slice, ...] | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """The initial values of a canonical tensor, or of a rectangle of it.

    Args:
        seed: run.seed.
        name: of a canonical tensor (models/shapes.py).
        index: one slice of step 1 for each dimension; None means the full tensor.
        device: where the values are made; they are the same everywhere.

    Returns:
        float32, of the rectangle's shape.

    Raises:
        ValueError: for a name that the model does not have, or an index that is not such a rectangle.
    """
    tensor = canonical_tensors(spec).get(name)
    if tensor is None:
        raise ValueError(f"the model has no canonical tensor {name}")
    shape = tensor.shape
    spans = _spans(shape, index)
    sizes = tuple(stop - start for start, stop in spans)
    if tensor.kind is TensorKind.NORM:
        return torch.ones(sizes, device=device)
    if tensor.kind in (TensorKind.BIAS, TensorKind.EXPERT_BIAS):
        return torch.zeros(sizes, device=device)
    key = key_of(hash_of(seed, name))
    std = standard_deviation(tensor, spec)
    divisor = torch.tensor(_STD_OF_TWELVE, dtype=torch.float64, device=device)
    values = torch.empty(math.prod(sizes), dtype=torch.float32, device=device)
    for start in range(0, values.numel(), _ELEMENTS_AT_A_TIME):
        stop = min(start + _ELEMENTS_AT_A_TIME, values.numel())
        place = torch.arange(start, stop, device=device)
        row = torch.div(place, sizes[1], rounding_mode="floor")
        element = (row + spans[0][0]).mul_(shape[1]).add_(place - row * sizes[1] + spans[1][0])
        # A divisor on the device: CUDA multiplies by the reciprocal of a host number, which rounds differently.
        z = (sum_of_twelve(element, key) - _MEAN_OF_TWELVE).to(torch.float64) / divisor
        values[start:stop] = z.mul_(std)
    return values.view(sizes)


def sum_of_twelve(element: Tensor, key: tuple[int, int]) -> Tensor:
    """The integer behind a weight: twelve 16-bit halves of an element's six words, added up; int64, [0, 786420]."""
    low, high = element & 0xFFFFFFFF, element >> 32
    first = philox4x32((low, high, 0, int(Purpose.INITIAL_WEIGHTS)), key)
    second = philox4x32((low, high, 1, int(Purpose.INITIAL_WEIGHTS)), key)
    total = torch.zeros_like(element)
    for word in (*first, second[0], second[1]):
        total += word & 0xFFFF
        total += word >> 16
    return total


def standard_deviation(tensor: CanonicalTensor, spec: ModelSpec) -> float:
    """Of a weight matrix: `model.init_std`, smaller for the two projections that write to the residual stream."""
    if tensor.kind is TensorKind.RESIDUAL_MATRIX:
        return spec.init_std / math.sqrt(2 * spec.num_layers)
    return spec.init_std


def _spans(shape: tuple[int, ...], index: tuple[slice, ...] | None) -> list[tuple[int, int]]:
    """(start, stop) in each dimension."""
    if index is None:
        return [(0, size) for size in shape]
    if len(index) != len(shape) or any(part.step not in (None, 1) for part in index):
        raise ValueError(f"index {index} is not one slice of step 1 for each dimension of {shape}")
    spans = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    return [(start, max(start, stop)) for start, stop in spans]
