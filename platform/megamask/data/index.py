"""The index beside each shard: where every block lies in the tar, and a checksum of every row.

`<shard>.idx`, all numbers unsigned and little-endian, no gaps:

    offset size  header, 64 bytes
    0      8     magic, the ASCII letters MEGAMIDX
    8      4     version, 1
    12     4     header length in bytes, 64
    16     8     num_blocks
    24     8     num_rows, the sum over the blocks
    32     8     first_block, the number in the split of this shard's first block
    40     8     shard_bytes, size of the tar file
    48     4     sequence_length, tokens of a row
    52     4     itemsize, bytes of a token: 2 or 4
    56     4     crc32c of everything after the header
    60     4     crc32c of bytes 0 to 59

    num_blocks records of 48 bytes
    0      8     tokens_offset: of the raw values in the tar (after the tar and the npy header)
    8      8     tokens_bytes: of the raw values, rows * sequence_length * itemsize
    16     4     rows
    20     4     tokens_crc32c, of the raw values
    24     8     docs_offset: of the raw values
    32     8     docs_bytes: of the raw values, docs * 24
    40     4     docs: entries (row in block, start, document number)
    44     4     docs_crc32c, of the raw values

    num_rows * 4 bytes: crc32c of each row's sequence_length values

Block b of the file is block first_block + b of the split; its members are BBBBBB.tokens.npy and BBBBBB.docs.npy with
that number. Rows are counted through the blocks in order.

`<shard>.tar.idx` is the tar index of NVIDIA's Energon: little-endian uint64 byte offsets of each sample's first tar
header, then the offset where the last sample ends (the first end-of-archive block).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from megamask.errors import DataIntegrityError

MAGIC = b"MEGAMIDX"
VERSION = 1
HEADER_BYTES = 64
DOCS_COLUMNS = 3
DOCS_ENTRY_BYTES = 8 * DOCS_COLUMNS

_PLACES = ("tokens_offset", "tokens_bytes", "docs_offset", "docs_bytes")
_HEADER = struct.Struct("<8sIIQQQQIIII")
BLOCK_DTYPE = np.dtype(
    [
        ("tokens_offset", "<u8"),
        ("tokens_bytes", "<u8"),
        ("rows", "<u4"),
        ("tokens_crc32c", "<u4"),
        ("docs_offset", "<u8"),
        ("docs_bytes", "<u8"),
        ("docs", "<u4"),
        ("docs_crc32c", "<u4"),
    ]
)


def block_name(block: int) -> str:
    """The name of a block in its shard's members: its number in the split with at least six digits."""
    return f"{block:06d}"


def index_name(shard_name: str) -> str:
    """`shards/train-000000.tar` -> `shards/train-000000.idx`."""
    return shard_name.removesuffix(".tar") + ".idx"


def tar_index_name(shard_name: str) -> str:
    """`shards/train-000000.tar` -> `shards/train-000000.tar.idx`."""
    return shard_name + ".idx"


def index_bytes(num_blocks: int, num_rows: int) -> int:
    """Size of the .idx of a shard of so many blocks and rows."""
    return HEADER_BYTES + num_blocks * BLOCK_DTYPE.itemsize + num_rows * 4


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Content of a shard's .idx file.

    Args:
        first_block: number in the split of the shard's first block.
        shard_bytes: size of the tar file.
        sequence_length: tokens of a row.
        itemsize: bytes of a token, 2 or 4.
        blocks: structured array [num_blocks] of BLOCK_DTYPE.
        row_crc32c: uint32 [num_rows].
    """

    first_block: int
    shard_bytes: int
    sequence_length: int
    itemsize: int
    blocks: npt.NDArray[np.void]
    row_crc32c: npt.NDArray[np.uint32]

    @property
    def num_blocks(self) -> int:
        """Number of blocks of this shard."""
        return len(self.blocks)

    @property
    def num_rows(self) -> int:
        """Number of rows of this shard."""
        return len(self.row_crc32c)

    @cached_property
    def tokens_offsets(self) -> memoryview:
        """Byte in the tar of each block's values, as a memoryview of int64: one item costs less than NumPy's."""
        return self.blocks["tokens_offset"].astype(np.int64).data

    @cached_property
    def row_checksums(self) -> memoryview:
        """`row_crc32c` as a memoryview."""
        return self.row_crc32c.astype(np.uint32, copy=False).data

    def first_rows(self) -> npt.NDArray[np.int64]:
        """int64 [num_blocks + 1]: the shard's first row of each block, then num_rows."""
        return np.concatenate([[0], np.cumsum(self.blocks["rows"], dtype=np.int64)]).astype(np.int64)

    def pack(self) -> bytes:
        """The bytes of the .idx file."""
        body = self.blocks.astype(BLOCK_DTYPE).tobytes() + self.row_crc32c.astype("<u4").tobytes()
        head = _HEADER.pack(
            MAGIC,
            VERSION,
            HEADER_BYTES,
            self.num_blocks,
            self.num_rows,
            self.first_block,
            self.shard_bytes,
            self.sequence_length,
            self.itemsize,
            crc32c(body),
            0,
        )
        head = head[:-4] + struct.pack("<I", crc32c(head[:-4]))
        return head + body

    @classmethod
    def unpack(cls, data: bytes, *, name: str) -> ShardIndex:
        """Parse an .idx file and check all of it.

        Args:
            data: the complete file.
            name: the file's name for messages.

        Raises:
            DataIntegrityError: it is truncated, damaged, newer than this reader, or contradicts itself.
        """
        fields = _read_header(data, name)
        num_blocks, num_rows, first_block, shard_bytes, sequence_length, itemsize = fields
        rows_at = HEADER_BYTES + num_blocks * BLOCK_DTYPE.itemsize
        index = cls(
            first_block=first_block,
            shard_bytes=shard_bytes,
            sequence_length=sequence_length,
            itemsize=itemsize,
            blocks=np.frombuffer(data[HEADER_BYTES:rows_at], dtype=BLOCK_DTYPE),
            row_crc32c=np.frombuffer(data[rows_at:], dtype="<u4"),
        )
        _check_blocks(index, num_rows, name)
        return index


