"""Rows by number: the right ones, checked on every read, and damage named to the row."""

from __future__ import annotations

import errno
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamask.data import Corpus, shard_files
from megamask.data import reader as reader_module
from megamask.data.content import documents_checksum, tokens_checksum
from megamask.data.index import ShardIndex
from megamask.data.manifest import Manifest, ShardEntry
from megamask.data.reader import SplitReader
from megamask.errors import DataIntegrityError, ExitCode, StorageError, UsageError
from megamask.storage.hashing import canonical_json, sha256_file
from support.shards import flip_bit, packed_documents, packed_rows, random_documents, write_token_corpus

DOCUMENTS = random_documents(30, seed=1)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_token_corpus(tmp_path / "corpus", DOCUMENTS, validation=random_documents(4, seed=2))
    return tmp_path / "corpus"


def open_reader(corpus: Path, split: str = "train") -> SplitReader:
    return SplitReader(corpus, Manifest.load(corpus), split)


def index_of(corpus: Path, shard: int) -> ShardIndex:
    path = corpus / "shards" / f"train-{shard:06d}.idx"
    return ShardIndex.unpack(path.read_bytes(), name=path.name)


def test_reader_returns_every_row_and_its_documents(corpus: Path) -> None:
    reader = open_reader(corpus)
    tokens = packed_rows(DOCUMENTS, sequence_length=16, eod=61, pad=62)
    documents = packed_documents(DOCUMENTS, sequence_length=16)
    assert reader.num_rows == len(tokens) == int(reader.block_rows.sum())
    assert len(list((corpus / "shards").glob("train-*.tar"))) > 2
    for row in np.random.default_rng(3).permutation(reader.num_rows).tolist():
        read = reader.read(row)
        assert read.tokens.tolist() == tokens[row]
        assert read.documents.tolist() == documents[row]
        assert read.tokens_crc32c == tokens_checksum(np.array(tokens[row], dtype="<u2"))
        assert read.documents_crc32c == documents_checksum(np.array(documents[row]))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 12),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    vocab_size=st.sampled_from([64, 1 << 17]),
)
def test_reader_returns_every_row_when_blocks_and_shards_are_short(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, shape: tuple[int, int], vocab_size: int
) -> None:
    documents = random_documents(count, seed=seed, ids=vocab_size - 3)
    folder = tmp_path_factory.mktemp("corpus") / "c"
    manifest = write_token_corpus(
        folder, documents, rows_per_block=shape[0], blocks_per_shard=shape[1], vocab_size=vocab_size
    )
    reader = SplitReader(folder, manifest, "train")
    rows = [reader.read(row) for row in range(reader.num_rows)]
    expected = packed_rows(documents, sequence_length=16, eod=vocab_size - 3, pad=vocab_size - 2)
    assert [row.tokens.tolist() for row in rows] == expected
    assert [row.documents.tolist() for row in rows] == packed_documents(documents, sequence_length=16)
    reader.close()


def test_splits_are_read_apart(corpus: Path) -> None:
    expected = packed_rows(random_documents(4, seed=2), sequence_length=16, eod=61, pad=62)
    reader = open_reader(corpus, "validation")
    assert [reader.read(row).tokens.tolist() for row in range(reader.num_rows)] == expected
    assert reader.read(0).documents[0].tolist() == [0, len(DOCUMENTS)]


def test_unknown_split_is_refused(corpus: Path) -> None:
    with pytest.raises(UsageError, match="no split 'test'"):
        open_reader(corpus, "test")


@pytest.mark.parametrize("row", [-1, 10_000])
def test_row_outside_the_split_is_refused(corpus: Path, row: int) -> None:
    with pytest.raises(IndexError, match=str(row)):
        open_reader(corpus).read(row)


