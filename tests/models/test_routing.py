"""The choice between tokens and experts, against loops over tokens that follow the papers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.errors import UsageError
from megamask.models.experts import ExpertSpec
from megamask.models.routing import balance_loss, experts_choose, moved_bias, router_scores, tokens_choose

PLAIN = ExpertSpec(num_experts=8, topk=2, ffn_hidden_size=16)
GROUPED = dataclasses.replace(PLAIN, score="sigmoid", scale=2.5, num_groups=4, topk_groups=2, topk=4, has_bias=True)


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 1000), normalizes=st.booleans())
def test_softmax_router_takes_the_topk_and_weighs_them(seed, normalizes):
    experts = dataclasses.replace(PLAIN, normalizes=normalizes)
    scores = router_scores(logits(5, 8, seed=seed), experts)
    weights, is_chosen = tokens_choose(scores, experts)
    for token, of_token in enumerate(scores):
        best = sorted(range(8), key=lambda expert: -float(of_token[expert]))[:2]
        assert is_chosen[token].nonzero().flatten().tolist() == sorted(best)
        total = sum(float(of_token[expert]) for expert in best) if normalizes else 1.0
        for expert in range(8):
            expected = float(of_token[expert]) / total if expert in best else 0.0
            assert float(weights[token, expert]) == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 1000))
def test_group_limited_router_chooses_by_biased_scores_and_weighs_by_plain_ones(seed):
    scores, bias = router_scores(logits(5, 8, seed=seed), GROUPED), 0.3 * logits(8, seed=seed + 5000)
    weights, is_chosen = tokens_choose(scores, GROUPED, bias)
    for token, of_token in enumerate(scores):
        found = of_token + bias
        pairs = [found[2 * group : 2 * group + 2].tolist() for group in range(4)]
        groups = sorted(range(4), key=lambda group: -sum(pairs[group]))[:2]
        allowed = [expert for expert in range(8) if expert // 2 in groups]  # topk is 4: all of both groups
        assert is_chosen[token].nonzero().flatten().tolist() == allowed
        total = sum(float(of_token[expert]) for expert in allowed)
        for expert in allowed:
            assert float(weights[token, expert]) == pytest.approx(2.5 * float(of_token[expert]) / total, rel=1e-5)


def test_of_equal_scores_the_first_expert_and_the_first_token_are_chosen():
    _, is_chosen = tokens_choose(torch.full((3, 8), 0.125), PLAIN)
    assert is_chosen.nonzero()[:, 1].tolist() == [0, 1] * 3
    choosing = dataclasses.replace(PLAIN, choice="experts")
    taken = experts_choose(torch.full((1, 8, 8), 0.125), choosing)
    assert taken[0].nonzero()[:, 0].tolist() == [0] * 8 + [1] * 8


@pytest.mark.promise("expert choice looks at the tokens of one row, never at other rows of a micro-batch")
def test_experts_take_equally_many_tokens_of_each_row_whatever_rows_are_beside_it():
    choosing = dataclasses.replace(PLAIN, choice="experts")
    scores = router_scores(logits(3, 10, 8), choosing)
    taken = experts_choose(scores, choosing)
    assert taken.sum(dim=1).tolist() == [[3] * 8] * 3  # ceil(10 * 2 / 8)
    for row in range(3):
        assert torch.equal(experts_choose(scores[row : row + 1], choosing)[0], taken[row])
        for expert in range(8):
            best = scores[row, :, expert].topk(3).indices
            assert sorted(best.tolist()) == taken[row, :, expert].nonzero().flatten().tolist()


def test_balance_loss_is_one_for_a_row_in_balance_and_adds_up_over_parts_of_a_row():
    counts = torch.full((2, 8), 4)
    shares = torch.full((2, 8), 2.0)
    assert float(balance_loss(shares, counts, PLAIN, 16)) == pytest.approx(2.0)  # 1 for each of two rows
    scores = router_scores(logits(1, 16, 8), PLAIN)
    counts = tokens_choose(scores[0], PLAIN)[1].sum(dim=0)[None]
    complete = balance_loss(scores.sum(dim=1), counts, PLAIN, 16)
    parts = [balance_loss(scores[:, part].sum(dim=1), counts, PLAIN, 16) for part in (slice(0, 5), slice(5, 16))]
    assert float(sum(parts)) == pytest.approx(float(complete), rel=1e-6)
    expected = sum(8 / (2 * 16) * int(counts[0, i]) * float(scores[0, :, i].mean()) for i in range(8))
    assert float(complete) == pytest.approx(expected, rel=1e-6)


def test_bias_moves_towards_experts_with_few_tokens():
    counts = torch.tensor([0, 5, 10, 5])
    moved = moved_bias(torch.zeros(4), counts, 0.01)
    assert moved.tolist() == pytest.approx([0.01, 0.0, -0.01, 0.0])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"topk": 9}, "model.router_topk is 9"),
        ({"num_groups": 3}, "model.router_groups is 3"),
        ({"topk_groups": 2}, "model.router_topk_groups is 2"),
        ({"num_groups": 8, "topk": 4}, "model.router_topk_groups is 1"),
        ({"choice": "experts", "has_bias": True}, "model.router_expert_bias is"),
    ],
)
def test_numbers_that_contradict_one_another_are_refused(changes, key):
    with pytest.raises(UsageError, match=key):
        dataclasses.replace(PLAIN, **changes)


def test_record_of_the_experts_reads_back():
    assert ExpertSpec.from_json(GROUPED.to_json()) == GROUPED
    with pytest.raises(ValueError, match="expert fields differ: topk"):
        ExpertSpec.from_json({name: value for name, value in GROUPED.to_json().items() if name != "topk"})
    with pytest.raises(ValueError, match="expert field topk is True"):
        ExpertSpec.from_json(GROUPED.to_json() | {"topk": True})
