"""Shard blocks of a remote corpus on local disk: verified before they are kept, bounded in bytes, shared by processes.

`<folder>/<first 32 digits of the shard's sha256>/<block>.bin` is the piece of a shard from its block's token ids to the
end of its document table. The name is of content, so a stale copy cannot be served; a file appears by a rename, so a
crash leaves no half one, and two processes that fetch the same block write the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from megamask.storage.durable import storage_errors

_LOOK_EVERY = 64  # files written between two looks at the size of the cache
_KEPT_SHARE = 0.9  # of the limit, after removing


class BlockCache:
    """A folder of blocks.

    Args:
        folder: of the cache; created.
        limit_bytes: the blocks used longest ago are removed above it.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._written = 0
        with storage_errors(f"creating {folder}"):
            folder.mkdir(parents=True, exist_ok=True)

    def open(self, shard_sha256: str, block: int, fetch: Callable[[], bytes]) -> int:
        """A descriptor of a block's file, fetched now if it is not there.

        Args:
            shard_sha256: of the shard that holds it.
            block: its number.
            fetch: gives its verified bytes.

        Raises:
            StorageError: the disk refused; and what `fetch` raises.
        """
        path = self._folder / shard_sha256[:32] / f"{block}.bin"
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with contextlib.suppress(OSError):
                os.utime(descriptor)  # used now; removal takes those used longest ago
            return descriptor
        data = fetch()
        with storage_errors(f"writing {path}"):
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        if self._written % _LOOK_EVERY == 0:
            self.shrink()
        self._written += 1
        return descriptor

    def drop(self, shard_sha256: str, block: int) -> None:
        """Remove a block whose file no longer verifies."""
        (self._folder / shard_sha256[:32] / f"{block}.bin").unlink(missing_ok=True)

    def shrink(self) -> None:
        """Remove the blocks used longest ago until the cache is within its limit; open files stay readable."""
        found = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self._limit:
            return
        for _, size, path in sorted(found):
            if total <= self._limit * _KEPT_SHARE:
                break
            path.unlink(missing_ok=True)
            total -= size
