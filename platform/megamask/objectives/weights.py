"""Weights of masked positions, and the losses of published systems.

What trains may be weighted in any of these ways; what evaluation computes is always the bound. Only `nelbo` and
`any_order` make the training loss an estimate of it.

Shapes: b samples, r = b * views rows, s tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.diffusion.corruption import CorruptedBatch
from megamask.diffusion.schedule import NoiseSchedule

BOUNDS = frozenset(("nelbo", "any_order"))
_SMALLEST = 2.0**-32  # below it no position is masked, and a weight must stay finite


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The loss of a published system on one view of each sample, with t uniform on [0, 1).

    Args:
        schedule: p(t).
        weight: as in `position_weights`.
        is_per_scored_token: N is the number of masked positions of the global batch, not of its eligible tokens.
        has_forced_mask: a row in which nothing is masked gets one mask.
        is_stratified: t is spread over the batch.
        is_bound: the loss estimates the bound, in nats per eligible token.
    """

    schedule: NoiseSchedule
    weight: str
    is_per_scored_token: bool
    has_forced_mask: bool = False
    is_stratified: bool = False
    is_bound: bool = False


def _line(lowest: float) -> NoiseSchedule:
    return NoiseSchedule(name="linear", shape=float, shape_derivative=lambda t: 1.0, lowest=lowest, highest=1.0)


RECIPES: Mapping[str, Recipe] = {
    # arXiv:2502.09992: p = (1 - eps) t + eps, 1/p, divided by all tokens of the batch
    "llada": Recipe(schedule=_line(1e-3), weight="inverse_p", is_per_scored_token=False, is_bound=True),
    # arXiv:2406.07524: log-linear noise, so p = t and 1/t, over strata of [eps, 1]; divided by eligible tokens
    "mdlm": Recipe(
        schedule=_line(1e-3), weight="inverse_p", is_per_scored_token=False, is_stratified=True, is_bound=True
    ),
    # at least one mask, weight L/k of the realised count, divided by masked tokens
    "megadlms": Recipe(schedule=_line(0.0), weight="any_order", is_per_scored_token=True, has_forced_mask=True),
    # p = t and 1/t, divided by masked tokens
    "dream": Recipe(schedule=_line(0.0), weight="inverse_p", is_per_scored_token=True),
}


def position_weights(
    kind: str,
    noised: CorruptedBatch,
    is_eligible: Tensor,
    times: Sequence[float],
    probabilities: Sequence[float],
    *,
    cart_p: float,
) -> Tensor:
    """Weight of each position, float32 [r, s] or [r, 1]; only those of masked positions count.

    `nelbo` is p'/p of the row's view; `unit` 1; `one_minus_t` one minus the view's t; `inverse_p` 1/p of the view;
    `any_order` n/k with n eligible and k masked tokens of the row; `cart` as in `cart_weights`.

    Args:
        is_eligible: bool [b, s]. times: t of each sample. probabilities: p of each sample, of its first view.
        cart_p: of `cart`.
    """
    num_views = len(noised.x_0) // len(times)
    if kind == "nelbo":
        return noised.weight[:, None]
    if kind == "unit":
        return torch.ones_like(noised.weight)[:, None]
    if kind == "cart":
        return cart_weights(noised.is_masked, is_eligible.repeat_interleave(num_views, dim=0), p=cart_p)
    if kind == "any_order":
        num_eligible = is_eligible.sum(dim=1).repeat_interleave(num_views).to(torch.float64)
        return (num_eligible / noised.is_masked.sum(dim=1).clamp(min=1)).to(torch.float32)[:, None]
    # the second view of a pair masks with probability 1 - p, as if at level 1 - t
    values = times if kind == "one_minus_t" else probabilities
    levels = [level for value in values for level in (value, 1 - value)[:num_views]]
    found = [1 - level if kind == "one_minus_t" else 1 / max(level, _SMALLEST) for level in levels]
    return torch.tensor(found, dtype=torch.float64).to(noised.weight)[:, None]


def cart_weights(is_masked: Tensor, is_eligible: Tensor, *, p: float) -> Tensor:
    """Context-adaptive weight w_i = 1/2 * sum over visible j != i of p * (1 - p)^(|i - j| - 1). Shapes: [r, s].

    A masked token with visible neighbours weighs more than one in the middle of masks. Source: Dream, arXiv:2508.15487.
    """
    place = torch.arange(is_masked.size(1), device=is_masked.device)
    distance = (place[:, None] - place[None, :]).abs()
    kernel = torch.where(distance > 0, p * (1 - p) ** (distance - 1).clamp(min=0).to(torch.float64), 0.0)
    is_visible = (is_eligible & ~is_masked).to(torch.float64)
    return (0.5 * is_visible @ kernel).to(torch.float32)
