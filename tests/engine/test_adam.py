from __future__ import annotations

import pytest
import torch

from megamask.engine.adam import Adam

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (3,), (1, 2, 4))]


def train(optimizer, params, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** (step % 5 - 3)
        optimizer.step()


def test_updates_equal_torch_adamw():
    ours, theirs = parameters(), parameters()
    train(Adam(ours, **SETTINGS), ours, 0, 50)
    train(torch.optim.AdamW(theirs, **SETTINGS, foreach=True), theirs, 0, 50)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)


def test_updates_without_bias_correction_are_those_of_the_formula():
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = Adam([param], lr=0.5, betas=(0.5, 0.75), eps=1.0, weight_decay=0.0, bias_correction=False)
    param.grad = torch.tensor([2.0, -4.0], dtype=torch.float64)
    optimizer.step()
    # first moment 0.5 * g, second 0.25 * g^2: x - lr * (g/2) / (|g|/2 + 1)
    assert param.tolist() == [1.0 - 0.5 * 1.0 / 2.0, -2.0 + 0.5 * 2.0 / 3.0]


@pytest.mark.promise("Adam's state is laid out as FusedAdam's and survives a save")
def test_state_has_fused_adams_layout():
    params = parameters()
    optimizer = Adam(params, **SETTINGS)
    train(optimizer, params, 0, 3)
    assert optimizer.param_groups[0]["step"] == 3
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


@pytest.mark.promise("Adam's state is laid out as FusedAdam's and survives a save")
def test_training_goes_on_bit_for_bit_after_a_round_trip_of_its_state():
    whole = parameters()
    train(Adam(whole, **SETTINGS), whole, 0, 6)

    params = parameters()
    first = Adam(params, **SETTINGS)
    train(first, params, 0, 3)
    second = Adam(params, **SETTINGS)
    second.load_state_dict(first.state_dict())
    train(second, params, 3, 6)
    for one, two in zip(whole, params, strict=True):
        assert torch.equal(one, two)


def test_parameters_without_a_gradient_stay():
    params = parameters()
    before = [param.detach().clone() for param in params]
    optimizer = Adam(params, **SETTINGS)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    assert params[1] not in optimizer.state


def test_l2_regularisation_is_refused():
    with pytest.raises(ValueError, match="decoupled"):
        Adam(parameters(), adam_w_mode=False)