@pytest.mark.promise("a damaged bit of a row is detected and named when the row is read")
def test_every_flipped_bit_of_a_row_is_found_and_named(corpus: Path) -> None:
    shard, row_of_block = 1, 2
    index = index_of(corpus, shard)
    start = int(index.blocks["tokens_offset"][1]) + row_of_block * 32
    path = corpus / "shards" / "train-000001.tar"
    row = index_of(corpus, 0).num_rows + int(index.blocks["rows"][0]) + row_of_block
    for offset in range(start, start + 32, 5):
        flip_bit(path, offset, offset % 8)
        reader = open_reader(corpus)
        reader.read(row - 1)
        reader.read(row + 1)
        with pytest.raises(DataIntegrityError) as caught:
            reader.read(row)
        message = str(caught.value)
        assert f"{path}: member 000004.tokens.npy, row 2 of the block (row {row} of split train)" in message
        assert f"the index has {index.row_crc32c[row - index_of(corpus, 0).num_rows]:08x}" in message
        assert caught.value.exit_code == ExitCode.DATA_INTEGRITY == 64
        flip_bit(path, offset, offset % 8)
    assert open_reader(corpus).read(row) is not None


def test_damage_after_the_first_read_of_a_row_is_found(corpus: Path) -> None:
    reader = open_reader(corpus)
    reader.read(0)
    flip_bit(corpus / "shards" / "train-000000.tar", int(index_of(corpus, 0).blocks["tokens_offset"][0]))
    with pytest.raises(DataIntegrityError, match="row 0 of the block"):
        reader.read(0)


