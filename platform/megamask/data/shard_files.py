"""The shard files of a corpus folder: opened when first used, few at a time, and refused if they are not what the
manifest names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megamask.data.lru import LeastRecentlyUsed
from megamask.data.manifest import ShardEntry
from megamask.errors import DataIntegrityError
from megamask.storage.durable import storage_errors
from megamask.storage.plain_files import NotPlainError, open_plain

_OPEN_SHARDS = 128  # file descriptors


class ShardFiles:
    """Reads from the shards of one split; for one thread at a time.

    Args:
        folder: the corpus folder.
        shards: of the split, as the manifest has them.

    Raises:
        DataIntegrityError: a shard or an index of it is not in the folder.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardEntry]) -> None:
        self._folder = folder
        self._shards = shards
        self._descriptors: LeastRecentlyUsed[int, int] = LeastRecentlyUsed(_OPEN_SHARDS, on_drop=os.close)
        self._check_present()

    def path(self, shard: int) -> Path:
        """Where a shard lies."""
        return self._folder / self._shards[shard].name

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return the bytes of a shard from an offset; fewer where it ends before.

        Raises:
            DataIntegrityError: the shard is missing, not a plain file, or has another size than the manifest says.
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

    def read_spans(self, shard: int, offsets: Sequence[int], buffers: Sequence[memoryview]) -> int:
        """Fill each buffer from its offset; return how many were filled before one could not be; raises as `read`."""
        descriptor, preadv = self._descriptors.get(shard, self._open), os.preadv
        try:
            for number, (offset, buffer) in enumerate(zip(offsets, buffers, strict=True)):
                if preadv(descriptor, (buffer,), offset) != len(buffer) and (
                    self.read_into(shard, offset, [buffer]) != len(buffer)
                ):
                    return number
        except OSError:
            with storage_errors(f"reading {self.path(shard)}"):
                raise
        return len(offsets)

    def will_need(self, shard: int, offset: int, size: int) -> None:
        """Ask the system to fetch a part of a shard in the background."""
        if hasattr(os, "posix_fadvise"):
            with storage_errors(f"reading {self.path(shard)}"):
                descriptor = self._descriptors.get(shard, self._open)
                os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        self._descriptors.clear()

    def _check_present(self) -> None:
        """Compare the names with one listing of each folder; sizes and digests are checked when a shard is used."""
        present: dict[Path, set[str]] = {}
        for entry in self._shards:
            for name in (entry.name, entry.index_name):
                path = self._folder / name
                if path.parent not in present:
                    present[path.parent] = _names(path.parent)
                if path.name not in present[path.parent]:
                    raise missing(path)

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
            raise DataIntegrityError(
                f"{path} has {size} bytes, the manifest says {entry.bytes}. No sample of it was used.",
                hint="restore the file or prepare the corpus again",
            )
        return descriptor


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


def _names(folder: Path) -> set[str]:
    try:
        with storage_errors(f"listing {folder}"):
            return set(os.listdir(folder))  # noqa: PTH208 (names alone; Path objects of a million shards are slow)
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _rest(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """The part of the buffers behind the first `done` bytes."""
    left = []
    for buffer in buffers:
        if done < len(buffer):
            left.append(buffer[done:])
        done = max(0, done - len(buffer))
    return left
