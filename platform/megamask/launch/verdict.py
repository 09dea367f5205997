"""The verdict on one start of a job: one line that every node, and a batch script, can read.

`<run directory>.launch/<token>/` is known to every node before a run has an attempt number. It holds

    meeting    where rank 0 is met: "ADDRESS PORT", written by node 0
    node-K     exit codes of node K's ranks, as JSON
    unfit      what the first node that is not fit found, as JSON; its ranks are not started
    hang-K     where node K's ranks were when the job hung, as JSON; only after a hang
    verdict    "CODE STEP ATTEMPT NODE", written by node 0; step -1 and attempt 0 where they are not known

The token names one start: the scheduler's job and its count of restarts. Beside the folders of all starts lies

    history    a line "TOKEN CODE STEP" for each verdict, oldest first
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megamask.launch.job import FREE_CODES, STOP_CODES
from megamask.resilience.exit_codes import combine
from megamask.storage.durable import make_folders, storage_errors, write_atomic

_POLL_S = 0.05
_VERDICT, _MEETING, _HISTORY = "verdict", "meeting", "history"
_NO_FAILURES = (0, *STOP_CODES, *FREE_CODES)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """End of one start of a job.

    Args:
        code: exit code of the job; every node leaves with it.
        step: completed updates, or -1.
        attempt: number of the attempt, or 0 when the run was not claimed.
        node: the node to exclude after a hardware code, else node 0.
    """

    code: int
    step: int = -1
    attempt: int = 0
    node: str = "-"

    @property
    def line(self) -> str:
        """The verdict as bash's `read` takes it apart."""
        return f"{self.code} {self.step} {self.attempt} {self.node}\n"


def launch_folder(run_dir: Path, token: str) -> Path:
    """Return the folder of one start of a job; it lies beside the run directory."""
    return run_dir.with_name(run_dir.name + ".launch") / token


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """Write the verdict.

    Raises:
        StorageError: the storage refuses.
    """
    _write(folder / _VERDICT, verdict.line)


def read_verdict(folder: Path) -> Verdict | None:
    """Return the verdict, or None where there is none yet."""
    words = _words(folder / _VERDICT)
    try:
        code, step, attempt, node = words
        return Verdict(code=int(code), step=int(step), attempt=int(attempt), node=node)
    except ValueError:
        return None


def write_meeting(folder: Path, address: str, port: int) -> None:
    """Write where rank 0 is met.

    Raises:
        StorageError: the storage refuses.
    """
    _write(folder / _MEETING, f"{address} {port}\n")


def read_meeting(folder: Path) -> tuple[str, int] | None:
    """Return address and port of rank 0, or None where node 0 has not written them yet."""
    words = _words(folder / _MEETING)
    return (words[0], int(words[1])) if len(words) == 2 and words[1].isdecimal() else None


def write_codes(folder: Path, node: int, codes: list[int]) -> None:
    """Write the exit codes of a node's ranks.

    Raises:
        StorageError: the storage refuses.
    """
    _write(folder / f"node-{node}", json.dumps(codes))


def read_codes(folder: Path, node: int) -> list[int] | None:
    """Return the exit codes of a node's ranks, or None where the node has not written them yet."""
    try:
        return [int(code) for code in json.loads((folder / f"node-{node}").read_bytes())]
    except (OSError, ValueError, TypeError):
        return None


def append_history(folder: Path, verdict: Verdict) -> None:
    """Append the verdict to the history of the run's starts; `folder` is that of this start.

    Raises:
        StorageError: the storage refuses.
    """
    path = folder.parent / _HISTORY
    with storage_errors(f"writing {path}"), path.open("a", encoding="utf-8") as file:
        file.write(f"{folder.name} {verdict.code} {verdict.step}\n")


def is_without_progress(folder: Path, verdict: Verdict, attempts: int) -> bool:
    """Return whether this verdict and the ones before it make `attempts` failures in a row that ended at one step.

    Failures are all codes after which a job is started again but 75: a preemption is no fault of the run.
    """
    try:
        lines = (folder.parent / _HISTORY).read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    ends = [(int(code), int(step)) for _, code, step in (line.split() for line in lines if len(line.split()) == 3)]
    ends = [*ends, (verdict.code, verdict.step)][-attempts:]
    return len(ends) == attempts and all(code not in _NO_FAILURES and step == verdict.step for code, step in ends)


def job_code(own: int, others: list[list[int] | None], recorded: list[int]) -> int:
    """Return the exit code of the job.

    Args:
        own: code of node 0.
        others: exit codes of the other nodes' ranks; None for a node that left none in time.
        recorded: exit codes in the failure records of the attempt. A rank that loses its peers, or that its node
            killed, is less specific than these.
    """
    codes = [own, *recorded, *(combine(codes) for codes in others if codes is not None)]
    if any(codes is None for codes in others) and combine(codes) in (0, 75):
        codes.append(1)  # a node without an answer died: what the others agreed on may not hold for it
    return combine(codes)


def wait_until(is_done: Callable[[], bool], seconds: float) -> bool:
    """Wait until a file of the folder is there; returns whether it came in time."""
    deadline = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _write(path: Path, text: str) -> None:
    with storage_errors(f"writing {path}"):
        make_folders(path.parent)
    write_atomic(path, text.encode())


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []
