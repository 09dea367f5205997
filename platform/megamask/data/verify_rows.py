"""The rows of a split against its documents table: the layout that follows from the lengths of the documents."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megamask.data.corpus.best_fit import BEST_FIT_NAME, BestFitPlan, Piece, packing_statistics
from megamask.data.index import DOCS_COLUMNS, block_name
from megamask.data.manifest import MANIFEST_NAME, Manifest
from megamask.data.roles import without_roles
from megamask.data.verify_shard import CheckedRowGroup, damage
from megamask.errors import MegamaskError


class SplitDocuments:
    """Numbers and lengths of a split's documents, in order."""

    def __init__(self) -> None:
        self.numbers = array("q")
        self.tokens = array("q")
        self.text_bytes = 0


class _Expected(NamedTuple):
    """Expected content of R rows of L tokens."""

    is_padding: npt.NDArray[np.bool_]  # [R * L]
    is_end: npt.NDArray[np.bool_]  # [R * L], places of the end-of-document id
    docs: npt.NDArray[np.int64]  # [n, 3]


class _Layout(Protocol):
    """Rows that documents fill, in order."""

    num_rows: int

    def next(self, num_rows: int) -> _Expected:
        """Return the expected content of the next rows."""


class _Concatenated:
    """Documents one after another, cut into rows."""

    def __init__(self, documents: SplitDocuments, length: int) -> None:
        self._length = length
        self._numbers = np.array(documents.numbers, dtype=np.int64)
        self._ends = np.cumsum(np.array(documents.tokens, dtype=np.int64))
        self._starts = np.concatenate([[0], self._ends[:-1]]).astype(np.int64)
        self._total = int(self._ends[-1]) if len(self._ends) else 0
        self._position = 0  # tokens, padding included, of the rows before
        self.num_rows = -(-self._total // length)

    def next(self, num_rows: int) -> _Expected:
        begin, end = self._position, self._position + num_rows * self._length
        self._position = end
        row_starts = np.arange(begin, end, self._length)
        inside = self._starts[np.searchsorted(self._starts, begin) : np.searchsorted(self._starts, end)]
        positions = np.union1d(row_starts[row_starts < self._total], inside)
        numbers = self._numbers[np.searchsorted(self._starts, positions, side="right") - 1]
        rows, starts = (positions - begin) // self._length, (positions - begin) % self._length
        return _Expected(
            is_padding=np.arange(begin, end) >= self._total,
            is_end=self._marks(self._ends - 1, begin, end),
            docs=np.stack([rows, starts, numbers], axis=1),
        )

    def _marks(self, positions: npt.NDArray[np.int64], begin: int, end: int) -> npt.NDArray[np.bool_]:
        marks = np.zeros(end - begin, dtype=np.bool_)
        marks[positions[np.searchsorted(positions, begin) : np.searchsorted(positions, end)] - begin] = True
        return marks


class _BestFit:
    """Documents packed by best fit."""

    def __init__(self, documents: SplitDocuments, length: int) -> None:
        self._length = length
        self._size = dict(zip(documents.numbers, documents.tokens, strict=True))
        self.num_rows = sum(1 for _ in self._rows())
        self._left = self._rows()

    def next(self, num_rows: int) -> _Expected:
        is_padding = np.ones((num_rows, self._length), dtype=np.bool_)
        is_end = np.zeros((num_rows, self._length), dtype=np.bool_)
        docs: list[tuple[int, int, int]] = []
        for row, pieces in enumerate(islice(self._left, num_rows)):
            filled = 0
            for piece in pieces:
                docs.append((row, filled, piece.document))
                filled += piece.length
                if piece.begin + piece.length == self._size[piece.document]:
                    is_end[row, filled - 1] = True
            is_padding[row, :filled] = False
        entries = np.array(docs, dtype=np.int64).reshape(-1, DOCS_COLUMNS)
        return _Expected(is_padding.reshape(-1), is_end.reshape(-1), entries)

    def _rows(self) -> Iterator[list[Piece]]:
        plan = BestFitPlan(self._length)
        for number, size in self._size.items():
            yield from plan.add(number, size)
        yield from plan.finish()


class SplitRows:
    """Comparison of a split's blocks with the expected layout.

    Args:
        manifest: of the corpus.
        split: its name.
        documents: of the split.
        is_used: bool [vocab_size]; gets the ids that occur.
    """

    def __init__(
        self, manifest: Manifest, split: str, documents: SplitDocuments, is_used: npt.NDArray[np.bool_]
    ) -> None:
        self._manifest = manifest
        self._split = split
        is_best_fit = manifest.content["packer"]["name"] == BEST_FIT_NAME
        layout = _BestFit if is_best_fit else _Concatenated
        self._layout: _Layout = layout(documents, manifest.sequence_length)
        self._is_used = is_used

    def check(self, block: CheckedRowGroup) -> None:
        """Compare the next block.

        Raises:
            DataIntegrityError: it has other tokens or documents.
        """
        flat = block.tokens.reshape(-1)
        expected = self._layout.next(len(block.tokens))
        if int(flat.max()) >= self._manifest.vocab_size:
            raise self._wrong(block, flat >= self._manifest.vocab_size, "an id outside the vocabulary")
        is_mask = flat == self._manifest.mask_token_id
        if is_mask.any():
            raise self._wrong(block, is_mask, "the mask id, which no document may hold")
        is_padding = expected.is_padding
        for is_found, is_expected, what in (
            (flat == self._manifest.pad_token_id, is_padding, "padding where a document belongs, or none behind one"),
            (flat == self._manifest.eod_token_id, expected.is_end, "a document's end misplaced"),
        ):
            if not np.array_equal(is_found, is_expected):
                raise self._wrong(block, is_found != is_expected, what)
        self._is_used[np.unique(flat[~is_padding])] = True
        if not np.array_equal(without_roles(block.docs), expected.docs):
            raise damage(
                f"{block.shard}: member {block_name(block.number)}.docs.npy does not list the documents of its rows "
                "as the documents table has them"
            )

    def finish(self, folder: Path) -> None:
        """Compare the counts of the split after its last block.

        Raises:
            DataIntegrityError: the split has other rows.
        """
        entry, rows = self._manifest.split(self._split), self._layout.num_rows
        if entry.num_rows != rows:
            raise damage(
                f"{folder / MANIFEST_NAME}: split {self._split} has {entry.num_rows} rows; its documents fill {rows}"
            )

    def _wrong(self, block: CheckedRowGroup, is_wrong: npt.NDArray[np.bool_], what: str) -> MegamaskError:
        row, place = divmod(int(np.flatnonzero(is_wrong)[0]), self._manifest.sequence_length)
        return damage(
            f"{block.shard}: member {block_name(block.number)}.tokens.npy, "
            f"row {row} of the block, position {place}: {what}"
        )


def wrong_statistics(manifest: Manifest, documents: dict[str, SplitDocuments]) -> dict[str, Any] | None:
    """Return the packing statistics that follow from the documents if the manifest has others, or None."""
    if manifest.content["packer"]["name"] != BEST_FIT_NAME:
        return None
    expected = {name: packing_statistics(documents[name].tokens, manifest.sequence_length) for name in manifest.splits}
    return None if manifest.content.get("packing") == expected else expected
