"""One shard against its index and its manifest entry: every row, every member, every header, every byte.

The rows come first, so that a flipped bit is reported with its member and row; the digest of the whole file comes
last and leaves nothing unchecked.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from megamask.data.corpus.shard import NPY_HEADER_BYTES, archive_bytes, npy_header, tar_header
from megamask.data.index import DOCS_COLUMNS, ShardIndex, block_name, pack_tar_index
from megamask.data.manifest import Manifest, ShardEntry
from megamask.data.reader import load_index
from megamask.errors import DataIntegrityError
from megamask.storage.durable import storage_errors
from megamask.storage.hashing import sha256_bytes, sha256_file


@dataclass(frozen=True, kw_only=True)
class CheckedRowGroup:
    """One block whose checksums hold; tokens [rows, L], docs int64 [n, 3], number counted through the split."""

    shard: Path
    number: int
    tokens: npt.NDArray[Any]
    docs: npt.NDArray[np.int64]


def damage(what: str) -> DataIntegrityError:
    """The error of a corpus that does not verify."""
    return DataIntegrityError(
        f"{what}. The corpus must not be used.", hint="restore the file or prepare the corpus again"
    )


def verify_shard(
    corpus_dir: Path, manifest: Manifest, entry: ShardEntry, first_block: int
) -> Iterator[CheckedRowGroup]:
    """Yield the blocks of a shard, each after its own checks; exhausting it completes the checks of the file.

    Args:
        corpus_dir: the corpus folder.
        manifest: its manifest.
        entry: the shard in the manifest.
        first_block: number in the split of the shard's first block.

    Raises:
        DataIntegrityError: the first damage, with member and row where known.
    """
    path = corpus_dir / entry.name
    index = load_index(corpus_dir, manifest, entry, first_block)
    size = plain_file_size(path)
    if size < index.shard_bytes:  # before any size of the index is asked for
        raise damage(f"{path} has {size} bytes, the manifest has {entry.bytes}")
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        for block in range(index.num_blocks):
            yield _check_block(path, file, manifest, index, block)
        if size != entry.bytes:
            raise damage(f"{path} has {size} bytes, the manifest has {entry.bytes}")
        offsets = _check_members(path, file, index, manifest)
    _check_tar_index(corpus_dir / entry.tar_index_name, entry, offsets)
    check_digest(path, entry.sha256)


def plain_file_size(path: Path) -> int:
    """Size of a file that must be there and must not be a link.

    Raises:
        DataIntegrityError: it is missing, a link or no plain file.
    """
    if path.is_symlink():
        raise damage(f"{path} is a link; a corpus holds plain files only")
    if not path.is_file():
        raise damage(f"{path} is missing, but the manifest names it" if not path.exists() else f"{path} is not a file")
    return path.stat().st_size


def check_digest(path: Path, expected: str) -> None:
    """Compare a file's sha256 with the manifest's.

    Raises:
        DataIntegrityError: it is missing, a link or has other bytes.
    """
    plain_file_size(path)
    with storage_errors(f"reading {path}"):
        found = sha256_file(path)
    if found != expected:
        raise damage(f"{path}: sha256 is {found}, the manifest has {expected}")


def _check_block(path: Path, file: BinaryIO, manifest: Manifest, index: ShardIndex, block: int) -> CheckedRowGroup:
    record = index.blocks[block]
    name = block_name(index.first_block + block)
    tokens = _read(file, int(record["tokens_offset"]), int(record["tokens_bytes"]))
    first_row = int(index.blocks["rows"][:block].sum())
    row_bytes = manifest.sequence_length * index.itemsize
    for row in range(int(record["rows"])):
        found = crc32c(tokens[row * row_bytes : (row + 1) * row_bytes])
        expected = int(index.row_crc32c[first_row + row])
        if found != expected:
            raise damage(
                f"{path}: member {name}.tokens.npy, row {row} of the block: "
                f"crc32c is {found:08x}, the index has {expected:08x}"
            )
    docs = _read(file, int(record["docs_offset"]), int(record["docs_bytes"]))
    for kind, data in (("tokens", tokens), ("docs", docs)):
        found, expected = crc32c(data), int(record[f"{kind}_crc32c"])
        if found != expected or len(data) != int(record[f"{kind}_bytes"]):
            raise damage(f"{path}: member {name}.{kind}.npy: crc32c is {found:08x}, the index has {expected:08x}")
    return CheckedRowGroup(
        shard=path,
        number=index.first_block + block,
        tokens=np.frombuffer(tokens, dtype=manifest.dtype).reshape(-1, manifest.sequence_length),
        docs=np.frombuffer(docs, dtype="<i8").reshape(-1, DOCS_COLUMNS).astype(np.int64),
    )


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _check_members(path: Path, file: BinaryIO, index: ShardIndex, manifest: Manifest) -> list[int]:
    """Compare every header of the archive, and its padding, with the expected bytes.

    No tar reader walks it: a hostile header can tell one to reserve any size, to follow a link or to skip a member.

    Returns: the header offset of each block, then the end behind them.
    """
    length = manifest.sequence_length
    offsets: list[int] = []
    end = 0
    for block in range(index.num_blocks):
        record = index.blocks[block]
        name = block_name(index.first_block + block)
        offsets.append(end)
        tokens = (int(record["rows"]), length), manifest.dtype, int(record["tokens_offset"])
        docs = (int(record["docs"]), DOCS_COLUMNS), np.dtype("<i8"), int(record["docs_offset"])
        for kind, (shape, dtype, values_at) in (("tokens", tokens), ("docs", docs)):
            end = _check_member(path, file, f"{name}.{kind}.npy", _Stored(end, shape, dtype, values_at))
    _check_filling(path, file, end, archive_bytes(end))
    if index.shard_bytes != archive_bytes(end):
        raise damage(f"{path}: the archive goes on behind its last member")
    return [*offsets, end]


@dataclass(frozen=True)
class _Stored:
    """A member's header offset, the array that it holds, and the offset of its values according to the index."""

    at: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    values_at: int


