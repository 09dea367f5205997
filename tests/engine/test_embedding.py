"""The lookup of bf16 networks: the gradient of every row is a float32 sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megamask.engine.embedding import add_rows

NUM_ROWS, HIDDEN, MASK = 1000, 64, 999


def long_row(num_positions: int = 8192) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of which half are one id, and bf16 gradients with a mean, as a network's have."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, NUM_ROWS, (num_positions,), generator=generator)
    ids[torch.rand(num_positions, generator=generator) < 0.5] = MASK
    gradient = torch.randn(num_positions, HIDDEN, generator=generator) * 1e-3 + 3e-4
    return ids, gradient.bfloat16()


def exact(ids: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The one-hot matrix product, in float64."""
    return F.one_hot(ids, NUM_ROWS).double().T @ gradient.double()


def row_errors(total: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative error of each row that any position has."""
    norm = expected.norm(dim=1)
    return ((total.double() - expected).norm(dim=1) / norm)[norm > 0]


@pytest.mark.parametrize("frequent_row", [MASK, -1, NUM_ROWS, 17], ids=["mask", "below", "above", "another"])
def test_gradient_of_every_row_is_a_float32_sum(frequent_row):
    ids, gradient = long_row()
    total = torch.zeros(NUM_ROWS, HIDDEN)
    add_rows(total, ids, torch.ones_like(ids, dtype=torch.bool), gradient, frequent_row=frequent_row)
    assert row_errors(total, exact(ids, gradient)).max() < 1e-5


def test_torchs_lookup_in_bf16_is_what_the_sum_replaces():
    """The case is long enough to show the fault: without it the test above would prove nothing."""
    ids, gradient = long_row()
    weight = torch.zeros(NUM_ROWS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    F.embedding(ids, weight).backward(gradient)
    assert row_errors(weight.grad, exact(ids, gradient)).max() > 0.1


def test_positions_of_other_shards_are_left_out_and_sums_are_added():
    ids, gradient = long_row(512)
    first, size = 300, 400
    is_mine = (ids >= first) & (ids < first + size)
    total = torch.full((size, HIDDEN), 2.0)
    add_rows(total, ids - first, is_mine, gradient, frequent_row=MASK - first)
    torch.testing.assert_close(total.double() - 2.0, exact(ids, gradient)[first : first + size], atol=1e-6, rtol=0)


def test_sums_repeat_bit_for_bit():
    ids, gradient = long_row()
    totals = [torch.zeros(NUM_ROWS, HIDDEN) for _ in range(3)]
    for total in totals:
        add_rows(total, ids, torch.ones_like(ids, dtype=torch.bool), gradient, frequent_row=MASK)
    assert all(torch.equal(totals[0], total) for total in totals)


def test_gradient_that_is_not_finite_reaches_the_table():
    ids, gradient = long_row(64)
    gradient[int((ids == MASK).nonzero()[0])] = float("nan")
    total = torch.zeros(NUM_ROWS, HIDDEN)
    add_rows(total, ids, torch.ones_like(ids, dtype=torch.bool), gradient, frequent_row=MASK)
    assert total[MASK].isnan().all() and not total[:MASK].isnan().any()


@pytest.mark.parametrize("has_buffer", [True, False])
def test_lookup_gives_the_tables_rows_and_adds_to_the_buffer_beside_another_gradient(job, has_buffer):
    """A tied output layer's gradient comes by autograd, the lookup's goes to the buffer: both must arrive."""
    from megamask.engine.embedding import _Lookup

    ids, gradient = long_row(256)
    weight = torch.randn(NUM_ROWS, HIDDEN).bfloat16().requires_grad_()
    if has_buffer:
        weight.main_grad = torch.ones(NUM_ROWS, HIDDEN)
    embedded = _Lookup.apply(weight, ids.view(4, 64), MASK)
    assert torch.equal(embedded.view(256, HIDDEN), weight[ids])
    torch.autograd.backward([embedded, weight], [gradient.view(4, 64, HIDDEN), torch.full_like(weight, 0.5)])
    if has_buffer:
        assert torch.equal(weight.grad, torch.full_like(weight, 0.5))
        torch.testing.assert_close(weight.main_grad.double() - 1, exact(ids, gradient), atol=1e-6, rtol=0)
    else:
        torch.testing.assert_close(weight.grad.double() - 0.5, exact(ids, gradient), atol=4e-3, rtol=0)
