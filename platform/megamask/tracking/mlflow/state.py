"""State file tracking/mlflow.json: the MLflow run, how far the journal was sent, and the lock of its sender."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megamask.errors import DataIntegrityError, UsageError
from megamask.runs.layout import mlflow_state_path
from megamask.storage.documents import DocumentKind, encode_document, read_document
from megamask.storage.durable import storage_errors, write_atomic
from megamask.tracking.journal.tail import Position
from megamask.tracking.mlflow.points import Memory
from megamask.tracking.mlflow.store import shown_page

STATE = DocumentKind(format="megamask-mlflow", version=1, is_canonical=False, damage=DataIntegrityError)
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class BusyError(Exception):
    """Another process is sending this run's journal just now."""


@dataclass(kw_only=True)
class SinkState:
    """State of the sink between processes; if the file is lost, the journal is sent again.

    Args:
        uri: the tracking server, without credentials.
        experiment_id, run_id: MLflow's names of the experiment and the run.
        position: how far the journal was sent.
        memory: what must not be sent twice.
        artifacts: names of the files already stored.
    """

    uri: str
    experiment_id: str
    run_id: str
    position: Position = field(default_factory=Position)
    memory: Memory = field(default_factory=Memory)
    artifacts: list[str] = field(default_factory=list)

    @property
    def target(self) -> tuple[str, str, str]:
        """Server, experiment and run: together they identify a run in MLflow."""
        return self.uri, self.experiment_id, self.run_id


def load_state(run_dir: Path) -> SinkState | None:
    """The stored state, or None when there is none or it cannot be read: the run is then found again by its tag."""
    try:
        content = read_document(STATE, mlflow_state_path(run_dir))
        return SinkState(
            uri=str(content["uri"]),
            experiment_id=str(content["experiment_id"]),
            run_id=str(content["run_id"]),
            position=Position(**content["position"]),
            memory=Memory(**content["memory"]),
            artifacts=[str(name) for name in content["artifacts"]],
        )
    except (DataIntegrityError, UsageError, ValueError, KeyError, TypeError):
        return None


def page_of_run(run_dir: Path) -> str | None:
    """Return where a person looks at the run in MLflow; None where nothing was sent to it yet."""
    state = load_state(run_dir)
    if state is None:
        return None
    return shown_page(state.uri, state.experiment_id, state.run_id)


def save_state(run_dir: Path, state: SinkState) -> None:
    """Replace the stored state.

    Raises:
        StorageError: the storage refused; the old state is intact.
    """
    path = mlflow_state_path(run_dir)
    with storage_errors(f"creating {path.parent}"):
        path.parent.mkdir(exist_ok=True)
    write_atomic(path, encode_document(STATE, asdict(state)))


@contextlib.contextmanager
def sending(run_dir: Path) -> Iterator[None]:
    """Hold tracking/mlflow.lock, so that a training and a `megamask sync` take turns; a dead holder holds nothing.

    Where the file system has no locks, nothing is held: both send the same, which MLflow stores once, but a
    commit may be entered twice until one of them looks again.

    Raises:
        BusyError: another process holds it.
        StorageError: the file cannot be made.
    """
    path = mlflow_state_path(run_dir).with_suffix(".lock")
    with storage_errors(f"opening {path}"):
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"another process holds {path}") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)
