"""The choice between tokens and experts: pure functions on a router's logits, for the engine and the reference network.

Shapes: n tokens, b rows, s positions of a row, e experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamask.models.experts import ExpertSpec


def router_scores(logits: Tensor, experts: ExpertSpec) -> Tensor:
    """Affinity of each token to each expert, float32 [..., e], from logits of the same shape."""
    wide = logits.float()
    return wide.sigmoid() if experts.score == "sigmoid" else wide.softmax(dim=-1)


def tokens_choose(scores: Tensor, experts: ExpertSpec, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each token's topk experts, as (weights float32 [n, e], is chosen bool [n, e]); weights elsewhere are 0.

    Of equal scores the expert with the lower number is chosen, on every device.

    Args:
        scores: [n, e] of `router_scores`.
        bias: [e], added for the choice and left out of the weights.
    """
    found = scores.detach() if bias is None else scores.detach() + bias
    if experts.num_groups > 1:
        found = _in_best_groups(found, experts)
    indices = found.sort(dim=1, descending=True, stable=True).indices[:, : experts.topk]
    is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, True)
    weights = scores.masked_fill(~is_chosen, 0.0)
    if experts.normalizes:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return weights * experts.scale, is_chosen


def _in_best_groups(found: Tensor, experts: ExpertSpec) -> Tensor:
    """The scores, -inf outside a token's best groups: those whose best topk / topk_groups scores have the largest sum.

    Source: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2.
    """
    num_tokens = found.size(0)
    of_group = found.view(num_tokens, experts.num_groups, -1)
    best = of_group.sort(dim=2, descending=True).values[:, :, : experts.topk // experts.topk_groups].sum(dim=2)
    groups = best.sort(dim=1, descending=True, stable=True).indices[:, : experts.topk_groups]
    is_best = torch.zeros_like(best, dtype=torch.bool).scatter_(1, groups, True)
    return of_group.masked_fill(~is_best.unsqueeze(2), float("-inf")).view(num_tokens, -1)


def experts_choose(scores: Tensor, experts: ExpertSpec) -> Tensor:
    """Bool [b, s, e]: the tokens of each row that each expert takes, the same number on every row.

    A choice inside a row does not depend on which rows share a micro-batch. Of equal scores the earlier token is taken.
    Source: expert choice, arXiv:2202.09368.

    Args:
        scores: [b, s, e] of complete rows.
    """
    order = scores.detach().sort(dim=1, descending=True, stable=True).indices
    taken = order[:, : experts.capacity(scores.size(1))]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, taken, True)


def balance_loss(shares: Tensor, counts: Tensor, experts: ExpertSpec, num_positions: int) -> Tensor:
    """The sum over rows of sum_i f_i * P_i, from any part of the rows' tokens; a scalar, 1 for a row in balance.

    f_i = e / (topk * s) * tokens of the row sent to expert i; P_i = mean over the row of expert i's share of a token's
    scores (DeepSeek-V3, arXiv:2412.19437, equations 17-20). Only P has a gradient, and it is a sum over tokens: parts
    of a row may be added up.

    Args:
        shares: float32 [b, e], sums over the given tokens of each row of scores that sum to 1 for a token.
        counts: int64 [b, e], tokens of each complete row sent to each expert.
        num_positions: s, of a complete row.
    """
    frequency = counts.to(torch.float32) * (experts.num_experts / (experts.topk * num_positions))
    return (frequency * shares).sum() / num_positions


def moved_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The bias after a step: up for experts with fewer tokens than the mean, down for those with more.

    The decision is one of integers, so that every layout makes the same. Source: arXiv:2408.15664.

    Args:
        bias: float32 [e].
        counts: int64 [e], tokens of the global batch sent to each expert.
    """
    return bias + rate * torch.sign(counts.sum() - counts * counts.numel()).to(bias.dtype)
