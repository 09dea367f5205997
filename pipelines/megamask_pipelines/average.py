"""The job of `megamask average`: the best checkpoints of a run, merged into one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamask.checkpoint.commit import load_commit
from megamask.checkpoint.integrity import verify_folder
from megamask.checkpoint.reader import candidates, find
from megamask.conversion.averaging import average, best_commits
from megamask.errors import UsageError


def average_best(
    run_dir: Path,
    target: Path,
    *,
    count: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Average the `count` checkpoints of a run with the lowest bounds.

    Returns: path, digest, tensors, bytes, checkpoints (name, step and bound of each).

    Raises:
        UsageError: the path is not a run directory, too few checkpoints have a bound, or the target exists.
        CheckpointIntegrityError: a chosen checkpoint is damaged. StorageError: the storage refused.
    """
    if count < 1:
        raise UsageError(f"--best is {count}; allowed: >= 1. Nothing was written.")
    folders = candidates(run_dir) if run_dir.is_dir() else []
    if not folders:
        find(run_dir)  # raises, with the reason
        raise UsageError(f"{run_dir} is a checkpoint; needed: a run directory. Nothing was written.")
    chosen = best_commits([load_commit(folder) for folder in folders], count)
    report = average(target, [verify_folder(commit.folder) for commit in chosen], on_progress=on_progress)
    return {
        "path": str(target),
        "digest": report.commit.digest,
        "tensors": report.tensors,
        "bytes": report.num_bytes,
        "checkpoints": [
            {"checkpoint": commit.folder.name, "step": commit.step, "nelbo_nats_per_token": commit.bound}
            for commit in chosen
        ],
    }
