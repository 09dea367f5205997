from __future__ import annotations

import dataclasses

import pytest
import torch

from megamask.engine.selection import ScoredRows
from megamask.objectives.base import scored_rows
from support import engine_cases as cases
from support.engine_cases import OPTIONS

NUM_ROWS, WIDTH = 4, OPTIONS.hidden_size


def chosen(is_scored, chunk_rows, num_scored=None):
    """Rows of the head for 4 rows of 32 positions with targets, weights and two parts of their own."""
    generator = torch.Generator().manual_seed(2)
    rows = scored_rows(is_scored, torch.randint(0, 58, is_scored.shape, generator=generator), is_scored)
    rows = dataclasses.replace(
        rows,
        weight=torch.rand(is_scored.shape, generator=generator),
        part=torch.randint(0, 2, is_scored.shape, generator=generator),
    )
    num_scored = int(is_scored.sum()) if num_scored is None else num_scored
    return rows, ScoredRows.of(rows, capacity=is_scored.numel(), num_scored=num_scored, chunk_rows=chunk_rows)


def share(scores):
    """A loss that uses everything: weighted cross entropies of one part, squares of log Z."""
    used = torch.where(scores.used_by(1), scores.cross_entropy, 0.0)
    return (used * scores.weight).sum() + 0.1 * torch.where(scores.is_used, scores.log_normalizer, 0.0).square().sum()


def masks(scored_fraction):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(NUM_ROWS, cases.SEQUENCE_LENGTH, generator=generator) < scored_fraction


def states(dtype=torch.float32):
    return torch.randn(cases.SEQUENCE_LENGTH, NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)


def gradients(engine, is_scored, chunk_rows, dtype=torch.float32):
    """Loss, gradient of the hidden states and of the (tied) output weight, from the engine's head."""
    head, network = engine._rank_model.head, engine._rank_model.network
    hidden, weight = states(dtype).requires_grad_(), network.output_weight()
    weight.grad, weight.main_grad = None, torch.zeros_like(weight, dtype=torch.float32)
    loss, scores = head.loss(network, hidden, chosen(is_scored, chunk_rows)[1], share)
    (3 * loss).backward()  # a scale that comes from behind
    of_weight = weight.main_grad if dtype != torch.float32 else weight.main_grad + (weight.grad or 0.0)
    return loss.detach(), hidden.grad, of_weight, scores


def expected_gradients(engine, is_scored):
    """The same from logits of every position in float64, by autograd alone."""
    head, network = engine._rank_model.head, engine._rank_model.network
    rows = chosen(is_scored, 1)[0]
    hidden = states().double().requires_grad_()
    weight = network.output_weight().detach().double().requires_grad_()
    logits = (hidden.transpose(0, 1) @ weight.t()).masked_fill(head._is_excluded, float("-inf"))
    log_normalizer = logits.logsumexp(dim=-1)
    entropy = log_normalizer - logits.gather(-1, rows.targets.unsqueeze(-1)).squeeze(-1)
    loss = torch.where(is_scored & (rows.part == 1), entropy * rows.weight, 0.0).sum()
    loss = loss + 0.1 * torch.where(is_scored, log_normalizer, 0.0).square().sum()
    (3 * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.promise("the head's chunks give the loss and gradients of logits of every position, whatever their size")
@pytest.mark.parametrize("chunk_rows", [1, 7, 32, 1000])
@pytest.mark.parametrize("scored_fraction", [0.0, 0.3, 1.0])
def test_chunks_give_loss_and_gradients_of_all_logits(build, chunk_rows, scored_fraction):
    engine, is_scored = build(OPTIONS), masks(scored_fraction)
    found = gradients(engine, is_scored, chunk_rows)[:3]
    for ours, theirs in zip(found, expected_gradients(engine, is_scored), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_chunks_without_a_scored_row_are_not_computed():
    is_scored = masks(0.3)
    count = int(is_scored.sum())
    for chunk_rows in (1, 7, 16, 1000):
        scored = chosen(is_scored, chunk_rows)[1]
        size = min(chunk_rows, is_scored.numel())
        assert len(scored.indices) == min(-(-count // size) * size, is_scored.numel())
        assert int(scored.is_used.sum()) == count
        assert all(scored.is_used[chunk].any() for chunk in scored.chunks())
    assert len(chosen(torch.zeros_like(is_scored), 7)[1].chunks()) == 1


def test_bf16_weight_gradient_is_summed_in_float32_over_the_chunks(build):
    """With 128 chunks a bf16 sum would lose 2^-8 of itself again and again."""
    engine, is_scored = build(OPTIONS, compute="bf16"), masks(1.0)
    of_weight = gradients(engine, is_scored, 1, torch.bfloat16)[2]
    expected = expected_gradients(engine, is_scored)[2]
    assert (of_weight - expected).norm() / expected.norm() < 2**-7


def test_excluded_columns_get_no_gradient(build):
    """The mask token's row of the output layer, and the padding rows, stay out of the softmax."""
    engine = build(cases.PLAIN, clip_grad_norm=0.0)
    cases.take_step(engine, 1, learning_rate=0.0)
    gradient = dict(engine._rank_model.network.named_parameters())["output_layer.weight"].main_grad
    assert not gradient[60:].any()  # the mask id is 60, padding from 61 on
    assert gradient[:60].any(dim=1).all()


@pytest.mark.parametrize("complementary", [True, False], ids=["pair", "single"])
def test_a_step_is_the_same_whatever_the_size_of_chunks(build, complementary):
    goal = cases.objective(complementary=complementary)
    wanted = cases.take_step(build(goal=goal, z_loss_weight=0.1), 1)
    for chunk_rows in (1, 5, 32):
        report = cases.take_step(build(goal=goal, z_loss_weight=0.1, head_chunk_rows=chunk_rows), 1)
        assert report.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert report.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
    assert cases.take_step(build(goal=goal, z_loss_weight=0.1, head_chunk_rows=32 * 2), 1).loss == wanted.loss
