"""`megamask status RUN`: where a run stands, from its directory alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("run", help="a run directory, <run.output_dir>/<run.name>")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Reads status.json, the claims, the journal's last step and the names of committed checkpoints.

    Returns:
        run_id, run_dir, phase, is_live, attempt, num_attempts, step, steps, loss, attempt_exit_code, reason, node,
        time, last_checkpoint, num_checkpoints. What is not known is null. step is the last one journalled.

    Raises:
        UsageError: not a run directory.
    """
    from megamask.checkpoint.reader import candidates
    from megamask.resilience.claims import claimed_attempts, is_live
    from megamask.resilience.status import read_status
    from megamask.tracking.journal_seek import last_step
    from megamask.training.run_directory import read_run

    run_dir = Path(arguments.run)
    record = read_run(run_dir)
    status, step = read_status(run_dir), last_step(run_dir)
    attempts, checkpoints = claimed_attempts(run_dir), candidates(run_dir)
    return {
        "run_id": record.run_id,
        "run_dir": str(run_dir),
        "phase": status.phase if status else None,
        "is_live": bool(attempts) and is_live(run_dir, attempts[-1]),
        "attempt": attempts[-1] if attempts else None,
        "num_attempts": len(attempts),
        "step": step["step"] if step else status.step if status else None,
        "steps": _steps(run_dir, record.recorded_steps),
        "loss": step.get("loss") if step else None,
        "attempt_exit_code": status.exit_code if status else None,
        "reason": status.reason if status else None,
        "node": status.node if status else None,
        "time": status.time if status else None,
        "last_checkpoint": checkpoints[0].name if checkpoints else None,
        "num_checkpoints": len(checkpoints),
    }


def _steps(run_dir: Path, recorded: int) -> int:
    """training.steps of the newest attempt; what the run began with where no config of an attempt can be read."""
    from megamask.config.load import load_train_config
    from megamask.errors import UsageError

    configs = sorted((run_dir / "config").glob("attempt-*.yaml"))
    try:
        return load_train_config(configs[-1]).config.training.steps if configs else recorded
    except UsageError:
        return recorded


def render(result: dict[str, Any]) -> str:
    """A few lines for a person."""
    loss = result["loss"]
    facts = {
        "run": f"{result['run_dir']} ({result['run_id']})",
        "phase": _phase(result),
        "step": f"{result['step'] if result['step'] is not None else 'none'} of {result['steps']}",
        "loss": f"{loss:.4f} nats per token" if isinstance(loss, float) else loss,
        "last commit": result["last_checkpoint"] or "none",
        "attempts": result["num_attempts"],
        "reason": result["reason"],
        "written": f"{result['time']} by {result['node']}" if result["time"] else None,
    }
    return "\n".join(f"{name:12} {fact}" for name, fact in facts.items() if fact is not None)


def _phase(result: dict[str, Any]) -> str:
    phase, code = result["phase"] or "unknown (no status.json)", result["attempt_exit_code"]
    if phase in ("starting", "running") and not result["is_live"]:
        return f"{phase}, but no process on this host holds the run: it crashed, or runs elsewhere"
    return phase if code is None else f"{phase} (exit code {code})"
