"""Packing of documents into rows without cutting those that fit: best fit, longest first, within a window.

Documents are collected in their order until a window is full: `WINDOW_TOKENS`, or 64 rows where rows are long. A
document longer than a row gives full rows from its beginning, and a remainder. Of the window's pieces the longest is
placed first (of equal ones the earlier), each into the row with the least room that still holds it (of equal ones the
row begun first), or into a new row. Rows follow one another by their earliest document; within a row pieces keep the
order of their documents. What stays free is padding. No row spans two windows.

This is best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"), applied window by window,
so that memory is bounded. The layout is a function of the documents' lengths alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megamask.data.corpus.pack import RowGroup
from megamask.data.index import DOCS_COLUMNS

BEST_FIT_NAME = "best-fit"
BEST_FIT_VERSION = 1
WINDOW_TOKENS = 1 << 24
_FEWEST_ROWS = 64

# (listed number, ids) of each segment of a document.
ListedSegments = Sequence[tuple[int, npt.NDArray[Any]]]


class Piece(NamedTuple):
    """Consecutive tokens of a document in one row: all of them, or the part from `begin` on."""

    document: int
    begin: int
    length: int


class BestFitPlan:
    """Assignment of pieces of documents to rows, from their lengths alone.

    Args:
        sequence_length: tokens of a row.
        window_tokens: documents are collected up to so many tokens.
    """

    def __init__(self, sequence_length: int, window_tokens: int = WINDOW_TOKENS) -> None:
        self._length = sequence_length
        self._window_tokens = max(window_tokens, _FEWEST_ROWS * sequence_length)
        self._pieces: list[Piece] = []
        self._held = 0

    def add(self, document: int, num_tokens: int) -> list[list[Piece]]:
        """Add a document and return the rows of the window that it fills, or none."""
        for begin in range(0, num_tokens, self._length):
            self._pieces.append(Piece(document, begin, min(self._length, num_tokens - begin)))
        self._held += num_tokens
        return self.finish() if self._held >= self._window_tokens else []

    def finish(self) -> list[list[Piece]]:
        """Return the rows of the window as it is."""
        pieces, length = self._pieces, self._length
        rows: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (room, row), ascending
        for number in sorted(range(len(pieces)), key=lambda number: -pieces[number].length):
            size = pieces[number].length
            place = bisect_left(rooms, (size, -1))
            if place == len(rooms):
                room, row = length, len(rows)
                rows.append([])
            else:
                room, row = rooms.pop(place)
            rows[row].append(number)
            if room > size:
                insort(rooms, (room - size, row))
        self._pieces, self._held = [], 0
        return [[pieces[number] for number in row] for row in sorted(map(sorted, rows))]


class BestFitPacker:
    """Packer of the documents of one split; holds the documents of a window and one block.

    Args:
        sequence_length: tokens of a row.
        rows_per_block: rows of a block; the last one may have fewer.
        dtype: stored type of a token.
        pad_token_id: fills the room that rows have left.
        window_tokens: as of `BestFitPlan`.
    """

    def __init__(
        self,
        *,
        sequence_length: int,
        rows_per_block: int,
        dtype: np.dtype[Any],
        pad_token_id: int,
        window_tokens: int = WINDOW_TOKENS,
    ) -> None:
        self._length = sequence_length
        self._plan = BestFitPlan(sequence_length, window_tokens)
        self._tokens = np.full((rows_per_block, sequence_length), pad_token_id, dtype=dtype)
        self._pad = pad_token_id
        self._rows = 0
        self._docs: list[tuple[int, int, int]] = []
        self._documents: dict[int, ListedSegments] = {}
        self._lengths: list[int] = []
        self.num_tokens = 0
        self.num_padding = 0

    def add_document(self, number: int, segments: ListedSegments) -> Iterator[RowGroup]:
        """Add a document and yield the blocks that are full now.

        Args:
            number: the document's number.
            segments: its ids, the end-of-document id last, each segment with the number it is listed under.
        """
        size = sum(len(tokens) for _, tokens in segments)
        self._lengths.append(size)
        self._documents[number] = segments
        yield from self._lay(self._plan.add(number, size))

    def finish(self) -> Iterator[RowGroup]:
        """Lay the rows of the last window and yield the last blocks."""
        yield from self._lay(self._plan.finish())
        if self._rows:
            yield self._emit()

    def statistics(self) -> dict[str, Any]:
        """Return what the manifest records of a split; see `packing_statistics`."""
        return packing_statistics(self._lengths, self._length)

    def _lay(self, rows: Sequence[Sequence[Piece]]) -> Iterator[RowGroup]:
        for row in rows:
            filled = 0
            for piece in row:
                for listed, tokens in _part(self._documents[piece.document], piece):
                    self._docs.append((self._rows, filled, listed))
                    self._tokens[self._rows, filled : filled + len(tokens)] = tokens
                    filled += len(tokens)
            self.num_tokens += filled
            self.num_padding += self._length - filled
            self._rows += 1
            if self._rows == len(self._tokens):
                yield self._emit()
        if rows:
            self._documents.clear()  # a document is in one window

    def _emit(self) -> RowGroup:
        group = RowGroup(
            tokens=self._tokens[: self._rows].copy(),
            docs=np.array(self._docs, dtype="<i8").reshape(-1, DOCS_COLUMNS),
        )
        self._tokens[:] = self._pad
        self._rows, self._docs = 0, []
        return group


def packing_statistics(lengths: Iterable[int], sequence_length: int) -> dict[str, Any]:
    """Return the statistics of a split that is packed by best fit.

    Args:
        lengths: tokens of each document.
        sequence_length: tokens of a row.

    Returns:
        longest_document: tokens; cut_documents: longer than a row; pieces: of all documents; lengths: documents by
        power of two of their tokens, as {"2^k": count}.
    """
    longest = cut = pieces = 0
    powers: Counter[int] = Counter()
    for length in lengths:
        longest = max(longest, length)
        cut += length > sequence_length
        pieces += -(-length // sequence_length)
        powers[length.bit_length() - 1] += 1
    counts: Mapping[str, int] = {f"2^{power}": powers[power] for power in sorted(powers)}
    return {"longest_document": longest, "cut_documents": cut, "pieces": pieces, "lengths": counts}


def _part(segments: ListedSegments, piece: Piece) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The segments of a document that have tokens in a piece, cut to it."""
    start, end = piece.begin, piece.begin + piece.length
    position = 0
    for listed, tokens in segments:
        part = tokens[max(0, start - position) : max(0, end - position)]
        if len(part):
            yield listed, part
        position += len(tokens)
