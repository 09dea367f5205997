"""Digests of a batch, each against the definition written out byte by byte."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.content import (
    add_content,
    batch_digest,
    content_digest,
    content_hash,
    documents_checksum,
    tokens_checksum,
)


def slow_crc32c(data: bytes) -> int:
    """Castagnoli's CRC bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_slow_crc_is_castagnolis() -> None:
    assert slow_crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize(("dtype", "letter"), [("<u2", "H"), ("<u4", "I")])
def test_tokens_checksum_is_over_the_stored_little_endian_bytes(dtype: str, letter: str) -> None:
    tokens = np.array([1, 2, 65535, 0], dtype=dtype)
    assert tokens_checksum(tokens) == slow_crc32c(struct.pack(f"<4{letter}", 1, 2, 65535, 0))


def test_tokens_checksum_ignores_memory_layout() -> None:
    table = np.arange(12, dtype="<u2").reshape(3, 4)
    assert tokens_checksum(table[:, 1]) == tokens_checksum(table[:, 1].copy())


def test_documents_checksum_is_over_pairs_of_little_endian_int64() -> None:
    documents = np.array([[0, 2**40], [17, 5]], dtype=np.int64)
    assert documents_checksum(documents) == slow_crc32c(struct.pack("<4q", 0, 2**40, 17, 5))
    assert documents_checksum(documents.astype(">i8")) == documents_checksum(documents)


def test_content_hash_follows_its_definition() -> None:
    text = '[12,"' + "ab" * 32 + '",3,4000000000,7]\n'
    expected = struct.unpack("<Q", hashlib.sha256(text.encode()).digest()[:8])[0]
    assert content_hash(12, "ab" * 32, 3, 4000000000, 7) == expected


@pytest.mark.parametrize("changed", range(5))
def test_content_hash_depends_on_each_of_its_parts(changed: int) -> None:
    base = [1, "aa", 2, 3, 4]
    other = list(base)
    other[changed] = "ab" if changed == 1 else 99
    assert content_hash(*base) != content_hash(*other)  # type: ignore[arg-type]


@given(parts=st.lists(st.integers(0, 2**64 - 1), max_size=8), cut=st.integers(0, 8))
def test_content_sum_is_the_same_however_the_batch_is_shared(parts: list[int], cut: int) -> None:
    shares = add_content(add_content(*parts[:cut]), add_content(*parts[cut:]))
    assert shares == add_content(*reversed(parts)) == sum(parts) % 2**64


def test_content_digest_is_sixteen_hex_digits() -> None:
    assert content_digest(0xAB) == "00000000000000ab"
    assert content_digest(2**64 + 1) == "0000000000000001"


def test_batch_digest_is_of_the_indices_in_batch_order() -> None:
    expected = hashlib.sha256(struct.pack("<3q", 2**33, 2**33 + 1, 2**33 + 2)).hexdigest()[:16]
    assert batch_digest(2**33, 3) == expected
