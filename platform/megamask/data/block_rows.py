"""Number of rows in each shard block, derived from the manifest where possible, and the order of the blocks.

A packer fills every block but the last one of a split, so the manifest's counts fix the rows of each block, and the
order of a corpus is known before any index was read. Both are pure functions of a corpus' content and a seed, and cost
most of opening a large corpus: a process keeps those of the last few splits, so that opening one again is cheap.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamask.data.lru import LeastRecentlyUsed
from megamask.data.manifest import Manifest, ShardEntry
from megamask.diffusion.philox import Purpose
from megamask.diffusion.philox_sort import sort_by_words

Int64Array = npt.NDArray[np.int64]
_KEPT_SPLITS = 4
_KEPT_EPOCHS = 2


@dataclass(frozen=True, kw_only=True)
class EpochBlocks:
    """Blocks of one epoch in their order, and the place at which each begins (one more: the end)."""

    blocks: Int64Array  # [num_blocks]
    first_place: Int64Array  # [num_blocks + 1]


class SplitBlocks:
    """The shard blocks of a split, and their order in each epoch. Safe for several threads; its arrays are shared.

    Memory: 8 bytes a block for `rows` and for `first_row`, and 16 for each of the last epochs asked for.

    Args:
        rows: of each block, blocks in order through the shards; all >= 1.
    """

    def __init__(self, rows: Int64Array) -> None:
        self.rows = rows
        self.has_rows = bool(rows.size) and int(rows.min()) >= 1
        self.first_row: Int64Array = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)])
        for array in (self.rows, self.first_row):
            array.flags.writeable = False
        self._lock = threading.Lock()
        self._epochs: LeastRecentlyUsed[tuple[int, tuple[int, int]], EpochBlocks] = LeastRecentlyUsed(_KEPT_EPOCHS)

    def epoch(self, epoch: int, key: tuple[int, int]) -> EpochBlocks:
        """Return the order of the blocks in an epoch under a source's order key."""
        with self._lock:
            return self._epochs.get((epoch, key), self._order)

    def _order(self, which: tuple[int, tuple[int, int]]) -> EpochBlocks:
        epoch, key = which
        blocks = sort_by_words(np.arange(len(self.rows)), epoch, Purpose.BLOCK_ORDER, key)
        return EpochBlocks(blocks=blocks, first_place=np.concatenate([[0], np.cumsum(self.rows[blocks])]))


_splits: LeastRecentlyUsed[tuple[str, str], SplitBlocks] = LeastRecentlyUsed(_KEPT_SPLITS)
_splits_lock = threading.Lock()


def split_blocks(manifest: Manifest, split: str, read_index: Callable[[int], npt.NDArray[np.int64]]) -> SplitBlocks:
    """Return the blocks of a split; arguments as of `block_rows`. Equal content gives the same object."""
    with _splits_lock:
        return _splits.get((manifest.corpus_id, split), lambda _: SplitBlocks(block_rows(manifest, split, read_index)))


def block_rows(
    manifest: Manifest, split: str, read_index: Callable[[int], npt.NDArray[np.int64]]
) -> npt.NDArray[np.int64]:
    """Return the rows of each block of a split, int64 [blocks], blocks in order through the shards.

    Args:
        manifest: of the corpus.
        split: "train" or "validation".
        read_index: the rows of the blocks of one shard by its number, read from its index; called for shards whose
            blocks the manifest does not fix.
    """
    shards = manifest.split(split).shards
    full = _rows_per_block(manifest)
    if full and _are_full(shards, full):
        rows = np.full(sum(entry.blocks for entry in shards), full, dtype=np.int64)
        if len(rows):
            rows[-1] = sum(entry.rows for entry in shards) - full * (len(rows) - 1)
        return rows
    return np.concatenate([np.empty(0, np.int64), *(read_index(shard) for shard in range(len(shards)))])


def _rows_per_block(manifest: Manifest) -> int:
    options = manifest.content.get("options")
    value = options.get("rows_per_block") if isinstance(options, dict) else None
    return value if type(value) is int and value > 0 else 0


def _are_full(shards: Sequence[ShardEntry], full: int) -> bool:
    """Return whether every block has `full` rows; only the last one of the split may have fewer."""
    if any(entry.rows != full * entry.blocks or not entry.blocks for entry in shards[:-1]):
        return False
    return all(full * (entry.blocks - 1) < entry.rows <= full * entry.blocks for entry in shards[-1:])
