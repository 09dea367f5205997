"""Hostile manifests, links, documents tables and tokenizers of a corpus: each ends with 64, and nothing is unpacked."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megamask.checkpoint.saver import _write_documents
from megamask.data.manifest import Manifest
from megamask.data.reader import SplitReader
from megamask.data.tokenizer import CorpusTokenizer, SpecialTokens
from megamask.errors import DataIntegrityError, UsageError
from megamask.storage.hashing import sha256_bytes
from support.hostile_corpus import SHARD, Evil, forge

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
        lambda c: c.pop("packer"),
        lambda c: c["packer"].update(version=2),
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
        (lambda table: pa.concat_tables([table, table]), "it has 12 rows, the manifest has 6"),
        (lambda table: table.slice(0, 3), "it has 3 rows, the manifest has 6"),
        (lambda table: table.drop_columns(["tokens"]), "its columns are"),
        (lambda table: table.append_column("x", pa.array([1] * len(table))), "its columns are"),
        (lambda table: table.set_column(8, "tokens", pa.array(["9"] * len(table))), "or their types are others"),
        (lambda table: with_values(table, "tokens", -5), "the row of document 0"),
        (
            lambda table: with_values(table, "tokens", (1 << 63) - 1),
            "documents, bytes or tokens than the manifest has",
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
    """The forgeries above are not found by the corpus id: it is the digest of the manifest there is."""
    forge(corpus, lambda content: content["options"].update(jsonl_text_key="x"))
    assert Manifest.load(corpus).corpus_id == sha256_bytes((corpus / "manifest.json").read_bytes())
