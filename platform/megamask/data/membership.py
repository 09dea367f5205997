"""Location of a document: its rows, and the samples of a run that read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megamask.data.corpus.documents import DocumentRecord, read_documents
from megamask.data.loader import Loader
from megamask.data.manifest import open_corpus
from megamask.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Membership:
    """A document of a corpus and the rows of its split that have tokens of it: first_row to last_row."""

    document: DocumentRecord
    first_row: int
    last_row: int


def find_documents(folder: Path, *, number: int | None = None, text: bytes | None = None) -> list[Membership]:
    """The document of a number, or all whose text is exactly this.

    Args:
        folder: the corpus.
        number: of a document.
        text: UTF-8 bytes.

    Raises:
        UsageError: the folder is not a corpus.
        DataIntegrityError: its manifest or table of documents is damaged.
    """
    manifest = open_corpus(folder, "the corpus")
    if manifest.content["packer"]["name"] != "concatenate-and-cut":
        raise UsageError(
            f"{folder} was packed by {manifest.content['packer']['name']}, in which a document's rows do not follow "
            "from the lengths of those before it. Nothing was found."
        )
    wanted = None if text is None else hashlib.sha256(text).hexdigest()
    found: list[Membership] = []
    position: dict[str, int] = {}
    tables = [(table["name"], table["documents"]) for table in manifest.content["documents"]["tables"]]
    for record in read_documents(folder, tables):
        first = position.get(record.split, 0)
        position[record.split] = first + record.tokens
        if record.number == number or (wanted is not None and record.text_sha256 == wanted):
            last = first + record.tokens - 1
            length = manifest.sequence_length
            found.append(Membership(document=record, first_row=first // length, last_row=last // length))
    return found


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
