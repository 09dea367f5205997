"""Hostile corpora whose digests are true: each ends with 64, nothing is unpacked, and no absurd size is reserved."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamask.data.corpus.shard import archive_bytes, npy_header, tar_header
from megamask.data.index import BLOCK_DTYPE, ShardIndex, pack_tar_index
from megamask.data.manifest import Manifest
from megamask.data.reader import SplitReader
from megamask.errors import DataIntegrityError, MegamaskError
from megamask_pipelines.cli import main as cli
from support.hostile_corpus import SHARD, Evil, adopt_shard, forge, members


def test_corpus_with_its_shard_adopted_unchanged_passes(corpus: Path) -> None:
    """The tests below fail because of what they change."""
    adopt_shard(corpus, tar=(corpus / SHARD).read_bytes())
    assert cli.main(["verify", "corpus", str(corpus)]) == 0


# Members of an archive.


def kind(flag: bytes, link: str = "") -> Callable[[tarfile.TarInfo], object]:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = flag, link

    return change


@pytest.mark.promise(
    "an archive member of another name or kind, or missing from the index, is refused and nothing is unpacked"
)
@pytest.mark.parametrize(
    "change",
    [
        lambda info: setattr(info, "name", "../../evil.tokens.npy"),
        lambda info: setattr(info, "name", "/tmp/evil.tokens.npy"),
        lambda info: setattr(info, "name", "000001.docs.npy"),
        lambda info: setattr(info, "name", "./000000.tokens.npy"),
        kind(tarfile.SYMTYPE, "/etc/passwd"),
        kind(tarfile.SYMTYPE, "../manifest.json"),
        kind(tarfile.LNKTYPE, "000000.docs.npy"),
        kind(tarfile.CHRTYPE),
        kind(tarfile.BLKTYPE),
        kind(tarfile.FIFOTYPE),
        kind(tarfile.DIRTYPE),
        kind(tarfile.GNUTYPE_SPARSE),
        kind(tarfile.GNUTYPE_LONGNAME),
        kind(tarfile.XHDTYPE),
        kind(tarfile.XGLTYPE),
        kind(tarfile.CONTTYPE),
        lambda info: setattr(info, "mode", 0o4755),
        lambda info: setattr(info, "uid", 1000),
        lambda info: setattr(info, "mtime", 1),
        lambda info: setattr(info, "size", (1 << 33) - 1),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_member_of_another_name_or_kind_is_refused(corpus: Path, refused: Any, change: Any, place: int) -> None:
    data = bytearray((corpus / SHARD).read_bytes())
    info = members(corpus)[place][0]
    at = info.offset
    fresh = tarfile.TarInfo(info.name)
    fresh.size, fresh.mode = info.size, 0o644
    change(fresh)
    data[at : at + 512] = fresh.tobuf(format=tarfile.USTAR_FORMAT)[-512:]
    adopt_shard(corpus, tar=bytes(data))
    error = refused("train-000000.tar")
    assert "the archive has a member" in error or "the tar header of member" in error


def test_size_that_only_gnu_tar_writes_is_refused(corpus: Path, refused: Any) -> None:
    """Sixty-four bits of a size: a reader that believed it would reserve it."""
    data = bytearray((corpus / SHARD).read_bytes())
    info = tarfile.TarInfo("000000.tokens.npy")
    info.size = 1 << 60
    data[:512] = info.tobuf(format=tarfile.GNU_FORMAT)
    adopt_shard(corpus, tar=bytes(data))
    refused("the tar header of member 000000.tokens.npy")


def test_long_name_of_absurd_length_is_refused(corpus: Path, refused: Any) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 60
    data = bytearray((corpus / SHARD).read_bytes())
    data[:512] = info.tobuf(format=tarfile.GNU_FORMAT)
    adopt_shard(corpus, tar=bytes(data))
    refused("a member '././@LongLink' where 000000.tokens.npy belongs")


@pytest.mark.promise(
    "an archive member of another name or kind, or missing from the index, is refused and nothing is unpacked"
)
@pytest.mark.parametrize("name", ["000000.tokens.npy", "evil.sh", "../evil"])
def test_member_that_the_index_does_not_name_is_refused(corpus: Path, refused: Any, name: str) -> None:
    """Behind the last one, where the rows do not need to move; a duplicate would win in other readers."""
    info = members(corpus)[-1][0]
    end = info.offset_data + info.size + -info.size % 512
    body = (corpus / SHARD).read_bytes()[:end] + tar_header(name, 0) + bytes(512)
    adopt_shard(corpus, tar=body.ljust(archive_bytes(len(body)), b"\0"))
    refused("train-000000.tar", "something other than zeros")


def test_archive_that_goes_on_after_its_end_is_refused(corpus: Path, refused: Any) -> None:
    adopt_shard(corpus, tar=(corpus / SHARD).read_bytes() + bytes(10240))
    refused("train-000000.tar", "goes on behind its last member")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "header",
    [
        npy_header((4, 16), np.dtype("O")),
        npy_header((4, 16), np.dtype("<f8")),
        npy_header((1 << 60, 16), np.dtype("<u2")),
        npy_header((-1, 16), np.dtype("<u2")),
        npy_header((4, 16), np.dtype("<u2")).replace(b"False", b"True "),
        npy_header((4, 16), np.dtype("<u2")).replace(b"\x01\x00", b"\x03\x00", 1),
        b"\x80\x04" + bytes(126),
    ],
    ids=["object", "float", "huge", "negative", "fortran", "version", "pickle"],
)
def test_array_header_of_another_array_is_refused(corpus: Path, refused: Any, header: bytes, place: int) -> None:
    data = bytearray((corpus / SHARD).read_bytes())
    at = members(corpus)[place][0].offset_data
    data[at : at + 128] = header
    adopt_shard(corpus, tar=bytes(data))
    refused("its .npy header is not that of the stored array")


@pytest.mark.promise("a pickled array is never loaded")
def test_pickled_array_is_never_loaded(corpus: Path, refused: Any) -> None:
    """Rows are read by offset, as integers; no array reader ever sees the member."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([[Evil()]], dtype=object), allow_pickle=True)
    data = bytearray((corpus / SHARD).read_bytes())
    info = members(corpus)[0][0]
    data[info.offset_data : info.offset_data + min(info.size, len(buffer.getvalue()))] = buffer.getvalue()[: info.size]
    adopt_shard(corpus, tar=bytes(data))
    refused("train-000000.tar", "crc32c")
    assert not Path("evil").exists()
    with pytest.raises(MegamaskError):
        SplitReader(corpus, Manifest.load(corpus), "train").read(0)
    assert not Path("evil").exists()


