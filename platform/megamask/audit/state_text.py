"""The state of a run as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# About ten lines: of many attempts the first and the last ones are shown, the others counted.
_SHOWN_ATTEMPTS = 4
_REASON_CHARACTERS = 100
# A run on another node writes status.json every few seconds, and nothing during an evaluation or a long save.
_SILENT_S = 600.0
_CAUSES = ("productive", "lost", "startup", "restore", "save", "evaluation", "waiting", "other")


def state_text(result: dict[str, Any]) -> str:
    """Return about ten lines on the state of a run."""
    written = f", written by {result['node']}" if result["node"] else ""
    facts = {
        "run": f"{result['run_dir']} ({result['run_id']})",
        "phase": _phase(result),
        "step": _progress(result),
        "loss": _loss(result),
        "best": _best(result["best"]),
        "commits": _commits(result["checkpoints"]),
        "incidents": _incidents(result),
        "slow": _stragglers(result["stragglers"]),
    }
    lines = [f"{name:10} {fact}" for name, fact in facts.items() if fact is not None]
    lines += _attempt_lines(result["attempts"])
    if result["last_line_time"] is not None:
        age = duration(max(0.0, result["last_line_age_s"]))
        lines.append(f"{'last line':10} {_clock(result['last_line_time'])}, {age} ago{written}")
    return "\n".join(lines)


def goodput_text(account: Mapping[str, Any]) -> str:
    """Return a line for each cause of the run's time, then one for each attempt."""
    share = "unknown" if account["goodput"] is None else f"{account['goodput']:.1%}"
    lines = [f"goodput    {share} of {duration(account['total_s'])}"]
    for name in _CAUSES:
        seconds = account[f"{name}_s"]
        part = seconds / account["total_s"] if account["total_s"] else 0.0
        lines.append(f"  {name:10} {duration(seconds):>12} {part:6.1%}")
    for row in account["attempts"]:
        parts = [f"{name} {duration(row[f'{name}_s'])}" for name in _CAUSES if row[f"{name}_s"] >= 0.5]
        lines.append(f"attempt {row['attempt']:<3} {', '.join(parts)}")
    return "\n".join(lines)


def _phase(result: Mapping[str, Any]) -> str:
    phase, code = str(result["phase"] or "unknown (no status.json)"), result["attempt_exit_code"]
    if phase in ("starting", "running") and not result["is_live"]:
        return f"{phase}{_elsewhere(result)}"
    if code is None:
        return phase
    reason = f": {_short(result['reason'])}" if result["reason"] else ""
    return f"{phase} (exit code {code}){reason}"


def _elsewhere(result: Mapping[str, Any]) -> str:
    """The end of the phase of a run that no process of this host holds."""
    if result["has_died"]:
        return ", but it crashed: the process that held it on this host is gone"
    job = "" if result["scheduler_id"] is None else f" ({result['scheduler_id']})"
    age = result["heard_age_s"]
    if age is None:
        return f" on {result['claim_node']}{job}, never heard from"
    heard = f" on {result['claim_node']}{job}, last heard {duration(max(0.0, age))} ago"
    return heard if age < _SILENT_S else f"{heard}: it crashed, hangs, or makes a long pause"


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


def _best(best: Mapping[str, Any] | None) -> str | None:
    return None if best is None else f"bound {best['nelbo_nats_per_token']:.4f} at step {best['step']}"


def line_of_state(state: Mapping[str, Any]) -> str:
    """Return the line of a run in a list of runs."""
    name = Path(state["run_dir"]).name
    if "error" in state:
        return f"{name:24} {_short(state['error'])}"
    loss = state["loss"] if isinstance(state["loss"], float) else None
    facts = [
        f"{state['step'] or 0}/{state['steps']}",
        "-" if loss is None else f"loss {loss:.4f}",
        _best(state["best"]) or "no bound",
        _phase(state),
    ]
    return f"{name:24} {'  '.join(facts)}"


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


def _stragglers(named: Sequence[Mapping[str, Any]]) -> str | None:
    """The ranks that were named as slow, each once, with what was measured last."""
    newest = {(straggler["rank"], straggler["section"]): straggler for straggler in named}
    ranks = [
        f"rank {rank} on {straggler['node']} ({section}, {straggler['seconds_per_step']:.3g} s a step, median "
        f"{straggler['median_s']:.3g} s, at step {straggler['step']})"
        for (rank, section), straggler in newest.items()
    ]
    return ", ".join(ranks) or None


def _attempt_lines(attempts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each attempt; of many the first, what became of those between, and the last."""
    if len(attempts) <= _SHOWN_ATTEMPTS:
        return [_attempt_line(attempt) for attempt in attempts]
    folded, last = attempts[1 : 2 - _SHOWN_ATTEMPTS], attempts[2 - _SHOWN_ATTEMPTS :]
    counts = Counter(_ending(attempt) for attempt in folded)
    endings = ", ".join(f"{count} {ending}" for ending, count in counts.most_common())
    between = f"{'attempts':10} {folded[0]['number']}-{folded[-1]['number']}: {endings}"
    return [_attempt_line(attempts[0]), between, *map(_attempt_line, last)]


def _attempt_line(attempt: Mapping[str, Any]) -> str:
    first, last = attempt["first_step"], attempt["last_step"]
    steps = "no step" if last is None else f"step {last}" if first == last else f"steps {first}-{last}"
    after = "" if attempt["seconds"] is None else f" after {duration(attempt['seconds'])}"
    committed = attempt["committed_step"]
    saved = "nothing committed" if committed is None else f"committed step {committed}"
    has_reason = attempt["outcome"] in ("failed", "crashed", "unknown") and attempt["reason"]
    reason = f": {_short(attempt['reason'])}" if has_reason else ""
    started = _clock(attempt["started"]) if attempt["started"] else "unknown time"
    by, ending = attempt["superseded_by"], _ending(attempt)
    ending = ending if by is None else f"superseded by attempt {by} ({attempt['exit_code']})"
    changes = "".join(f"; {change}" for change in attempt["changes"])
    return f"attempt {attempt['number']:<2} {started}  {steps}  {ending}{after}, {saved}{changes}{reason}"


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
