"""Documents of a Megatron .bin/.idx pair, decoded to text by the tokenizer that wrote them.

The format is that of `megamask.data.megatron_files`. A document is the sequences between two document indices, without
its last id where that ends a document.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megamask.data.corpus.inputs import writing_tokenizer_path
from megamask.data.tokenizer import SPECIAL_TOKENS_NAME, CorpusTokenizer
from megamask.data.tokenizer.special_tokens import SpecialTokens

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_TYPES = {4: "<i4", 5: "<i8", 8: "<u2"}


class MegatronError(Exception):
    """The pair is damaged, or a document of it is not text."""


@dataclass(frozen=True, kw_only=True)
class MegatronDocument:
    """A document: its text, and the place of its ids in the .bin file."""

    text: str
    offset: int
    bytes: int


def index_of(path: Path) -> Path:
    """Return the .idx file of a .bin file."""
    return path.with_suffix(".idx")


@lru_cache(maxsize=4)
def writing_tokenizer(path: str) -> CorpusTokenizer:
    """Return the tokenizer that ids were written with.

    Args:
        path: the folder tokenizer/ of a corpus, or a published tokenizer that names its end-of-sentence token.

    Raises:
        UsageError: it does not exist, cannot be served, or names no such token.
        DataIntegrityError: the folder of a corpus is damaged.
    """
    found = writing_tokenizer_path(path)
    if (found / SPECIAL_TOKENS_NAME).is_file():
        return CorpusTokenizer.load(found)
    special = SpecialTokens(eod="", pad="<|pad|>", mask="<|mask|>")
    return CorpusTokenizer.from_file(found, special, has_own_eod=True)


def megatron_documents(path: Path, tokenizer: CorpusTokenizer) -> Iterator[MegatronDocument]:
    """The documents of a pair, in order.

    Args:
        path: the .bin file; the .idx is beside it.
        tokenizer: that wrote the ids.

    Raises:
        MegatronError: as it says.
        OSError: a file cannot be read.
    """
    dtype, lengths, offsets, documents = _read_index(index_of(path))
    size = path.stat().st_size
    if (offsets < 0).any() or (offsets + lengths * dtype.itemsize > size).any():
        raise MegatronError(f"{index_of(path).name} names ids beyond the end of the .bin file, which has {size} bytes")
    special = {tokenizer.eod_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id}
    with path.open("rb") as file:
        for number in range(len(documents) - 1):
            own = range(int(documents[number]), int(documents[number + 1]))
            pieces = []
            for sequence in own:
                file.seek(int(offsets[sequence]))
                pieces.append(np.frombuffer(file.read(int(lengths[sequence]) * dtype.itemsize), dtype))
            ids = np.concatenate([np.empty(0, dtype), *pieces])
            count = len(ids)
            if count and int(ids[-1]) == tokenizer.eod_token_id:
                ids = ids[:-1]
            text = _text(ids.tolist(), tokenizer, special, number)
            begin = int(offsets[own.start]) if own else 0
            yield MegatronDocument(text=text, offset=begin, bytes=count * dtype.itemsize)


def _text(ids: list[int], tokenizer: CorpusTokenizer, special: set[int], number: int) -> str:
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise MegatronError(f"document {number} has an id outside the vocabulary of {tokenizer.vocab_size}")
    if inside := special.intersection(ids):
        raise MegatronError(f"document {number} has the special token {min(inside)} inside its text")
    try:
        return tokenizer.decode_bytes(ids).decode()
    except UnicodeDecodeError as error:
        raise MegatronError(f"document {number} does not decode to UTF-8 ({error.reason})") from error


def _read_index(
    path: Path,
) -> tuple[np.dtype[np.generic], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Type of an id; length and byte offset of each sequence; first sequence of each document, and the end."""
    data = path.read_bytes()
    if len(data) < _HEAD.size:
        raise MegatronError(f"{path.name} has {len(data)} bytes, fewer than its header")
    magic, version, code, num_sequences, num_documents = _HEAD.unpack_from(data)
    if magic != _MAGIC or version != 1:
        raise MegatronError(f"{path.name} is not an index of Megatron's format, version 1")
    if code not in _TYPES:
        raise MegatronError(f"{path.name} has ids of type {code}; supported are {', '.join(map(str, _TYPES))}")
    expected = _HEAD.size + 12 * num_sequences + 8 * num_documents
    if len(data) != expected:
        raise MegatronError(f"{path.name} has {len(data)} bytes, its header gives {expected} (text alone is supported)")
    at = _HEAD.size
    lengths = np.frombuffer(data, "<i4", num_sequences, at).astype(np.int64)
    offsets = np.frombuffer(data, "<i8", num_sequences, at + 4 * num_sequences).astype(np.int64)
    documents = np.frombuffer(data, "<i8", num_documents, at + 12 * num_sequences).astype(np.int64)
    is_whole = num_documents > 0 and int(documents[0]) == 0 and int(documents[-1]) == num_sequences
    if not is_whole or (np.diff(documents) < 0).any() or (lengths < 0).any():
        raise MegatronError(f"{path.name} has lengths or document indices that do not cover its sequences")
    return np.dtype(_TYPES[code]), lengths, offsets, documents
