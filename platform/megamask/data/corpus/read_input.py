"""The documents of one input file, in order, with the digest of the file.

    text         the content is one document: its bytes as UTF-8, no newline translated, no byte order mark removed
    jsonl        one JSON object a line, the string under the text key; lines of white space alone are skipped
    json         one JSON object, or an array of them; a list of strings under the text key is joined by newlines
    parquet      one document a row of the text column
    messages     one conversation a line: the list of {"role", "content"} under the text key, by default "messages"
    webdataset   one document a sample of a tar: its member with the suffix of the text key, .txt by default
    megatron     one document of a .bin/.idx pair, decoded by the entry's tokenizer; the digest is of .bin, then .idx

A .gz or .zst suffix is taken off first; places in the file are then places in what it unpacks to.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from megamask.data.corpus.chat import conversation
from megamask.data.corpus.inputs import NOTHING_WRITTEN, InputFile
from megamask.data.corpus.megatron_input import MegatronError, index_of, megatron_documents, writing_tokenizer
from megamask.data.corpus.tar_documents import TarError, tar_documents
from megamask.errors import DataIntegrityError, UsageError

_PIECE = 1 << 16
_PARQUET_ROWS = 256
# UTF-16 text of any language that uses spaces and digits has far more zero bytes than this; UTF-8 text has none.
_MAX_NULS = 8  # one byte in so many


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """A document's text and its place in the (unpacked) input.

    Args:
        text: what is encoded.
        offset, bytes: the raw bytes that hold it: a line without its newline, a tar member's content, or the file.
            For parquet and json: the row number, and the UTF-8 bytes of the text.
    """

    text: str
    offset: int
    bytes: int


class _HashingFile(RawIOBase):
    """File that hashes every byte read from it and reports their number."""

    def __init__(self, file: IO[bytes], on_bytes: Callable[[bytes], None]) -> None:
        super().__init__()
        self._file = file
        self._on_bytes = on_bytes

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._on_bytes(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class InputReader:
    """Read one input's documents in order and hash the file on the way.

    Args:
        file: the input.
        jsonl_text_key: `corpus.jsonl_text_key`, for inputs without a text key of their own.
        on_bytes: called with the number of bytes read, for progress.
        part: read only the documents whose lines begin in these bytes of a file of lines; the digest is of the bytes.
        keeps_broken: return text that is not Unicode with half surrogate pairs in the places of what is wrong, instead
            of raising.
    """

    def __init__(
        self,
        file: InputFile,
        jsonl_text_key: str,
        on_bytes: Callable[[int], None] = lambda count: None,
        *,
        part: range | None = None,
        keeps_broken: bool = False,
    ) -> None:
        self._part = part
        self._keeps_broken = keeps_broken
        self._file = file
        self._where = str(file.path)
        own_keys = {"webdataset": "txt", "messages": "messages"}
        self._key = file.text_key(own_keys.get(file.format, jsonl_text_key))
        self._on_bytes = on_bytes
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        """Digest of the bytes read so far; of the complete file once `documents` is exhausted."""
        return self._sha256.hexdigest()

    def documents(self) -> Iterator[RawDocument]:
        """The documents in file order; lines and rows are read one by one, a text at once.

        Raises:
            DataIntegrityError: the file does not have the stated format; names file and line, row or byte.
            UsageError: the file cannot be opened.
        """
        with reading(self._file.path):
            match self._file.format:
                case "parquet":
                    yield from self._parquet()
                case "webdataset":
                    yield from self._webdataset()
                case "megatron":
                    yield from self._megatron()
                case "jsonl" | "messages" if self._part is not None:
                    yield from self._lines_of_part(self._part)
                case "jsonl" | "messages":
                    with self._unpacked() as file:
                        yield from self._lines(file)
                case "json":
                    with self._unpacked() as file:
                        yield from self._json(file.read())
                case _:
                    with self._unpacked() as file:
                        data = file.read()
                    yield RawDocument(text=self._decode(data, self._where), offset=0, bytes=len(data))

    def _count(self, data: bytes) -> None:
        self._sha256.update(data)
        self.num_bytes += len(data)
        self._on_bytes(len(data))

    @contextlib.contextmanager
    def _unpacked(self) -> Iterator[IO[bytes]]:
        """The content of the file without its compression; what is left of the file is hashed at the end."""
        compression = self._file.compression
        with self._file.path.open("rb") as plain:
            hashing: Any = _HashingFile(plain, self._count)
            try:
                if compression is None:
                    yield _buffered(hashing)
                elif compression == "gz":
                    with gzip.open(hashing, "rb") as file:
                        yield file
                else:
                    with pa.CompressedInputStream(pa.PythonFile(hashing, mode="r"), "zstd") as stream:
                        yield _buffered(stream)
            except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException) as error:
                raise _bad(f"{self._where}: the compressed data is damaged ({error})") from error
            except OSError as error:
                if compression != "zst" or error.errno is not None:
                    raise
                raise _bad(f"{self._where}: the compressed data is damaged ({error})") from error
            while hashing.read(_PIECE):
                pass

    def _lines(self, file: IO[bytes]) -> Iterator[RawDocument]:
        offset = 0
        for number, line in enumerate(file, start=1):
            raw = line.removesuffix(b"\n")
            if raw.strip():
                where = f"{self._where}:{number}"
                text = self._text_of(_parse(self._decode(raw, where), where), where, "line")
                yield RawDocument(text=text, offset=offset, bytes=len(raw))
            offset += len(line)

    def _lines_of_part(self, part: range) -> Iterator[RawDocument]:
        with self._file.path.open("rb") as file:
            for data in _pieces(file, part):
                self._count(data)
            file.seek(max(part.start - 1, 0))
            if part.start:
                file.readline()  # the rest of a line that began before, or the end of one that ends there
            while (offset := file.tell()) < part.stop:
                raw = file.readline().removesuffix(b"\n")
                if raw.strip():
                    where = f"{self._where}, byte {offset}"
                    text = self._text_of(_parse(self._decode(raw, where), where), where, "line")
                    yield RawDocument(text=text, offset=offset, bytes=len(raw))

    def _json(self, data: bytes) -> Iterator[RawDocument]:
        value = _parse(self._decode(data, self._where), self._where)
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            where = f"{self._where}, item {number}"
            if isinstance(item, dict) and isinstance(item.get(self._key), list):
                parts = item[self._key]
                if all(isinstance(part, str) for part in parts):
                    item = item | {self._key: "\n".join(parts)}  # noqa: PLW2901
            text = self._text_of(item, where, "item")
            yield RawDocument(text=text, offset=number, bytes=len(text_bytes(text)))

    def _parquet(self) -> Iterator[RawDocument]:
        with self._file.path.open("rb") as plain:  # the footer is at the end: hash first, then read in any order
            while data := plain.read(_PIECE):
                self._count(data)
        try:
            with pq.ParquetFile(self._file.path, page_checksum_verification=True) as file:
                if self._key not in file.schema_arrow.names:
                    raise _bad(
                        f"{self._where}: no column {self._key!r} (text_key); it has: {file.schema_arrow.names[:20]}"
                    )
                row = 0
                for batch in file.iter_batches(_PARQUET_ROWS, columns=[self._key]):
                    for value in batch.column(0).to_pylist():
                        text = self._text_of({self._key: value}, f"{self._where}, row {row}", "row")
                        yield RawDocument(text=text, offset=row, bytes=len(text_bytes(text)))
                        row += 1
        except (pa.ArrowException, ValueError) as error:
            raise _bad(f"{self._where}: the Parquet file cannot be read ({error})") from error

    def _webdataset(self) -> Iterator[RawDocument]:
        if self._file.compression is not None:
            raise _bad(f"{self._where}: a compressed tar has no places to read from; unpack it to .tar first")
        with self._file.path.open("rb") as plain:
            while data := plain.read(_PIECE):
                self._count(data)
            plain.seek(0)
            try:
                for member in tar_documents(plain, self._key):
                    text = self._decode(member.data, f"{self._where}, sample {member.key}")
                    yield RawDocument(text=text, offset=member.offset, bytes=len(member.data))
            except TarError as error:
                raise _bad(f"{self._where}: {error}") from error

    def _megatron(self) -> Iterator[RawDocument]:
        path, tokenizer = self._file.path, writing_tokenizer(str(self._file.entry.tokenizer))
        if not index_of(path).is_file():
            raise _bad(f"{index_of(path)} is missing; it belongs beside {path.name}")
        for part in (path, index_of(path)):
            with part.open("rb") as plain:
                while data := plain.read(_PIECE):
                    self._count(data)
        try:
            for document in megatron_documents(path, tokenizer):
                yield RawDocument(text=document.text, offset=document.offset, bytes=document.bytes)
        except MegatronError as error:
            raise _bad(f"{self._where}: {error}") from error

    def _text_of(self, value: Any, where: str, what: str) -> str:
        if not isinstance(value, dict):
            raise _bad(f"{where}: the {what} is not a JSON object")
        if self._key not in value:
            raise _bad(f"{where}: the object has no key {self._key!r} (corpus.jsonl_text_key or text_key)")
        text = value[self._key]
        if self._file.format == "messages":
            text = conversation(text, where)
        if not isinstance(text, str):
            raise _bad(f"{where}: the value of {self._key!r} is {type(text).__name__}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if not self._keeps_broken:
                raise _bad(f"{where}: the text holds half a surrogate pair at character {error.start}") from error
        return text

    def _decode(self, data: bytes, where: str) -> str:
        return _decode(data, where, errors="surrogateescape" if self._keeps_broken else "strict")


def text_bytes(text: str) -> bytes:
    """Return the UTF-8 bytes of a text; half surrogate pairs of broken ones are encoded as if they were characters."""
    return text.encode(errors="surrogatepass")


def part_digests(path: Path, first: range) -> list[str]:
    """Return the sha256 of each part of a file, all as long as the first but the last, then that of the file."""
    digests, complete = [], hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        for begin in range(0, size, first.stop):
            own = hashlib.sha256()
            for data in _pieces(file, range(begin, min(begin + first.stop, size))):
                own.update(data)
                complete.update(data)
            digests.append(own.hexdigest())
    return [*digests, complete.hexdigest()]


def _pieces(file: IO[bytes], part: range) -> Iterator[bytes]:
    """The bytes of a part of a file, in pieces."""
    file.seek(part.start)
    left = len(part)
    while left and (data := file.read(min(_PIECE, left))):
        left -= len(data)
        yield data


def _buffered(file: Any) -> IO[bytes]:
    return BufferedReader(file, _PIECE)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise _bad(f"{where}: an object has the key {error.args[0]!r} twice, so its value is ambiguous") from error
    except (ValueError, RecursionError) as error:
        raise _bad(f"{where}: not a JSON value ({error})") from error


class _DuplicateKeyError(Exception):
    """The argument is the key."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _DuplicateKeyError(counts.most_common(1)[0][0])
    return value


def _bad(what: str) -> DataIntegrityError:
    return DataIntegrityError(
        f"{what}. {NOTHING_WRITTEN}", hint="repair the input or take it out of corpus.inputs (corpus.exclude)"
    )


def _decode(data: bytes, where: str, *, errors: str) -> str:
    """Decode UTF-8, and refuse what only looks like it: UTF-16 without a mark is valid UTF-8 full of zero bytes."""
    if data.count(0) * _MAX_NULS > len(data):
        raise _bad(
            f"{where}: {data.count(0)} of {len(data)} bytes are zero, so this is not UTF-8 text but probably UTF-16 "
            "or binary"
        )
    try:
        return data.decode(errors=errors)
    except UnicodeDecodeError as error:
        utf16 = ", which begins a UTF-16 file" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise _bad(
            f"{where}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8 text ({error.reason}{utf16})"
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the failure to open an input into a UsageError; a failing disk stays an OSError.

    Raises:
        UsageError: the file is gone or may not be read.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UsageError(
            f"corpus.inputs: {path} cannot be read ({error.strerror}). {NOTHING_WRITTEN}",
            hint="check that the file exists and that you may read it",
        ) from error
