"""Which positions the head computes, in a shape that depends on the capacity alone."""

from __future__ import annotations

import torch
from torch import Tensor

from megamask.errors import UsageError


def select_rows(is_scored: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Chooses the positions that the head computes: the scored ones in order, then others as filling.

    The shapes depend on the capacity alone and nothing is copied to the host, so a GPU never waits for a count. More
    scored positions than the capacity would be dropped without an error: the caller has checked the count.

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
    # A stable partition without a sort: the n-th scored position goes to place n - 1, the n-th other one to the place
    # n - 1 after all scored ones.
    rank_scored = flat.cumsum(0)
    num_scored = rank_scored[-1:] if flat.numel() else rank_scored.new_zeros(1)
    rank_other = num_scored + (~flat).cumsum(0)
    place = torch.where(flat, rank_scored, rank_other) - 1
    positions = torch.arange(flat.numel(), device=flat.device)
    indices = torch.empty_like(positions).scatter_(0, place, positions)[:capacity]
    return indices, torch.arange(capacity, device=flat.device) < num_scored


def check_capacity(max_count: int, capacity: int, *, micro_batch_size: int) -> None:
    """Refuses a micro-batch with more scored positions than the head computes; none may be dropped.

    Args:
        max_count: scored positions of the fullest micro-batch, over all ranks.
        capacity: positions that the head computes for a micro-batch.

    Raises:
        UsageError: naming training.head_capacity and a value that would have been enough.
    """
    if max_count <= capacity:
        return
    enough = -(-max_count // micro_batch_size)
    raise UsageError(
        f"training.head_capacity is {capacity // micro_batch_size} rows per sample, but a micro-batch of "
        f"{micro_batch_size} samples has {max_count} scored positions; this step needs at least {enough}. "
        "The step was not taken.",
        hint="raise training.head_capacity, or set it to null: then every batch fits",
    )
