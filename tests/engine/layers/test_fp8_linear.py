"""Products of each recipe against formulas in float64, and their distance from unquantised ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megamask.engine.layers.fp8_linear import Blockwise, Delayed, Tensorwise, _Product
from megamask.engine.layers.fp8_recipes import E4M3, E5M2, TILE, per_tensor, per_tile
from megamask.engine.layers.fp8_state import BACKWARD, FORWARD, GRADIENT, INPUT, WEIGHT, DelayedScales


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(160, 1, 192, generator=generator)
    x[..., 7] *= 60  # an outlier channel
    return x, torch.randn(48, 192, generator=generator) / 14, torch.randn(160, 1, 48, generator=generator) * 1e-4


def product(x, weight, dy, quantization, *, is_training=True):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = _Product.apply(x, weight, quantization, None, False, False, is_training)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


def formula(qx, qx_for_weight, qw, for_input, for_weight):
    """y = x w^T, dx = dy w, dw = dy^T x of the quantised operands."""
    wide = [tensor.double() for tensor in (qx, qx_for_weight, qw, for_input, for_weight)]
    qx, qx_for_weight, qw, for_input, for_weight = wide
    return qx @ qw.t(), for_input @ qw, for_weight.t() @ qx_for_weight


@pytest.mark.promise("emulated products are those of the quantised operands, forward and backward")
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_products_are_those_of_the_quantised_operands(job, tensors, recipe):
    x, weight, dy = tensors
    flat, flat_dy = x.flatten(0, 1), dy.flatten(0, 1)
    if recipe == "tensorwise":
        quantization, qx, for_dx = Tensorwise(), per_tensor(flat, E4M3), per_tensor(flat_dy, E5M2)
        expected = formula(qx, qx, per_tensor(weight, E4M3), for_dx, for_dx)
    elif recipe == "delayed":
        quantization = delayed(scales=(3.0, 100.0, 2.0**20))
        qx, for_dx = per_tensor(flat, E4M3, torch.tensor(3.0)), per_tensor(flat_dy, E5M2, torch.tensor(2.0**20))
        expected = formula(qx, qx, per_tensor(weight, E4M3, torch.tensor(100.0)), for_dx, for_dx)
    else:
        quantization = Blockwise()
        expected = formula(
            per_tile(flat, E4M3, rows=1),
            per_tile(flat.t(), E4M3, rows=1).t(),
            per_tile(weight, E4M3, rows=TILE),
            per_tile(flat_dy, E4M3, rows=1),
            per_tile(flat_dy.t(), E4M3, rows=1).t(),
        )
    found = product(x, weight, dy, quantization)
    exact = formula(flat, flat, weight, flat_dy, flat_dy)
    for ours, theirs, unrounded in zip(found, expected, exact, strict=True):
        torch.testing.assert_close(
            ours.double().view_as(theirs), theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max())
        )
        error = (ours.double().view_as(unrounded) - unrounded).norm() / unrounded.norm()
        assert 1e-3 < error < 0.1  # 0.02 to 0.07 for these recipes; without quantisation it would be 1e-7


def delayed(*, scales=(1.0, 1.0, 1.0), history=3, margin=0):
    made = DelayedScales(history=history, margin=margin, group=dist.group.WORLD, device=torch.device("cpu"))
    made.scale.copy_(torch.tensor(scales))
    return Delayed(made)


@pytest.mark.promise("a delayed scale is the format's limit over the largest magnitude of the history")
@pytest.mark.parametrize("margin", [0, 2])
def test_delayed_scales_follow_the_history(job, margin):
    scales = delayed(margin=margin).scales
    seen = []
    for value in (2.0, 8.0, 1.0, 0.5, 0.25, 0.125):
        seen.append(value)
        scales.see(INPUT, torch.tensor([-value, value / 2]))
        scales.see(WEIGHT, torch.tensor([3.0]))
        scales.update(FORWARD)
        largest = max(seen[-3:])  # H passes, the one that just ended among them
        assert scales.scale.tolist() == pytest.approx([448 / largest / 2**margin, 448 / 3 / 2**margin, 1.0])
    scales.see(GRADIENT, torch.tensor([7.0]))
    scales.update(BACKWARD)
    assert scales.scale[GRADIENT] == 57344 / 7 / 2**margin


def test_magnitudes_that_are_not_finite_leave_the_scale(job):
    scales = delayed(scales=(5.0, 5.0, 5.0)).scales
    scales.see(INPUT, torch.tensor([float("inf")]))
    scales.update(FORWARD)
    assert scales.scale.tolist() == [5.0, 5.0, 5.0]


def test_a_pass_without_training_changes_no_scale_and_keeps_no_weight(job, tensors):
    quantization = delayed()
    with torch.no_grad():
        _Product.apply(tensors[0], tensors[1], quantization, None, False, False, False)
    assert not quantization.scales.amax_history.any()
    assert quantization._weight is None
