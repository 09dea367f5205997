"""Files of a node's running ranks, in a folder for temporary files: heartbeat, stacks, stderr and the error to show."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megamask.errors import MegamaskError, StorageError, error_with_code
from megamask.resilience.heartbeat import VARIABLE as HEARTBEAT_VARIABLE
from megamask.resilience.heartbeat import Mark, make_file, read_mark
from megamask.resilience.stacks import VARIABLE as STACKS_VARIABLE

REPORT_VARIABLE = "MEGAMASK_RANK_REPORT"
_TAIL_BYTES = 8192


@dataclass(frozen=True)
class RankFolder:
    """The folder of one start of a node's ranks."""

    path: Path

    def prepare(self, rank: int) -> dict[str, str]:
        """Make the files of a rank that is about to start, and return the variables that name them."""
        make_file(self._heartbeat(rank))
        return {
            REPORT_VARIABLE: str(self._report(rank)),
            HEARTBEAT_VARIABLE: str(self._heartbeat(rank)),
            STACKS_VARIABLE: str(self.stacks(rank)),
        }

    def stacks(self, rank: int) -> Path:
        """Return where a rank writes its stacks when it is asked to."""
        return self.path / f"stacks-{rank}"

    def stderr(self, rank: int) -> Path:
        """Return where a rank's stderr is kept."""
        return self.path / f"stderr-{rank}"

    def mark(self, rank: int) -> Mark | None:
        """Return a rank's progress mark."""
        return read_mark(self._heartbeat(rank))

    def closed_step(self, rank: int) -> int | None:
        """Return the completed updates of a rank that closes its attempt; None for one that is not that far."""
        mark = self.mark(rank)
        return mark.step if mark is not None and mark.section == "close" else None

    def stderr_tail(self, rank: int) -> str:
        """Return the end of a rank's stderr."""
        return self.stderr(rank).read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()

    def report(self, rank: int) -> MegamaskError | None:
        """Return the error that a rank left, or None."""
        try:
            stored = json.loads(self._report(rank).read_text(encoding="utf-8"))
            return error_with_code(stored["exit_code"], stored["message"], hint=stored["hint"])
        except (FileNotFoundError, ValueError):  # none was left, or the rank died while writing it
            return None

    def _report(self, rank: int) -> Path:
        return self.path / f"report-{rank}.json"

    def _heartbeat(self, rank: int) -> Path:
        return self.path / f"heartbeat-{rank}"


def leave_report(error: MegamaskError) -> bool:
    """Leave an error for the process that started this rank, which prints it once for all ranks.

    Returns: False when no launcher asked for a report, or it could not be written; the caller prints the error itself.
    """
    path = os.environ.get(REPORT_VARIABLE)
    if path is None:
        return False
    report = {"message": error.message, "hint": error.hint, "exit_code": int(error.exit_code)}
    try:
        Path(path).write_text(json.dumps(report), encoding="utf-8")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def rank_folder() -> Iterator[RankFolder]:
    """Yield a new folder; it is removed with its content.

    Raises:
        StorageError: no folder for temporary files can be written.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="megamask-ranks-", ignore_cleanup_errors=True)
    except FileNotFoundError as error:  # tempfile's: not one of its places can be written
        raise StorageError(
            "no folder for temporary files can be written: neither $TMPDIR nor /tmp, /var/tmp, /usr/tmp, nor the "
            "working folder. Nothing was started.",
            hint="set TMPDIR to a folder that this user may write; in a pod with a read-only root, mount an emptyDir "
            "at /tmp",
        ) from error
    with folder as name:
        yield RankFolder(Path(name))
