"""Indices in the order of their Philox words: the shuffle of the order law."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from megamask.diffusion.philox import Purpose, philox4x32

Int64Array = npt.NDArray[np.int64]

_LOW_WORD = 0xFFFFFFFF
_PIECE = 1 << 18  # indices per Philox call: bounds the temporaries of a corpus with millions of blocks


def sort_by_words(indices: Int64Array, epoch: int, purpose: Purpose, key: tuple[int, int]) -> Int64Array:
    """Indices sorted by (word0, word1, index) of philox((index_lo, index_hi, epoch, purpose), key)."""
    words = np.empty(len(indices), dtype=np.uint64)
    for start in range(0, len(indices), _PIECE):
        piece = torch.from_numpy(np.ascontiguousarray(indices[start : start + _PIECE]))
        word0, word1, _, _ = philox4x32((piece & _LOW_WORD, piece >> 32, epoch, int(purpose)), key)
        high, low = word0.numpy().astype(np.uint64), word1.numpy().astype(np.uint64)
        words[start : start + _PIECE] = (high << np.uint64(32)) | low
    order = np.argsort(words)
    ordered = words[order]
    if np.any(ordered[1:] == ordered[:-1]):  # about never, and the only case in which the index decides
        order = np.lexsort((indices, words))
    return indices[order]
