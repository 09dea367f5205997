"""Samples of each step: always the same number, or a ramp that is a pure function of consumed_samples.

The ramp is the one of Megatron-LM's `--rampup-batch-size` (GPT-3 grew its batch so too; Brown et al., arXiv:2005.14165,
appendix B): sizes from `training.batch_size_ramp_start` in equal increments up to `training.global_batch_size`. Here
every size below the last takes the same share of `training.batch_size_ramp_samples`, rounded up to full batches, so
that a step's first sample and its size have a closed form and no size is left out.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from megamask.config.schema.training import TrainingConfig

_MAX_STEPS = 1 << 60


@dataclass(frozen=True, kw_only=True)
class _Levels:
    """The sizes in their order; level i begins after steps_before[i] steps and samples_before[i] samples."""

    sizes: tuple[int, ...]
    steps_before: tuple[int, ...]
    samples_before: tuple[int, ...]


def batch_size_at(consumed_samples: int, training: TrainingConfig) -> int:
    """Samples of the step that begins after consumed_samples samples; the order law's B."""
    if consumed_samples < 0:
        raise ValueError(f"consumed_samples is {consumed_samples}")
    levels = _levels_of(training)
    return levels.sizes[bisect_right(levels.samples_before, consumed_samples) - 1]


def consumed_before(step: int, training: TrainingConfig) -> int:
    """Samples of all the steps before a step (1-based): its first sample index, by closed form."""
    if step < 1:
        raise ValueError(f"step is {step}; steps count from 1")
    levels = _levels_of(training)
    level = bisect_right(levels.steps_before, step - 1) - 1
    return levels.samples_before[level] + (step - 1 - levels.steps_before[level]) * levels.sizes[level]


def first_step(amount: int, unit: str, training: TrainingConfig) -> int:
    """The first step (from 1) that begins when an amount was consumed; a function of the settings alone.

    Args:
        amount: of completed steps, or of tokens: samples times `training.sequence_length`, padding included.
        unit: "steps" or "tokens".
    """
    if unit == "steps":
        return amount + 1
    samples = -(-amount // training.sequence_length)
    return 1 + bisect_left(range(1, _MAX_STEPS), samples, key=lambda step: consumed_before(step, training))


def step_of_sample(sample_index: int, training: TrainingConfig) -> int:
    """The step (1-based) whose batch has a sample; the inverse of `consumed_before`."""
    if sample_index < 0:
        raise ValueError(f"sample_index is {sample_index}")
    levels = _levels_of(training)
    level = bisect_right(levels.samples_before, sample_index) - 1
    return levels.steps_before[level] + (sample_index - levels.samples_before[level]) // levels.sizes[level] + 1


def _levels_of(training: TrainingConfig) -> _Levels:
    start, increment = training.batch_size_ramp_start, training.batch_size_ramp_increment
    samples = training.batch_size_ramp_samples
    if start is None or increment is None or samples is None:  # config/validate.py: all three or none
        return _Levels(sizes=(training.global_batch_size,), steps_before=(0,), samples_before=(0,))
    return _ramp(start, increment, samples, training.global_batch_size)


@lru_cache(maxsize=8)
def _ramp(start: int, increment: int, samples: int, last: int) -> _Levels:
    below = range(start, last, increment)
    # samples / len(below) for each of them, in full batches: an exact division, rounded up
    steps = [-(-samples // (len(below) * size)) for size in below]
    return _Levels(
        sizes=(*below, last),
        steps_before=(0, *accumulate(steps)),
        samples_before=(0, *accumulate(count * size for count, size in zip(steps, below, strict=True))),
    )
