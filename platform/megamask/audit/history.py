"""History of a run, attempt by attempt, from the beginnings and ends of its journal files.

A long journal is not read through: each attempt's first and last lines show where it began, how far it came and how it
ended; claims and rank files cover attempts without such a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median_low
from typing import Any, TypeVar

from megamask.checkpoint.names import parse_folder_name
from megamask.checkpoint.reader import candidates
from megamask.errors import ExitCode
from megamask.resilience.exit_codes import combine
from megamask.runs.claims import claimed_attempts, is_live, read_claim
from megamask.runs.rank_files import read_rank_failures
from megamask.runs.status import Status
from megamask.tracking.journal.lines import JournalFile, Record, Span, journal_files
from megamask.tracking.records import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    Evaluation,
    Incident,
    JournalRecord,
    Step,
    Straggler,
    read_record,
)

_HEAD_BYTES = 1 << 15
_FIRST_TAIL_BYTES = 1 << 16
_LAST_TAIL_BYTES = 1 << 22
_PACE_STEPS = 32
_Kind = TypeVar("_Kind", bound=JournalRecord)


@dataclass(frozen=True, kw_only=True)
class AttemptHistory:
    """One life of a run.

    Args:
        started, ended: times of its first sign and its last; ended is null while it runs.
        resumed_from: the step of the checkpoint that it began with, or None.
        first_step, last_step: those it took; None if it took none.
        committed_step: newest step that it is known to have committed.
        outcome: running, done, stopped, preempted, failed, superseded, crashed (gone without a word), or unknown
            (crashed, or runs where this host cannot see).
        changes: what it extended, and what of layout and device differs from the attempt before.
        superseded_by: the attempt that took over, where the outcome is superseded and it left a claim.
        exit_code, reason: as the journal, status.json or the ranks' own files have them.
        ranks: how each rank that failed ended.
    """

    number: int
    host: str | None
    started: str | None
    ended: str | None
    resumed_from: int | None
    first_step: int | None
    last_step: int | None
    committed_step: int | None
    outcome: str
    exit_code: int | None
    reason: str | None
    ranks: list[dict[str, Any]]
    superseded_by: int | None = None
    changes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        """From the first sign to the last, by the clocks of the lines."""
        if self.started is None or self.ended is None:
            return None
        return max(0.0, (moment(self.ended) - moment(self.started)).total_seconds())


@dataclass(kw_only=True)
class History:
    """All attempts, oldest first, and the content of the newest lines.

    Args:
        last_step, last_evaluation, last_line: the newest records, or None.
        seconds_per_step: pace of the last steps by their times; None with fewer than two.
        stragglers: slow ranks that were named in what was read, oldest first.
        incidents: those in what was read, oldest first; are_all_incidents is true if that is all of the journal.
    """

    attempts: list[AttemptHistory] = field(default_factory=list)
    last_step: Step | None = None
    last_evaluation: Evaluation | None = None
    last_line: JournalRecord | None = None
    seconds_per_step: float | None = None
    stragglers: list[Straggler] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    are_all_incidents: bool = True


def read_history(run_dir: Path, status: Status | None) -> History:
    """The history of a run directory; damaged and torn lines are passed over."""
    history = History()
    files = {number: list(group) for number, group in groupby(journal_files(run_dir), key=lambda file: file.attempt)}
    numbers = sorted(set(claimed_attempts(run_dir)) | set(files))
    commits = _committed_steps(run_dir)
    for number, newer in zip(numbers, [*numbers[1:], None], strict=False):
        read = _read(files.get(number, []))
        evidence = AttemptEvidence(run_dir, number, read.records, status, newer=newer)
        history.attempts.append(evidence.history(commits.get(number)))
        history.are_all_incidents &= read.is_whole
        history.incidents += [record for record in read.records if isinstance(record, Incident)]
        history.stragglers += [record for record in read.records if isinstance(record, Straggler)]
        steps = [record for record in read.records if isinstance(record, Step)]
        history.last_step = steps[-1] if steps else history.last_step
        evaluations = [record for record in read.records if isinstance(record, Evaluation)]
        history.last_evaluation = evaluations[-1] if evaluations else history.last_evaluation
        history.last_line = read.records[-1] if read.records else history.last_line
        history.seconds_per_step = _pace(steps[-_PACE_STEPS:]) if len(steps) > 1 else history.seconds_per_step
    return history


def moment(time: str) -> datetime:
    """A journal's time; one that cannot be read is the beginning of all times."""
    try:
        found = datetime.fromisoformat(time)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """The records at both ends of an attempt's files; is_whole if nothing between was left out."""

    records: list[JournalRecord]
    is_whole: bool


