"""The shards of one split: plain WebDataset tars, the same bytes for the same rows, with their indices.

A shard is a USTAR archive without compression (mtime 0, owner 0 without names, mode 0644) of one sample per block:

    BBBBBB.tokens.npy   [rows, sequence_length], little-endian uint16 or uint32
    BBBBBB.docs.npy     int64 [n, 3] of (row in block, start in row, document number)

BBBBBB is the block's number in the split, through all its shards. Each .npy has format version 1.0 and a header of
exactly 128 bytes, so the raw values begin 640 bytes after their tar header.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from megamask.data.corpus.pack import RowGroup
from megamask.data.index import (
    BLOCK_DTYPE,
    ShardIndex,
    block_name,
    index_name,
    pack_tar_index,
    tar_index_name,
)
from megamask.data.manifest import ShardEntry
from megamask.storage.hashing import sha256_bytes

NPY_HEADER_BYTES = 128
SHARDS_DIR = "shards"


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The 128 bytes before the values of a C-ordered [n, m] array in NumPy's .npy format, version 1.0.

    Written here because NumPy pads its own header differently from version to version.
    """
    sizes = ", ".join(map(str, shape))
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({sizes}), }}"
    prefix = b"\x93NUMPY\x01\x00" + (NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + text.encode().ljust(NPY_HEADER_BYTES - len(prefix) - 1) + b"\n"


def tar_header(name: str, num_bytes: int) -> bytes:
    """The 512 bytes before a member that holds an array of so many bytes of values."""
    info = tarfile.TarInfo(name)  # owner 0, no owner names, mtime 0 are its defaults
    info.mode = 0o644
    info.size = NPY_HEADER_BYTES + num_bytes
    return info.tobuf(format=tarfile.USTAR_FORMAT)


def archive_bytes(end: int) -> int:
    """Size of an archive whose last member ends there: two blocks of zeros, then zeros up to a full record."""
    return -(-(end + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


class _HashedFile:
    """A new file that hashes what is written into it; all that a tar writer needs of a file."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._file = path.open("xb")
        self._is_aborted = False

    def write(self, data: bytes) -> int:
        if not self._is_aborted:  # the library writes what its buffer holds even while it is garbage-collected
            self._file.write(data)
            self._sha256.update(data)
            self.size += len(data)
        return len(data)

    def close_flushed(self) -> str:
        """Flush the file to the disk, close it and return its sha256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def abort(self) -> None:
        """Close the file as it is; later writes have no effect."""
        self._is_aborted = True
        with contextlib.suppress(OSError):  # a full disk fails the last flush once more
            self._file.close()


class _OpenShard:
    """The shard being written.

    WebDataset's writer makes the archive. Its defaults name an owner, the current time and a read-only mode; with the
    arguments below the same rows give the same bytes.
    """

    def __init__(self, path: Path, first_block: int) -> None:
        from webdataset.writer import TarWriter  # imports torch: only who writes a corpus waits for it

        self.first_block = first_block
        self.blocks: list[tuple[int, ...]] = []
        self.row_crc32c: list[int] = []
        self.sample_offsets: list[int] = []
        self._file = _HashedFile(path)
        self._tar: Any = TarWriter(self._file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False)

    @property
    def _end(self) -> int:
        """Offset of the next member; a part of the bytes before it may be in the writer's buffer."""
        return int(self._tar.tarstream.offset)

    def add(self, block: RowGroup) -> None:
        name = block_name(self.first_block + len(self.blocks))
        self.sample_offsets.append(self._end)
        # Two calls: within one the library sorts the members, and tokens come first.
        tokens_offset, tokens_bytes, tokens_crc = self._add_array(name, "tokens.npy", block.tokens)
        docs_offset, docs_bytes, docs_crc = self._add_array(name, "docs.npy", block.docs)
        tokens_part = (tokens_offset, tokens_bytes, len(block.tokens), tokens_crc)
        docs_part = (docs_offset, docs_bytes, len(block.docs), docs_crc)
        self.blocks.append((*tokens_part, *docs_part))
        self.row_crc32c += [crc32c(row.tobytes()) for row in block.tokens]

    def _add_array(self, key: str, suffix: str, array: npt.NDArray[Any]) -> tuple[int, int, int]:
        """Append a member and return where its raw values are: (offset, bytes, crc32c)."""
        offset = self._end + tarfile.BLOCKSIZE + NPY_HEADER_BYTES
        values = np.ascontiguousarray(array).tobytes()
        self._tar.write({"__key__": key, suffix: npy_header(array.shape, array.dtype) + values})
        return offset, len(values), crc32c(values)

    def close(self) -> tuple[int, int, str]:
        """End the archive, flush it to the disk and return where its last sample ends, its size and its sha256."""
        end = self._end
        self._tar.close()
        return end, self._file.size, self._file.close_flushed()

    def abort(self) -> None:
        """Close the file without ending the archive."""
        self._file.abort()


class ShardWriter:
    """Writer of the blocks of one split into shards under `<folder>/shards/`.

    Args:
        folder: the corpus folder being built; `shards/` exists.
        split: name of the split.
        blocks_per_shard: blocks of a shard; the last one may have fewer.
        sequence_length: tokens of a row.
        itemsize: bytes of a token, 2 or 4.
    """

    def __init__(self, folder: Path, split: str, *, blocks_per_shard: int, sequence_length: int, itemsize: int) -> None:
        self._folder = folder
        self._split = split
        self._blocks_per_shard = blocks_per_shard
        self._sequence_length = sequence_length
        self._itemsize = itemsize
        self._open: _OpenShard | None = None
        self._num_blocks = 0
        self.shards: list[ShardEntry] = []

    def add(self, block: RowGroup) -> None:
        """Append a block to the shard being written and end the shard when it is full.

        Raises:
            OSError: the storage refused; the shard is not listed in `shards`.
        """
        if self._open is None:
            path = self._folder / self._shard_name()
            self._open = _OpenShard(path, self._num_blocks)
        self._open.add(block)
        self._num_blocks += 1
        if len(self._open.blocks) == self._blocks_per_shard:
            self._close_shard()

    def finish(self) -> None:
        """End the last shard; `shards` is complete afterwards."""
        if self._open is not None:
            self._close_shard()

    def abort(self) -> None:
        """Close the file being written after a failure; the caller deletes the folder."""
        if self._open is not None:
            self._open.abort()
            self._open = None

    def _shard_name(self) -> str:
        return f"{SHARDS_DIR}/{self._split}-{len(self.shards):06d}.tar"

    def _close_shard(self) -> None:
        shard = self._open
        if shard is None:
            return
        end, size, sha256 = shard.close()
        name = self._shard_name()
        index = ShardIndex(
            first_block=shard.first_block,
            shard_bytes=size,
            sequence_length=self._sequence_length,
            itemsize=self._itemsize,
            blocks=np.array(shard.blocks, dtype=BLOCK_DTYPE),
            row_crc32c=np.array(shard.row_crc32c, dtype="<u4"),
        ).pack()
        tar_index = pack_tar_index(shard.sample_offsets, end)
        write_flushed(self._folder / index_name(name), index)
        write_flushed(self._folder / tar_index_name(name), tar_index)
        self.shards.append(
            ShardEntry(
                name=name,
                sha256=sha256,
                bytes=size,
                blocks=len(shard.blocks),
                rows=len(shard.row_crc32c),
                index_sha256=sha256_bytes(index),
                tar_index_sha256=sha256_bytes(tar_index),
            )
        )
        self._open = None


def write_flushed(path: Path, data: bytes) -> None:
    """Write a new file and flush it; for folders that are not visible yet, where a rename would be wasted."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
