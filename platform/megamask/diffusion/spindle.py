"""DiffusionBERT's spindle schedule: tokens that carry much information are masked first and predicted last.

At time t token i of a row is masked with probability eps + (1 - 2 eps) * (t + lambda sin(pi t) h_i), where
h_i = 1 - mean(H) / H_i compares the token's information H_i = -log(its frequency in the corpus) with the mean of its
row. h is kept within 1/(pi lambda), so that every probability rises with t; each masked token weighs p_i'/p_i^.

Information is kept in integers, so that the mean of a row is exact and every device makes the same masks.
Source: DiffusionBERT, arXiv:2211.15029, section 4.2. Its schedule depends on the token that is masked, so that what is
still visible says something about what is not: the loss does not bound anything.

Shapes: b samples, r = b * views rows, s tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megamask.diffusion.corruption import NUM_NOISE_LEVELS, CorruptedBatch
from megamask.diffusion.philox import Purpose, uniform_words
from megamask.diffusion.schedule import EPS

_RESOLUTION = 1 << 32
_UNIT = 1 << 20  # of information, per nat


def token_information(counts: Sequence[int]) -> Tensor:
    """Information of each token in units of 2^-20 nats, at least 1: int64 [V]; a token that never came counts once."""
    total = sum(counts) + len(counts)
    return torch.tensor([max(1, round(_UNIT * math.log(total / (count + 1)))) for count in counts])


def corrupt_by_information(
    x_0: Tensor,
    is_eligible: Tensor,
    sample_index: Tensor,
    times: Sequence[float],
    *,
    information: Tensor,
    strength: float,
    complementary: bool,
    mask_token_id: int,
    key: tuple[int, int],
) -> CorruptedBatch:
    """Noises samples as `corrupt` does, with a probability for each token; weight float32 [r, s], of each position.

    Args:
        information: int64 [V], of `token_information`.
        strength: lambda, above 0.
    """
    h = _relative_information(information.to(x_0.device)[x_0], is_eligible, limit=1 / (math.pi * strength))

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=x_0.device)[:, None]

    spread = 1 - 2 * EPS
    t, sine = column(times), column([math.sin(math.pi * t) for t in times])
    cosine = column([math.cos(math.pi * t) for t in times])
    limit = ((EPS + spread * (t + strength * sine * h)) * _RESOLUTION).floor().to(torch.int64).clamp(min=1)
    slope = spread * (1 + strength * math.pi * cosine * h).clamp(min=0)
    words = uniform_words(sample_index, x_0.size(1), purpose=Purpose.MASK, key=key)
    is_below, realised = words < limit, limit.to(torch.float64) / _RESOLUTION
    masks, weights, levels = [is_eligible & is_below], [slope / realised], [t]
    if complementary:
        masks.append(is_eligible & ~is_below)
        weights.append(slope / (1 - realised))
        levels.append(1 - t)
    is_masked = torch.stack(masks, dim=1).flatten(0, 1)
    clean = x_0.repeat_interleave(len(masks), dim=0)
    level = torch.cat(levels, dim=1).flatten() * NUM_NOISE_LEVELS
    return CorruptedBatch(
        x_t=clean.masked_fill(is_masked, mask_token_id),
        x_0=clean,
        is_masked=is_masked,
        weight=torch.stack(weights, dim=1).flatten(0, 1).to(torch.float32),
        noise_level=level.to(torch.int64).clamp(max=NUM_NOISE_LEVELS - 1),
    )


def _relative_information(information: Tensor, is_eligible: Tensor, *, limit: float) -> Tensor:
    """h of each token, float64 [b, s]."""
    total = torch.where(is_eligible, information, 0).sum(dim=1, keepdim=True)
    count = is_eligible.sum(dim=1, keepdim=True).clamp(min=1)
    h = 1 - total.to(torch.float64) / (count * information).to(torch.float64)
    return h.clamp(-limit, limit)
