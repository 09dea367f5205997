"""Batches of a run: the rows that the order law names, read, checked and widened to int64.

The batch of a step is the sample indices first, ..., first + B - 1; each rank asks for the members that its
coordinate computes. Nothing here knows of ranks or processes, and nothing is carried from batch to batch.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from megamask.config.schema.data import DataConfig
from megamask.data.content import add_content, content_hash
from megamask.data.manifest import open_corpus
from megamask.data.order import SourceOrder, order_key
from megamask.data.reader import Row, SplitReader
from megamask.data.roles import answered
from megamask.data.tokenizer import CorpusTokenizer
from megamask.diffusion.spindle import token_information
from megamask.errors import UsageError

_INFORMATION_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a global batch; b members, L tokens each, in the order the members were given."""

    tokens: torch.Tensor  # int64 [b, L], clean ids, padding included
    is_eligible: torch.Tensor  # bool [b, L]: every real token, end-of-document included; not padding
    sample_index: torch.Tensor  # int64 [b], global
    batch_position: torch.Tensor  # int64 [b], position j in the global batch
    rows: list[tuple[str, int]]  # (source, row) of each member
    content_sum: int  # sum modulo 2^64 of the members' content hashes


@dataclass(frozen=True, kw_only=True)
class _Share:
    first_index: int
    global_batch_size: int
    members: tuple[int, ...]


