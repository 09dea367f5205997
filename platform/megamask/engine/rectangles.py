"""Cuts a flat range of a local parameter into rectangles of canonical tensors: pure integer arithmetic.

The distributed optimizer gives each rank a range [start, stop) of the flattened parameter, blind to its rows. Such a
range is at most three rectangles of each block it touches: the rest of a row, whole rows, the beginning of a row. Each
is contiguous in the range, so nothing is copied and nothing is gathered to save or to load it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamask.engine.canonical import TensorSlice


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """A part of a canonical tensor that lies contiguously in a flat range.

    Args:
        name: the canonical tensor.
        offsets, sizes: where it lies there.
        first: where it begins, counted from the beginning of the range.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int

    @property
    def num_elements(self) -> int:
        """Elements of the rectangle."""
        return math.prod(self.sizes)


def rectangles(blocks: Sequence[TensorSlice], *, columns: int, start: int, stop: int) -> Iterator[Rectangle]:
    """The rectangles of elements [start, stop) of a flattened local parameter.

    Args:
        blocks: of the parameter; elements in no block (vocabulary padding) are skipped.
        columns: elements of one row of the parameter; 1 for a vector.
    """
    for block in blocks:
        begin = max(start, block.first_row * columns)
        end = min(stop, (block.first_row + block.sizes[0]) * columns)
        while begin < end:
            row, column = divmod(begin, columns)
            if column == 0 and end - begin >= columns:
                num_rows, num_columns = (end - begin) // columns, columns
            else:
                num_rows, num_columns = 1, min(columns - column, end - begin)
            place, extent = (row - block.first_row, column), (num_rows, num_columns)
            dims = len(block.offsets)
            yield Rectangle(
                name=block.name,
                offsets=tuple(offset + place[dim] for dim, offset in enumerate(block.offsets)),
                sizes=extent[:dims],
                first=begin - start,
            )
            begin += num_rows * num_columns
