"""Hostile corpora whose digests are true: each ends with 64, nothing is unpacked, and no absurd size is reserved."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megamask.checkpoint.saver import _write_documents
from megamask.config.schema.corpus import CorpusConfig, TokenizerConfig
from megamask.data.corpus.prepare import build
from megamask.data.corpus.shard import archive_bytes, npy_header, tar_header
from megamask.data.index import BLOCK_DTYPE, ShardIndex, pack_tar_index
from megamask.data.manifest import Manifest
from megamask.data.reader import SplitReader
from megamask.data.tokenizer import CorpusTokenizer, SpecialTokens
from megamask.errors import DataIntegrityError, MegamaskError, UsageError
from megamask.storage.hashing import canonical_json, sha256_bytes, sha256_file
from megamask_pipelines.cli import main as cli
from support.refusals import snapshot

MOST_MEMORY = 64 << 20


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile_corpus")
    generator = random.Random(5)
    for number in range(6):
        text = " ".join(generator.choice(("alpha", "beta", "gamma")) for _ in range(40))
        (folder / f"{number}.txt").write_text(text)
    config = CorpusConfig(
        inputs=[str(folder / "*.txt")],
        output_dir=str(folder / "corpus"),
        sequence_length=16,
        validation_fraction=0.3,
        rows_per_block=4,
        blocks_per_shard=2,
        tokenizer=TokenizerConfig(vocab_size=264),
    )
    build(config)
    return folder / "corpus"


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Path(shutil.copytree(prepared, tmp_path / "corpus"))


@pytest.fixture
def refused(corpus: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`megamask verify corpus` must end with 64, in little memory, and leave nothing behind."""

    def run(*words: str, code: int = 64) -> str:
        before = snapshot(corpus.parent)
        tracemalloc.start()
        try:
            ended = cli.main(["verify", "corpus", str(corpus), "--json"])
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        error = capsys.readouterr().err
        assert ended == code, error
        assert error.startswith("error: "), error
        assert "Traceback" not in error
        for word in words:
            assert word in error, error
        assert peak < MOST_MEMORY
        assert snapshot(corpus.parent) == before
        return error

    return run


def content_of(corpus: Path) -> dict[str, Any]:
    return dict(json.loads((corpus / "manifest.json").read_bytes()))


