"""A rank that waits for its peers can be stopped, at every place where it waits, and its exit code is true."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.command import checkpoints, command, environment, journal, start, tiny

pytestmark = pytest.mark.multiprocess


def rank(arguments: list[str], number: int, *, address: str, port: int, size: int = 2) -> subprocess.Popen[str]:
    """Starts one rank as a launcher of the user's own would."""
    place = {"RANK": number, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": port}
    return subprocess.Popen(
        command("train", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **{name: str(value) for name, value in place.items()}},
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def mute_server() -> Iterator[tuple[socket.socket, int]]:
    """A listener that takes connections and never answers: torch waits for its greeting inside C++."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield listener, listener.getsockname()[1]


def wait_for(what: str, is_there: object, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_there():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def end_of(process: subprocess.Popen[str], seconds: float) -> str:
    """stderr of a process that must end by itself in that time."""
    try:
        _, stderr = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return stderr


@pytest.mark.promise("a MASTER_ADDR that does not resolve is reported at once (2)")
def test_name_that_does_not_resolve_is_reported_at_once(small_corpus: Path, tmp_path: Path) -> None:
    process = rank(tiny(small_corpus, tmp_path, "run"), 0, address="no.such.host.invalid", port=free_port(), size=1)
    stderr = end_of(process, 60)
    assert process.returncode == 2, stderr
    assert "MASTER_ADDR is 'no.such.host.invalid', which this node cannot resolve" in stderr
    assert "bug" not in stderr


@pytest.mark.promise("a rank that waits for its peers ends on SIGTERM (75) and SIGINT (93)")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 93)])
def test_rank_whose_master_never_answers_ends_on_a_signal(
    small_corpus: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    arguments = tiny(small_corpus, tmp_path, "run", "layout.data_parallel_size=2")
    with mute_server() as (listener, port):
        process = rank(arguments, 1, address="127.0.0.1", port=port)
        listener.settimeout(120)
        kept = [listener.accept()[0], listener.accept()[0]]  # the look whether it is there, and torch's own
        time.sleep(1)
        process.send_signal(number)
        stderr = end_of(process, 20)
        [connection.close() for connection in kept]
    assert process.returncode == code, stderr
    assert "asked for an end before training began (rendezvous); nothing was lost" in stderr


@pytest.mark.promise("a rank that waits for its peers ends on SIGTERM (75) and SIGINT (93)")
def test_rank_0_that_waits_for_the_others_ends_on_a_signal_and_records_it(small_corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = tiny(small_corpus, tmp_path, "run", "layout.data_parallel_size=2")
    process = rank(arguments, 0, address="127.0.0.1", port=free_port())
    wait_for("the claim", (run_dir / "status.json").is_file)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    stderr = end_of(process, 30)
    assert process.returncode == 75, stderr
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["phase"], status["exit_code"]) == ("preempted", 75)


@pytest.mark.promise("a wait for other ranks ends after launch.collective_timeout_s with 71")
def test_others_that_never_come_end_the_wait_with_71(small_corpus: Path, tmp_path: Path) -> None:
    arguments = tiny(small_corpus, tmp_path, "run", "layout.data_parallel_size=2", "launch.collective_timeout_s=2")
    process = rank(arguments, 0, address="127.0.0.1", port=free_port())
    stderr = end_of(process, 60)
    assert process.returncode == 71, stderr
    assert "did not join the job in time (launch.collective_timeout_s)" in stderr


@pytest.mark.promise("a refusal by rank 0 reaches every rank, under any launcher")
def test_refusal_of_rank_0_is_readable_by_every_rank(small_corpus: Path, tmp_path: Path) -> None:
    first = tiny(small_corpus, tmp_path, "run", "training.stop_after_step=1")
    assert subprocess.run(command("train", *first), env=environment(), capture_output=True).returncode == 0
    other = tiny(small_corpus, tmp_path, "run", "layout.data_parallel_size=2", "run.seed=2")
    port = free_port()
    processes = [rank(other, number, address="127.0.0.1", port=port) for number in (1, 0)]
    errors = [end_of(process, 90) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert "rank 0: " in errors[0]
    assert all("run.seed" in stderr for stderr in errors)


@pytest.mark.promise("a taken MASTER_PORT is named (2)")
def test_taken_port_of_a_foreign_launcher_is_named(small_corpus: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        process = rank(tiny(small_corpus, tmp_path, "run"), 0, address="127.0.0.1", port=port, size=1)
        stderr = end_of(process, 60)
    assert process.returncode == 2, stderr
    assert f"MASTER_PORT is {port}, and this node cannot serve on it: Address already in use" in stderr


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of a local launcher's ranks, by rank."""
    pids = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    found = {}
    for pid in pids:
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except ProcessLookupError:  # it is just ending
            continue
        found |= {int(entry[5:]): pid for entry in variables if entry.startswith(b"RANK=")}
    return found


@pytest.mark.promise("a hung collective call ends within launch.stop_grace_s after a signal, with 71")
@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_hung_collective_ends_on_sigterm_within_the_grace_period(
    small_corpus: Path, tmp_path: Path, stopped: int
) -> None:
    """One rank is stopped, so that the other waits for it in a collective call; the launcher gets SIGTERM."""
    run_dir = tmp_path / "run"
    overrides = ["training.steps=1000000", "checkpoint.every_steps=5", "launch.stop_grace_s=2"]
    arguments = tiny(small_corpus, tmp_path, "run", "layout.data_parallel_size=2", *overrides)
    launcher = start("train", *arguments, "--json")
    try:
        wait_for("a commit", lambda: run_dir.is_dir() and checkpoints(run_dir))
        os.kill(ranks_of(launcher)[stopped], signal.SIGSTOP)
        time.sleep(1)
        launcher.send_signal(signal.SIGTERM)
        stdout, stderr = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == 71, stderr
    assert json.loads(stdout.splitlines()[-1])["exit_code"] == 71
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["phase"], status["exit_code"]) == ("failed", 71)
    assert "bug in megamask" not in stderr


@pytest.mark.promise("a wait for other ranks ends after launch.collective_timeout_s with 71")
def test_collective_that_nobody_answers_ends_with_71_after_the_timeout(small_corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = ["training.steps=1000000", "checkpoint.every_steps=5", "launch.collective_timeout_s=3"]
    arguments = tiny(small_corpus, tmp_path, "run", "layout.data_parallel_size=2", *overrides)
    launcher = start("train", *arguments, "--json")
    try:
        wait_for("a commit", lambda: run_dir.is_dir() and checkpoints(run_dir))
        stopped = ranks_of(launcher)[1]
        os.kill(stopped, signal.SIGSTOP)
        wait_for("the end of rank 0", lambda: 0 not in ranks_of(launcher), 60)
        os.kill(stopped, signal.SIGCONT)
        _, stderr = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == 71, stderr
    assert "launch.collective_timeout_s" in stderr
    ends = [line for line in journal(run_dir) if line["kind"] == "attempt_ended"]
    assert [line["exit_code"] for line in ends] == [71]
