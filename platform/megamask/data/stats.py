"""Statistics of a corpus: sources, lengths of documents, duplicates, frequencies of tokens, rows.

Documents are counted in full, from the table of documents. Token frequencies are of evenly spaced rows of each split,
up to a limit; the answer has their number.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megamask.data.corpus.documents import read_documents
from megamask.data.manifest import Manifest, open_corpus
from megamask.data.reader import SplitReader
from megamask.data.tokenizer import TOKENIZER_DIR, CorpusTokenizer

_MAX_ROWS = 4096  # of a split, whose tokens are counted
_SHOWN_TOKENS = 50


def corpus_stats(folder: Path) -> dict[str, Any]:
    """Return the statistics of a corpus.

    Returns:
        corpus_id, sequence_length, vocab_size; sources: by name, documents, text_bytes, tokens, bytes_per_token;
        splits: by name, documents, rows, tokens, padding_fraction, documents_per_row, split_documents (documents with
        tokens in more than one row); lengths: documents by power of two of their tokens, as {"2^k": count};
        duplicates: documents whose text another one has, and their bytes; steps (what preparing left out);
        tokens: counted_rows, distinct, unused, most_frequent [{id, text, count, fraction}].

    Raises:
        UsageError: the folder is not a corpus.
        DataIntegrityError: it is damaged where it was read.
    """
    manifest = open_corpus(folder, "the corpus")
    sources, lengths, duplicates, splits = _documents(folder, manifest)
    return {
        "corpus_id": manifest.corpus_id,
        "sequence_length": manifest.sequence_length,
        "vocab_size": manifest.vocab_size,
        "sources": sources,
        "splits": splits,
        "lengths": lengths,
        "duplicates": duplicates,
        "steps": list(manifest.content.get("steps", [])),
        "tokens": _frequencies(folder, manifest),
    }


def _documents(
    folder: Path, manifest: Manifest
) -> tuple[dict[str, Any], dict[str, int], dict[str, int], dict[str, Any]]:
    source_of = {entry["name"]: entry.get("source", entry["name"]) for entry in manifest.content["inputs"]}
    counts: dict[str, Counter[str]] = {}
    lengths: Counter[int] = Counter()
    seen: set[str] = set()
    duplicates: Counter[str] = Counter()
    split_documents: Counter[str] = Counter()
    positions: Counter[str] = Counter()
    length = manifest.sequence_length
    tables = [(table["name"], table["documents"]) for table in manifest.content["documents"]["tables"]]
    for record in read_documents(folder, tables):
        of_source = counts.setdefault(source_of.get(record.input, record.input), Counter())
        of_source.update(documents=1, text_bytes=record.text_bytes, tokens=record.tokens)
        lengths[record.tokens.bit_length() - 1] += 1
        if record.text_sha256 in seen:
            duplicates.update(documents=1, text_bytes=record.text_bytes)
        seen.add(record.text_sha256)
        first = positions[record.split]
        positions[record.split] = first + record.tokens
        split_documents[record.split] += first // length != (first + record.tokens - 1) // length
    sources = {
        name: dict(values) | {"bytes_per_token": round(values["text_bytes"] / values["tokens"], 4)}
        for name, values in sorted(counts.items())
    }
    for name, packing in manifest.content.get("packing", {}).items():
        split_documents[name] = packing["cut_documents"]  # of best fit: only those longer than a row
    splits = {
        name: {
            "documents": entry.num_documents,
            "rows": entry.num_rows,
            "tokens": entry.num_tokens,
            "padding_fraction": round(entry.num_padding / (entry.num_rows * length), 6) if entry.num_rows else 0.0,
            "documents_per_row": round(entry.num_documents / entry.num_rows, 3) if entry.num_rows else 0.0,
            "split_documents": split_documents[name],
        }
        for name, entry in manifest.splits.items()
    }
    return (
        sources,
        {f"2^{power}": lengths[power] for power in sorted(lengths)},
        {"documents": duplicates["documents"], "text_bytes": duplicates["text_bytes"]},
        splits,
    )


def _frequencies(folder: Path, manifest: Manifest) -> dict[str, Any]:
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    counted = 0
    for split in manifest.splits:
        reader = SplitReader(folder, manifest, split)
        rows = np.unique(np.linspace(0, reader.num_rows - 1, min(_MAX_ROWS, reader.num_rows)).astype(np.int64))
        for first in range(0, len(rows), 256):
            read = reader.read_rows(rows[first : first + 256])
            counts += np.bincount(read.tokens.reshape(-1), minlength=manifest.vocab_size)
        counted += len(rows)
        reader.close()
    counts[manifest.pad_token_id] = 0
    tokenizer = CorpusTokenizer.load(folder / TOKENIZER_DIR)
    total = max(1, int(counts.sum()))
    order = np.argsort(-counts, kind="stable")[:_SHOWN_TOKENS].tolist()
    return {
        "counted_rows": counted,
        "distinct": int((counts > 0).sum()),
        "unused": len(manifest.content["unused_ids"]),
        "most_frequent": [
            {
                "id": token,
                "text": tokenizer.decode_bytes([token]).decode(errors="replace"),
                "count": int(counts[token]),
                "fraction": round(int(counts[token]) / total, 6),
            }
            for token in order
            if counts[token]
        ],
    }
