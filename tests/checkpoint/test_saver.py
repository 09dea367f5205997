from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.checkpoint import retention, saver
from megamask.checkpoint.background import WorkState
from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import TrainerState, read_model, read_state
from megamask.checkpoint.integrity import verify_folder
from megamask.checkpoint.reader import candidates, resolve
from megamask.checkpoint.saver import Save, SaveRequest
from megamask.errors import CheckpointIntegrityError, MegamaskError, StorageError, SupersededError
from support.model_documents import model_document
from support.thread_world import ThreadEngine, ThreadShare, ThreadWorld

SaveAll = Callable[..., list[Any]]


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "special_tokens.json").write_text("{}")
    return folder


@pytest.fixture
def save(run_dir: Path, tokenizer_folder: Path) -> SaveAll:
    """Saves from every rank of a world; returns each rank's commit or exception."""

    def do(world: ThreadWorld, step: int, **options: Any) -> list[Any]:
        given = {
            "attempt": 1,
            "parent": None,
            "check_claim": lambda: None,
            "state": TrainerState(step=step, consumed_samples=8 * step, consumed_tokens=100 * step, seed=7),
        } | options

        def job(engine: ThreadEngine) -> Commit:
            return saver.save(
                engine,
                run_dir,
                model=model_document(),
                tokenizer_folder=tokenizer_folder,
                corpora={"main": "c" * 64},
                journal_head=(12, "e" * 64),
                run_id="r1",
                **given,
            )

        return world.run(job)

    return do


@pytest.fixture
def request_for(tokenizer_folder: Path) -> Callable[..., SaveRequest]:
    def make(step: int, **options: Any) -> SaveRequest:
        given: dict[str, Any] = {
            "attempt": 1,
            "parent": None,
            "check_claim": lambda: None,
            "state": TrainerState(step=step, consumed_samples=8 * step, consumed_tokens=100 * step, seed=7),
            "model": model_document(),
            "tokenizer_folder": tokenizer_folder,
            "corpora": {"main": "c" * 64},
            "journal_head": (12, "e" * 64),
            "run_id": "r1",
        }
        return SaveRequest(**(given | options))

    return make


def test_save_commits_every_rank_file_and_the_documents(save: SaveAll, run_dir: Path) -> None:
    commits = save(ThreadWorld(3), 20)
    assert commits[0] == commits[1] == commits[2] == verify_folder(resolve(run_dir))
    commit = commits[0]
    assert sorted(commit.files) == [
        "model.json",
        "state-00000.safetensors",
        "state-00001.safetensors",
        "state-00002.safetensors",
        "state.json",
        "tokenizer/special_tokens.json",
        "tokenizer/tokenizer.json",
    ]
    assert (commit.run_id, commit.corpora, commit.journal) == (
        "r1",
        {"main": "c" * 64},
        {"seq": 12, "sha256": "e" * 64},
    )
    assert read_model(commit.folder) == model_document()
    assert dict(commit.state) == read_state(commit.folder).scalars()


def test_save_chains_commits_by_digest(save: SaveAll, run_dir: Path) -> None:
    first = save(ThreadWorld(1), 20)[0]
    second = save(ThreadWorld(1), 40, parent=first.digest)[0]
    assert verify_folder(second.folder).parent == first.digest


@pytest.mark.promise("an older attempt commits nothing once a newer one has begun")
def test_nothing_is_visible_when_a_newer_attempt_has_claimed_the_run(save: SaveAll, run_dir: Path) -> None:
    def superseded() -> None:
        folder = run_dir / "checkpoints" / "step-00000020-a0001"
        assert (folder / "state.json").exists() and not (folder / "COMMIT.json").exists()
        raise SupersededError("attempt 2 owns the run")

    results = save(ThreadWorld(2), 20, check_claim=superseded)
    assert [type(result) for result in results] == [SupersededError] * 2
    assert candidates(run_dir) == []


def test_newer_attempt_is_named_when_it_has_swept_the_folder_of_a_running_save(save: SaveAll) -> None:
    def superseded() -> None:
        raise SupersededError("attempt 2 owns the run")

    world = ThreadWorld(1)
    world.engines[0].fail_on_save = FileNotFoundError(2, "No such file or directory")
    assert isinstance(save(world, 20, check_claim=superseded)[0], SupersededError)


