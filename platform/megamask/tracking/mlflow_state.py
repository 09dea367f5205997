"""tracking/mlflow.json: which MLflow run a run is, and how far its journal was sent."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megamask.storage.durable import write_atomic
from megamask.tracking.journal_tail import Position
from megamask.tracking.mlflow_points import Memory

FORMAT = "megamask-mlflow"
VERSION = 1


@dataclass(kw_only=True)
class SinkState:
    """What the sink remembers between processes; the file may be lost, then the journal is sent again.

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


def state_path(run_dir: Path) -> Path:
    """Where the state of a run's MLflow sink stands."""
    return run_dir / "tracking" / "mlflow.json"


def load_state(run_dir: Path) -> SinkState | None:
    """The stored state, or None when there is none or it cannot be read: the run is then found again by its tag."""
    try:
        content = json.loads(state_path(run_dir).read_bytes())
        if content["format"] != FORMAT or content["version"] != VERSION:
            return None
        return SinkState(
            uri=str(content["uri"]),
            experiment_id=str(content["experiment_id"]),
            run_id=str(content["run_id"]),
            position=Position(**content["position"]),
            memory=Memory(**content["memory"]),
            artifacts=[str(name) for name in content["artifacts"]],
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def save_state(run_dir: Path, state: SinkState) -> None:
    """Replaces the stored state.

    Raises:
        StorageError: the storage refused; the old state is intact.
    """
    path = state_path(run_dir)
    path.parent.mkdir(exist_ok=True)
    content = {"format": FORMAT, "version": VERSION, **asdict(state)}
    write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")
