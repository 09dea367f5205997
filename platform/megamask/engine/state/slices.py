"""Slices of canonical tensors that this rank owns: flat ranges of local parameters, cut into rectangles.

The distributed optimizer gives each rank a range [start, stop) of the flattened parameter, blind to its rows. Such a
range is at most three rectangles of each block it touches: the rest of a row, full rows, the beginning of a row. Each
is contiguous in the range, so nothing is copied and nothing is gathered to save or to load it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megamask.engine.canonical import TensorSlice
from megamask.engine.state.coverage import Rectangle
from megamask.models.shapes import TensorKind, canonical_shapes, canonical_tensors
from megamask.models.spec import ModelSpec

if TYPE_CHECKING:
    from megamask.engine.optimizer import Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class StoredSlice:
    """A rectangle of a stored tensor, held by this rank.

    Args:
        name: name of the stored tensor.
        shape: shape of the complete stored tensor.
        offsets: where the rectangle begins.
        data: float32, the rectangle; written from or read into.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: torch.Tensor

    @property
    def rectangle(self) -> Rectangle:
        """The rectangle in the stored tensor's coordinates."""
        return Rectangle(offsets=self.offsets, sizes=tuple(self.data.shape))


@dataclass(frozen=True, kw_only=True)
class RangePart:
    """A part of a flat range that is a rectangle of a canonical tensor.

    Args:
        name: the canonical tensor.
        offsets, sizes: the rectangle in its coordinates.
        first: where the part begins, counted from the beginning of the range.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


def range_parts(slices: Sequence[TensorSlice], *, columns: int, start: int, stop: int) -> Iterator[RangePart]:
    """Yield the rectangles that elements [start, stop) of a flattened local parameter consist of.

    Args:
        slices: of the parameter; elements in no slice (vocabulary padding) are skipped.
        columns: elements of one row of the parameter; 1 for a vector.
    """
    for piece in slices:
        begin = max(start, piece.first_row * columns)
        end = min(stop, (piece.first_row + piece.sizes[0]) * columns)
        while begin < end:
            row, column = divmod(begin, columns)
            if column == 0 and end - begin >= columns:
                num_rows, num_columns = (end - begin) // columns, columns
            else:  # the rest of a row, or the beginning of one
                num_rows, num_columns = 1, min(columns - column, end - begin)
            position, extent = (row - piece.first_row, column), (num_rows, num_columns)
            dims = len(piece.offsets)
            yield RangePart(
                name=piece.name,
                offsets=tuple(offset + position[dim] for dim, offset in enumerate(piece.offsets)),
                sizes=extent[:dims],
                first=begin - start,
            )
            begin += num_rows * num_columns


def slices_of(shards: Iterable[Shard], spec: ModelSpec) -> Iterator[StoredSlice]:
    """Yield views of shards, weights and moments, as slices of the stored tensors."""
    shapes = canonical_shapes(spec)
    for shard in shards:
        info = shard.info
        parts = range_parts(info.canonical, columns=info.num_columns, start=shard.start, stop=shard.stop)
        tensors = {"": shard.weight} | {f"optimizer.{name}.": moment for name, moment in shard.moments.items()}
        for part in parts:
            for prefix, flat in tensors.items():
                yield StoredSlice(
                    name=prefix + part.name,
                    shape=tuple(shapes[part.name]),
                    offsets=part.offsets,
                    data=flat[part.first : part.first + part.num_elements].view(part.sizes),
                )


def stored_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the complete state of a network consists of."""
    moments = tuple(f"optimizer.{name}." for name in MOMENTS)
    return {
        prefix + name: tuple(tensor.shape)
        for name, tensor in canonical_tensors(spec).items()
        for prefix in ("", *(() if tensor.kind is TensorKind.EXPERT_BIAS else moments))
    }
