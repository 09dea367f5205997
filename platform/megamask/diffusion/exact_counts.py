"""Masks of an exact size, as the likelihood bound and `objective.mask_counts=exact` draw them.

The definition to the bit is in docs/architecture.md, "Likelihood" and "Noise".

Shapes: b rows, s tokens of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamask.diffusion.philox import Purpose, philox4x32, uniform_words


def exact_counts(
    row_index: Tensor, num_eligible: Tensor, *, draws: int, replicate: int, key: tuple[int, int]
) -> Tensor:
    """Numbers of tokens that the draws of a replicate mask.

    Args:
        row_index: [b] int64, 0-based row of the split or text.
        num_eligible: [b] int64, n of each row, >= 1.

    Returns: [draws, b] int64 in 1..n; over a uniform random word each draw's count is uniform.
    """
    counter = (row_index & 0xFFFFFFFF, row_index >> 32, 0, int(Purpose.VALIDATION_TIME) + 256 * replicate)
    word = philox4x32(counter, key)[0]
    first = (word * num_eligible) >> 32  # k - 1
    offsets = [torch.div(member * num_eligible, draws, rounding_mode="floor") for member in range(draws)]
    return torch.stack([(first + offset) % num_eligible + 1 for offset in offsets])


def exact_count_masks(
    row_index: Tensor,
    is_eligible: Tensor,
    counts: Tensor,
    *,
    draw: int,
    key: tuple[int, int],
    purpose: Purpose = Purpose.VALIDATION_MASK,
) -> Tensor:
    """Mask the `counts` eligible positions of each row that have the smallest (word, position).

    Args:
        row_index: [b] int64. is_eligible: [b, s] bool. counts: [b] int64, at most the row's eligible positions.
        draw: replicate * draws + member; 0 in training.
        purpose: of the words.

    Returns: [b, s] bool.
    """
    words = uniform_words(row_index, is_eligible.shape[1], purpose=purpose, key=key, draw=draw)
    last = torch.full_like(words, 1 << 32)
    order = torch.where(is_eligible, words, last).argsort(dim=1, stable=True)  # equal words: the lower position first
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return is_eligible & (rank < counts[:, None])
