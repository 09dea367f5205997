"""`megamask verify corpus`: compare every byte of a corpus with its manifest, and the manifest with the content.

Checksums prove that nothing changed since the corpus was made; the counts, the documents table and the token ids are
then worked out again from the rows, so that a corpus made wrongly does not pass either.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megamask.data.corpus.documents import DOCUMENTS_DIR, DocumentRecord, documents_digest, read_documents
from megamask.data.corpus.shard import SHARDS_DIR
from megamask.data.corpus.splits import TRAIN, VALIDATION, choose_validation, split_hash
from megamask.data.faults import find_faults
from megamask.data.manifest import MANIFEST_NAME, PROVENANCE_NAME, Manifest, provenance_problem
from megamask.data.manifest_values import odd_record
from megamask.data.tokenizer import SPECIAL_TOKENS_NAME, TOKENIZER_DIR, TOKENIZER_NAME, CorpusTokenizer
from megamask.data.verify_rows import SplitDocuments, SplitRows, wrong_statistics
from megamask.data.verify_shard import damage, plain_file_size, verify_shard
from megamask.errors import DataIntegrityError, MegamaskError, UsageError
from megamask.storage.ranges import is_remote

Progress = Callable[[int, int], object]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LISTED_DIRS = (SHARDS_DIR, DOCUMENTS_DIR, TOKENIZER_DIR)


def verify_corpus(folder: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Check every byte of a corpus; the first damage found raises.

    The error's `details` have shards, blocks and bytes of the corpus and every damaged place of its shards (`faults`).

    Args:
        folder: the corpus.
        progress: called with (rows checked, rows of the corpus) after each block.

    Returns:
        corpus_id, rows, documents, tokens (eligible), shards, blocks, bytes, faults (none), ok (true).

    Raises:
        UsageError: the folder is not a corpus, or a newer version made it.
        DataIntegrityError: the first damage, with shard, member and row where known.
        StorageError: the storage does not answer.
    """
    if is_remote(str(folder)):
        raise UsageError(
            f"{folder} is in an object store; verify corpus reads a local folder. Nothing was checked.",
            hint="copy the corpus to a folder; training checks every block and row of a remote corpus that it reads",
        )
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder. Nothing was checked.", hint="name a prepared corpus")
    manifest = Manifest.load(folder)
    try:
        return _checked(folder, manifest, progress)
    except DataIntegrityError as error:
        error.details |= _extent(manifest) | {"faults": [fault.to_json() for fault in find_faults(folder, manifest)]}
        raise


def _extent(manifest: Manifest) -> dict[str, int]:
    """Shards, blocks and bytes of a corpus."""
    shards = [entry for split in manifest.splits.values() for entry in split.shards]
    return {
        "shards": len(shards),
        "blocks": sum(entry.blocks for entry in shards),
        "bytes": sum(entry.bytes for entry in shards),
    }


def _checked(folder: Path, manifest: Manifest, progress: Progress | None) -> dict[str, Any]:
    """Run all checks, in the order in which later ones rely on earlier ones."""
    _check_record(folder, manifest)
    _check_names(folder, manifest)
    if problem := provenance_problem(folder / PROVENANCE_NAME, manifest.corpus_id):
        raise damage(problem)
    _check_tokenizer(folder, manifest)
    tables = _check_documents(folder, manifest)
    if (expected := wrong_statistics(manifest, tables)) is not None:
        raise damage(f"{folder / MANIFEST_NAME}: packing is not {expected}, which follows from the documents")
    is_used = np.zeros(manifest.vocab_size, dtype=np.bool_)
    shards = [(split, entry) for split in sorted(manifest.splits) for entry in manifest.split(split).shards]
    num_rows, done = sum(entry.rows for _, entry in shards), 0
    for split in sorted(manifest.splits):
        rows = SplitRows(manifest, split, tables[split], is_used)
        first_block = 0
        for entry in manifest.split(split).shards:
            for block in verify_shard(folder, manifest, entry, first_block):
                rows.check(block)
                done += len(block.tokens)
                if progress is not None:
                    progress(done, num_rows)
            first_block += entry.blocks
        rows.finish(folder)
    unused = np.flatnonzero(~is_used).tolist()
    if unused != list(manifest.content["unused_ids"]):
        raise damage(f"{folder / MANIFEST_NAME}: unused_ids are not the {len(unused)} ids that no document uses")
    _check_totals(folder, manifest)
    return {
        "corpus_id": manifest.corpus_id,
        "rows": num_rows,
        "documents": sum(split.num_documents for split in manifest.splits.values()),
        "tokens": sum(split.num_tokens for split in manifest.splits.values()),
        **_extent(manifest),
        "faults": [],
        "ok": True,
    }


def _check_record(folder: Path, manifest: Manifest) -> None:
    """Check the types of those manifest values that only verifying reads, before they are used."""
    try:
        problem = odd_record(manifest.content)
    except (KeyError, TypeError, AttributeError) as error:
        raise damage(f"{folder / MANIFEST_NAME}: a field is missing or has the wrong type ({error!r})") from error
    if problem is not None:
        raise damage(f"{folder / MANIFEST_NAME}: {problem}")


