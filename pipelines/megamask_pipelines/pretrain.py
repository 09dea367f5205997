"""The job of `megamask train`: join a launcher's ranks, start local ranks, or train in this process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from megamask.config.schema.layout import nearest_replicas
from megamask.config.schema.roots import TrainConfig
from megamask.errors import MegamaskError
from megamask.launch.placement import rank_place
from megamask.launch.rank_folder import leave_report
from megamask.resilience.heartbeat import Heartbeat
from megamask.resilience.numerics import RewindError
from megamask.resilience.parent_death import die_with_launcher
from megamask.resilience.signals import StopRequest
from megamask.resilience.stop_deadline import StopDeadline
from megamask.runs.layout import run_path
from megamask.training.outcome import failed_outcome, outcome
from megamask.training.progress import Progress
from megamask.training.resuming import is_complete
from megamask.training.startup import StartupClock
from megamask.training.stopping import StopReason
from megamask_pipelines.local_ranks import train_in_local_ranks


def run_training(config: TrainConfig, arguments: Sequence[str], signals: StopRequest) -> dict[str, Any]:
    """Train; a complete run is only reported.

    Args:
        arguments: the command line after `megamask`, for local ranks.
        signals: stop requests to this process; its handlers are in place.

    Returns: run_id, run_dir, step, loss, exit_code, reason.
    Raises:
        MegamaskError: the attempt failed; its exit code names the kind.
    """
    run_dir = run_path(config.run.output_dir, config.run.name)
    try:
        if (place := rank_place()) is not None:
            place.check_world_size(config.layout.num_processes, nearest=nearest_replicas(config, place.world_size))
        elif is_complete(run_dir, config):
            return outcome(run_dir, step=config.training.steps, exit_code=0, reason=StopReason.FINISHED.description)
        elif config.layout.num_processes > 1:
            return train_in_local_ranks(run_dir, config, config.layout.num_processes, arguments, signals)
        reason, progress = pretrain(config, signals)
        answer = outcome(run_dir, step=progress.step, exit_code=int(reason.exit_code), reason=reason.description)
        # the loss comes from this rank, not from rank 0's files
        return answer if progress.loss is None else {**answer, "loss": progress.loss}
    except MegamaskError as error:
        with contextlib.suppress(MegamaskError, OSError):  # the error itself must be reported in any case
            error.details = failed_outcome(run_dir, error)
        raise


def pretrain(config: TrainConfig, signals: StopRequest) -> tuple[StopReason, Progress]:
    """Train on this rank until an attempt ends other than by a rewind; every rank of the layout calls it.

    Returns: why the attempt ended and how far the run is, the same on every rank.
    Raises:
        MegamaskError: the attempt failed; everything that must be recorded is.
    """
    startup, heartbeat = StartupClock(), Heartbeat.of_environment()
    # torch is imported after the checks of the callers
    from megamask.engine.backend import select_device
    from megamask.engine.probes import check_machine
    from megamask.engine.process_group import destroy_process_group
    from megamask.training.attempt_scope import attempt_scope
    from megamask.training.build import build_run
    from megamask.training.loop import train
    from megamask.training.run_data import RunData

    die_with_launcher()
    place = rank_place()
    rank = 0 if place is None else place.rank
    with contextlib.ExitStack() as stack:
        data = RunData(config, stack)
        while True:
            with contextlib.ExitStack() as around:
                with contextlib.suppress(RewindError), attempt_scope(config, data, rank) as scope:
                    last_act = functools.partial(scope.ended_by_deadline, leave_report)
                    around.enter_context(StopDeadline.of(config.launch, signals, heartbeat, last_act=last_act))
                    select_device()
                    check_machine(config)
                    if rank == 0:
                        scope.claim(config, data)
                    scope.reason = train(build_run(config, data, scope, signals, startup, heartbeat))
                    heartbeat.enter("close")
                if scope.reason is not StopReason.NONE:
                    destroy_process_group()
                    return scope.reason, scope.progress
            # rewound, and recorded: the next attempt goes on in this process
            heartbeat.enter("restore")
            scope.release()
            startup = StartupClock(age_s=0.0)
