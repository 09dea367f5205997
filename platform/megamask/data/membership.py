"""Location of a document: its rows, and the samples of a run that read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamask.data.corpus.documents import DocumentRecord, read_documents
from megamask.data.loader import Loader
from megamask.data.manifest import Manifest, open_corpus
from megamask.data.reader import SplitReader
from megamask.data.roles import document_of


@dataclass(frozen=True, kw_only=True)
class Membership:
    """A document of a corpus and the rows of its split that have tokens of it, ascending."""

    document: DocumentRecord
    rows: Sequence[int]


def find_documents(folder: Path, *, number: int | None = None, text: bytes | None = None) -> list[Membership]:
    """The document of a number, or all whose text is exactly this.

    Where documents follow one another their rows are a sum of lengths; where rows were packed by best fit, the document
    tables of all shard blocks are read.

    Args:
        folder: the corpus.
        number: of a document.
        text: UTF-8 bytes.

    Raises:
        UsageError: the folder is not a corpus.
        DataIntegrityError: its manifest, its table of documents or a shard that was read is damaged.
    """
    manifest = open_corpus(folder, "the corpus")
    wanted = None if text is None else hashlib.sha256(text).hexdigest()
    found: list[tuple[DocumentRecord, int]] = []
    position: dict[str, int] = {}
    tables = [(table["name"], table["documents"]) for table in manifest.content["documents"]["tables"]]
    for record in read_documents(folder, tables):
        first = position.get(record.split, 0)
        position[record.split] = first + record.tokens
        if record.number == number or (wanted is not None and record.text_sha256 == wanted):
            found.append((record, first))
    if manifest.content["packer"]["name"] == "concatenate-and-cut":
        length = manifest.sequence_length
        return [
            Membership(document=record, rows=range(first // length, (first + record.tokens - 1) // length + 1))
            for record, first in found
        ]
    return _listed(folder, manifest, [record for record, _ in found])


def _listed(folder: Path, manifest: Manifest, records: Sequence[DocumentRecord]) -> list[Membership]:
    """The rows that list each document, from the document tables of the shard blocks."""
    rows: dict[int, list[int]] = {record.number: [] for record in records}
    numbers = np.array(sorted(rows), dtype=np.int64)
    for split in {record.split for record in records}:
        reader = SplitReader(folder, manifest, split)
        for block, first in enumerate(reader.blocks.first_row[:-1].tolist()):
            table = reader.document_table(block)
            listed = document_of(table[:, 2])
            is_wanted = np.isin(listed, numbers)
            for row, number in zip(table[is_wanted, 0].tolist(), listed[is_wanted].tolist(), strict=True):
                rows[number].append(first + row)
        reader.close()
    return [Membership(document=record, rows=sorted(set(rows[record.number]))) for record in records]


def samples_of_row(loader: Loader, source: str, row: int, num_samples: int) -> Iterator[int]:
    """The sample indices below `num_samples` that read a row of a source, ascending."""
    order = loader.sources[source].order
    drawn = loader.consumed(num_samples)[source]
    for epoch in range(-(-drawn // order.num_rows)):
        draw = epoch * order.num_rows + order.place_of(row, epoch)
        if draw < drawn:
            yield _sample_of_draw(loader, source, draw, num_samples)


def _sample_of_draw(loader: Loader, source: str, draw: int, num_samples: int) -> int:
    """The sample that takes a draw: the largest index before which the source had at most so many."""
    low, high = 0, num_samples - 1
    while low < high:
        middle = (low + high + 1) // 2
        if loader.consumed(middle)[source] <= draw:
            low = middle
        else:
            high = middle - 1
    return low
