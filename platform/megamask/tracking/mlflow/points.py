"""Metrics, tags, entries and status that a journal gives MLflow. Pure: nothing here imports MLflow.

MLflow keeps every value that it is given, and a point sent twice with the same time and value once. So a point's time
is its record's, and a step that a later attempt repeats is not sent again: the noise law makes it the same step.

A name before the last "/" is the section in which MLflow draws a metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megamask.tracking.journal.lines import Record as Line
from megamask.tracking.mlflow.entries import (
    CheckpointEntry,
    DatasetEntry,
    Point,
    checkpoint_of,
    damaged_marks,
    dataset_key,
    datasets_of,
    milliseconds,
    preview_of,
    pruned_marks,
)
from megamask.tracking.records import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointPruned,
    Evaluation,
    Incident,
    JournalRecord,
    RunCompleted,
    SamplePreview,
    Step,
    read_record,
)

__all__ = ["Memory", "Point", "RunStatus", "Update", "milliseconds", "status_after_exit", "update_of"]

RunStatus = Literal["RUNNING", "FINISHED", "KILLED", "FAILED"]

# By its section, the part before the last "/": MLflow draws those without one first.
# The first section has what people read first: loss, bits per byte and the bound.
LOSS = "loss_nats_per_token"
BOUND = "validation_bound_nats_per_token"
_STEP_METRICS = {
    LOSS: "loss",
    "optimizer/grad_norm": "grad_norm",
    "optimizer/learning_rate": "learning_rate",
    "progress/consumed_samples": "consumed_samples",
    "progress/consumed_tokens": "consumed_tokens",
    "progress/masked_tokens": "masked_tokens",
    "speed/tokens_per_second": "tokens_per_second",
    "speed/mfu": "mfu",
    "memory/peak_bytes": "peak_memory_bytes",
}
HEAD_TAG = "journal_head"
_ASKED_TO_STOP = frozenset({75, 93, 130})


@dataclass(kw_only=True)
class Memory:
    """State that outlives a process, so that the next one continues without duplicates.

    Args:
        sent_through: highest step already sent, by kind of record.
        is_completed: the last record on the state of the run was run_completed.
        bytes_per_token, rows: of the training splits together, for bits per byte and epochs.
        validation: name and digest of the dataset that bounds are measured on.
        attempts, datasets, facts, best, latest: what the description is made of.
        notes: sha256 of the descriptions that were sent.
    """

    sent_through: dict[str, int] = field(default_factory=dict)
    is_completed: bool = False
    bytes_per_token: float | None = None
    rows: int | None = None
    validation: list[str] | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    latest: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Update:
    """Changes that some records make.

    Args:
        points: to add.
        tags: to set.
        datasets: what the run reads.
        checkpoints: commits to enter.
        marks: tags to set on commits that are entered already, by folder name.
        texts: artifacts, by path.
        params: of an attempt.
        best: folder name of the commit that became the best one, if any did.
        is_described_anew: the description is out of date.
        status: the last one that the records imply, if any, with its time.
    """

    points: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: list[DatasetEntry] = field(default_factory=list)
    checkpoints: list[CheckpointEntry] = field(default_factory=list)
    marks: dict[str, dict[str, str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    best: str | None = None
    is_described_anew: bool = False
    status: RunStatus | None = None
    status_time_ms: int = 0


def update_of(lines: list[Line], memory: Memory, kept_times: Mapping[int, int] | None = None) -> Update:
    """Read journal lines in order; `memory` is changed to what they leave behind.

    Args:
        kept_times: time of the point that MLflow holds, by step, where the memory was lost: a record of such a step
            with another time is the repetition.
    """
    update = Update()
    for line in lines:
        record = read_record(line)
        match record:
            case Step() | Evaluation() | SamplePreview():
                _add_by_step(update, record, memory, kept_times or {})
            case CheckpointCommitted():
                _add_commit(update, record, str(line["prev"]), memory)
            case AttemptStarted():
                _add_start(update, record, memory)
            case CheckpointPruned():
                update.marks.setdefault(record.checkpoint, {}).update(pruned_marks(record))
            case Incident() if record.incident == "checkpoint_damaged":
                update.marks.setdefault(str(record.checkpoint), {}).update(damaged_marks(record))
            case AttemptEnded() if memory.attempts:
                memory.attempts[-1] |= {"last_step": record.step, "reason": record.reason}
                update.is_described_anew = True
        status = None if record is None else _status_after(record, memory)
        if status is not None:
            update.status, update.status_time_ms = status, milliseconds(line["time"])
    return update


def status_after_exit(exit_code: int | None, *, is_done: bool) -> RunStatus:
    """Return the status that an attempt's end leaves behind; None is a death that left no exit code."""
    if exit_code == 0:
        return "FINISHED" if is_done else "KILLED"
    return "KILLED" if exit_code in _ASKED_TO_STOP else "FAILED"