def test_commit_stands_when_a_peer_is_lost_right_after_it(
    save: SaveAll, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, real = ThreadWorld(1), saver.publish
    engine = world.engines[0]

    def publish(*arguments: Any) -> Commit:
        commit = real(*arguments)

        def lost(_value: Any) -> Any:
            raise RuntimeError("Connection closed by peer")

        monkeypatch.setattr(engine, "max_over_ranks", lost)
        return commit

    monkeypatch.setattr(saver, "publish", publish)
    assert isinstance(save(world, 20)[0], RuntimeError)
    assert [folder.name for folder in candidates(run_dir)] == ["step-00000020-a0001"]


@pytest.mark.promise("a full disk publishes nothing; the last commit remains valid")
@pytest.mark.parametrize("rank", [0, 2])
def test_all_ranks_end_with_storage_error_and_the_last_commit_stands_when_one_disk_is_full(
    save: SaveAll, run_dir: Path, rank: int
) -> None:
    world = ThreadWorld(3)
    before = save(world, 20)[0]
    world.engines[rank].fail_on_save = OSError(28, "No space left on device")
    results = save(world, 40)
    assert [type(result) for result in results] == [StorageError] * 3
    assert "disk is full" in results[1].message
    assert resolve(run_dir) == before.folder
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == [before.folder.name]


def test_other_failure_of_the_engine_is_not_called_storage(save: SaveAll) -> None:
    world = ThreadWorld(2)
    world.engines[1].fail_on_save = RuntimeError("shape mismatch")
    results = save(world, 20)
    assert isinstance(results[1], RuntimeError) and not isinstance(results[1], MegamaskError)
    assert (type(results[0]), results[0].exit_code) == (MegamaskError, 1)


def test_save_fails_cleanly_at_a_real_file_size_limit(save: SaveAll, run_dir: Path) -> None:
    world = ThreadWorld(2)
    before = save(world, 20)[0]
    world.engines[1].content = b"x" * 200_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        results = save(world, 40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [type(result) for result in results] == [StorageError] * 2
    assert resolve(run_dir) == before.folder


def test_save_succeeds_again_after_a_failed_one(save: SaveAll, run_dir: Path) -> None:
    world = ThreadWorld(2)
    world.engines[1].fail_on_save = OSError(28, "No space left on device")
    save(world, 20)
    world.engines[1].fail_on_save = None
    assert verify_folder(save(world, 20)[0].folder).step == 20


@pytest.mark.parametrize("claim_twice", [True, False])
def test_file_with_two_writers_or_none_is_never_published(
    save: SaveAll, run_dir: Path, monkeypatch: pytest.MonkeyPatch, claim_twice: bool
) -> None:
    def write(share: ThreadShare, folder: Path, gate: Any) -> list[str]:
        (folder / "common.pt").write_bytes(b"same on both")
        return ["common.pt"] if claim_twice else []

    monkeypatch.setattr(ThreadShare, "write", write)
    results = save(ThreadWorld(2), 20)
    assert all(isinstance(result, MegamaskError) and "common.pt" in result.message for result in results)
    assert candidates(run_dir) == []


@pytest.mark.promise("a state that the reader of a resume refuses is never published")
def test_state_that_its_reader_refuses_is_never_published(
    save: SaveAll, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(share: ThreadShare, folder: Path) -> None:
        raise CheckpointIntegrityError(f"{folder.name} names a tensor twice")

    monkeypatch.setattr(ThreadShare, "check", refuse)
    results = save(ThreadWorld(2), 20)
    assert all(isinstance(result, MegamaskError) and "a tensor twice" in result.message for result in results)
    assert candidates(run_dir) == []


@pytest.mark.promise("COMMIT.json comes after every flush")
def test_commit_comes_after_every_flush(save: SaveAll, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_flush, real_publish, real_directory = saver.digest_and_flush, saver.publish, saver.fsync_directory

    def flush(folder: Path, name: str, gate: Any) -> Any:
        events.append(f"flush {name}")
        return real_flush(folder, name, gate)

    def directory(path: Path) -> None:
        events.append(f"directory {path.name}")
        real_directory(path)

    def publish(*arguments: Any) -> Commit:
        events.append("publish")
        return real_publish(*arguments)

    monkeypatch.setattr(saver, "digest_and_flush", flush)
    monkeypatch.setattr(saver, "fsync_directory", directory)
    monkeypatch.setattr(saver, "publish", publish)
    commit = save(ThreadWorld(2), 20, check_claim=lambda: events.append("claim"))[0]
    assert events[-2:] == ["claim", "publish"]
    assert {event for event in events if event.startswith("flush")} == {f"flush {name}" for name in commit.files}
    folders = [event for event in events if event.startswith("directory")]
    assert folders == [f"directory {name}" for name in ("tokenizer", "step-00000020-a0001", "checkpoints")]
    assert events.index(folders[0]) > max(at for at, event in enumerate(events) if event.startswith("flush"))


def test_commit_whose_last_flush_failed_is_withdrawn_before_its_files(
    save: SaveAll, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(folder: Path, *arguments: Any) -> Commit:
        (folder / "COMMIT.json").write_text("{}")
        raise StorageError("the device reports an input/output error")

    removed: list[bool] = []
    real = retention.shutil.rmtree

    def remove(path: Path, **options: Any) -> None:
        removed.append((path / "COMMIT.json").exists())
        real(path, **options)

    monkeypatch.setattr(saver, "publish", publish)
    monkeypatch.setattr(retention.shutil, "rmtree", remove)
    assert [type(result) for result in save(ThreadWorld(2), 20)] == [StorageError] * 2
    assert removed == [False]
    assert candidates(run_dir) == []


# --- beside training ---

RequestFor = Callable[..., SaveRequest]


def polled(save: SaveAll) -> Any:
    """Results of polling, on each rank together."""
    while (commit := save.poll()) is None:
        pass
    return commit


@pytest.mark.promise("nothing is visible before every rank has written")
def test_nothing_is_visible_while_one_rank_writes_and_the_commit_comes_when_all_have(
    request_for: RequestFor, run_dir: Path
) -> None:
    world = ThreadWorld(3)
    world.engines[2].may_write.clear()

    def job(engine: ThreadEngine) -> Any:
        save = Save(engine, run_dir, request_for(20), in_background=True)
        before = [save.poll() for _ in range(5)]
        if engine.is_main:
            assert candidates(run_dir) == []
            world.engines[2].may_write.set()
        return before, polled(save), save.seconds

    (before, commit, seconds), *others = world.run(job)
    assert before == [None] * 5
    assert [other[1] for other in others] == [commit] * 2
    assert commit == verify_folder(resolve(run_dir))
    assert seconds > 0 == others[0][2]


@pytest.mark.promise(
    "one rank's failed write ends all ranks with 74 within a step; the last commit remains and no folder is left"
)
@pytest.mark.parametrize("rank", [0, 2])
def test_failure_beside_training_surfaces_on_every_rank_at_the_next_poll_and_leaves_no_folder(
    save: SaveAll, request_for: RequestFor, run_dir: Path, rank: int
) -> None:
    world = ThreadWorld(3)
    before = save(world, 20)[0]
    world.engines[rank].fail_on_save = OSError(28, "No space left on device")
    for other in {0, 1, 2} - {rank}:
        world.engines[other].may_write.clear()  # the others are still writing

    def job(engine: ThreadEngine) -> Any:
        running = Save(engine, run_dir, request_for(40), in_background=True)
        if engine.rank == rank:
            running._writing.wait()
        engine.gather_objects(None)  # the failure has happened
        running.poll()
        return "nobody noticed"

    results = world.run(job)
    assert [type(result) for result in results] == [StorageError] * 3
    assert all("disk is full" in result.message for result in results)
    assert resolve(run_dir) == before.folder
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == [before.folder.name]


@pytest.mark.promise("a newer attempt's claim stops a pending save; a superseded attempt cancels its pending saves")
def test_claim_of_a_newer_attempt_stops_a_save_beside_training_on_every_rank(
    request_for: RequestFor, run_dir: Path
) -> None:
    def superseded() -> None:
        raise SupersededError("attempt 2 owns the run")

    world = ThreadWorld(2)
    request = request_for(20, check_claim=superseded)
    results = world.run(lambda engine: polled(Save(engine, run_dir, request, in_background=True)))
    assert [type(result) for result in results] == [SupersededError] * 2
    assert list((run_dir / "checkpoints").glob("step-*")) == []


@pytest.mark.promise("a newer attempt's claim stops a pending save; a superseded attempt cancels its pending saves")
@pytest.mark.parametrize("together", [True, False])
def test_aborted_save_writes_no_more_and_leaves_no_folder(
    request_for: RequestFor, run_dir: Path, together: bool
) -> None:
    world = ThreadWorld(2)
    for engine in world.engines:
        engine.may_write.clear()

    def job(engine: ThreadEngine) -> Any:
        running = Save(engine, run_dir, request_for(20), in_background=True)
        running.abort(together=together)
        return running._writing.state

    assert world.run(job) == [WorkState.FAILED] * 2
    assert list((run_dir / "checkpoints").glob("step-*")) == []


def test_state_that_cannot_be_copied_is_a_failure_of_the_save_on_every_rank(
    request_for: RequestFor, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ThreadWorld(2)

    def no_memory(*, copy: bool) -> Any:
        raise MemoryError("no memory for a copy")

    monkeypatch.setattr(world.engines[1], "state_share", no_memory)
    results = world.run(lambda engine: polled(Save(engine, run_dir, request_for(20), in_background=True)))
    assert isinstance(results[1], MemoryError)
    assert isinstance(results[0], MegamaskError) and "rank 1: MemoryError" in results[0].message
    assert list((run_dir / "checkpoints").glob("step-*")) == []


def test_bound_of_the_step_stands_in_the_commit_and_comes_back(save: SaveAll, run_dir: Path) -> None:
    bound = {"nelbo_nats_per_token": repr(0.1 + 0.2), "standard_error": "0.25"}
    commit = save(ThreadWorld(1), 20, evaluation=bound)[0]
    found = verify_folder(commit.folder).evaluation
    assert found == bound and float(found["nelbo_nats_per_token"]) == 0.1 + 0.2
    assert save(ThreadWorld(1), 40)[0].evaluation is None
