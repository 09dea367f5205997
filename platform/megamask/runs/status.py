"""status.json: the last known state of a run, in one small file that is replaced atomically.

Rank 0 and the launcher write it; wrappers and people read it. A status of another attempt, or none, means a crash.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from megamask.errors import CheckpointIntegrityError
from megamask.runs.layout import status_path
from megamask.storage.documents import DocumentKind, encode_document, read_document
from megamask.storage.durable import write_atomic

_KIND = DocumentKind(
    format="megamask-status", version=1, is_canonical=False, damage=CheckpointIntegrityError, max_bytes=1 << 20
)

Phase = Literal["starting", "running", "done", "stopped", "preempted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """The last known state of a run.

    Args:
        attempt: number of the attempt that wrote it.
        phase: `done` means all steps of the run, `stopped` an attempt that ended at training.stop_after_step.
        exit_code: of an attempt that has ended, else None.
        step: completed updates.
        node: this node, or the suspect's for hardware codes.
        reason: one sentence for a person, or None.
        journal: [seq, sha256] of the flushed line that ended the attempt; None while it runs, and from the launcher.
        time: when it was written; filled in by `write_status`.
    """

    attempt: int
    phase: Phase
    exit_code: int | None = None
    step: int | None = None
    node: str | None = None
    reason: str | None = None
    journal: list[int | str] | None = None
    time: str | None = None


def write_status(run_dir: Path, status: Status) -> None:
    """Replace a run's status file.

    Raises:
        ValueError: an unknown phase.
        StorageError: the storage refused; the old status is intact.
    """
    if status.phase not in get_args(Phase):
        raise ValueError(f"unknown phase {status.phase!r}; allowed: {', '.join(get_args(Phase))}")
    time = status.time or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    write_atomic(status_path(run_dir), encode_document(_KIND, {**asdict(status), "time": time}))


def read_status(run_dir: Path) -> Status | None:
    """Return a run's status, or None if the file is missing or damaged (the journal is the record, this is a hint).

    Raises:
        UsageError: a newer megamask wrote it.
    """
    try:
        content = read_document(_KIND, status_path(run_dir))
    except CheckpointIntegrityError:
        return None
    known = {field.name: content[field.name] for field in fields(Status) if field.name in content}
    is_complete = isinstance(known.get("attempt"), int) and known.get("phase") in get_args(Phase)
    is_complete &= isinstance(known.get("journal"), list | None)
    return Status(**known) if is_complete else None