def _check_member(path: Path, file: BinaryIO, name: str, stored: _Stored) -> int:
    """Check the headers of a member and the zeros behind it; return its end."""
    num_bytes = stored.shape[0] * stored.shape[1] * stored.dtype.itemsize
    header, expected = _read(file, stored.at, tarfile.BLOCKSIZE), tar_header(name, num_bytes)
    if header != expected:
        if header[:100] != expected[:100] or header[156:157] != expected[156:157]:
            found = header[:100].rstrip(b"\0").decode(errors="replace")
            raise damage(f"{path}: the archive has a member {found!r} where {name} belongs, or of another kind")
        raise damage(f"{path}: the tar header of member {name} is not that of the stored array")
    if stored.at + tarfile.BLOCKSIZE + NPY_HEADER_BYTES != stored.values_at:
        raise damage(f"{path}: member {name} lies elsewhere than the index has")
    if _read(file, stored.at + tarfile.BLOCKSIZE, NPY_HEADER_BYTES) != npy_header(stored.shape, stored.dtype):
        raise damage(f"{path}: member {name}: its .npy header is not that of the stored array")
    values_end = stored.values_at + num_bytes
    end = values_end + -(NPY_HEADER_BYTES + num_bytes) % tarfile.BLOCKSIZE
    _check_filling(path, file, values_end, end)
    return end


def _check_filling(path: Path, file: BinaryIO, begin: int, end: int) -> None:
    if _read(file, begin, end - begin) != bytes(end - begin):
        raise damage(f"{path}: the archive has something other than zeros between bytes {begin} and {end}")


def _check_tar_index(path: Path, entry: ShardEntry, offsets: list[int]) -> None:
    plain_file_size(path)
    if (size := path.stat().st_size) != 8 * len(offsets):
        raise damage(f"{path} has {size} bytes, {8 * len(offsets)} are the offsets of {len(offsets) - 1} samples")
    with storage_errors(f"reading {path}"):
        data = path.read_bytes()
    if sha256_bytes(data) != entry.tar_index_sha256:
        raise damage(f"{path}: sha256 is {sha256_bytes(data)}, the manifest has {entry.tar_index_sha256}")
    if data != pack_tar_index(offsets[:-1], offsets[-1]):
        raise damage(f"{path}: its offsets are not those of the archive's samples")
