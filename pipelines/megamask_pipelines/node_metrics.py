"""Figures of a run for the metrics file of its first node, from the run directory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, TypeAlias

from megamask.checkpoint.names import parse_folder_name
from megamask.checkpoint.reader import candidates
from megamask.config.schema.roots import TrainConfig
from megamask.launch.metrics_file import MetricsFile, RunFigures
from megamask.runs.claims import claimed_attempts
from megamask.tracking.journal.lines import tail

_Context: TypeAlias = contextlib.AbstractContextManager[MetricsFile | None]
# Holds the newest step line also where previews, which are the longest lines, follow it.
_TAIL_BYTES = 2**18


def metrics_file(config: TrainConfig, run_dir: Path, node: int) -> _Context:
    """Return the metrics file of a node, or a context of None where launch.metrics_folder is null."""
    if config.launch.metrics_folder is None:
        return contextlib.nullcontext()
    figures = None if node > 0 else lambda: run_figures(run_dir)
    return MetricsFile(Path(config.launch.metrics_folder), config.run.name, node, figures)


def run_figures(run_dir: Path) -> RunFigures:
    """Return the newest figures of a run; one that has not begun has none.

    Raises:
        OSError, StorageError: the storage refuses.
    """
    attempts, commits, step = claimed_attempts(run_dir), candidates(run_dir), _newest_step(run_dir)
    newest = parse_folder_name(commits[0].name) if commits else None
    return RunFigures(
        restarts=attempts[-1] - 1 if attempts else None,
        loss_nats_per_token=_number(step.get("loss")),
        consumed_tokens=_number(step.get("consumed_tokens")),
        tokens_per_second=_number(step.get("tokens_per_second")),
        checkpoint_step=None if newest is None else newest[0],
    )


def _newest_step(run_dir: Path) -> dict[str, Any]:
    records = (line.record() for line in reversed(tail(run_dir, _TAIL_BYTES)))
    return next((record for record in records if record is not None and record["kind"] == "step"), {})


def _number(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
