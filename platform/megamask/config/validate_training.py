"""Whether batches fit the layout, and whether the settings of the learning rate fit one another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from megamask.config.problem import Problem, divisors, listed
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.roots import TrainConfig
from megamask.config.schema.training import TrainingConfig


def batch_problems(config: TrainConfig) -> Iterator[Problem]:
    """Batch sizes that do not fit; a layout that does not is to change, because the batch makes the run what it is."""
    levels = _batch_sizes(config.training)
    if isinstance(levels, Problem):
        yield levels
        return
    yield from _layout_of_batches(config, levels)


def _batch_sizes(training: TrainingConfig) -> range | Problem:
    """Every size that a step of the run may have, ascending; or why there is no such ramp."""
    total, start = training.global_batch_size, training.batch_size_ramp_start
    increment, samples = training.batch_size_ramp_increment, training.batch_size_ramp_samples
    ramp = {
        "training.batch_size_ramp_start": start,
        "training.batch_size_ramp_increment": increment,
        "training.batch_size_ramp_samples": samples,
    }
    if start is None or increment is None or samples is None:
        given = next((key for key, value in ramp.items() if value is not None), None)
        if given is None:
            return range(total, total + 1)
        missing = next(key for key, value in ramp.items() if value is None)
        return Problem(
            key=missing,
            because=f"but {given} is {ramp[given]}, and a ramp needs all three of {', '.join(ramp)}",
            allowed=f"an integer >= 1; or null for all three, and every step has {total} samples",
        )
    if start >= total:
        return Problem(
            key="training.batch_size_ramp_start",
            because=f"but the ramp ends at training.global_batch_size = {total}",
            allowed=f"1 to {total - 1}, or null for the three batch_size_ramp keys" if total > 1 else "null",
        )
    if (total - start) % increment != 0:
        return Problem(
            key="training.batch_size_ramp_increment",
            because=f"but from training.batch_size_ramp_start = {start} to training.global_batch_size = {total} "
            f"there are {total - start} samples",
            allowed=listed(divisors(total - start)),
        )
    return range(start, total + 1, increment)


def _layout_of_batches(config: TrainConfig, levels: range) -> Iterator[Problem]:
    replicas, micro = config.layout.data_parallel_size, config.training.micro_batch_size
    shared = levels.start if len(levels) == 1 else math.gcd(levels.start, levels.step)  # divides every level
    if shared % replicas != 0:
        size = _first_misfit(levels, replicas)
        is_last = size == levels[-1]
        yield Problem(
            key="layout.data_parallel_size",
            because=f"but training.global_batch_size is {size}"
            if is_last
            else f"but {_level(size)} does not divide by it",
            allowed=listed(divisors(shared)),
        )
    elif shared % (replicas * micro) != 0:
        size = _first_misfit(levels, replicas * micro)
        of_batch = f"training.global_batch_size = {size}" if size == levels[-1] else _level(size)
        yield Problem(
            key="training.micro_batch_size",
            because=f"but each of {replicas} data-parallel ranks has {size // replicas} of {of_batch}",
            allowed=listed(divisors(shared // replicas)),
        )


def _first_misfit(levels: range, unit: int) -> int:
    """The first size that is no multiple of the unit; the last level, which the config names, comes first."""
    return next(size for size in itertools.chain((levels[-1],), levels) if size % unit != 0)


def _level(size: int) -> str:
    return f"the batch-size ramp's level of {size} samples"


def learning_rate_problems(config: TrainConfig) -> Iterator[Problem]:
    """Settings of the learning-rate schedule that contradict one another or that it would not carry out."""
    optimizer = config.optimizer
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield Problem(
            key="optimizer.min_learning_rate",
            because=f"but optimizer.learning_rate is {optimizer.learning_rate}",
            allowed=f"0 to {optimizer.learning_rate}",
        )
    unit, other = optimizer.schedule_unit, "tokens" if optimizer.schedule_unit == "steps" else "steps"
    for name in ("warmup", "decay"):
        if getattr(optimizer, f"{name}_{other}") > 0:
            yield Problem(
                key=f"optimizer.{name}_{other}",
                because=f"but optimizer.schedule_unit is {unit}",
                allowed=f"0, with optimizer.{name}_{unit} in its place; or optimizer.schedule_unit={other}",
            )
    yield from _course(
        optimizer, warmup=getattr(optimizer, f"warmup_{unit}"), decay=getattr(optimizer, f"decay_{unit}")
    )


def _course(optimizer: OptimizerConfig, *, warmup: int, decay: int) -> Iterator[Problem]:
    """What the schedule does after warm-up; lengths are in its own unit."""
    course, unit = optimizer.lr_schedule, optimizer.schedule_unit
    if decay > 0 and course in ("constant", "cosine"):
        why = "which never falls" if course == "constant" else "which falls from the end of warm-up to training.steps"
        yield Problem(
            key=f"optimizer.decay_{unit}",
            because=f"but optimizer.lr_schedule is {course}, {why}",
            allowed="0; or another optimizer.lr_schedule: wsd, inverse_sqrt",
        )
    if warmup == 0 and course == "inverse_sqrt":
        yield Problem(
            key=f"optimizer.warmup_{unit}",
            because="but optimizer.lr_schedule is inverse_sqrt, which after warm-up is peak * sqrt(warm-up / position)",
            allowed="an integer >= 1",
        )
    if optimizer.min_learning_rate > 0 and course == "constant":
        yield Problem(
            key="optimizer.min_learning_rate",
            because="but optimizer.lr_schedule is constant, so that the rate never falls",
            allowed="0; or another optimizer.lr_schedule: wsd, cosine, inverse_sqrt",
        )
    if optimizer.min_learning_rate > 0 and course == "wsd" and decay == 0:
        yield Problem(
            key="optimizer.min_learning_rate",
            because=f"but optimizer.decay_{unit} is 0, so that the rate never falls",
            allowed=f"0, or any rate with optimizer.decay_{unit} above 0",
        )
