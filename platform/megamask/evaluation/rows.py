"""Rows to evaluate, from a file of token ids, from texts, or from a split of a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamask.data.corpus.pack import RowPacker, token_dtype
from megamask.data.manifest import Manifest
from megamask.data.reader import SplitReader
from megamask.data.roles import answered
from megamask.data.tokenizer import NO_TOKEN, CorpusTokenizer
from megamask.errors import DataIntegrityError, UsageError

SPLIT_ROWS = 64
_NOTHING = "Nothing was scored."


def token_id_rows(path: Path, vocab_size: int) -> Tensor:
    """Read rows of token ids, int64 [n, L], from a .npy file.

    Raises:
        UsageError: it cannot be read, has another shape or type, or an id outside the vocabulary.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"--token-ids {path} cannot be read as a .npy file: {error}. {_NOTHING}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype != np.int64 or ids.size == 0:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise UsageError(f"--token-ids {path} holds {found}; allowed: int64 [n, L], n and L at least 1. {_NOTHING}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UsageError(
            f"--token-ids {path} holds ids from {ids.min()} to {ids.max()}; allowed: 0 to {vocab_size - 1}. {_NOTHING}"
        )
    return torch.from_numpy(ids)


def text_rows(files: Sequence[Path], tokenizer: CorpusTokenizer, sequence_length: int) -> Tensor:
    """Pack files into rows, int64 [n, s], as prepare does: one after another, each with its end-of-document token.

    Raises:
        UsageError: a file cannot be read or is empty. DataIntegrityError: a file is not UTF-8.
    """
    documents = [_document(tokenizer, file) for file in files]
    if tokenizer.pad_token_id == NO_TOKEN:
        return _rows_without_padding(documents, sequence_length)
    packer = RowPacker(
        sequence_length=sequence_length,
        rows_per_block=-(-sum(map(len, documents)) // sequence_length),
        dtype=token_dtype(tokenizer.vocab_size),
        pad_token_id=tokenizer.pad_token_id,
    )
    groups = [group for number, document in enumerate(documents) for group in packer.add(number, document)]
    tokens = np.concatenate([group.tokens for group in (*groups, *packer.finish())])
    return torch.from_numpy(tokens.astype(np.int64))


def _rows_without_padding(documents: Sequence[np.ndarray[Any, np.dtype[np.int64]]], sequence_length: int) -> Tensor:
    """Complete rows only, for a tokenizer without a padding token; one shorter row where there is not even one."""
    tokens = np.concatenate(documents)
    length = min(sequence_length, len(tokens))
    return torch.from_numpy(tokens[: len(tokens) // length * length].reshape(-1, length))


def split_rows(
    folder: Path,
    manifest: Manifest,
    split: str,
    *,
    tokenizer_digest: str | None,
    sequence_length: int,
    rows: int | None,
    score: str = "all",
) -> tuple[Tensor, Tensor]:
    """Read the first rows of a split in the corpus' own order: (tokens int64 [n, s], is_eligible bool [n, s]).

    Args:
        tokenizer_digest, sequence_length: of the model.
        rows: at most so many; None for the first 64.
        score: as `data.score`: all tokens but padding, or answers alone.

    Raises:
        UsageError: the corpus has another tokenizer or length of rows, the split is missing or empty, or its rows have
            no answers to score.
        DataIntegrityError: a row is damaged.
    """
    if manifest.tokenizer_digest != tokenizer_digest:
        raise UsageError(
            f"tokenizer mismatch: the corpus {folder} was made with tokenizer {manifest.tokenizer_digest}, the model "
            f"with {tokenizer_digest}. {_NOTHING}",
            hint="prepare the corpus with corpus.tokenizer.path set to the model's tokenizer.json, or use --text",
        )
    if manifest.sequence_length != sequence_length:
        raise UsageError(
            f"the rows of {folder} have {manifest.sequence_length} tokens, the model's {sequence_length}. {_NOTHING}",
            hint="prepare the corpus again with that corpus.sequence_length, or use --text",
        )
    reader = SplitReader(folder, manifest, split)
    try:
        count = min(SPLIT_ROWS if rows is None else rows, reader.num_rows)
        if count == 0:
            raise UsageError(f"the split {split} of {folder} has no rows. {_NOTHING}")
        read = [reader.read(row) for row in range(count)]
        tokens = torch.from_numpy(np.stack([row.tokens for row in read]).astype(np.int64))
        is_eligible = tokens != manifest.pad_token_id
        if score == "answers":
            is_eligible &= torch.from_numpy(np.stack([answered(row.documents, sequence_length) for row in read]))
            if not is_eligible.any():
                raise UsageError(
                    f"--score is answers, but the first {count} rows of {folder} hold none. {_NOTHING}",
                    hint="give --score all, or a corpus prepared from inputs of the format messages",
                )
        return tokens, is_eligible
    finally:
        reader.close()


def _document(tokenizer: CorpusTokenizer, path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--text {path} cannot be read: {error.strerror}. {_NOTHING}") from error
    if not data:
        raise UsageError(f"--text {path} is empty. {_NOTHING}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataIntegrityError(f"--text {path} is not UTF-8 at byte {error.start}. {_NOTHING}") from error
    ids = tokenizer.encode_array(text)
    return ids if tokenizer.eod_token_id == NO_TOKEN else np.append(ids, tokenizer.eod_token_id)
