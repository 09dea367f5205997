"""`megamask status RUN`: the history and state of a run, from its directory alone."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# About ten lines: of many attempts the first and the last ones are shown, the others counted.
_SHOWN_ATTEMPTS = 4
_REASON_CHARACTERS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("run", help="a run directory, <run.output_dir>/<run.name>")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read status.json, claims, rank files, both ends of each attempt's journal, and the names of checkpoints.

    Returns:
        run_id, run_dir, phase, is_live, attempt, num_attempts, step, steps, loss, nelbo_nats_per_token, evaluation,
        eta_s, attempt_exit_code, reason, node, time, last_line_time, last_line_age_s, last_checkpoint,
        num_checkpoints, checkpoints (newest first), num_incidents, are_all_incidents, last_incident, attempts. Unknown
        values are null. step is the last one journalled. Only the ends of a long journal are read:
        are_all_incidents is true if num_incidents counts all of it.

    Raises:
        UsageError: not a run directory.
    """
    from dataclasses import asdict
    from datetime import UTC, datetime

    from megamask.audit.history import moment, read_history
    from megamask.checkpoint.reader import candidates
    from megamask.runs.claims import claimed_attempts, is_live
    from megamask.runs.record import read_run
    from megamask.runs.status import read_status

    run_dir = Path(arguments.run)
    record = read_run(run_dir)
    status = read_status(run_dir)
    history = read_history(run_dir, status)
    attempts, checkpoints = claimed_attempts(run_dir), candidates(run_dir)
    alive = bool(attempts) and is_live(run_dir, attempts[-1])
    step, steps = history.last_step, _steps(run_dir, record.recorded_steps)
    done = step["step"] if step else status.step if status else None
    last = history.last_line
    pace = history.seconds_per_step if alive else None
    return {
        "run_id": record.run_id,
        "run_dir": str(run_dir),
        "phase": status.phase if status else None,
        "is_live": alive,
        "attempt": attempts[-1] if attempts else None,
        "num_attempts": len(attempts),
        "step": done,
        "steps": steps,
        "loss": step.get("loss") if step else None,
        "nelbo_nats_per_token": step.get("nelbo_nats_per_token") if step else None,
        "evaluation": _evaluation(history.last_evaluation),
        "eta_s": None if pace is None or done is None else round(pace * max(0, steps - done), 3),
        "attempt_exit_code": status.exit_code if status else None,
        "reason": status.reason if status else None,
        "node": status.node if status else None,
        "time": status.time if status else None,
        "last_line_time": last["time"] if last else None,
        "last_line_age_s": (datetime.now(UTC) - moment(last["time"])).total_seconds() if last else None,
        "last_checkpoint": checkpoints[0].name if checkpoints else None,
        "num_checkpoints": len(checkpoints),
        "checkpoints": [folder.name for folder in checkpoints],
        "num_incidents": len(history.incidents),
        "are_all_incidents": history.are_all_incidents,
        "last_incident": _incident(history.incidents[-1]) if history.incidents else None,
        "attempts": [{**asdict(attempt), "seconds": attempt.seconds} for attempt in history.attempts],
    }


