"""A corpus in an object store: manifest, tokenizer and indexes as local copies, blocks of shards through a cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from crc32c import crc32c

from megamask.data.block_cache import BlockCache
from megamask.data.index import ShardIndex, block_name
from megamask.data.lru import LeastRecentlyUsed
from megamask.data.manifest import MANIFEST_NAME, PROVENANCE_NAME, ShardEntry
from megamask.errors import DataIntegrityError, UsageError
from megamask.storage.durable import make_folders, storage_errors, write_atomic
from megamask.storage.hashing import sha256_bytes
from megamask.storage.ranges import RemoteFolder

DEFAULT_CACHE = "~/.cache/megamask"
DEFAULT_CACHE_BYTES = 50 * 10**9
_TOKENIZER = ("tokenizer/tokenizer.json", "tokenizer/special_tokens.json")
_OPEN_BLOCKS = 256
_READERS = 8
_ATTEMPTS = 3  # at bytes that fail their checksum: one bad reply is not damage


class RemoteCorpus:
    """The files of a remote corpus.

    Args:
        url: of the corpus.
        cache_dir: local folder of copies and blocks.
        cache_bytes: most bytes of blocks in it.

    Raises:
        UsageError: no corpus exists at the URL.
        StorageError: the store does not answer.
    """

    def __init__(self, url: str, cache_dir: str | Path = DEFAULT_CACHE, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.remote = RemoteFolder(url)
        cache = Path(cache_dir).expanduser()
        try:
            manifest = self.remote.read(MANIFEST_NAME)
        except FileNotFoundError:
            raise UsageError(
                f"{url} is not a prepared corpus: it has no {MANIFEST_NAME}. No row was read.",
                hint="copy the folder that megamask prepare made, manifest.json last",
            ) from None
        self.folder = cache / "corpora" / sha256_bytes(manifest)
        with storage_errors(f"writing {self.folder}"):
            make_folders(self.folder / "shards")
            make_folders(self.folder / "tokenizer")
        for name, data in ((MANIFEST_NAME, manifest), *((name, None) for name in (PROVENANCE_NAME, *_TOKENIZER))):
            self.copy(name, data)
        self._blocks = BlockCache(cache / "blocks", cache_bytes)

    def copy(self, name: str, data: bytes | None = None, sha256: str | None = None) -> None:
        """Make the local copy of a small file unless it is there; one that does not exist is left out.

        Args:
            name: relative name.
            data: its content where it is known.
            sha256: fetched again while its digest is another; the reader of the copy reports what stays wrong.
        """
        path = self.folder / name
        if path.exists():
            return
        for _ in range(_ATTEMPTS):
            try:
                found = self.remote.read(name) if data is None else data
            except FileNotFoundError:
                return
            if sha256 is None or sha256_bytes(found) == sha256:
                write_atomic(path, found)
                return
        raise DataIntegrityError(
            f"{self.remote.url}/{name}: sha256 is {sha256_bytes(found)}, the manifest has {sha256}. "
            "No sample of its shard was used.",
            hint="restore the object or prepare the corpus again",
        )

    def shard_files(self, shards: Sequence[ShardEntry], index_of: Callable[[int], ShardIndex]) -> RemoteShards:
        """The shards of a split, read as `ShardFiles` are."""
        return RemoteShards(self.remote, shards, index_of, self._blocks)


class RemoteShards:
    """Reader of the shards of one split of a remote corpus, block by block through the cache.

    Args:
        remote: the corpus.
        shards: of the split.
        index_of: the index of a shard by number.
        blocks: the cache.
    """

    def __init__(
        self,
        remote: RemoteFolder,
        shards: Sequence[ShardEntry],
        index_of: Callable[[int], ShardIndex],
        blocks: BlockCache,
    ) -> None:
        self._remote = remote
        self._shards = shards
        self._index_of = index_of
        self._blocks = blocks
        self._descriptors: LeastRecentlyUsed[tuple[int, int], int] = LeastRecentlyUsed(_OPEN_BLOCKS, on_drop=os.close)
        self._fetching: dict[tuple[int, int], Future[bytes]] = {}
        self._threads: ThreadPoolExecutor | None = None

    def path(self, shard: int) -> str:
        """Return the URL of a shard."""
        return f"{self._remote.url}/{self._shards[shard].name}"

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return bytes of one block, tokens or table.

        Raises:
            DataIntegrityError: the block fails its checksums, or the shard does not exist.
            StorageError: the store or the local disk does not answer.
        """
        block = self._block_at(shard, offset)
        descriptor = self._descriptors.get((shard, block), self._open)
        begin = int(self._index_of(shard).blocks["tokens_offset"][block])
        with storage_errors(f"reading a cached block of {self.path(shard)}"):
            return os.pread(descriptor, size, offset - begin)

    def read_spans(self, shards: Sequence[int], offsets: Sequence[int], buffers: Sequence[memoryview]) -> list[int]:
        """Fill each buffer from its shard and offset, as `ShardFiles.read_spans`; raises as `read`."""
        checksums: list[int] = []
        for shard, offset, buffer in zip(shards, offsets, buffers, strict=True):
            data = self.read(shard, offset, len(buffer))
            if len(data) != len(buffer):
                break
            buffer[:] = data
            checksums.append(crc32c(data))
        return checksums

    def will_need(self, shards: Sequence[int], offsets: Sequence[int], size: int) -> None:
        """Begin to fetch the block of each place, unless its file is open."""
        del size
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="megamask-ranges")
        for shard, offset in zip(shards, offsets, strict=True):
            key = (shard, self._block_at(shard, offset))
            if key not in self._descriptors and key not in self._fetching:
                index = self._index_of(shard)  # here: the threads share no cache of indexes
                self._fetching[key] = self._threads.submit(self._cached_or_fetched, key, index)

    def close(self) -> None:
        """Close the files and end the threads; a later read opens them again."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None
        self._fetching.clear()
        self._descriptors.clear()

    def _block_at(self, shard: int, offset: int) -> int:
        return int(self._index_of(shard).blocks["tokens_offset"].searchsorted(offset, side="right")) - 1

    def _open(self, key: tuple[int, int]) -> int:
        shard, block = key
        if (future := self._fetching.pop(key, None)) is not None:
            future.result()
        index = self._index_of(shard)
        name, digest = index.first_block + block, self._shards[shard].sha256
        while True:
            descriptor = self._blocks.open(digest, name, lambda: self._fetch(key, index))
            size = os.fstat(descriptor).st_size
            if _wrong_part(os.pread(descriptor, size, 0), index, block) is None:
                return descriptor
            os.close(descriptor)  # the local disk changed it; what is fetched was verified
            self._blocks.drop(digest, name)

    def _cached_or_fetched(self, key: tuple[int, int], index: ShardIndex) -> bytes:
        shard, block = key
        descriptor = self._blocks.open(
            self._shards[shard].sha256, index.first_block + block, lambda: self._fetch(key, index)
        )
        os.close(descriptor)
        return b""

    def _fetch(self, key: tuple[int, int], index: ShardIndex) -> bytes:
        """The bytes of a block from its tokens to the end of its table, both checked."""
        shard, block = key
        record = index.blocks[block]
        begin = int(record["tokens_offset"])
        end = int(record["docs_offset"]) + int(record["docs_bytes"])
        for _ in range(_ATTEMPTS):
            try:
                data = self._remote.read(self._shards[shard].name, begin, end - begin)
            except FileNotFoundError:
                raise DataIntegrityError(
                    f"{self.path(shard)} is missing, but the manifest names it. No sample of it was used.",
                    hint="restore the object or prepare the corpus again",
                ) from None
            wrong = _wrong_part(data, index, block)
            if wrong is None:
                return data
        raise DataIntegrityError(
            f"{self.path(shard)}: member {block_name(index.first_block + block)}.{wrong}.npy, byte "
            f"{int(record[f'{wrong}_offset'])}: its crc32c is not that of the index. It was not used.",
            hint="restore the object or prepare the corpus again",
        )


def _wrong_part(data: bytes, index: ShardIndex, block: int) -> str | None:
    record = index.blocks[block]
    begin = int(record["tokens_offset"])
    for part in ("tokens", "docs"):
        first = int(record[f"{part}_offset"]) - begin
        piece = memoryview(data)[first : first + int(record[f"{part}_bytes"])]
        if crc32c(piece) != int(record[f"{part}_crc32c"]):
            return part
    return None
