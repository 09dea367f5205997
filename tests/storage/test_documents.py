"""Versioned documents: what is written is read, and every other byte string is refused the same way everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.errors import CheckpointIntegrityError, DataIntegrityError, MegamaskError, UsageError
from megamask.storage.documents import (
    DIGEST_KEY,
    DocumentKind,
    DuplicateKeyError,
    OwnDigest,
    decode_document,
    encode_document,
    parse_json,
    read_document,
)
from megamask.storage.hashing import canonical_json, hash_of, sha256_bytes

PATH = Path("folder/thing.json")
CANONICAL = DocumentKind(
    format="thing", version=3, oldest_version=2, own_digest=OwnDigest.REQUIRED, damage=CheckpointIntegrityError
)
INDENTED = DocumentKind(
    format="thing", version=3, is_canonical=False, own_digest=OwnDigest.OPTIONAL, damage=DataIntegrityError
)
PLAIN = DocumentKind(format="thing", version=1, is_canonical=False, damage=CheckpointIntegrityError)
KINDS = [CANONICAL, INDENTED, PLAIN]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", KINDS)
@given(value=values)
def test_document_is_read_as_it_was_written(kind: DocumentKind, value: object) -> None:
    data = encode_document(kind, {"value": value})
    assert decode_document(kind, data, PATH) == {"format": "thing", "version": kind.version, "value": value}


@pytest.mark.parametrize("kind", [CANONICAL, INDENTED])
@given(place=st.integers(min_value=0), bit=st.integers(min_value=0, max_value=7))
def test_no_flipped_bit_is_accepted_in_a_document_with_a_digest(kind: DocumentKind, place: int, bit: int) -> None:
    data = bytearray(encode_document(kind, {"name": "value", "count": 12}))
    data[place % len(data)] ^= 1 << bit
    if DIGEST_KEY.encode() not in data and kind is INDENTED:
        return  # an older program's document, which has no digest: only its reader's own checks remain
    with pytest.raises(kind.damage):
        decode_document(kind, bytes(data), PATH)


def test_own_digest_has_the_published_form() -> None:
    canonical = json.loads(encode_document(CANONICAL, {"a": 1}))
    stated = canonical.pop(DIGEST_KEY)
    assert stated == hash_of({"a": 1, "format": "thing", "version": 3})
    assert sorted(canonical) == ["a", "format", "version"]
    indented = encode_document(INDENTED, {"a": 1})
    line = f'  "{DIGEST_KEY}": "{json.loads(indented)[DIGEST_KEY]}",\n'.encode()
    assert sha256_bytes(indented.replace(line, b"")) == json.loads(indented)[DIGEST_KEY]


@pytest.mark.promise("a document of an unknown version is refused with both versions, not as damage")
@pytest.mark.parametrize(("version", "known"), [(4, "up to 3"), (1, "from 2 on")])
def test_unknown_version_is_refused_and_is_not_damage(version: int, known: str) -> None:
    document = {"format": "thing", "version": version}
    data = canonical_json({**document, DIGEST_KEY: hash_of(document)})
    with pytest.raises(UsageError, match=f"has format version {version}, this megamask reads thing {known}"):
        decode_document(CANONICAL, data, PATH)


@pytest.mark.parametrize("version", [0, -1, True, "3", None, 2.0])
def test_version_that_is_not_a_count_is_damage(version: object) -> None:
    with pytest.raises(CheckpointIntegrityError, match="has version"):
        decode_document(PLAIN, json.dumps({"format": "thing", "version": version}).encode(), PATH)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"format":"other","version":1}', "has format 'other', not 'thing'"),
        (b'{"version":1}', "has format None"),
        (b'{"format":"thing","version":1,"a":{"b":1,"b":2}}', "the name 'b' occurs twice"),
        (b'{"format":"thing","format":"thing","version":1}', "the name 'format' occurs twice"),
        (b'{"format":"thing","version":1,"a":NaN}', "NaN is not a number of JSON"),
        (b"[" * 100_000, "is not indented JSON"),
        (b"[]", "is not a JSON object"),
        (b"\xff", "is not indented JSON"),
        (b"", "is not indented JSON"),
    ],
)
def test_what_is_not_such_a_document_is_damage(data: bytes, problem: str) -> None:
    with pytest.raises(CheckpointIntegrityError, match=problem) as caught:
        decode_document(PLAIN, data, PATH)
    assert str(caught.value).startswith(str(PATH))


@pytest.mark.parametrize("data", [b'{"format":"thing","version":1.5}\n', b'{ "format":"thing","version":1}\n'])
def test_canonical_kind_accepts_no_other_form(data: bytes) -> None:
    with pytest.raises(CheckpointIntegrityError, match="is not canonical JSON"):
        decode_document(CANONICAL, data, PATH)


def test_indented_document_with_a_digest_accepts_no_other_white_space() -> None:
    data = encode_document(INDENTED, {"a": 1})
    with pytest.raises(DataIntegrityError, match="is not indented JSON, byte for byte"):
        decode_document(INDENTED, data + b"\n", PATH)
    without = json.dumps({"format": "thing", "version": 1, "a": 1}).encode()
    assert decode_document(INDENTED, without, PATH)["a"] == 1


def test_required_digest_may_not_be_left_out() -> None:
    with pytest.raises(CheckpointIntegrityError, match="does not have the sha256 that it states"):
        decode_document(CANONICAL, canonical_json({"format": "thing", "version": 3}), PATH)


def test_file_is_read_only_if_plain_and_of_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "thing.json"
    path.write_bytes(encode_document(PLAIN, {"a": 1}))
    assert read_document(PLAIN, path)["a"] == 1
    (tmp_path / "link").symlink_to(path)
    small = DocumentKind(format="thing", version=1, damage=CheckpointIntegrityError, max_bytes=8)
    found: list[MegamaskError] = []
    for kind, place in ((PLAIN, tmp_path / "link"), (PLAIN, tmp_path), (PLAIN, tmp_path / "none"), (small, path)):
        with pytest.raises(CheckpointIntegrityError) as caught:
            read_document(kind, place)
        found.append(caught.value)
    assert [str(each).partition(" ")[2].split(".")[0] for each in found] == [
        "is a link",
        "is not a plain file",
        "cannot be read: No such file or directory",
        f"has {path.stat().st_size} bytes, more than the 8 that such a file can have",
    ]


def test_parse_json_refuses_duplicates_at_any_depth() -> None:
    assert parse_json('{"a": [{"b": 1}, {"b": 2}]}') == {"a": [{"b": 1}, {"b": 2}]}
    with pytest.raises(DuplicateKeyError):
        parse_json('[{"a": {"b": 1, "b": 1}}]')
