"""Training in one process per rank, all on this host."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamask.config.schema.roots import TrainConfig
from megamask.errors import MegamaskError
from megamask.launch.failures import failure_of
from megamask.launch.local import run_local_ranks
from megamask.launch.run_observer import RunObserver
from megamask.launch.watch import StopGrace
from megamask.provenance.redaction import reason_of
from megamask.resilience.exit_codes import combine
from megamask.resilience.signals import StopRequest
from megamask.runs.claims import claimed_attempts, read_claim
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
        grace=StopGrace(grace_s=config.launch.stop_grace_s, save_budget_s=config.launch.effective_save_budget_s),
        watchdog=config.launch.watchdog,
        observer=_LocalObserver(run_dir, before),
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


class _LocalObserver(RunObserver):
    """Observer of ranks whose first process claims the run."""

    def owns(self, claim: dict[str, object]) -> bool:
        return claim.get("pid") == self.first_pid


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
