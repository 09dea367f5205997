"""Training in one process per rank, all on this host."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamask.config.schema.roots import TrainConfig
from megamask.errors import ExitCode, MegamaskError
from megamask.launch.local import run_local_ranks
from megamask.launch.ranks import failure_of, killed_by
from megamask.provenance.redaction import reason_of
from megamask.resilience.exit_codes import combine
from megamask.resilience.signals import StopRequest
from megamask.runs.claims import claimed_attempts, read_claim
from megamask.runs.rank_files import write_rank_failure
from megamask.runs.status import Status, read_status, write_status
from megamask.training.outcome import outcome
from megamask.training.stopping import StopReason


def train_in_local_ranks(
    run_dir: Path, config: TrainConfig, num_processes: int, arguments: Sequence[str], signals: StopRequest
) -> dict[str, Any]:
    """Start the ranks, wait for their end and return the outcome of the run.

    Raises:
        MegamaskError: a rank failed; its exit code is the most specific one of all ranks.
    """
    before = max(claimed_attempts(run_dir), default=0)
    exits = run_local_ranks(
        arguments,
        num_processes,
        signals=signals,
        stop_grace_s=config.launch.stop_grace_s,
        save_budget_s=config.launch.effective_save_budget_s,
        on_killed=lambda pid, rank, number: _record_killed(run_dir, before, pid=pid, rank=rank, signal=number),
    )
    if (failure := failure_of(exits)) is not None:
        with contextlib.suppress(MegamaskError, OSError):  # the failure must be reported in any case
            _close_status(run_dir, failure, {rank_exit.pid for rank_exit in exits})
        raise failure
    exit_code = combine([rank_exit.returncode for rank_exit in exits])
    status = read_status(run_dir)
    if status is None or status.exit_code != exit_code:  # a newer attempt owns the folder and its status
        return outcome(run_dir, step=None, exit_code=exit_code, reason=StopReason.SUPERSEDED.description)
    return outcome(run_dir, step=status.step, exit_code=exit_code, reason=status.reason)


def _record_killed(run_dir: Path, before: int, *, pid: int, rank: int, signal: int) -> None:
    """Write the failure record of a rank that was killed, while the other ranks look for it.

    Args:
        before: the newest attempt when the ranks were started; theirs is later.
        pid: of rank 0, which claimed the run.
    """
    with contextlib.suppress(MegamaskError, OSError):  # the launcher reports it at the end as well
        for attempt in claimed_attempts(run_dir, after=before):
            claim = read_claim(run_dir, attempt)
            if claim is not None and claim.get("pid") == pid:
                write_rank_failure(run_dir, attempt, rank=rank, exit_code=int(ExitCode.BUG), reason=killed_by(signal))


def _close_status(run_dir: Path, failure: MegamaskError, pids: set[int]) -> None:
    """Record a crash in status.json when rank 0 could not; another attempt's status is not touched."""
    status = read_status(run_dir)
    if status is None or status.phase not in ("starting", "running"):
        return
    claim = read_claim(run_dir, status.attempt)
    if claim is None or claim["pid"] not in pids:
        return
    closed = Status(
        attempt=status.attempt,
        phase="failed",
        exit_code=int(failure.exit_code),
        step=status.step,
        node=status.node,
        reason=reason_of(failure).splitlines()[0],
    )
    write_status(run_dir, closed)
