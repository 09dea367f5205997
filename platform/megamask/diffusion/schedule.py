"""Noise schedules and the times at which a global batch is noised.

A schedule only chooses how the mask probability p is sampled: the NELBO is an integral over p, and the weight p'(t) / p
undoes the choice. p and p' are computed in float64 on the host, so every rank and device uses the same thresholds.

Sources: linear, LLaDA (arXiv:2502.09992); sine, MD4 (arXiv:2406.04329); cosine, BD3-LM (arXiv:2503.09573). The last
two are both called "cosine" in the field and curve in opposite ways, so their names here include the source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.diffusion.philox import Purpose, philox4x32
from megamask.errors import UsageError

EPS = 1e-3
"""p stays within [EPS, 1 - EPS], so that no weight exceeds p' / EPS."""

_RESOLUTION = 1 << 32


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """p(t) = lowest + (highest - lowest) * s(t) with s(0) = 0 and s(1) = 1, rising.

    Args:
        name: as in `objective.noise_schedule`.
        shape: s.
        shape_derivative: s'.
        lowest, highest: p(0) and p(1).
    """

    name: str
    shape: Callable[[float], float]
    shape_derivative: Callable[[float], float]
    lowest: float = EPS
    highest: float = 1 - EPS

    def mask_probability(self, t: float) -> float:
        """p(t), the chance that an eligible token is masked in view A; t in [0, 1]."""
        return self.lowest + self._range * self.shape(t)

    def derivative(self, t: float) -> float:
        """p'(t), not negative."""
        return self._range * self.shape_derivative(t)

    @property
    def _range(self) -> float:
        # EPS is not a sum of powers of two: 1 - 2*EPS and (1 - EPS) - EPS differ in the last bit, and so would masks
        return 1 - 2 * EPS if (self.lowest, self.highest) == (EPS, 1 - EPS) else self.highest - self.lowest


def _one(t: float) -> float:
    return 1.0


_SQRT_START = 1e-4
"""Up to this t the schedule sqrt is a line, because its slope at 0 is infinite and so would be the weight."""


def _sqrt(t: float) -> float:
    return math.sqrt(t) if t >= _SQRT_START else t / math.sqrt(_SQRT_START)


def _sqrt_derivative(t: float) -> float:
    return 0.5 / math.sqrt(t) if t >= _SQRT_START else 1 / math.sqrt(_SQRT_START)


_SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        NoiseSchedule(name="linear", shape=float, shape_derivative=_one),
        NoiseSchedule(
            name="cosine_md4",
            shape=lambda t: math.sin(math.pi * t / 2),
            shape_derivative=lambda t: math.pi / 2 * math.cos(math.pi * t / 2),
        ),
        NoiseSchedule(
            name="cosine_bd3",
            shape=lambda t: 1 - math.cos(math.pi * t / 2),
            shape_derivative=lambda t: math.pi / 2 * math.sin(math.pi * t / 2),
        ),
        NoiseSchedule(name="spindle", shape=float, shape_derivative=_one),  # the middle token's; see spindle.py
        NoiseSchedule(name="sqrt", shape=_sqrt, shape_derivative=_sqrt_derivative),
    )
}


def noise_schedule(name: str, exponent: float = 1.0) -> NoiseSchedule:
    """The schedule of that name.

    Args:
        exponent: k of the schedule polynomial, s(t) = t^k, at least 1; below 1 its slope at 0 would be infinite.

    Raises:
        UsageError: when there is none.
    """
    if name == "polynomial":
        return NoiseSchedule(
            name=name, shape=lambda t: t**exponent, shape_derivative=lambda t: exponent * t ** (exponent - 1)
        )
    if name not in _SCHEDULES:
        names = ", ".join((*_SCHEDULES, "polynomial"))
        raise UsageError(f"objective.noise_schedule is {name!r}; allowed: {names}. Nothing was started.")
    return _SCHEDULES[name]


