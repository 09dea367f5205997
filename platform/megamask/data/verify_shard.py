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

from megamask.data.index import DOCS_COLUMNS, ShardIndex, block_name, pack_tar_index
from megamask.data.manifest import Manifest, ShardEntry
from megamask.data.reader import load_index
from megamask.data.shard import NPY_HEADER_BYTES, npy_header
from megamask.errors import DataIntegrityError
from megamask.storage.durable import storage_errors
from megamask.storage.hashing import sha256_bytes, sha256_file


@dataclass(frozen=True, kw_only=True)
class CheckedBlock:
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


def verify_shard(corpus_dir: Path, manifest: Manifest, entry: ShardEntry, first_block: int) -> Iterator[CheckedBlock]:
    """Yields the blocks of a shard, each after its own checks; exhausting it completes the checks of the file.

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
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        for block in range(index.num_blocks):
            yield _check_block(path, file, manifest, index, block)
        if size != entry.bytes:
            raise damage(f"{path} has {size} bytes, the manifest says {entry.bytes}")
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
        raise damage(f"{path} is missing, but the manifest names it" if not path.exists() else f"{path} is no file")
    return path.stat().st_size


def check_digest(path: Path, expected: str) -> None:
    """Compares a file's sha256 with the manifest's.

    Raises:
        DataIntegrityError: it is missing, a link or has other bytes.
    """
    plain_file_size(path)
    with storage_errors(f"reading {path}"):
        found = sha256_file(path)
    if found != expected:
        raise damage(f"{path}: sha256 is {found}, the manifest says {expected}")


def _check_block(path: Path, file: BinaryIO, manifest: Manifest, index: ShardIndex, block: int) -> CheckedBlock:
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
                f"crc32c is {found:08x}, the index says {expected:08x}"
            )
    docs = _read(file, int(record["docs_offset"]), int(record["docs_bytes"]))
    for kind, data in (("tokens", tokens), ("docs", docs)):
        found, expected = crc32c(data), int(record[f"{kind}_crc32c"])
        if found != expected or len(data) != int(record[f"{kind}_bytes"]):
            raise damage(f"{path}: member {name}.{kind}.npy: crc32c is {found:08x}, the index says {expected:08x}")
    return CheckedBlock(
        shard=path,
        number=index.first_block + block,
        tokens=np.frombuffer(tokens, dtype=manifest.dtype).reshape(-1, manifest.sequence_length),
        docs=np.frombuffer(docs, dtype="<i8").reshape(-1, DOCS_COLUMNS).astype(np.int64),
    )


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _check_members(path: Path, file: BinaryIO, index: ShardIndex, manifest: Manifest) -> list[int]:
    """Walks the archive as any tar reader would; returns the header offset of each block and the end behind them."""
    length = manifest.sequence_length
    expected: list[tuple[str, int, bytes]] = []
    for block in range(index.num_blocks):
        record = index.blocks[block]
        name = block_name(index.first_block + block)
        tokens = np.empty((int(record["rows"]), length), dtype=manifest.dtype)
        docs = np.empty((int(record["docs"]), DOCS_COLUMNS), dtype="<i8")
        expected.append((f"{name}.tokens.npy", int(record["tokens_offset"]), npy_header(tokens)))
        expected.append((f"{name}.docs.npy", int(record["docs_offset"]), npy_header(docs)))
    sizes = [int(size) for record in index.blocks for size in (record["tokens_bytes"], record["docs_bytes"])]
    offsets: list[int] = []
    end = 0
    file.seek(0)
    try:
        with tarfile.TarFile(fileobj=file, mode="r") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise damage(f"{path}: not a readable tar archive ({error})") from error
    if len(members) != len(expected):
        raise damage(f"{path}: the archive has {len(members)} members, the index says {len(expected)}")
    for member, (name, offset, header), size in zip(members, expected, sizes, strict=True):
        values_at = member.offset_data + NPY_HEADER_BYTES
        if member.name != name or not member.isreg():
            raise damage(f"{path}: the archive has a member {member.name!r} where {name} belongs")
        if values_at != offset or member.size != NPY_HEADER_BYTES + size:
            raise damage(f"{path}: member {name} lies elsewhere than the index says")
        if _read(file, member.offset_data, NPY_HEADER_BYTES) != header:
            raise damage(f"{path}: member {name}: its .npy header is not that of the stored array")
        offsets.append(member.offset)
        end = member.offset_data + member.size + (-member.size % tarfile.BLOCKSIZE)
    return [*offsets[::2], end]


def _check_tar_index(path: Path, entry: ShardEntry, offsets: list[int]) -> None:
    plain_file_size(path)
    with storage_errors(f"reading {path}"):
        data = path.read_bytes()
    if sha256_bytes(data) != entry.tar_index_sha256:
        raise damage(f"{path}: sha256 is {sha256_bytes(data)}, the manifest says {entry.tar_index_sha256}")
    if data != pack_tar_index(offsets[:-1], offsets[-1]):
        raise damage(f"{path}: its offsets are not those of the archive's samples")
