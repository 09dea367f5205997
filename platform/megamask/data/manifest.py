"""Manifest of a corpus: its content, by digest, and nothing about where or when it was made.

`manifest.json` is canonical JSON; the sha256 of its bytes is the corpus id. Its keys:

    format, version    "megamask-corpus", 1
    dtype              "uint16" or "uint32", stored little-endian
    sequence_length    tokens of a row
    tokenizer          {digest, vocab_size, eod_token_id, pad_token_id, mask_token_id}
    packer             {name, version}
    options            what was asked: see `prepare.py`; validation_fraction is a decimal string
    inputs             [{name, sha256, bytes, documents}] in document order
    documents          {digest, tables: [{name, documents}]}: digest of the table's content, see `documents.py`
    splits             {name: {documents, text_bytes, tokens, sequences, padding, blocks, shards: [...]}}
                       tokens are eligible ones: end-of-document included, padding not; sequences are rows
      shards           [{name, sha256, bytes, blocks, rows, index_sha256, tar_index_sha256}], rows and blocks are
                       counted through them in this order; names are relative to the corpus folder
    packing            of best-fit alone, {split: {longest_document, cut_documents, pieces, lengths}}; see `best_fit.py`
    unused_ids         ascending ids that no document uses; always holds the mask id and the pad id
    totals             {documents, text_bytes, tokens, sequences, shards} over the splits
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megamask.data.index import index_name, tar_index_name
from megamask.data.manifest_values import is_count, odd_value
from megamask.errors import DataIntegrityError, UsageError
from megamask.storage.documents import DocumentKind, decode_document, read_document, read_document_bytes
from megamask.storage.file_marks import settled_mark
from megamask.storage.hashing import canonical_json, hash_of, sha256_bytes

MANIFEST_NAME = "manifest.json"
PROVENANCE_NAME = "provenance.json"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPLITS = ("train", "validation")

MANIFEST = DocumentKind(
    format="megamask-corpus",
    version=1,
    damage=DataIntegrityError,
    damage_hint="restore the file or prepare the corpus again",
    outcome="No sample of the corpus was used.",
    max_bytes=1 << 31,
)
PROVENANCE = DocumentKind(
    format="megamask-corpus-provenance",
    version=1,
    damage=DataIntegrityError,
    damage_hint="restore the file or prepare the corpus again",
    outcome="No sample of the corpus was used.",
    max_bytes=1 << 31,
)


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard as the manifest names it; bytes and sha256 are of the tar file."""

    name: str
    sha256: str
    bytes: int
    blocks: int
    rows: int
    index_sha256: str
    tar_index_sha256: str

    @property
    def index_name(self) -> str:
        """Relative name of the shard's .idx."""
        return index_name(self.name)

    @property
    def tar_index_name(self) -> str:
        """Relative name of Energon's index of the shard."""
        return tar_index_name(self.name)


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """Counts and shards of one split; num_tokens are eligible tokens, text_bytes the UTF-8 bytes of its documents."""

    num_documents: int
    text_bytes: int
    num_tokens: int
    num_rows: int
    num_padding: int
    num_blocks: int
    shards: tuple[ShardEntry, ...]

    def to_json(self) -> dict[str, Any]:
        """The split's object in the manifest."""
        return {
            "documents": self.num_documents,
            "text_bytes": self.text_bytes,
            "tokens": self.num_tokens,
            "sequences": self.num_rows,
            "padding": self.num_padding,
            "blocks": self.num_blocks,
            "shards": [vars(shard) for shard in self.shards],
        }


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A corpus' manifest, checked.

    Args:
        corpus_id: sha256 of the manifest's bytes.
        content: the JSON object as it is written.
        splits: "train" and, if any document is held out, "validation".
    """

    corpus_id: str
    content: Mapping[str, Any]
    splits: Mapping[str, SplitEntry]

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        return int(self.content["sequence_length"])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored type of a token: little-endian uint16 or uint32."""
        return np.dtype({"uint16": "<u2", "uint32": "<u4"}[self.content["dtype"]])

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer, special tokens included."""
        return int(self.content["tokenizer"]["vocab_size"])

    @property
    def eod_token_id(self) -> int:
        """Id that ends each document."""
        return int(self.content["tokenizer"]["eod_token_id"])

    @property
    def pad_token_id(self) -> int:
        """Id that fills the last row of a split; the only id that is not eligible."""
        return int(self.content["tokenizer"]["pad_token_id"])

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token; no document holds it."""
        return int(self.content["tokenizer"]["mask_token_id"])

    @property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer folder."""
        return str(self.content["tokenizer"]["digest"])

    @property
    def documents_digest(self) -> str:
        """Digest of the documents table's content."""
        return str(self.content["documents"]["digest"])

    def source_digest(self, split: str) -> str:
        """H(hex sha256 of the split's shards in name order): what the order of its rows is keyed by."""
        if split not in self._source_digests:
            self._source_digests[split] = hash_of(*[shard.sha256 for shard in self.split(split).shards])
        return self._source_digests[split]

    @cached_property
    def _source_digests(self) -> dict[str, str]:
        return {}

    def split(self, name: str) -> SplitEntry:
        """The split of that name.

        Raises:
            UsageError: the corpus has no such split.
        """
        if name not in self.splits:
            raise UsageError(
                f"the corpus has no split {name!r}; it has: {', '.join(sorted(self.splits))}. Nothing was read.",
                hint="prepare it with corpus.validation_fraction above 0 to hold documents out for validation",
            )
        return self.splits[name]

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> Manifest:
        """The manifest of a JSON object that this process made or checked."""
        return cls(
            corpus_id=sha256_bytes(canonical_json(content)),
            content=content,
            splits={name: _split_of(value) for name, value in content["splits"].items()},
        )

    @classmethod
    def load(cls, corpus_dir: str | Path) -> Manifest:
        """Read and check `manifest.json` of a corpus folder.

        Raises:
            UsageError: the folder is not a corpus, or was made by a newer version.
            DataIntegrityError: the manifest is damaged or contradicts itself.
        """
        path = Path(corpus_dir) / MANIFEST_NAME
        if not os.path.lexists(path):
            raise UsageError(
                f"{corpus_dir} is not a prepared corpus: it has no {MANIFEST_NAME}. Nothing was read.",
                hint="make one with: megamask prepare CONFIG corpus.output_dir=FOLDER",
            )
        data = read_document_bytes(MANIFEST, path)
        try:
            content = decode_document(MANIFEST, data, path)
        except UsageError:
            _refuse_other_than_prepared(path, sha256_bytes(data))  # damage may look like another version
            raise
        try:
            manifest = cls.from_content(content)
            problem = odd_value(content) or _contradiction(manifest)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            problem = f"a field is missing or has the wrong type ({error!r})"
            raise MANIFEST.damaged(path, f"contradicts itself: {problem}") from error
        if problem is not None:
            raise MANIFEST.damaged(path, f"contradicts itself: {problem}")
        return manifest


