"""What a failing rank still does: it ends a save, names what the storage did, and listens for a peer's reason."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from megamask.errors import ExitCode, MegamaskError, StorageError, error_with_code
from megamask.resilience.numerics import NotFiniteError
from megamask.resilience.rank_files import read_rank_failures
from megamask.storage.durable import storage_errors
from megamask.training.checkpointing import CheckpointCommitter

_log = logging.getLogger(__name__)


def end_saving(committer: CheckpointCommitter, error: BaseException) -> None:
    """What was being saved when the attempt failed is a good state: it is committed if all ranks can still meet."""
    has_all_ranks = isinstance(error, NotFiniteError) or int(os.environ.get("WORLD_SIZE", "1")) == 1
    try:
        if has_all_ranks:
            committer.finish()
        else:
            committer.abandon(together=False)
    except Exception as refusal:  # noqa: BLE001  the attempt's own error is told, whatever else fails now
        _log.warning("the checkpoint that was being saved is lost: %r", refusal)


def typed(error: OSError) -> BaseException:
    """The error as a StorageError where the storage is to blame, so that every record has the same exit code."""
    try:
        with storage_errors("training"):
            raise error
    except (StorageError, OSError) as typed:
        return typed


def peer_failure(run_dir: Path, attempt: int, rank: int) -> MegamaskError | None:
    """The failure of another rank that explains a lost connection, waited for a moment."""
    deadline = time.monotonic() + (2.0 if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0.0)
    while True:
        for failure in read_rank_failures(run_dir, attempt).values():
            if failure.rank != rank and failure.exit_code != ExitCode.BUG:
                return error_with_code(failure.exit_code, f"rank {failure.rank}: {failure.reason}")
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)
