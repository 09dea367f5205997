"""Digests of a batch: of its sample indices alone, and of the content that was read for them.

Two runs, or two layouts of one run, saw the same data exactly when these agree. The content digest is a sum, so each
rank adds up its own share and the order of ranks does not matter.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from megamask.data.skipped import SKIPS_NOTHING, SkippedSamples

_MODULUS = 1 << 64


def tokens_checksum(tokens: npt.NDArray[np.generic]) -> int:
    """crc32c of one row's values [L] in their stored type (little-endian uint16 or uint32)."""
    return int(crc32c(np.ascontiguousarray(tokens).tobytes()))


def documents_checksum(documents: npt.NDArray[np.int64]) -> int:
    """crc32c of one row's (start, document number) pairs [n, 2], as little-endian int64."""
    return int(crc32c(np.ascontiguousarray(documents, dtype="<i8").tobytes()))


def content_hash(sample_index: int, source_digest: str, row: int, tokens_crc: int, documents_crc: int) -> int:
    """One sample's part of the content digest: the first 8 bytes, little-endian, of H of all the arguments.

    Args:
        sample_index: global sample index.
        source_digest: lower-case hex digest of the source's split.
        row: 0-based row of the split.
        tokens_crc: of `tokens_checksum`, computed from the bytes that were read.
        documents_crc: of `documents_checksum`, likewise.
    """
    # The canonical JSON of the five values, written out: a batch has many samples, and a general encoder takes longer
    # than reading the row.
    text = f'[{sample_index:d},"{source_digest}",{row:d},{tokens_crc:d},{documents_crc:d}]\n'
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def add_content(*parts: int) -> int:
    """Sum of content hashes, or of ranks' sums, modulo 2^64."""
    return sum(parts) % _MODULUS


def content_digest(content_sum: int) -> str:
    """A batch's content digest as the journal shows it: 16 hex digits of the sum modulo 2^64."""
    return f"{content_sum % _MODULUS:016x}"


def batch_digest(position: int, global_batch_size: int, skipped: SkippedSamples = SKIPS_NOTHING) -> str:
    """First 16 hex digits of the sha256 of the batch's sample indices as little-endian int64, in batch order.

    Args:
        position: of the batch's first sample, counted over the samples that the run uses.
        skipped: what the run leaves out.
    """
    digest = hashlib.sha256()
    for indices in skipped.segments(position, global_batch_size):
        digest.update(np.arange(indices.start, indices.stop, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]
