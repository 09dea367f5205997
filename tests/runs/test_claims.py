from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest

from megamask.errors import StorageError, SupersededError, UsageError
from megamask.runs import claims
from megamask.runs.claims import claim, has_died, is_live, is_superseded, read_claim, refuse_if_superseded
from megamask.runs.layout import attempt_folder

CLAIM_AND_WAIT = """
import sys
from pathlib import Path
from megamask.runs.claims import claim
print(claim(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def live_claimant(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed the run in tmp_path as attempt 1 and still runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_WAIT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def edit_claim(run_dir: Path, attempt: int, **changes: object) -> None:
    path = attempt_folder(run_dir, attempt) / "claim.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_claim_records_who_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert claim(tmp_path) == 1
    content = read_claim(tmp_path, 1)
    assert content is not None
    assert (content["attempt"], content["pid"], content["scheduler_id"]) == (1, os.getpid(), "SLURM_JOB_ID=4711")
    assert {"host", "boot_id", "pid_namespace", "process_start_time", "time", "format", "version"} <= content.keys()
    assert [path.name for path in attempt_folder(tmp_path, 1).iterdir()] == ["claim.json"]


def test_claim_of_the_same_process_counts_up(tmp_path: Path) -> None:
    assert [claim(tmp_path) for _ in range(3)] == [1, 2, 3]


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting costs no time; what would have been waited is kept."""
    clock = [0.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(claims, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    return slept


def test_second_live_process_is_refused_by_name(
    tmp_path: Path, live_claimant: subprocess.Popen[str], sleeps: list[float]
) -> None:
    with pytest.raises(UsageError) as caught:
        claim(tmp_path)
    assert f"process {live_claimant.pid} on " in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert claims.claimed_attempts(tmp_path) == [1]


def test_claimant_is_given_a_few_seconds_to_vanish_before_the_newcomer_is_refused(
    tmp_path: Path, live_claimant: subprocess.Popen[str], sleeps: list[float]
) -> None:
    with pytest.raises(UsageError, match="Nothing was started"):
        claim(tmp_path)
    assert 3 <= sum(sleeps) <= 10


@pytest.mark.promise("a process that was just killed does not refuse the restart")
def test_claimant_that_is_killed_a_moment_before_does_not_refuse_the_restart(
    tmp_path: Path, live_claimant: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process still runs when the newcomer looks: a killed process takes its time to end."""
    waited: list[float] = []

    def dies_meanwhile(seconds: float) -> None:
        waited.append(seconds)
        live_claimant.kill()
        os.waitid(os.P_PID, live_claimant.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(claims, "time", SimpleNamespace(sleep=dies_meanwhile, monotonic=lambda: 0.0))
    assert claim(tmp_path) == 2
    assert len(waited) == 1


@pytest.mark.promise("lost claims do not reuse a number")
def test_claims_that_are_lost_give_no_number_twice(tmp_path: Path) -> None:
    assert [claim(tmp_path), claim(tmp_path)] == [1, 2]
    shutil.rmtree(tmp_path / "attempts")
    assert claim(tmp_path, known_attempt=2) == 3
    assert claim(tmp_path, known_attempt=2) == 4


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"format": "megamask-claim"}'])
def test_damaged_claim_hides_its_holder_who_is_then_superseded(
    tmp_path: Path, live_claimant: subprocess.Popen[str], damage: bytes
) -> None:
    (attempt_folder(tmp_path, 1) / "claim.json").write_bytes(damage)
    assert claim(tmp_path) == 2
    with pytest.raises(SupersededError):
        refuse_if_superseded(tmp_path, 1)


@pytest.mark.promise("a clock that jumps back changes no order, no duration and no claim")
def test_wall_clock_that_jumps_back_changes_neither_claims_nor_their_order(
    tmp_path: Path, live_claimant: subprocess.Popen[str], sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Past(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls(1999, 1, 1, tzinfo=tz)

    monkeypatch.setattr(claims, "datetime", Past)
    with pytest.raises(UsageError):
        claim(tmp_path)
    live_claimant.kill()
    live_claimant.wait()
    assert claim(tmp_path) == 2
    newer, older = read_claim(tmp_path, 2), read_claim(tmp_path, 1)
    assert newer is not None
    assert older is not None
    assert newer["time"] < older["time"]
    with pytest.raises(SupersededError):
        refuse_if_superseded(tmp_path, 1)
    refuse_if_superseded(tmp_path, 2)


@pytest.mark.promise("a process that was just killed does not refuse the restart")
def test_killed_claimant_is_followed_even_as_a_zombie(tmp_path: Path, live_claimant: subprocess.Popen[str]) -> None:
    live_claimant.kill()
    os.waitid(os.P_PID, live_claimant.pid, os.WEXITED | os.WNOWAIT)  # dead, not reaped: a zombie
    assert not is_live(tmp_path, 1)
    assert claim(tmp_path) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "another"},
        {"pid_namespace": "pid:[1]"},
        {"boot_id": "another boot"},
        {"process_start_time": 1},
        {"pid": 2**22 + 1},
        {"pid": "x"},
        {"format": "something else"},
    ],
)
def test_claimant_that_cannot_be_shown_alive_is_superseded(
    tmp_path: Path, live_claimant: subprocess.Popen[str], changes: dict[str, object]
) -> None:
    assert is_live(tmp_path, 1)
    edit_claim(tmp_path, 1, **changes)
    assert claim(tmp_path) == 2
    assert live_claimant.poll() is None


def test_older_writer_sees_that_it_is_superseded(tmp_path: Path) -> None:
    first = claim(tmp_path)
    assert not is_superseded(tmp_path, first)
    refuse_if_superseded(tmp_path, first)
    second = claim(tmp_path)
    assert is_superseded(tmp_path, first)
    assert not is_superseded(tmp_path, second)
    with pytest.raises(SupersededError, match=rf"attempt 1 .* superseded by attempt 2 \(process {os.getpid()}"):
        refuse_if_superseded(tmp_path, first)


def test_folder_without_a_claim_is_no_attempt(tmp_path: Path) -> None:
    attempt_folder(tmp_path, 1).mkdir(parents=True)
    (tmp_path / "attempts" / "notes").mkdir()
    assert claims.claimed_attempts(tmp_path) == []
    assert claim(tmp_path) == 1


def test_damaged_claim_still_counts_as_a_number(tmp_path: Path) -> None:
    attempt_folder(tmp_path, 4).mkdir(parents=True)
    (attempt_folder(tmp_path, 4) / "claim.json").write_bytes(b"{")
    assert claim(tmp_path) == 5


def test_each_number_goes_to_exactly_one_of_many(tmp_path: Path) -> None:
    numbers: list[int] = []
    threads = [threading.Thread(target=lambda: numbers.append(claim(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))


def test_claim_in_an_unwritable_place_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="read-only"):
        claim(tmp_path)


def test_death_of_a_claimant_is_known_on_its_own_host_only(
    tmp_path: Path, live_claimant: subprocess.Popen[str]
) -> None:
    assert not has_died(tmp_path, 1)
    live_claimant.kill()
    live_claimant.wait()
    assert has_died(tmp_path, 1)
    boot_id = (read_claim(tmp_path, 1) or {})["boot_id"]
    edit_claim(tmp_path, 1, boot_id="before the host was started anew")
    assert has_died(tmp_path, 1)
    edit_claim(tmp_path, 1, boot_id=boot_id, pid_namespace="of a container")
    assert not has_died(tmp_path, 1)
    edit_claim(tmp_path, 1, host="another")
    assert not has_died(tmp_path, 1)
    assert not has_died(tmp_path, 2)


def test_pod_with_the_same_name_on_another_node_is_not_known_to_have_died(
    tmp_path: Path, live_claimant: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live_claimant.kill()
    live_claimant.wait()
    edit_claim(tmp_path, 1, boot_id="of another machine", node="node-a")
    monkeypatch.setenv("NODE_NAME", "node-b")  # the pod was made anew there and kept its host name
    assert not has_died(tmp_path, 1)
    monkeypatch.setenv("NODE_NAME", "node-a")
    assert has_died(tmp_path, 1)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, ("SLURM_JOB_ID=7", "2")),
        ({"JOBSET_UID": "u", "JOBSET_RESTART_ATTEMPT": "3", "POD_UID": "p"}, ("JOBSET_UID=u", "3")),
        ({}, (None, None)),
    ],
)
def test_claim_names_the_start_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[str | None, str | None]
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "JOBSET_UID", "JOBSET_NAME", "POD_UID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEGAMASK_LAUNCH_TOKEN", "job-7.2")
    monkeypatch.setenv("NODE_NAME", "node-a")
    content = read_claim(tmp_path, claim(tmp_path)) or {}
    assert (content["scheduler_id"], content["scheduler_restart"]) == expected
    assert (content["token"], content["node"]) == ("job-7.2", "node-a")
