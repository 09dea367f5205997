from __future__ import annotations

import math
from typing import Any

import pytest

from megamask.tracking.mlflow.points import _STEP_METRICS, BOUND, LOSS, Memory, Point, milliseconds, update_of

TIME = "2026-03-01T12:00:00.250999Z"
TIME_MS = 1772366400250


def record(kind: str, **fields: Any) -> dict[str, Any]:
    required = {"attempt_started": {"attempt": 1}, "run_completed": {"step": 9}}.get(kind, {})
    return {"seq": 1, "time": TIME, "kind": kind, "prev": "0" * 64, **required, **fields}


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
                nelbo_nats_per_token=2.0,
                loss_terms={"nelbo": 2.0},
            )
        ],
        Memory(),
    )
    points = {point.key: point for point in update.points}
    assert points.keys() == {LOSS, "optimizer/grad_norm", "progress/consumed_tokens", "step_time_s/data"}
    assert points[LOSS] == Point(LOSS, 2.0, TIME_MS, 3)
    assert math.isnan(points["optimizer/grad_norm"].value)
    assert points["progress/consumed_tokens"].value == 12.0


def test_evaluation_gives_its_numbers_only() -> None:
    fields = {"nelbo_nats_per_token": 5.0, "standard_error": "inf", "split": "validation", "is_final": True}
    update = update_of([record("evaluation", step=2, **fields)], Memory())
    assert {point.key: point.value for point in update.points} == {
        BOUND: 5.0,
        "evaluation/standard_error_nats_per_token": math.inf,
    }


def test_repeated_step_is_sent_once_over_processes() -> None:
    memory = Memory()
    update_of([record("step", step=step, loss=1.0) for step in (1, 2, 3)], memory)
    later = Memory(sent_through=dict(memory.sent_through))
    update = update_of([record("step", step=step, loss=9.0) for step in (2, 3, 4)], later)
    assert [(point.key, point.step) for point in update.points] == [(LOSS, 4)]


def test_repeated_commit_is_a_checkpoint_of_its_own() -> None:
    memory = Memory()
    update_of([record("checkpoint_committed", step=2, checkpoint="step-00000002-a0001", digest="first")], memory)
    update = update_of(
        [record("checkpoint_committed", step=2, checkpoint="step-00000002-a0002", digest="second")], memory
    )
    assert [entry.checkpoint for entry in update.checkpoints] == ["step-00000002-a0002"]
    assert update.tags == {
        "last_commit.step": "2",
        "last_commit.digest": "second",
        "journal_head": f"0:{'0' * 64}",
    }


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
    assert len(set(_STEP_METRICS.values())) == len(_STEP_METRICS)


def started(**fields: Any) -> dict[str, Any]:
    train = {"name": "main", "split": "train", "corpus_id": "ab" * 32, "source": "/c", "rows": 16, "tokens": 100}
    held_out = {**train, "split": "validation", "rows": 4}
    return record("attempt_started", attempt=1, datasets=[{**train, "text_bytes": 250}, held_out], **fields)


@pytest.mark.promise("no series is in MLflow twice, and constants are parameters")
def test_series_that_equal_another_one_are_not_sent() -> None:
    lines = [
        record(
            "step",
            step=step,
            loss=2.0,
            nelbo_nats_per_token=2.0,
            loss_terms={"nelbo": 2.0},
            global_batch_size=8,
            consumed_samples=8 * step,
            consumed_tokens=100,
            processed_tokens=100,
        )
        for step in (1, 2)
    ]
    keys = {point.key for point in update_of([started(), *lines], Memory()).points}
    assert keys == {LOSS, "bits_per_byte", "progress/consumed_samples", "progress/consumed_tokens", "progress/epoch"}


def test_terms_and_a_growing_batch_are_sent_where_they_say_something() -> None:
    line = record(
        "step",
        step=2,
        loss=2.5,
        nelbo_nats_per_token=2.0,
        loss_terms={"nelbo": 2.0, "z_loss": 0.5},
        global_batch_size=8,
        consumed_samples=12,
    )
    points = {point.key: point.value for point in update_of([line], Memory()).points}
    assert points["loss_terms_nats_per_token/z_loss"] == 0.5
    assert points["progress/global_batch_size"] == 8


