"""The sharded cross entropy on one rank; more ranks are held against one in tests/parallel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

EXCLUDED = [3, 8, 9]


def scored(logits, targets, is_excluded, first_id=0):
    from megamask.engine.cross_entropy import sharded_cross_entropy

    # times 1: the function may use its input's memory up, a leaf's it may not
    return sharded_cross_entropy(logits * 1, targets, is_excluded, first_id, dist.group.WORLD)


@pytest.fixture
def rows():
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(1)) * 8
    logits[0] += 300.0  # exp of it overflows
    logits[1] -= 300.0
    is_excluded = torch.zeros(10, dtype=torch.bool)
    is_excluded[EXCLUDED] = True
    return logits.requires_grad_(), torch.tensor([0, 1, 2, 4, 5, 6, 7]), is_excluded


@pytest.mark.promise("cross entropy and its gradient equal log-softmax, in float32 also for bf16 logits")
def test_values_and_gradients_are_those_of_log_softmax_in_float64(job, rows):
    logits, targets, is_excluded = rows
    cross_entropy, log_normalizer = scored(logits, targets, is_excluded)
    (cross_entropy.sum() + (0.1 * log_normalizer**2).sum()).backward()

    wide = logits.detach().double().requires_grad_()
    expected = wide.masked_fill(is_excluded, float("-inf"))
    entropy = torch.nn.functional.cross_entropy(expected, targets, reduction="none")
    normalizer = expected.logsumexp(dim=1)
    (entropy.sum() + (0.1 * normalizer**2).sum()).backward()

    torch.testing.assert_close(cross_entropy.double(), entropy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(log_normalizer.double(), normalizer, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    assert not logits.grad[:, EXCLUDED].any()


def test_columns_are_numbered_from_the_shards_first_id(job, rows):
    logits, targets, is_excluded = rows
    here, _ = scored(logits, targets, is_excluded)
    there, _ = scored(logits, targets + 1000, is_excluded, first_id=1000)
    assert torch.equal(here, there)


@pytest.mark.promise("cross entropy and its gradient equal log-softmax, in float32 also for bf16 logits")
def test_bfloat16_logits_are_scored_in_float32(job, rows):
    logits, targets, is_excluded = rows
    rounded = logits.detach().bfloat16().requires_grad_()
    cross_entropy, log_normalizer = scored(rounded, targets, is_excluded)
    expected = scored(rounded.detach().float(), targets, is_excluded)
    assert cross_entropy.dtype == log_normalizer.dtype == torch.float32
    assert torch.equal(cross_entropy, expected[0]) and torch.equal(log_normalizer, expected[1])
    cross_entropy.sum().backward()
    assert rounded.grad.dtype == torch.bfloat16
