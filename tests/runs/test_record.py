"""run.json: written once, and every later attempt must be the same run."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from megamask.config.load import load_train_config
from megamask.config.schema.roots import TrainConfig
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.runs.configs import store_attempt_config
from megamask.runs.layout import run_path
from megamask.runs.record import RunRecord, open_run, read_run
from megamask.training.resuming import is_complete, last_attempt_of, recorded_schedule
from support.records import edit_run_record, flip_byte
from support.saving import save_once

TINY = Path(__file__).parents[2] / "configs" / "run" / "tiny.yaml"
CORPUS_ID, TOKENIZER = "c" * 64, "d" * 64


def config(*overrides: str) -> TrainConfig:
    return load_train_config(str(TINY), list(overrides)).config


def opened(run_dir: Path, *overrides: str, **changes: Any) -> RunRecord:
    arguments = {
        "corpora": {"main": CORPUS_ID},
        "tokenizer_digest": TOKENIZER,
        "code_version": "test",
        **changes,
    }
    return open_run(run_dir, config(*overrides), **arguments)


def test_first_attempt_writes_who_the_run_is(tmp_path: Path) -> None:
    record = opened(tmp_path / "run")
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record.is_new
    assert content["run_id"] == record.run_id
    assert content["corpora"] == {"main": CORPUS_ID}
    assert content["identity"]["training.global_batch_size"] == 8
    assert record.recorded_steps == 20
    assert "layout.tensor_parallel_size" not in content["identity"]


def test_later_attempts_find_the_same_run(tmp_path: Path) -> None:
    first = opened(tmp_path / "run")
    later = opened(tmp_path / "run", "layout.tensor_parallel_size=2", "checkpoint.keep_last=7")
    assert not later.is_new
    assert later.run_id == first.run_id


@pytest.mark.parametrize("override", ["run.seed=9", "optimizer.learning_rate=0.1", "model.num_layers=3", "data.seed=4"])
def test_another_identity_is_refused_by_name(tmp_path: Path, override: str) -> None:
    opened(tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(UsageError, match=override.split("=", maxsplit=1)[0].replace(".", r"\.")):
        opened(tmp_path / "run", override)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_another_corpus_is_refused_by_id(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    with pytest.raises(UsageError, match=f"data.corpora.main is corpus {'e' * 64}"):
        opened(tmp_path / "run", corpora={"main": "e" * 64})


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    with pytest.raises(UsageError, match="tokenizer"):
        opened(tmp_path / "run", tokenizer_digest="f" * 64)


def test_run_under_other_laws_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    edit_run_record(tmp_path / "run", laws={"order": 1, "noise": 2, "weights": 1, "likelihood": 1})
    with pytest.raises(UsageError, match="laws"):
        opened(tmp_path / "run")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": "other", "version": 1, "run_id": "x"}'])
def test_damaged_record_is_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    opened(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(damage)
    with pytest.raises(CheckpointIntegrityError, match=r"run\.json"):
        opened(tmp_path / "run")
    assert path.read_text() == damage


@pytest.mark.promise("a damaged or missing run.json ends with 65, for every byte")
def test_record_with_any_byte_flipped_is_damage(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        flip_byte(path, at)
        name_is_lost = b'"self_sha256":' not in path.read_bytes()
        try:
            record = read_run(tmp_path / "run")
        except CheckpointIntegrityError as error:
            assert "run.json" in error.message
        else:  # only the digest went unread: what it covers is complete
            assert name_is_lost
            assert {**record.content, "self_sha256": 0}.items() >= {**json.loads(whole), "self_sha256": 0}.items()
        path.write_bytes(whole)


def test_record_of_a_run_that_began_before_it_had_a_digest_is_read(tmp_path: Path) -> None:
    run_id = opened(tmp_path / "run").run_id
    edit_run_record(tmp_path / "run")
    assert opened(tmp_path / "run").run_id == run_id


@pytest.mark.promise("a damaged or missing run.json ends with 65, for every byte")
@pytest.mark.parametrize("folder", ["checkpoints", "journal", "attempts"])
def test_run_that_lost_its_record_is_damage_and_no_new_run(tmp_path: Path, folder: str) -> None:
    opened(tmp_path / "run")
    (tmp_path / "run" / folder).mkdir()
    (tmp_path / "run" / "run.json").unlink()
    for action in (lambda: opened(tmp_path / "run"), lambda: read_run(tmp_path / "run")):
        with pytest.raises(CheckpointIntegrityError, match=r"run\.json is missing"):
            action()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [folder]


def test_last_attempt_is_known_from_what_it_left(tmp_path: Path) -> None:
    assert last_attempt_of(tmp_path) == 0
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "attempt-0003-000.jsonl").write_text("")
    assert last_attempt_of(tmp_path) == 3
    (tmp_path / "checkpoints" / "step-00000010-a0005").mkdir(parents=True)
    assert last_attempt_of(tmp_path) == 5


def test_newer_record_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    edit_run_record(tmp_path / "run", version=99)
    with pytest.raises(UsageError, match="version 99"):
        read_run(tmp_path / "run")


def test_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(UsageError, match=r"run is not a folder\. .*\n.*run\.output_dir or run\.name"):
        opened(tmp_path / "run")


def test_simultaneous_first_attempts_agree_on_one_run(tmp_path: Path) -> None:
    found: list[str] = []
    barrier = threading.Barrier(8)

    def begin() -> None:
        barrier.wait()
        found.append(opened(tmp_path / "run").run_id)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_run_without_status_is_not_complete(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    assert not is_complete(tmp_path / "run", config())
    assert not is_complete(tmp_path / "nowhere", config())


def test_attempt_config_reads_back_as_it_was(tmp_path: Path) -> None:
    path = store_attempt_config(tmp_path, 3, config("run.seed=5"))
    assert path.name == "attempt-0003.yaml"
    assert load_train_config(str(path), []).config == config("run.seed=5")


def test_run_directory_is_output_dir_and_name() -> None:
    assert run_path("runs", "a") == Path("runs/a")


@pytest.mark.promise("a foreign checkpoint is refused before the claim")
def test_checkpoint_of_another_run_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    record = opened(tmp_path / "run", "run.seed=7", corpora={"main": "c" * 64})
    commit = save_once(tmp_path / "run", step=3, attempt=1, run_id=record.run_id)
    assert recorded_schedule(record) == (20, 3)
    foreign = save_once(tmp_path / "run", step=9, attempt=1, run_id="other")
    with pytest.raises(UsageError, match=f"{foreign.folder} belongs to run other, this is run {record.run_id}"):
        recorded_schedule(record)
    (foreign.folder / "state.json").unlink()
    with pytest.raises(UsageError, match="belongs to run other"):
        recorded_schedule(record)
    (foreign.folder / "COMMIT.json").write_bytes(b"{}")
    assert recorded_schedule(record) == (20, commit.step)
