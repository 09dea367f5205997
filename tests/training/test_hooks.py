"""Times at which hooks act: evaluation and checkpoints by step, the end of an attempt, the status file."""

from __future__ import annotations

from typing import Any

import pytest

from megamask.config.schema.checkpoint import CheckpointConfig
from megamask.config.schema.evaluation import EvaluationConfig
from megamask.training.hooks import PeriodicCheckpoint, PeriodicEvaluation, StatusFile, StepJournal
from megamask.training.metrics import StepRecord
from megamask.training.progress import Progress
from megamask.training.stopping import StopReason


class Recorder:
    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, Any]]] = []

    def append(self, kind: str, **fields: Any) -> None:
        self.records.append((kind, fields))


def at(step: int) -> Progress:
    return Progress(step=step, num_views=2)


RECORD = StepRecord(report=None, fields={"step": 1, "loss": 2.0})  # type: ignore[arg-type]


def test_step_journal_writes_the_record_as_it_is() -> None:
    recorder = Recorder()
    StepJournal(recorder).after_step(at(1), RECORD)
    assert recorder.records == [("step", {"step": 1, "loss": 2.0})]


def test_evaluation_is_due_by_step_only() -> None:
    recorder = Recorder()
    hook = PeriodicEvaluation(recorder, EvaluationConfig(every_steps=3), lambda: {"bits_per_byte": 1.0})
    for step in range(1, 8):
        hook.after_step(at(step), RECORD)
    hook.on_stop(at(7), StopReason.PREEMPTED)
    assert [fields["step"] for _, fields in recorder.records] == [3, 6]


def test_evaluation_that_was_cut_short_leaves_no_line_and_is_made_on_the_next_start() -> None:
    recorder, answers = Recorder(), iter([None, {"nelbo_nats_per_token": 2.0, "standard_error": 0.1}])
    settings = EvaluationConfig(every_steps=3)
    hook = PeriodicEvaluation(recorder, settings, lambda: next(answers))
    hook.after_step(at(3), RECORD)
    assert (recorder.records, hook.bound_at(3)) == ([], None)
    resumed = PeriodicEvaluation(recorder, settings, lambda: next(answers), lambda step: False)
    for step in (0, 2):
        resumed.on_start(at(step))
    assert recorder.records == []
    resumed.on_start(at(3))
    PeriodicEvaluation(recorder, settings, lambda: next(answers), lambda step: True).on_start(at(3))
    assert [(kind, fields["step"]) for kind, fields in recorder.records] == [("evaluation", 3)]


def test_evaluation_never_happens_without_a_measure() -> None:
    recorder = Recorder()
    PeriodicEvaluation(recorder, EvaluationConfig(every_steps=1), None).after_step(at(1), RECORD)
    assert recorder.records == []


class Calls:
    """A committer that only notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self, progress: Progress, evaluation: Any) -> None:
        self.calls.append(f"begin {progress.step} {evaluation}")

    def poll(self) -> None:
        self.calls.append("poll")

    def finish(self) -> None:
        self.calls.append("finish")

    def commit(self, progress: Progress, evaluation: Any) -> None:
        self.calls.append(f"commit {progress.step} {evaluation}")

    def abort(self, *, together: bool) -> None:
        self.calls.append(f"abort {together}")


def calls(checkpoint: CheckpointConfig, last: int, reason: StopReason, resumed: int = 0) -> list[str]:
    committer = Calls()
    hook = PeriodicCheckpoint(
        checkpoint, committer, bound_at={4: {"nelbo_nats_per_token": 1.5}}.get, committed_step=resumed
    )
    for step in range(resumed + 1, last + 1):
        hook.after_step(at(step), RECORD)
    hook.on_stop(at(last), reason)
    return committer.calls


def committed_steps(checkpoint: CheckpointConfig, last: int, reason: StopReason, resumed: int = 0) -> list[int]:
    return [int(call.split()[1]) for call in calls(checkpoint, last, reason, resumed) if call[0] in "bc"]


def test_checkpoints_come_every_n_steps_and_at_the_end() -> None:
    assert committed_steps(CheckpointConfig(every_steps=3), 7, StopReason.FINISHED) == [3, 6, 7]


def test_last_step_is_committed_once_when_it_was_due_anyway() -> None:
    assert committed_steps(CheckpointConfig(every_steps=3), 6, StopReason.PREEMPTED) == [3, 6]


def test_last_step_is_committed_without_an_interval() -> None:
    assert committed_steps(CheckpointConfig(every_steps=None), 5, StopReason.OPERATOR) == [5]


def test_nothing_is_committed_when_nothing_was_done_since_the_last_commit() -> None:
    assert committed_steps(CheckpointConfig(every_steps=None), 5, StopReason.STOP_AFTER_STEP, resumed=5) == []


@pytest.mark.promise("a newer attempt's claim stops a pending save; a superseded attempt cancels its pending saves")
def test_superseded_attempt_commits_nothing_and_gives_up_what_is_on_its_way() -> None:
    assert calls(CheckpointConfig(every_steps=None), 5, StopReason.SUPERSEDED)[5:] == ["abort True"]


@pytest.mark.promise("a signal during a save completes it and commits the last step")
def test_save_on_its_way_is_looked_at_every_step_and_finished_before_the_last_commit() -> None:
    measured = "{'nelbo_nats_per_token': 1.5}"
    assert calls(CheckpointConfig(every_steps=2), 5, StopReason.PREEMPTED) == [
        *["poll"] * 2,
        "begin 2 None",
        *["poll"] * 2,
        f"begin 4 {measured}",
        "poll",
        "finish",
        "commit 5 None",
    ]


def test_bound_belongs_to_the_step_it_was_measured_at() -> None:
    measure = lambda: {"nelbo_nats_per_token": 2.5, "standard_error": 0.5, "num_tokens": 7}  # noqa: E731
    hook = PeriodicEvaluation(Recorder(), EvaluationConfig(every_steps=3), measure)
    found = []
    for step in range(1, 6):
        hook.after_step(at(step), RECORD)
        found.append(hook.bound_at(step))
    assert found == [None, None, {"nelbo_nats_per_token": 2.5, "standard_error": 0.5}, None, None]


def test_status_file_is_written_at_most_once_in_a_while() -> None:
    now, written = [0.0], list[int]()
    hook = StatusFile(written.append, clock=lambda: now[0], every_s=5.0)
    for step, time in ((1, 0.0), (2, 1.0), (3, 4.9), (4, 5.0), (5, 9.0), (6, 10.5)):
        now[0] = time
        hook.after_step(at(step), RECORD)
    assert written == [1, 4, 6]


@pytest.mark.parametrize("views", [1, 2])
def test_progress_counts_samples_clean_tokens_and_views(views: int) -> None:
    progress = Progress(num_views=views)
    progress.advance(global_batch_size=8, num_eligible=500, loss=2.0)
    progress.advance(global_batch_size=8, num_eligible=512, loss=2.0)
    assert (progress.step, progress.consumed_samples, progress.consumed_tokens) == (2, 16, 1012)
    assert progress.processed_tokens == 1012 * views
