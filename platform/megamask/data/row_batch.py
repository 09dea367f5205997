"""Rows as a reader returns them: token ids, the documents of each row, and checksums of both.

Shapes: n rows, L tokens of a row, k documents of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

Int64Array = npt.NDArray[np.int64]

_PAIR_BYTES = 16
_NO_DOCUMENTS = np.empty((0, 2), dtype="<i8")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as it was read.

    Args:
        tokens: [L] in the stored type (little-endian uint16 or uint32).
        documents: int64 [k, 2]: (start, document number) of each document with tokens in the row; start 0 also where
            the document began in an earlier row.
        tokens_crc32c: of the tokens' bytes as they were read.
        documents_crc32c: of the pairs as little-endian int64, computed from what was read.
    """

    tokens: npt.NDArray[Any]
    documents: Int64Array
    tokens_crc32c: int
    documents_crc32c: int


class BlockDocuments:
    """The document table of a shard block, by row.

    Args:
        table: int64 [n, 3] of (row in the block, start, document number), as stored.
        num_rows: rows of the block.
    """

    def __init__(self, table: Int64Array, num_rows: int) -> None:
        rows = table[:, 0]
        if (rows[1:] < rows[:-1]).any():  # checksums hold, so a writer made it so
            table = table[rows.argsort(kind="stable")]
        self._pairs = np.ascontiguousarray(table[:, 1:], dtype="<i8")
        self._bytes = self._pairs.reshape(-1).view(np.uint8).data
        self._bounds: list[int] = table[:, 0].searchsorted(np.arange(num_rows + 1)).tolist()

    def pairs(self, row: int) -> Int64Array:
        """Return (start, document number) of each document of a row of the block: little-endian int64 [k, 2]."""
        return self._pairs[self._bounds[row] : self._bounds[row + 1]]

    def checksum(self, row: int) -> int:
        """Return the crc32c of the pairs of a row."""
        return int(crc32c(self._bytes[self._bounds[row] * _PAIR_BYTES : self._bounds[row + 1] * _PAIR_BYTES]))


class RowBatch:
    """Rows as they were read, in the order asked for.

    Documents are looked up in the tables of their blocks, checked, when they are first asked for.

    Args:
        tokens: [n, L] in the stored type.
        tokens_crc32c: of each row's bytes as they were read; 0 for a row that was not read. int64 [n].
        blocks: of each row; -1 for a row that was not read, which has no documents. int64 [n].
        in_block: each row's number in its block, int64 [n].
        table_of: the documents of a block.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        tokens_crc32c: Int64Array,
        blocks: Int64Array,
        in_block: Int64Array,
        *,
        table_of: Callable[[int], BlockDocuments],
    ) -> None:
        self.tokens = tokens
        self._checksums = tokens_crc32c
        self._blocks = blocks
        self._in_block = in_block
        self._table_of = table_of

    @cached_property
    def tokens_crc32c(self) -> list[int]:
        """crc32c of each row's bytes as they were read; 0 for a row that was not read."""
        checksums: list[int] = self._checksums.tolist()
        return checksums

    @cached_property
    def _places(self) -> list[tuple[BlockDocuments | None, int]]:
        """Table and number in its block of each row."""
        tables = [None if block < 0 else self._table_of(block) for block in self._blocks.tolist()]
        return list(zip(tables, self._in_block.tolist(), strict=True))

    @cached_property
    def documents(self) -> list[Int64Array]:
        """(start, document number) of the documents of each row, as in `Row`."""
        return [_NO_DOCUMENTS if table is None else table.pairs(row) for table, row in self._places]

    @cached_property
    def documents_crc32c(self) -> list[int]:
        """crc32c of each row's documents; 0 for a row that was not read."""
        return [0 if table is None else table.checksum(row) for table, row in self._places]

    def row(self, place: int) -> Row:
        """One of the rows."""
        return Row(
            tokens=self.tokens[place],
            documents=self.documents[place],
            tokens_crc32c=self.tokens_crc32c[place],
            documents_crc32c=self.documents_crc32c[place],
        )

    def spread(self, is_read: npt.NDArray[np.bool_], *, fill: int) -> RowBatch:
        """These rows at the places of a mask bool [n]; at the others rows of one id, without documents, checksums 0."""
        tokens = np.full((len(is_read), self.tokens.shape[1]), fill, dtype=self.tokens.dtype)
        tokens[is_read] = self.tokens
        values = np.zeros((3, len(is_read)), dtype=np.int64)
        values[1] = -1
        values[:, is_read] = self._checksums, self._blocks, self._in_block
        return RowBatch(tokens, *values, table_of=self._table_of)
