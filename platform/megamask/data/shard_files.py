"""The shard files of a corpus folder: opened when first used, few at a time, and refused if they are not what the
manifest names.

Rows are read by calls and not through memory maps. Maps were measured: a checked row of 8 KiB took as long within 5 %,
and a map reports a failing device, or a file that is cut, by a signal that ends the process without a message.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from crc32c import crc32c

from megamask.data.index import index_bytes
from megamask.data.lru import LeastRecentlyUsed
from megamask.data.manifest import ShardEntry
from megamask.errors import DataIntegrityError
from megamask.storage.durable import storage_errors
from megamask.storage.file_marks import settled_mark
from megamask.storage.plain_files import NotPlainError, open_plain

_OPEN_SHARDS = 128  # file descriptors
_compared: deque[tuple[Path, tuple[int, ...], Sequence[ShardEntry]]] = deque(maxlen=8)  # of the last splits opened


class ShardFiles:
    """Reader of the shard files of one split; for one thread at a time.

    Args:
        folder: the corpus folder.
        shards: of the split, as the manifest has them.

    Raises:
        DataIntegrityError: a shard or an index of it is not in the folder, or has another size than the manifest has.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardEntry]) -> None:
        self._folder = folder
        self._shards = shards
        self._descriptors: LeastRecentlyUsed[int, int] = LeastRecentlyUsed(_OPEN_SHARDS, on_drop=os.close)
        _check_sizes(folder, shards)

    def path(self, shard: int) -> Path:
        """Return the path of a shard."""
        return self._folder / self._shards[shard].name

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return the bytes of a shard from an offset; fewer where it ends before.

        Raises:
            DataIntegrityError: the shard is missing, not a plain file, or has another size than the manifest has.
            StorageError: the device does not answer.
        """
        buffer = bytearray(size)
        return bytes(buffer[: self.read_into(shard, offset, [memoryview(buffer)])])

    def read_into(self, shard: int, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill buffers with consecutive bytes of a shard; return how many there were; raises as `read`."""
        descriptor = self._descriptors.get(shard, self._open)
        wanted = sum(map(len, buffers))
        try:
            done = os.preadv(descriptor, buffers, offset)
            while 0 < done < wanted:
                more = os.preadv(descriptor, _rest(buffers, done), offset + done)
                if not more:
                    break
                done += more
        except OSError:
            with storage_errors(f"reading {self.path(shard)}"):
                raise
        return done

    def read_spans(self, shards: Sequence[int], offsets: Sequence[int], buffers: Sequence[memoryview]) -> list[int]:
        """Fill each buffer from its shard and offset; stop at one that the shard is too short for; raises as `read`.

        Returns:
            crc32c of each buffer that was filled, computed while its bytes are in the processor's cache.
        """
        checksums: list[int] = []
        last, preadv = -1, os.preadv
        try:
            for shard, offset, buffer in zip(shards, offsets, buffers, strict=True):
                if shard != last:
                    descriptor, last = self._descriptors.get(shard, self._open), shard
                if preadv(descriptor, (buffer,), offset) != len(buffer) and (
                    self.read_into(shard, offset, [buffer]) != len(buffer)
                ):
                    break
                checksums.append(crc32c(buffer))
        except OSError:
            with storage_errors(f"reading {self.path(last)}"):
                raise
        return checksums

    def will_need(self, shards: Sequence[int], offsets: Sequence[int], size: int) -> None:
        """Ask the system to fetch `size` bytes from each shard and offset in the background; raises as `read`."""
        if not hasattr(os, "posix_fadvise"):
            return
        last, advise, wanted = -1, os.posix_fadvise, os.POSIX_FADV_WILLNEED
        try:
            for shard, offset in zip(shards, offsets, strict=True):
                if shard != last:
                    descriptor, last = self._descriptors.get(shard, self._open), shard
                advise(descriptor, offset, size, wanted)
        except OSError:
            with storage_errors(f"reading {self.path(last)}"):
                raise

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        self._descriptors.clear()

    def _open(self, shard: int) -> int:
        path, entry = self.path(shard), self._shards[shard]
        try:
            with storage_errors(f"opening {path}"):
                descriptor = open_plain(path)
        except FileNotFoundError:
            raise missing(path) from None
        except NotPlainError as error:
            raise not_plain(error) from error
        size = os.fstat(descriptor).st_size
        if size != entry.bytes:
            os.close(descriptor)
            raise _wrong_size(path, size, entry.bytes)
        return descriptor


def _check_sizes(folder: Path, shards: Sequence[ShardEntry]) -> None:
    """Compare the size of each file without opening it, once in a process while no file is added or removed.

    A shard that is cut later, or is not a plain file, is refused when it is first read.
    """
    mark = settled_mark(folder / "shards")
    if any(where == folder and seen == mark and entries is shards for where, seen, entries in _compared):
        return
    with storage_errors(f"looking at the shards of {folder}"):
        for entry in shards:
            sizes = {entry.name: entry.bytes, entry.index_name: index_bytes(entry.blocks, entry.rows)}
            for name, expected in sizes.items():
                path = f"{folder}/{name}"
                try:
                    found = os.lstat(path)
                except (FileNotFoundError, NotADirectoryError):
                    raise missing(Path(path)) from None
                if stat.S_ISREG(found.st_mode) and found.st_size != expected:
                    raise _wrong_size(Path(path), found.st_size, expected)
    if mark is not None:
        _compared.append((folder, mark, shards))


def missing(path: Path) -> DataIntegrityError:
    """Return the error for a file that the manifest names and that does not exist."""
    return DataIntegrityError(
        f"{path} is missing, but the manifest names it. No sample of it was used.",
        hint="restore the file or prepare the corpus again",
    )


def not_plain(error: NotPlainError) -> DataIntegrityError:
    """Return the error for a link, a device or an oversized file in a corpus."""
    return DataIntegrityError(
        f"{error}; a corpus holds plain files only. No sample of it was used.",
        hint="restore the file or prepare the corpus again",
    )


def _wrong_size(path: Path, size: int, expected: int) -> DataIntegrityError:
    return DataIntegrityError(
        f"{path} has {size} bytes, the manifest has {expected}. No sample of it was used.",
        hint="restore the file or prepare the corpus again",
    )


def _rest(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """The part of the buffers behind the first `done` bytes."""
    left = []
    for buffer in buffers:
        if done < len(buffer):
            left.append(buffer[done:])
        done = max(0, done - len(buffer))
    return left
