"""Versioned JSON documents: one reader, one writer and one policy for versions, digests and damage.

A document is a JSON object with `format`, `version` and, for some kinds, `self_sha256`, the digest of everything
else in it. The policy is the same for every kind:

- another format, no valid version, a name that occurs twice or a digest that does not match is damage: the error class
  of the kind is raised. The digest is checked before the version, so that a flipped digit is never taken for a version;
- a version that this program does not know is a UsageError that names both versions: use another program.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megamask.errors import MegamaskError, UsageError
from megamask.storage.durable import read_errors
from megamask.storage.hashing import canonical_json, hash_of, sha256_bytes
from megamask.storage.plain_files import NotPlainError, read_plain

DIGEST_KEY = "self_sha256"


class DuplicateKeyError(ValueError):
    """A name that occurs twice in one JSON object: readers disagree about which value holds."""


class OwnDigest(Enum):
    """Presence of a document's digest of itself."""

    NONE = "none"
    OPTIONAL = "optional"  # checked where present: documents of an older program have none
    REQUIRED = "required"


@dataclass(frozen=True, kw_only=True)
class DocumentKind:
    """A kind of versioned document.

    Args:
        format: value of the key `format`.
        version: written by this program, and the newest that it reads.
        oldest_version: the oldest that it reads.
        is_canonical: bytes are canonical JSON and nothing else is accepted; otherwise indented, for people, and other
            white space is accepted where the document has no digest of its own.
        own_digest: whether `self_sha256` is written and checked. It is H of the document without that key for a
            canonical kind, the sha256 of the file without that key for an indented one.
        damage: error class of a damaged document; it decides the exit code.
        damage_hint: how to continue after damage.
        outcome: sentence that closes an error: what did not happen.
        max_bytes: a larger file is refused unread.
    """

    format: str
    version: int
    oldest_version: int = 1
    is_canonical: bool = True
    own_digest: OwnDigest = OwnDigest.NONE
    damage: type[MegamaskError]
    damage_hint: str | None = None
    outcome: str = "Nothing was loaded from it."
    max_bytes: int = 1 << 24

    def damaged(self, path: Path, problem: str) -> MegamaskError:
        """Return the error for a damaged document; `problem` continues the path, e.g. "is not a JSON object"."""
        return self.damage(f"{path} {problem}. {self.outcome}", hint=self.damage_hint)


def encode_document(kind: DocumentKind, fields: Mapping[str, Any]) -> bytes:
    """Return the bytes of a document of the newest version.

    Args:
        fields: everything but `format`, `version` and the document's own digest.

    Raises:
        TypeError: a canonical document contains a float. ValueError: a number is not finite.
    """
    document = {"format": kind.format, "version": kind.version, **fields}
    if kind.own_digest is not OwnDigest.NONE:
        document[DIGEST_KEY] = _digest(kind, document)
    return _to_bytes(kind, document)


def read_document(kind: DocumentKind, path: Path) -> dict[str, Any]:
    """Return the content of a document on disk, without its own digest.

    Raises: as `read_document_bytes` and `decode_document`.
    """
    return decode_document(kind, read_document_bytes(kind, path), path)


def read_document_bytes(kind: DocumentKind, path: Path) -> bytes:
    """Return the bytes of a document on disk.

    Raises:
        MegamaskError: of class `kind.damage`: missing, not a plain file, or too large.
        StorageError: the storage does not let it be read, which is not damage.
    """
    try:
        with read_errors(path):
            return read_plain(path, kind.max_bytes)
    except NotPlainError as error:
        raise kind.damaged(path, str(error).removeprefix(f"{path} ")) from error
    except OSError as error:
        raise kind.damaged(path, f"cannot be read: {error.strerror}") from error


def decode_document(kind: DocumentKind, data: bytes, path: Path) -> dict[str, Any]:
    """Return the content of a document, without its own digest; `format` and `version` stay in it.

    Args:
        path: of the file that `data` was read from, for errors.

    Raises:
        MegamaskError: of class `kind.damage`: not a document of this kind, or its digest does not match.
        UsageError: its version is unknown.
    """
    document = _parse(kind, data, path)
    _check_digest(kind, document, path)
    if document.get("format") != kind.format:
        raise kind.damaged(path, f"has format {document.get('format')!r}, not {kind.format!r}")
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise kind.damaged(path, f"has version {version!r}")
    if not kind.oldest_version <= version <= kind.version:
        known = f"up to {kind.version}" if version > kind.version else f"from {kind.oldest_version} on"
        raise UsageError(
            f"{path} has format version {version}, this megamask reads {kind.format} {known}. Nothing was loaded.",
            hint="use the megamask that wrote it, or a newer one",
        )
    return document


def parse_json(data: bytes | str) -> Any:
    """Return a JSON value; unlike `json.loads`, refuse duplicate names and numbers that JSON does not have (NaN).

    Raises:
        DuplicateKeyError: a name occurs twice in one object.
        ValueError: anything else that is not JSON in UTF-8.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_object_of, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise DuplicateKeyError(f"the name {name[:80]!r} occurs twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _parse(kind: DocumentKind, data: bytes, path: Path) -> dict[str, Any]:
    form = "canonical JSON" if kind.is_canonical else "indented JSON"
    try:
        document = parse_json(data)
        if not isinstance(document, dict):
            raise kind.damaged(path, "is not a JSON object")
        has_one_form = kind.is_canonical or (kind.own_digest is not OwnDigest.NONE and DIGEST_KEY in document)
        is_in_form = not has_one_form or _to_bytes(kind, document) == data
    except (ValueError, TypeError) as error:  # TypeError: a float in a canonical document
        raise kind.damaged(path, f"is not {form} ({error})") from error
    if not is_in_form:
        raise kind.damaged(path, f"is not {form}, byte for byte")
    return document


def _check_digest(kind: DocumentKind, document: dict[str, Any], path: Path) -> None:
    """Remove the document's own digest from it, after comparing."""
    if kind.own_digest is OwnDigest.NONE or (kind.own_digest is OwnDigest.OPTIONAL and DIGEST_KEY not in document):
        return
    stated = document.pop(DIGEST_KEY, None)
    if stated != _digest(kind, document):
        raise kind.damaged(path, "does not have the sha256 that it states")


def _digest(kind: DocumentKind, document: Mapping[str, Any]) -> str:
    return hash_of(document) if kind.is_canonical else sha256_bytes(_to_bytes(kind, document))


def _to_bytes(kind: DocumentKind, document: Mapping[str, Any]) -> bytes:
    if kind.is_canonical:
        return canonical_json(document)
    return (json.dumps(document, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()