def _check_names(folder: Path, manifest: Manifest) -> None:
    """Check that every file is a plain one, and that the folders that tools list with a glob hold only named files."""
    named = {str(table["name"]) for table in manifest.content["documents"]["tables"]}
    named |= {f"{TOKENIZER_DIR}/{name}" for name in (TOKENIZER_NAME, SPECIAL_TOKENS_NAME)}
    for split in manifest.splits.values():
        for entry in split.shards:
            named |= {entry.name, entry.index_name, entry.tar_index_name}
    for name in sorted(named):
        plain_file_size(folder / name)
    for parent, folders, files in os.walk(folder, followlinks=False):
        for name in sorted((*folders, *files)):
            path = Path(parent) / name
            relative = path.relative_to(folder)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise damage(f"{path} is a link or no plain file; a corpus holds plain files only")
            if relative.parts[0] in _LISTED_DIRS and stat.S_ISREG(mode) and relative.as_posix() not in named:
                raise damage(f"{path} is not named by the manifest")


def _check_tokenizer(folder: Path, manifest: Manifest) -> None:
    try:
        tokenizer = CorpusTokenizer.load(folder / TOKENIZER_DIR)
    except (MegamaskError, FileNotFoundError) as error:
        raise damage(f"{folder / TOKENIZER_DIR} cannot be loaded ({error})") from error
    if tokenizer.digest != manifest.tokenizer_digest:
        raise damage(
            f"{folder / TOKENIZER_DIR}: its digest is {tokenizer.digest}, the manifest has {manifest.tokenizer_digest}"
        )
    found = (tokenizer.vocab_size, tokenizer.eod_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id)
    expected = (manifest.vocab_size, manifest.eod_token_id, manifest.pad_token_id, manifest.mask_token_id)
    if found != expected:
        raise damage(f"{folder / TOKENIZER_DIR}: (vocab_size, eod, pad, mask) are {found}, the manifest has {expected}")


def _check_documents(folder: Path, manifest: Manifest) -> dict[str, SplitDocuments]:
    """Compare the documents table with its digest, the split rule, the inputs and the counts of the manifest."""
    splits = {TRAIN: SplitDocuments(), VALIDATION: SplitDocuments()}
    inputs: Counter[tuple[str, str]] = Counter()
    hashes: list[int] = []
    is_validation: list[bool] = []
    where = folder / DOCUMENTS_DIR

    def walk() -> Iterator[DocumentRecord]:
        """Yield the documents table's rows, checked and counted."""
        for record in read_documents(folder, [(table["name"], table["documents"]) for table in content["tables"]]):
            is_odd = min(record.offset, record.bytes, record.text_bytes, record.tokens - 1) < 0
            if is_odd or record.number != len(hashes) or record.split not in splits:
                raise damage(f"{where}: the row of document {len(hashes)} is {record}")
            documents = splits[record.split]
            documents.numbers.append(record.number)
            documents.tokens.append(record.tokens)
            documents.text_bytes += record.text_bytes
            inputs[record.input, record.input_sha256] += 1
            if not _SHA256.fullmatch(record.text_sha256):
                raise damage(f"{where}: the text of document {record.number} has no sha256")
            hashes.append(split_hash(bytes.fromhex(record.text_sha256)))
            is_validation.append(record.split == VALIDATION)
            yield record

    content = manifest.content["documents"]
    digest = documents_digest(walk())
    if digest != manifest.documents_digest:
        raise damage(f"{where}: the digest of its content is {digest}, the manifest has {manifest.documents_digest}")
    try:
        expected = choose_validation(hashes, str(manifest.content["options"]["validation_fraction"]))
    except UsageError as error:
        raise damage(f"{folder / MANIFEST_NAME}: {error.message}") from error
    wrong = np.flatnonzero(expected != np.array(is_validation, dtype=np.bool_))
    if len(wrong):
        raise damage(f"{where}: document {int(wrong[0])} is in the wrong split by its text's digest")
    listed: Counter[tuple[str, str]] = Counter()
    for entry in manifest.content["inputs"]:
        listed[entry["name"], entry["sha256"]] += entry["documents"]
    if +listed != +inputs or sum(table["documents"] for table in content["tables"]) != len(hashes):
        raise damage(f"{folder / MANIFEST_NAME}: the inputs or tables name other documents than {where} holds")
    for name, documents in splits.items():
        entry = manifest.splits.get(name)
        counted = (entry.num_documents, entry.text_bytes, entry.num_tokens) if entry else (0, 0, 0)
        if counted != (len(documents.numbers), documents.text_bytes, sum(documents.tokens)):
            raise damage(f"{where}: split {name} has other documents, bytes or tokens than the manifest has")
    return splits


def _check_totals(folder: Path, manifest: Manifest) -> None:
    splits = manifest.splits.values()
    expected = {
        "documents": sum(split.num_documents for split in splits),
        "text_bytes": sum(split.text_bytes for split in splits),
        "tokens": sum(split.num_tokens for split in splits),
        "sequences": sum(split.num_rows for split in splits),
        "shards": sum(len(split.shards) for split in splits),
    }
    if dict(manifest.content["totals"]) != expected:
        raise damage(f"{folder / MANIFEST_NAME}: totals are not the sums over the splits, {expected}")