def _read(files: Sequence[JournalFile]) -> _Read:
    """Read the first lines of an attempt, and at its end as many as it takes to meet a step."""
    span, budget = Span(files), _FIRST_TAIL_BYTES
    total = span.num_bytes
    while True:
        if total <= budget + _HEAD_BYTES:
            return _Read(records=_records(span, 0, total), is_whole=True)
        end = _records(span, total - budget, total)
        if any(isinstance(record, Step) for record in end) or budget >= _LAST_TAIL_BYTES:
            break
        budget *= 8
    return _Read(records=[*_records(span, 0, _HEAD_BYTES), *end], is_whole=False)


def _records(span: Span, begin: int, end: int) -> list[JournalRecord]:
    return [_typed(record) for _, line in span.lines(begin, end) if (record := line.record()) is not None]


def _typed(line: Record) -> JournalRecord:
    """The record of a line; one of a kind that this program does not know still has its number and time."""
    return read_record(line) or JournalRecord(seq=line["seq"], time=line["time"])


def _pace(steps: Sequence[Step]) -> float | None:
    """Seconds of a step, the middle one of the last; a clock that jumped does not move it."""
    times = [moment(step.time).timestamp() for step in steps]
    gaps = [later - earlier for earlier, later in pairwise(times) if later > earlier]
    return median_low(gaps) if gaps else None


def _committed_steps(run_dir: Path) -> dict[int, int]:
    """The newest visible checkpoint of each attempt, by its folder's name."""
    steps: dict[int, int] = {}
    for folder in candidates(run_dir):
        place = parse_folder_name(folder.name)
        if place is not None:
            steps[place[1]] = max(place[0], steps.get(place[1], 0))
    return steps


class AttemptEvidence:
    """Records of one attempt: claim, journal, status.json and failure records."""

    def __init__(
        self, run_dir: Path, number: int, records: Sequence[JournalRecord], status: Status | None, *, newer: int | None
    ) -> None:
        self._run_dir = run_dir
        self._number = number
        self._records = records
        self._status = status if status is not None and status.attempt == number else None
        self._newer = newer

    def history(self, visible_step: int | None) -> AttemptHistory:
        """Return the attempt's history; `visible_step` is that of its newest visible checkpoint."""
        claim = read_claim(self._run_dir, self._number) or {}
        started, ended = self._last(AttemptStarted), self._last(AttemptEnded)
        resumed = started.resumed_from if started else None
        steps = [record.step for record in self._records if isinstance(record, Step)]
        ranks = read_rank_failures(self._run_dir, self._number)
        outcome, code, reason = self._outcome(ended)
        if ranks and code is None:
            code, reason = combine([failure.exit_code for failure in ranks.values()]), ranks[min(ranks)].reason
            outcome = "superseded" if code == ExitCode.DO_NOT_REQUEUE else "failed"
        is_running = outcome == "running"
        return AttemptHistory(
            number=self._number,
            host=_text(claim.get("host") or (started.host if started else None)),
            started=_text(claim.get("time") or (self._records[0].time if self._records else None)),
            ended=None if is_running or not self._records else self._records[-1].time,
            resumed_from=resumed.get("step") if resumed else None,
            first_step=min(steps, default=None),
            last_step=max(steps, default=None),
            committed_step=self._committed(visible_step),
            outcome=outcome,
            exit_code=code,
            reason=reason,
            ranks=[vars(failure) for failure in ranks.values()],
            superseded_by=self._newer if outcome == "superseded" else None,
            changes=_changes(started),
        )

    def _last(self, kind: type[_Kind]) -> _Kind | None:
        return next((record for record in reversed(self._records) if isinstance(record, kind)), None)

    def _committed(self, visible_step: int | None) -> int | None:
        committed = [record.step for record in self._records if isinstance(record, CheckpointCommitted)]
        return max([*committed, *([] if visible_step is None else [visible_step])], default=None)

    def _outcome(self, ended: AttemptEnded | None) -> tuple[str, int | None, str | None]:
        """(outcome, exit code, reason) by the journal, else by status.json, else by whether its process lives."""
        if ended is not None:
            return ended.phase or "failed", ended.exit_code, ended.reason
        status = self._status
        if status is not None and status.exit_code is not None:
            return status.phase, status.exit_code, status.reason
        if self._newer is not None:
            return "crashed", None, None
        return "running" if is_live(self._run_dir, self._number) else "unknown", None, None


def _changes(started: AttemptStarted | None) -> list[str]:
    """Extended settings of an attempt, and layout and device where they differ from the attempt before."""
    if started is None:
        return []
    changed = {**(started.extended or {}), **(started.changed or {})}
    return [f"{name} {old} -> {new}" for name, (old, new) in changed.items()]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