def _add_by_step(
    update: Update, record: Step | Evaluation | SamplePreview, memory: Memory, kept_times: Mapping[int, int]
) -> None:
    if record.step <= memory.sent_through.get(record.kind, -1):
        return
    memory.sent_through[record.kind] = record.step
    time = milliseconds(record.time)
    match record:
        case SamplePreview():
            path, text = preview_of(record)
            update.texts[path] = text
        case Evaluation():
            update.points += _evaluation_points(record, memory)
        case Step():
            if memory.attempts:
                memory.attempts[-1].setdefault("first_step", record.step)
                memory.attempts[-1]["last_step"] = record.step
            memory.facts["tokens"] = record.consumed_tokens
            if kept_times.get(record.step, time) == time:
                update.points += _step_points(record, memory)


def _add_commit(update: Update, record: CheckpointCommitted, head: str, memory: Memory) -> None:
    """Enter a commit; each attempt's commit is a checkpoint of its own. `best` and `latest` name one each."""
    entry = checkpoint_of(record, dataset=_dataset_of(memory))
    update.checkpoints.append(entry)
    update.tags |= {
        "last_commit.step": str(record.step),
        "last_commit.digest": str(record.digest),
        HEAD_TAG: f"{record.seq - 1}:{head}",
    }
    _alias(update, memory.latest, entry.checkpoint, "latest")
    memory.latest = entry.checkpoint
    bound = (record.evaluation or {}).get("nelbo_nats_per_token")
    kind = (record.evaluation or {}).get("bound_from_step", 1)  # a new kind of bound begins a new comparison
    if isinstance(bound, int | float) and (
        memory.best is None or (-kind, bound) < (-memory.best.get("bound_from_step", 1), memory.best["bound"])
    ):
        _alias(update, None if memory.best is None else memory.best["checkpoint"], entry.checkpoint, "best")
        memory.best = {"checkpoint": entry.checkpoint, "step": record.step, "bound": bound, "bound_from_step": kind}
        update.tags |= {"best_checkpoint": entry.checkpoint, "best_bound_nats_per_token": f"{bound:.6g}"}
        update.best = entry.checkpoint
        update.is_described_anew = True


def _alias(update: Update, before: str | None, now: str, name: str) -> None:
    if before is not None:
        update.marks.setdefault(before, {})[f"alias.{name}"] = "no"
    update.marks.setdefault(now, {})[f"alias.{name}"] = "yes"


def _add_start(update: Update, record: AttemptStarted, memory: Memory) -> None:
    number, layout = record.attempt, record.layout or {}
    update.tags["attempts"] = str(number)
    update.tags |= {f"extended.{key}": f"{old} -> {new}" for key, (old, new) in (record.extended or {}).items()}
    update.tags |= {key: str(new) for key, (_, new) in (record.extended or {}).items()}
    if record.changed:
        changes = (f"{key} {old} -> {new}" for key, (old, new) in record.changed.items())
        update.tags[f"attempt_{number}.changed"] = ", ".join(changes)
    if record.user:
        update.tags["mlflow.user"] = record.user
    if record.code_version:
        commit = record.code_version.removesuffix("-dirty")
        update.tags |= {
            "mlflow.source.git.commit": commit,
            "git_dirty": "yes" if commit != record.code_version else "no",
        }
    facts = {"device": record.device, "world_size": record.world_size, "host": record.host, **layout}
    update.params |= {f"attempt_{number}.{key}": value for key, value in facts.items() if value is not None}
    libraries = record.libraries or {}
    update.tags |= {f"library.{name}": str(version) for name, version in libraries.items()}
    update.datasets.extend(datasets_of(record))
    update.points.extend(_start_points(record))
    held_out = [each for each in record.datasets or [] if each.get("split") == "validation"]
    trained = [each for each in record.datasets or [] if each.get("split") != "validation"]
    if held_out:
        memory.validation = list(dataset_key(held_out[0]))  # of several, the first corpus' bound is the run's
    if trained:
        memory.rows, tokens, size = (_total(trained, name) for name in ("rows", "tokens", "text_bytes"))
        memory.bytes_per_token = size / tokens if size and tokens else None
    memory.datasets = record.datasets or memory.datasets
    memory.facts |= {"parameters": record.num_parameters}
    memory.attempts.append(
        {
            "number": number,
            "host": record.host,
            "user": record.user,
            "device": record.device,
            "world_size": record.world_size,
            "layout": layout,
        }
    )
    update.is_described_anew = True


