"""One training command: is there anything to do, in how many processes, and how did it end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.roots import TrainConfig
from megamask.launch.local import failure_of, is_launched, run_local_ranks
from megamask.resilience.status import Status, read_status, write_status
from megamask.tracking.journal_reader import tail
from megamask.training.run_directory import is_complete, read_run, run_path

_TAIL_BYTES = 1 << 20


def num_processes(layout: LayoutConfig) -> int:
    """Processes that a layout needs: the product of its axes."""
    return layout.tensor_parallel_size * layout.pipeline_parallel_size * layout.data_parallel_size


def run_training(config: TrainConfig, arguments: Sequence[str]) -> dict[str, Any]:
    """Joins a launcher's ranks, starts local ranks, or trains right here; a complete run is only reported.

    Args:
        arguments: the command line after `megamask`, for local ranks.

    Raises:
        MegamaskError: the attempt failed; its exit code says how.
    """
    run_dir = run_path(config.run.output_dir, config.run.name)
    if not is_launched():
        if is_complete(run_dir, config):
            return outcome(run_dir)
        if num_processes(config.layout) > 1:
            exits = run_local_ranks(arguments, num_processes(config.layout))
            if (failure := failure_of(exits)) is not None:
                _close_status(run_dir, int(failure.exit_code), failure.message)
                raise failure
            return outcome(run_dir)
    from megamask_pipelines.pretrain import pretrain  # after the checks above: it imports torch

    pretrain(config)
    return outcome(run_dir)


def _close_status(run_dir: Path, exit_code: int, reason: str) -> None:
    """Tells a crash in status.json when rank 0 could not."""
    status = read_status(run_dir)
    if status is not None and status.phase in ("starting", "running"):
        closed = Status(
            attempt=status.attempt,
            phase="failed",
            exit_code=exit_code,
            step=status.step,
            node=status.node,
            reason=reason.splitlines()[0],
        )
        write_status(run_dir, closed)


def outcome(run_dir: Path) -> dict[str, Any]:
    """What a training command answers, from the run directory alone."""
    record, status = read_run(run_dir), read_status(run_dir)
    recent = (line.record() for line in reversed(tail(run_dir, _TAIL_BYTES)))
    step = next((found for found in recent if found is not None and found["kind"] == "step"), None)
    return {
        "run_id": record.run_id,
        "run_dir": str(run_dir),
        "step": status.step if status else None,
        "loss": step["loss"] if step else None,
        "exit_code": status.exit_code if status else 1,
        "reason": status.reason if status else "status.json is missing",
    }
