"""The order law: the next row of a source is arithmetic on (corpus, data.seed, draw).

Draw k of a source with n rows lies in epoch k div n at place k mod n. An epoch shuffles in two levels: the blocks of
the split are sorted by Philox words, and inside each window of `data.shuffle_window_blocks` consecutive blocks of that
order the rows are sorted by Philox words. Nothing is carried from draw to draw, so a restart needs only the number k,
another layout gives the same rows, and a longer run never changes what came before.

Memory: the order of an epoch's blocks (8 bytes a block and 8 for their places) and the rows of a few windows; the rows
of an epoch are never listed as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megamask.data.block_rows import SplitBlocks
from megamask.data.lru import LeastRecentlyUsed
from megamask.diffusion.philox import Purpose
from megamask.diffusion.philox_sort import sort_by_words
from megamask.errors import UsageError
from megamask.storage.hashing import hash_of, key_of

ORDER_LAW_VERSION = 1

Int64Array = npt.NDArray[np.int64]

_CACHED_WINDOWS = 4


def order_key(data_seed: int, source_digest: str, split: str) -> tuple[int, int]:
    """The Philox key of a source's order: that of H(data.seed, source digest, split)."""
    return key_of(hash_of(data_seed, source_digest, split))


class SourceOrder:
    """The endless sequence of rows that one split of one corpus gives.

    Args:
        blocks: of the split, or the rows of each block in order through the shards in name order; all >= 1.
        key: the source's order key, of `order_key`.
        window_blocks: blocks per shuffle window (`data.shuffle_window_blocks`).

    Raises:
        UsageError: the split has no rows, or the window is below 1.
    """

    def __init__(
        self, blocks: SplitBlocks | Sequence[int] | Int64Array, *, key: tuple[int, int], window_blocks: int
    ) -> None:
        if not isinstance(blocks, SplitBlocks):
            blocks = SplitBlocks(np.array(blocks, dtype=np.int64))
        if not blocks.has_rows:
            raise UsageError("an order needs at least one block and at least one row in each; nothing was read")
        if window_blocks < 1:
            raise UsageError(f"data.shuffle_window_blocks is {window_blocks}; allowed: >= 1. Nothing was read")
        self._split = blocks
        self._block_rows, self._block_first_row = blocks.rows, blocks.first_row
        self._key = key
        self._window_blocks = window_blocks
        self._windows: LeastRecentlyUsed[tuple[int, int], Int64Array] = LeastRecentlyUsed(_CACHED_WINDOWS)

    @property
    def num_rows(self) -> int:
        """Number of rows of one epoch."""
        return int(self._block_first_row[-1])

    def row(self, draw: int) -> int:
        """The row (0-based, of the split) that draw `draw` >= 0 gives."""
        return int(self.rows(draw, 1)[0])

    def rows(self, start: int, count: int) -> Int64Array:
        """Rows of the draws start, ..., start + count - 1, as int64 [count].

        Raises:
            UsageError: start or count is negative.
        """
        if start < 0 or count < 0:
            raise UsageError(f"draws are counted from 0; {count} draws from {start} do not exist")
        rows = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(start + done, self.num_rows)
            window_rows, window_start = self._window_of(epoch, place)
            piece = window_rows[place - window_start :][: count - done]
            rows[done : done + len(piece)] = piece
            done += len(piece)
        return rows

    def place_of(self, row: int, epoch: int) -> int:
        """The place in an epoch at which a row comes; the inverse of `rows`.

        Raises:
            UsageError: the split has no such row.
        """
        if not 0 <= row < self.num_rows:
            raise UsageError(f"row {row} of a split that has {self.num_rows} rows; nothing was read")
        order = self._split.epoch(epoch, self._key)
        block = int(np.searchsorted(self._block_first_row, row, side="right")) - 1
        place = int(order.first_place[int(np.flatnonzero(order.blocks == block)[0])])
        rows, first = self._window_of(epoch, place)
        return first + int(np.flatnonzero(rows == row)[0])

    def _window_of(self, epoch: int, place: int) -> tuple[Int64Array, int]:
        """The shuffled rows of the window that holds a place of an epoch, and the window's first place."""
        order = self._split.epoch(epoch, self._key)
        position = int(np.searchsorted(order.first_place, place, side="right")) - 1
        window = position // self._window_blocks
        first = window * self._window_blocks
        blocks = order.blocks[first : first + self._window_blocks]
        rows = self._windows.get((epoch, window), lambda _: self._shuffle_rows(blocks, epoch))
        return rows, int(order.first_place[first])

    def _shuffle_rows(self, blocks: Int64Array, epoch: int) -> Int64Array:
        counts = self._block_rows[blocks]
        ends = np.cumsum(counts)
        in_block = np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)
        rows = np.repeat(self._block_first_row[blocks], counts) + in_block
        return sort_by_words(rows, epoch, Purpose.ROW_ORDER, self._key)
