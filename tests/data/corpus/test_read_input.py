from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megamask.data.corpus.inputs import InputEntry, InputFile
from megamask.data.corpus.read_input import InputReader
from megamask.errors import DataIntegrityError, ExitCode, UsageError

TEXTS = ["one", "tüwo\n", "", "日本 \u2028 three"]


def reader_of(path: Path, key: str = "text", **entry: str) -> InputReader:
    return InputReader(InputFile(name=path.name, path=path, entry=InputEntry(path=str(path), **entry)), key)


def read(path: Path, key: str = "text", **entry: str) -> list[str]:
    return [document.text for document in reader_of(path, key, **entry).documents()]


def tar_of(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_text_file_is_decoded_exactly(text: str, tmp_path: Path) -> None:
    assume(text.count("\0") * 8 <= len(text.encode()))  # more of them are taken for UTF-16
    path = tmp_path / "exact.txt"
    path.write_bytes(text.encode())
    assert read(path) == [text]


def test_newlines_and_byte_order_mark_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read(path) == ["\ufeffa\r\nb\rc\n"]


def test_undecodable_text_is_refused_with_file_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"abc\xe9def")
    with pytest.raises(DataIntegrityError, match=r"latin\.txt: byte 3 \(0xe9\)") as caught:
        read(path)
    assert caught.value.exit_code == ExitCode.DATA_INTEGRITY


def test_jsonl_gives_a_document_a_line_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "one"}\r\n\n  \n{"x": 1, "body": "t\\u00fcwo\\n"}')
    reader = reader_of(path, "body")
    documents = list(reader.documents())
    assert [document.text for document in documents] == ["one", "tüwo\n"]
    data = path.read_bytes()
    assert [json.loads(data[d.offset : d.offset + d.bytes])["body"] for d in documents] == ["one", "tüwo\n"]
    assert [(d.offset, d.bytes) for d in documents] == [(0, 16), (21, len(data) - 21)]
    assert reader.num_bytes == len(data)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "not a JSON value"),
        (b'"text"', "not a JSON object"),
        (b'{"body": "x"}', "no key 'text'"),
        (b'{"text": 5}', "is int, not a string"),
        (b'{"text": null}', "not a string"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "first", "text": "second"}', "the key 'text' twice"),
        (b'{"text": "x", "meta": {"a": 1, "a": 2}}', "the key 'a' twice"),
        ('{"text": "wide"}'.encode("utf-16-le"), "probably UTF-16"),
        (b"[" * 100_000, "not a JSON value"),
        (b"1" * 10_000, "not a JSON"),
    ],
)
def test_jsonl_line_is_refused_with_file_and_line(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataIntegrityError) as caught:
        read(path)
    assert "bad.jsonl:2" in caught.value.message
    assert reason in caught.value.message


def test_input_is_refused_when_it_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "gone.txt")


@pytest.mark.promise("UTF-16, with or without a mark, is refused instead of becoming text full of zero bytes")
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le"])
def test_utf16_is_refused_with_and_without_a_mark(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "wide.txt"
    path.write_bytes("A text in another encoding, Grüße.\n".encode(encoding))
    with pytest.raises(DataIntegrityError, match=r"wide\.txt.*UTF-16"):
        read(path)


@pytest.mark.promise("text comes out of .ndjson, .gz and .zst, JSON arrays, Parquet and WebDataset tars exactly")
@pytest.mark.parametrize("kind", ["ndjson", "jsonl.gz", "ndjson.zst", "json", "parquet", "tar"])
def test_every_format_gives_the_same_texts_and_the_digest_of_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
    match kind.rpartition(".")[2]:
        case "ndjson":
            path.write_bytes(lines)
        case "gz":
            path.write_bytes(gzip.compress(lines))
        case "zst":
            path.write_bytes(pa.compress(lines, "zstd", asbytes=True))
        case "json":
            path.write_text(json.dumps([{"text": text} for text in TEXTS]))
        case "parquet":
            pq.write_table(pa.table({"n": [1, 2, 3, 4], "text": TEXTS}), path)
        case "tar":
            path.write_bytes(tar_of({f"{n:03d}.{s}": t.encode() for n, t in enumerate(TEXTS) for s in ("cls", "txt")}))
    reader = reader_of(path, **({"format": "json"} if kind == "json" else {}))
    documents = list(reader.documents())
    assert [document.text for document in documents] == TEXTS
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reader.num_bytes == path.stat().st_size
    if kind == "tar":
        data = path.read_bytes()
        assert [data[d.offset : d.offset + d.bytes].decode() for d in documents] == TEXTS


def test_json_joins_a_list_of_strings_and_takes_a_single_object(tmp_path: Path) -> None:
    path = tmp_path / "poem.json"
    path.write_text(json.dumps({"paragraphs": ["first", "second"]}))
    assert read(path, format="json", text_key="paragraphs") == ["first\nsecond"]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "tar"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_container_is_refused_by_name(kind: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    lines = "".join(json.dumps({"text": f"{n * 7919:x}" * 50}) + "\n" for n in range(300)).encode()
    match kind.rpartition(".")[2]:
        case "gz":
            data, place = gzip.compress(lines), 4
        case "zst":
            data, place = pa.compress(lines, "zstd", asbytes=True), 0
        case "parquet":
            pq.write_table(pa.table({"text": ["x" * 100] * 300}), path)
            data, place = path.read_bytes(), 0
            place = len(data) - 5  # the length of the footer
        case _:
            data, place = tar_of({f"{n:03d}.txt": b"x" * 600 for n in range(50)}), 20 * 1536  # a name in the middle
    changed = (
        data[: len(data) // 2] if damage == "cut" else data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :]
    )
    if kind == "jsonl.gz" and damage == "flip":
        changed = data[:-6] + bytes([data[-6] ^ 1]) + data[-5:]  # the checksum
    path.write_bytes(changed)
    with pytest.raises(DataIntegrityError, match=r"a\."):
        read(path)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.cls": b"1"}, r"sample a has no member \.txt"),
        ({"README": b"1"}, "has no suffix"),
        ({"a.txt": b"\xff"}, "sample a: byte 0"),
    ],
)
def test_tar_sample_without_text_is_refused(members: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(members))
    with pytest.raises(DataIntegrityError, match=reason):
        read(path)


def test_parquet_without_the_column_or_with_a_null_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", None]}), path)
    with pytest.raises(DataIntegrityError, match="row 1: the value of 'text' is NoneType"):
        read(path)
    with pytest.raises(DataIntegrityError, match="no column 'body'"):
        read(path, text_key="body")
