"""Actions of a failing rank: end a save, name the storage's fault, and look for a peer's reason."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from megamask.errors import ExitCode, MegamaskError, StorageError, error_with_code
from megamask.resilience.numerics import RefusedStepError
from megamask.runs.rank_files import read_rank_failures
from megamask.storage.durable import storage_errors
from megamask.training.checkpointing import CheckpointCommitter

LOST_PEER = "lost the connection to another rank: it died or its node is gone"
LOST_PEER_HINT = "look at that rank's failure record and at the kernel log of its node: the OOM killer leaves its name"
# Messages of gloo, NCCL and the store when the process at the other end is gone; they have no error type for it.
_LOST_PEER_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "Broken pipe",
    "failed to recv, got 0 bytes",
    "ncclRemoteError",
    "remote process exited",
)
# What gloo, NCCL and the store report when the others did not answer within launch.collective_timeout_s.
_TIMEOUT_SIGNS = (
    "Timed out waiting",
    "timed out after",
    "wait timeout",
    "Wait timeout",
    "collective operation timeout",
)
HANG = "waited in vain for another rank, for as long as launch.collective_timeout_s allows"
HANG_HINT = "a rank hangs or its network is cut; start the run again, it resumes from its newest checkpoint"
_log = logging.getLogger(__name__)


def end_saving(committer: CheckpointCommitter, error: BaseException) -> None:
    """Commit the save that was pending at the failure, whose state is good, if all ranks can still meet."""
    has_all_ranks = isinstance(error, RefusedStepError) or int(os.environ.get("WORLD_SIZE", "1")) == 1
    try:
        if has_all_ranks:
            committer.finish()
        else:
            committer.abort(together=False)
    except Exception as refusal:  # noqa: BLE001  the attempt's own error is reported, even if more fails now
        _log.warning("the checkpoint that was being saved is lost: %r", refusal)


def typed(error: OSError) -> BaseException:
    """The error as a StorageError where the storage is to blame, so that every record has the same exit code."""
    try:
        with storage_errors("training"):
            raise error
    except (StorageError, OSError) as typed:
        return typed


def as_hang(error: BaseException) -> BaseException:
    """The error with exit code 71 where a collective call ended because its time was over."""
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TIMEOUT_SIGNS):
        return error_with_code(ExitCode.HANG, HANG, hint=HANG_HINT)
    return error


def has_lost_peer(error: BaseException) -> bool:
    """Return whether this rank failed only because the process at the other end of a connection is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER_SIGNS)


def peer_failure(run_dir: Path, attempt: int, rank: int, *, is_lost: bool) -> MegamaskError | None:
    """The failure of another rank that explains this one's, waited for a moment.

    Args:
        is_lost: this rank only lost a connection, so that a peer's own failure record explains more: a bug
            there, or, as the launcher saw it, a signal that killed it.
    """
    deadline = time.monotonic() + (2.0 if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0.0)
    while True:
        for failure in read_rank_failures(run_dir, attempt).values():
            says_more = failure.exit_code != ExitCode.BUG or (is_lost and failure.reason != LOST_PEER)
            if failure.rank != rank and says_more:
                return error_with_code(failure.exit_code, f"rank {failure.rank}: {failure.reason}")
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)