class Loader:
    """Reads what a run trains on; usable with and without torch.distributed.

    Args:
        corpora: name -> folder of a prepared corpus; exactly one for now.
        data: seed and window of the order.
        sequence_length: tokens of a row (`training.sequence_length`); must be the corpus' own.
        split: which split to read.

    Raises:
        UsageError: no such folder, not a corpus, another sequence length, no such split, more than one corpus.
        DataIntegrityError: the corpus is damaged.
    """

    def __init__(
        self, corpora: Mapping[str, str], data: DataConfig, sequence_length: int, split: str = "train"
    ) -> None:
        if len(corpora) != 1:
            raise UsageError(
                f"data.corpora has {len(corpora)} entries ({', '.join(corpora) or 'none'}); "
                "mixtures are not built. No batch was read.",
                hint="give one entry under data.corpora",
            )
        [(self.source, folder)] = corpora.items()
        self.folder = Path(folder)
        self.sequence_length = sequence_length
        self.manifest = open_corpus(self.folder, f"data.corpora.{self.source}")
        if self.manifest.sequence_length != sequence_length:
            raise UsageError(
                f"training.sequence_length is {sequence_length}, but the rows of data.corpora.{self.source} "
                f"({self.folder}) have {self.manifest.sequence_length} tokens. No batch was read.",
                hint=f"set training.sequence_length={self.manifest.sequence_length}, or prepare the corpus again",
            )
        if split not in self.manifest.splits or self.manifest.splits[split].num_rows == 0:
            raise UsageError(
                f"data.corpora.{self.source} ({self.folder}) has no split {split!r} with rows; "
                f"it has: {', '.join(sorted(self.manifest.splits))}. No batch was read.",
                hint="prepare the corpus with documents for that split (corpus.validation_fraction)",
            )
        self._scores_answers = data.score == "answers"
        if self._scores_answers and "chat_template_sha256" not in self.manifest.content["options"]:
            raise UsageError(
                f"data.score is answers, but data.corpora.{self.source} ({self.folder}) holds no conversations. "
                "No batch was read.",
                hint="set data.score=all, or prepare the corpus from inputs of the format messages",
            )
        self.source_digest = self.manifest.source_digest(split)
        self.corpus_ids = {self.source: self.manifest.corpus_id}
        self._reader = SplitReader(self.folder, self.manifest, split)
        key = order_key(data.seed, self.source_digest, split)
        self._order = SourceOrder(self._reader.block_rows, key=key, window_blocks=data.shuffle_window_blocks)
        self._lock = threading.Lock()  # order and reader serve one thread at a time
        self._thread: ThreadPoolExecutor | None = None
        self._pending: tuple[_Share, Future[Batch]] | None = None

    @cached_property
    def tokenizer(self) -> CorpusTokenizer:
        """The tokenizer that made the corpus."""
        return CorpusTokenizer.load(self.folder / "tokenizer")

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return self._order.num_rows

    def rows(self, first_index: int, count: int) -> list[tuple[str, int]]:
        """(source, row) of the sample indices first_index, ..., first_index + count - 1; reads nothing."""
        with self._lock:
            return [(self.source, int(row)) for row in self._order.rows(first_index, count)]

    def read(self, source: str, row: int) -> Row:
        """One checked row of a source.

        Raises:
            UsageError: no such source or row.
            DataIntegrityError: the row is damaged.
        """
        if source != self.source:
            raise UsageError(f"no source {source!r} under data.corpora; allowed: {self.source}. No row was read.")
        with self._lock:
            return self._reader.read(row)

    def token_information(self) -> torch.Tensor:
        """Information of each id of the vocabulary, from the first rows of the split in stored order: int64 [V].

        The rows are the first 4096, or all of fewer, so that it is a function of the corpus alone.
        """
        counts = np.zeros(self.manifest.vocab_size, dtype=np.int64)
        for row in range(min(_INFORMATION_ROWS, self.num_rows)):
            counts += np.bincount(self.read(self.source, row).tokens, minlength=self.manifest.vocab_size)
        counts[self.manifest.pad_token_id] = 0
        return token_information(counts.tolist())

    def eligible(self, rows: Sequence[Row]) -> torch.Tensor:
        """The tokens that may be noised and scored, by `data.score`; never padding. Bool [rows, L]."""
        tokens = np.stack([row.tokens for row in rows]) if rows else np.empty((0, self.sequence_length))
        is_eligible = torch.from_numpy(tokens.astype(np.int64)) != self.manifest.pad_token_id
        if self._scores_answers and rows:
            answers = np.stack([answered(row.documents, self.sequence_length) for row in rows])
            is_eligible &= torch.from_numpy(answers)
        return is_eligible

    def batch(self, first_index: int, global_batch_size: int, members: Sequence[int]) -> Batch:
        """This rank's share of the global batch that begins at a sample index.

        Args:
            first_index: sample index of place 0.
            global_batch_size: samples of the whole batch.
            members: places j in the global batch that this rank computes, in the order it computes them.

        Raises:
            DataIntegrityError: a row of the share is damaged; names shard, member and row.
            ValueError: a member lies outside the batch.
        """
        share = _share(first_index, global_batch_size, members)
        pending, self._pending = self._pending, None
        if pending is not None:
            if pending[0] == share:
                return pending[1].result()
            pending[1].exception()  # waits; what was not asked for, its error included, is nobody's business
        return self._read_share(share)

    def prefetch(self, first_index: int, global_batch_size: int, members: Sequence[int]) -> None:
        """Begins to read a share on a thread; `batch` with the same arguments then returns it, or raises its error."""
        share = _share(first_index, global_batch_size, members)
        if self._pending is not None:
            if self._pending[0] == share:
                return
            self._pending[1].exception()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megamask-loader")
        self._pending = (share, self._thread.submit(self._read_share, share))

    def close(self) -> None:
        """Joins the thread and closes the shards; a second call does nothing."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self._pending = None
        self._reader.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_share(self, share: _Share) -> Batch:
        with self._lock:
            of_batch = self._order.rows(share.first_index, share.global_batch_size)
            rows = [int(of_batch[place]) for place in share.members]
            self._reader.will_need(rows)
            read = [self._reader.read(row) for row in rows]
        indices = [share.first_index + place for place in share.members]
        stored = np.stack([row.tokens for row in read]) if read else np.empty((0, self.sequence_length))
        tokens = torch.from_numpy(stored.astype(np.int64))
        hashes = (
            content_hash(index, self.source_digest, row, content.tokens_crc32c, content.documents_crc32c)
            for index, row, content in zip(indices, rows, read, strict=True)
        )
        return Batch(
            tokens=tokens,
            is_eligible=self.eligible(read),
            sample_index=torch.tensor(indices, dtype=torch.int64),
            batch_position=torch.tensor(share.members, dtype=torch.int64),
            rows=[(self.source, row) for row in rows],
            content_sum=add_content(*hashes),
        )


def _share(first_index: int, global_batch_size: int, members: Sequence[int]) -> _Share:
    if first_index < 0 or any(not 0 <= place < global_batch_size for place in members):
        raise ValueError(f"members {list(members)} of a batch of {global_batch_size} from index {first_index}")
    return _Share(first_index=first_index, global_batch_size=global_batch_size, members=tuple(members))
