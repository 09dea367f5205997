"""Position of a run directory, as a new attempt must know it before it starts."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megamask.checkpoint.commit import load_commit
from megamask.checkpoint.contents import read_state
from megamask.checkpoint.names import parse_folder_name
from megamask.checkpoint.ownership import owner_of
from megamask.checkpoint.reader import candidates, has_commit
from megamask.config.identity import compare_identity
from megamask.config.schema.roots import TrainConfig
from megamask.data.manifest import open_corpus
from megamask.data.source import local_folder
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.runs.layout import checkpoints_folder, record_path
from megamask.runs.record import RunRecord, read_run
from megamask.runs.status import read_status
from megamask.storage.durable import storage_errors
from megamask.tracking.journal.lines import journal_files


def last_attempt_of(run_dir: Path) -> int:
    """Return the highest attempt that left a journal file or a checkpoint folder, 0 for none; claims may be lost."""
    folder = checkpoints_folder(run_dir)
    with storage_errors(f"listing {run_dir}"):
        places = [parse_folder_name(path.name) for path in folder.iterdir()] if folder.is_dir() else []
        journalled = [file.attempt for file in journal_files(run_dir)]
    return max([*journalled, *(place[1] for place in places if place is not None)], default=0)


def is_complete(run_dir: Path, config: TrainConfig) -> bool:
    """Return whether this very run has already done all its steps, so that there is nothing to start.

    Raises:
        UsageError: the folder holds a run of another identity.
    """
    if not record_path(run_dir).exists():
        return False
    record, status = read_run(run_dir), read_status(run_dir)
    compare_identity(dict(record.content["identity"]), config, where=str(record.path))
    if status is None or status.phase != "done" or status.step != config.training.steps:
        return False
    corpora = {
        name: open_corpus(local_folder(folder, config.data), f"data.corpora.{name}").corpus_id
        for name, folder in config.data.corpora.items()
    }
    return corpora == record.content["corpora"] and any(has_commit(folder) for folder in candidates(run_dir))


def recorded_schedule(record: RunRecord) -> tuple[int, int]:
    """Return training.steps as last recorded, and the steps taken under it: of the newest checkpoint, else of run.json.

    Only for refusing what is impossible before anything starts; a checkpoint that cannot be read is skipped here
    and dealt with when it is loaded.

    Raises:
        UsageError: the newest readable checkpoint belongs to another run.
        CheckpointIntegrityError: run.json was changed since that checkpoint was written.
    """
    for folder in candidates(record.path.parent):
        commit, state = None, None
        with contextlib.suppress(CheckpointIntegrityError, UsageError):
            commit = load_commit(folder)
            state = read_state(folder)
        if commit is not None:
            owner_of(record).refuse_foreign(commit)
        if state is not None:
            return int(state.schedule.get("training_steps", record.recorded_steps)), state.step
    return record.recorded_steps, 0
