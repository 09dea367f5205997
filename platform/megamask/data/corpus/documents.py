"""The documents table: from a document's number back to the bytes it came from.

`documents/NNNNNN.parquet`, a million documents each, in number order, with the columns

    number         int64, from 0, through the inputs in order
    input          string, the input's name in the manifest
    input_sha256   string, hex, of the complete input file
    offset, bytes  int64, the document's raw bytes in the input (a .jsonl line without its newline)
    text_bytes     int64, UTF-8 bytes of the text
    text_sha256    string, hex, of the text's UTF-8 bytes
    split          string, "train" or "validation"
    tokens         int64, end-of-document included

The digest in the manifest is of this content, not of the Parquet bytes, because a Parquet file names the library that
wrote it: sha256 of one canonical JSON array a row (the columns in the order above, newline included), row after row.
With the same library the files are byte-identical too.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megamask.data.corpus.splits import TRAIN, VALIDATION, split_hash
from megamask.errors import DataIntegrityError
from megamask.storage.durable import fsync_file
from megamask.storage.hashing import canonical_json
from megamask.storage.plain_files import open_plain

DOCUMENTS_DIR = "documents"
ROWS_PER_TABLE = 1_000_000

_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
        pa.field("input_sha256", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("text_bytes", pa.int64(), nullable=False),
        pa.field("text_sha256", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class DocumentRecord:
    """One row of the documents table, in column order."""

    number: int
    input: str
    input_sha256: str
    offset: int
    bytes: int
    text_bytes: int
    text_sha256: str
    split: str
    tokens: int


class DocumentList:
    """Facts about each document while a corpus is prepared: about 80 bytes of memory a document."""

    def __init__(self) -> None:
        self.input_index = array("q")
        self.offset = array("q")
        self.bytes = array("q")
        self.text_bytes = array("q")
        self.tokens = array("q")
        self.dropped_by = array("b")  # number of the filter that dropped it, or -1
        self.signatures: list[npt.NDArray[np.uint32]] = []  # MinHash of each, where near duplicates are looked for
        self._sha256 = bytearray()
        self.is_validation: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)

    def __len__(self) -> int:
        return len(self.offset)

    def append(self, *, input_index: int, offset: int, num_bytes: int, text: bytes, dropped_by: int = -1) -> None:
        """Append the next document.

        Args:
            input_index: place of its file in the inputs.
            offset, num_bytes: its raw bytes in that file.
            text: its text in UTF-8.
            dropped_by: number of the filter that drops it, or -1.
        """
        self.input_index.append(input_index)
        self.offset.append(offset)
        self.bytes.append(num_bytes)
        self.text_bytes.append(len(text))
        self.dropped_by.append(dropped_by)
        self._sha256 += hashlib.sha256(text).digest()

    def subset(self, is_taken: npt.NDArray[np.bool_]) -> DocumentList:
        """The documents of a mask bool [n], numbered anew; without splits and token counts."""
        if is_taken.all():
            return self
        taken = DocumentList()
        for name in ("input_index", "offset", "bytes", "text_bytes"):
            values = np.array(getattr(self, name), dtype=np.int64)[is_taken]
            setattr(taken, name, array("q", values.tobytes()))
        taken.dropped_by = array("b", [-1]) * len(taken.offset)
        digests = np.frombuffer(bytes(self._sha256), dtype=np.uint8).reshape(-1, 32)
        taken._sha256 = bytearray(digests[is_taken].tobytes())
        return taken

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything but splits and tokens, for `extend`."""
        names = ("input_index", "offset", "bytes", "text_bytes")
        arrays = {name: np.array(getattr(self, name), dtype="<i8") for name in names}
        arrays["dropped_by"] = np.array(self.dropped_by, dtype="<i1")
        arrays["sha256"] = np.frombuffer(bytes(self._sha256), dtype=np.uint8)
        if self.signatures:
            arrays["signatures"] = np.stack(self.signatures)
        return arrays

    def extend(self, arrays: Mapping[str, npt.NDArray[Any]], *, first_input: int) -> None:
        """Append documents of `to_arrays`, whose inputs are counted from `first_input`."""
        self.input_index.extend((arrays["input_index"] + first_input).tolist())
        for name in ("offset", "bytes", "text_bytes", "dropped_by"):
            getattr(self, name).extend(arrays[name].tolist())
        self._sha256 += arrays["sha256"].tobytes()
        self.signatures.extend(arrays.get("signatures", ()))

    def text_sha256(self, number: int) -> bytes:
        """The 32 bytes of a document's text digest."""
        return bytes(self._sha256[32 * number : 32 * number + 32])

    def split_hashes(self) -> list[int]:
        """`split_hash` of every document."""
        return [split_hash(self.text_sha256(number)) for number in range(len(self))]

    def split_of(self, number: int) -> str:
        """The split of a document."""
        return VALIDATION if self.is_validation[number] else TRAIN

    def records(self, inputs: Sequence[tuple[str, str]]) -> Iterator[DocumentRecord]:
        """The rows of the table.

        Args:
            inputs: (name, sha256) of each input.
        """
        for number in range(len(self)):
            name, sha256 = inputs[self.input_index[number]]
            yield DocumentRecord(
                number=number,
                input=name,
                input_sha256=sha256,
                offset=self.offset[number],
                bytes=self.bytes[number],
                text_bytes=self.text_bytes[number],
                text_sha256=self.text_sha256(number).hex(),
                split=self.split_of(number),
                tokens=self.tokens[number],
            )


