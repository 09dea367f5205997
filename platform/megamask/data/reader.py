"""Rows of a corpus by number: read in batches through the index, each checked against its checksum.

The size of every shard and index is compared with the manifest on opening. A shard's index is read when a row of the
shard is first wanted, and compared with the manifest's digest then. On every read the row's crc32c and the crc32c of
its block's document table are checked. Damage raises, naming shard, member and row; nothing
is skipped or replaced.

Shapes: n rows, L tokens of a row, k documents of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from megamask.data.block_rows import split_blocks
from megamask.data.index import DOCS_COLUMNS, ShardIndex, block_name, index_bytes
from megamask.data.lru import LeastRecentlyUsed
from megamask.data.manifest import Manifest, ShardEntry
from megamask.data.remote import RemoteCorpus, RemoteShards
from megamask.data.row_batch import BlockDocuments, Row, RowBatch
from megamask.data.shard_files import ShardFiles, missing, not_plain
from megamask.errors import DataIntegrityError
from megamask.storage.durable import storage_errors
from megamask.storage.hashing import sha256_bytes
from megamask.storage.plain_files import NotPlainError, read_plain

Int64Array = npt.NDArray[np.int64]

_MORE_THAN_A_WINDOW = 192  # a batch may reach into the next window


class SplitReader:
    """Random access to the rows of one split; for one thread at a time.

    Args:
        corpus_dir: the corpus folder.
        manifest: its manifest.
        split: "train" or "validation".
        window_blocks: blocks that rows are read from in turn; the document tables, and the indexes, of as many and
            some more are kept: about 20 KiB a table, and 80 KiB an index with the default shard shape.
        remote: where the shards are, of a corpus in an object store; `corpus_dir` is its local copy then.

    Raises:
        UsageError: the corpus has no such split.
        DataIntegrityError: a file is missing or cut, or an index that had to be read is damaged.
    """

    def __init__(
        self,
        corpus_dir: str | Path,
        manifest: Manifest,
        split: str,
        *,
        window_blocks: int = 64,
        remote: RemoteCorpus | None = None,
    ) -> None:
        self._folder = Path(corpus_dir)
        self._manifest = manifest
        self._split = split
        self._shards = manifest.split(split).shards
        self._row_bytes = manifest.sequence_length * manifest.dtype.itemsize
        self._remote = remote
        self._files: ShardFiles | RemoteShards = (
            ShardFiles(self._folder, self._shards) if remote is None else remote.shard_files(self._shards, self._index)
        )
        self._indexes: LeastRecentlyUsed[int, ShardIndex] = LeastRecentlyUsed(window_blocks + _MORE_THAN_A_WINDOW)
        self._documents: LeastRecentlyUsed[int, BlockDocuments] = LeastRecentlyUsed(window_blocks + _MORE_THAN_A_WINDOW)
        self._first_row = _starts([entry.rows for entry in self._shards])
        self._first_block = _starts([entry.blocks for entry in self._shards])
        self.blocks = split_blocks(
            manifest, split, lambda shard: self._load_index(shard).blocks["rows"].astype(np.int64)
        )
        self.block_rows: Int64Array = self.blocks.rows
        self._first_row_of_block = self.blocks.first_row

    @property
    def num_rows(self) -> int:
        """Number of rows of the split."""
        return int(self._first_row[-1])

    def read(self, row: int) -> Row:
        """The row of a number (0-based, through the shards in name order), checked; raises as `read_rows`."""
        return self.read_rows([row]).row(0)

    def read_rows(self, rows: Sequence[int] | Int64Array) -> RowBatch:
        """Rows by number, checked: read in the order of the files, returned in the order given.

        The document tables of their blocks are read and checked when the batch is first asked for documents, by the
        same thread; that raises as this.

        Raises:
            IndexError: the split has no such row.
            DataIntegrityError: a row is damaged, or the index of its shard.
            StorageError: the device does not answer.
        """
        places = self._locate(rows)
        count = len(places.order)
        tokens = np.empty((count, self._manifest.sequence_length), dtype=self._manifest.dtype)
        offsets, expected = self._addresses(places)
        found = self._files.read_spans(places.shards.tolist(), offsets, self._views(tokens, places.order))
        if len(found) < count:
            raise self._cut_off(int(places.blocks[len(found)]), offsets[len(found)])
        if found != expected:
            raise self._damaged_row(places, np.array(found), np.array(expected))
        in_order = np.empty((3, count), dtype=np.int64)
        in_order[0, places.order] = found
        in_order[1, places.order] = places.blocks
        in_order[2, places.order] = places.in_block
        return RowBatch(tokens, *in_order, table_of=self._table_of)

    def _table_of(self, block: int) -> BlockDocuments:
        return self._documents.get(block, self._read_documents)

    def will_need(self, rows: Iterable[int] | Int64Array) -> None:
        """Announce rows that are read soon, so that the system fetches them all at once; reads no row itself."""
        places = self._locate(rows if isinstance(rows, np.ndarray) else list(rows))
        self._files.will_need(places.shards.tolist(), self._addresses(places)[0], self._row_bytes)

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        self._files.close()

    def _locate(self, rows: Sequence[int] | Int64Array) -> _Places:
        wanted = np.asarray(rows, dtype=np.int64)
        order = wanted.argsort(kind="stable")
        ordered = wanted[order]
        if len(wanted) and not 0 <= ordered[0] <= ordered[-1] < self.num_rows:
            outside = wanted[(wanted < 0) | (wanted >= self.num_rows)]
            raise IndexError(f"row {outside[0]} of split {self._split}, which has {self.num_rows} rows")
        blocks = self._first_row_of_block.searchsorted(ordered, "right") - 1
        shards = self._first_block.searchsorted(blocks, "right") - 1
        return _Places(
            order=order,
            rows=ordered,
            shards=shards,
            blocks=blocks,
            in_block=ordered - self._first_row_of_block[blocks],
            of_shard=ordered - self._first_row[shards],
        )

    def _addresses(self, places: _Places) -> tuple[list[int], list[int]]:
        """Offset in its shard, and crc32c by its index, of each row."""
        # One loop over plain integers: the rows of a shuffled batch are in about as many shards.
        blocks = (places.blocks - self._first_block[places.shards]).tolist()
        within = (places.in_block * self._row_bytes).tolist()
        offsets, expected, last = [], [], -1
        for shard, block, offset, row in zip(
            places.shards.tolist(), blocks, within, places.of_shard.tolist(), strict=True
        ):
            if shard != last:
                index, last = self._index(shard), shard
                begins, checksums = index.tokens_offsets, index.row_checksums
            offsets.append(begins[block] + offset)
            expected.append(checksums[row])
        return offsets, expected

    def _views(self, tokens: npt.NDArray[Any], order: Int64Array) -> list[memoryview]:
        """The bytes of rows of an array [n, L], in an order."""
        if not len(tokens):
            return []
        data, size = tokens.reshape(-1).view(np.uint8).data, self._row_bytes
        return [data[start : start + size] for start in (order * size).tolist()]

    def _cut_off(self, block: int, offset: int) -> DataIntegrityError:
        shard = int(self._first_block.searchsorted(block, "right")) - 1
        return DataIntegrityError(
            f"{self._files.path(shard)}: member {block_name(block)}.tokens.npy: the file ends within the row at byte "
            f"{offset}. It was not used.",
            hint="restore the file or prepare the corpus again",
        )

    def _damaged_row(self, places: _Places, found: Int64Array, expected: Int64Array) -> DataIntegrityError:
        """The error of the damaged row that comes first in the batch."""
        wrong = np.flatnonzero(found != expected)
        number = int(wrong[np.argmin(places.order[wrong])])
        shard, block = int(places.shards[number]), int(places.blocks[number])
        begin = int(self._index(shard).blocks["tokens_offset"][block - int(self._first_block[shard])])
        where = (
            f"row {places.in_block[number]} of the block (row {places.rows[number]} of split {self._split}), byte "
            f"{begin + int(places.in_block[number]) * self._row_bytes}"
        )
        return self._damaged(block, "tokens", where, int(found[number]), int(expected[number]))

    def _read_documents(self, block: int) -> BlockDocuments:
        return BlockDocuments(self.document_table(block), int(self.block_rows[block]))

    def document_table(self, block: int) -> Int64Array:
        """The document table of a block of the split, checked: int64 [n, 3] of (row in the block, start, number).

        Raises: as `read_rows`.
        """
        shard = int(np.searchsorted(self._first_block, block, side="right")) - 1
        record = self._index(shard).blocks[block - int(self._first_block[shard])]
        size = int(record["docs_bytes"])
        data = self._files.read(shard, int(record["docs_offset"]), size)
        found, expected = int(crc32c(data)), int(record["docs_crc32c"])
        if found != expected or len(data) != size:
            where = f"the table of the block's documents, byte {int(record['docs_offset'])}"
            raise self._damaged(block, "docs", where, found, expected)
        return np.frombuffer(data, dtype="<i8").reshape(-1, DOCS_COLUMNS).astype(np.int64)

    def _index(self, shard: int) -> ShardIndex:
        return self._indexes.get(shard, self._load_checked)

    def _load_checked(self, shard: int) -> ShardIndex:
        index = self._load_index(shard)
        first, end = int(self._first_block[shard]), int(self._first_block[shard + 1])
        if not np.array_equal(index.blocks["rows"], self.block_rows[first:end]):
            raise DataIntegrityError(
                f"{self._folder / self._shards[shard].index_name}: the rows of its blocks are not those that the "
                "manifest's counts give. No sample of its shard was used.",
                hint="prepare the corpus again",
            )
        return index

    def _load_index(self, shard: int) -> ShardIndex:
        entry = self._shards[shard]
        if self._remote is not None:
            self._remote.copy(entry.index_name, sha256=entry.index_sha256)
        return load_index(self._folder, self._manifest, self._shards[shard], int(self._first_block[shard]))

    def _damaged(self, block: int, kind: str, what: str, found: int, expected: int) -> DataIntegrityError:
        shard = int(np.searchsorted(self._first_block, block, side="right")) - 1
        return DataIntegrityError(
            f"{self._files.path(shard)}: member {block_name(block)}.{kind}.npy, {what}: "
            f"crc32c is {found:08x}, the index has {expected:08x}. It was not used.",
            hint="restore the file or prepare the corpus again",
        )


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Addresses of n rows, sorted by row; each int64 [n].

    Args:
        order: place in the batch.
        rows, blocks: counted through the split.
        shards: numbers.
        in_block, of_shard: the row, counted in its block and in its shard.
    """

    order: Int64Array
    rows: Int64Array
    shards: Int64Array
    blocks: Int64Array
    in_block: Int64Array
    of_shard: Int64Array


