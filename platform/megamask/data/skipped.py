"""The order law, version 2: sample indices that a run leaves out.

A run that leaves nothing out takes the sample indices 0, 1, 2, ... one after the other. Otherwise position p of the
run, counted over the samples that it used, is the p-th index (from 0) that no skipped range holds. Batch sizes and
learning rates are functions of positions and steps, so they do not notice; noise and rows are functions of the index.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class SkippedSamples:
    """Ranges of sample indices that a run does not use; `of` makes one from ranges in any order.

    Args:
        ranges: ascending, not empty, with at least one index between two of them.
    """

    ranges: tuple[range, ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[range]) -> SkippedSamples:
        """The union of ranges.

        Raises:
            ValueError: a range does not count up by 1 from 0 or more.
        """
        merged: list[range] = []
        for each in sorted(ranges, key=lambda each: (each.start, each.stop)):
            if each.start < 0 or each.step != 1:
                raise ValueError(f"{each} is not a range of sample indices")
            if not each:
                continue
            if merged and each.start <= merged[-1].stop:
                merged[-1] = range(merged[-1].start, max(merged[-1].stop, each.stop))
            else:
                merged.append(each)
        return cls(tuple(merged))

    def index(self, position: int) -> int:
        """The sample index at a position (from 0) of the run."""
        return position + self._skipped_before(position)

    def segments(self, position: int, count: int) -> list[range]:
        """The sample indices of `count` positions from one on, as ascending ranges without gaps."""
        found: list[range] = []
        while count > 0:
            first = self.index(position)
            place = bisect_right(self._starts, first)
            room = self.ranges[place].start - first if place < len(self.ranges) else count
            found.append(range(first, first + min(room, count)))
            position, count = position + len(found[-1]), count - len(found[-1])
        return found

    def position(self, index: int) -> int | None:
        """The position at which the run uses a sample index; None for one that it leaves out."""
        place = bisect_right(self._starts, index) - 1
        if place >= 0 and index in self.ranges[place]:
            return None
        return index - sum(len(each) for each in self.ranges[: place + 1])

    def _skipped_before(self, position: int) -> int:
        """The number of indices that are left out before the index of a position."""
        skipped = [0, *accumulate(len(each) for each in self.ranges)]
        # range i comes before the position if the index without it and its successors has reached its start
        starts = [each.start - before for each, before in zip(self.ranges, skipped, strict=False)]
        return skipped[bisect_right(starts, position)]

    @property
    def _starts(self) -> list[int]:
        return [each.start for each in self.ranges]


SKIPS_NOTHING = SkippedSamples()
"""Of a run without rewinds: position and index are the same number."""
