"""Figures of a run for the metrics file of its first node, from the run directory."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TypeAlias

from megamask.checkpoint.names import parse_folder_name
from megamask.checkpoint.reader import candidates
from megamask.config.schema.roots import TrainConfig
from megamask.launch.metrics_file import MetricsFile, RunFigures
from megamask.runs.claims import claimed_attempts
from megamask.tracking.journal.lines import tail
from megamask.tracking.records import Step, read_record

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
        loss_nats_per_token=_finite(step.loss),
        consumed_tokens=step.consumed_tokens,
        tokens_per_second=_finite(step.tokens_per_second),
        checkpoint_step=None if newest is None else newest[0],
    )


def _newest_step(run_dir: Path) -> Step:
    """Return the newest step at the end of the journal, or one without figures."""
    lines = (line.record() for line in reversed(tail(run_dir, _TAIL_BYTES)))
    records = (read_record(line) for line in lines if line is not None)
    return next((record for record in records if isinstance(record, Step)), Step(step=0))


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
