"""Consistency of a journal, line by line. Pure: it is fed lines and knows no files.

The order law makes a step's first sample and its size arithmetic, so every step line can be checked alone; repeated
steps must be the same steps; commits must descend from one another and name the line before which they were made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megamask.audit.report import Finding
from megamask.checkpoint.names import folder_name
from megamask.data.content import batch_digest
from megamask.data.skipped import SKIPS_NOTHING, SkippedSamples
from megamask.objectives.shapes import ObjectiveShape
from megamask.resilience.numerics import REWIND, SKIPPED
from megamask.runs.skips import Rewind, rewinds_before
from megamask.tracking.records import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointPruned,
    CheckpointStarted,
    Evaluation,
    Incident,
    JournalRecord,
    RecordError,
    ResumedFrom,
    RunCompleted,
    RunStarted,
    Step,
    Straggler,
    read_record,
)
from megamask.training.rewinding import skipped_by

_AFTER_THE_END = (RunCompleted, Incident)
_ROUNDING = 1e-5  # of float32 sums in another order
_SAME_RATE = 1e-9  # of float64 arithmetic under another mathematical library


Bound = dict[str, float | None]
"""Bound and standard error of an evaluation, under their names in the journal and in COMMIT.json."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Facts of run.json that every line must fit.

    Args:
        run_id, corpora: as in run.json.
        consumed_before: samples of all steps before a step, by the order law.
        shape_at: what the objective makes of a sample at a step.
        sequence_length: tokens of a row.
        rewinds: of skips.json.
        run_sha256, code_version: of the bytes of run.json, and in it.
        learning_rate: of a step under an attempt's config; None where that config is not known.
        has_shift: of a step, whether a token is predicted at the position before it, so that first tokens are given.
    """

    run_id: str
    corpora: Mapping[str, str]
    consumed_before: Callable[[int], int]
    shape_at: Callable[[int], ObjectiveShape]
    sequence_length: int
    rewinds: Sequence[Rewind] = ()
    run_sha256: str | None = None
    code_version: str | None = None
    learning_rate: Callable[[int, int], float | None] = lambda attempt, step: None
    has_shift: Callable[[int], bool] = lambda step: False

    def skipped_at(self, attempt: int) -> SkippedSamples:
        """The sample indices that an attempt leaves out, by skips.json."""
        return skipped_by(rewinds_before(self.rewinds, attempt))


@dataclass(kw_only=True)
class AttemptStory:
    """State of one attempt after the lines so far."""

    number: int
    started: AttemptStarted | None = None
    first_step: int | None = None
    last_step: int | None = None
    consumed_samples: int = 0
    consumed_tokens: int | None = None
    processed_tokens: int | None = None
    last_digest: str | None = None
    ended: AttemptEnded | None = None
    is_completed: bool = False
    evaluations: dict[int, Bound] = field(default_factory=dict)
    skipped: SkippedSamples = SKIPS_NOTHING
    skipped_updates: set[int] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class CommitLine:
    """A `checkpoint_committed` line and its place in the journal."""

    file: str
    line: int
    record: CheckpointCommitted


def bound_of(evaluation: Evaluation) -> Bound:
    """Return the fields of an evaluation that a commit of its step repeats."""
    kind = {} if evaluation.bound_from_step is None else {"bound_from_step": float(evaluation.bound_from_step)}
    return {
        "nelbo_nats_per_token": evaluation.nelbo_nats_per_token,
        "standard_error": evaluation.standard_error,
        **kind,
    }


class _Taken(NamedTuple):
    """Facts kept of every step; a run has millions of them."""

    attempt: int
    fingerprint: int
    consumed_tokens: int
    processed_tokens: int


@dataclass
class JournalAudit:
    """Check of every complete line in order; `findings` grows, and `commits` collects the commits.

    `recorded_rewinds` collects the attempts whose rewind a line of the journal names.
    """

    rules: Rules
    findings: list[Finding] = field(default_factory=list)
    attempts: dict[int, AttemptStory] = field(default_factory=dict)
    commits: dict[str, CommitLine] = field(default_factory=dict)
    pruned: set[str] = field(default_factory=set)
    num_lines: int = 0
    num_steps: int = 0
    num_repeated: int = 0
    recorded_rewinds: set[int] = field(default_factory=set)
    _steps: dict[int, _Taken] = field(default_factory=dict)
    _file: str = ""
    _line: int = 0

    def see(self, file: str, line: int, attempt: int, content: Mapping[str, Any]) -> AttemptStory:
        """Check the next line.

        Args:
            file, line: of it; attempt: of its file. content: JSON object of the line.

        Returns: the story of its attempt, this line included.
        """
        self._file, self._line = file, line
        self.num_lines += 1
        story = self._story_of(attempt)
        try:
            record = read_record(content, is_strict=True)
        except RecordError as error:
            self._find(f"a {content['kind']} line lacks or misstates a field ({error})")
            return story
        if record is None:  # a kind of a newer version
            return story
        if story.ended is not None and not isinstance(record, _AFTER_THE_END):
            self._find(f"a {record.kind} line follows the end of attempt {attempt}")
        try:
            self._check(story, record)
            if isinstance(record, Incident):
                self._incident(story, content)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self._find(f"a {record.kind} line lacks or misstates a field ({error!r})")
        return story

    def _story_of(self, attempt: int) -> AttemptStory:
        """The story of an attempt; what an earlier rewind withdrew is no past of a new one."""
        if attempt not in self.attempts:
            self.attempts[attempt] = AttemptStory(number=attempt, skipped=self.rules.skipped_at(attempt))
            for rewind in rewinds_before(self.rules.rewinds, attempt):
                for step in [step for step in self._steps if step > rewind.back_to_step]:
                    if rewind.withdraws(step=step, attempt=self._steps[step].attempt):
                        del self._steps[step]
        return self.attempts[attempt]

    def _incident(self, story: AttemptStory, content: Mapping[str, Any]) -> None:
        """A rewind must be that of skips.json; a skipped update is remembered for its step."""
        if content["incident"] == SKIPPED:
            story.skipped_updates.add(_count(content["step"]))
        elif content["incident"] == REWIND:
            self.recorded_rewinds.add(story.number)
            names = ("step", "back_to_step", "first_sample", "end_sample", "rule")
            [*recorded] = [rewind for rewind in self.rules.rewinds if rewind.attempt == story.number]
            expected = [tuple(getattr(rewind, name) for name in names) for rewind in recorded]
            self._expect("the rewind of skips.json", expected, [tuple(content[name] for name in names)])

    def _check(self, story: AttemptStory, record: JournalRecord) -> None:
        match record:
            case Step():
                self._step(story, record)
            case RunStarted():
                self._run_started(record)
            case AttemptStarted():
                self._attempt_started(story, record)
            case Evaluation():
                self._is_reached(story, record.kind, record.step)
                story.evaluations[record.step] = bound_of(record)
            case CheckpointStarted() | Straggler():
                self._is_reached(story, record.kind, record.step)
            case CheckpointCommitted():
                self._checkpoint_committed(story, record)
            case CheckpointPruned():
                self.pruned.add(record.checkpoint)
            case AttemptEnded():
                self._attempt_ended(story, record)
            case RunCompleted():
                self._run_completed(story, record)

    def _find(self, problem: str) -> None:
        self.findings.append(Finding(file=self._file, line=self._line, problem=problem))

    def _expect(self, what: str, found: Any, expected: Any) -> None:
        if found != expected or isinstance(found, bool) != isinstance(expected, bool):
            self._find(f"{what} is {found!r}; it must be {expected!r}")

    def _run_started(self, record: RunStarted) -> None:
        self._expect("run_id", record.run_id, self.rules.run_id)
        self._expect("corpora", record.corpora, dict(self.rules.corpora))
        self._names_record(record.run_sha256)

    def _attempt_started(self, story: AttemptStory, record: AttemptStarted) -> None:
        if story.started is not None:
            self._find(f"attempt {story.number} starts a second time")
        self._expect("attempt", record.attempt, story.number)
        self._expect("run_id", record.run_id, self.rules.run_id)
        self._names_record(record.run_sha256)
        if story.number == 1 and record.code_version is not None:
            self._expect("code_version", record.code_version, self.rules.code_version)
        ranges = [[each.start, each.stop] for each in story.skipped.ranges] or None
        self._expect("skipped_samples", record.skipped_samples, ranges)
        self.recorded_rewinds |= {rewind.attempt for rewind in rewinds_before(self.rules.rewinds, story.number)}
        story.started = record
        if (resumed := record.resumed) is None:
            return
        story.last_step, story.last_digest = resumed.step, resumed.digest
        story.consumed_samples = self.rules.consumed_before(resumed.step + 1)
        taken = self._steps.get(resumed.step)
        story.consumed_tokens = taken.consumed_tokens if taken else None
        story.processed_tokens = taken.processed_tokens if taken else None
        announced = self.commits.get(resumed.checkpoint)
        if announced is not None:
            self._expect("the digest resumed from", resumed.digest, announced.record.digest)
            self._expect("the step resumed from", resumed.step, announced.record.step)

    def _names_record(self, recorded: str | None) -> None:
        """Compare run.json with the bytes that the journal names: one rewritten with its own digest differs."""
        if recorded is not None and recorded != self.rules.run_sha256:
            self._find(f"run.json has sha256 {self.rules.run_sha256}; when this line was written it had {recorded}")

    def _step(self, story: AttemptStory, record: Step) -> None:
        step = _count(record.step)
        self.num_steps += 1
        if story.started is None:
            self._find(f"a step precedes the start of attempt {story.number}")
        elif step != (story.last_step or 0) + 1:
            self._find(f"step {step} follows step {story.last_step or 0}")
        begin, end = self.rules.consumed_before(step), self.rules.consumed_before(step + 1)
        self._expect("global_batch_size", record.global_batch_size, end - begin)
        self._expect("consumed_samples", record.consumed_samples, end)
        self._expect("batch_digest", record.batch_digest, batch_digest(begin, end - begin, story.skipped))
        self._expect("is_skipped", bool(record.is_skipped), step in story.skipped_updates)
        self._tokens(story, record, end - begin)
        self._loss(record)
        self._learning_rate(story, record)
        self._repeated(story, record)
        story.first_step = step if story.first_step is None else story.first_step
        story.last_step, story.consumed_samples = step, _count(record.consumed_samples)
        story.consumed_tokens, story.processed_tokens = record.consumed_tokens, record.processed_tokens

    def _tokens(self, story: AttemptStory, record: Step, size: int) -> None:
        tokens, masked = _count(record.consumed_tokens), _count(record.masked_tokens)
        shape = self.rules.shape_at(record.step)
        most = size * self.rules.sequence_length
        before = 0 if record.step == 1 else story.consumed_tokens
        eligible = None if before is None else tokens - before
        processed = 0 if record.step == 1 else story.processed_tokens
        if processed is not None and eligible is not None:
            self._expect("processed_tokens", record.processed_tokens, processed + eligible * shape.num_views)
        elif shape.num_views == self.rules.shape_at(1).num_views:  # it only ever falls
            self._expect("processed_tokens", record.processed_tokens, tokens * shape.num_views)
        if eligible is not None and not 0 <= eligible <= most:
            self._find(f"consumed_tokens grew by {eligible}; a step has at most {most} tokens")
        if masked > (most if eligible is None else eligible):
            self._find(f"masked_tokens is {masked}, more than the step has")
        levels = record.masked_tokens_by_noise_level
        if levels is not None and eligible is not None:
            found = sum(map(_count, levels))
            expected = eligible if shape.corrupts == "all" else masked
            if shape.corrupts == "all" and self.rules.has_shift(record.step) and masked <= found < eligible:
                expected = found  # how many tokens are first, and so in neither view, is in the corpus alone
            self._expect("the sum of masked_tokens_by_noise_level", found, expected)

    def _loss(self, record: Step) -> None:
        if record.loss is None or record.loss_terms is None:
            raise ValueError("loss or loss_terms")
        values = [record.loss, *record.loss_terms.values()]
        if all(map(math.isfinite, values)):
            total = math.fsum(values[1:])
            if not math.isclose(total, values[0], rel_tol=_ROUNDING, abs_tol=_ROUNDING):
                self._find(f"loss is {values[0]}, its terms add up to {total}")

    def _learning_rate(self, story: AttemptStory, record: Step) -> None:
        expected = self.rules.learning_rate(story.number, record.step)
        if expected is None or record.learning_rate is None:
            return
        if not math.isclose(record.learning_rate, expected, rel_tol=_SAME_RATE):
            self._find(f"learning_rate is {record.learning_rate}; the schedule has {expected} at step {record.step}")

    def _repeated(self, story: AttemptStory, record: Step) -> None:
        """Compare with the same step of an earlier attempt; only results of floating-point arithmetic may differ."""
        digests, counts = (record.batch_digest, record.content_digest), (record.masked_tokens, record.consumed_samples)
        fingerprint = hash((*map(str, digests), *map(str, counts), str(record.consumed_tokens)))
        taken = _Taken(
            attempt=story.number,
            fingerprint=fingerprint,
            consumed_tokens=_count(record.consumed_tokens),
            processed_tokens=_count(record.processed_tokens),
        )
        before = self._steps.setdefault(record.step, taken)
        if before.attempt != story.number:
            self.num_repeated += 1
        if before.fingerprint != fingerprint:
            self._find(f"step {record.step} has other samples, tokens or masks than in attempt {before.attempt}")

    def _checkpoint_committed(self, story: AttemptStory, record: CheckpointCommitted) -> None:
        self._is_reached(story, record.kind, record.step)
        name = str(record.checkpoint)
        self._expect("location", record.location, f"checkpoints/{name}")
        if (resumed := self._unannounced(story, record)) is not None:
            # an earlier attempt's, so its parent is that attempt's; the commit itself is compared with this line
            self._expect("checkpoint", name, resumed.checkpoint)
            self._expect("step", record.step, resumed.step)
        else:
            self._expect("checkpoint", name, folder_name(record.step, story.number))
            self._expect("parent", record.parent, story.last_digest)
            story.last_digest = record.digest
        measured = story.evaluations.get(record.step)
        if measured is not None:
            self._expect("evaluation", record.evaluation, measured)
        self.commits[name] = CommitLine(file=self._file, line=self._line, record=record)

    def _unannounced(self, story: AttemptStory, record: CheckpointCommitted) -> ResumedFrom | None:
        """Return what an attempt resumed from, if this line announces that commit because its own attempt could not.

        A process that is killed between COMMIT.json and its next step leaves that to the attempt that resumes.
        """
        resumed = None if story.started is None else story.started.resumed
        if resumed is None or story.first_step is not None or record.digest != resumed.digest:
            return None
        return None if resumed.checkpoint in self.commits else resumed

    def _is_reached(self, story: AttemptStory, kind: str, step: int) -> None:
        if not 0 < _count(step) <= (story.last_step or 0):
            self._find(f"a {kind} line names step {step}; the last step is {story.last_step or 0}")

    def _attempt_ended(self, story: AttemptStory, record: AttemptEnded) -> None:
        self._expect("attempt", record.attempt, story.number)
        if story.started is not None:
            self._expect("step", record.step, story.last_step or 0)
        story.ended = record

    def _run_completed(self, story: AttemptStory, record: RunCompleted) -> None:
        story.is_completed = True
        self._expect("step", record.step, story.last_step or 0)
        if story.consumed_tokens is not None:
            self._expect("consumed_tokens", record.consumed_tokens, story.consumed_tokens)
        if story.ended is None or story.ended.phase != "done":
            self._find("the run is completed by an attempt that has not ended as done")


def newest_commit_missing(audit: JournalAudit, visible: Iterable[str]) -> Finding | None:
    """Return the finding of a run whose newest commit, by its journal, is missing and was not pruned; or None."""
    kept = {name: line for name, line in audit.commits.items() if name not in audit.pruned}
    if not kept:
        return None
    newest = max(kept)  # names ascend by step, then by attempt
    if newest in visible or max(visible, default="") > newest:
        return None
    line = kept[newest]
    problem = f"{newest} was committed and never pruned, but it is not among the checkpoints"
    return Finding(file=line.file, line=line.line, problem=problem)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a count")
    return value
