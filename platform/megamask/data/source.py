"""One source of a run: a split of a prepared corpus, the order of its rows, and what makes a batch of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from megamask.config.schema.data import DataConfig
from megamask.data.manifest import open_corpus
from megamask.data.order import SourceOrder, order_key
from megamask.data.reader import SplitReader
from megamask.data.remote import RemoteCorpus
from megamask.data.tokenizer import CorpusTokenizer
from megamask.errors import UsageError
from megamask.storage.ranges import is_remote


def local_folder(folder: str, data: DataConfig) -> Path:
    """The folder of a corpus, or the local copy of what is small of a remote one."""
    return RemoteCorpus(folder, data.cache_dir, data.cache_bytes).folder if is_remote(folder) else Path(folder)


def has_split(name: str, folder: str, data: DataConfig, split: str) -> bool:
    """Return whether a corpus of `data.corpora` has rows of a split; raises as `Source`."""
    splits = open_corpus(local_folder(folder, data), f"data.corpora.{name}").splits
    return split in splits and splits[split].num_rows > 0


class Source:
    """An entry of `data.corpora`, opened; for one thread at a time.

    Args:
        name: of the entry.
        folder: the prepared corpus, or the URL of one in an object store.
        data: seed and window of the order.
        sequence_length: tokens of a row (`training.sequence_length`); must be the corpus' own.
        split: which split to read.

    Raises:
        UsageError: no such folder, not a corpus, another sequence length, no such split.
        DataIntegrityError: the corpus is damaged.
    """

    def __init__(self, name: str, folder: str | Path, data: DataConfig, sequence_length: int, split: str) -> None:
        self.name = name
        self.location = str(folder)
        remote = None
        if is_remote(self.location):
            remote = RemoteCorpus(self.location, data.cache_dir, data.cache_bytes)
        self.folder = Path(folder) if remote is None else remote.folder
        self.manifest = open_corpus(self.folder, f"data.corpora.{name}")
        if self.manifest.sequence_length != sequence_length:
            raise UsageError(
                f"training.sequence_length is {sequence_length}, but the rows of data.corpora.{name} "
                f"({self.folder}) have {self.manifest.sequence_length} tokens. No batch was read.",
                hint=f"set training.sequence_length={self.manifest.sequence_length}, or prepare the corpus again",
            )
        if split not in self.manifest.splits or self.manifest.splits[split].num_rows == 0:
            raise UsageError(
                f"data.corpora.{name} ({self.folder}) has no split {split!r} with rows; "
                f"it has: {', '.join(sorted(self.manifest.splits))}. No batch was read.",
                hint="prepare the corpus with documents for that split (corpus.validation_fraction)",
            )
        self.digest = self.manifest.source_digest(split)
        self.reader = SplitReader(
            self.folder, self.manifest, split, window_blocks=data.shuffle_window_blocks, remote=remote
        )
        key = order_key(data.seed, self.digest, split)
        self.order = SourceOrder(self.reader.blocks, key=key, window_blocks=data.shuffle_window_blocks)

    @cached_property
    def tokenizer(self) -> CorpusTokenizer:
        """The tokenizer that made the corpus."""
        return CorpusTokenizer.load(self.folder / "tokenizer")
