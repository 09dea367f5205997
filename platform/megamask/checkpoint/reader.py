"""Checkpoint that a path names: the commits of a run, newest first, and the newest one that verifies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.integrity import verify_folder
from megamask.checkpoint.names import COMMIT_NAME, parse_folder_name
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.runs.layout import checkpoints_folder, record_path
from megamask.storage.durable import storage_errors


def candidates(run_dir: Path) -> list[Path]:
    """The folders of a run that are visible (have a COMMIT.json), newest first by step, then by attempt."""
    folder = checkpoints_folder(run_dir)
    with storage_errors(f"listing {folder}"):
        if not folder.is_dir():
            return []
        found = [(place, path) for path in folder.iterdir() if (place := parse_folder_name(path.name)) is not None]
        visible = [(place, path) for place, path in found if _is_own_folder(path) and has_commit(path)]
    return [path for _, path in sorted(visible, reverse=True)]


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()  # a link may lead outside the run; give such a folder by its path


def has_commit(folder: Path) -> bool:
    """Return whether a folder has a COMMIT.json of any kind; a dangling link counts, so that it is refused."""
    path = folder / COMMIT_NAME
    return path.is_symlink() or path.exists()


def incident(folder: Path, error: CheckpointIntegrityError) -> dict[str, Any]:
    """Return the incident of a checkpoint that was skipped, for the journal."""
    return {"incident": "checkpoint_damaged", "checkpoint": folder.name, "problem": error.message}


def none_left(run_dir: Path, incidents: list[dict[str, Any]]) -> CheckpointIntegrityError:
    """The error for a run whose checkpoints exist and are all damaged."""
    return CheckpointIntegrityError(
        f"{run_dir} has {len(incidents)} checkpoint(s) and none verifies; the newest: {incidents[0]['problem']} "
        "Nothing was overwritten.",
        hint="restore a checkpoint folder from a copy; to start over, choose another run.name",
    )


def find(path: Path) -> tuple[Commit, list[dict[str, Any]]]:
    """The verified checkpoint that a run directory or a checkpoint folder means, and the newer ones passed over.

    A checkpoint folder is enough by itself, wherever it was copied to.

    Raises:
        UsageError: the path is neither, or the run has no commit yet.
        CheckpointIntegrityError: the folder that was named, or every checkpoint of the run, is damaged.
    """
    if not path.is_dir():
        raise UsageError(
            f"{path} is not a folder; given should be a run directory or a checkpoint folder. Nothing was loaded.",
            hint="a run directory is <run.output_dir>/<run.name>, a checkpoint folder is checkpoints/step-... in it",
        )
    if has_commit(path):
        return verify_folder(path), []
    found = candidates(path)
    if not found:
        raise UsageError(_explain(path), hint="give a run directory with a committed checkpoint, or such a folder")
    incidents: list[dict[str, Any]] = []
    for folder in found:
        try:
            return verify_folder(folder), incidents
        except CheckpointIntegrityError as error:
            incidents.append(incident(folder, error))
    raise none_left(path, incidents)


def _explain(path: Path) -> str:
    if parse_folder_name(path.name) is not None:
        return f"{path} has no COMMIT.json: its save did not finish, so it is not a checkpoint. Nothing was loaded."
    if checkpoints_folder(path).is_dir() or record_path(path).exists():
        return f"{path} has no committed checkpoint yet. Nothing was loaded."
    return f"{path} is neither a run directory nor a checkpoint folder. Nothing was loaded."


def resolve(path: Path) -> Path:
    """The checkpoint folder that a run directory or a checkpoint folder means; verified. Raises as `find`."""
    return find(path)[0].folder


def verify_checkpoint(path: Path, check_state: Callable[[Commit], None]) -> dict[str, Any]:
    """Read every byte of a checkpoint; a run directory means its newest one, without falling back.

    Args:
        check_state: called last; raises if the files, although as committed, are not a state that can be loaded.

    Returns: path, step, digest, files (count), bytes, ok (True).
    Raises: as `find` and `check_state`; CheckpointIntegrityError names the damaged file.
    """
    newest = [] if not path.is_dir() or has_commit(path) else candidates(path)
    commit = verify_folder(newest[0]) if newest else find(path)[0]
    check_state(commit)
    return {
        "path": str(commit.folder),
        "step": commit.step,
        "digest": commit.digest,
        "files": len(commit.files),
        "bytes": commit.num_bytes,
        "ok": True,
    }
