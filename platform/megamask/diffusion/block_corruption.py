"""Masks of block diffusion: a noise level for each block of a row, one view or a complementary pair in each block.

Pure functions of the run key and the global sample index, like corruption.py. The definition to the bit is in
docs/architecture.md, "Block diffusion". Source: BD3-LM, arXiv:2503.09573.

Shapes: b samples, r = b * views rows, s tokens of a row, k blocks of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.diffusion.corruption import NUM_NOISE_LEVELS
from megamask.diffusion.philox import Purpose, philox4x32, uniform_words
from megamask.diffusion.schedule import NoiseSchedule, threshold

_RESOLUTION = 1 << 32
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class BlockNoise:
    """Masks of each row and their weights; all [r, s], sample-major, the views of a sample side by side.

    Args:
        is_masked: bool.
        weight: float32, of a masked position's cross entropy.
        noise_level: int64, the band of the block's mask probability in that view.
    """

    is_masked: Tensor
    weight: Tensor
    noise_level: Tensor


def corrupt_blocks(
    is_eligible: Tensor,
    blocks: Tensor,
    sample_index: Tensor,
    times: Sequence[float],
    *,
    schedule: NoiseSchedule,
    block_time: str,
    largest_time: float = 1.0,
    complementary: bool,
    has_forced_mask: bool,
    is_clipped: bool,
    key: tuple[int, int],
) -> BlockNoise:
    """Masks of some samples.

    View A masks the eligible positions of a block with u_pos < T(t of the block) and weighs p'/p^; view B masks the
    others and weighs p'/(1 - p^). Over a clipped schedule the weight is s'(t)/p^, as in BD3-LM: no bound.

    Args:
        is_eligible: bool [b, s]. blocks: int64 [b, s], number of each position's block in its row, ascending.
        times: t of each sample.
        block_time: as in `block_times`.
        largest_time: factor of each block's t, below 1 while the mask ratio warms up.
        has_forced_mask: in view A a block in which nothing is masked masks its eligible position with the smallest
            (u_pos, pos).
    """
    of_rows = block_times(sample_index, times, int(blocks.max()) + 1, block_time=block_time, key=key)
    of_blocks = [[t * largest_time for t in row] for row in of_rows]
    limits = [[max(threshold(schedule.mask_probability(t)), 1) for t in row] for row in of_blocks]
    slope = schedule.shape_derivative if is_clipped else schedule.derivative
    slopes = torch.tensor([[slope(t) for t in row] for row in of_blocks], dtype=torch.float64)
    limit = torch.tensor(limits, dtype=torch.int64)
    realised = limit.to(torch.float64) / _RESOLUTION
    limit_at = limit.to(blocks.device).gather(1, blocks)
    words = uniform_words(sample_index, blocks.size(1), purpose=Purpose.MASK, key=key)
    is_masked = is_eligible & (words < limit_at)
    if has_forced_mask:
        is_masked = _with_a_mask_in_each_block(is_masked, is_eligible, blocks, words)

    def at(of_block: Tensor) -> Tensor:
        return of_block.to(torch.float32).to(blocks.device).gather(1, blocks)

    level = limit_at * NUM_NOISE_LEVELS // _RESOLUTION
    if not complementary:
        return BlockNoise(is_masked=is_masked, weight=at(slopes / realised), noise_level=level)
    other = (_RESOLUTION - limit_at) * NUM_NOISE_LEVELS // _RESOLUTION
    return BlockNoise(
        is_masked=torch.stack((is_masked, is_eligible & ~is_masked), dim=1).flatten(0, 1),
        weight=torch.stack((at(slopes / realised), at(slopes / (1 - realised))), dim=1).flatten(0, 1),
        noise_level=torch.stack((level, other), dim=1).flatten(0, 1),
    )


def block_times(
    sample_index: Tensor, times: Sequence[float], num_blocks: int, *, block_time: str, key: tuple[int, int]
) -> list[list[float]]:
    """t of each block, [b][k].

    Args:
        block_time: "block": frac(t + frac(k * golden ratio)), stratified over the batch for each k and spread within a
            row, for any number of blocks. "sequence": the sample's t. "independent": 53 bits of Philox, purpose 5,
            index = sample index, word = block.
    """
    if block_time == "independent":
        block = torch.arange(num_blocks, device=sample_index.device)[None]
        low, high = (sample_index & 0xFFFFFFFF)[:, None], (sample_index >> 32)[:, None]
        words = philox4x32((low, high, block, int(Purpose.BLOCK_TIME)), key)
        drawn: list[list[float]] = ((words[0] * 2**21 + words[1] // 2**11).to(torch.float64) * 2.0**-53).tolist()
        return drawn
    shifts = [k * _GOLDEN % 1.0 if block_time == "block" else 0.0 for k in range(num_blocks)]
    return [[(t + shift) % 1.0 for shift in shifts] for t in times]


def rank_in_blocks(blocks: Tensor, words: Tensor, is_member: Tensor) -> Tensor:
    """Rank of each member among those of its block by (word, position), from 0; int64 [b, s]. Others come behind."""
    order = (blocks * (2 * _RESOLUTION) + torch.where(is_member, words, _RESOLUTION)).argsort(dim=1, stable=True)
    place = torch.arange(blocks.size(1), device=blocks.device)
    rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
    first = torch.searchsorted(blocks.contiguous(), blocks.contiguous())  # each block's first position
    return rank - first


def _with_a_mask_in_each_block(is_masked: Tensor, is_eligible: Tensor, blocks: Tensor, words: Tensor) -> Tensor:
    num_masked = torch.zeros(len(blocks), int(blocks.max()) + 1, dtype=torch.int64, device=blocks.device)
    num_masked = num_masked.scatter_add(1, blocks, is_masked.to(torch.int64))
    is_first = is_eligible & (rank_in_blocks(blocks, words, is_eligible) == 0)
    return is_masked | (is_first & (num_masked.gather(1, blocks) == 0))
