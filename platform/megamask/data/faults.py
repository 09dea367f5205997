"""List of all damaged places in the shards of a corpus, made by `verify corpus` after the first one was found."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from crc32c import crc32c

from megamask.data.corpus.shard import NPY_HEADER_BYTES, archive_bytes, npy_header, tar_header
from megamask.data.index import DOCS_COLUMNS, ShardIndex, block_name, pack_tar_index
from megamask.data.manifest import Manifest, ShardEntry
from megamask.data.reader import load_index
from megamask.data.verify_shard import check_digest
from megamask.errors import DataIntegrityError
from megamask.storage.durable import storage_errors


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One damaged place.

    Args:
        shard: name of the tar file in the manifest.
        block: number of the shard block in its split; the first of the shard where the damage is of no single one.
        offset: byte in the tar file, or in the index for kinds that name it.
        kind: missing, size, index, tokens, documents, archive (a header or padding), tar_index, digest.
        row: of the split, where one row is damaged; what data.quarantine takes.
    """

    shard: str
    block: int
    offset: int
    kind: str
    row: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fault in the --json answer."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def find_faults(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Read all shards and yield their faults in order; a shard without a usable index is one fault.

    Raises:
        StorageError: the storage does not answer.
    """
    for split in sorted(manifest.splits):
        first_block = first_row = 0
        for entry in manifest.split(split).shards:
            yield from _faults_of(folder, manifest, entry, first_block, first_row)
            first_block += entry.blocks
            first_row += entry.rows


def _faults_of(
    folder: Path, manifest: Manifest, entry: ShardEntry, first_block: int, first_row: int
) -> Iterator[Fault]:
    path = folder / entry.name
    try:
        index = load_index(folder, manifest, entry, first_block)
    except DataIntegrityError:
        index = None
    if index is None or not index.num_blocks:
        yield Fault(shard=entry.name, block=first_block, offset=0, kind="index")
        return
    if path.is_symlink() or not path.is_file():
        yield Fault(shard=entry.name, block=first_block, offset=0, kind="missing")
        return
    size = path.stat().st_size
    row_bytes = manifest.sequence_length * index.itemsize
    found = 0
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        for fault in _damaged_blocks(file, entry, index, row_bytes, first_row):
            found += 1
            yield fault
        if size != entry.bytes:
            behind = int(np.searchsorted(index.blocks["tokens_offset"], size, side="right"))
            block = first_block + max(0, min(behind, index.num_blocks) - 1)
            yield Fault(shard=entry.name, block=block, offset=min(size, entry.bytes), kind="size")
            return
        for fault in _damaged_archive(file, entry, index, manifest):
            found += 1
            yield fault
    begins = (index.blocks["tokens_offset"].astype(np.int64) - _HEADERS).tolist()
    tar_index = folder / entry.tar_index_name
    expected = pack_tar_index(begins, _padded(index, index.num_blocks - 1))
    if not tar_index.is_file() or tar_index.is_symlink() or tar_index.read_bytes() != expected:
        yield Fault(shard=entry.name, block=first_block, offset=0, kind="tar_index")
    if not found:
        try:
            check_digest(path, entry.sha256)
        except DataIntegrityError:
            yield Fault(shard=entry.name, block=first_block, offset=0, kind="digest")


_PIECE = 1 << 20
_HEADERS = tarfile.BLOCKSIZE + NPY_HEADER_BYTES


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _checksum(file: BinaryIO, offset: int, size: int) -> int:
    """crc32c of a part of a file, read in pieces: a hostile index may state sizes that exceed memory."""
    file.seek(offset)
    found = 0
    for first in range(0, size, _PIECE):
        found = crc32c(file.read(min(_PIECE, size - first)), found)
    return found


def _padded(index: ShardIndex, block: int) -> int:
    """Return the end of a block's last member, padding included."""
    end = int(index.blocks["docs_offset"][block]) + int(index.blocks["docs_bytes"][block])
    return -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _damaged_blocks(
    file: BinaryIO, entry: ShardEntry, index: ShardIndex, row_bytes: int, first_row: int
) -> Iterator[Fault]:
    """Find complete rows and tables that fail their checksums; those beyond the end of the file are skipped."""
    size = file.seek(0, 2)
    row = 0
    for number, record in enumerate(index.blocks):
        block, at = index.first_block + number, int(record["tokens_offset"])
        for place in range(int(record["rows"])):
            offset = at + place * row_bytes
            is_there = offset + row_bytes <= size
            if is_there and _checksum(file, offset, row_bytes) != int(index.row_crc32c[row]):
                yield Fault(shard=entry.name, block=block, offset=offset, kind="tokens", row=first_row + row)
            row += 1
        offset, length = int(record["docs_offset"]), int(record["docs_bytes"])
        if offset + length <= size and _checksum(file, offset, length) != int(record["docs_crc32c"]):
            yield Fault(shard=entry.name, block=block, offset=offset, kind="documents")


def _damaged_archive(file: BinaryIO, entry: ShardEntry, index: ShardIndex, manifest: Manifest) -> Iterator[Fault]:
    """Find wrong bytes in the headers of members and in the padding of the archive."""
    for number, record in enumerate(index.blocks):
        block = index.first_block + number
        tokens = "tokens", (int(record["rows"]), manifest.sequence_length), manifest.dtype
        docs = "docs", (int(record["docs"]), DOCS_COLUMNS), np.dtype("<i8")
        for name, shape, dtype in (tokens, docs):
            at, length = int(record[f"{name}_offset"]), int(record[f"{name}_bytes"])
            expected = tar_header(f"{block_name(block)}.{name}.npy", length) + npy_header(shape, dtype)
            filling = -(NPY_HEADER_BYTES + length) % tarfile.BLOCKSIZE
            for offset, wanted in ((at - _HEADERS, expected), (at + length, bytes(filling))):
                found = _read(file, offset, len(wanted))
                if found != wanted:
                    pairs = enumerate(zip(found, wanted, strict=False))
                    first = next((number for number, (one, other) in pairs if one != other), len(found))
                    yield Fault(shard=entry.name, block=block, offset=offset + first, kind="archive")
    end = _padded(index, index.num_blocks - 1)
    if entry.bytes != archive_bytes(end):
        yield Fault(shard=entry.name, block=index.first_block + index.num_blocks - 1, offset=end, kind="archive")
    elif any(rest := _read(file, end, entry.bytes - end)):
        first = len(rest) - len(rest.lstrip(b"\0"))
        yield Fault(
            shard=entry.name, block=index.first_block + index.num_blocks - 1, offset=end + first, kind="archive"
        )
