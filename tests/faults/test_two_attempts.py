"""Two attempts on one run: the newer one wins, and the older writes nothing that anybody sees.

Where the tests run as root the second attempt lives in a pid namespace of its own, as in another container; elsewhere
that test is skipped and reports it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megamask.checkpoint import retention
from megamask.checkpoint.commit import CommitFields, begin, publish
from megamask.checkpoint.integrity import digest_and_flush, verify_folder
from megamask.checkpoint.reader import candidates
from megamask.checkpoint.retention import sweep
from megamask.errors import SupersededError
from megamask.runs.claims import claim, refuse_if_superseded
from megamask.storage import fault_points
from support.command import checkpoints, command, environment, journal, megamask, start, tiny
from support.saving import save_once

NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def wait_for(what: str, is_there: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def last_step(run_dir: Path, attempt: int) -> int:
    files = sorted((run_dir / "journal").glob(f"attempt-{attempt:04d}-*.jsonl")) if run_dir.is_dir() else []
    lines = [line for file in files for line in file.read_bytes().split(b"\n")[:-1]]
    return max((json.loads(line).get("step") or 0 for line in lines), default=0)


@pytest.mark.promise("an attempt in another pid namespace takes over; the older ends with 93 and writes nothing more")
@pytest.mark.promise("`verify run` returns 0 after a real take-over")
@pytest.mark.multiprocess
def test_attempt_in_another_pid_namespace_takes_over_and_the_older_ends_with_93(
    tmp_path: Path, small_corpus: Path
) -> None:
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"only root can make a pid namespace: a real take-over is unproven here ({tried.stderr.strip()})")
    run_dir = tmp_path / "run"
    arguments = tiny(small_corpus, tmp_path, "run", "training.steps=1000000", "checkpoint.every_steps=5")
    older = start("train", *arguments, "--json")
    wait_for("a commit of the older attempt", lambda: run_dir.is_dir() and bool(checkpoints(run_dir)))
    newer = subprocess.Popen(
        [*NAMESPACE, *command("train", *arguments, "--json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        stdout, stderr = older.communicate(timeout=200)
        assert older.returncode == 93, stderr
        assert "attempt 2" in json.loads(stdout.splitlines()[-1])["reason"] or "newer attempt" in stdout
        ended_at = last_step(run_dir, 1)
        wait_for("a step of the newer attempt", lambda: last_step(run_dir, 2) > 0)
        [child] = Path(f"/proc/{newer.pid}/task/{newer.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        _, stderr = newer.communicate(timeout=200)
        assert newer.returncode == 75, stderr
    finally:
        for process in (older, newer):
            process.kill()
    assert last_step(run_dir, 1) == ended_at
    [resumed] = [line["resumed_from"] for line in journal(run_dir) if line.get("attempt") == 2 and "host" in line]
    assert [line["attempt"] for line in journal(run_dir) if line["kind"] == "attempt_ended"] == [2]
    assert all(int(folder.name[5:13]) <= resumed["step"] for folder in checkpoints(run_dir) if "-a0001" in folder.name)
    assert checkpoints(run_dir)[-1].name.endswith("-a0002")
    left = json.loads((run_dir / "attempts" / "0001" / "rank-00000.json").read_text())
    assert (left["exit_code"], "superseded by attempt 2" in left["reason"]) == (93, True)
    assert "superseded by attempt 2 (93)" in megamask("status", run_dir).stdout
    verified = megamask("verify", "run", run_dir, "--json")
    assert verified.code == 0, verified.json["findings"]


@pytest.mark.promise("ranks whose launcher was killed end, and the run continues")
@pytest.mark.slow
@pytest.mark.multiprocess
def test_ranks_whose_launcher_was_killed_die_and_the_run_goes_on(tmp_path: Path, small_corpus: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = tiny(small_corpus, tmp_path, "run", "training.steps=1000000", "checkpoint.every_steps=5")
    launcher = start("train", *arguments, "layout.data_parallel_size=2")
    try:
        wait_for("a commit", lambda: run_dir.is_dir() and bool(checkpoints(run_dir)))
        ranks = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        assert len(ranks) == 2
    finally:
        launcher.kill()
        launcher.communicate()
    wait_for("the end of the ranks", lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    step = last_step(run_dir, 1) + 5
    done = megamask("train", *arguments, f"training.stop_after_step={step}", "--json")
    assert (done.code, done.json["step"]) == (0, step), done.stderr
    assert megamask("verify", "checkpoint", run_dir).code == 0


@pytest.mark.promise("a writer that publishes while its folder is swept exposes nothing half-removed")
def test_writer_that_publishes_while_its_folder_is_removed_shows_nothing_half_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older attempt has looked at the claims before the newer attempt came; the sweep has moved its folder away."""
    run_dir = tmp_path / "run"
    kept = save_once(run_dir, step=10, attempt=claim(run_dir))
    folder = begin(run_dir, 20, 1)
    (folder / "state-00000.safetensors").write_bytes(b"weights")
    files = {"state-00000.safetensors": digest_and_flush(folder, "state-00000.safetensors")}
    remove = shutil.rmtree
    tried: list[str] = []

    def remove_slowly(path: Path, **options: bool) -> None:
        (path / "state-00000.safetensors").unlink()
        with contextlib.suppress(FileNotFoundError):
            publish(folder, files, CommitFields(run_id="r"))
        tried.append(path.name)
        assert [verify_folder(found).digest for found in candidates(run_dir)] == [kept.digest]
        remove(path, **options)

    monkeypatch.setattr(retention, "shutil", SimpleNamespace(rmtree=remove_slowly))
    assert sweep(run_dir, claim(run_dir)) == [folder.name]
    assert len(tried) == 1


