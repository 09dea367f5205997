"""The shape of benchmark corpora, and one of 10^12 tokens whose shards are sparse files with true indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from megamask.data.index import BLOCK_DTYPE, ShardIndex
from megamask.storage.hashing import canonical_json, hash_of, sha256_bytes

LENGTH, ROWS_PER_BLOCK, BLOCKS_PER_SHARD = 4096, 64, 256
EOD, PAD, MASK, VOCAB = 50_000, 50_001, 50_002, 50_003
TRILLION_ROWS = 244_140_625


def manifest_content(shards: list[dict[str, Any]], rows: int, blocks: int) -> dict[str, Any]:
    """A manifest without tokenizer and documents table: what reading rows needs."""
    split = {
        "documents": 0,
        "text_bytes": 0,
        "tokens": rows * LENGTH,
        "sequences": rows,
        "padding": 0,
        "blocks": blocks,
        "shards": shards,
    }
    ids = {"vocab_size": VOCAB, "eod_token_id": EOD, "pad_token_id": PAD, "mask_token_id": MASK}
    return {
        "format": "megamask-corpus",
        "version": 1,
        "dtype": "uint16",
        "sequence_length": LENGTH,
        "tokenizer": {"digest": hash_of("none"), **ids},
        "documents": {"digest": hash_of("none"), "tables": []},
        "options": {"rows_per_block": ROWS_PER_BLOCK},
        "splits": {"train": split},
    }


def write_trillion(folder: Path) -> None:
    """A corpus of 10^12 tokens whose shards are sparse files of zeros, with true indexes."""
    (folder / "shards").mkdir(parents=True)
    row_crc, size = int(crc32c(bytes(LENGTH * 2))), 0
    blocks = np.zeros(BLOCKS_PER_SHARD, BLOCK_DTYPE)
    for block in blocks:
        block["tokens_offset"], block["rows"] = size + 640, ROWS_PER_BLOCK
        block["tokens_bytes"] = ROWS_PER_BLOCK * LENGTH * 2
        size += -(-(640 + int(block["tokens_bytes"])) // 512) * 512 + 1024
        block["docs_offset"] = size - 384
    shards, per_shard = [], BLOCKS_PER_SHARD * ROWS_PER_BLOCK
    for number in range(-(-TRILLION_ROWS // per_shard)):
        rows = min(per_shard, TRILLION_ROWS - number * per_shard)
        count = -(-rows // ROWS_PER_BLOCK)
        own = blocks[:count].copy()
        own["rows"][-1] = rows - (count - 1) * ROWS_PER_BLOCK
        own["tokens_bytes"][-1] = int(own["rows"][-1]) * LENGTH * 2
        index = ShardIndex(
            first_block=number * BLOCKS_PER_SHARD,
            shard_bytes=size,
            sequence_length=LENGTH,
            itemsize=2,
            blocks=own,
            row_crc32c=np.full(rows, row_crc, dtype="<u4"),
        ).pack()
        name = f"shards/train-{number:06d}.tar"
        with (folder / name).open("wb") as file:
            file.truncate(size)
        (folder / name).with_suffix(".idx").write_bytes(index)
        none = hash_of("none")
        shards.append(
            {"name": name, "sha256": hash_of(number), "bytes": size, "blocks": count, "rows": rows}
            | {"index_sha256": sha256_bytes(index), "tar_index_sha256": none}
        )
    total = sum(shard["blocks"] for shard in shards)
    (folder / "manifest.json").write_bytes(canonical_json(manifest_content(shards, TRILLION_ROWS, total)))
