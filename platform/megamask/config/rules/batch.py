"""Rules between batch sizes, the batch-size ramp and the data-parallel ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from megamask.config.rules.problem import Problem, divisors, listed

_RAMP_KEYS = (
    "training.batch_size_ramp_start",
    "training.batch_size_ramp_increment",
    "training.batch_size_ramp_samples",
)


def ramp_problems(
    *, global_batch_size: int, start: int | None, increment: int | None, samples: int | None
) -> Iterator[Problem]:
    """A batch-size ramp that is incomplete or does not reach the last level in equal increments."""
    ramp = dict(zip(_RAMP_KEYS, (start, increment, samples), strict=True))
    if start is None or increment is None or samples is None:
        given = next((key for key, value in ramp.items() if value is not None), None)
        if given is not None:
            yield Problem(
                key=next(key for key, value in ramp.items() if value is None),
                because=f"but {given} is {ramp[given]}, and a ramp needs all three of {', '.join(ramp)}",
                allowed=f"an integer >= 1; or null for all three, and every step has {global_batch_size} samples",
            )
    elif start >= global_batch_size:
        yield Problem(
            key="training.batch_size_ramp_start",
            because=f"but the ramp ends at training.global_batch_size = {global_batch_size}",
            allowed=f"1 to {global_batch_size - 1}, or null for the three batch_size_ramp keys"
            if global_batch_size > 1
            else "null",
        )
    elif (global_batch_size - start) % increment != 0:
        yield Problem(
            key="training.batch_size_ramp_increment",
            because=f"but from training.batch_size_ramp_start = {start} to training.global_batch_size = "
            f"{global_batch_size} there are {global_batch_size - start} samples",
            allowed=listed(divisors(global_batch_size - start)),
        )


def batch_levels(*, global_batch_size: int, start: int | None, increment: int | None) -> range:
    """Every size that a step's batch may have, ascending, for a ramp without problems."""
    if start is None or increment is None:
        return range(global_batch_size, global_batch_size + 1)
    return range(start, global_batch_size + 1, increment)


def batch_layout_problems(
    levels: range, *, data_parallel_size: int, micro_batch_size: int, group_size: int = 1
) -> Iterator[Problem]:
    """Levels that do not divide; the layout is the key to change, because the batch belongs to the run's identity.

    Args:
        group_size: the micro-batches of a rank must be a multiple of this.
    """
    if not levels:  # a ramp that `ramp_problems` refuses
        return
    replicas, micro = data_parallel_size, micro_batch_size
    shared = levels.start if len(levels) == 1 else math.gcd(levels.start, levels.step)  # divides every level
    if shared % replicas != 0:
        size = _first_misfit(levels, replicas)
        is_last = size == levels[-1]
        yield Problem(
            key="layout.data_parallel_size",
            because=f"but training.global_batch_size is {size}"
            if is_last
            else f"but {_level(size)} does not divide by it",
            allowed=listed(divisors(shared), replicas),
        )
    elif shared % (replicas * micro) != 0:
        size = _first_misfit(levels, replicas * micro)
        of_batch = f"training.global_batch_size = {size}" if size == levels[-1] else _level(size)
        yield Problem(
            key="training.micro_batch_size",
            because=f"but each of {replicas} data-parallel ranks has {size // replicas} of {of_batch}",
            allowed=listed(divisors(shared // replicas), micro),
        )
    elif shared % (replicas * micro * group_size) != 0:
        size = _first_misfit(levels, replicas * micro * group_size)
        of_batch = f"training.global_batch_size = {size}" if size == levels[-1] else _level(size)
        yield Problem(
            key="layout.virtual_pipeline_parallel_size",
            because=f"but each data-parallel rank has {size // (replicas * micro)} micro-batches of {of_batch}, and an "
            f"interleaved pipeline needs a multiple of layout.pipeline_parallel_size = {group_size}",
            allowed="1; more with another layout.data_parallel_size or training.micro_batch_size",
        )


def _first_misfit(levels: range, unit: int) -> int:
    """The first size that the unit does not divide; the last level, which the config names, comes first."""
    return next(size for size in itertools.chain((levels[-1],), levels) if size % unit != 0)


def _level(size: int) -> str:
    return f"the batch-size ramp's level of {size} samples"
