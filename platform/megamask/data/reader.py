"""Rows of a corpus by number: one pread through the index, and never a row that fails its checksum.

At open every index is checked against the manifest and every shard's size; on every read the row's crc32c and the
crc32c of its block's document table. Damage raises, naming shard, member and row; nothing is skipped or replaced.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from megamask.data.content import documents_checksum
from megamask.data.index import DOCS_COLUMNS, ShardIndex, block_name, index_bytes
from megamask.data.lru import LeastRecentlyUsed
from megamask.data.manifest import Manifest, ShardEntry
from megamask.errors import DataIntegrityError
from megamask.storage.durable import storage_errors
from megamask.storage.hashing import sha256_bytes
from megamask.storage.plain_files import NotPlainError, open_plain, read_plain

_OPEN_SHARDS = 128  # file descriptors
_LOADED_INDEXES = 256  # about 80 KiB each with the default shard shape
_LOADED_DOCUMENTS = 256  # blocks


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as it was read.

    Args:
        tokens: [L] in the stored type (little-endian uint16 or uint32).
        documents: int64 [n, 2]: (start, document number) of each document with tokens in the row; start 0 also where
            the document began in an earlier row.
        tokens_crc32c: of the tokens' bytes as they were read.
        documents_crc32c: of the pairs as little-endian int64, computed from what was read.
    """

    tokens: npt.NDArray[Any]
    documents: npt.NDArray[np.int64]
    tokens_crc32c: int
    documents_crc32c: int


@dataclass(frozen=True, kw_only=True)
class RowLocation:
    """Where a row lies: its shard, its shard block, and its number in each of them."""

    shard: int
    block: int  # in the shard
    row: int  # in the block
    row_of_shard: int