def _damaged(name: str, what: str) -> DataIntegrityError:
    return DataIntegrityError(
        f"{name}: {what}. No sample of the shard was used.", hint="restore the file or prepare the corpus again"
    )


def _read_header(data: bytes, name: str) -> tuple[int, int, int, int, int, int]:
    if len(data) < HEADER_BYTES:
        raise _damaged(name, f"the index has {len(data)} bytes, fewer than its header of {HEADER_BYTES}")
    (
        magic,
        version,
        header_bytes,
        num_blocks,
        num_rows,
        first_block,
        shard_bytes,
        length,
        itemsize,
        body_crc,
        head_crc,
    ) = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise _damaged(name, "not a shard index (wrong magic)")
    if crc32c(data[: HEADER_BYTES - 4]) != head_crc:
        raise _damaged(name, "the index header fails its checksum")
    if version != VERSION or header_bytes != HEADER_BYTES:
        raise _damaged(name, f"the index has version {version}, this reader knows version {VERSION}")
    expected = index_bytes(num_blocks, num_rows)
    if len(data) != expected:
        raise _damaged(name, f"the index has {len(data)} bytes, its header has {expected}")
    if crc32c(data[HEADER_BYTES:]) != body_crc:
        raise _damaged(name, "the index body fails its checksum")
    return num_blocks, num_rows, first_block, shard_bytes, length, itemsize


def _check_blocks(index: ShardIndex, num_rows: int, name: str) -> None:
    """A checksum proves the bytes, not their sense: a hostile or buggy writer is caught here."""
    if index.itemsize not in (2, 4) or index.sequence_length < 1:
        raise _damaged(name, f"itemsize {index.itemsize} or sequence length {index.sequence_length} is impossible")
    blocks = index.blocks
    tokens, docs = blocks["tokens_offset"], blocks["docs_offset"]
    tokens_bytes, docs_bytes, rows = blocks["tokens_bytes"], blocks["docs_bytes"], blocks["rows"].astype(np.uint64)
    row_bytes = index.sequence_length * index.itemsize
    # Below 2^62 no sum of two of them wraps; a block with a larger one is wrong in any case.
    is_small = np.all([blocks[field] < np.uint64(1 << 62) for field in _PLACES], axis=0)
    ends = np.concatenate([np.zeros(1, np.uint64), docs + docs_bytes])
    is_sized = (tokens_bytes == rows * np.uint64(row_bytes)) & (
        docs_bytes == blocks["docs"].astype(np.uint64) * np.uint64(DOCS_ENTRY_BYTES)
    )
    is_inside = is_small & (rows >= 1) & (ends[:-1] <= tokens) & (tokens + tokens_bytes <= docs)
    is_inside &= ends[1:] <= np.uint64(index.shard_bytes)
    for is_right, what in (
        (is_sized, "has sizes that do not fit its counts"),
        (is_inside, "lies outside the shard or over another block"),
    ):
        wrong = np.flatnonzero(~is_right)
        if len(wrong):
            raise _damaged(name, f"block {index.first_block + int(wrong[0])} {what}")
    total = int(rows.sum())
    if total != num_rows:
        raise _damaged(name, f"the blocks hold {total} rows, the header has {num_rows}")


def pack_tar_index(sample_offsets: list[int], end: int) -> bytes:
    """The bytes of Energon's .tar.idx.

    Args:
        sample_offsets: byte offset of each sample's first tar header, ascending.
        end: byte offset behind the last sample.
    """
    return np.array([*sample_offsets, end], dtype="<u8").tobytes()