def forge(corpus: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest in its canonical form with something changed; provenance would only repeat the old id."""
    content = content_of(corpus)
    change(content)
    (corpus / "manifest.json").write_bytes(canonical_json(content))
    (corpus / "provenance.json").unlink(missing_ok=True)


SHARD = "shards/train-000000.tar"


def adopt_shard(
    corpus: Path, tar: bytes | None = None, index: bytes | None = None, offsets: bytes | None = None
) -> None:
    """Puts other bytes in the place of the first shard's files and makes the manifest true of them."""
    path = corpus / SHARD
    for name, data in ((path, tar), (path.with_suffix(".idx"), index), (path.with_suffix(".tar.idx"), offsets)):
        if data is not None:
            name.write_bytes(data)
    if tar is not None and index is None:
        old = ShardIndex.unpack(path.with_suffix(".idx").read_bytes(), name="index")
        path.with_suffix(".idx").write_bytes(ShardIndex(**{**vars(old), "shard_bytes": len(tar)}).pack())
    forge(
        corpus,
        lambda content: content["splits"]["train"]["shards"][0].update(
            sha256=sha256_file(path),
            bytes=path.stat().st_size,
            index_sha256=sha256_file(path.with_suffix(".idx")),
            tar_index_sha256=sha256_file(path.with_suffix(".tar.idx")),
        ),
    )


def members(corpus: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(corpus / SHARD) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar.getmembers()]  # type: ignore[union-attr]


def test_corpus_with_its_shard_adopted_unchanged_passes(corpus: Path) -> None:
    """What the tests below change is what makes them fail."""
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


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil",)


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
    refused("train-000000.tar has", "the manifest says 1099511627776")


@pytest.mark.parametrize("data", [b"", b"x" * 7, bytes(1 << 20)])
def test_tar_index_of_another_size_is_refused(corpus: Path, refused: Any, data: bytes) -> None:
    adopt_shard(corpus, offsets=data)
    refused("train-000000.tar.idx has")


def test_tar_index_that_points_elsewhere_is_refused(corpus: Path, refused: Any) -> None:
    adopt_shard(corpus, offsets=pack_tar_index([0, 1 << 60], 1 << 61))
    refused("train-000000.tar.idx: its offsets")


# The manifest.


def shard_of(content: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = content["splits"]["train"]["shards"][0]
    return shard


@pytest.mark.promise("an absurd size in an index, manifest or archive is refused before it is read")
@pytest.mark.parametrize(
    "change",
    [
        lambda c: shard_of(c).update(name="../../evil.tar"),
        lambda c: shard_of(c).update(name="/etc/passwd"),
        lambda c: shard_of(c).update(name="shards/train-000001.tar"),
        lambda c: shard_of(c).update(name="shards/../shards/train-000000.tar"),
        lambda c: shard_of(c).update(name=None),
        lambda c: shard_of(c).update(extra=1),
        lambda c: shard_of(c).update(sha256="../" * 21 + "x"),
        lambda c: shard_of(c).update(rows=-1),
        lambda c: shard_of(c).update(rows=True),
        lambda c: shard_of(c).update(bytes="7"),
        lambda c: shard_of(c).update(rows=1 << 70),
        lambda c: c["splits"]["train"].update(sequences=1 << 70),
        lambda c: c["splits"].update(test=c["splits"]["train"]),
        lambda c: c.update(splits=[]),
        lambda c: c.update(splits={}),
        lambda c: c.update(sequence_length=1 << 40),
        lambda c: c.update(sequence_length="16"),
        lambda c: c.update(sequence_length=0),
        lambda c: c.update(dtype="object"),
        lambda c: c.update(dtype="uint64"),
        lambda c: c["tokenizer"].update(vocab_size=1 << 31),
        lambda c: c["tokenizer"].update(eod_token_id=-1),
        lambda c: c["tokenizer"].update(pad_token_id=True),
        lambda c: c["tokenizer"].update(mask_token_id=1 << 40),
        lambda c: c["documents"]["tables"][0].update(name="../../evil.parquet"),
        lambda c: c["documents"]["tables"][0].update(name="/evil.parquet"),
        lambda c: c["documents"]["tables"][0].update(name="documents/000001.parquet"),
        lambda c: c["documents"]["tables"][0].update(name=7),
        lambda c: c["documents"]["tables"][0].update(documents=1 << 60),
        lambda c: c["documents"]["tables"][0].update(documents=None),
        lambda c: c["documents"].update(tables=7),
        lambda c: c["options"].update(validation_fraction="1e999999999"),
        lambda c: c["options"].update(validation_fraction="1/3"),
        lambda c: c["options"].pop("validation_fraction"),
        lambda c: c.update(inputs=[{}]),
        lambda c: c["inputs"][0].update(documents=-1),
        lambda c: c.update(unused_ids=[1, 1]),
        lambda c: c.update(unused_ids="x"),
        lambda c: c["totals"].update(tokens="x"),
        lambda c: c.pop("totals"),
    ],
)
def test_manifest_that_cannot_be_is_refused(corpus: Path, refused: Any, change: Any) -> None:
    forge(corpus, change)
    refused("manifest.json")


@pytest.mark.parametrize(
    "text",
    [
        b'{"format":"megamask-corpus","format":"megamask-corpus","version":1}\n',
        b'{"format":"megamask-corpus","version":1,"sequence_length":NaN}\n',
        b'{"format":"megamask-corpus","version":1.0}\n',
        b'{"format":"megamask-corpus","version":' + b"9" * 5000 + b"}\n",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b"",
    ],
)
def test_manifest_that_is_no_canonical_document_is_refused(corpus: Path, refused: Any, text: bytes) -> None:
    (corpus / "manifest.json").write_bytes(text)
    refused("manifest.json", "canonical")


@pytest.mark.promise("no reader of a corpus follows a link")
@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "provenance.json",
        SHARD,
        "shards/train-000000.idx",
        "documents/000000.parquet",
        "tokenizer/tokenizer.json",
        "tokenizer/special_tokens.json",
        "shards/train-000000.tar.idx",
    ],
)
@pytest.mark.parametrize("target", ["elsewhere", "/dev/zero"])
def test_file_that_is_a_link_out_of_the_corpus_is_refused(
    corpus: Path, refused: Any, tmp_path: Path, name: str, target: str
) -> None:
    (corpus / name).rename(tmp_path / "elsewhere")
    (corpus / name).symlink_to(tmp_path / target)
    refused(name, "link")


