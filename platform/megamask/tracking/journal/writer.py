"""The journal: one append-only, hash-chained file of JSON lines on the run's own disk, the truth about a run.

Line: {"seq", "time", "kind", "prev", fields...}. `seq` counts from 1 over all attempts; `prev` is the sha256 of the
previous complete line's bytes without its newline, 64 zeros where a chain starts. Numbers that are not finite are the
strings "nan", "inf" and "-inf". The console, MLflow and everybody else are readers of these files.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from megamask.errors import StorageError, SupersededError
from megamask.runs.layout import journal_folder
from megamask.storage.durable import fsync_directory, make_folders, storage_errors
from megamask.storage.fault_points import reached
from megamask.storage.hashing import sha256_bytes
from megamask.tracking.journal.chain import CHAIN_START, DAMAGE_INCIDENT, chain_problem, find_fork
from megamask.tracking.journal.lines import Line, Record, journal_files, line_number, tail
from megamask.tracking.records import ENVELOPE, RECORDS

FORMAT = "megamask-journal"
VERSION = 1
ROTATE_BYTES = 64 * 2**20
_TAIL_BYTES = 2**20  # how much of an old journal is checked before training goes on; verify_chain checks all of it
_RESERVED = frozenset(ENVELOPE)
_NAMED_DAMAGES = 16

_log = logging.getLogger(__name__)


class Journal:
    """The one writer of a run's journal; safe to call from any thread of its process.

    Use `Journal.open`; the constructor only holds what it found.

    Attributes:
        last_step: of the last step line that this attempt wrote; None before the first.
    """

    def __init__(self, folder: Path, attempt: int, rotation: int, head: tuple[int, str], rotate_bytes: int) -> None:
        self._folder = folder
        self._attempt = attempt
        self._rotation = rotation
        self._head = head
        self._rotate_bytes = rotate_bytes
        self.last_step: int | None = None
        self._lock = threading.RLock()
        self._subscribers: list[Callable[[Record], None]] = []
        self._descriptor: int | None = None
        self._size = 0
        self._open_file()

    @classmethod
    def open(cls, run_dir: Path, attempt: int, *, rotate_bytes: int = ROTATE_BYTES) -> Self:
        """Continues the journal of a run as `attempt`.

        A torn last line of an earlier attempt is cut off and journalled with its length and sha256. A damaged line
        among the last ones never stops training: a new chain starts, with an incident that names file and line.

        Raises:
            SupersededError: a newer attempt has already written.
            StorageError: the storage refused.
        """
        folder = journal_folder(run_dir)
        with storage_errors(f"opening the journal in {folder}"):
            make_folders(folder)
            files = journal_files(run_dir)
            if files and files[-1].attempt > attempt:
                raise SupersededError(
                    f"attempt {attempt} may not write the journal of {run_dir}: attempt {files[-1].attempt} has begun. "
                    "Nothing was written."
                )
            past = _inspect_past(run_dir)
            if past.torn is not None:
                _truncate(past.torn)
        rotation = max((file.rotation for file in files if file.attempt == attempt), default=0)
        journal = cls(folder, attempt, rotation, past.head, rotate_bytes)
        journal._report(past)
        return journal

    def append(self, kind: str, /, **fields: Any) -> Record:
        """Write one record with a single write and hand it to the subscribers.

        Args:
            kind: one of records.RECORDS.
            fields: JSON values; tuples become lists.

        Returns:
            The record as a reader of the file would get it.

        Raises:
            ValueError: an unknown kind, a reserved field name, or a closed journal; nothing was written.
            StorageError: the storage refused; no torn line is left where the file could be cut back.
        """
        if kind not in RECORDS:
            raise ValueError(f"unknown kind of journal record {kind!r}; allowed: {', '.join(sorted(RECORDS))}")
        if taken := _RESERVED & fields.keys():
            raise ValueError(f"the journal writes {', '.join(sorted(taken))} itself; give the field another name")
        if kind in ("run_started", "attempt_started"):
            fields = {"format": FORMAT, "version": VERSION, **fields}
        content = plain(fields)
        with self._lock:
            seq, previous = self._head
            record: Record = {"seq": seq + 1, "time": utc_now(), "kind": kind, "prev": previous, **content}
            data = json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
            self._write(data + b"\n")
            self._head = (seq + 1, sha256_bytes(data))
            self.last_step = fields["step"] if kind == "step" else self.last_step
            reached("journal.appended")
        self._publish(record)
        return record

    def incident(self, incident: str, problem: str, **fields: Any) -> Record:
        """Write an incident: a short machine-readable name, a sentence for a person, and what belongs to it."""
        return self.append("incident", incident=incident, problem=problem, **fields)

    @property
    def head(self) -> tuple[int, str]:
        """(seq, sha256) of the last line; (0, 64 zeros) while nothing is written."""
        with self._lock:
            return self._head

    def subscribe(self, callback: Callable[[Record], None]) -> None:
        """Call `callback` with every later record; one that raises is logged and dropped, training goes on."""
        self._subscribers.append(callback)

    def sync(self) -> None:
        """Flush what was appended to the device.

        Raises:
            StorageError: the storage refused.
        """
        with self._lock:
            if self._descriptor is not None:
                with storage_errors(f"flushing {self._path()}"):
                    os.fsync(self._descriptor)

    def durable_head(self) -> tuple[int, str]:
        """`head`, of a line that is flushed: no other thread's line comes between.

        Raises:
            StorageError: the storage refused.
        """
        with self._lock:
            self.sync()
            return self._head

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        with self._lock:
            if self._descriptor is not None:
                try:
                    self.sync()
                finally:
                    os.close(self._descriptor)
                    self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _path(self) -> Path:
        return self._folder / f"attempt-{self._attempt:04d}-{self._rotation:03d}.jsonl"

    def _open_file(self) -> int:
        with storage_errors(f"opening {self._path()}"):
            descriptor = os.open(self._path(), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fsync_directory(self._folder)
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        return descriptor

    def _write(self, line: bytes) -> None:
        descriptor = self._descriptor
        if descriptor is None:
            raise ValueError(f"the journal {self._path()} is closed; nothing was written")
        if self._size > 0 and self._size + len(line) > self._rotate_bytes:
            descriptor = self._rotate(descriptor)
        with storage_errors(f"writing {self._path()}"):
            try:
                written = os.write(descriptor, line)
            except OSError:
                self._cut_back(descriptor)
                raise
        if written != len(line):  # a disk that fills up takes a part
            self._cut_back(descriptor)
            raise StorageError(
                f"writing {self._path()}: only {written} of {len(line)} bytes were taken, the storage is full. "
                "The record was not journalled.",
                hint="free space, then start the run again; it resumes from its last checkpoint",
            )
        self._size += len(line)

    def _rotate(self, full: int) -> int:
        """The next file's descriptor; the full one stays in use if the next cannot be opened."""
        self.sync()
        self._rotation += 1
        try:
            descriptor = self._open_file()
        except BaseException:
            self._rotation -= 1
            raise
        os.close(full)
        return descriptor

    def _cut_back(self, descriptor: int) -> None:
        try:
            os.ftruncate(descriptor, self._size)
        except OSError as error:  # the next attempt cuts the torn line instead
            _log.warning("%s may end with a torn line: %s", self._path(), error)

    def _publish(self, record: Record) -> None:
        for callback in tuple(self._subscribers):
            try:
                callback(record)
            except Exception as error:  # noqa: BLE001  a failing reader never stops training
                _log.warning("a reader of the journal failed and is no longer called: %r", error)
                if callback in self._subscribers:
                    self._subscribers.remove(callback)

    def _report(self, past: _Past) -> None:
        """Journals what opening found; the first record after damage is the start of the new chain."""
        if past.damages:
            named = [
                {"file": line.file.path.name, "line": line_number(line)} for line, _ in past.damages[:_NAMED_DAMAGES]
            ]
            problem = past.damages[0][1]
            self.incident(
                DAMAGE_INCIDENT,
                f"{named[0]['file']}, line {named[0]['line']}: {problem}. A new chain starts here.",
                num_damaged=len(past.damages),
                damaged=named,
            )
        if past.torn is not None:
            self.incident(
                "journal_torn_line",
                f"{past.torn.file.path.name} ended in the middle of a line, which was cut off",
                file=past.torn.file.path.name,
                num_bytes=len(past.torn.data),
                sha256=sha256_bytes(past.torn.data),
            )