def load_index(corpus_dir: Path, manifest: Manifest, entry: ShardEntry, first_block: int) -> ShardIndex:
    """The index of one shard, checked against itself and against the manifest.

    Args:
        corpus_dir: the corpus folder.
        manifest: its manifest.
        entry: the shard in the manifest.
        first_block: number in the split of the shard's first block.

    Raises:
        DataIntegrityError: it is missing, damaged or does not fit the manifest.
    """
    path = corpus_dir / entry.index_name
    try:
        with storage_errors(f"reading {path}"):
            data = read_plain(path, index_bytes(entry.blocks, entry.rows))
    except FileNotFoundError:
        raise missing(path) from None
    except NotPlainError as error:
        raise not_plain(error) from error
    digest = sha256_bytes(data)
    if digest != entry.index_sha256:
        raise DataIntegrityError(
            f"{path}: sha256 is {digest}, the manifest has {entry.index_sha256}. No sample of its shard was used.",
            hint="restore the file or prepare the corpus again",
        )
    index = ShardIndex.unpack(data, name=str(path))
    found = (index.num_blocks, index.num_rows, index.first_block, index.shard_bytes)
    expected = (entry.blocks, entry.rows, first_block, entry.bytes)
    shape = (index.sequence_length, index.itemsize)
    if found != expected or shape != (manifest.sequence_length, manifest.dtype.itemsize):
        raise DataIntegrityError(
            f"{path}: (blocks, rows, first block, shard bytes) are {found}, the manifest has {expected}; "
            f"(sequence length, itemsize) are {shape}, the manifest has "
            f"{(manifest.sequence_length, manifest.dtype.itemsize)}. No sample of its shard was used.",
            hint="prepare the corpus again",
        )
    return index


def _starts(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
