"""Quantisation against the formats' own definition: sign, exponent and mantissa written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.engine.layers.fp8_recipes import E4M3, E5M2, TILE, per_tensor, per_tile


def numbers_of(exponent_bits: int, mantissa_bits: int, limit: float) -> torch.Tensor:
    """Every finite number of a format, ascending, in float64."""
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    found = {0.0}
    for exponent in range(2**exponent_bits):
        for mantissa in range(steps):
            is_normal = int(exponent > 0)
            value = (is_normal + mantissa / steps) * 2.0 ** (max(exponent, 1) - bias)
            if value <= limit:
                found |= {value, -value}
    return torch.tensor(sorted(found), dtype=torch.float64)


FORMATS = {E4M3: numbers_of(4, 3, 448.0), E5M2: numbers_of(5, 2, 57344.0)}


def is_nearest(found: torch.Tensor, scaled: torch.Tensor, dtype: torch.dtype) -> bool:
    """Check that each found number is a number of the format, and none is nearer."""
    numbers = FORMATS[dtype]
    distance = (scaled.double().unsqueeze(-1).clamp(numbers[0], numbers[-1]) - numbers).abs()
    own = (scaled.double().clamp(numbers[0], numbers[-1]) - found.double()).abs()
    is_number = (found.double().unsqueeze(-1) == numbers).any(dim=-1)
    return bool(is_number.all()) and bool((own == distance.amin(dim=-1)).all())


def numbers(scaled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round the values at a scale of 1, to numbers of the format themselves."""
    return per_tensor(scaled, dtype, torch.ones(()))


@pytest.mark.promise("emulated FP8 rounds to the nearest number of the format, scaled to the largest magnitude")
@pytest.mark.parametrize("dtype", FORMATS)
@given(seed=st.integers(0, 10**6), power=st.integers(-20, 20))
def test_one_scale_maps_the_largest_magnitude_to_the_limit(dtype, seed, power):
    x = torch.randn(9, 17, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    scale = torch.finfo(dtype).max / x.abs().max()
    assert is_nearest(numbers(x * scale, dtype), x * scale, dtype)
    assert torch.equal(per_tensor(x, dtype), numbers(x * scale, dtype) * (1 / scale))


def test_dequantising_multiplies_by_the_stored_reciprocal():
    """Dividing differs in the last bits, and gradients of Transformer Engine are not reproduced."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    scale = torch.finfo(E4M3).max / x.abs().max()
    expected = numbers(x * scale, E4M3) * (1 / scale)
    assert torch.equal(per_tensor(x, E4M3), expected)
    assert not torch.equal(expected, numbers(x * scale, E4M3) / scale)


def test_a_given_scale_saturates_instead_of_overflowing():
    x = torch.tensor([1.0, 500.0, -1e30, 0.0])
    assert per_tensor(x, E4M3, torch.ones(())).tolist() == [1.0, 448.0, -448.0, 0.0]


def test_zeros_stay_zeros():
    assert not per_tensor(torch.zeros(3, 3), E5M2).any()
    assert not per_tile(torch.zeros(3, 3), E4M3, rows=1).any()


@pytest.mark.promise("emulated FP8 rounds to the nearest number of the format, scaled to the largest magnitude")
@pytest.mark.parametrize("rows", [1, TILE])
def test_each_tile_has_the_power_of_two_of_its_own_magnitude(rows):
    x = torch.randn(2 * TILE + 5, TILE + 40, generator=torch.Generator().manual_seed(2))
    x[:TILE, :TILE] *= 1000.0
    found = per_tile(x, E4M3, rows=rows)
    for top in range(0, x.size(0), rows):
        for left in range(0, x.size(1), TILE):
            tile = (slice(top, top + rows), slice(left, left + TILE))
            scale = 2.0 ** torch.floor(torch.log2(448.0 / x[tile].abs().max()))
            assert is_nearest(found[tile] * scale, x[tile] * scale, E4M3)
