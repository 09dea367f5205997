"""The answer of a training command, from its run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamask.errors import ExitCode, MegamaskError
from megamask.runs.layout import record_path
from megamask.runs.record import read_run
from megamask.runs.status import read_status
from megamask.tracking.journal.seek import find_step, last_step
from megamask.tracking.records import Step, read_record


def outcome(run_dir: Path, *, step: int | None, exit_code: int, reason: str | None) -> dict[str, Any]:
    """Return run_id, run_dir, step, loss, exit_code and reason; run_id and the loss come from the run directory."""
    line = last_step(run_dir) if step is None else find_step(run_dir, step)
    record = None if line is None else read_record(line)
    return {
        "run_id": read_run(run_dir).run_id,
        "run_dir": str(run_dir),
        "step": step,
        "loss": record.loss if isinstance(record, Step) else None,
        "exit_code": exit_code,
        "reason": reason,
    }


def failed_outcome(run_dir: Path, error: MegamaskError) -> dict[str, object]:
    """Return the same fields for a command that failed, as far as they are known."""
    answer: dict[str, object] = dict.fromkeys(("run_id", "run_dir", "step", "loss"))
    if record_path(run_dir).is_file() and error.exit_code != ExitCode.USAGE:
        status = read_status(run_dir)
        answer = outcome(run_dir, step=status.step if status else None, exit_code=int(error.exit_code), reason=None)
    return {**answer, "run_dir": str(run_dir), "reason": error.message}
