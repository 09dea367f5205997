"""From clean rows to noised rows: which positions are masked, and how much each view weighs.

A pure function of the run key and the global sample index: any rank, layout or restart makes the same masks, and
they are never sent. Shapes: b samples, r = b * views rows, L positions.

Sources: masks and weights, MDLM (arXiv:2406.07524) and MD4 (arXiv:2406.04329); the complementary pair with weights
p'/p and p'/(1-p) keeps both views unbiased for the NELBO under every schedule (docs/architecture.md, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.diffusion.exact_counts import exact_count_masks
from megamask.diffusion.philox import Purpose, uniform_words
from megamask.diffusion.schedule import NoiseSchedule, threshold

_RESOLUTION = 1 << 32

NUM_NOISE_LEVELS = 10
"""Bands of the mask probability that the loss is reported for: [k/10, (k+1)/10)."""


@dataclass(frozen=True, kw_only=True)
class CorruptedBatch:
    """Noised rows, sample-major: A0 B0 A1 B1 ... for the pair, A0 A1 ... for the single view.

    Args:
        x_t: int64 [r, L], x_0 with the mask id at masked positions.
        x_0: int64 [r, L], the clean ids.
        is_masked: bool [r, L], what is scored.
        weight: float32 [r], of each masked position's cross entropy.
        noise_level: int64 [r], the band k of the row's mask probability, k/10 <= probability < (k+1)/10: T / 2^32 for
            view A, 1 - T / 2^32 for view B.
    """

    x_t: Tensor
    x_0: Tensor
    is_masked: Tensor
    weight: Tensor
    noise_level: Tensor


def corrupt(
    x_0: Tensor,
    is_eligible: Tensor,
    sample_index: Tensor,
    times: Sequence[float],
    *,
    schedule: NoiseSchedule,
    complementary: bool,
    mask_token_id: int,
    key: tuple[int, int],
    draw: int = 0,
    first_position: int = 0,
) -> CorruptedBatch:
    """Noises samples by the noise law.

    View A masks the eligible positions with u_pos < T, T = floor(p(t) * 2^32), and weighs p'(t) / p^ with p^ = T/2^32.
    View B of a complementary pair masks the other eligible positions and weighs p'(t) / (1 - p^).

    Args:
        x_0: int64 [b, L] clean ids.
        is_eligible: bool [b, L]; other positions are never masked.
        sample_index: int64 [b], global index of each sample.
        times: t of each sample, in [0, 1).
        schedule: how p depends on t.
        complementary: whether to make view B too.
        mask_token_id: id of a masked position.
        key: the run key.
        draw: 0 for training; independent views count up from 1.
        first_position: place in the row of column 0, for a rank that owns a part of each row.

    Raises:
        ValueError: when the shapes do not agree.
    """
    num_samples, num_positions = x_0.shape
    if is_eligible.shape != x_0.shape or sample_index.shape != (num_samples,) or len(times) != num_samples:
        raise ValueError(
            f"x_0 is {tuple(x_0.shape)}, is_eligible {tuple(is_eligible.shape)}, sample_index "
            f"{tuple(sample_index.shape)}, with {len(times)} times; allowed: [b, L], [b, L], [b] and b times"
        )
    thresholds = [threshold(schedule.mask_probability(t)) for t in times]
    words = uniform_words(
        sample_index, num_positions, purpose=Purpose.MASK, key=key, draw=draw, first_position=first_position
    )
    limits = torch.tensor(thresholds, dtype=torch.int64, device=x_0.device)
    is_below = words < limits[:, None]
    views = [is_eligible & is_below, is_eligible & ~is_below] if complementary else [is_eligible & is_below]
    is_masked = torch.stack(views, dim=1).flatten(0, 1)
    clean = x_0.repeat_interleave(len(views), dim=0)
    return CorruptedBatch(
        x_t=clean.masked_fill(is_masked, mask_token_id),
        x_0=clean,
        is_masked=is_masked,
        weight=_weights(schedule, times, thresholds, complementary=complementary).to(x_0.device),
        noise_level=torch.tensor(_noise_levels(thresholds, complementary=complementary), device=x_0.device),
    )


def corrupt_exactly(
    x_0: Tensor,
    is_eligible: Tensor,
    sample_index: Tensor,
    times: Sequence[float],
    *,
    schedule: NoiseSchedule,
    complementary: bool,
    mask_token_id: int,
    key: tuple[int, int],
) -> CorruptedBatch:
    """Noises samples with masks of an exact number instead of independent ones.

    With n eligible tokens view A masks k = 1 + floor(S * n / 2^32) of them, S = floor(s(t) * 2^32), those with the
    smallest (u_pos, pos), and weighs n/k; view B masks the other n - k and weighs n/(n - k). All n in one view, k = n,
    has weight 2 in a pair, because its other view is empty. Weights are multiplied by s'(t), so that under every
    schedule each view's share is unbiased for (1/n) * sum over k of n/k * E[sum of masked CE at k], the any-order form
    of the NELBO without a cut at EPS (MD4, arXiv:2406.04329, appendix; LLaDA, arXiv:2502.09992, equation 6).

    Arguments, shapes and errors as `corrupt`.
    """
    fractions = torch.tensor([threshold(schedule.shape(t)) for t in times], dtype=torch.int64, device=x_0.device)
    slopes = torch.tensor([schedule.shape_derivative(t) for t in times], dtype=torch.float64, device=x_0.device)
    n = is_eligible.sum(dim=1)
    counts = torch.minimum(1 + (fractions * n >> 32), n)
    is_first = exact_count_masks(sample_index, is_eligible, counts, draw=0, key=key, purpose=Purpose.MASK)
    views = [is_first, is_eligible & ~is_first] if complementary else [is_first]
    is_masked = torch.stack(views, dim=1).flatten(0, 1)
    sizes = torch.stack([counts, n - counts] if complementary else [counts], dim=1).clamp(min=1)
    weight = slopes[:, None] * n[:, None].to(torch.float64) / sizes
    if complementary:
        weight[:, 0] = torch.where(counts == n, 2 * weight[:, 0], weight[:, 0])
    clean = x_0.repeat_interleave(len(views), dim=0)
    level = sizes * NUM_NOISE_LEVELS // n[:, None].clamp(min=1)
    return CorruptedBatch(
        x_t=clean.masked_fill(is_masked, mask_token_id),
        x_0=clean,
        is_masked=is_masked,
        weight=weight.flatten().to(torch.float32),
        noise_level=level.flatten().clamp(max=NUM_NOISE_LEVELS - 1),
    )


def _noise_levels(thresholds: Sequence[int], *, complementary: bool) -> list[int]:
    """Integers only, so that no rounding moves a row from one band to another."""
    of_rows = [(limit, _RESOLUTION - limit) if complementary else (limit,) for limit in thresholds]
    return [limit * NUM_NOISE_LEVELS // _RESOLUTION for limits in of_rows for limit in limits]


def _weights(
    schedule: NoiseSchedule, times: Sequence[float], thresholds: Sequence[int], *, complementary: bool
) -> Tensor:
    """float32 [r] on the host, divided in float64: the probabilities are those of the thresholds, not of p(t)."""
    weights = []
    for t, limit in zip(times, thresholds, strict=True):
        realised = max(limit, 1) / _RESOLUTION  # a threshold of 0 masks nothing, and its weight must stay finite
        weights.append(schedule.derivative(t) / realised)
        if complementary:
            weights.append(schedule.derivative(t) / (1 - realised))
    return torch.tensor(weights, dtype=torch.float64).to(torch.float32)