def documents_digest(records: Iterable[DocumentRecord]) -> str:
    """sha256 over the canonical JSON array of each row, in order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(canonical_json(list(astuple(record))))
    return digest.hexdigest()


def write_documents(folder: Path, records: Iterable[DocumentRecord]) -> tuple[str, list[tuple[str, int]]]:
    """Write the table under `<folder>/documents/` and flush it.

    Returns:
        the content's digest, and (relative name, documents) of each file.
    """
    digest = hashlib.sha256()
    tables: list[tuple[str, int]] = []
    pending: list[DocumentRecord] = []

    def flush() -> None:
        name = f"{DOCUMENTS_DIR}/{len(tables):06d}.parquet"
        _write_table(folder / name, pending)
        tables.append((name, len(pending)))
        pending.clear()

    for record in records:
        digest.update(canonical_json(list(astuple(record))))
        pending.append(record)
        if len(pending) == ROWS_PER_TABLE:
            flush()
    if pending:
        flush()
    return digest.hexdigest(), tables


def _write_table(path: Path, records: Sequence[DocumentRecord]) -> None:
    columns = {field.name: [getattr(record, field.name) for record in records] for field in _SCHEMA}
    table = pa.table(columns, schema=_SCHEMA)
    with path.open("xb") as file:  # a Python file, so that a full disk arrives as OSError with its errno
        pq.write_table(
            table,
            file,
            version="2.6",
            data_page_version="1.0",
            compression="zstd",
            compression_level=3,
            use_dictionary=["input", "input_sha256", "split"],
            row_group_size=100_000,
            write_statistics=True,
            store_schema=False,
            write_page_checksum=True,
        )
    fsync_file(path)


def read_documents(corpus_dir: str | Path, tables: Iterable[tuple[str, int | None]]) -> Iterator[DocumentRecord]:
    """The rows of a corpus' documents table, in order.

    Args:
        corpus_dir: the corpus folder.
        tables: relative name of each Parquet file and its number of rows, as in the manifest; None is any number.

    Raises:
        DataIntegrityError: a file is missing, a link, damaged, or has other columns or another number of rows.
    """
    for name, num_rows in tables:
        path = Path(corpus_dir) / name
        try:
            with (
                os.fdopen(open_plain(path), "rb") as plain,
                pq.ParquetFile(plain, page_checksum_verification=True) as file,
            ):
                yield from _rows(file, num_rows)
        except (OSError, ValueError, TypeError, MemoryError, OverflowError, pa.ArrowException) as error:
            raise DataIntegrityError(
                f"{path}: the documents table cannot be read ({error}). No sample was used.",
                hint="restore the file or prepare the corpus again",
            ) from error


def _rows(file: pq.ParquetFile, num_rows: int | None) -> Iterator[DocumentRecord]:
    if not file.schema_arrow.equals(_SCHEMA):
        raise ValueError(f"its columns are {file.schema_arrow.names}, or their types are others")
    stated = file.metadata.num_rows
    if num_rows is not None and stated != num_rows:
        raise ValueError(f"it has {stated} rows, the manifest has {num_rows}")
    count = 0
    for batch in file.iter_batches():
        count += len(batch)
        if count > stated:
            break
        for row in batch.to_pylist():
            yield DocumentRecord(**row)
    if count != stated:
        raise ValueError(f"it states {stated} rows and has others")