@pytest.mark.promise("no reader of a corpus follows a link")
@pytest.mark.parametrize("name", ["manifest.json", SHARD, "shards/train-000000.idx"])
@pytest.mark.parametrize("make", [lambda path, to: path.symlink_to(to), lambda path, to: os.mkfifo(path)])
def test_training_reads_no_link_and_waits_for_no_pipe(corpus: Path, tmp_path: Path, name: str, make: Any) -> None:
    (corpus / name).rename(tmp_path / "elsewhere")
    make(corpus / name, tmp_path / "elsewhere")
    with pytest.raises(DataIntegrityError, match=r"is a link|is not a plain file"):
        SplitReader(corpus, Manifest.load(corpus), "train").read(0)


@pytest.mark.parametrize("folder", ["shards", "documents", "tokenizer"])
def test_folder_that_is_a_link_out_of_the_corpus_is_refused(
    corpus: Path, refused: Any, tmp_path: Path, folder: str
) -> None:
    (corpus / folder).rename(tmp_path / "elsewhere")
    (corpus / folder).symlink_to(tmp_path / "elsewhere")
    refused(folder, "is a link")


def test_checkpoint_takes_no_file_through_a_link_of_the_tokenizer_folder(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("private")
    (corpus / "tokenizer" / "more.json").symlink_to(tmp_path / "private")
    folder = tmp_path / "checkpoint"
    folder.mkdir()

    class Document:
        def to_bytes(self) -> bytes:
            return b"{}"

    with pytest.raises(DataIntegrityError, match=r"more\.json is a link"):
        _write_documents(folder, Document(), Document(), corpus / "tokenizer")  # type: ignore[arg-type]
    assert "private" not in "".join(path.read_text() for path in folder.rglob("*.json"))


# The documents table.

TABLE = "documents/000000.parquet"


def rewrite_table(corpus: Path, change: Callable[[pa.Table], pa.Table], *, documents: int | None = None) -> None:
    table = change(pq.read_table(corpus / TABLE))
    pq.write_table(table, corpus / TABLE)
    if documents is not None:
        forge(corpus, lambda content: content["documents"]["tables"][0].update(documents=documents))


@pytest.mark.promise("an inconsistent documents table or tokenizer is refused")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: pa.concat_tables([table, table]), "it has 12 rows, the manifest says 6"),
        (lambda table: table.slice(0, 3), "it has 3 rows, the manifest says 6"),
        (lambda table: table.drop_columns(["tokens"]), "its columns are"),
        (lambda table: table.append_column("x", pa.array([1] * len(table))), "its columns are"),
        (lambda table: table.set_column(8, "tokens", pa.array(["9"] * len(table))), "or their types are others"),
        (lambda table: with_values(table, "tokens", -5), "the row of document 0"),
        (
            lambda table: with_values(table, "tokens", (1 << 63) - 1),
            "documents, bytes or tokens than the manifest says",
        ),
        (lambda table: with_values(table, "bytes", -1), "the row of document 0"),
        (lambda table: with_values(table, "split", "../x"), "the row of document 0"),
        (lambda table: with_values(table, "text_sha256", "not hex"), "the text of document 0 has no sha256"),
        (lambda table: with_values(table, "input", "../../etc/passwd"), "the digest of its content"),
    ],
)
def test_documents_table_that_lies_is_refused(corpus: Path, refused: Any, change: Any, words: str) -> None:
    rewrite_table(corpus, change)
    if "documents, bytes" in words:  # so far only a true digest lets it come
        from megamask.data.corpus.documents import documents_digest, read_documents

        digest = documents_digest(read_documents(corpus, [(TABLE, None)]))
        forge(corpus, lambda content: content["documents"].update(digest=digest))
    refused("documents", words)


