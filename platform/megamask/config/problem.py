"""A refusal in the making, which the checks of a config yield, and how they write lists of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A key whose value does not fit the others.

    Args:
        key: the key to change; its value and origin complete the message.
        because: continues "KEY is VALUE, ..." and says why that cannot be.
        allowed: what would do.
    """

    key: str
    because: str
    allowed: str


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def listed(numbers: Iterable[int]) -> str:
    """Numbers as a message shows them."""
    return ", ".join(map(str, numbers))
