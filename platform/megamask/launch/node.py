"""One node of a job: start its ranks, hand signals on, and leave with the job's one exit code.

Runs as a task of a Slurm step, as a pod's first process, or on a bare machine. The ranks of all nodes meet at a port
that node 0 holds before it announces it, so no other process can take it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megamask.config.schema.launch import LaunchConfig
from megamask.errors import ExitCode, MegamaskError, error_with_code
from megamask.launch.failures import AGREED, RankExit, failure_of
from megamask.launch.job_observer import JobObserver
from megamask.launch.meeting import listening, meeting, wait_for_name
from megamask.launch.metrics_file import MetricsFile
from megamask.launch.placement import NodePlace
from megamask.launch.preflight import Unfit, examine_node, read_unfit, write_unfit
from megamask.launch.ranks import Gang, run_ranks
from megamask.launch.verdict import (
    Verdict,
    append_history,
    is_without_progress,
    job_code,
    launch_folder,
    read_codes,
    read_verdict,
    wait_until,
    write_codes,
    write_meeting,
    write_verdict,
)
from megamask.launch.watch import StopGrace
from megamask.resilience.exit_codes import combine
from megamask.resilience.process_facts import node_name
from megamask.resilience.signals import StopRequest
from megamask.runs.claims import claimed_attempts
from megamask.runs.rank_files import read_rank_failures
from megamask.runs.status import Status, read_status, write_status

_CODES_S = 5.0
# After an end that all ranks agreed on, the other nodes are on their way out: one that is slow to close is not dead.
_AGREED_CODES_S = 20.0
# Node 0 gives its ranks half a minute to notice that another node's have failed, and then waits for the codes.
_VERDICT_S = 45.0
_SUSPECT_CODES = (ExitCode.MEGATRON_RERUN_RESUME, ExitCode.MEGATRON_RERUN_FAILED, ExitCode.HARDWARE)


def run_node(
    arguments: Sequence[str],
    place: NodePlace,
    run_dir: Path,
    *,
    ranks_per_node: int,
    signals: StopRequest,
    launch: LaunchConfig,
    module: str = "megamask_pipelines.cli.main",
    metrics: MetricsFile | None = None,
) -> tuple[Verdict, MegamaskError | None]:
    """Check this node, then run its ranks of `megamask ARGUMENTS` to their end.

    Args:
        arguments: the command line of the ranks, as ["train", CONFIG, ...].
        run_dir: run directory, on storage that all nodes share.
        launch: grace periods, limits of the watchdog, and how many starts of the job may fail at the same step.
        metrics: the node's metrics file, which gets the progress of the ranks.

    Returns: the job's verdict, the same on every node that is alive, and the failure to show, if this node has one.
    Raises:
        UsageError: the nodes cannot meet.
        StorageError: the launch folder refuses.
    """
    folder = launch_folder(run_dir, place.token)
    if launch.preflight:
        has_gpus = launch.gpus_per_node != 0
        unfit = examine_node(run_dir, with_gpus=has_gpus, should_end=lambda: bool(signals.requested))
        if unfit is not None:
            return _leave_unfit(folder, place, unfit, launch.no_progress_attempts)
    observer = JobObserver(folder, place, run_dir, max(claimed_attempts(run_dir), default=0), metrics)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(place)) if place.node == 0 else None
        if listener is not None:
            write_meeting(folder, place.address, listener.getsockname()[1])
        address, port = meeting(folder, signals)
        if place.num_nodes > 1:
            wait_for_name(address, signals)
        exits = run_ranks(
            arguments,
            _gang(place, ranks_per_node, address, port, listener),
            module=module,
            signals=signals,
            grace=StopGrace(grace_s=launch.stop_grace_s, save_budget_s=launch.effective_save_budget_s),
            watchdog=launch.watchdog,
            observer=observer,
        )
    failure = failure_of(exits)
    own = combine([rank_exit.returncode for rank_exit in exits]) if failure is None else int(failure.exit_code)
    write_codes(folder, place.node, [own])
    if place.node == 0:
        verdict = _judge(folder, place, run_dir, observer.attempt, own, exits[0])
        if (unfit := read_unfit(folder)) is not None and unfit.code == verdict.code:
            failure = unfit.error
        verdict, failure = _after_history(folder, verdict, failure, launch.no_progress_attempts)
        _close_status(run_dir, verdict, failure)
        write_verdict(folder, verdict)
        return verdict, failure
    wait_until(lambda: read_verdict(folder) is not None, _VERDICT_S)
    return read_verdict(folder) or Verdict(code=own, node=node_name()), failure


def _leave_unfit(folder: Path, place: NodePlace, unfit: Unfit, attempts: int) -> tuple[Verdict, MegamaskError | None]:
    """Let the other nodes know that this one is not fit, and return the job's verdict; no rank was started here."""
    failure: MegamaskError | None = unfit.error
    own = Verdict(code=unfit.code, node=unfit.node)
    with contextlib.suppress(MegamaskError, OSError):  # a storage that refuses may be what was found
        write_unfit(folder, unfit)
        write_codes(folder, place.node, [unfit.code])
        if place.node == 0:
            own, failure = _after_history(folder, own, failure, attempts)
            write_verdict(folder, own)
            return own, failure
        wait_until(lambda: read_verdict(folder) is not None, _VERDICT_S)
    return read_verdict(folder) or own, failure


