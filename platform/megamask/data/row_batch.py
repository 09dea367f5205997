"""Rows as a reader returns them: token ids, the documents of each row, and checksums of both.

Shapes: n rows, L tokens of a row, k documents of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

Int64Array = npt.NDArray[np.int64]

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
        self._bounds: list[int] = table[:, 0].searchsorted(np.arange(num_rows + 1)).tolist()

    def pairs(self, row: int) -> Int64Array:
        """Return (start, document number) of each document of a row of the block: little-endian int64 [k, 2]."""
        return self._pairs[self._bounds[row] : self._bounds[row + 1]]


class RowBatch:
    """Rows as they were read, in the order asked for.

    Documents are looked up in the tables of their blocks, already checked, when they are first asked for.

    Args:
        tokens: [n, L] in the stored type.
        tokens_crc32c: of each row's bytes as they were read; 0 for a row that was not read.
        tables: the documents of each row's block; None for a row that was not read, which has none.
        in_block: each row's number in its block.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        tokens_crc32c: list[int],
        tables: list[BlockDocuments | None],
        in_block: list[int],
    ) -> None:
        self.tokens = tokens
        self.tokens_crc32c = tokens_crc32c
        self._tables = tables
        self._in_block = in_block

    @cached_property
    def documents(self) -> list[Int64Array]:
        """(start, document number) of the documents of each row, as in `Row`."""
        pairs = zip(self._tables, self._in_block, strict=True)
        return [_NO_DOCUMENTS if table is None else table.pairs(row) for table, row in pairs]

    @cached_property
    def documents_crc32c(self) -> list[int]:
        """crc32c of each row's documents; 0 for a row that was not read."""
        tables = zip(self._tables, self.documents, strict=True)
        return [0 if table is None else crc32c(pairs) for table, pairs in tables]

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
        own = iter(range(len(self._tables)))
        places = [next(own) if read else None for read in is_read.tolist()]
        return RowBatch(
            tokens=tokens,
            tokens_crc32c=[0 if place is None else self.tokens_crc32c[place] for place in places],
            tables=[None if place is None else self._tables[place] for place in places],
            in_block=[0 if place is None else self._in_block[place] for place in places],
        )
