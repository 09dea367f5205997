"""A problem that a rule finds, and how its message lists numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megamask.config.secrets import shown


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A key whose value does not fit the others.

    Args:
        key: the key to change; its value and origin complete the message.
        because: continues "KEY is VALUE, ..." with the reason.
        allowed: the values that would fit.
    """

    key: str
    because: str
    allowed: str

    def description(self, value: object) -> str:
        """The message without its end: key, value, reason and allowed values."""
        return f"{self.key} is {shown(value)}, {self.because}; allowed: {self.allowed}"


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def listed(numbers: Iterable[int], given: int | None = None) -> str:
    """Numbers as a message shows them, and which of several is nearest to the one given."""
    found = list(numbers)
    text = ", ".join(map(str, found))
    if given is None or len(found) < 2:
        return text
    return f"{text} (nearest: {min(found, key=lambda number: (abs(number - given), number))})"
