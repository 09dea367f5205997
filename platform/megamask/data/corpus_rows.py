"""A corpus as a sequence of rows: `Corpus.open(ROOT)[row]` gives one row's token ids as a NumPy array."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any, SupportsIndex

import numpy.typing as npt

from megamask.data.manifest import Manifest, open_corpus
from megamask.data.reader import SplitReader
from megamask.data.remote import RemoteCorpus
from megamask.storage.ranges import is_remote


class Corpus:
    """The rows of one split of a prepared corpus, checked on every read; for one thread at a time.

    Rows are numbered through the shards in name order, which is not the order in which a run reads them. A process
    that inherits or receives one opens its own files.

    Args:
        root: the corpus folder, or its URL in an object store.
        manifest: its manifest.
        split: "train" or "validation".
    """

    def __init__(self, root: str | Path, manifest: Manifest, split: str = "train") -> None:
        self.manifest = manifest
        self._root = root
        self._split = split
        remote = RemoteCorpus(str(root)) if is_remote(str(root)) else None
        self._reader = SplitReader(root if remote is None else remote.folder, manifest, split, remote=remote)

    @classmethod
    def open(cls, root: str | Path, split: str = "train") -> Corpus:
        """Open a corpus by its folder.

        Raises:
            UsageError: the folder is not a corpus, or has no such split.
            DataIntegrityError: its manifest is damaged, or a shard is missing.
        """
        folder = RemoteCorpus(str(root)).folder if is_remote(str(root)) else Path(root)
        return cls(root, open_corpus(folder, "the corpus"), split)

    def __len__(self) -> int:
        return self._reader.num_rows

    def __getitem__(self, row: SupportsIndex) -> npt.NDArray[Any]:
        """Token ids of a row, [L] uint16 or uint32; negative numbers count from the end.

        Raises:
            IndexError: the split has no such row.
            DataIntegrityError: the row, or the index of its shard, is damaged.
        """
        number = operator.index(row)
        return self._reader.read(number + len(self) if number < 0 else number).tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return (Corpus, (self._root, self.manifest, self._split))
