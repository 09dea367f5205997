from __future__ import annotations

import math
from typing import Any

import pytest

from megamask.tracking.mlflow.points import _STEP_METRICS, Memory, Point, milliseconds, update_of

TIME = "2026-03-01T12:00:00.250999Z"
TIME_MS = 1772366400250


def record(kind: str, **fields: Any) -> dict[str, Any]:
    return {"seq": 1, "time": TIME, "kind": kind, "prev": "0" * 64, **fields}


def test_time_is_the_records_cut_to_milliseconds() -> None:
    assert milliseconds(TIME) == TIME_MS


def test_step_gives_a_point_for_every_number() -> None:
    update = update_of(
        [
            record(
                "step",
                step=3,
                loss=2.0,
                grad_norm="nan",
                consumed_tokens=12,
                mfu=None,
                batch_digest="ab",
                seconds={"data": 0.5},
                loss_terms={"nelbo": 2.0},
            )
        ],
        Memory(),
    )
    points = {point.key: point for point in update.points}
    assert points.keys() == {"loss", "grad_norm", "consumed_tokens", "seconds/data", "loss_terms/nelbo"}
    assert points["loss"] == Point("loss", 2.0, TIME_MS, 3)
    assert math.isnan(points["grad_norm"].value)
    assert points["consumed_tokens"].value == 12.0


def test_evaluation_gives_its_numbers_only() -> None:
    fields = {"nelbo_nats_per_token": 5.0, "standard_error": "inf", "split": "validation", "is_final": True}
    update = update_of([record("evaluation", step=2, **fields)], Memory())
    assert {point.key: point.value for point in update.points} == {
        "evaluation/nelbo_nats_per_token": 5.0,
        "evaluation/standard_error": math.inf,
    }


def test_repeated_step_is_told_once_over_processes() -> None:
    memory = Memory()
    update_of([record("step", step=step, loss=1.0) for step in (1, 2, 3)], memory)
    later = Memory(sent_through=dict(memory.sent_through))
    update = update_of([record("step", step=step, loss=9.0) for step in (2, 3, 4)], later)
    assert [(point.key, point.step) for point in update.points] == [("loss", 4)]


def test_repeated_commit_is_a_checkpoint_of_its_own() -> None:
    memory = Memory()
    update_of([record("checkpoint_committed", step=2, checkpoint="step-00000002-a0001", digest="first")], memory)
    update = update_of(
        [record("checkpoint_committed", step=2, checkpoint="step-00000002-a0002", digest="second")], memory
    )
    assert [entry.checkpoint for entry in update.checkpoints] == ["step-00000002-a0002"]
    assert update.tags == {"megamask.last_commit.step": "2", "megamask.last_commit.digest": "second"}


@pytest.mark.promise("MLflow's status is correct across all attempts")
@pytest.mark.parametrize(
    ("records", "status"),
    [
        ([("attempt_started", {})], "RUNNING"),
        ([("attempt_ended", {"exit_code": 0}), ("run_completed", {})], "FINISHED"),
        ([("run_completed", {}), ("attempt_ended", {"exit_code": 0})], "FINISHED"),
        ([("attempt_ended", {"exit_code": 0, "phase": "done"})], "FINISHED"),
        ([("attempt_ended", {"exit_code": 0, "phase": "stopped"})], "KILLED"),
        ([("attempt_ended", {"exit_code": 75})], "KILLED"),
        ([("attempt_ended", {"exit_code": 93})], "KILLED"),
        ([("attempt_ended", {"exit_code": 130})], "KILLED"),
        ([("attempt_ended", {"exit_code": 66})], "FAILED"),
        ([("attempt_ended", {})], "FAILED"),
        ([("run_completed", {}), ("attempt_started", {})], "RUNNING"),
        ([("run_completed", {}), ("attempt_started", {}), ("attempt_ended", {"exit_code": 0})], "KILLED"),
        ([("step", {"step": 1}), ("incident", {})], None),
    ],
)
def test_status_over_all_attempts(records: list[tuple[str, dict[str, Any]]], status: str | None) -> None:
    assert update_of([record(kind, **fields) for kind, fields in records], Memory()).status == status


@pytest.mark.promise("no metric of a step is named twice")
def test_no_metric_of_a_step_is_named_twice() -> None:
    assert len(set(_STEP_METRICS)) == len(_STEP_METRICS)
