"""Journal record of a commit, and the search for it."""

from __future__ import annotations

from pathlib import Path

from megamask.checkpoint.commit import Commit
from megamask.runs.layout import CHECKPOINTS
from megamask.tracking.journal.lines import tail
from megamask.tracking.records import CheckpointCommitted, read_record

_TAIL_BYTES = 1 << 20


def commit_record(commit: Commit, *, stall_s: float | None, save_s: float | None) -> CheckpointCommitted:
    """Return the journal record of a commit; seconds are None where they are not known any more."""
    evaluation = commit.evaluation
    return CheckpointCommitted(
        step=commit.step,
        checkpoint=commit.folder.name,
        location=f"{CHECKPOINTS}/{commit.folder.name}",
        digest=commit.digest,
        parent=commit.parent,
        bytes=commit.num_bytes,
        stall_s=stall_s,
        save_s=save_s,
        evaluation=None if evaluation is None else {name: float(value) for name, value in evaluation.items()},
    )


def is_announced(run_dir: Path, commit: Commit) -> bool:
    """Return whether the journal has the line of a commit, as far as its last MiB reaches back to where the save began.

    A process that is killed between COMMIT.json and its next step leaves a checkpoint without a line.
    """
    records = [record for line in tail(run_dir, _TAIL_BYTES) if (record := line.record()) is not None]
    if not records or records[0]["seq"] > int(commit.journal.get("seq", 0)):
        return True
    typed = map(read_record, records)
    return any(isinstance(record, CheckpointCommitted) and record.digest == commit.digest for record in typed)
