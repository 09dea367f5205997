"""The inputs of a corpus: which files, in which order, and the documents in them.

A .jsonl file holds one document a line, under `corpus.jsonl_text_key`; lines of white space alone are skipped. Any
other file is one document. Text is the file's bytes decoded as UTF-8, exactly: no newline is translated and a byte
order mark stays. Files are sorted by name, which is the path relative to the deepest folder that holds them all, so a
corpus does not change when its inputs move.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamask.errors import DataIntegrityError, UsageError

PYTHON_STDLIB = "{python_stdlib}"
_NOTHING = "Nothing was written."


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input: its name in the corpus and where it lies on this machine."""

    name: str
    path: Path

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document."""
        return self.path.suffix.lower() == ".jsonl"


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """A document's text and the bytes of the input that hold it (a .jsonl line without its newline)."""

    text: str
    offset: int
    bytes: int


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """Expands files and globs, sorted by name; a file that matches twice counts once.

    Args:
        patterns: of `corpus.inputs`; relative ones start at the working folder, `**` crosses folders, and
            {python_stdlib} stands for the folder of Python's own library.

    Raises:
        UsageError: a pattern matches no file, or names a folder.
    """
    if not patterns:
        raise UsageError(f"corpus.inputs is empty; give at least one file or glob. {_NOTHING}")
    by_identity: dict[str, str] = {}
    for pattern in patterns:
        for path in _expand(pattern):
            absolute = os.path.abspath(path)  # noqa: PTH100 (resolve() would follow links and change names)
            identity = os.path.realpath(path)
            by_identity[identity] = min(absolute, by_identity.get(identity, absolute))
    paths = sorted(by_identity.values())
    common = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))  # noqa: PTH120
    files = [InputFile(name=Path(path).relative_to(common).as_posix(), path=Path(path)) for path in paths]
    for file in files:
        if any(0xD800 <= ord(letter) < 0xE000 for letter in file.name):  # how Python shows undecodable bytes
            raise UsageError(
                f"corpus.inputs: the file name {file.name!r} is not UTF-8. {_NOTHING}", hint="rename the file"
            )
    return sorted(files, key=lambda file: file.name)


def _expand(pattern: str) -> list[str]:
    stdlib = sysconfig.get_paths()["stdlib"]
    literal = Path(pattern.replace(PYTHON_STDLIB, stdlib)).expanduser()
    if literal.is_dir():
        raise UsageError(
            f"corpus.inputs names the folder {pattern}; allowed are files and globs. {_NOTHING}",
            hint=f"take the text files in it with a glob, for example {pattern.rstrip('/')}/**/*.txt",
        )
    if literal.is_file():
        return [str(literal)]
    expression = os.path.expanduser(pattern).replace(PYTHON_STDLIB, glob.escape(stdlib))  # noqa: PTH111
    matches = [path for path in glob.glob(expression, recursive=True) if Path(path).is_file()]  # noqa: PTH207
    if not matches:
        raise UsageError(
            f"corpus.inputs: {pattern} matches no file. {_NOTHING}",
            hint="check the path; relative ones start at the working folder, and ** crosses folders",
        )
    return matches


class InputReader:
    """Reads one input's documents in order and hashes the whole file on the way.

    Args:
        file: the input.
        jsonl_text_key: key of a .jsonl line that holds the text.
        on_bytes: told how many bytes were read, for progress.
    """

    def __init__(
        self, file: InputFile, jsonl_text_key: str, on_bytes: Callable[[int], None] = lambda count: None
    ) -> None:
        self._file = file
        self._key = jsonl_text_key
        self._on_bytes = on_bytes
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        """Digest of the bytes read so far; of the whole file once `documents` is exhausted."""
        return self._sha256.hexdigest()

    def documents(self) -> Iterator[RawDocument]:
        """The documents in file order; a .jsonl is read line by line, another file at once.

        Raises:
            DataIntegrityError: bytes that are not UTF-8, a line that is not JSON, lacks the key or holds no string.
            UsageError: the file cannot be opened.
        """
        with reading(self._file.path):
            if self._file.is_jsonl:
                with self._file.path.open("rb") as lines:
                    for number, line in enumerate(lines, start=1):
                        offset = self.num_bytes
                        self._count(line)
                        raw = line.removesuffix(b"\n")
                        if raw.strip():
                            yield RawDocument(text=self._text_of_line(raw, number), offset=offset, bytes=len(raw))
            else:
                data = self._file.path.read_bytes()
                self._count(data)
                yield RawDocument(text=_decode(data, str(self._file.path), 0), offset=0, bytes=len(data))

    def _count(self, data: bytes) -> None:
        self._sha256.update(data)
        self.num_bytes += len(data)
        self._on_bytes(len(data))

    def _text_of_line(self, raw: bytes, number: int) -> str:
        where = f"{self._file.path}:{number}"
        line = _decode(raw, where, 0)
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad(f"{where}: not a JSON value ({error})") from error
        if not isinstance(value, dict):
            raise _bad(f"{where}: the line is not a JSON object")
        if self._key not in value:
            raise _bad(f"{where}: the object has no key {self._key!r} (corpus.jsonl_text_key)")
        text = value[self._key]
        if not isinstance(text, str):
            raise _bad(f"{where}: the value of {self._key!r} is {type(text).__name__}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _bad(f"{where}: the text holds half a surrogate pair at character {error.start}") from error
        return text


def _bad(what: str) -> DataIntegrityError:
    return DataIntegrityError(f"{what}. {_NOTHING}", hint="repair the input or take it out of corpus.inputs")


def _decode(data: bytes, where: str, start: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = start + error.start
        raise _bad(f"{where}: byte {byte} (0x{data[error.start]:02x}) is not UTF-8 text ({error.reason})") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the failure to open an input into a UsageError; a failing disk stays an OSError.

    Raises:
        UsageError: the file is gone or may not be read.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UsageError(
            f"corpus.inputs: {path} cannot be read ({error.strerror}). {_NOTHING}",
            hint="check that the file exists and that you may read it",
        ) from error