def _evaluation(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    names = ("step", "nelbo_nats_per_token", "standard_error", "bits_per_byte")
    return None if record is None else {name: record.get(name) for name in names}


def _incident(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record.get(name) for name in ("time", "incident", "problem")}


def _steps(run_dir: Path, recorded: int) -> int:
    """training.steps of the newest attempt; what the run began with where no config of an attempt can be read."""
    from megamask.errors import UsageError
    from megamask.runs.configs import newest_config

    try:
        config = newest_config(run_dir)
        return recorded if config is None else config.training.steps
    except UsageError:
        return recorded


def render(result: dict[str, Any]) -> str:
    """About ten lines for a person."""
    written = f", written by {result['node']}" if result["node"] else ""
    facts = {
        "run": f"{result['run_dir']} ({result['run_id']})",
        "phase": _phase(result),
        "step": _progress(result),
        "loss": _loss(result),
        "commits": _commits(result["checkpoints"]),
        "incidents": _incidents(result),
    }
    lines = [f"{name:10} {fact}" for name, fact in facts.items() if fact is not None]
    lines += _attempt_lines(result["attempts"])
    if result["last_line_time"] is not None:
        age = duration(max(0.0, result["last_line_age_s"]))
        lines.append(f"{'last line':10} {_clock(result['last_line_time'])}, {age} ago{written}")
    return "\n".join(lines)


def _phase(result: dict[str, Any]) -> str:
    phase, code = str(result["phase"] or "unknown (no status.json)"), result["attempt_exit_code"]
    if phase in ("starting", "running") and not result["is_live"]:
        return f"{phase}, but no process on this host holds the run: it crashed, or runs elsewhere"
    if code is None:
        return phase
    reason = f": {_short(result['reason'])}" if result["reason"] else ""
    return f"{phase} (exit code {code}){reason}"


def _progress(result: dict[str, Any]) -> str:
    if result["step"] is None:
        return f"none of {result['steps']}"
    text = f"{result['step']} of {result['steps']} ({100 * result['step'] / max(1, result['steps']):.1f} %)"
    return text if result["eta_s"] is None else f"{text}, {duration(result['eta_s'])} to go"


def _loss(result: dict[str, Any]) -> str | None:
    if result["loss"] is None:
        return None
    loss = result["loss"]
    text = f"{loss:.4f} nats per token" if isinstance(loss, float) else f"{loss}"
    evaluation = result["evaluation"]
    if evaluation is None or not isinstance(evaluation["nelbo_nats_per_token"], float):
        return text
    error = evaluation["standard_error"]
    spread = f" ± {error:.4f}" if isinstance(error, float) else ""
    return (
        f"{text}; bound {evaluation['nelbo_nats_per_token']:.4f}{spread} on held-out text at step {evaluation['step']}"
    )


def _commits(names: Sequence[str]) -> str:
    if not names:
        return "none"
    if len(names) == 1:
        return names[0]
    older = ", ".join(str(int(name.split("-")[1])) for name in names[1:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{names[0]}; before it step {older}{more}"


def _incidents(result: dict[str, Any]) -> str | None:
    last = result["last_incident"]
    if last is None:
        return None
    count = result["num_incidents"] if result["are_all_incidents"] else f"at least {result['num_incidents']}"
    return f"{count}, the newest {_clock(last['time'])} {last['incident']}: {_short(last['problem'])}"


def _attempt_lines(attempts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each attempt; of many the first, what became of those between, and the last."""
    if len(attempts) <= _SHOWN_ATTEMPTS:
        return [_attempt_line(attempt) for attempt in attempts]
    folded, last = attempts[1 : 2 - _SHOWN_ATTEMPTS], attempts[2 - _SHOWN_ATTEMPTS :]
    counts = Counter(_ending(attempt) for attempt in folded)
    told = ", ".join(f"{count} {ending}" for ending, count in counts.most_common())
    between = f"{'attempts':10} {folded[0]['number']}-{folded[-1]['number']}: {told}"
    return [_attempt_line(attempts[0]), between, *map(_attempt_line, last)]


def _attempt_line(attempt: Mapping[str, Any]) -> str:
    first, last = attempt["first_step"], attempt["last_step"]
    steps = "no step" if last is None else f"step {last}" if first == last else f"steps {first}-{last}"
    after = "" if attempt["seconds"] is None else f" after {duration(attempt['seconds'])}"
    committed = attempt["committed_step"]
    saved = "nothing committed" if committed is None else f"committed step {committed}"
    is_told = attempt["outcome"] in ("failed", "crashed", "unknown") and attempt["reason"]
    reason = f": {_short(attempt['reason'])}" if is_told else ""
    started = _clock(attempt["started"]) if attempt["started"] else "unknown time"
    by, ending = attempt["superseded_by"], _ending(attempt)
    ending = ending if by is None else f"superseded by attempt {by} ({attempt['exit_code']})"
    return f"attempt {attempt['number']:<2} {started}  {steps}  {ending}{after}, {saved}{reason}"


def _ending(attempt: Mapping[str, Any]) -> str:
    words = {"crashed": "crashed without a word", "unknown": "crashed, or runs elsewhere"}
    outcome, code = str(attempt["outcome"]), attempt["exit_code"]
    if code is None:
        return words.get(outcome, outcome)
    return f"{outcome} ({code})"


def _clock(time: str) -> str:
    """A journal's time without its seconds, as 2026-01-31 14:02Z."""
    return f"{time[:10]} {time[11:16]}Z"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter, as 3 min, 2 h 5 min or 4 d 1 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def _short(text: str | None) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= _REASON_CHARACTERS else f"{line[:_REASON_CHARACTERS]}..."
