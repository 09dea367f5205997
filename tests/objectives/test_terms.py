"""The loss as a sum: which rows are scored, how shares add up, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.diffusion.corruption import corrupt
from megamask.diffusion.philox import run_key
from megamask.diffusion.schedule import noise_schedule
from megamask.engine.selection import select_rows
from megamask.errors import UsageError
from support.terms import normalizer, weighted_cross_entropy_sum


@given(bits=st.lists(st.booleans(), min_size=12, max_size=12), capacity=st.integers(0, 12))
def test_select_rows_takes_masked_places_first_and_in_order(bits: list[bool], capacity: int) -> None:
    indices, is_used = select_rows(torch.tensor(bits).reshape(3, 4), capacity)
    masked, visible = ([place for place in range(12) if bits[place] is wanted] for wanted in (True, False))
    assert indices.tolist() == (masked + visible)[:capacity]
    assert is_used.tolist() == [row < len(masked) for row in range(capacity)]


def test_select_rows_refuses_a_capacity_beyond_the_positions() -> None:
    with pytest.raises(ValueError, match="capacity is 9 rows of 8"):
        select_rows(torch.zeros(2, 4, dtype=torch.bool), 9)


@pytest.mark.promise("a full row's pair fills the head exactly")
def test_a_full_rows_pair_fills_the_capacity_exactly() -> None:
    x_0 = torch.zeros(3, 16, dtype=torch.int64)
    pair = corrupt(
        x_0,
        x_0 == 0,
        torch.arange(3),
        [0.1, 0.5, 0.9],
        schedule=noise_schedule("linear"),
        complementary=True,
        mask_token_id=1,
        key=run_key(1),
    )
    indices, is_used = select_rows(pair.is_masked, capacity=3 * 16)
    assert bool(is_used.all())
    assert indices.tolist() == pair.is_masked.flatten().nonzero().flatten().tolist()


@pytest.mark.promise("loss shares add up to the loss and its gradient for every split of a batch")
@given(split=st.integers(0, 6), seed=st.integers(0, 100))
def test_shares_add_up_to_the_loss_and_its_gradient_for_every_split(split: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    is_masked = torch.rand(6, 8, generator=generator) < 0.5
    losses = torch.rand(6, 8, generator=generator, requires_grad=True)
    weight = torch.rand(6, generator=generator) + 0.5
    whole = (losses * weight[:, None])[is_masked].sum() / normalizer(24, 2)
    (expected,) = torch.autograd.grad(whole, losses)
    total = torch.zeros(())
    for rows in (slice(0, split), slice(split, 6)):
        indices, is_used = select_rows(is_masked[rows], capacity=is_masked[rows].numel())
        share = weighted_cross_entropy_sum(losses[rows].flatten()[indices], weight[rows][indices // 8], is_used)
        total = total + share / normalizer(24, 2)
    (gradient,) = torch.autograd.grad(total, losses)
    assert float(total.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def test_unused_rows_count_nothing_whatever_they_hold() -> None:
    losses = torch.tensor([1.0, 2.0, float("inf"), float("nan")], requires_grad=True)
    total = weighted_cross_entropy_sum(losses, torch.tensor([3.0, 5.0, 7.0, 11.0]), torch.arange(4) < 2)
    total.backward()
    assert float(total.detach()) == 13.0
    assert losses.grad is not None
    assert losses.grad.tolist() == [3.0, 5.0, 0.0, 0.0]


def test_the_sum_is_float32_when_the_cross_entropy_is_not() -> None:
    losses = torch.full((300,), 1.0, dtype=torch.bfloat16)
    total = weighted_cross_entropy_sum(losses, torch.ones(300), torch.ones(300, dtype=torch.bool))
    assert (total.dtype, float(total)) == (torch.float32, 300.0)


def test_normalizer_is_tokens_times_views_and_never_zero() -> None:
    assert normalizer(10, 2) == 20
    for arguments in ((0, 2), (3, 0)):
        with pytest.raises(UsageError, match="eligible"):
            normalizer(*arguments)