def test_step_has_bits_per_byte_and_epochs() -> None:
    line = record("step", step=1, loss=2.0, nelbo_nats_per_token=2.0, global_batch_size=8, consumed_samples=8)
    points = {point.key: point.value for point in update_of([started(), line], Memory()).points}
    assert points["bits_per_byte"] == pytest.approx(2.0 / math.log(2) / 2.5)
    assert points["progress/epoch"] == 0.5


@pytest.mark.promise("bounds in MLflow name the dataset that they were measured on")
def test_bounds_are_linked_to_the_validation_dataset() -> None:
    bound = {"nelbo_nats_per_token": 3.0, "standard_error": 0.1}
    lines = [
        started(),
        record("evaluation", step=2, **bound),
        record("checkpoint_committed", step=2, checkpoint="step-00000002-a0001", digest="d", evaluation=bound),
    ]
    update = update_of(lines, Memory())
    dataset = ("main/validation", ("ab" * 32)[:36])
    assert {point.dataset for point in update.points if point.key == BOUND or "evaluation/" in point.key} == {dataset}
    assert {point.dataset for point in update.checkpoints[0].points} == {dataset}


@pytest.mark.promise("MLflow names the best and the latest checkpoint")
def test_best_and_latest_follow_the_commits() -> None:
    def commit(step: int, bound: float) -> dict[str, Any]:
        evaluation = {"nelbo_nats_per_token": bound, "standard_error": 0.1}
        name = f"step-{step:08d}-a0001"
        return record("checkpoint_committed", step=step, checkpoint=name, digest="d", evaluation=evaluation)

    update = update_of([commit(2, 3.0), commit(4, 2.0), commit(6, 2.5)], Memory())
    aliases = {
        name: {key.removeprefix("alias.") for key, value in tags.items() if value == "yes"}
        for name, tags in update.marks.items()
    }
    assert aliases == {
        "step-00000002-a0001": set(),
        "step-00000004-a0001": {"best"},
        "step-00000006-a0001": {"latest"},
    }
    assert update.tags["best_checkpoint"] == update.best == "step-00000004-a0001"


@pytest.mark.promise("MLflow's first section has loss, bits per byte and bound, and names have units")
def test_first_section_is_what_people_read_first() -> None:
    line = record(
        "step",
        step=1,
        loss=2.0,
        nelbo_nats_per_token=2.0,
        grad_norm=1.0,
        learning_rate=1e-3,
        consumed_samples=8,
        global_batch_size=8,
        tokens_per_second=9.0,
        mfu=0.5,
        peak_memory_bytes=1 << 30,
    )
    lines = [started(), line, record("evaluation", step=1, nelbo_nats_per_token=2.0, bits_per_byte=1.0)]
    points = {point.key: point.value for point in update_of(lines, Memory()).points}
    assert {key for key in points if "/" not in key} == {LOSS, "bits_per_byte", BOUND}
    assert points["memory/peak_bytes"] == 1 << 30
    assert (points["speed/mfu"], points["progress/epoch"]) == (0.5, 0.5)
    assert LOSS.endswith("_nats_per_token") and BOUND.endswith("_nats_per_token")


@pytest.mark.promise("an extension and a change of layout are shown by console, status and MLflow")
def test_extension_and_change_of_layout_are_tags() -> None:
    line = started(extended={"training.steps": [80, 100]}, changed={"layout.tensor_parallel_size": [1, 2]})
    tags = update_of([line], Memory()).tags
    assert tags["training.steps"] == "100"
    assert tags["attempt_1.changed"] == "layout.tensor_parallel_size 1 -> 2"


def test_attempt_gives_its_layout_device_user_and_libraries() -> None:
    line = started(
        device="cpu",
        world_size=2,
        host="node-1",
        user="ada",
        layout={"data_parallel_size": 2},
        code_version="abc-dirty",
        libraries={"torch": "2"},
    )
    update = update_of([line], Memory())
    assert update.params == {
        "attempt_1.device": "cpu",
        "attempt_1.world_size": 2,
        "attempt_1.host": "node-1",
        "attempt_1.data_parallel_size": 2,
    }
    assert update.tags["mlflow.user"] == "ada"
    assert (update.tags["mlflow.source.git.commit"], update.tags["git_dirty"]) == ("abc", "yes")
    assert update.tags["library.torch"] == "2"
