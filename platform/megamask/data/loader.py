"""Batches of a run: the rows that the order law names, read and checked.

The batch of a step is the B positions from `consumed_samples` on, which are sample indices unless the run leaves some
out (data/skipped.py); each rank asks for the members that its coordinate computes. Nothing here knows of ranks or
processes, and nothing is carried from batch to batch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch

from megamask.config.schema.data import DataConfig
from megamask.data.content import add_content, content_hash
from megamask.data.mixture import Mixture, stages_of
from megamask.data.quarantine import quarantined_rows
from megamask.data.roles import answered
from megamask.data.row_batch import Row, RowBatch
from megamask.data.skipped import SKIPS_NOTHING, SkippedSamples
from megamask.data.source import Source
from megamask.data.tokenizer import CorpusTokenizer
from megamask.diffusion.spindle import token_information
from megamask.errors import UsageError

_INFORMATION_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a global batch; b members, L tokens each, in the order the members were given."""

    tokens: torch.Tensor  # uint16 or uint32 [b, L] as stored, clean ids, padding included; widened on the device
    is_eligible: torch.Tensor  # bool [b, L]: every real token, end-of-document included; not padding
    sample_index: torch.Tensor  # int64 [b], global
    batch_position: torch.Tensor  # int64 [b], position j in the global batch
    rows: list[tuple[str, int]]  # (source, row) of each member
    content_sum: int  # sum modulo 2^64 of the members' content hashes


@dataclass(frozen=True, kw_only=True)
class _Share:
    position: int
    global_batch_size: int
    members: tuple[int, ...]