def _gang(place: NodePlace, ranks_per_node: int, address: str, port: int, listener: socket.socket | None) -> Gang:
    return Gang(
        first_rank=place.node * ranks_per_node,
        num_ranks=ranks_per_node,
        world_size=place.num_nodes * ranks_per_node,
        address=address,
        port=port,
        listener=listener,
        interface="lo" if place.num_nodes == 1 else None,
        environment={"MEGAMASK_LAUNCH_TOKEN": place.token},
    )


def _judge(folder: Path, place: NodePlace, run_dir: Path, attempt: int | None, own: int, first: RankExit) -> Verdict:
    """The verdict of node 0, from all nodes' codes and the failure records of the attempt that its rank 0 claimed."""
    others = range(1, place.num_nodes)
    seconds = _AGREED_CODES_S if own in AGREED else _CODES_S
    wait_until(lambda: all(read_codes(folder, node) is not None for node in others), seconds)
    failures = {} if attempt is None else read_rank_failures(run_dir, attempt)
    answers = [read_codes(folder, node) for node in others]
    code = job_code(own, answers, [failure.exit_code for failure in failures.values()])
    status = None if attempt is None else read_status(run_dir)
    step = first.closed_step  # the status of a superseded attempt is already that of the newer one
    if status is not None and status.attempt == attempt and status.step is not None:
        step = status.step
    unfit = read_unfit(folder)
    suspects = [unfit.node] if unfit is not None and unfit.code == code else []
    suspects += [failure.node for failure in failures.values() if failure.exit_code == code]
    node = suspects[0] if suspects and code in _SUSPECT_CODES else node_name()
    return Verdict(code=code, step=-1 if step is None else step, attempt=attempt or 0, node=node)


def _after_history(
    folder: Path, verdict: Verdict, failure: MegamaskError | None, attempts: int
) -> tuple[Verdict, MegamaskError | None]:
    """The verdict and the failure, or 93 where the run's last starts all failed at this step."""
    is_stuck = is_without_progress(folder, verdict, attempts)
    append_history(folder, verdict)
    if not is_stuck:
        return verdict, failure
    where = "before the run was claimed" if verdict.step < 0 else f"at step {verdict.step}"
    last = "" if failure is None else f" The last one: {failure.message}"
    error = error_with_code(
        int(ExitCode.DO_NOT_REQUEUE),
        f"{attempts} starts of this job in a row failed {where}, the last with exit code {verdict.code}; it is not "
        f"started again.{last}",
        hint="remove the cause and submit the job again, which counts anew; launch.no_progress_attempts is the number",
    )
    append_history(folder, replace(verdict, code=int(ExitCode.DO_NOT_REQUEUE)))  # the next start counts anew
    return replace(verdict, code=int(ExitCode.DO_NOT_REQUEUE)), error


def _close_status(run_dir: Path, verdict: Verdict, failure: MegamaskError | None) -> None:
    """Close status.json where this job's rank 0 could not."""
    with contextlib.suppress(MegamaskError, OSError):
        status = read_status(run_dir)
        if status is None or status.attempt != verdict.attempt or status.phase not in ("starting", "running"):
            return
        closed = Status(
            attempt=status.attempt,
            phase="failed",
            exit_code=verdict.code,
            step=status.step,
            node=verdict.node,
            reason=None if failure is None else failure.message.splitlines()[0],
        )
        write_status(run_dir, closed)
