"""The right to write to a run: it belongs to the newest attempt that claimed it.

A claim is a file created exclusively, so of many processes exactly one gets each number. The newer claim wins over
every older one that is not known to be alive; a superseded attempt stops with 93 and writes nothing more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megamask.errors import CheckpointIntegrityError, SupersededError, UsageError
from megamask.resilience.process_facts import ProcessFacts, node_name, own_facts
from megamask.runs.layout import attempts_folder, claim_path
from megamask.storage.documents import DocumentKind, encode_document, read_document
from megamask.storage.durable import create_exclusive, make_folders, storage_errors

_KIND = DocumentKind(
    format="megamask-claim", version=1, is_canonical=False, damage=CheckpointIntegrityError, max_bytes=1 << 20
)
# A killed process may need this long to vanish, with its memory or while a device holds it; then its run is free.
_VANISH_S = 5.0
_POLL_S = 0.1
_SCHEDULER_VARIABLES = ("SLURM_JOB_ID", "JOBSET_UID", "JOBSET_NAME", "POD_UID")
_RESTART_VARIABLES = ("SLURM_RESTART_COUNT", "JOBSET_RESTART_ATTEMPT")
TOKEN_VARIABLE = "MEGAMASK_LAUNCH_TOKEN"
"""Names one start of a job, the same on every node; megamask.launch.verdict keeps its verdict under that name."""


def claimed_attempts(run_dir: Path, *, after: int = 0) -> list[int]:
    """Return the numbers of all attempts later than `after` that claimed the run, ascending; reads the folder anew."""
    try:
        names = os.listdir(attempts_folder(run_dir))  # noqa: PTH208  opening the folder makes an NFS client look again
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbers = sorted(int(name) for name in names if name.isdecimal() and int(name) > after)
    return [number for number in numbers if claim_path(run_dir, number).exists()]


def claim(run_dir: Path, *, known_attempt: int = 0, redact: Callable[[str], str] = str) -> int:
    """Claim a run for the calling process.

    Args:
        known_attempt: the highest attempt that left anything in the run directory; where claims were lost, no number
            is given twice.
        redact: hides credentials in what the claim records of the environment.

    Returns:
        The number of the new attempt: highest so far + 1, from 1.

    Raises:
        UsageError: the newest claim belongs to another process that runs on this host; nothing was written.
        StorageError: the storage refused.
    """
    own = own_facts()
    while True:
        newest = max(claimed_attempts(run_dir), default=0)
        _refuse_if_live(run_dir, newest, own)
        number = max(newest, known_attempt) + 1
        path = claim_path(run_dir, number)
        content = {
            "attempt": number,
            **asdict(own),
            "scheduler_id": redact(scheduler) if (scheduler := _scheduler_id()) else None,
            "scheduler_restart": next(filter(None, map(os.environ.get, _RESTART_VARIABLES)), None),
            "node": node_name(),
            "token": redact(token) if (token := os.environ.get(TOKEN_VARIABLE)) else None,
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        }
        with storage_errors(f"claiming {run_dir}"):
            make_folders(path.parent)
        try:
            create_exclusive(path, encode_document(_KIND, content))
        except FileExistsError:
            continue  # another process was faster: check whether it is alive
        return number


def read_claim(run_dir: Path, attempt: int) -> dict[str, Any] | None:
    """Return the content of a claim, or None if it is missing or damaged."""
    try:
        return read_document(_KIND, claim_path(run_dir, attempt))
    except (CheckpointIntegrityError, UsageError):
        return None


def is_live(run_dir: Path, attempt: int) -> bool:
    """Return whether the process that holds a claim is known to run on this host, in this pid namespace."""
    facts = _claimant(run_dir, attempt)
    return facts is not None and facts.is_running_here()


def has_died(run_dir: Path, attempt: int) -> bool:
    """Return whether the process that held a claim is known to have ended; False for one on another node.

    A pod keeps its host name when it is made anew on another node, so the scheduler's name of the node counts as well.
    """
    facts, here = _claimant(run_dir, attempt), own_facts()
    node = (read_claim(run_dir, attempt) or {}).get("node", node_name())  # older claims name the host alone
    if facts is None or facts.host != here.host or node != node_name():
        return False
    if facts.boot_id != here.boot_id:  # the host was started anew
        return facts.boot_id is not None and here.boot_id is not None
    return facts.pid_namespace == here.pid_namespace and not facts.is_running_here()


def is_superseded(run_dir: Path, attempt: int) -> bool:
    """Return whether a newer attempt has claimed the run; costs one folder listing."""
    return bool(claimed_attempts(run_dir, after=attempt))


def refuse_if_superseded(run_dir: Path, attempt: int) -> None:
    """Raise if a newer attempt has claimed the run; every writer calls this before it makes anything visible.

    Raises:
        SupersededError: names the newer attempt; the caller writes nothing more.
    """
    newest = max(claimed_attempts(run_dir), default=0)
    if newest > attempt:
        claimant = _claimant(run_dir, newest)
        where = f" (process {claimant.pid} on {claimant.host})" if claimant else ""
        raise SupersededError(
            f"attempt {attempt} of {run_dir} is superseded by attempt {newest}{where}. This attempt stops and writes "
            "nothing more."
        )


def _refuse_if_live(run_dir: Path, newest: int, own: ProcessFacts) -> None:
    """Refuse if the newest claimant is alive and stays alive for a while: a process that was just killed vanishes."""
    claimant = _claimant(run_dir, newest) if newest else None
    if claimant is None or claimant == own:
        return
    deadline = time.monotonic() + _VANISH_S
    while claimant.is_running_here():
        if time.monotonic() < deadline:
            time.sleep(_POLL_S)
            continue
        raise UsageError(
            f"the run {run_dir} belongs to process {claimant.pid} on {claimant.host} (attempt {newest}), which is "
            "running. Nothing was started.",
            hint=f"wait for it, stop it with `kill {claimant.pid}`, or choose another run.name",
        )


def _claimant(run_dir: Path, attempt: int) -> ProcessFacts | None:
    content = read_claim(run_dir, attempt)
    names = [field.name for field in fields(ProcessFacts)]
    if content is None or not all(name in content for name in names) or not isinstance(content["pid"], int):
        return None
    return ProcessFacts(**{name: content[name] for name in names})


def _scheduler_id() -> str | None:
    for name in _SCHEDULER_VARIABLES:
        if value := os.environ.get(name):
            return f"{name}={value}"
    return None
