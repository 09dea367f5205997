"""One training command: is there anything to do, in how many processes, and how did it end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.roots import TrainConfig
from megamask.errors import ExitCode, MegamaskError, UsageError
from megamask.launch.local import failure_of, is_launched, killed_by, run_local_ranks
from megamask.provenance.redaction import reason_of
from megamask.resilience.exit_codes import combine
from megamask.resilience.signals import StopRequest
from megamask.runs.claims import claimed_attempts, read_claim
from megamask.runs.layout import record_path, run_path
from megamask.runs.rank_files import write_rank_failure
from megamask.runs.record import read_run
from megamask.runs.status import Status, read_status, write_status
from megamask.tracking.journal.seek import find_step, last_step
from megamask.training.resuming import is_complete
from megamask.training.stopping import StopReason


def num_processes(layout: LayoutConfig) -> int:
    """Processes that a layout needs: the product of its axes."""
    return layout.tensor_parallel_size * layout.pipeline_parallel_size * layout.data_parallel_size


def run_training(config: TrainConfig, arguments: Sequence[str], signals: StopRequest) -> dict[str, Any]:
    """Joins a launcher's ranks, starts local ranks, or trains right here; a complete run is only reported.

    Args:
        arguments: the command line after `megamask`, for local ranks.
        signals: what this process is asked for; its handlers are in place.

    Raises:
        MegamaskError: the attempt failed; its exit code says how.
    """
    run_dir = run_path(config.run.output_dir, config.run.name)
    try:
        if is_launched():
            _check_world_size(config.layout)
            return _train_here(run_dir, config, signals)
        if is_complete(run_dir, config):
            return outcome(run_dir, step=config.training.steps, exit_code=0, reason=StopReason.FINISHED.sentence)
        if num_processes(config.layout) == 1:
            return _train_here(run_dir, config, signals)
        return _train_in_local_ranks(run_dir, config, arguments, signals)
    except MegamaskError as error:
        with contextlib.suppress(MegamaskError, OSError):  # the error itself must be told, whatever the folder says
            error.details = _known(run_dir, error)
        raise


def _check_world_size(layout: LayoutConfig) -> None:
    started, needed = int(os.environ["WORLD_SIZE"]), num_processes(layout)
    if started != needed:
        raise UsageError(
            f"the launcher started {started} processes (WORLD_SIZE), but layout.tensor_parallel_size x "
            f"pipeline_parallel_size x data_parallel_size is {needed}. Nothing was started.",
            hint=f"start {needed} processes, or change layout.data_parallel_size",
        )


def _train_here(run_dir: Path, config: TrainConfig, signals: StopRequest) -> dict[str, Any]:
    """This process is a rank, or the only one; it answers from what it knows, not from what rank 0 has written."""
    from megamask_pipelines.pretrain import pretrain  # after the checks of the callers: it imports torch

    reason, progress = pretrain(config, signals)
    answer = outcome(run_dir, step=progress.step, exit_code=int(reason.exit_code), reason=reason.sentence)
    return answer if progress.loss is None else {**answer, "loss": progress.loss}


def _train_in_local_ranks(
    run_dir: Path, config: TrainConfig, arguments: Sequence[str], signals: StopRequest
) -> dict[str, Any]:
    before = max(claimed_attempts(run_dir), default=0)
    exits = run_local_ranks(
        arguments,
        num_processes(config.layout),
        signals=signals,
        on_killed=lambda pid, rank, number: _tell_killed(run_dir, before, pid=pid, rank=rank, signal=number),
    )
    if (failure := failure_of(exits)) is not None:
        with contextlib.suppress(MegamaskError, OSError):  # the failure must be told, whatever the folder says
            _close_status(run_dir, failure, {rank_exit.pid for rank_exit in exits})
        raise failure
    exit_code = combine([rank_exit.returncode for rank_exit in exits])
    status = read_status(run_dir)
    if status is None or status.exit_code != exit_code:  # a newer attempt owns the folder and its status
        return outcome(run_dir, step=None, exit_code=exit_code, reason=StopReason.SUPERSEDED.sentence)
    return outcome(run_dir, step=status.step, exit_code=exit_code, reason=status.reason)


def _tell_killed(run_dir: Path, before: int, *, pid: int, rank: int, signal: int) -> None:
    """Leaves the last words of a rank that could not write them, while the other ranks look for them.

    Args:
        before: the newest attempt when the ranks were started; theirs is later.
        pid: of rank 0, which claimed the run.
    """
    with contextlib.suppress(MegamaskError, OSError):  # the launcher tells it all the same, at the end
        for attempt in claimed_attempts(run_dir, after=before):
            claim = read_claim(run_dir, attempt)
            if claim is not None and claim.get("pid") == pid:
                write_rank_failure(run_dir, attempt, rank=rank, exit_code=int(ExitCode.BUG), reason=killed_by(signal))


def _known(run_dir: Path, error: MegamaskError) -> dict[str, object]:
    """The fields of a failed training command's answer, as far as they are known."""
    answer: dict[str, object] = dict.fromkeys(("run_id", "run_dir", "step", "loss"))
    if record_path(run_dir).is_file() and error.exit_code != ExitCode.USAGE:
        status = read_status(run_dir)
        answer = outcome(run_dir, step=status.step if status else None, exit_code=int(error.exit_code), reason=None)
    return {**answer, "run_dir": str(run_dir), "reason": error.message}


def _close_status(run_dir: Path, failure: MegamaskError, pids: set[int]) -> None:
    """Tells a crash in status.json when rank 0 could not; the status of somebody else's attempt is left alone."""
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


def outcome(run_dir: Path, *, step: int | None, exit_code: int, reason: str | None) -> dict[str, Any]:
    """What a training command answers; run_id and the loss of the step come from the run directory."""
    line = last_step(run_dir) if step is None else find_step(run_dir, step)
    return {
        "run_id": read_run(run_dir).run_id,
        "run_dir": str(run_dir),
        "step": step,
        "loss": line["loss"] if line else None,
        "exit_code": exit_code,
        "reason": reason,
    }
