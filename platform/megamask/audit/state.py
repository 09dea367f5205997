"""The state of a run from its directory alone, and of every run in a folder."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megamask.audit.history import moment, read_history
from megamask.checkpoint.commit import load_commit
from megamask.checkpoint.reader import candidates
from megamask.errors import MegamaskError
from megamask.runs.claims import claimed_attempts, has_died, is_live, read_claim
from megamask.runs.configs import newest_steps
from megamask.runs.layout import record_path
from megamask.runs.record import read_run
from megamask.runs.status import read_status
from megamask.tracking.records import Evaluation, Incident, Straggler

_STRAGGLERS = 5


def run_state(run_dir: Path) -> dict[str, Any]:
    """Read status.json, claims, rank files, both ends of each attempt's journal, and the commits.

    Returns:
        run_id, run_dir, phase, is_live, has_died (the process that holds the claim is known to be gone), claim_node
        and scheduler_id of the claim, heard_age_s (since the newest of status.json and the journal's last line),
        attempt, num_attempts, step, steps, loss, nelbo_nats_per_token, evaluation, best, eta_s, attempt_exit_code,
        reason, node, time, last_line_time, last_line_age_s, last_checkpoint, num_checkpoints, checkpoints (newest
        first), stragglers (the newest five), num_incidents, are_all_incidents, last_incident, attempts. Unknown
        values are null. step is the last one journalled. Only the ends of a long journal are read: are_all_incidents
        is true if num_incidents counts all of it.

    Raises:
        UsageError: not a run directory.
    """
    record = read_run(run_dir)
    status = read_status(run_dir)
    history = read_history(run_dir, status)
    attempts, checkpoints = claimed_attempts(run_dir), candidates(run_dir)
    alive = bool(attempts) and is_live(run_dir, attempts[-1])
    step, steps = history.last_step, _steps(run_dir, record.recorded_steps)
    done = step.step if step else status.step if status else None
    last = history.last_line
    claim = (read_claim(run_dir, attempts[-1]) if attempts else None) or {}
    now = datetime.now(UTC)
    heard = max((moment(time) for time in (status and status.time, last and last.time) if time), default=None)
    pace = history.seconds_per_step if alive else None
    return {
        "run_id": record.run_id,
        "run_dir": str(run_dir),
        "phase": status.phase if status else None,
        "is_live": alive,
        "has_died": bool(attempts) and has_died(run_dir, attempts[-1]),
        "claim_node": claim.get("node"),
        "scheduler_id": claim.get("scheduler_id"),
        "heard_age_s": None if heard is None else (now - heard).total_seconds(),
        "attempt": attempts[-1] if attempts else None,
        "num_attempts": len(attempts),
        "step": done,
        "steps": steps,
        "loss": step.loss if step else None,
        "nelbo_nats_per_token": step.nelbo_nats_per_token if step else None,
        "evaluation": _evaluation(history.last_evaluation),
        "best": _best(checkpoints),
        "eta_s": None if pace is None or done is None else round(pace * max(0, steps - done), 3),
        "attempt_exit_code": status.exit_code if status else None,
        "reason": status.reason if status else None,
        "node": status.node if status else None,
        "time": status.time if status else None,
        "last_line_time": last.time if last else None,
        "last_line_age_s": (now - moment(last.time)).total_seconds() if last else None,
        "last_checkpoint": checkpoints[0].name if checkpoints else None,
        "num_checkpoints": len(checkpoints),
        "checkpoints": [folder.name for folder in checkpoints],
        "stragglers": [_straggler(record) for record in history.stragglers[-_STRAGGLERS:]],
        "num_incidents": len(history.incidents),
        "are_all_incidents": history.are_all_incidents,
        "last_incident": _incident(history.incidents[-1]) if history.incidents else None,
        "attempts": [{**asdict(attempt), "seconds": attempt.seconds} for attempt in history.attempts],
    }


def runs_in(folder: Path) -> list[Path]:
    """Return the run directories directly in a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and record_path(path).is_file())


def run_states(folder: Path) -> list[dict[str, Any]]:
    """Return the state of every run in a folder; a damaged run has `error` and its run_dir only."""
    states: list[dict[str, Any]] = []
    for run_dir in runs_in(folder):
        try:
            states.append(run_state(run_dir))
        except MegamaskError as error:
            states.append({"run_dir": str(run_dir), "error": error.message})
    return states


def _best(checkpoints: list[Path]) -> dict[str, Any] | None:
    """The commit with the lowest bound of the newest kind among those that are there; damaged ones are left out."""
    found = []
    for folder in checkpoints:
        try:
            commit = load_commit(folder)
        except MegamaskError:
            continue
        if commit.bound is not None:
            found.append((-commit.bound_from_step, commit.bound, -commit.step, folder.name))
    if not found:
        return None
    _, bound, step, name = min(found)
    return {"checkpoint": name, "step": -step, "nelbo_nats_per_token": bound}


def _evaluation(record: Evaluation | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {
        "step": record.step,
        "nelbo_nats_per_token": record.nelbo_nats_per_token,
        "standard_error": record.standard_error,
        "bits_per_byte": record.bits_per_byte,
    }


def _incident(record: Incident) -> dict[str, Any]:
    return {"time": record.time, "incident": record.incident, "problem": record.problem}


def _straggler(record: Straggler) -> dict[str, Any]:
    names = ("time", "step", "rank", "node", "section", "seconds_per_step", "median_s")
    return {name: getattr(record, name) for name in names}


def _steps(run_dir: Path, recorded: int) -> int:
    """training.steps of the newest attempt; of the beginning where no config of an attempt can be read."""
    steps = newest_steps(run_dir)
    return recorded if steps is None else steps
