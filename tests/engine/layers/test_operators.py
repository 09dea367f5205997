"""Written-out gradients are those that autograd finds for the formula, in float64; bf16 rounds once at the end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megamask.engine.layers.operators import rms_norm, rotary_angles, rotate, swiglu
from megamask.models.reference import rotary_positions
from megamask.models.reference import rotate as reference_rotate
from support.specs import small_spec

EPS = 1e-5


def formula_rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def formula_swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def draws(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def both(ours, formula, *inputs):
    """Values and gradients of ours in float32 and of the formula in float64, under the same weighted sum."""
    results = []
    for function, wanted in ((ours, torch.float32), (formula, torch.float64)):
        leaves = [tensor.detach().to(wanted, copy=True).requires_grad_() for tensor in inputs]
        value = function(*leaves)
        (value * draws(*value.shape, seed=9).to(wanted)).sum().backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    return zip(*results, strict=True)


@pytest.mark.promise("RMSNorm, rotation, SwiGLU and their gradients equal their formulas")
@pytest.mark.parametrize("shape", [(5, 64), (3, 2, 4, 16), (1, 1, 7)])
def test_rms_norm_and_its_gradients_are_the_formulas(shape):
    inputs = draws(*shape, scale=3.0), 1 + draws(shape[-1], seed=1)
    for ours, exact in both(lambda x, w: rms_norm(x, w, EPS), formula_rms_norm, *inputs):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_zeros_is_zero_and_its_gradient_finite():
    x = torch.zeros(2, 8, requires_grad=True)
    value = rms_norm(x, torch.ones(8), EPS)
    value.sum().backward()
    assert not value.any() and x.grad.isfinite().all()


@pytest.mark.promise("RMSNorm, rotation, SwiGLU and their gradients equal their formulas")
def test_bf16_rms_norm_rounds_the_float32_result_once():
    x, weight = draws(64, 512, scale=3.0).bfloat16(), (1 + draws(512, seed=1)).bfloat16()
    exact = formula_rms_norm(x.double(), weight.double())
    assert rms_norm(x, weight, EPS).dtype == torch.bfloat16
    assert (rms_norm(x, weight, EPS).double() - exact).abs().div(exact.abs()).max() <= 2**-8  # half a unit is 2^-9


@pytest.mark.promise("RMSNorm, rotation, SwiGLU and their gradients equal their formulas")
def test_swiglu_and_its_gradient_are_the_formulas():
    for ours, exact in both(swiglu, formula_swiglu, draws(5, 3, 24, scale=4.0)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_swiglu_takes_gradients_that_are_not_contiguous():
    x = draws(6, 8).requires_grad_()
    other = x.detach().clone().requires_grad_()
    swiglu(x).t().square().sum().backward()
    formula_swiglu(other).t().square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


POSITIONS = torch.tensor([list(range(16)), [*range(9), *range(7)]])  # a row, and one of two documents


@pytest.mark.promise("RMSNorm, rotation, SwiGLU and their gradients equal their formulas")
@pytest.mark.parametrize("positions", [None, POSITIONS, POSITIONS + 40], ids=["in order", "restarting", "far"])
def test_rotation_and_its_gradient_are_the_reference_networks(positions):
    spec = small_spec()
    x = draws(16, 2, 3, spec.head_dim)

    def reference(x):
        rotation = rotary_positions(spec, torch.arange(16)[None] if positions is None else positions)
        return reference_rotate(x.permute(1, 2, 0, 3), rotation)

    for ours, expected in both(lambda x: rotate(x, angles_of(x, spec.rope_theta, positions)), reference, x):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def angles_of(x, theta, positions=None):
    return rotary_angles(positions, x.size(0), channels=x.size(3), theta=theta, device=x.device, dtype=x.dtype)


def test_rotation_has_equal_bits_when_the_positions_in_order_are_given():
    x = draws(16, 2, 3, 8)
    in_order = torch.arange(16).expand(2, 16)
    assert torch.equal(rotate(x, angles_of(x, 100.0)), rotate(x, angles_of(x, 100.0, in_order)))


def test_rotation_reads_views_and_keeps_lengths():
    fused = draws(16, 2, 3, 24)
    part = fused[..., 8:16]
    rotated = rotate(part, angles_of(part, 100.0))
    assert rotated.shape == (2, 3, 16, 8)
    torch.testing.assert_close(rotated, rotate(part.contiguous(), angles_of(part, 100.0)), rtol=0, atol=0)
    torch.testing.assert_close(rotated.norm(dim=-1), part.permute(1, 2, 0, 3).norm(dim=-1))
    assert torch.equal(rotated[:, :, 0], part[0])  # position 0 does not turn
