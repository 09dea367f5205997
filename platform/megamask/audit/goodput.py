"""Account of a run's wall-clock time, attempt by attempt, from the journal alone.

Productive are the seconds of the steps that the run kept. Steps behind the checkpoint that the next attempt resumed
from were computed again: their first seconds are lost. Goodput, or ETTR, is the productive part of the time from the
first process to the last line (Meta, arXiv:2410.21680, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from megamask.audit.history import moment
from megamask.tracking.journal.lines import read_journal
from megamask.tracking.records import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    Evaluation,
    JournalRecord,
    SamplePreview,
    Step,
    read_record,
)


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Seconds of one attempt, or of all together.

    Args:
        productive: of steps that the run kept.
        lost: of steps that a later attempt computed again.
        startup: from the start of rank 0's process to the attempt's first line, without the restore.
        restore: sweeping, verifying and loading a checkpoint.
        save: training waited for a checkpoint.
        evaluation: measuring the bound, writing samples.
        waiting: from the last sign of the attempt before to the start of this one's process.
        other: everything else, such as an end without a word.
    """

    productive: float = 0.0
    lost: float = 0.0
    startup: float = 0.0
    restore: float = 0.0
    save: float = 0.0
    evaluation: float = 0.0
    waiting: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(float(getattr(self, item.name)) for item in fields(self))

    @property
    def goodput(self) -> float | None:
        """Productive part of the total; None without time."""
        return self.productive / self.total if self.total > 0 else None

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})

    def to_json(self) -> dict[str, Any]:
        """Seconds by cause under `<cause>_s`, `total_s` and `goodput`."""
        seconds = {f"{item.name}_s": round(getattr(self, item.name), 3) for item in fields(self)}
        return seconds | {"total_s": round(self.total, 3), "goodput": self.goodput}


@dataclass(kw_only=True)
class _Attempt:
    """Figures of an attempt while its lines are read."""

    number: int
    began: datetime
    last: datetime
    resumed_step: int
    ledger: dict[str, float]
    steps: dict[int, float] = field(default_factory=dict)
    exit_code: int | None = None


def goodput(run_dir: Path) -> dict[str, Any]:
    """Account for the time of a run.

    Returns: the fields of `Ledger.to_json` of the run, and `attempts`: the same of each with `attempt`, `first_step`,
        `last_step` and `exit_code`.
    """
    attempts = list(_attempts(run_dir))
    ledgers = list(_ledgers(attempts))
    rows = [
        {
            "attempt": attempt.number,
            "first_step": min(attempt.steps, default=None),
            "last_step": max(attempt.steps, default=None),
            "exit_code": attempt.exit_code,
            **ledger.to_json(),
        }
        for attempt, ledger in zip(attempts, ledgers, strict=True)
    ]
    return {**sum(ledgers, start=Ledger()).to_json(), "attempts": rows}


def _attempts(run_dir: Path) -> Iterator[_Attempt]:
    current: _Attempt | None = None
    for line in read_journal(run_dir):
        record = read_record(line)
        if isinstance(record, AttemptStarted):
            if current is not None:
                yield current
            current = _started(record)
        elif current is not None:
            current.last = max(current.last, moment(line["time"]))
            if record is not None:
                _count(current, record)
    if current is not None:
        yield current


def _started(record: AttemptStarted) -> _Attempt:
    written = moment(record.time)
    startup, restore = _seconds(record.startup_s, "total"), record.restore_s or 0.0
    resumed = record.resumed
    return _Attempt(
        number=record.attempt,
        began=written,
        last=written,
        resumed_step=0 if resumed is None else resumed.step,
        ledger={"startup": max(0.0, startup - restore), "restore": restore},
    )


def _count(attempt: _Attempt, record: JournalRecord) -> None:
    match record:
        case Step():
            attempt.steps[record.step] = _all_seconds(record.seconds)
        case Evaluation() | SamplePreview():
            _add(attempt, "evaluation", _all_seconds(record.seconds))
        case CheckpointCommitted():
            _add(attempt, "save", record.stall_s or 0.0)
        case AttemptEnded():
            attempt.exit_code = record.exit_code


def _ledgers(attempts: list[_Attempt]) -> Iterator[Ledger]:
    before: datetime | None = None
    for number, attempt in enumerate(attempts):
        later = attempts[number + 1 :]
        kept = min((following.resumed_step for following in later), default=max(attempt.steps, default=0))
        productive = sum(seconds for step, seconds in attempt.steps.items() if step <= kept)
        startup = attempt.ledger["startup"] + attempt.ledger["restore"]
        counted = Ledger(
            productive=productive,
            lost=sum(attempt.steps.values()) - productive,
            waiting=0.0 if before is None else max(0.0, (attempt.began - before).total_seconds() - startup),
            **attempt.ledger,
        )
        lasted = (attempt.last - attempt.began).total_seconds() + startup
        rest = lasted - (counted.total - counted.waiting)
        yield counted + Ledger(other=max(0.0, rest))
        before = attempt.last


def _add(attempt: _Attempt, cause: str, seconds: float) -> None:
    attempt.ledger[cause] = attempt.ledger.get(cause, 0.0) + seconds


def _all_seconds(seconds: Mapping[str, Any] | None) -> float:
    return sum(float(value) for value in (seconds or {}).values())


def _seconds(seconds: Mapping[str, Any] | None, name: str) -> float:
    return float((seconds or {}).get(name) or 0.0)
