from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.storage.hashing import canonical_json, hash_of, key_of, sha256_bytes, sha256_file

exact_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(st.characters(codec="utf-8"), max_size=6),
    lambda below: (
        st.lists(below, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), below, max_size=4)
    ),
    max_leaves=10,
)


@given(exact_values)
def test_canonical_json_reads_back_as_the_same_value(value):
    assert json.loads(canonical_json(value)) == value


@given(exact_values)
def test_canonical_json_is_one_line_of_utf_8_without_spaces_between_tokens(value):
    data = canonical_json(value)
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    assert (
        json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n" == data.decode()
    )


@given(
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), st.integers(), min_size=2, max_size=6),
    st.randoms(),
)
def test_canonical_json_does_not_depend_on_the_order_of_keys(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)


def test_canonical_json_is_these_bytes():
    value = {"b": [1, -2, True, None], "a": {"é": 'q"\\\n'}, "Z": []}
    assert canonical_json(value) == '{"Z":[],"a":{"é":"q\\"\\\\\\n"},"b":[1,-2,true,null]}\n'.encode()
    assert canonical_json((1, (2,))) == b"[1,[2]]\n"
    assert canonical_json(2**64) == b"18446744073709551616\n"


@pytest.mark.parametrize(
    "value", [1.0, float("nan"), {"a": [1, {"b": 0.5}]}, {1: 2}, {None: 1}, b"x", {1, 2}, object()]
)
def test_canonical_json_refuses_what_has_no_exact_form(value):
    with pytest.raises(TypeError, match="canonical JSON"):
        canonical_json(value)


def test_hash_is_sha256_of_the_canonical_array():
    assert hash_of(1, "a", [2]) == hashlib.sha256(b'[1,"a",[2]]\n').hexdigest()
    assert hash_of() == hashlib.sha256(b"[]\n").hexdigest()


@given(st.lists(exact_values, max_size=3), st.lists(exact_values, max_size=3))
def test_hash_tells_different_arguments_apart(one, other):
    assert (hash_of(*one) == hash_of(*other)) == (canonical_json(one) == canonical_json(other))


def test_hash_of_one_string_is_not_the_hash_of_its_pieces():
    assert len({hash_of("ab"), hash_of("a", "b"), hash_of(["a", "b"]), hash_of("a,b"), sha256_bytes(b"ab")}) == 5


def test_key_is_the_first_eight_bytes_little_endian():
    assert key_of("01000000" + "02000000" + "ff" * 24) == (1, 2)
    assert key_of("78563412efcdab89" + "00" * 24) == (0x12345678, 0x89ABCDEF)


@given(st.binary(min_size=32, max_size=32))
def test_key_words_are_the_halves_of_one_integer(digest):
    low, high = key_of(digest.hex())
    assert low + (high << 32) == int.from_bytes(digest[:8], "little")


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_file_digest_is_that_of_its_bytes_whatever_its_size(tmp_path, size):
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    path = tmp_path / "file"
    path.write_bytes(data)
    assert sha256_file(path) == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
