from __future__ import annotations

from typing import Any

from megamask.tracking.mlflow.entries import Point, checkpoint_of, datasets_of, preview_of
from megamask.tracking.mlflow.points import Memory, update_of
from megamask.tracking.records import read_record

TIME = "2026-03-01T12:00:00.250999Z"
TIME_MS = 1772366400250
FOLDER = "step-00000200-a0012"


def record(kind: str, **fields: Any) -> dict[str, Any]:
    return {"seq": 1, "time": TIME, "kind": kind, "prev": "0" * 64, **fields}


def typed(line: dict[str, Any]) -> Any:
    return read_record(line)


def committed(**fields: Any) -> dict[str, Any]:
    return record("checkpoint_committed", step=200, checkpoint=FOLDER, digest="ab" * 32, **fields)


def typed_commit(**fields: Any) -> Any:
    return typed(committed(**fields))


def test_commit_is_entered_with_digest_step_attempt_location_and_bound() -> None:
    entry = checkpoint_of(
        typed_commit(
            parent="cd" * 32,
            bytes=7,
            location=f"checkpoints/{FOLDER}",
            stall_s=0.5,
            save_s=2.0,
            evaluation={"nelbo_nats_per_token": 5.0, "standard_error": 0.25},
        )
    )
    assert (entry.name, entry.checkpoint, entry.step) == ("step-00000200", FOLDER, 200)
    assert entry.params == {
        "step": "200",
        "attempt": "12",
        "digest": "ab" * 32,
        "parent": "cd" * 32,
        "bytes": "7",
        "location": f"checkpoints/{FOLDER}",
        "committed": TIME,
    }
    assert entry.points == [
        Point("checkpoint/bound_nats_per_token", 5.0, TIME_MS, 200),
        Point("checkpoint/standard_error_nats_per_token", 0.25, TIME_MS, 200),
        Point("checkpoint/stall_s", 0.5, TIME_MS, 200),
        Point("checkpoint/save_s", 2.0, TIME_MS, 200),
    ]


def test_commit_without_a_bound_or_a_parent_says_so() -> None:
    entry = checkpoint_of(typed_commit(parent=None, evaluation=None))
    assert entry.params["parent"] == "none"
    assert entry.location == f"checkpoints/{FOLDER}"
    assert entry.points == []


def test_pruned_and_damaged_commits_are_marked_and_stay() -> None:
    update = update_of(
        [
            committed(),
            record("checkpoint_pruned", step=400, checkpoint=FOLDER),
            record("incident", incident="checkpoint_damaged", checkpoint="other", problem="a byte differs"),
        ],
        Memory(),
    )
    assert [entry.checkpoint for entry in update.checkpoints] == [FOLDER]
    assert update.marks[FOLDER]["state"] == "pruned"
    assert update.marks[FOLDER]["pruned_at_step"] == "400"
    assert update.marks["other"]["state"] == "damaged"
    assert update.marks["other"]["problem"] == "a byte differs"


def typed_start(**fields: Any) -> Any:
    return typed(record("attempt_started", attempt=1, **fields))


def test_dataset_has_the_beginning_of_its_corpus_id_and_the_whole_one_beside_it() -> None:
    corpus_id = "0123456789abcdef" * 4
    facts = {"rows": 3, "tokens": 40, "sequence_length": 16, "tokenizer_digest": "ef"}
    found = datasets_of(
        typed_start(
            datasets=[
                {"name": "main", "split": split, "corpus_id": corpus_id, "source": "/data/corpus", **facts}
                for split in ("train", "validation")
            ],
        )
    )
    assert [entry.name for entry in found] == ["main/train", "main/validation"]
    assert [entry.tags["mlflow.data.context"] for entry in found] == ["training", "validation"]
    for entry in found:
        assert entry.digest == corpus_id[:36]
        assert entry.tags["corpus_id"] == corpus_id
        assert entry.profile == {**facts, "corpus_id": corpus_id}
        assert entry.source == "/data/corpus"


def test_attempt_of_an_older_journal_names_no_dataset() -> None:
    assert datasets_of(typed(record("attempt_started", attempt=1))) == []


def test_preview_is_a_text_of_its_step() -> None:
    sample = {"prompt": "def f(", "text": "x):\n    return x", "num_tokens": 6, "nfe": 6}
    path, text = preview_of(
        typed(record("sample_preview", step=200, samples=[sample], denoising_steps=6, temperature=0.5))
    )
    assert path == "previews/step-00000200.txt"
    assert text == (
        "step 200, 6 denoising steps, temperature 0.5\n\n"
        '--- prompt "def f(", 6 tokens, 6 forward passes\nx):\n    return x\n'
    )


def test_noise_levels_are_metrics_of_one_section() -> None:
    levels = [None, *(float(k) for k in range(1, 10))]
    update = update_of([record("step", step=1, loss_by_noise_level=levels)], Memory())
    assert {point.key: point.value for point in update.points} == {
        f"loss_nats_per_token_by_noise_level/0.{k}-{'1.0' if k == 9 else f'0.{k + 1}'}": float(k) for k in range(1, 10)
    }


def test_start_of_an_attempt_gives_its_phases_at_the_step_that_it_resumed_from() -> None:
    update = update_of(
        [record("attempt_started", attempt=2, resumed_from={"step": 7}, startup_s={"total": 3.0}, restore_s=0.5)],
        Memory(),
    )
    assert {(point.key, point.value, point.step) for point in update.points} == {
        ("startup_s/total", 3.0, 7),
        ("startup_s/restore", 0.5, 7),
    }


def test_step_that_stands_there_with_another_time_is_not_sent_again() -> None:
    lines = [record("step", step=1, loss=4.0), record("step", step=2, loss=2.0)]
    update = update_of(lines, Memory(), {1: TIME_MS - 1, 2: TIME_MS})
    assert [(point.key, point.step) for point in update.points] == [("loss_nats_per_token", 2)]