def _status_after(record: JournalRecord, memory: Memory) -> RunStatus | None:
    """The status over all attempts: FINISHED is a completed run; an attempt that ended where it had to is KILLED.

    (MLflow has no word for "stopped, may go on"; KILLED is the one that does not claim that the run is done.)
    """
    match record:
        case AttemptStarted():
            memory.is_completed = False
            return "RUNNING"
        case RunCompleted():
            memory.is_completed = True
            return "FINISHED"
        case AttemptEnded():
            return status_after_exit(record.exit_code, is_done=memory.is_completed or record.phase == "done")
        case _:
            return None


def _step_points(record: Step, memory: Memory) -> list[Point]:
    values: dict[str, Any] = {key: getattr(record, name) for key, name in _STEP_METRICS.items()}
    if record.nelbo_nats_per_token != record.loss:  # equal where the bound is all of the loss
        values["nelbo_nats_per_token"] = record.nelbo_nats_per_token
        values |= {f"loss_terms_nats_per_token/{term}": value for term, value in (record.loss_terms or {}).items()}
    values |= {f"sources/{name}": value for name, value in (record.consumed_by_source or {}).items()}
    if record.nelbo_nats_per_token is not None and memory.bytes_per_token:
        values["bits_per_byte"] = record.nelbo_nats_per_token / math.log(2) / memory.bytes_per_token
    if record.consumed_samples is not None:
        if memory.rows:
            values["progress/epoch"] = record.consumed_samples / memory.rows
        if record.consumed_samples != record.step * (record.global_batch_size or 0):  # not the same at every step
            values["progress/global_batch_size"] = record.global_batch_size
    if record.processed_tokens != record.consumed_tokens:
        values["progress/processed_tokens"] = record.processed_tokens
    values |= {f"step_time_s/{phase}": value for phase, value in (record.seconds or {}).items()}
    by_level = {LOSS: record.loss_by_noise_level, "masked_tokens": record.masked_tokens_by_noise_level}
    for name, levels in by_level.items():
        section = f"{name}_by_noise_level"
        values |= {f"{section}/{k / 10:.1f}-{(k + 1) / 10:.1f}": value for k, value in enumerate(levels or [])}
    return _numbers(values, record, record.step)


def _total(datasets: Sequence[Mapping[str, Any]], name: str) -> int | None:
    """Sum of a count over datasets; None where one lacks it."""
    counts = [count for each in datasets if isinstance(count := each.get(name), int)]
    return sum(counts) if len(counts) == len(datasets) else None


def _evaluation_points(record: Evaluation, memory: Memory) -> list[Point]:
    values: dict[str, Any] = {
        BOUND: record.nelbo_nats_per_token,
        "evaluation/standard_error_nats_per_token": record.standard_error,
        "evaluation/bits_per_byte": record.bits_per_byte,
    }
    for name, found in (record.by_source or {}).items():
        values[f"evaluation/{name}/bound_nats_per_token"] = found.get("nelbo_nats_per_token")
        values[f"evaluation/{name}/bits_per_byte"] = found.get("bits_per_byte")
    values |= {f"evaluation/pair_variance_{name}": value for name, value in (record.pair_variance or {}).items()}
    values |= {f"evaluation/clip_search_{name}": value for name, value in (record.clip_search or {}).items()}
    values |= {f"evaluation/{phase}_s": value for phase, value in (record.seconds or {}).items()}
    return _numbers(values, record, record.step, _dataset_of(memory))


def _start_points(record: AttemptStarted) -> list[Point]:
    """Return the time from an attempt's start to its first step, at the step that it resumed from."""
    step = (record.resumed_from or {}).get("step", 0)
    phases = {"restore": record.restore_s} | (record.startup_s or {})
    return _numbers({f"startup_s/{phase}": value for phase, value in phases.items()}, record, step)


def _dataset_of(memory: Memory) -> tuple[str, str] | None:
    return None if memory.validation is None else (memory.validation[0], memory.validation[1])


def _numbers(
    values: Mapping[str, Any], record: JournalRecord, step: int, dataset: tuple[str, str] | None = None
) -> list[Point]:
    time = milliseconds(record.time)
    return [
        Point(key, float(value), time, step, dataset)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
