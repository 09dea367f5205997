"""Failure records of ranks: launchers lose exit codes, and end the other ranks with signals.

The rank that fails first is not ended by a signal, so the code that it records before it ends names the cause.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megamask.errors import CheckpointIntegrityError, MegamaskError, StorageError
from megamask.resilience.process_facts import node_name
from megamask.runs.layout import attempt_folder, rank_path
from megamask.storage.documents import DocumentKind, encode_document, read_document
from megamask.storage.durable import create_exclusive

_KIND = DocumentKind(
    format="megamask-rank", version=1, is_canonical=False, damage=CheckpointIntegrityError, max_bytes=1 << 20
)
_FILE_NAME = re.compile(r"rank-(\d{5,})\.json")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """Failure record of a rank: exit code, reason in one sentence, and node (the suspect's for hardware codes)."""

    rank: int
    exit_code: int
    reason: str
    node: str


def write_rank_failure(
    run_dir: Path, attempt: int, *, rank: int, exit_code: int, reason: str, node: str | None = None
) -> bool:
    """Write a rank's failure record; the first one of a rank holds, later ones are not written.

    Called while the process is ending, so it never raises: storage that refuses is logged.

    Returns:
        Whether this call wrote the file.
    """
    failure = RankFailure(rank=rank, exit_code=int(exit_code), reason=reason, node=node or node_name())
    time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    path = rank_path(run_dir, attempt, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        create_exclusive(path, encode_document(_KIND, {**asdict(failure), "time": time}))
    except FileExistsError:
        return False
    except (StorageError, OSError) as error:
        _log.warning("rank %d could not record its exit code %d: %s", rank, exit_code, error)
        return False
    return True


def read_rank_failures(run_dir: Path, attempt: int) -> dict[int, RankFailure]:
    """Return the failure records of an attempt by rank; damaged files are left out."""
    folder = attempt_folder(run_dir, attempt)
    if not folder.is_dir():
        return {}
    found = {}
    for path in sorted(folder.iterdir()):
        if _FILE_NAME.fullmatch(path.name):
            failure = _parse(path)
            if failure is not None:
                found[failure.rank] = failure
    return found


def _parse(path: Path) -> RankFailure | None:
    try:
        content = read_document(_KIND, path)
        return RankFailure(
            rank=int(content["rank"]),
            exit_code=int(content["exit_code"]),
            reason=str(content["reason"]),
            node=str(content["node"]),
        )
    except (MegamaskError, OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is not a rank's failure record: %r", path, error)
        return None
