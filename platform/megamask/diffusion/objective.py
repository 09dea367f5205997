"""The training loss: the NELBO of masked diffusion as a sum divided by an exact count.

loss = sum over views and masked positions of weight * cross entropy / N, with N = eligible tokens of the global batch
times views, known before the forward pass. A micro-batch computes its share of the sum; shares add up to the same loss
and gradient on every layout (the loss law of docs/architecture.md). Unit: nats per eligible token.

Equation: -log p(x_0) <= integral over p of (1/p) E[sum over masked i of -log p_theta(x_0,i | x_t)] dp, with p = p(t)
and dp = p'(t) dt. Sources: MDLM (arXiv:2406.07524), MD4 (arXiv:2406.04329), LLaDA (arXiv:2502.09992), BD3-LM
(arXiv:2503.09573). The training integral runs over [EPS, 1 - EPS].

Shapes: r rows (views of samples), L positions, M = capacity, the rows of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.diffusion.schedule import noise_schedule
from megamask.errors import UsageError

MASK_LOGITS = ("excluded", "included")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """What is minimised; stored in model.json, because sampling and evaluation must agree with it.

    Args:
        noise_schedule: name of a schedule of `schedule.py`.
        complementary: two views of each sample, the second masking what the first leaves visible.
        mask_logit: "excluded" or "included": whether the mask token's logit enters the softmax.

    Raises:
        UsageError: for a schedule or a choice that does not exist.
    """

    noise_schedule: str
    complementary: bool
    mask_logit: str

    def __post_init__(self) -> None:
        noise_schedule(self.noise_schedule)
        if self.mask_logit not in MASK_LOGITS:
            raise UsageError(
                f"objective.mask_logit is {self.mask_logit!r}; allowed: {', '.join(MASK_LOGITS)}. Nothing was started."
            )

    @property
    def num_views(self) -> int:
        """Rows that the network sees of each sample."""
        return 2 if self.complementary else 1


def select_rows(is_masked: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Chooses the positions that the head computes: the masked ones in order, then unmasked ones as filling.

    The shapes depend on the capacity alone and nothing is copied to the host. More masked positions than the capacity
    would be dropped without a word: the caller has checked the count.

    Args:
        is_masked: bool [r, L].
        capacity: rows of the head, M <= r * L.

    Returns:
        (int64 [M] places in the flattened r * L positions, each at most once; bool [M], true for masked ones).

    Raises:
        ValueError: when the capacity exceeds the positions that there are.
    """
    flat = is_masked.reshape(-1)
    if not 0 <= capacity <= flat.numel():
        raise ValueError(f"the head's capacity is {capacity} rows of {flat.numel()} positions; allowed: no more")
    rank_masked = flat.cumsum(0)
    num_masked = rank_masked[-1:] if flat.numel() else rank_masked.new_zeros(1)
    rank_visible = num_masked + (~flat).cumsum(0)
    place = torch.where(flat, rank_masked, rank_visible) - 1
    positions = torch.arange(flat.numel(), device=flat.device)
    indices = torch.empty_like(positions).scatter_(0, place, positions)[:capacity]
    return indices, torch.arange(capacity, device=flat.device) < num_masked


def weighted_cross_entropy_sum(cross_entropy: Tensor, weight_of_row: Tensor, is_used: Tensor) -> Tensor:
    """This micro-batch's share of the loss, before the division by N: the sum of weight * cross entropy.

    Args:
        cross_entropy: [M] nats, any floating type.
        weight_of_row: float32 [M], the weight of the view that each head row belongs to.
        is_used: bool [M]; other rows count nothing, whatever they hold.

    Returns:
        Scalar float32; its gradient reaches used rows only.
    """
    used = torch.where(is_used, cross_entropy.float(), 0.0)
    return (used * weight_of_row).sum()


def squared_sum(log_normalizer: Tensor, is_used: Tensor) -> Tensor:
    """This micro-batch's share of the z-loss, before its weight and the division by N: the sum of (log Z)^2.

    It keeps the logits' normaliser Z near 1 (PaLM, arXiv:2204.02311, section 5). Unweighted: the noise level of a row
    does not matter.

    Args:
        log_normalizer: [M] log of the softmax's normaliser, over the columns that take part in it.
        is_used: bool [M]; other rows count nothing, whatever they hold.

    Returns:
        Scalar float32; its gradient reaches used rows only.
    """
    return torch.where(is_used, log_normalizer.float(), 0.0).square().sum()


def normalizer(num_eligible_tokens: int, num_views: int) -> int:
    """N: eligible tokens of the whole global batch, times views.

    Raises:
        ValueError: when it would be zero, so that the loss would not be defined.
    """
    if num_eligible_tokens < 1 or num_views < 1:
        raise ValueError(f"a loss needs eligible tokens and views, not {num_eligible_tokens} and {num_views}")
    return num_eligible_tokens * num_views