def with_values(table: pa.Table, name: str, value: Any) -> pa.Table:
    place = table.schema.get_field_index(name)
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array([value] * len(table), type=field.type))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", pickle.dumps(Evil())])
def test_documents_table_that_is_none_is_refused(corpus: Path, refused: Any, data: bytes) -> None:
    (corpus / TABLE).write_bytes(data)
    refused("documents table cannot be read")
    assert not Path("evil").exists()


# The tokenizer.


@pytest.mark.promise("an inconsistent documents table or tokenizer is refused")
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["added_tokens"][-1].update(id=1 << 40),
        lambda data: data["added_tokens"][-1].update(id=0),
        lambda data: data["model"]["vocab"].update({"aa": 1 << 62}),
        lambda data: data["model"]["vocab"].update({"aa": 5}),
        lambda data: data["model"].update(merges=[["a"] * 3]),
        lambda data: data.update(normalizer={"type": "Lowercase"}),
    ],
)
def test_tokenizer_whose_ids_cannot_be_is_refused(corpus: Path, refused: Any, change: Any) -> None:
    path = corpus / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))
    refused("tokenizer", "cannot be loaded")


@pytest.mark.parametrize("number", [1 << 24, (1 << 32) - 1])
def test_tokenizer_whose_tables_would_be_absurd_is_refused_by_itself(corpus: Path, number: int) -> None:
    data = json.loads((corpus / "tokenizer" / "tokenizer.json").read_bytes())
    data["added_tokens"][-1]["id"] = number
    names = (token["content"] for token in data["added_tokens"])
    special = SpecialTokens(**dict(zip(("eod", "pad", "mask"), names, strict=True)))
    with pytest.raises(UsageError, match=f"has the id {number}, allowed are 0 to 16777215"):
        CorpusTokenizer(json.dumps(data).encode(), special, name="tokenizer.json")


def test_tokenizer_of_other_ids_than_the_manifests_is_refused(corpus: Path, refused: Any) -> None:
    path = corpus / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_bytes())
    one, two = data["added_tokens"][-2:]
    one["id"], two["id"] = two["id"], one["id"]
    path.write_text(json.dumps(data))
    refused("tokenizer")


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "", "null"])
@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens.json"])
def test_tokenizer_file_that_is_none_is_refused(corpus: Path, refused: Any, name: str, text: str) -> None:
    (corpus / "tokenizer" / name).write_text(text)
    refused("tokenizer", "cannot be loaded")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"corpus_id": 7}', ""])
def test_provenance_that_is_none_is_refused(corpus: Path, refused: Any, text: str) -> None:
    (corpus / "provenance.json").write_text(text)
    refused("provenance.json")


def test_digest_of_the_forged_manifest_is_its_own(corpus: Path) -> None:
    """The forgeries above are not found by the corpus id: it is the digest of whatever manifest there is."""
    forge(corpus, lambda content: content["options"].update(jsonl_text_key="x"))
    assert Manifest.load(corpus).corpus_id == sha256_bytes((corpus / "manifest.json").read_bytes())
