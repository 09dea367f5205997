"""Checkpoints written while training goes on: what they hold, how they fail, and who is left when a process dies."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.checkpoint.commit import load_commit
from megamask.resilience.process_facts import facts_of
from support.command import checkpoints, journal, megamask, step_lines, tiny
from support.faulty_main import start_with_fault

pytestmark = pytest.mark.multiprocess

EVERY = "checkpoint.every_steps=3"


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 180) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)
    return found


def fault(folder: Path, run_dir: Path, point: str, action: str, *, nth: int, rank: int | None = None) -> dict[str, Any]:
    folder.mkdir()
    paths = {"folder": str(folder), "run_dir": str(run_dir)}
    return {"point": point, "action": action, "nth": nth, "rank": rank, **paths}


def journal_events(run_dir: Path) -> list[str]:
    """Kind and step of each complete line of the journal."""
    files = sorted((run_dir / "journal").glob("*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text().split("\n")[:-1]]
    return [f"{record['kind']} {record.get('step', '')}".strip() for record in records]


def state_files(folder: Path) -> dict[str, str]:
    """Digest of each file that holds state."""
    own = ("COMMIT.json", "tokenizer/")
    return {name: entry.sha256 for name, entry in load_commit(folder).files.items() if not name.startswith(own)}


@pytest.fixture(scope="module")
def blocking(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    """Nine steps whose checkpoints were written while training waited."""
    runs = tmp_path_factory.mktemp("blocking")
    arguments = tiny(small_corpus, runs, "run", EVERY, "training.steps=9", "checkpoint.asynchronous=false")
    done = megamask("train", *arguments, "checkpoint.keep_last=9")
    assert done.code == 0, done.stderr
    return runs / "run"


@pytest.mark.promise("a checkpoint written during training holds, bit for bit, the state of the step it names")
@pytest.mark.promise(
    "asynchronous and synchronous saves give equal step lines and checkpoints; at most one save is pending"
)
@pytest.mark.promise("a signal during a save completes it and commits the last step")
def test_checkpoint_holds_the_state_of_its_step_although_training_went_on(
    blocking: Path, small_corpus: Path, tmp_path: Path
) -> None:
    """Writing of step 3 is held while steps 4, 5 and 6 are taken; then a signal comes, then writing may go on."""
    run_dir, held = tmp_path / "run", tmp_path / "held"
    arguments = tiny(small_corpus, tmp_path, "run", EVERY, "training.steps=9", "checkpoint.keep_last=9")
    armed = fault(held, run_dir, "checkpoint.share_taken", "hold", nth=1)
    process = start_with_fault(["train", *arguments], armed)
    wait_until(lambda: run_dir.is_dir() and "step 6" in journal_events(run_dir), "step 6")
    assert checkpoints(run_dir) == []
    process.send_signal(signal.SIGTERM)
    (held / "go").touch()
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 75, stderr
    assert [line for line in journal_events(run_dir) if "checkpoint" in line or line.startswith("step")] == [
        *["step 1", "step 2", "step 3", "checkpoint_started 3"],
        *["step 4", "step 5", "step 6", "checkpoint_committed 3"],
        *["checkpoint_started 6", "checkpoint_committed 6"],
    ]
    done = megamask("train", *arguments)
    assert done.code == 0, done.stderr
    assert step_lines(run_dir) == step_lines(blocking)
    expected, found = checkpoints(blocking), checkpoints(run_dir)
    assert [folder.name[:13] for folder in found] == ["step-00000003", "step-00000006", "step-00000009"]
    assert [state_files(folder) for folder in found] == [state_files(folder) for folder in expected]


@pytest.mark.promise("stall, total time and place of each commit are journalled")
def test_commit_record_tells_stall_duration_and_place(blocking: Path) -> None:
    for record in (record for record in journal(blocking) if record["kind"] == "checkpoint_committed"):
        folder = blocking / record["location"]
        assert folder.name == record["checkpoint"] and load_commit(folder).digest == record["digest"]
        assert 0 < record["save_s"] <= record["stall_s"] and record["evaluation"] is None


@pytest.mark.promise(
    "one rank's failed write ends all ranks with 74 within a step; the last commit remains and no folder is left"
)
def test_one_rank_s_full_disk_ends_all_ranks_with_74_within_a_step_and_the_last_commit_stands(
    small_corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = tiny(small_corpus, tmp_path, "run", EVERY, "training.steps=100000", "layout.data_parallel_size=2")
    armed = fault(tmp_path / "fault", run_dir, "checkpoint.state_written", "fail", nth=2, rank=1)
    process = start_with_fault(["train", *arguments, "--json"], armed)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == json.loads(stdout.splitlines()[-1])["exit_code"] == 74, stderr
    assert "disk is full" in stderr and "Traceback" not in stderr
    # the failure may come just after a look, during a step: that step and the next one are the last
    assert max(step_lines(run_dir)) <= int((tmp_path / "fault" / "failed").read_text()) + 2
    codes = [json.loads(path.read_text())["exit_code"] for path in sorted((run_dir / "attempts/0001").glob("rank-*"))]
    assert codes == [74, 74]
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-00000003-a0001"]
    assert megamask("verify", "checkpoint", run_dir).code == 0


@pytest.mark.promise("SIGKILL during a save leaves no writing process and nothing visible; the next attempt sweeps")
def test_killed_while_saving_leaves_no_writer_and_nothing_visible_and_the_next_attempt_sweeps(
    blocking: Path, small_corpus: Path, tmp_path: Path
) -> None:
    run_dir, held = tmp_path / "run", tmp_path / "held"
    arguments = tiny(small_corpus, tmp_path, "run", EVERY, "training.steps=9", "checkpoint.keep_last=9")
    armed = fault(held, run_dir, "checkpoint.state_written", "hold", nth=2)
    process = start_with_fault(["train", *arguments, "layout.data_parallel_size=2"], armed)
    writers = wait_until(lambda: len(files := list(held.glob("held-*"))) == 2 and files, "the second save")
    pids = [int(file.name.removeprefix("held-")) for file in writers]
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(facts_of, pids)), "the end of the writers")
    process.communicate()
    assert [folder.name for folder in checkpoints(run_dir)] == ["step-00000003-a0001"]
    assert (run_dir / "checkpoints" / "step-00000006-a0001").is_dir()
    done = megamask("train", *arguments)
    assert done.code == 0, done.stderr
    names = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    assert names == ["step-00000003-a0001", "step-00000006-a0002", "step-00000009-a0002"]
    assert sorted(step_lines(run_dir)) == sorted(step_lines(blocking))


@pytest.mark.promise("exactly the newest, every n-th, the best and the pinned checkpoints are kept")
def test_run_keeps_the_newest_every_nth_and_the_best_by_the_bound_measured_at_their_step(
    small_corpus: Path, tmp_path: Path
) -> None:
    done = megamask(
        "train",
        *tiny(small_corpus, tmp_path, "run", "training.steps=12", "checkpoint.every_steps=2", "checkpoint.keep_last=1"),
        *("checkpoint.keep_every_steps=6", "checkpoint.keep_best=2", "evaluation.every_steps=2", "evaluation.rows=4"),
    )
    assert done.code == 0, done.stderr
    records = journal(tmp_path / "run")
    measured = {r["step"]: r["nelbo_nats_per_token"] for r in records if r["kind"] == "evaluation"}
    commits = {r["step"]: r for r in records if r["kind"] == "checkpoint_committed"}
    assert sorted(commits) == [2, 4, 6, 8, 10, 12]
    assert {step: r["evaluation"]["nelbo_nats_per_token"] for step, r in commits.items()} == measured
    best = sorted(measured, key=lambda step: (measured[step], -step))[:2]
    kept = {int(folder.name[5:13]) for folder in checkpoints(tmp_path / "run")}
    assert kept == {6, 12, *best}
    gone = [r["checkpoint"] for r in records if r["kind"] == "checkpoint_pruned"]
    assert sorted(gone) == [commits[step]["checkpoint"] for step in sorted(commits.keys() - kept)]
    assert all(
        load_commit(folder).bound == measured[load_commit(folder).step] for folder in checkpoints(tmp_path / "run")
    )


@pytest.mark.promise("a commit that a kill left unrecorded is recorded by the attempt that resumes from it")
def test_commit_that_a_kill_left_unrecorded_is_recorded_by_the_attempt_that_resumes_from_it(
    small_corpus: Path, tmp_path: Path
) -> None:
    run_dir, held = tmp_path / "run", tmp_path / "held"
    arguments = tiny(small_corpus, tmp_path, "run", EVERY, "training.steps=9", "checkpoint.keep_last=9")
    # training waits at step 6 for a save that is visible already and whose thread does not report it
    process = start_with_fault(["train", *arguments], fault(held, run_dir, "latest.replaced", "hold", nth=1))
    wait_until(lambda: list(held.glob("held-*")), "the first commit")
    process.kill()
    process.communicate()
    [commit] = map(load_commit, checkpoints(run_dir))
    assert not [line for line in journal_events(run_dir) if line.startswith("checkpoint_committed")]
    done = megamask("train", *arguments)
    assert done.code == 0, done.stderr
    records = [record for record in journal(run_dir) if record["kind"] == "checkpoint_committed"]
    assert [record["step"] for record in records] == [3, 6, 9]
    assert (records[0]["digest"], records[0]["stall_s"], records[0]["save_s"]) == (commit.digest, None, None)
    checked = megamask("verify", "run", str(run_dir), "--json")
    assert checked.code == 0, checked.stdout
