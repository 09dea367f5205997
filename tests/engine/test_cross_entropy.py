"""The sharded cross entropy on one rank; more ranks are held against one in tests/parallel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

EXCLUDED = [3, 8, 9]


def softmax_of(logits, targets, is_excluded, first_id=0):
    from megamask.engine.cross_entropy import ShardedSoftmax

    return ShardedSoftmax(logits.clone(), targets, is_excluded, first_id, dist.group.WORLD)  # its memory is used up


@pytest.fixture
def rows():
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(1)) * 8
    logits[0] += 300.0  # exp of it overflows
    logits[1] -= 300.0
    is_excluded = torch.zeros(10, dtype=torch.bool)
    is_excluded[EXCLUDED] = True
    return logits, torch.tensor([0, 1, 2, 4, 5, 6, 7]), is_excluded


@pytest.mark.promise("cross entropy and its gradient equal log-softmax, in float32 also for bf16 logits")
def test_values_and_gradients_are_those_of_log_softmax_in_float64(job, rows):
    logits, targets, is_excluded = rows
    softmax = softmax_of(logits, targets, is_excluded)
    gradient = softmax.logit_gradient(torch.ones(7), 0.2 * softmax.log_normalizer)

    wide = logits.double().requires_grad_()
    expected = wide.masked_fill(is_excluded, float("-inf"))
    entropy = torch.nn.functional.cross_entropy(expected, targets, reduction="none")
    normalizer = expected.logsumexp(dim=1)
    (entropy.sum() + (0.1 * normalizer**2).sum()).backward()

    torch.testing.assert_close(softmax.cross_entropy.double(), entropy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(softmax.log_normalizer.double(), normalizer, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wide.grad, rtol=1e-4, atol=1e-5)
    assert not gradient[:, EXCLUDED].any()


def test_columns_are_numbered_from_the_shards_first_id(job, rows):
    logits, targets, is_excluded = rows
    here = softmax_of(logits, targets, is_excluded)
    there = softmax_of(logits, targets + 1000, is_excluded, first_id=1000)
    assert torch.equal(here.cross_entropy, there.cross_entropy)


@pytest.mark.promise("cross entropy and its gradient equal log-softmax, in float32 also for bf16 logits")
def test_bfloat16_logits_are_scored_in_float32(job, rows):
    logits, targets, is_excluded = rows
    rounded = logits.bfloat16()
    softmax, expected = (softmax_of(given, targets, is_excluded) for given in (rounded, rounded.float()))
    assert softmax.cross_entropy.dtype == softmax.log_normalizer.dtype == torch.float32
    assert torch.equal(softmax.cross_entropy, expected.cross_entropy)
    assert torch.equal(softmax.log_normalizer, expected.log_normalizer)
    assert softmax.logit_gradient(torch.ones(7), torch.zeros(7)).dtype == torch.bfloat16
