"""Selection of the positions that the head computes, in shapes that depend on the config alone.

Shapes: r rows, i input positions, m rows of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.objectives.base import Rows
from megamask.objectives.divergence import Noised


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """The head's rows of one micro-batch: the scored positions first and in order, then others that fill a chunk.

    Args:
        indices: int64 [m] places in the flattened r * i positions, each at most once.
        is_used: bool [m], true for scored ones.
        read: int64 [m], what the network read at the positions.
        targets, weight, group, part, noised: of the positions, as in Rows, [m].
        chunk_rows: rows that the head computes at a time; the last chunk may be smaller.
    """

    indices: Tensor
    is_used: Tensor
    read: Tensor
    targets: Tensor
    weight: Tensor
    group: Tensor
    part: Tensor | None
    noised: Noised | None
    chunk_rows: int

    @classmethod
    def of(cls, rows: Rows, *, capacity: int, num_scored: int, chunk_rows: int) -> ScoredRows:
        """Choose the rows of a micro-batch.

        Args:
            capacity: most positions that a micro-batch may score.
            num_scored: scored positions of this one, alike on all tensor-parallel ranks.
            chunk_rows: training.head_chunk_rows.
        """
        chunk_rows = min(chunk_rows, capacity)
        num_chunks = max(1, -(-num_scored // chunk_rows))  # at least one: the network's backward pass needs a gradient
        indices, is_used = select_rows(rows.is_scored, min(num_chunks * chunk_rows, capacity))

        def chosen(values: Tensor) -> Tensor:
            return values.reshape(-1).index_select(0, indices)

        return cls(
            indices=indices,
            is_used=is_used,
            read=chosen(rows.inputs),
            targets=chosen(rows.targets),
            weight=chosen(rows.weight),
            group=chosen(rows.group),
            part=None if rows.part is None else chosen(rows.part),
            noised=None
            if rows.noised is None
            else Noised(alpha=chosen(rows.noised.alpha), token_mass=chosen(rows.noised.token_mass)),
            chunk_rows=chunk_rows,
        )

    def chunks(self) -> list[slice]:
        """Places of the chunks in [m]."""
        return [slice(first, first + self.chunk_rows) for first in range(0, len(self.indices), self.chunk_rows)]


def select_rows(is_scored: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Choose the positions that the head computes: the scored ones in order, then others as filling.

    The shapes depend on the capacity alone and nothing is copied to the host, so a GPU never waits for a count. More
    scored positions than the capacity would be dropped without an error: the caller knows the count.

    Args:
        is_scored: bool [r, i].
        capacity: rows of the head, m <= r * i.

    Returns:
        (int64 [m] places in the flattened r * i positions, each at most once; bool [m], true for scored ones).

    Raises:
        ValueError: when the capacity exceeds the positions that there are.
    """
    flat = is_scored.reshape(-1)
    if not 0 <= capacity <= flat.numel():
        raise ValueError(f"the head's capacity is {capacity} rows of {flat.numel()} positions; allowed: no more")
    # A stable partition without a sort, whose order of equal elements a GPU would leave open. The n-th scored position
    # goes to place n - 1, the n-th other one to place n - 1 after all scored ones:
    #     is_scored  0 1 1 0 1
    #     place      3 0 1 4 2
    #     indices    1 2 4 0 3, of which the first `capacity` are taken
    rank_scored = flat.cumsum(0)  # int64 [r * i]
    num_scored = rank_scored[-1:] if flat.numel() else rank_scored.new_zeros(1)
    rank_other = num_scored + (~flat).cumsum(0)
    place = torch.where(flat, rank_scored, rank_other) - 1
    positions = torch.arange(flat.numel(), device=flat.device)
    indices = torch.empty_like(positions).scatter_(0, place, positions)[:capacity]
    return indices, torch.arange(capacity, device=flat.device) < num_scored


def scored_counts(is_scored: Tensor, num_micro_batches: int) -> list[int]:
    """Scored positions of each micro-batch: one copy to the host, before any forward pass. Shapes: bool [n*r, i]."""
    counts: list[int] = is_scored.reshape(num_micro_batches, -1).sum(dim=1).tolist()
    return counts
