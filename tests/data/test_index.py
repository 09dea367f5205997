from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.index import (
    BLOCK_DTYPE,
    HEADER_BYTES,
    ShardIndex,
    block_name,
    index_name,
    pack_tar_index,
    tar_index_name,
)
from megamask.errors import DataIntegrityError


def make_index(num_blocks: int = 3, rows: int = 4, first_block: int = 6) -> ShardIndex:
    blocks = []
    offset = 640
    for number in range(num_blocks):
        tokens, docs = rows * 16 * 2, 5
        blocks.append((offset, tokens, rows, 11 + number, offset + 1024, docs * 24, docs, 22 + number))
        offset += 2048
    return ShardIndex(
        first_block=first_block,
        shard_bytes=offset,
        sequence_length=16,
        itemsize=2,
        blocks=np.array(blocks, dtype=BLOCK_DTYPE),
        row_crc32c=np.arange(num_blocks * rows, dtype="<u4"),
    )


def test_index_bytes_stand_where_the_format_says() -> None:
    data = make_index().pack()
    assert data[:8] == b"MEGAMIDX"
    version, header, blocks, rows, first, size, length, item, body_crc, head_crc = struct.unpack(
        "<IIQQQQIIII", data[8:64]
    )
    assert (version, header, blocks, rows, first, length, item) == (1, 64, 3, 12, 6, 16, 2)
    assert (size, body_crc, head_crc) == (640 + 3 * 2048, crc32c(data[64:]), crc32c(data[:60]))
    assert struct.unpack("<QQIIQQII", data[64 + 48 : 64 + 96]) == (2688, 128, 4, 12, 3712, 120, 5, 23)
    assert struct.unpack("<12I", data[64 + 3 * 48 :]) == tuple(range(12))


def test_index_reads_back_what_was_packed() -> None:
    index = make_index()
    again = ShardIndex.unpack(index.pack(), name="x.idx")
    assert again.pack() == index.pack()
    assert (again.num_blocks, again.num_rows, again.first_block) == (3, 12, 6)
    assert again.first_rows().tolist() == [0, 4, 8, 12]


@given(place=st.integers(0, HEADER_BYTES + 3 * 48 + 12 * 4 - 1), bit=st.integers(0, 7))
def test_index_is_refused_when_any_bit_is_flipped(place: int, bit: int) -> None:
    data = bytearray(make_index().pack())
    data[place] ^= 1 << bit
    with pytest.raises(DataIntegrityError, match=r"x\.idx"):
        ShardIndex.unpack(bytes(data), name="x.idx")


@given(length=st.integers(0, HEADER_BYTES + 3 * 48 + 12 * 4 - 1))
def test_index_is_refused_when_it_is_truncated(length: int) -> None:
    with pytest.raises(DataIntegrityError, match=r"x\.idx"):
        ShardIndex.unpack(make_index().pack()[:length], name="x.idx")


def test_index_is_refused_when_bytes_follow_it() -> None:
    with pytest.raises(DataIntegrityError, match="its header has"):
        ShardIndex.unpack(make_index().pack() + b"\0", name="x.idx")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens_offset", 10**9),
        ("tokens_offset", 640),
        ("tokens_bytes", 1),
        ("rows", 0),
        ("rows", 5),
        ("docs_offset", 700),
        ("docs", 6),
    ],
)
def test_index_is_refused_when_it_contradicts_itself_under_a_right_checksum(field: str, value: int) -> None:
    index = make_index()
    index.blocks[1][field] = value
    with pytest.raises(DataIntegrityError, match="block 7"):
        ShardIndex.unpack(index.pack(), name="x.idx")


def test_index_is_refused_when_it_has_more_row_checksums_than_rows() -> None:
    index = replace(make_index(), row_crc32c=np.arange(13, dtype="<u4"))
    with pytest.raises(DataIntegrityError, match="the blocks hold 12 rows, the header has 13"):
        ShardIndex.unpack(index.pack(), name="x.idx")


def test_index_of_a_newer_version_is_refused() -> None:
    data = bytearray(make_index().pack())
    data[8] = 2
    data[60:64] = struct.pack("<I", crc32c(bytes(data[:60])))
    with pytest.raises(DataIntegrityError, match="version 2"):
        ShardIndex.unpack(bytes(data), name="x.idx")


def test_tar_index_is_offsets_and_end_in_64_bits() -> None:
    assert struct.unpack("<3Q", pack_tar_index([0, 2048], 4096)) == (0, 2048, 4096)


def test_names_of_blocks_and_indices() -> None:
    assert (block_name(7), block_name(1234567)) == ("000007", "1234567")
    assert index_name("shards/train-000000.tar") == "shards/train-000000.idx"
    assert tar_index_name("shards/train-000000.tar") == "shards/train-000000.tar.idx"