def least_variance_schedule(num_positions: int, lowest: float = EPS, highest: float = 1 - EPS) -> NoiseSchedule:
    """The schedule whose p has the density with the least variance of the loss where every token costs the same.

    A row's loss at p is (1/p) * K * c with K ~ Binomial(n, p); its second moment is n^2 c^2 (1 + (1 - p)/(n p)), and
    importance sampling has the least variance at a density proportional to the square root of that:
    q(p) ~ sqrt((1 + (n - 1) p) / (n p)). No slope is infinite, and p' = 1/q enters the weight as every schedule's does.

    Args:
        num_positions: n, tokens of a row.
    """
    ratio = num_positions - 1

    def mass(p: float) -> float:  # the integral of sqrt((1 + ratio * p) / p)
        if ratio == 0:
            return 2 * math.sqrt(p)
        return math.sqrt(p * (1 + ratio * p)) + math.asinh(math.sqrt(ratio * p)) / math.sqrt(ratio)

    first, total = mass(lowest), mass(highest) - mass(lowest)

    def probability(t: float) -> float:
        low, high = lowest, highest
        for _ in range(64):  # bisection: the same operations, and so the same bits, for every t
            middle = (low + high) / 2
            low, high = (middle, high) if mass(middle) - first < t * total else (low, middle)
        return low

    def slope(t: float) -> float:
        p = probability(t)
        return total / math.sqrt((1 + ratio * p) / p) / (highest - lowest)

    return NoiseSchedule(
        name="importance",
        shape=lambda t: (probability(t) - lowest) / (highest - lowest),
        shape_derivative=slope,
        lowest=lowest,
        highest=highest,
    )


def warmed_time(t: float, step: int, warmup_steps: int) -> float:
    """t scaled to [0, u), u rising linearly from 0.001 to 1 over the first steps of a run.

    Source: the warm-up of Stable-DiffCoder, which drops the weight of the loss meanwhile.

    Args:
        step: 1-based.
        warmup_steps: after these steps t is what it was.
    """
    if step > warmup_steps:
        return t
    share = (step - 1) / (warmup_steps - 1) if warmup_steps > 1 else 1.0
    return t * (0.001 + 0.999 * share)


def stratified_times(step: int, global_batch_size: int, key: tuple[int, int]) -> list[float]:
    """t_j = frac(u + j/B) of each place j of a global batch: one time in each of B equal strata of [0, 1).

    Args:
        step: 1-based number of the update that the batch makes.
        global_batch_size: B, samples of the batch over all ranks.
        key: the run key.

    Returns:
        B float64 times, place 0 first. u is made of 53 bits of Philox, purpose 2, index step - 1.

    Raises:
        ValueError: for a step or a batch size below 1.
    """
    if step < 1 or global_batch_size < 1:
        raise ValueError(f"step and global_batch_size are at least 1, not {step} and {global_batch_size}")
    index = step - 1
    words = philox4x32((index % _RESOLUTION, index // _RESOLUTION, 0, int(Purpose.STRATIFIED_TIME)), key)
    u = (int(words[0]) * 2**21 + int(words[1]) // 2**11) * 2.0**-53
    return [math.modf(u + place / global_batch_size)[0] for place in range(global_batch_size)]


def unit_interval(words: Sequence[Tensor]) -> Tensor:
    """53 bits of the first two words as float64 in [0, 1)."""
    return (words[0] * 2**21 + words[1] // 2**11).to(torch.float64) * 2.0**-53


def independent_times(sample_index: Sequence[int], key: tuple[int, int]) -> list[float]:
    """t of each sample by itself: 53 bits of Philox, purpose 8, index = sample index; uniform in [0, 1)."""
    times = []
    for index in sample_index:
        words = philox4x32((index % _RESOLUTION, index // _RESOLUTION, 0, int(Purpose.INDEPENDENT_TIME)), key)
        times.append((int(words[0]) * 2**21 + int(words[1]) // 2**11) * 2.0**-53)
    return times


def threshold(p: float) -> int:
    """T = floor(p * 2^32): a position is masked where its 32-bit word is below T, so with probability T / 2^32."""
    return math.floor(p * _RESOLUTION)
