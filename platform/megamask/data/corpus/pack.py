"""Packing of documents into rows: concatenate, then cut.

The documents of a split, each with its end-of-document id, are laid one after another and cut into rows of
sequence_length tokens. Nothing is dropped or reordered; only the last row of a split is filled up with the pad id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megamask.data.index import DOCS_COLUMNS

PACKER_NAME = "concatenate-and-cut"
PACKER_VERSION = 1


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The stored type of a token: little-endian uint16 where every id fits, uint32 otherwise."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """Rows of one shard block.

    Args:
        tokens: [rows, sequence_length] in the stored type.
        docs: int64 [n, 3] of (row in block, start in row, document number), ascending; a row that begins inside a
            document has an entry for it with start 0, so every row lists every document that has a token in it.
    """

    tokens: npt.NDArray[Any]
    docs: npt.NDArray[np.int64]


class RowPacker:
    """Packer of the documents of one split; holds at most one block.

    Args:
        sequence_length: tokens of a row.
        rows_per_block: rows of a block; the last one may have fewer.
        dtype: stored type of a token.
        pad_token_id: fills the last row.
    """

    def __init__(self, *, sequence_length: int, rows_per_block: int, dtype: np.dtype[Any], pad_token_id: int) -> None:
        self._length = sequence_length
        self._pad = pad_token_id
        self._buffer = np.empty(rows_per_block * sequence_length, dtype=dtype)
        self._filled = 0
        self._docs: list[tuple[int, int, int]] = []
        self.num_tokens = 0
        self.num_padding = 0

    def add_document(self, number: int, segments: Sequence[tuple[int, npt.NDArray[Any]]]) -> Iterator[RowGroup]:
        """Append a document by its segments, each with the number it is listed under; yield the blocks it fills."""
        del number
        for listed, tokens in segments:
            yield from self.add(listed, tokens)

    def statistics(self) -> None:
        """Return no statistics: the manifest of a concatenated corpus has none beside its counts."""

    def add(self, number: int, tokens: npt.NDArray[Any]) -> Iterator[RowGroup]:
        """Append a document and yield the blocks that it fills.

        Args:
            number: the document's number.
            tokens: [n], the end-of-document id last; n >= 1.
        """
        self.num_tokens += len(tokens)
        done = 0
        while done < len(tokens):
            count = min(len(tokens) - done, len(self._buffer) - self._filled)
            self._note(number, count)
            self._buffer[self._filled : self._filled + count] = tokens[done : done + count]
            self._filled += count
            done += count
            if self._filled == len(self._buffer):
                yield self._emit()

    def finish(self) -> Iterator[RowGroup]:
        """Fill the last row with padding and yield the last block, if there is anything left."""
        if self._filled:
            padding = -self._filled % self._length
            self._buffer[self._filled : self._filled + padding] = self._pad
            self._filled += padding
            self.num_padding += padding
            yield self._emit()

    def _note(self, number: int, count: int) -> None:
        """List the document in every row that the next `count` tokens touch."""
        row, start = divmod(self._filled, self._length)
        last_row = (self._filled + count - 1) // self._length
        self._docs.append((row, start, number))
        self._docs.extend((later, 0, number) for later in range(row + 1, last_row + 1))

    def _emit(self) -> RowGroup:
        tokens = self._buffer[: self._filled].reshape(-1, self._length).copy()
        docs = np.array(self._docs, dtype="<i8").reshape(-1, DOCS_COLUMNS)
        self._filled = 0
        self._docs = []
        return RowGroup(tokens=tokens, docs=docs)