@dataclass(frozen=True, kw_only=True)
class _Past:
    """Content of the files of earlier attempts: the line to chain on, and the damage."""

    head: tuple[int, str]
    torn: Line | None
    damages: list[tuple[Line, str]]


def _inspect_past(run_dir: Path) -> _Past:
    lines = tail(run_dir, _TAIL_BYTES)
    torn = lines.pop() if lines and lines[-1].is_torn else None
    if torn is not None and not lines:  # the torn line alone filled the budget
        lines = [line for line in tail(run_dir, _TAIL_BYTES + len(torn.data)) if not line.is_torn]
    records = [line.record() for line in lines]
    starts = [i for i, record in enumerate(records) if record is not None and record["prev"] == CHAIN_START]
    begin = starts[-1] if starts else 0
    damages: list[tuple[Line, str]] = []
    for i in range(begin, len(lines)):  # damage before the last start of a chain was named there
        is_first = i == begin
        problem = None if is_first and records[i] is not None else chain_problem(records[i], lines[i - 1].data)
        if problem is not None and not (i > 0 and _is_take_over(run_dir, lines[i - 1], lines[i])):
            damages.append((lines[i], problem))
    last_seq = next((record["seq"] for record in reversed(records) if record is not None), 0)
    digest = CHAIN_START if damages or not lines else sha256_bytes(lines[-1].data)
    return _Past(head=(last_seq, digest), torn=torn, damages=damages)


def _is_take_over(run_dir: Path, before: Line, line: Line) -> bool:
    """True if a line that does not chain on the one before it begins an attempt that chains on an earlier one.

    The older attempt notices a take-over within moments, so that the line is sought in twice the tail.
    """
    if line.file.attempt == before.file.attempt:
        return False
    earlier = [found for found in tail(run_dir, 2 * _TAIL_BYTES) if found.file < line.file]
    return find_fork(line, earlier) is not None


def _truncate(torn: Line) -> None:
    descriptor = os.open(torn.file.path, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, torn.offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def utc_now() -> str:
    """The time as the formats write it: UTC, RFC 3339, microseconds, Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def plain(value: Any) -> Any:
    """A value as the journal writes it: numbers that are not finite become strings, tuples lists.

    Raises:
        TypeError: something that JSON cannot hold.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"keys of a journal field are strings: {list(value)!r}")
        return {key: plain(item) for key, item in value.items()}
    raise TypeError(f"a journal field cannot hold a {type(value).__name__}: {value!r}")
