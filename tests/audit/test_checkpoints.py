"""verify run: checkpoints of a run against its journal, claims and pins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megamask.storage.hashing import canonical_json, hash_of, sha256_bytes
from megamask_pipelines.cli.main import main
from support.journal_edits import NEWEST, Verify, found, lines_of, place, rewrite
from support.journalled_run import JournalledRun
from support.shards import flip_bit


@pytest.mark.parametrize("name", ["state-00000.safetensors", "state.json", "model.json", "tokenizer/tokenizer.json"])
def test_flipped_byte_of_any_checkpoint_is_found(run_dir: Path, verify: Verify, name: str) -> None:
    for folder in ("checkpoints/step-00000004-a0001", NEWEST):
        path = run_dir / folder / name
        flip_bit(path, path.stat().st_size // 2)
        found(verify(65), name, folder)
        flip_bit(path, path.stat().st_size // 2)


def recommit(folder: Path, **changes: Any) -> None:
    """A COMMIT.json that is true of its files and contains something else."""
    document = {**json.loads((folder / "COMMIT.json").read_bytes()), **changes}
    del document["self_sha256"]
    (folder / "COMMIT.json").write_bytes(canonical_json({**document, "self_sha256": hash_of(document)}))


@pytest.mark.promise("`megamask verify run` accepts a consistent run, and names file and line of every contradiction")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"run_id": "other"}, "run_id is 'other'"),
        ({"corpora": {"main": "0" * 64}}, "corpora is"),
        ({"journal": {"seq": 3, "sha256": "0" * 64}}, "line 3 of the journal"),
        ({"journal": {"seq": [], "sha256": None}}, "line [] of the journal"),
        ({"journal": {}}, "line None of the journal"),
        ({"parent": None}, "parent is '"),
        ({"parent": "f" * 64}, "parent is '"),
    ],
)
def test_commit_that_contradicts_the_run_is_found(run_dir: Path, verify: Verify, change: Any, problem: str) -> None:
    recommit(run_dir / NEWEST, **change)
    found(verify(65), problem)


def test_commit_that_names_another_place_of_the_journal_is_found(run_dir: Path, verify: Verify) -> None:
    path = run_dir / "journal" / "attempt-0001-000.jsonl"
    lines = path.read_bytes().splitlines()
    step = next(n for n, line in enumerate(lines) if b'"kind":"step"' in line and b'"step":3' in line)
    recommit(run_dir / NEWEST, journal={"seq": step + 1, "sha256": sha256_bytes(lines[step])})
    answer = verify(65)
    found(answer, "step is 6; the journal is at 3 there", f"{NEWEST}/COMMIT.json")
    found(answer, "it names a line of attempt 1")


@pytest.mark.promise(
    "`megamask verify run` detects a missing pinned checkpoint, and notes a commit that is missing without a record"
)
def test_newest_commit_that_is_gone_is_found_and_a_pruned_one_is_not(run_dir: Path, verify: Verify) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004-a0001")
    answer = verify(0)  # a prune that was not journalled any more
    note = "step-00000004-a0001 was committed and is gone, and no line records that it was pruned"
    assert [entry for entry in answer["notes"] if "gone" in entry] == [note]
    (run_dir / NEWEST / "COMMIT.json").unlink()
    found(verify(65), "step-00000006-a0002 was committed and never pruned", "journal/attempt-0002-000.jsonl")


@pytest.mark.promise(
    "`megamask verify run` detects a missing pinned checkpoint, and notes a commit that is missing without a record"
)
def test_pinned_checkpoint_that_is_gone_is_found_and_one_that_is_there_is_not(run_dir: Path, verify: Verify) -> None:
    (run_dir / "checkpoints" / "step-00000004-a0001.pinned").touch()
    verify(0)
    (run_dir / "checkpoints" / "step-00000004-a0001" / "COMMIT.json").unlink()
    found(verify(65), "is pinned, but it does not exist", "checkpoints/step-00000004-a0001.pinned")
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004-a0001")
    answer = verify(65)
    found(answer, "step-00000004-a0001 is pinned, but it does not exist")
    assert not [entry for entry in answer["notes"] if "gone" in entry]


@pytest.mark.promise(
    "`megamask verify run` detects a missing pinned checkpoint, and notes a commit that is missing without a record"
)
def test_pin_of_a_checkpoint_that_was_pruned_or_never_was_is_found(run_dir: Path, verify: Verify) -> None:
    for name in ("step-00000002-a0001", "step-5"):
        pin = run_dir / "checkpoints" / f"{name}.pinned"
        pin.touch()
        found(verify(65), f"{name} is pinned, but it does not exist", f"checkpoints/{name}.pinned")
        pin.unlink()
    verify(0)


@pytest.mark.promise(
    "a commit recorded by the attempt that resumes from it is valid; any differing field of that line is detected"
)
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        (
            {"checkpoint": "step-00000004-a0002"},
            "checkpoint is 'step-00000004-a0002'; it must be 'step-00000004-a0001'",
        ),
        ({"step": 3}, "step is 3; it must be 4"),
        ({"location": "/tmp/x"}, "location is '/tmp/x'"),
        ({"digest": "0" * 64}, "digest is '0000"),
        ({"parent": "0" * 64}, "parent is '0000"),
        ({"bytes": 1}, "bytes is 1"),
    ],
)
def test_commit_that_the_next_attempt_reported_is_whole_when_it_is_the_one_resumed_from(
    journalled_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    problem: str | None,
) -> None:
    run = JournalledRun(tmp_path, journalled_run.parent / "data" / "corpus")
    run.start(None)
    run.step()
    run.step()
    run.commit()
    run.step()
    run.step()
    last = run.commit(is_announced=False)
    run.die()
    run.start(last, **change)
    run.step()
    run.step()
    run.commit()
    run.complete()
    assert main(["verify", "run", str(run.run_dir), "--json"]) == (0 if problem is None else 65)
    answer = json.loads(capsys.readouterr().out)
    if problem is None:
        assert not [note for note in answer["notes"] if "was not announced" in note]
    else:
        found(answer, problem, "journal/attempt-0002-000.jsonl", 2)


@pytest.mark.promise("a commit is recorded once")
def test_commit_that_was_reported_already_is_not_reported_again(run_dir: Path, verify: Verify) -> None:
    lines = lines_of(run_dir, 1)
    again = lines[place(lines, "checkpoint_committed", 4)]

    def forge(attempt: int, lines: list[dict[str, Any]]) -> None:
        if attempt == 2:
            lines.insert(place(lines, "attempt_started") + 1, dict(again))

    rewrite(run_dir, forge)
    found(verify(65), "checkpoint is 'step-00000004-a0001'; it must be 'step-00000004-a0002'")