# Sizes in an index and in the manifest.


def absurd_index(corpus: Path, **changes: int) -> bytes:
    """The first shard's index with a block's fields changed, all checksums true."""
    index = ShardIndex.unpack((corpus / SHARD).with_suffix(".idx").read_bytes(), name="index")
    blocks = np.array(index.blocks, dtype=BLOCK_DTYPE)
    for name, value in changes.items():
        blocks[name][0] = value
    return ShardIndex(**{**vars(index), "blocks": blocks}).pack()


@pytest.mark.promise("an absurd size in an index, manifest or archive is refused before it is read")
@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_bytes": 1 << 60},
        {"tokens_offset": 1 << 60},
        {"docs_bytes": 1 << 60, "docs": 1 << 31},
        {"docs_offset": (1 << 64) - 8},
        {"docs_offset": 0},
        {"rows": 0},
        {"rows": (1 << 32) - 1},
        {"rows": 1 << 31, "tokens_bytes": 1 << 36},
        {"docs": 1 << 31, "docs_bytes": 24 << 31},
    ],
)
@pytest.mark.parametrize("reader", ["verify", "training"])
def test_absurd_size_in_an_index_is_refused_before_it_is_read(
    corpus: Path, refused: Any, changes: dict[str, int], reader: str
) -> None:
    adopt_shard(corpus, index=absurd_index(corpus, **changes))
    if reader == "verify":
        refused("train-000000.idx", "block 0")
        return
    with pytest.raises(DataIntegrityError, match=r"train-000000\.idx: block 0"):
        SplitReader(corpus, Manifest.load(corpus), "train").read(0)


@pytest.mark.parametrize("size", [0, 63, 1 << 40])
def test_index_of_another_size_is_refused_unread(corpus: Path, refused: Any, size: int) -> None:
    with (corpus / SHARD).with_suffix(".idx").open("r+b") as file:
        file.truncate(size)  # a hole: it takes no room on the disk
    refused("train-000000.idx")


@pytest.mark.promise("an absurd size in an index, manifest or archive is refused before it is read")
def test_shard_that_is_shorter_than_its_index_says_is_refused_unread(corpus: Path, refused: Any) -> None:
    """A trillion bytes by index and manifest; the file is small."""
    index = ShardIndex.unpack((corpus / SHARD).with_suffix(".idx").read_bytes(), name="index")
    blocks = np.array(index.blocks, dtype=BLOCK_DTYPE)
    blocks["docs_bytes"][-1], blocks["docs"][-1] = 24 << 31, 1 << 31
    changed = ShardIndex(**{**vars(index), "blocks": blocks, "shard_bytes": 1 << 40}).pack()
    adopt_shard(corpus, index=changed)
    forge(corpus, lambda content: content["splits"]["train"]["shards"][0].update(bytes=1 << 40))
    refused("train-000000.tar has", "the manifest has 1099511627776")


@pytest.mark.parametrize("data", [b"", b"x" * 7, bytes(1 << 20)])
def test_tar_index_of_another_size_is_refused(corpus: Path, refused: Any, data: bytes) -> None:
    adopt_shard(corpus, offsets=data)
    refused("train-000000.tar.idx has")


def test_tar_index_that_points_elsewhere_is_refused(corpus: Path, refused: Any) -> None:
    adopt_shard(corpus, offsets=pack_tar_index([0, 1 << 60], 1 << 61))
    refused("train-000000.tar.idx: its offsets")