def test_flipped_bit_in_a_document_table_is_found_and_named(corpus: Path) -> None:
    path = corpus / "shards" / "train-000000.tar"
    flip_bit(path, int(index_of(corpus, 0).blocks["docs_offset"][1]) + 9)
    reader = open_reader(corpus)
    reader.read(3)
    with pytest.raises(DataIntegrityError, match=r"train-000000\.tar: member 000001\.docs\.npy"):
        reader.read(4)


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.idx"])
def test_truncated_file_is_named_at_open(corpus: Path, name: str) -> None:
    path = corpus / "shards" / name
    size = path.stat().st_size
    os.truncate(path, size // 2)
    with pytest.raises(DataIntegrityError, match=rf"{name} has {size // 2} bytes, the manifest has {size}"):
        open_reader(corpus)


def test_shard_truncated_later_is_found_before_a_row_of_it_is_used(corpus: Path) -> None:
    path = corpus / "shards" / "train-000001.tar"
    size = path.stat().st_size
    reader = open_reader(corpus)
    reader.read(0)
    os.truncate(path, size // 2)
    with pytest.raises(DataIntegrityError, match=rf"train-000001\.tar has {size // 2} bytes, the manifest has {size}"):
        reader.read(12)


def test_shard_truncated_while_it_is_open_is_found(corpus: Path) -> None:
    reader = open_reader(corpus)
    reader.read(0)
    os.truncate(corpus / "shards" / "train-000000.tar", 1000)
    with pytest.raises(DataIntegrityError, match=r"member 000001\.tokens\.npy"):
        reader.read(5)


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.idx"])
def test_missing_file_is_named_at_open(corpus: Path, name: str) -> None:
    (corpus / "shards" / name).unlink()
    with pytest.raises(DataIntegrityError, match=rf"{name} is missing, but the manifest names it"):
        open_reader(corpus)


def test_index_is_read_when_a_row_of_its_shard_is_wanted(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    real = reader_module.load_index

    def load(folder: Path, manifest: Manifest, entry: ShardEntry, first_block: int) -> ShardIndex:
        loaded.append(entry.name)
        return real(folder, manifest, entry, first_block)

    monkeypatch.setattr(reader_module, "load_index", load)
    reader = open_reader(corpus)
    assert (reader.num_rows, loaded) == (int(reader.block_rows.sum()), [])
    reader.read_rows([14, 12, 13])
    assert loaded == ["shards/train-000001.tar"]


def test_rows_of_a_batch_come_in_the_order_asked_for(corpus: Path) -> None:
    reader = open_reader(corpus)
    rows = [17, 3, 4, 3, reader.num_rows - 1, 5, 0]
    read, alone = reader.read_rows(rows), [reader.read(row) for row in rows]
    assert read.tokens.tolist() == [row.tokens.tolist() for row in alone]
    assert [pairs.tolist() for pairs in read.documents] == [row.documents.tolist() for row in alone]
    assert read.tokens_crc32c == [row.tokens_crc32c for row in alone]
    assert read.documents_crc32c == [row.documents_crc32c for row in alone]
    assert reader.read_rows([]).tokens.shape == (0, 16)


def test_index_with_other_blocks_than_the_manifest_gives_is_refused(corpus: Path) -> None:
    content = json.loads((corpus / "manifest.json").read_bytes())
    shard = corpus / "shards" / "train-000000.idx"
    index = index_of(corpus, 0)
    blocks = index.blocks.copy()
    size = int(blocks["tokens_bytes"][0]) // 4
    blocks["rows"][:2] = [3, 5]
    blocks["tokens_bytes"][:2] = [3 * size, 5 * size]
    blocks["docs_offset"][1] += size
    shard.write_bytes(replace(index, blocks=blocks).pack())
    content["splits"]["train"]["shards"][0]["index_sha256"] = sha256_file(shard)
    (corpus / "manifest.json").write_bytes(canonical_json(content))
    with pytest.raises(DataIntegrityError, match="are not those that the manifest's counts give"):
        open_reader(corpus).read(0)


def test_corpus_of_another_writer_has_its_blocks_read_from_the_indexes(corpus: Path) -> None:
    expected = [row.tolist() for row in Corpus.open(corpus)]
    content = json.loads((corpus / "manifest.json").read_bytes())
    del content["options"]
    (corpus / "manifest.json").write_bytes(canonical_json(content))
    assert [row.tolist() for row in Corpus.open(corpus)] == expected


def test_corpus_is_a_sequence_of_its_rows(corpus: Path) -> None:
    rows = packed_rows(DOCUMENTS, sequence_length=16, eod=61, pad=62)
    opened = Corpus.open(corpus)
    assert len(opened) == len(rows)
    assert opened[np.int64(3)].tolist() == opened[3 - len(rows)].tolist() == rows[3]
    assert opened[3].dtype == np.uint16
    with pytest.raises(IndexError):
        opened[len(rows)]
    assert pickle.loads(pickle.dumps(opened))[5].tolist() == rows[5]
    assert len(Corpus.open(corpus, "validation")) == open_reader(corpus, "validation").num_rows


def test_every_flipped_byte_of_an_index_is_found_before_a_row_is_used(corpus: Path) -> None:
    path = corpus / "shards" / "train-000000.idx"
    for offset in range(0, path.stat().st_size, 7):
        flip_bit(path, offset, 3)
        with pytest.raises(DataIntegrityError, match=r"train-000000\.idx: sha256 is"):
            open_reader(corpus).read(0)
        flip_bit(path, offset, 3)
    open_reader(corpus).read(0)


def test_index_of_another_shard_is_refused(corpus: Path) -> None:
    shards = corpus / "shards"
    (shards / "train-000001.idx").write_bytes((shards / "train-000000.idx").read_bytes())
    with pytest.raises(DataIntegrityError, match=r"train-000001\.idx"):
        open_reader(corpus).read(12)


def test_open_files_are_bounded_and_closed(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        links = [name.readlink() for name in Path("/proc/self/fd").iterdir() if name.is_symlink()]
        return sum(link.is_relative_to(corpus) for link in links)

    monkeypatch.setattr(shard_files, "_OPEN_SHARDS", 2)
    reader = open_reader(corpus)
    rows = [reader.read(row).tokens.tolist() for row in range(reader.num_rows)]
    assert count() == 2
    reader.will_need(range(reader.num_rows))
    assert count() == 2
    reader.close()
    assert count() == 0
    assert reader.read(0).tokens.tolist() == rows[0]


def test_will_need_changes_nothing(corpus: Path) -> None:
    reader = open_reader(corpus)
    before = [reader.read(row).tokens.tolist() for row in range(reader.num_rows)]
    reader.will_need([3, 0, reader.num_rows - 1])
    assert [reader.read(row).tokens.tolist() for row in range(reader.num_rows)] == before


def test_dead_device_is_a_storage_error_and_not_damage(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_reader(corpus)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match=r"train-000000\.tar") as caught:
        reader.read(0)
    assert caught.value.exit_code == ExitCode.STORAGE


def test_short_reads_are_completed(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_reader(corpus).read(7).tokens.tolist()
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: real(descriptor, [buffers[0][:5]], offset))
    assert open_reader(corpus).read_rows([6, 7]).tokens[1].tolist() == expected