class Loader:
    """Reader of a run's batches; usable with and without torch.distributed.

    Args:
        corpora: name -> folder of a prepared corpus; several are mixed according to `data.mixture`.
        data: seed and window of the order, mixture, quarantine.
        sequence_length: tokens of a row (`training.sequence_length`); must be the corpora's own.
        split: which split to read.

    Attributes:
        sources: by name, in the order of `corpora`.
        mixture: which source and draw each sample index has.
        pins_memory: batches are made in pinned memory, by the thread that reads ahead, so that the device copies them
            beside its work; for a CUDA device alone.

    Raises:
        UsageError: no such folder, not a corpus, another sequence length, no such split, corpora of different
            tokenizers or without a mixture, a quarantined row that does not exist.
        DataIntegrityError: a corpus is damaged.
    """

    def __init__(
        self, corpora: Mapping[str, str], data: DataConfig, sequence_length: int, split: str = "train"
    ) -> None:
        if not corpora or (len(corpora) > 1 and not data.mixture):
            raise UsageError(
                f"data.corpora has {len(corpora)} entries ({', '.join(corpora) or 'none'}) and data.mixture has "
                f"{len(data.mixture)} stages. No batch was read.",
                hint="give one entry under data.corpora, or weights for each in data.mixture",
            )
        self.sequence_length = sequence_length
        self.sources = {name: Source(name, folder, data, sequence_length, split) for name, folder in corpora.items()}
        self._by_number = list(self.sources.values())
        _refuse_other_tokenizers(self._by_number)
        first = self._by_number[0]
        self.source, self.folder, self.manifest = first.name, first.folder, first.manifest
        self.corpus_ids = {name: source.manifest.corpus_id for name, source in self.sources.items()}
        stages = stages_of(data.mixture, list(corpora), sequence_length)
        self.mixture = Mixture(list(corpora), stages, data.seed)
        self._accounts = Mixture(list(corpora), stages, data.seed)  # for the training thread, which waits for no lock
        self.skipped = SKIPS_NOTHING
        self.pins_memory = False
        self.quarantined = quarantined_rows(data.quarantine, self.sources) if split == "train" else {}
        self._scores_answers = data.score == "answers"
        for name, source in self.sources.items():
            if self._scores_answers and "chat_template_sha256" not in source.manifest.content["options"]:
                raise UsageError(
                    f"data.score is answers, but data.corpora.{name} ({source.location}) holds no conversations. "
                    "No batch was read.",
                    hint="set data.score=all, or prepare the corpus from inputs of the format messages",
                )
        self._lock = threading.Lock()  # order and reader serve one thread at a time
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[_Share, Future[Batch]]] = deque()

    @property
    def source_digest(self) -> str:
        """Digest of the first source's split."""
        return self._by_number[0].digest

    @property
    def tokenizer(self) -> CorpusTokenizer:
        """The tokenizer that made the corpora."""
        return self._by_number[0].tokenizer

    @property
    def num_rows(self) -> int:
        """Number of rows of one epoch of all sources together."""
        return sum(source.order.num_rows for source in self._by_number)

    def leave_out(self, skipped: SkippedSamples) -> None:
        """Use none of these sample indices from now on; what was read ahead is dropped."""
        while self._pending:
            self._pending.popleft()[1].exception()
        self.skipped = skipped

    def rows(self, position: int, count: int) -> list[tuple[str, int]]:
        """(source, row) of `count` samples from a position of the run on; reads nothing."""
        with self._lock:
            _, numbers, rows = self._at(position, count)
        names = [source.name for source in self._by_number]
        return [(names[number], row) for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)]

    def _at(
        self, position: int, count: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Sample indices, numbers of the sources, and rows, from a position of the run on: int64 [count] each."""
        segments = self.skipped.segments(position, count)
        found = [self._rows(each.start, len(each)) for each in segments]
        indices = np.concatenate([np.arange(each.start, each.stop, dtype=np.int64) for each in segments])
        return indices, np.concatenate([numbers for numbers, _ in found]), np.concatenate([rows for _, rows in found])

    def _rows(self, first_index: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Numbers of the sources, and rows, of consecutive sample indices: two int64 arrays [count]."""
        numbers, draws = self.mixture.draws(first_index, count)
        rows = np.empty(count, dtype=np.int64)
        for number in np.unique(numbers).tolist():
            is_here = numbers == number
            own = draws[is_here]  # consecutive, because the indices are
            rows[is_here] = self._by_number[number].order.rows(int(own[0]), len(own))
        return numbers, rows

    def read(self, source: str, row: int) -> Row:
        """One checked row of a source.

        Raises:
            UsageError: no such source or row.
            DataIntegrityError: the row is damaged.
        """
        if source not in self.sources:
            names = ", ".join(self.sources)
            raise UsageError(f"no source {source!r} under data.corpora; allowed: {names}. No row was read.")
        with self._lock:
            return self._read_rows(self.sources[source], np.array([row], dtype=np.int64)).row(0)

    def consumed(self, num_samples: int) -> dict[str, int]:
        """Return the number of samples of each source among the first `num_samples` of the run."""
        end = self.skipped.index(num_samples - 1) + 1 if num_samples else 0
        counts = self._accounts.consumed(end)
        for each in self.skipped.ranges:
            if each.start < end:
                first, last = self._accounts.consumed(each.start), self._accounts.consumed(each.stop)
                counts = {name: count - last[name] + first[name] for name, count in counts.items()}
        return counts

    def content_hash(self, index: int, source: str, row: int, content: Row) -> int:
        """A sample's part of its batch's content digest."""
        digest = self.sources[source].digest
        return content_hash(index, digest, row, content.tokens_crc32c, content.documents_crc32c)

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

    def batch(self, position: int, global_batch_size: int, members: Sequence[int]) -> Batch:
        """Return this rank's share of the global batch that begins at a position of the run.

        Args:
            position: of place 0, counted over the samples that the run uses.
            global_batch_size: samples of the global batch.
            members: places j in the global batch that this rank computes, in the order it computes them.

        Raises:
            DataIntegrityError: a row of the share is damaged; names shard, member and row.
            ValueError: a member lies outside the batch.
        """
        share = _share(position, global_batch_size, members)
        while self._pending:
            ahead, batch = self._pending.popleft()
            if ahead == share:
                return batch.result()
            batch.exception()  # waits; an error of a share that was not asked for is dropped with it
        return self._read_share(share)

    def prefetch(self, position: int, global_batch_size: int, members: Sequence[int]) -> None:
        """Begin to read a share on a thread; `batch` with the same arguments then returns it, or raises its error.

        Shares are read in the order of the calls, and `batch` takes them in that order: asking for another one drops
        those before it. The caller bounds how many wait; each takes its rows' bytes in the stored type.
        """
        share = _share(position, global_batch_size, members)
        if any(ahead == share for ahead, _ in self._pending):
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megamask-loader")
        self._pending.append((share, self._thread.submit(self._read_share, share, announce=True)))

    def close(self) -> None:
        """Join the thread and close the shards; a second call does nothing."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self._pending.clear()
        for source in self._by_number:
            source.reader.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_share(self, share: _Share, *, announce: bool = False) -> Batch:
        places = np.array(share.members, dtype=np.int64)
        with self._lock:
            everything = self._at(share.position, share.global_batch_size)
            indices, numbers, rows = (values[places] for values in everything)
            tokens = np.empty((len(places), self.sequence_length), dtype=self.manifest.dtype)
            answers = np.ones(tokens.shape, dtype=np.bool_) if self._scores_answers else None
            hashes: list[int] = []
            for number in np.unique(numbers).tolist():
                source, mine = self._by_number[number], np.flatnonzero(numbers == number)
                if announce:
                    source.reader.will_need(self._readable(source, rows[mine]))
                read = self._read_rows(source, rows[mine])
                if len(mine) == len(tokens):
                    tokens = read.tokens  # one source has all of them, in this order
                else:
                    tokens[mine] = read.tokens
                if answers is not None:
                    answers[mine] = [answered(pairs, self.sequence_length) for pairs in read.documents]
                hashes += map(
                    content_hash,
                    indices[mine].tolist(),
                    repeat(source.digest),
                    rows[mine].tolist(),
                    read.tokens_crc32c,
                    read.documents_crc32c,
                )
        is_eligible = tokens != self.manifest.pad_token_id
        if answers is not None:
            is_eligible &= answers
        names = [source.name for source in self._by_number]
        on_host = [torch.from_numpy(values) for values in (tokens, is_eligible, indices)]
        if self.pins_memory:
            on_host = [values.pin_memory() for values in on_host]
        return Batch(
            tokens=on_host[0],
            is_eligible=on_host[1],
            sample_index=on_host[2],
            batch_position=torch.from_numpy(places),
            rows=[(names[number], row) for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)],
            content_sum=add_content(*hashes),
        )

    def _readable(self, source: Source, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows that are not quarantined."""
        excluded = self.quarantined.get(source.name)
        return rows if excluded is None else rows[~np.isin(rows, excluded)]

    def _read_rows(self, source: Source, rows: npt.NDArray[np.int64]) -> RowBatch:
        """Read rows of a source; a quarantined one is not read: it is all padding, without documents, checksums 0."""
        excluded = self.quarantined.get(source.name)
        if excluded is None or not np.isin(rows, excluded).any():
            return source.reader.read_rows(rows)
        read = source.reader.read_rows(self._readable(source, rows))
        return read.spread(~np.isin(rows, excluded), fill=self.manifest.pad_token_id)


def _refuse_other_tokenizers(sources: Sequence[Source]) -> None:
    """Raise unless all sources have the same tokenizer."""
    for source in sources[1:]:
        if source.manifest.tokenizer_digest != sources[0].manifest.tokenizer_digest:
            raise UsageError(
                f"data.corpora.{source.name} has tokenizer {source.manifest.tokenizer_digest}, "
                f"data.corpora.{sources[0].name} has {sources[0].manifest.tokenizer_digest}. No batch was read.",
                hint="prepare the corpora with the same corpus.tokenizer.path",
            )


def _share(position: int, global_batch_size: int, members: Sequence[int]) -> _Share:
    if position < 0 or any(not 0 <= place < global_batch_size for place in members):
        raise ValueError(f"members {list(members)} of a batch of {global_batch_size} from position {position}")
    return _Share(position=position, global_batch_size=global_batch_size, members=tuple(members))