def open_corpus(folder: Path, key: str) -> Manifest:
    """The manifest of a corpus folder that a setting or an argument names.

    Args:
        folder: the corpus.
        key: what names it in an error, as "data.corpora.main".

    Raises:
        UsageError: no such folder exists, or it holds no manifest.json.
        DataIntegrityError: the manifest is damaged, or is not the one that provenance.json names.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{key} is {folder}, which is not a folder. No row was read.",
            hint=f"run `megamask prepare` first, or correct {key}",
        )
    if not (folder / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{key} is {folder}, which is not a prepared corpus: it has no {MANIFEST_NAME}. No row was read.",
            hint=f"run `megamask prepare` again if it was interrupted, or correct {key}",
        )
    marks = [settled_mark(folder / name) for name in (MANIFEST_NAME, PROVENANCE_NAME)]
    return _load_unchanged(folder, tuple(marks)) if all(marks) else _load_prepared(folder)


def _load_prepared(folder: Path) -> Manifest:
    manifest = Manifest.load(folder)
    _refuse_other_than_prepared(folder / MANIFEST_NAME, manifest.corpus_id)
    return manifest


@lru_cache(maxsize=4)
def _load_unchanged(folder: Path, marks: tuple[tuple[int, ...] | None, ...]) -> Manifest:
    """The manifest of a folder whose files have these marks: parsing a large one takes a third of a second."""
    del marks
    return _load_prepared(folder)


def provenance_problem(path: Path, corpus_id: str) -> str | None:
    """Return the fault of a corpus' provenance.json, or None; a corpus that lost it still has all its content.

    Raises:
        StorageError: the storage refuses to read it.
    """
    if not os.path.lexists(path):
        return None
    try:
        named = read_document(PROVENANCE, path).get("corpus_id")
    except (DataIntegrityError, UsageError) as error:
        return error.message.removesuffix(f". {PROVENANCE.outcome}")
    return None if named == corpus_id else f"{path} is about corpus {named}, the manifest's is {corpus_id}"


def _refuse_other_than_prepared(path: Path, corpus_id: str) -> None:
    """Raise unless provenance.json names this manifest: a flipped byte may leave one that is consistent."""
    if problem := provenance_problem(path.with_name(PROVENANCE_NAME), corpus_id):
        raise DataIntegrityError(
            f"{path} is not the manifest that was prepared: {problem}. No sample of the corpus was used.",
            hint="restore the two files, or prepare the corpus again",
        )


def _split_of(value: Mapping[str, Any]) -> SplitEntry:
    return SplitEntry(
        num_documents=value["documents"],
        text_bytes=value["text_bytes"],
        num_tokens=value["tokens"],
        num_rows=value["sequences"],
        num_padding=value["padding"],
        num_blocks=value["blocks"],
        shards=tuple(ShardEntry(**shard) for shard in value["shards"]),
    )


def _are_counts(split: SplitEntry) -> bool:
    counts: list[Any] = [value for name, value in vars(split).items() if name != "shards"]
    for shard in split.shards:
        counts += [shard.bytes, shard.blocks, shard.rows]
    return all(map(is_count, counts))


def _contradiction(manifest: Manifest) -> str | None:
    """Return the first contradiction in the manifest, or None."""
    content = manifest.content
    ids = [manifest.eod_token_id, manifest.pad_token_id, manifest.mask_token_id]
    if content["dtype"] not in ("uint16", "uint32") or manifest.vocab_size > 1 << (8 * manifest.dtype.itemsize):
        return f"dtype {content['dtype']} does not hold a vocabulary of {manifest.vocab_size}"
    if len(set(ids)) != len(ids) or not all(0 <= token < manifest.vocab_size for token in ids):
        return f"eod, pad and mask ids {ids} are not three ids of the vocabulary"
    if manifest.sequence_length < 1:
        return f"sequence_length is {manifest.sequence_length}"
    if "train" not in manifest.splits or not set(manifest.splits) <= set(_SPLITS):
        return f"the splits are {sorted(manifest.splits)}, allowed are train and validation"
    digests = [manifest.tokenizer_digest, manifest.documents_digest]
    for name, split in manifest.splits.items():
        for number, shard in enumerate(split.shards):
            if shard.name != f"shards/{name}-{number:06d}.tar":
                return f"shard {number} of split {name} is called {shard.name!r}"
            digests += [shard.sha256, shard.index_sha256, shard.tar_index_sha256]
        if not _are_counts(split):
            return f"a count of split {name} is not an integer of at least 0"
        if split.num_rows != sum(shard.rows for shard in split.shards) or split.num_blocks != sum(
            shard.blocks for shard in split.shards
        ):
            return f"rows or blocks of split {name} are not the sum over its shards"
        if split.num_tokens + split.num_padding != split.num_rows * manifest.sequence_length:
            return f"tokens and padding of split {name} do not fill its rows"
    if not all(_SHA256.fullmatch(digest) for digest in digests):
        return "a digest is not 64 hexadecimal digits"
    return None
