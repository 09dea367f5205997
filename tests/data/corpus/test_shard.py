from __future__ import annotations

import hashlib
import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import webdataset
from crc32c import crc32c

from megamask.data.corpus.pack import RowGroup
from megamask.data.corpus.shard import ShardWriter, npy_header
from megamask.data.index import ShardIndex


def make_blocks(count: int = 5, dtype: str = "<u2") -> list[RowGroup]:
    generator = np.random.default_rng(7)
    blocks = []
    for number in range(count):
        rows = 4 if number < count - 1 else 2
        tokens = generator.integers(0, 60000, size=(rows, 16)).astype(dtype)
        docs = np.array([[row, 0, 100 * number + row] for row in range(rows)], dtype="<i8")
        blocks.append(RowGroup(tokens=tokens, docs=docs))
    return blocks


def write_shards(folder: Path, blocks: list[RowGroup]) -> ShardWriter:
    (folder / "shards").mkdir(parents=True)
    itemsize = blocks[0].tokens.dtype.itemsize
    writer = ShardWriter(folder, "train", blocks_per_shard=2, sequence_length=16, itemsize=itemsize)
    for block in blocks:
        writer.add(block)
    writer.finish()
    return writer


@pytest.mark.promise("shards are plain WebDataset tars")
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_webdataset_reads_the_same_rows(dtype: str, tmp_path: Path) -> None:
    blocks = make_blocks(dtype=dtype)
    writer = write_shards(tmp_path, blocks)
    urls = [str(tmp_path / shard.name) for shard in writer.shards]
    samples: list[dict[str, Any]] = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:06d}" for number in range(5)]
    for sample, block in zip(samples, blocks, strict=True):
        tokens = np.load(io.BytesIO(sample["tokens.npy"]), allow_pickle=False)
        docs = np.load(io.BytesIO(sample["docs.npy"]), allow_pickle=False)
        assert (tokens.dtype.str, docs.dtype.str) == (dtype, "<i8")
        assert np.array_equal(tokens, block.tokens)
        assert np.array_equal(docs, block.docs)


@pytest.mark.promise("the same rows give the same shard bytes")
def test_shards_are_byte_identical_when_written_again(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", make_blocks())
    second = write_shards(tmp_path / "b", make_blocks())
    assert first.shards == second.shards
    for shard in first.shards:
        for name in (shard.name, shard.index_name, shard.tar_index_name):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_tar_members_are_plain_and_carry_no_owner_or_time(tmp_path: Path) -> None:
    writer = write_shards(tmp_path, make_blocks())
    with tarfile.open(tmp_path / writer.shards[1].name, "r:") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        f"00000{number}.{kind}.npy" for number in (2, 3) for kind in ("tokens", "docs")
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }


def test_tar_bytes_are_those_of_the_standard_library(tmp_path: Path) -> None:
    """The writer makes its own padding; tarfile is the oracle for every byte of the archive."""
    (block,) = make_blocks(1)
    writer = write_shards(tmp_path, [block])
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, array in (("000000.tokens.npy", block.tokens), ("000000.docs.npy", block.docs)):
            info = tarfile.TarInfo(name)
            info.size = 128 + array.nbytes
            tar.addfile(info, io.BytesIO(npy_header(array.shape, array.dtype) + array.tobytes()))
    assert (tmp_path / writer.shards[0].name).read_bytes() == expected.getvalue()


def test_index_addresses_the_raw_values_and_their_checksums(tmp_path: Path) -> None:
    blocks = make_blocks()
    writer = write_shards(tmp_path, blocks)
    assert [(shard.blocks, shard.rows) for shard in writer.shards] == [(2, 8), (2, 8), (1, 2)]
    number = 0
    for entry in writer.shards:
        data = (tmp_path / entry.name).read_bytes()
        packed = (tmp_path / entry.index_name).read_bytes()
        index = ShardIndex.unpack(packed, name=entry.index_name)
        assert (index.first_block, index.shard_bytes, index.num_rows) == (number, len(data), entry.rows)
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert entry.index_sha256 == hashlib.sha256(packed).hexdigest()
        row = 0
        for record in index.blocks:
            tokens, docs = blocks[number].tokens.tobytes(), blocks[number].docs.tobytes()
            assert data[record["tokens_offset"] :][: record["tokens_bytes"]] == tokens
            assert data[record["docs_offset"] :][: record["docs_bytes"]] == docs
            assert (record["tokens_crc32c"], record["docs_crc32c"]) == (crc32c(tokens), crc32c(docs))
            for values in blocks[number].tokens:
                assert index.row_crc32c[row] == crc32c(values.tobytes())
                row += 1
            number += 1


def test_tar_index_is_what_a_scan_of_the_archive_gives(tmp_path: Path) -> None:
    """Energon's rule: the header offset of each new sample, then where tarfile is at the end of the members."""
    writer = write_shards(tmp_path, make_blocks())
    for entry in writer.shards:
        offsets: list[int] = []
        last = ""
        with tarfile.open(tmp_path / entry.name, "r:") as tar:
            for member in tar:
                if member.name.split(".")[0] != last:
                    last = member.name.split(".")[0]
                    offsets.append(member.offset)
            offsets.append(tar.offset)
        packed = (tmp_path / entry.tar_index_name).read_bytes()
        assert list(struct.unpack(f"<{len(packed) // 8}Q", packed)) == offsets
        assert entry.tar_index_sha256 == hashlib.sha256(packed).hexdigest()


@pytest.mark.parametrize("shape", [(1, 1), (64, 4096), (2**30, 2**29)])
@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
def test_npy_header_is_128_bytes_that_numpy_understands(shape: tuple[int, int], dtype: str) -> None:
    array: npt.NDArray[Any] = np.lib.stride_tricks.as_strided(np.zeros(1, dtype=dtype), shape=shape, strides=(0, 0))
    header = npy_header(array.shape, array.dtype)
    assert len(header) == 128
    file = io.BytesIO(header)
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == (shape, False, np.dtype(dtype))


def test_shard_writer_never_overwrites_a_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, make_blocks(1))
    writer = ShardWriter(tmp_path, "train", blocks_per_shard=2, sequence_length=16, itemsize=2)
    with pytest.raises(FileExistsError):
        writer.add(make_blocks(1)[0])
