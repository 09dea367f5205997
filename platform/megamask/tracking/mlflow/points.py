"""What of a journal MLflow is told: metrics, tags, entries and the run's status. Pure: nothing here knows MLflow.

MLflow keeps every value that it is given, and a point sent twice with the same time and value once. So a point's time
is its record's, and a step that a later attempt repeats is not sent again: the noise law makes it the same step.

A name before the last "/" is the section in which MLflow draws a metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megamask.tracking.journal.lines import Record
from megamask.tracking.mlflow.entries import (
    CheckpointEntry,
    DatasetEntry,
    Point,
    checkpoint_of,
    damaged_marks,
    datasets_of,
    is_special,
    milliseconds,
    number,
    preview_of,
    pruned_marks,
)

__all__ = ["Memory", "Point", "RunStatus", "Update", "milliseconds", "status_after_exit", "update_of"]

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
_TERMS = ("seconds", "loss_terms")
_STREAMS = frozenset({"step", "evaluation", "checkpoint_committed", "sample_preview"})
_BY_NOISE_LEVEL = ("loss_by_noise_level", "masked_tokens_by_noise_level")
_ASKED_TO_STOP = frozenset({75, 93, 130})


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
    """What some records change.

    Args:
        points: to add.
        tags: to set.
        datasets: what the run reads.
        checkpoints: commits to enter.
        marks: tags to set on commits that stand there already, by folder name.
        texts: artifacts, by path.
        status: the last one that the records imply, if any, with its time.
    """

    points: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: list[DatasetEntry] = field(default_factory=list)
    checkpoints: list[CheckpointEntry] = field(default_factory=list)
    marks: dict[str, dict[str, str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    status: RunStatus | None = None
    status_time_ms: int = 0


def update_of(records: list[Record], memory: Memory, kept_times: Mapping[int, int] | None = None) -> Update:
    """Reads records in order; `memory` is changed to what they leave behind.

    Args:
        kept_times: time of the point that MLflow holds, by step, where the memory was lost: a record of such a step
            with another time is the repetition.
    """
    update = Update()
    for record in records:
        kind = record["kind"]
        if kind in _STREAMS and isinstance(record.get("step"), int):
            _add_by_step(update, record, memory, kept_times or {})
        elif kind == "attempt_started":
            update.tags["megamask.attempts"] = str(record.get("attempt"))
            update.datasets.extend(datasets_of(record))
            update.points.extend(_start_points(record))
        elif kind == "checkpoint_pruned":
            update.marks.setdefault(str(record.get("checkpoint")), {}).update(pruned_marks(record))
        elif kind == "incident" and record.get("incident") == "checkpoint_damaged":
            update.marks.setdefault(str(record.get("checkpoint")), {}).update(damaged_marks(record))
        status = _status_after(record, memory)
        if status is not None:
            update.status, update.status_time_ms = status, milliseconds(record["time"])
    return update


def status_after_exit(exit_code: int | None, *, is_done: bool) -> RunStatus:
    """The status that an attempt's end leaves behind; None is a death that left no exit code."""
    if exit_code == 0:
        return "FINISHED" if is_done else "KILLED"
    return "KILLED" if exit_code in _ASKED_TO_STOP else "FAILED"


def _add_by_step(update: Update, record: Record, memory: Memory, kept_times: Mapping[int, int]) -> None:
    kind, step = record["kind"], record["step"]
    if kind == "checkpoint_committed":  # each attempt's commit is a checkpoint of its own
        update.checkpoints.append(checkpoint_of(record))
        update.tags["megamask.last_commit.step"] = str(step)
        update.tags["megamask.last_commit.digest"] = str(record.get("digest"))
        return
    stream = f"evaluation:{record['split']}" if kind == "evaluation" and "split" in record else kind
    if step <= memory.sent_through.get(stream, -1):
        return
    memory.sent_through[stream] = step
    if kind == "sample_preview":
        path, text = preview_of(record)
        update.texts[path] = text
    elif kind != "step" or kept_times.get(step, milliseconds(record["time"])) == milliseconds(record["time"]):
        update.points.extend(_points(record))


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
    return status_after_exit(record.get("exit_code"), is_done=memory.is_completed or record.get("phase") == "done")


def _points(record: Record) -> list[Point]:
    values: dict[str, Any]
    if record["kind"] == "step":
        values = {key: record.get(key) for key in _STEP_METRICS}
        for name in _TERMS:
            values |= {f"{name}/{term}": value for term, value in _object(record.get(name)).items()}
        for name in _BY_NOISE_LEVEL:
            levels = record.get(name) or []
            values |= {f"{name}/{k / 10:.1f}-{(k + 1) / 10:.1f}": value for k, value in enumerate(levels)}
    else:
        skipped = ("seq", "step")
        values = {f"evaluation/{key}": value for key, value in record.items() if key not in skipped}
        values = {key: value for key, value in values.items() if not isinstance(value, str) or is_special(value)}
    return _numbers(values, record, record["step"])


def _start_points(record: Record) -> list[Point]:
    """How long an attempt took to its first step, at the step that it resumed from."""
    step = _object(record.get("resumed_from")).get("step", 0)
    phases = {"restore": record.get("restore_s")} | _object(record.get("startup_s"))
    return _numbers({f"startup_s/{phase}": value for phase, value in phases.items()}, record, step)


def _numbers(values: Mapping[str, Any], record: Record, step: int) -> list[Point]:
    time = milliseconds(record["time"])
    return [
        Point(key, value_of, time, step) for key, value in values.items() if (value_of := number(value)) is not None
    ]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
