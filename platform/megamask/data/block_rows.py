"""Number of rows in each shard block, derived from the manifest where possible.

A packer fills every block but the last one of a split, so the manifest's counts fix the rows of each block, and the
order of a corpus is known before any index was read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from megamask.data.manifest import Manifest, ShardEntry


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
