"""What of a journal MLflow is told: metrics, tags and the run's status. Pure: nothing here knows MLflow.

MLflow keeps every value that it is given, and a point sent twice with the same time and value once. So a point's time
is its record's, and a step that a later attempt repeats is not sent again: the noise law makes it the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

from megamask.tracking.journal_reader import Record

RunStatus = Literal["RUNNING", "FINISHED", "KILLED", "FAILED"]

_STEP_METRICS = (
    "loss",
    "nelbo_nats_per_token",
    "grad_norm",
    "learning_rate",
    "global_batch_size",
    "consumed_samples",
    "consumed_tokens",
    "processed_tokens",
    "masked_tokens",
    "tokens_per_second",
    "mfu",
)
_ASKED_TO_STOP = frozenset({75, 93, 130})


class Point(NamedTuple):
    """One value of a metric; the time is in milliseconds since 1970."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(kw_only=True)
class Memory:
    """What must outlive a process so that the next one goes on without doubling anything.

    Args:
        sent_through: highest step already sent, by kind of record.
        is_completed: a run_completed record was the last word on the run.
    """

    sent_through: dict[str, int] = field(default_factory=dict)
    is_completed: bool = False


@dataclass(kw_only=True)
class Update:
    """What some records change: points to add, tags to set, and the last status that they imply with its time."""

    points: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    status: RunStatus | None = None
    status_time_ms: int = 0


def update_of(records: list[Record], memory: Memory) -> Update:
    """Reads records in order; `memory` is changed to what they leave behind."""
    update = Update()
    for record in records:
        kind = record["kind"]
        step = record.get("step")
        if kind in ("step", "evaluation", "checkpoint_committed") and isinstance(step, int):
            if kind == "checkpoint_committed":
                update.tags.update(_commit_tags(record))
            stream = f"evaluation:{record['split']}" if kind == "evaluation" and "split" in record else kind
            if step > memory.sent_through.get(stream, -1):
                memory.sent_through[stream] = step
                update.points.extend(_points(record))
        elif kind == "attempt_started":
            update.tags["megamask.attempts"] = str(record.get("attempt"))
        status = _status_after(record, memory)
        if status is not None:
            update.status, update.status_time_ms = status, milliseconds(record["time"])
    return update


def _status_after(record: Record, memory: Memory) -> RunStatus | None:
    """The status over all attempts: FINISHED is a completed run; an attempt that ended where it was told to is KILLED.

    (MLflow has no word for "stopped, may go on"; KILLED is the one that does not claim that the run is done.)
    """
    kind = record["kind"]
    if kind == "attempt_started":
        memory.is_completed = False
        return "RUNNING"
    if kind == "run_completed":
        memory.is_completed = True
        return "FINISHED"
    if kind != "attempt_ended":
        return None
    code = record.get("exit_code")
    if code == 0:
        is_done = memory.is_completed or record.get("phase") == "done"
        return "FINISHED" if is_done else "KILLED"
    return "KILLED" if code in _ASKED_TO_STOP else "FAILED"


def _points(record: Record) -> list[Point]:
    kind = record["kind"]
    values: dict[str, Any]
    if kind == "step":
        values = {key: record.get(key) for key in _STEP_METRICS}
        values |= {f"seconds.{phase}": value for phase, value in _object(record.get("seconds")).items()}
        values |= {f"loss.{term}": value for term, value in _object(record.get("loss_terms")).items()}
    elif kind == "evaluation":
        skipped = ("seq", "step")
        values = {f"evaluation.{key}": value for key, value in record.items() if key not in skipped}
        values = {key: value for key, value in values.items() if not isinstance(value, str) or _is_special(value)}
    else:
        values = {"checkpoint.step": record["step"], "checkpoint.stall_s": record.get("stall_s")}
    time = milliseconds(record["time"])
    return [
        Point(key, number, time, record["step"])
        for key, value in values.items()
        if (number := _number(value)) is not None
    ]


def _commit_tags(record: Record) -> dict[str, str]:
    digest = str(record.get("digest"))
    step = record["step"]
    return {
        "megamask.last_commit.step": str(step),
        "megamask.last_commit.digest": digest,
        f"megamask.commit.step-{step:08d}": digest,
    }


def milliseconds(time: str) -> int:
    """A journal's time as milliseconds since 1970, cut off, so that the same record always gives the same point."""
    moment = datetime.fromisoformat(time)
    return int(moment.timestamp()) * 1000 + moment.microsecond // 1000


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_special(value: str) -> bool:
    return value in ("nan", "inf", "-inf")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    return float(value) if not isinstance(value, str) or _is_special(value) else None