class SplitReader:
    """Random access to the rows of one split; for one thread at a time.

    Args:
        corpus_dir: the corpus folder.
        manifest: its manifest.
        split: "train" or "validation".

    Raises:
        UsageError: the corpus has no such split.
        DataIntegrityError: an index is damaged or a shard is missing or has another size.
    """

    def __init__(self, corpus_dir: str | Path, manifest: Manifest, split: str) -> None:
        self._folder = Path(corpus_dir)
        self._manifest = manifest
        self._split = split
        self._shards = manifest.split(split).shards
        self._itemsize = manifest.dtype.itemsize
        self._row_bytes = manifest.sequence_length * self._itemsize
        self._indexes: LeastRecentlyUsed[int, _LoadedIndex] = LeastRecentlyUsed(_LOADED_INDEXES)
        self._descriptors: LeastRecentlyUsed[int, int] = LeastRecentlyUsed(_OPEN_SHARDS, on_drop=os.close)
        self._documents: LeastRecentlyUsed[tuple[int, int], npt.NDArray[np.int64]] = LeastRecentlyUsed(
            _LOADED_DOCUMENTS
        )
        self._first_row = _starts([entry.rows for entry in self._shards])
        self._first_block = _starts([entry.blocks for entry in self._shards])
        block_rows = [np.empty(0, np.int64)]
        for shard, entry in enumerate(self._shards):
            self._check_size(entry, self._stat_size(entry))
            block_rows.append(self._index(shard).index.blocks["rows"].astype(np.int64))
        self.block_rows: npt.NDArray[np.int64] = np.concatenate(block_rows)

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return int(self._first_row[-1])

    def read(self, row: int) -> Row:
        """The row of a number (0-based, through the shards in name order), checked.

        Raises:
            IndexError: the split has no such row.
            DataIntegrityError: the row or its document table is damaged.
            StorageError: the device does not answer.
        """
        place = self._locate(row)
        index = self._index(place.shard).index
        offset = int(index.blocks["tokens_offset"][place.block]) + place.row * self._row_bytes
        data = self._pread(place.shard, offset, self._row_bytes)
        found, expected = int(crc32c(data)), int(index.row_crc32c[place.row_of_shard])
        if found != expected or len(data) != self._row_bytes:
            where = f"row {place.row} of the block (row {row} of split {self._split})"
            raise self._damaged(place, "tokens", where, found, expected)
        table = self._documents.get((place.shard, place.block), lambda: self._read_documents(place))
        documents = np.ascontiguousarray(table[table[:, 0] == place.row, 1:])
        return Row(
            tokens=np.frombuffer(data, dtype=self._manifest.dtype),
            documents=documents,
            tokens_crc32c=found,
            documents_crc32c=documents_checksum(documents),
        )

    def will_need(self, rows: Iterable[int]) -> None:
        """Tells the system which rows are read next, so that it fetches them all at once; reads nothing itself."""
        if not hasattr(os, "posix_fadvise"):
            return
        for row in rows:
            place = self._locate(row)
            blocks = self._index(place.shard).index.blocks
            offset = int(blocks["tokens_offset"][place.block]) + place.row * self._row_bytes
            with storage_errors(f"reading {self._path(place.shard)}"):
                os.posix_fadvise(self._descriptor(place.shard), offset, self._row_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        self._descriptors.clear()

    def _locate(self, row: int) -> RowLocation:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of split {self._split}, which has {self.num_rows} rows")
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        row_of_shard = row - int(self._first_row[shard])
        first_rows = self._index(shard).first_rows
        block = int(np.searchsorted(first_rows, row_of_shard, side="right")) - 1
        return RowLocation(
            shard=shard, block=block, row=row_of_shard - int(first_rows[block]), row_of_shard=row_of_shard
        )

    def _read_documents(self, place: RowLocation) -> npt.NDArray[np.int64]:
        record = self._index(place.shard).index.blocks[place.block]
        size = int(record["docs_bytes"])
        data = self._pread(place.shard, int(record["docs_offset"]), size)
        found, expected = int(crc32c(data)), int(record["docs_crc32c"])
        if found != expected or len(data) != size:
            raise self._damaged(place, "docs", "the table of the block's documents", found, expected)
        return np.frombuffer(data, dtype="<i8").reshape(-1, DOCS_COLUMNS).astype(np.int64)

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        descriptor = self._descriptor(shard)
        with storage_errors(f"reading {self._path(shard)}"):
            data = os.pread(descriptor, size, offset)
            while 0 < len(data) < size:
                piece = os.pread(descriptor, size - len(data), offset + len(data))
                if not piece:
                    break
                data += piece
        return data

    def _descriptor(self, shard: int) -> int:
        return self._descriptors.get(shard, lambda: self._open(shard))

    def _open(self, shard: int) -> int:
        path = self._path(shard)
        try:
            with storage_errors(f"opening {path}"):
                descriptor = open_plain(path)
        except FileNotFoundError:
            raise _missing(path) from None
        except NotPlainError as error:
            raise _not_plain(error) from error
        try:
            self._check_size(self._shards[shard], os.fstat(descriptor).st_size)
        except DataIntegrityError:
            os.close(descriptor)
            raise
        return descriptor

    def _path(self, shard: int) -> Path:
        return self._folder / self._shards[shard].name

    def _stat_size(self, entry: ShardEntry) -> int:
        path = self._folder / entry.name
        try:
            with storage_errors(f"opening {path}"):
                status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise _missing(path) from None
        if not stat.S_ISREG(status.st_mode):
            raise _not_plain(NotPlainError(f"{path} is a link or no plain file"))
        return status.st_size

    def _check_size(self, entry: ShardEntry, size: int) -> None:
        if size != entry.bytes:
            raise DataIntegrityError(
                f"{self._folder / entry.name} has {size} bytes, the manifest says {entry.bytes}. "
                "No sample of it was used.",
                hint="restore the file or prepare the corpus again",
            )

    def _index(self, shard: int) -> _LoadedIndex:
        def load() -> _LoadedIndex:
            first_block = int(self._first_block[shard])
            return _LoadedIndex.of(load_index(self._folder, self._manifest, self._shards[shard], first_block))

        return self._indexes.get(shard, load)

    def _damaged(self, place: RowLocation, kind: str, what: str, found: int, expected: int) -> DataIntegrityError:
        block = int(self._first_block[place.shard]) + place.block
        return DataIntegrityError(
            f"{self._path(place.shard)}: member {block_name(block)}.{kind}.npy, {what}: "
            f"crc32c is {found:08x}, the index says {expected:08x}. It was not used.",
            hint="restore the file or prepare the corpus again",
        )


@dataclass(frozen=True, kw_only=True)
class _LoadedIndex:
    index: ShardIndex
    first_rows: npt.NDArray[np.int64]

    @classmethod
    def of(cls, index: ShardIndex) -> _LoadedIndex:
        return cls(index=index, first_rows=index.first_rows())


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
        raise _missing(path) from None
    except NotPlainError as error:
        raise _not_plain(error) from error
    digest = sha256_bytes(data)
    if digest != entry.index_sha256:
        raise DataIntegrityError(
            f"{path}: sha256 is {digest}, the manifest says {entry.index_sha256}. No sample of its shard was used.",
            hint="restore the file or prepare the corpus again",
        )
    index = ShardIndex.unpack(data, name=str(path))
    found = (index.num_blocks, index.num_rows, index.first_block, index.shard_bytes)
    expected = (entry.blocks, entry.rows, first_block, entry.bytes)
    shape = (index.sequence_length, index.itemsize)
    if found != expected or shape != (manifest.sequence_length, manifest.dtype.itemsize):
        raise DataIntegrityError(
            f"{path}: (blocks, rows, first block, shard bytes) are {found}, the manifest says {expected}; "
            f"(sequence length, itemsize) are {shape}, the manifest says "
            f"{(manifest.sequence_length, manifest.dtype.itemsize)}. No sample of its shard was used.",
            hint="prepare the corpus again",
        )
    return index


def _starts(counts: list[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _missing(path: Path) -> DataIntegrityError:
    return DataIntegrityError(
        f"{path} is missing, but the manifest names it. No sample of it was used.",
        hint="restore the file or prepare the corpus again",
    )


def _not_plain(error: NotPlainError) -> DataIntegrityError:
    return DataIntegrityError(
        f"{error}; a corpus holds plain files only. No sample of it was used.",
        hint="restore the file or prepare the corpus again",
    )
