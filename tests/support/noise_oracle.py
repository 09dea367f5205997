"""The noise law and the law of initial weights again, in plain integers and NumPy: shares no code with the package."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np

from support.order_oracle import philox4x32_10

EPS = 1e-3
SHAPES = {
    "linear": lambda t: t,
    "cosine_md4": lambda t: math.sin(math.pi * t / 2),
    "cosine_bd3": lambda t: 1 - math.cos(math.pi * t / 2),
}


def split(value: int) -> tuple[int, int]:
    """Low and high 32 bits."""
    return value % 2**32, value // 2**32


def u_numerator(seed: int, step: int) -> int:
    """u * 2^53 of a step."""
    words = philox4x32_10((*split(step - 1), 0, 2), split(seed))
    return words[0] * 2**21 + words[1] // 2**11


def times(seed: int, step: int, global_batch_size: int) -> list[float]:
    """t of each place of the batch."""
    u = np.float64(u_numerator(seed, step)) * 2.0**-53
    return [float((u + j / global_batch_size) % 1.0) for j in range(global_batch_size)]


def threshold(schedule: str, t: float) -> int:
    """T of a time."""
    return math.floor((EPS + (1 - 2 * EPS) * SHAPES[schedule](t)) * 2**32)


def word(seed: int, index: int, position: int, *, draw: int = 0) -> int:
    """u_pos of a sample."""
    return philox4x32_10((*split(index), position // 4, 1 + 256 * draw), split(seed))[position % 4]


def masked_positions(seed: int, index: int, limit: int, eligible: list[int], *, draw: int = 0) -> list[int]:
    """Return the masks of view A."""
    return [position for position in eligible if word(seed, index, position, draw=draw) < limit]


def sum_of_twelve(seed: int, name: str, element: int) -> int:
    """The integer behind one initial weight."""
    digest = hashlib.sha256(json.dumps([seed, name], separators=(",", ":")).encode() + b"\n").digest()
    key = split(int.from_bytes(digest[:8], "little"))
    words = philox4x32_10((*split(element), 0, 7), key) + philox4x32_10((*split(element), 1, 7), key)[:2]
    return sum(word % 65536 + word // 65536 for word in words)
