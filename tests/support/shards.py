"""Small corpora of given token ids, written by the package's own packer and shard writer, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megamask.data.corpus.pack import RowPacker, token_dtype
from megamask.data.corpus.shard import ShardWriter
from megamask.data.manifest import Manifest
from megamask.storage.hashing import canonical_json, hash_of

Documents = Sequence[Sequence[int]]


def write_token_corpus(
    folder: Path,
    documents: Documents,
    *,
    validation: Documents = (),
    sequence_length: int = 16,
    rows_per_block: int = 4,
    blocks_per_shard: int = 3,
    vocab_size: int = 64,
) -> Manifest:
    """Write documents (each gets the end-of-document id) as split train, and others as split validation.

    The last three ids of the vocabulary are end-of-document, padding and mask.
    """
    (folder / "shards").mkdir(parents=True)
    pad, dtype = vocab_size - 2, token_dtype(vocab_size)
    splits: dict[str, Any] = {}
    number = 0
    for name, texts in (("train", documents), ("validation", validation)):
        if not texts:
            continue
        packer = RowPacker(
            sequence_length=sequence_length, rows_per_block=rows_per_block, dtype=dtype, pad_token_id=pad
        )
        writer = ShardWriter(
            folder,
            name,
            blocks_per_shard=blocks_per_shard,
            sequence_length=sequence_length,
            itemsize=dtype.itemsize,
        )
        for text in texts:
            for block in packer.add(number, np.array([*text, vocab_size - 3], dtype=dtype)):
                writer.add(block)
            number += 1
        for block in packer.finish():
            writer.add(block)
        writer.finish()
        splits[name] = _split_entry(texts, packer, writer)
    content = _manifest(splits, sequence_length=sequence_length, vocab_size=vocab_size, rows_per_block=rows_per_block)
    (folder / "manifest.json").write_bytes(canonical_json(content))
    return Manifest.load(folder)


def _split_entry(texts: Documents, packer: RowPacker, writer: ShardWriter) -> dict[str, Any]:
    return {
        "documents": len(texts),
        "text_bytes": sum(map(len, texts)),
        "tokens": packer.num_tokens,
        "sequences": sum(shard.rows for shard in writer.shards),
        "padding": packer.num_padding,
        "blocks": sum(shard.blocks for shard in writer.shards),
        "shards": [vars(shard) for shard in writer.shards],
    }


def _manifest(splits: dict[str, Any], *, sequence_length: int, vocab_size: int, rows_per_block: int) -> dict[str, Any]:
    ids = {"eod_token_id": vocab_size - 3, "pad_token_id": vocab_size - 2, "mask_token_id": vocab_size - 1}
    return {
        "format": "megamask-corpus",
        "version": 1,
        "dtype": token_dtype(vocab_size).name,
        "sequence_length": sequence_length,
        "tokenizer": {"digest": hash_of("no tokenizer"), "vocab_size": vocab_size} | ids,
        "documents": {"digest": hash_of("no table"), "tables": []},
        "options": {"rows_per_block": rows_per_block},
        "splits": splits,
    }


def random_documents(count: int, *, seed: int = 0, longest: int = 60, ids: int = 61) -> list[list[int]]:
    """Documents of random length and content."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, ids, generator.integers(0, longest + 1)).tolist() for _ in range(count)]


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    """Damages one bit of a file in place."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def packed_rows(documents: Documents, *, sequence_length: int, eod: int, pad: int) -> list[list[int]]:
    """Return what the rows must hold: the documents one after another, cut, the last row padded. Plain lists."""
    flat = [token for text in documents for token in (*text, eod)]
    flat += [pad] * (-len(flat) % sequence_length)
    return [flat[start : start + sequence_length] for start in range(0, len(flat), sequence_length)]


def packed_documents(documents: Documents, *, sequence_length: int, first_number: int = 0) -> list[list[list[int]]]:
    """(start, number) of every document in every row, from the definition. Plain lists."""
    ends = np.cumsum([len(text) + 1 for text in documents]).tolist()
    starts = [0, *ends[:-1]]
    rows = -(-ends[-1] // sequence_length)
    return [
        [
            [max(start - row * sequence_length, 0), first_number + number]
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
            if start < (row + 1) * sequence_length and end > row * sequence_length
        ]
        for row in range(rows)
    ]
