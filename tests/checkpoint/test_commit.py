from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask.checkpoint.commit import Commit, CommitFields, FileDigest, begin, load_commit, publish
from megamask.checkpoint.integrity import verify_folder
from megamask.errors import CheckpointIntegrityError, MegamaskError, StorageError, UsageError
from megamask.runs.laws import LAWS
from megamask.storage import durable
from megamask.storage.hashing import canonical_json, hash_of, sha256_bytes

MakeCommit = Callable[..., Commit]


def _rewrite(folder: Path, **changes: object) -> None:
    """Writes a COMMIT.json whose own sha256 is right, so that only the change is wrong."""
    path = folder / "COMMIT.json"
    document = json.loads(path.read_bytes()) | changes
    document.pop("self_sha256")
    document["self_sha256"] = hash_of(document)
    path.write_bytes(canonical_json(document))


def test_commit_reads_back_what_was_published(commit_step: MakeCommit) -> None:
    first = commit_step(20)
    second = commit_step(40, parent=first.digest)
    assert load_commit(second.folder) == second
    assert (second.step, second.attempt, second.parent, second.laws) == (40, 1, first.digest, LAWS)
    assert second.num_bytes == 3000 + 2


def test_commit_digest_is_the_sha256_of_its_canonical_bytes(commit_step: MakeCommit) -> None:
    commit = commit_step(20)
    data = (commit.folder / "COMMIT.json").read_bytes()
    assert commit.digest == sha256_bytes(data)
    assert canonical_json(json.loads(data)) == data


def test_commit_states_the_law_versions_of_the_rooms_that_hold_them(commit_step: MakeCommit) -> None:
    from megamask.data.order import ORDER_LAW_VERSION
    from megamask.diffusion.philox import NOISE_LAW_VERSION
    from megamask.evaluation.likelihood import LIKELIHOOD_LAW_VERSION
    from megamask.models.initial_weights import WEIGHTS_LAW_VERSION

    assert commit_step(20).laws == {
        "order": ORDER_LAW_VERSION,
        "noise": NOISE_LAW_VERSION,
        "weights": WEIGHTS_LAW_VERSION,
        "likelihood": LIKELIHOOD_LAW_VERSION,
    }


def test_latest_names_the_folder_committed_last(commit_step: MakeCommit, run_dir: Path) -> None:
    commit_step(20)
    commit_step(40, attempt=2)
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000040-a0002\n"


def test_publish_refuses_a_second_commit_and_keeps_the_first(commit_step: MakeCommit) -> None:
    commit = commit_step(20)
    before = (commit.folder / "COMMIT.json").read_bytes()
    with pytest.raises(FileExistsError):
        publish(commit.folder, commit.files, CommitFields(run_id="other"))
    assert (commit.folder / "COMMIT.json").read_bytes() == before


def test_begin_refuses_a_step_that_this_attempt_committed(commit_step: MakeCommit, run_dir: Path) -> None:
    commit = commit_step(20)
    with pytest.raises(MegamaskError, match="committed already"):
        begin(run_dir, 20, 1)
    assert verify_folder(commit.folder) == commit


def test_begin_clears_what_a_failed_save_left(run_dir: Path) -> None:
    (begin(run_dir, 20, 1) / "half").write_text("half")
    assert list(begin(run_dir, 20, 1).iterdir()) == []


def test_commit_stands_when_the_hint_cannot_be_written(
    commit_step: MakeCommit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr("megamask.checkpoint.commit.write_atomic", refuse)
    commit = commit_step(20)
    assert verify_folder(commit.folder) == commit


def test_publish_leaves_nothing_visible_when_the_disk_is_full(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> Path:
        raise OSError(28, "No space left on device", str(path))

    folder = begin(run_dir, 20, 1)
    monkeypatch.setattr(durable, "_write_temporary", refuse)
    with pytest.raises(StorageError, match="disk is full"):
        publish(folder, {"a": FileDigest(num_bytes=0, sha256="0" * 64)}, CommitFields(run_id="r"))
    assert not (folder / "COMMIT.json").exists()


def test_publish_refuses_floats(run_dir: Path) -> None:
    fields = CommitFields(run_id="r", state={"loss": 0.5})
    with pytest.raises(TypeError, match="float"):
        publish(begin(run_dir, 20, 1), {"a": FileDigest(num_bytes=0, sha256="0" * 64)}, fields)


def test_every_flipped_byte_of_a_commit_is_noticed(
    commit_step: MakeCommit, flip_byte: Callable[[Path, int], None]
) -> None:
    path = commit_step(20).folder / "COMMIT.json"
    for at in range(path.stat().st_size):
        flip_byte(path, at)
        with pytest.raises(CheckpointIntegrityError, match=r"COMMIT\.json"):
            load_commit(path.parent)
        flip_byte(path, at)
    load_commit(path.parent)


@pytest.mark.parametrize("data", [b"", b"{", b"[]\n", b"null\n", b"\xff\xfe", b"[" * 100_000, b'{"a":1,"a":1}\n'])
def test_commit_that_is_not_one_canonical_object_is_refused(commit_step: MakeCommit, data: bytes) -> None:
    folder = commit_step(20).folder
    (folder / "COMMIT.json").write_bytes(data)
    with pytest.raises(CheckpointIntegrityError):
        load_commit(folder)


GOOD = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../outside": GOOD}},
        {"files": {"/etc/passwd": GOOD}},
        {"files": {"a/../../b": GOOD}},
        {"files": {"COMMIT.json": GOOD}},
        {"files": {"a": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"a": {"bytes": True, "sha256": "0" * 64}}},
        {"files": {"a": {"bytes": 1, "sha256": "0" * 63}}},
        {"files": {"a": {"bytes": 1}}},
        {"files": {}},
        {"files": []},
        {"parent": "short"},
        {"step": "20"},
        {"step": 21},
        {"journal": None},
        {"format": "something-else"},
        {"version": 0},
        {"version": "1"},
    ],
)
def test_commit_with_a_misstated_field_is_refused(commit_step: MakeCommit, changes: dict[str, object]) -> None:
    folder = commit_step(20).folder
    _rewrite(folder, **changes)
    with pytest.raises(CheckpointIntegrityError):
        load_commit(folder)


def test_commit_of_a_newer_version_is_a_usage_error_and_not_damage(commit_step: MakeCommit) -> None:
    folder = commit_step(20).folder
    _rewrite(folder, version=3)
    with pytest.raises(UsageError, match="version 3"):
        load_commit(folder)


def test_flipped_version_is_damage_and_no_newer_format(commit_step: MakeCommit) -> None:
    path = commit_step(20).folder / "COMMIT.json"
    path.write_bytes(path.read_bytes().replace(b'"version":2', b'"version":3'))
    with pytest.raises(CheckpointIntegrityError):
        load_commit(path.parent)


def test_commit_that_is_a_link_is_refused(commit_step: MakeCommit, tmp_path: Path) -> None:
    folder = commit_step(20).folder
    (folder / "COMMIT.json").rename(tmp_path / "elsewhere.json")
    (folder / "COMMIT.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointIntegrityError, match="is a link"):
        load_commit(folder)
