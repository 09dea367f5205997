from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamask.checkpoint import integrity, loader
from megamask.checkpoint.commit import CommitFields, publish
from megamask.checkpoint.contents import ModelDocument, TrainerState
from megamask.checkpoint.integrity import digest_and_flush
from megamask.checkpoint.ownership import Owner
from megamask.checkpoint.reader import resolve
from megamask.checkpoint.retention import is_marked_damaged, prune
from megamask.checkpoint.saver import save
from megamask.errors import CheckpointIntegrityError, StorageError, UsageError
from support.model_documents import model_document
from support.thread_world import ThreadWorld

CORPORA = {"main": "c" * 64}


@pytest.fixture
def saved(run_dir: Path, tmp_path: Path) -> ThreadWorld:
    """Three ranks that committed steps 20 and 40; their state records at which step it was made."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    world = ThreadWorld(3)
    for step in (20, 40):
        for engine in world.engines:
            engine.content = f"rank {engine.rank} at {step}".encode()
        results = world.run(
            lambda engine: save(
                engine,
                run_dir,
                attempt=1,
                state=TrainerState(step=step, consumed_samples=8 * step, consumed_tokens=step, seed=7),  # noqa: B023
                model=model_document(),
                tokenizer_folder=tmp_path / "tokenizer",
                corpora=CORPORA,
                journal_head=(0, "0" * 64),
                run_id="r",
                parent=None,
                check_claim=lambda: None,
            )
        )
        assert not isinstance(results[0], Exception), results[0]
    return ThreadWorld(3)


OWNER = Owner(run_id="r", seed=7, corpora=CORPORA)


def _load(world: ThreadWorld, run_dir: Path, model: ModelDocument | None = None, owner: Owner = OWNER) -> list[Any]:
    return world.run(lambda engine: loader.load(engine, run_dir, model=model or model_document(), owner=owner))


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}-a0001"


def test_load_restores_the_newest_checkpoint_on_every_rank(saved: ThreadWorld, run_dir: Path) -> None:
    results = _load(saved, run_dir)
    assert [result.state.step for result in results] == [40] * 3
    assert [engine.content for engine in saved.engines] == [f"rank {rank} at 40".encode() for rank in range(3)]
    assert results[0].incidents == []
    assert results[0].state.consumed_samples == 320


def test_fresh_run_starts_without_a_checkpoint(run_dir: Path) -> None:
    results = _load(ThreadWorld(2), run_dir)
    assert [(result.commit, result.state, result.incidents) for result in results] == [(None, None, [])] * 2


@pytest.mark.parametrize(
    "name",
    ["state-00000.safetensors", "state-00002.safetensors", "state.json", "COMMIT.json", "tokenizer/tokenizer.json"],
)
def test_load_falls_back_with_an_incident_when_any_file_is_damaged(
    saved: ThreadWorld, run_dir: Path, flip_byte: Callable[..., None], name: str
) -> None:
    flip_byte(_folder(run_dir, 40) / name, 1)
    results = _load(saved, run_dir)
    assert [result.state.step for result in results] == [20] * 3
    assert all(engine.loaded_from == _folder(run_dir, 20) for engine in saved.engines)
    for result in results:
        assert [record["checkpoint"] for record in result.incidents] == ["step-00000040-a0001"]
        assert name in result.incidents[0]["problem"]


@pytest.mark.promise("an unreadable storage ends with 74; no older checkpoint is used, none is pruned")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", ["state-00002.safetensors", "COMMIT.json"])
def test_storage_that_does_not_answer_is_no_damage_and_nothing_older_is_taken(
    saved: ThreadWorld, run_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    real_open, real_read = os.open, Path.read_bytes
    unreadable = str(_folder(run_dir, 40) / name)

    def refuse(path: Any) -> None:
        if str(path) == unreadable:
            raise OSError(number, os.strerror(number), str(path))

    def opened(path: Any, *arguments: Any, **options: Any) -> int:
        refuse(path)
        return real_open(path, *arguments, **options)

    def read(path: Path) -> bytes:
        refuse(path)
        return real_read(path)

    monkeypatch.setattr(integrity.os, "open", opened)
    monkeypatch.setattr(Path, "read_bytes", read)
    results = _load(saved, run_dir)
    assert [type(result) for result in results] == [StorageError] * 3
    assert all("Nothing was loaded" in result.message for result in results)
    assert [engine.loaded_from for engine in saved.engines] == [None] * 3


def test_load_ends_with_integrity_error_on_every_rank_when_none_is_left(
    saved: ThreadWorld, run_dir: Path, flip_byte: Callable[..., None]
) -> None:
    for step in (20, 40):
        flip_byte(_folder(run_dir, step) / "state-00001.safetensors")
    results = _load(saved, run_dir)
    assert [type(result) for result in results] == [CheckpointIntegrityError] * 3
    assert all(engine.loaded_from is None for engine in saved.engines)


@pytest.mark.promise("nothing is loaded before all files verify")
def test_nothing_is_loaded_before_all_files_verify(
    saved: ThreadWorld, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    real = integrity.problems

    def watch(commit: Any, names: list[str]) -> list[str]:
        assert all(engine.loaded_from is None for engine in saved.engines)
        verified.extend(names)
        return real(commit, names)

    monkeypatch.setattr(loader, "problems", watch)
    commit = _load(saved, run_dir)[0].commit
    assert sorted(verified) == sorted(commit.files)


def test_link_in_a_checkpoint_is_damage(saved: ThreadWorld, run_dir: Path) -> None:
    (_folder(run_dir, 40) / "extra").symlink_to("/")
    assert [result.state.step for result in _load(saved, run_dir)] == [20] * 3


def test_checkpoint_of_another_model_is_refused_and_the_difference_named(saved: ThreadWorld, run_dir: Path) -> None:
    other = model_document(spec=replace(model_document().spec, num_layers=3))
    results = _load(saved, run_dir, other)
    assert [type(result) for result in results] == [UsageError] * 3
    assert "model.num_layers is 2 there, 3 here" in results[0].message


def test_state_that_contradicts_its_commit_is_damage(run_dir: Path, tmp_path: Path, saved: ThreadWorld) -> None:
    folder = run_dir / "checkpoints" / "step-00000060-a0001"
    folder.mkdir()
    (folder / "model.json").write_bytes(model_document().to_bytes())
    state = TrainerState(step=60, consumed_samples=1, consumed_tokens=1, seed=7)
    (folder / "state.json").write_bytes(state.to_bytes())
    files = {name: digest_and_flush(folder, name) for name in ("model.json", "state.json")}
    publish(
        folder, files, CommitFields(run_id="r", state=replace(state, consumed_samples=2).scalars(), corpora=CORPORA)
    )
    results = _load(saved, run_dir)
    assert [result.state.step for result in results] == [40] * 3
    assert "different positions" in results[0].incidents[0]["problem"]


def test_ranks_that_see_different_file_systems_do_not_load(
    saved: ThreadWorld, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "read_commit_bytes", lambda folder: b"something else")
    results = _load(saved, run_dir)
    assert [type(result) for result in results] == [CheckpointIntegrityError] * 3
    assert "differently on two ranks" in results[0].message


@pytest.mark.promise(
    "a checkpoint of another run, seed or corpora is refused on all ranks, by name, and nothing is loaded"
)
@pytest.mark.parametrize(
    ("owner", "words"),
    [
        (replace(OWNER, run_id="s"), "belongs to run r, this is run s. Nothing was loaded."),
        (replace(OWNER, seed=8), "run.seed 7, this run has 8. Nothing was loaded."),
        (replace(OWNER, corpora={"main": "d" * 64}), f"this run has {{'main': '{'d' * 64}'}}. Nothing was loaded."),
        (replace(OWNER, corpora={"more": "c" * 64}), f"this run has {{'more': '{'c' * 64}'}}. Nothing was loaded."),
        (replace(OWNER, corpora={"main": "d" * 64, "more": "e" * 64}), "Nothing was loaded."),
        (replace(OWNER, corpora={}), "this run has {}. Nothing was loaded."),
    ],
    ids=["run", "seed", "corpora", "corpus of another name", "grown and another digest", "no corpora"],
)
def test_checkpoint_of_another_run_is_refused_on_every_rank_and_named(
    saved: ThreadWorld, run_dir: Path, owner: Owner, words: str
) -> None:
    results = _load(saved, run_dir, owner=owner)
    assert [type(result) for result in results] == [UsageError] * 3
    assert all(result.message.startswith(f"{_folder(run_dir, 40)} ") and words in result.message for result in results)
    assert [engine.loaded_from for engine in saved.engines] == [None] * 3


def test_checkpoint_from_before_a_corpus_was_added_is_loaded(saved: ThreadWorld, run_dir: Path) -> None:
    results = _load(saved, run_dir, owner=replace(OWNER, corpora=CORPORA | {"more": "e" * 64}))
    assert [result.state.step for result in results] == [40] * 3


@pytest.mark.promise("a foreign checkpoint is refused before its files are read")
def test_checkpoint_of_another_run_is_refused_before_its_files_are_looked_at(
    saved: ThreadWorld, run_dir: Path, flip_byte: Callable[..., None]
) -> None:
    flip_byte(_folder(run_dir, 40) / "state-00001.safetensors")
    results = _load(saved, run_dir, owner=replace(OWNER, run_id="s"))
    assert [type(result) for result in results] == [UsageError] * 3


@pytest.mark.promise("damage is remembered by later attempts")
def test_damage_is_remembered_in_later_attempts_until_the_checkpoint_verifies_again(
    saved: ThreadWorld, run_dir: Path, flip_byte: Callable[..., None]
) -> None:
    flip_byte(_folder(run_dir, 40) / "state-00001.safetensors")
    assert _load(saved, run_dir)[0].state.step == 20
    assert [is_marked_damaged(_folder(run_dir, step)) for step in (20, 40)] == [False, True]
    assert prune(run_dir, 1, run_id="r") == ["step-00000040-a0001"]  # by its sizes alone it would push out step 20
    assert resolve(run_dir) == _folder(run_dir, 20)


@pytest.mark.promise("a restored checkpoint counts again once loaded")
def test_checkpoint_that_was_restored_from_a_copy_counts_again_once_it_is_loaded(
    saved: ThreadWorld, run_dir: Path, flip_byte: Callable[..., None]
) -> None:
    flip_byte(_folder(run_dir, 40) / "state-00001.safetensors")
    _load(saved, run_dir)
    flip_byte(_folder(run_dir, 40) / "state-00001.safetensors")
    assert _load(saved, run_dir)[0].state.step == 40
    assert not is_marked_damaged(_folder(run_dir, 40))


@pytest.mark.promise("no checkpoint is marked where none verifies")
def test_nothing_is_marked_when_no_checkpoint_verifies(
    saved: ThreadWorld, run_dir: Path, flip_byte: Callable[..., None]
) -> None:
    for step in (20, 40):
        flip_byte(_folder(run_dir, step) / "state-00001.safetensors")
    _load(saved, run_dir)
    assert not list((run_dir / "checkpoints").glob("*.damaged"))
