"""Canonical JSON and the digests made of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 20


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: UTF-8, sorted keys, no spaces, one final newline.

    Only integers, strings, booleans, null, lists and string-keyed objects have a canonical form.

    Raises:
        TypeError: for a float or any other type; floats print differently across languages.
    """
    _refuse_inexact(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def _refuse_inexact(value: Any) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, list | tuple):
        for item in value:
            _refuse_inexact(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"canonical JSON keys are strings, not {type(key).__name__}: {key!r}")
            _refuse_inexact(item)
    else:
        raise TypeError(f"canonical JSON holds integers and strings only, not {type(value).__name__}: {value!r}")


def hash_of(*values: Any) -> str:
    """H(a, b, ...): sha256 of the canonical JSON array [a, b, ...], as lower-case hex."""
    return hashlib.sha256(canonical_json(list(values))).hexdigest()


def key_of(digest: str) -> tuple[int, int]:
    """The Philox key of a digest: its first 8 bytes as little-endian v, split into (v mod 2^32, v div 2^32)."""
    value = int.from_bytes(bytes.fromhex(digest)[:8], "little")
    return value & 0xFFFFFFFF, value >> 32


def sha256_bytes(data: bytes) -> str:
    """Lower-case hex sha256 of a byte string."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Lower-case hex sha256 of a file's content, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
