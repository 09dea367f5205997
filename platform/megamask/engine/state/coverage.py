"""Rectangles of a tensor, and whether some of them overlap: integer arithmetic."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """Elements [offsets, offsets + sizes) of a vector or a matrix."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def rows(self) -> tuple[int, int]:
        """First row and the row after the last."""
        return self.offsets[0], self.offsets[0] + self.sizes[0]

    @property
    def columns(self) -> tuple[int, int]:
        """First column and the column after the last; a vector has one column."""
        return (self.offsets[1], self.offsets[1] + self.sizes[1]) if len(self.sizes) > 1 else (0, 1)


def overlap(rectangles: Iterable[Rectangle]) -> tuple[Rectangle, Rectangle] | None:
    """Return two rectangles of one tensor that share an element, or None.

    Sweep over the rows: all rectangles that contain the present row are disjoint in their columns, or the sweep has
    ended; so a new one is compared with its two neighbours only. O(n log n) comparisons for n rectangles, because a
    file's header may name a million of them.
    """
    active: list[tuple[int, int, Rectangle]] = []  # (first column, number, rectangle), by column
    ending: list[tuple[int, tuple[int, int, Rectangle]]] = []  # (row after the last, entry of `active`)
    for number, new in enumerate(sorted(rectangles, key=lambda rectangle: rectangle.offsets)):
        while ending and ending[0][0] <= new.rows[0]:
            _, done = heapq.heappop(ending)
            del active[bisect_left(active, done[:2], key=lambda entry: entry[:2])]
        first, stop = new.columns
        at = bisect_left(active, first, key=lambda entry: entry[0])
        if at < len(active) and active[at][0] < stop:
            return active[at][2], new
        if at > 0 and active[at - 1][2].columns[1] > first:
            return active[at - 1][2], new
        entry = (first, number, new)
        insort(active, entry, key=lambda other: other[:2])
        heapq.heappush(ending, (new.rows[1], entry))
    return None
