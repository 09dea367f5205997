"""Checks of a node before its ranks start: which findings of `megamask doctor` keep a job from starting there.

Only a fault of the node ends with 70, since a scheduler then leaves the node out, and a site may drain it. What every
node would find alike, a folder that is full or not this user's, is the storage's: 74. All else is a line in the log.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megamask.errors import ExitCode, MegamaskError, StorageError, error_with_code
from megamask.resilience.preflight.finding import Answer, Check, answers
from megamask.resilience.preflight.gpus import gpu_checks
from megamask.resilience.preflight.host import host_checks
from megamask.resilience.process_facts import node_name
from megamask.storage.durable import create_exclusive, make_folders, storage_errors

BUDGET_S = 18.0
# Less than this holds no journal and no claim; `megamask plan` has the size of a checkpoint.
MIN_FREE_BYTES = 64 << 20
_NODE_FAULTS = ("clock", "shared memory", "GPUs")
_SAME_ON_EVERY_NODE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Unfit:
    """Finding that keeps a job from starting.

    Args:
        node: as its scheduler calls it.
        code: 70 for a fault of the node, 74 for one of the storage.
        check: name of the check.
        message: what was found.
    """

    node: str
    code: int
    check: str
    message: str

    @property
    def error(self) -> MegamaskError:
        """The error to show."""
        return error_with_code(
            self.code,
            f"node {self.node} is not fit for the run: {self.check}: {self.message}. Nothing was trained.",
            hint="`megamask doctor` on the node shows every check; launch.preflight=false starts without them",
        )


def examine_node(
    run_dir: Path,
    *,
    with_gpus: bool = True,
    should_end: Callable[[], bool] = lambda: False,
    checks: Iterable[Check] | None = None,
) -> Unfit | None:
    """Run the checks of this host within BUDGET_S and return the finding that keeps a job from starting, if any.

    Args:
        run_dir: run directory; nothing is left there.
        with_gpus: also ask the GPUs that are visible here.
        should_end: no further check is begun once it returns True.
        checks: in place of the host's.
    """
    if checks is None:
        checks = host_checks(run_dir, needed_bytes=MIN_FREE_BYTES)
        checks += gpu_checks() if with_gpus else []
    found: list[Unfit] = []
    for answer in _in_time(checks, should_end):
        if answer.finding.outcome not in ("warn", "fail"):
            continue
        _log.warning("preflight: %s: %s", answer.name, answer.finding.message)
        if (code := _code(answer)) is not None:
            found.append(Unfit(node=node_name(), code=int(code), check=answer.name, message=answer.finding.message))
    # a full storage fails the write as well, and is not the node's fault
    return min(found, key=lambda unfit: unfit.code != ExitCode.STORAGE, default=None)


def write_unfit(folder: Path, unfit: Unfit) -> None:
    """Write a node's finding into the launch folder; the first node's holds, so that the others ask for one file.

    Raises:
        StorageError: the storage refuses.
    """
    path = folder / "unfit"
    with storage_errors(f"writing {path}"), contextlib.suppress(FileExistsError):
        make_folders(folder)
        create_exclusive(path, json.dumps(asdict(unfit)).encode())


def read_unfit(folder: Path) -> Unfit | None:
    """Return the finding of the first node that is not fit, or None where there is none."""
    try:
        return Unfit(**json.loads((folder / "unfit").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _in_time(checks: Iterable[Check], should_end: Callable[[], bool]) -> Iterator[Answer]:
    deadline = time.monotonic() + BUDGET_S
    for check in checks:
        left = deadline - time.monotonic()
        if should_end() or left <= 0:
            _log.warning("preflight: %s and the checks after it were left out", check.name)
            return
        yield from answers([replace(check, limit_s=min(check.limit_s, left))])


def _code(answer: Answer) -> ExitCode | None:
    """Return the code that a failed check ends the job with; None where the job may start."""
    if answer.finding.outcome != "fail" or answer.is_overdue:
        return None
    if answer.name == "free space":
        return ExitCode.STORAGE if answer.error is None else None
    if answer.name in _NODE_FAULTS:
        return ExitCode.HARDWARE if answer.error is None else None
    if answer.name == "storage" and (cause := _refusal(answer.error)) is not None:
        return ExitCode.STORAGE if cause.errno in _SAME_ON_EVERY_NODE else ExitCode.HARDWARE
    return None


def _refusal(error: Exception | None) -> OSError | None:
    cause = error.__cause__ if isinstance(error, StorageError) else error
    return cause if isinstance(cause, OSError) else None
