"""Weights of masked positions, and the losses of published systems.

What trains may be weighted in any of these ways; what evaluation computes is always the bound. Only `nelbo` and
`any_order` make the training loss an estimate of it.

Shapes: b samples, r = b * views rows, s tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megamask.diffusion.corruption import CorruptedBatch
from megamask.diffusion.schedule import NoiseSchedule, noise_schedule

BOUNDS = frozenset(("nelbo", "any_order"))
_SMALLEST = 2.0**-32  # below it no position is masked, and a weight must stay finite


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The loss of a published system on one view of each sample, with t uniform on [0, 1).

    Args:
        schedule: p(t).
        schedules: names of `objective.noise_schedule` whose shape replaces that of `schedule`; its ends stay.
        weight: as in `position_weights`.
        is_per_scored_token: N is the number of masked positions of the global batch, not of its eligible tokens.
        has_forced_mask: a row in which nothing is masked gets one mask.
        is_stratified: t is spread over the batch.
        is_bound: the loss estimates the bound, in nats per eligible token.
        has_reconstruction: the loss has the cost of what is masked at t = 0, under a uniform guess: p(0) * log V.
    """

    schedule: NoiseSchedule
    weight: str
    is_per_scored_token: bool
    schedules: tuple[str, ...] = ("linear",)
    has_forced_mask: bool = False
    is_stratified: bool = False
    is_bound: bool = False
    has_reconstruction: bool = False

    def schedule_of(self, name: str) -> NoiseSchedule:
        """p(t) of the recipe with the shape of a named noise schedule."""
        if self.schedules == ("linear",):
            return self.schedule
        return replace(noise_schedule(name), lowest=self.schedule.lowest, highest=self.schedule.highest)


def _line(lowest: float, highest: float = 1.0) -> NoiseSchedule:
    return NoiseSchedule(name="linear", shape=float, shape_derivative=lambda t: 1.0, lowest=lowest, highest=highest)


RECIPES: Mapping[str, Recipe] = {
    # arXiv:2502.09992: p = (1 - eps) t + eps, 1/p, divided by all tokens of the batch
    "llada": Recipe(schedule=_line(1e-3), weight="inverse_p", is_per_scored_token=False, is_bound=True),
    # arXiv:2406.07524: log-linear noise, so p = t and 1/t, over strata of [eps, 1]; divided by eligible tokens
    "mdlm": Recipe(
        schedule=_line(1e-3), weight="inverse_p", is_per_scored_token=False, is_stratified=True, is_bound=True
    ),
    # arXiv:2406.04329: alpha = (1 - 2 eps) a + eps, weight alpha'/(1 - alpha), t over strata, a reconstruction term
    "md4": Recipe(
        schedule=_line(1e-4, 1 - 1e-4),
        schedules=("linear", "cosine_md4"),
        weight="nelbo",
        is_per_scored_token=False,
        is_stratified=True,
        is_bound=True,
        has_reconstruction=True,
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
    schedule: NoiseSchedule,
    *,
    cart_p: float,
) -> Tensor:
    """Weight of each position, float32 [r, s] or [r, 1]; only those of masked positions count.

    `nelbo` is p'/p of the row's view; `unit` 1; `one_minus_t` one minus the view's t; `inverse_p` 1/p of the view;
    `any_order` n/k with n eligible and k masked tokens of the row, times the slope s'(t), so that it bounds under every
    schedule; `cart` as in `cart_weights`.

    Args:
        is_eligible: bool [b, s]. times: t of each sample. schedule: p(t), of its first view.
        cart_p: of `cart`.
    """
    num_views = len(noised.x_0) // len(times)
    if kind == "nelbo":
        return noised.weight if noised.weight.dim() == 2 else noised.weight[:, None]
    if kind == "unit":
        return torch.ones_like(noised.weight)[:, None]
    if kind == "cart":
        return cart_weights(noised.is_masked, is_eligible.repeat_interleave(num_views, dim=0), p=cart_p)
    if kind == "any_order":
        num_eligible = is_eligible.sum(dim=1).repeat_interleave(num_views).to(torch.float64)
        slopes = torch.tensor([schedule.shape_derivative(t) for t in times], dtype=torch.float64)
        slopes = slopes.to(num_eligible).repeat_interleave(num_views)
        return (num_eligible / noised.is_masked.sum(dim=1).clamp(min=1) * slopes).to(torch.float32)[:, None]
    # the second view of a pair masks with probability 1 - p, as if at level 1 - t
    values = times if kind == "one_minus_t" else [schedule.mask_probability(t) for t in times]
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