@pytest.fixture
def disarmed() -> Iterator[None]:
    yield
    fault_points.disarm()


@pytest.mark.promise("a writer that outlives its attempt publishes nothing once a newer one has claimed and swept")
@pytest.mark.parametrize("sweeps", [False, True], ids=["newer_has_claimed", "newer_has_swept"])
@pytest.mark.parametrize(
    "point",
    [
        "checkpoint.begun",
        "checkpoint.state_written",
        "checkpoint.flushed",
        "checkpoint.claim_checked",
        "COMMIT.json.written",
    ],
)
def test_writer_that_outlives_its_attempt_publishes_nothing_once_a_newer_one_has_swept(
    tmp_path: Path, disarmed: None, point: str, sweeps: bool
) -> None:
    """A claim that comes after the writer has looked is followed by a sweep, which takes the folder from under it."""
    run_dir = tmp_path / "run"
    older = claim(run_dir)
    kept = save_once(run_dir, step=10, attempt=older)
    newer: list[int] = []

    def take_over() -> None:
        if not newer:
            newer.append(claim(run_dir))
            if sweeps:
                sweep(run_dir, newer[0])

    fault_points.arm(point, take_over)
    has_looked = point in ("checkpoint.claim_checked", "COMMIT.json.written")
    if has_looked and not sweeps:  # the newer attempt will find a complete commit when it sweeps and loads
        save_once(run_dir, step=20, attempt=older, check_claim=lambda: refuse_if_superseded(run_dir, older))
    else:
        with pytest.raises(SupersededError, match="superseded by attempt 2"):
            save_once(run_dir, step=20, attempt=older, check_claim=lambda: refuse_if_superseded(run_dir, older))
    assert newer == [2]
    sweep(run_dir, 2)
    seen = [verify_folder(folder).step for folder in candidates(run_dir)]
    assert seen == ([20, 10] if has_looked and not sweeps else [10])
    again = save_once(run_dir, step=20, attempt=2, check_claim=lambda: refuse_if_superseded(run_dir, 2))
    assert verify_folder(again.folder).attempt == 2
    assert verify_folder(kept.folder).digest == kept.digest
