"""The journal line of a commit, and whether the journal has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamask.checkpoint.commit import Commit
from megamask.runs.layout import CHECKPOINTS
from megamask.tracking.journal.lines import tail

_TAIL_BYTES = 1 << 20


def commit_record(commit: Commit, *, stall_s: float | None, save_s: float | None) -> dict[str, Any]:
    """The fields of a `checkpoint_committed` line; seconds are None where they are not known any more."""
    return {
        "step": commit.step,
        "checkpoint": commit.folder.name,
        "location": f"{CHECKPOINTS}/{commit.folder.name}",
        "digest": commit.digest,
        "parent": commit.parent,
        "bytes": commit.num_bytes,
        "stall_s": stall_s,
        "save_s": save_s,
        "evaluation": None
        if commit.evaluation is None
        else {name: float(value) for name, value in commit.evaluation.items()},
    }


def is_announced(run_dir: Path, commit: Commit) -> bool:
    """Return whether the journal has the line of a commit, as far as its last MiB reaches back to where the save began.

    A process that is killed between COMMIT.json and its next step leaves a checkpoint without a line.
    """
    records = [record for line in tail(run_dir, _TAIL_BYTES) if (record := line.record()) is not None]
    if not records or records[0]["seq"] > int(commit.journal.get("seq", 0)):
        return True
    return any(record.get("digest") == commit.digest and record["kind"] == "checkpoint_committed" for record in records)
