from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megamask.data.corpus import documents as module
from megamask.data.corpus.documents import (
    DocumentList,
    DocumentRecord,
    documents_digest,
    read_documents,
    write_documents,
)
from megamask.errors import DataIntegrityError
from megamask.storage.hashing import canonical_json

INPUTS = [("a.txt", "aa" * 32), ("b.jsonl", "bb" * 32)]


def make_list() -> DocumentList:
    documents = DocumentList()
    for place, offset, text in ((0, 0, "ü\n"), (1, 0, ""), (1, 13, "three")):
        documents.append(input_index=place, offset=offset, num_bytes=len(text) + 12, text=text.encode())
        documents.tokens.append(len(text) + 1)
    documents.is_validation = np.array([False, True, False])
    return documents


def records() -> list[DocumentRecord]:
    return list(make_list().records(INPUTS))


def write(folder: Path) -> tuple[str, list[tuple[str, int]]]:
    (folder / "documents").mkdir(parents=True)
    return write_documents(folder, records())


@pytest.mark.promise("a document's number leads back to its bytes")
def test_records_lead_back_to_the_bytes_of_each_document() -> None:
    last = records()[2]
    assert last == DocumentRecord(
        number=2,
        input="b.jsonl",
        input_sha256="bb" * 32,
        offset=13,
        bytes=17,
        text_bytes=5,
        text_sha256=hashlib.sha256(b"three").hexdigest(),
        split="train",
        tokens=6,
    )
    assert [record.split for record in records()] == ["train", "validation", "train"]
    assert records()[0].text_bytes == 3


def test_table_reads_back_and_its_digest_is_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_TABLE", 2)
    digest, tables = write(tmp_path)
    assert tables == [("documents/000000.parquet", 2), ("documents/000001.parquet", 1)]
    again = list(read_documents(tmp_path, tables))
    assert again == records()
    assert digest == documents_digest(again)
    lines = b"".join(canonical_json(list(vars(record).values())) for record in records())
    assert digest == hashlib.sha256(lines).hexdigest()


def test_table_bytes_are_the_same_when_written_again(tmp_path: Path) -> None:
    _, tables = write(tmp_path / "one")
    write(tmp_path / "two")
    for name, _ in tables:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_digest_changes_with_every_column() -> None:
    good = documents_digest(records())
    for column in vars(records()[0]):
        old = getattr(records()[0], column)
        changed = replace(records()[0], **{column: old + 1 if isinstance(old, int) else old + "x"})
        assert documents_digest([changed, *records()[1:]]) != good, column


def test_columns_are_readable_by_other_programs(tmp_path: Path) -> None:
    _, tables = write(tmp_path)
    table = pq.read_table(tmp_path / tables[0][0])
    assert table.column_names == [
        *("number", "input", "input_sha256", "offset", "bytes", "text_bytes", "text_sha256", "split", "tokens")
    ]
    assert table["text_bytes"].to_pylist() == [3, 0, 5]


def test_missing_or_truncated_table_is_a_data_error(tmp_path: Path) -> None:
    _, [(name, _)] = write(tmp_path)
    data = (tmp_path / name).read_bytes()
    for content in (None, b"", data[: len(data) // 2]):
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataIntegrityError, match=name):
            list(read_documents(tmp_path, [(name, None)]))
        (tmp_path / name).touch()


def test_flipped_byte_of_a_table_is_refused_or_shows_in_the_digest(tmp_path: Path) -> None:
    digest, [(name, _)] = write(tmp_path)
    data = (tmp_path / name).read_bytes()
    caught = 0
    for place in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        (tmp_path / name).write_bytes(flipped)
        try:
            caught += documents_digest(read_documents(tmp_path, [(name, None)])) != digest
        except DataIntegrityError:
            caught += 1
    assert caught > len(data) // 7 // 3  # the rest are statistics and the writer's name: the same rows are read


def test_foreign_parquet_file_is_a_data_error(tmp_path: Path) -> None:
    pq.write_table(pq.read_table(tmp_path / write(tmp_path)[1][0][0]).select(["number"]), tmp_path / "x.parquet")
    with pytest.raises(DataIntegrityError, match="its columns are"):
        list(read_documents(tmp_path, [("x.parquet", None)]))
