"""A corpus as Megatron's .bin/.idx pair, which its GPTDataset and the tools around it read.

    .bin   the token ids of all documents, end-of-document included, one after another, uint16 or int32
    .idx   little-endian: "MMIDIDX\\0\\0", version 1 (u64), type of an id (u8: 8 is uint16, 4 is int32), number of
           sequences (u64), number of document indices (u64); int32 length of each sequence; int64 byte offset of each;
           int64 document indices 0, 1, ..., n

A document is one sequence. The format is that of megatron-core's IndexedDataset, written here without it.
"""

from __future__ import annotations

import os
import secrets
import struct
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from megamask.data.manifest import Manifest, open_corpus
from megamask.data.reader import SplitReader
from megamask.errors import UsageError
from megamask.storage.durable import fsync_directory, storage_errors

_MAGIC = b"MMIDIDX\x00\x00"
_UINT16, _INT32 = 8, 4
_ROWS = 256  # read at a time


def export_megatron(folder: Path, prefix: Path, split: str = "train") -> dict[str, int]:
    """Write PREFIX.bin and PREFIX.idx, the .idx last.

    Args:
        folder: the corpus.
        prefix: of the two files, which must not exist.
        split: whose documents are written, in number order.

    Returns: documents, tokens.

    Raises:
        UsageError: no such corpus or split, a packer that cuts documents otherwise, or a file that exists.
        DataIntegrityError: a row is damaged; nothing is left.
        StorageError: the disk refused; nothing is left.
    """
    manifest = open_corpus(folder, "the corpus")
    if manifest.content["packer"]["name"] != "concatenate-and-cut":
        raise UsageError(
            f"{folder} was packed by {manifest.content['packer']['name']}; only concatenate-and-cut keeps documents in "
            "order. Nothing was written."
        )
    paths = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]
    for path in paths:
        if path.exists():
            raise UsageError(f"{path} exists. It was not touched.", hint="choose another prefix")
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp") for path in paths]
    try:
        with storage_errors(f"writing {prefix}.bin and .idx"):
            with temporary[0].open("xb") as file:
                lengths = _write_tokens(file, folder, manifest, split)
                file.flush()
                os.fsync(file.fileno())
            with temporary[1].open("xb") as file:
                file.write(_index(lengths, manifest.dtype.itemsize))
                file.flush()
                os.fsync(file.fileno())
            for source, path in zip(temporary, paths, strict=True):
                source.rename(path)
            fsync_directory(prefix.absolute().parent)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return {"documents": len(lengths), "tokens": int(lengths.sum())}


def _write_tokens(file: IO[bytes], folder: Path, manifest: Manifest, split: str) -> npt.NDArray[np.int32]:
    """Write the ids of all documents; return the length of each, int32."""
    reader = SplitReader(folder, manifest, split)
    dtype = np.dtype("<u2") if manifest.dtype.itemsize == 2 else np.dtype("<i4")
    ends, position = [np.zeros(1, dtype=np.int64)], 0
    for first in range(0, reader.num_rows, _ROWS):
        read = reader.read_rows(range(first, min(first + _ROWS, reader.num_rows)))
        flat = read.tokens.reshape(-1)
        flat = flat[flat != manifest.pad_token_id]
        ends.append(np.flatnonzero(flat == manifest.eod_token_id) + position + 1)
        file.write(flat.astype(dtype).tobytes())
        position += len(flat)
    reader.close()
    return np.diff(np.concatenate(ends)).astype(np.int32)


def _index(lengths: npt.NDArray[np.int32], itemsize: int) -> bytes:
    count = len(lengths)
    begins = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * itemsize
    return b"".join(
        (
            _MAGIC,
            struct.pack("<QBQQ", 1, _UINT16 if itemsize == 2 else _INT32, count, count + 1),
            lengths.astype("<i4").tobytes(),
            begins.astype("<i8").tobytes(),
            np.arange(count + 1, dtype="<i8").tobytes(),
        )
    )
