"""Removal of checkpoints: COMMIT.json first, so that nothing half-deleted is ever visible."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from megamask.checkpoint.commit import load_commit
from megamask.checkpoint.names import (
    COMMIT_NAME,
    DAMAGED_SUFFIX,
    PIN_SUFFIX,
    TRASH_PREFIX,
    parse_folder_name,
)
from megamask.checkpoint.policy import Candidate, retained
from megamask.checkpoint.reader import candidates, has_commit
from megamask.errors import CheckpointIntegrityError, StorageError, UsageError
from megamask.runs.layout import checkpoints_folder
from megamask.storage.durable import fsync_directory, storage_errors, write_atomic
from megamask.storage.fault_points import reached


def prune(
    run_dir: Path,
    keep_last: int,
    *,
    run_id: str,
    keep_every_steps: int | None = None,
    keep_best: int = 0,
    spared: Collection[str] = (),
    gate: Callable[[], None] = lambda: None,
    on_refusal: Callable[[Path, StorageError], None] | None = None,
) -> list[str]:
    """Remove the checkpoints of a run that `policy.retained` does not keep, oldest first. Called by one rank.

    A checkpoint that is marked as damaged, or whose COMMIT.json or file sizes are wrong, is not good. A pin is a file
    beside the checkpoint's folder, named after it. What another run has committed is neither counted nor removed.

    Args:
        run_id: of the run itself.
        spared: names of folders to keep this time, regardless of the policy.
        gate: called before each removal; what it raises ends the pruning.
        on_refusal: called with each folder that cannot be removed and the reason; the others are still removed. Without
            it the first one ends the pruning.

    Returns: the names of the removed folders.
    Raises: StorageError: the storage does not let a checkpoint be looked at, and nothing was removed; or as above.
    """
    if keep_last < 1:
        raise UsageError(f"checkpoint.keep_last is {keep_last}; allowed: >= 1. Nothing was removed.")
    looked_at = {
        folder: _candidate(folder, run_id, is_known_damaged=is_marked_damaged(folder)) for folder in candidates(run_dir)
    }
    own = {folder: candidate for folder, candidate in looked_at.items() if candidate is not None}
    kept = retained(list(own.values()), keep_last=keep_last, keep_every_steps=keep_every_steps, keep_best=keep_best)
    removed = []
    for folder in reversed(own):
        if folder.name in kept or folder.name in spared or is_pinned(folder):  # it may have been pinned a moment ago
            continue
        gate()
        try:
            remove_committed(folder)
        except StorageError as error:
            if on_refusal is None:
                raise
            on_refusal(folder, error)
        else:
            removed.append(folder.name)
    return removed


def is_pinned(folder: Path) -> bool:
    """Return whether a user pinned a checkpoint."""
    return os.path.lexists(folder.with_name(f"{folder.name}{PIN_SUFFIX}"))


def mark_damaged(folder: Path) -> None:
    """Remembers, beside a checkpoint, that it did not verify: a later attempt's quick look would take it for good.

    Raises: StorageError: the storage refused.
    """
    if not is_marked_damaged(folder):
        write_atomic(_damage_mark(folder), b"")


def unmark_damaged(folder: Path) -> None:
    """Forget the mark of a checkpoint that has verified since; it was restored from a copy.

    Raises: StorageError: the storage refused.
    """
    if is_marked_damaged(folder):
        with storage_errors(f"removing {_damage_mark(folder)}"):
            _damage_mark(folder).unlink(missing_ok=True)


def is_marked_damaged(folder: Path) -> bool:
    """Return whether a checkpoint did not verify when an attempt wanted to load it."""
    return os.path.lexists(_damage_mark(folder))


def _damage_mark(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{DAMAGED_SUFFIX}")


def _candidate(folder: Path, run_id: str, *, is_known_damaged: bool) -> Candidate | None:
    """A quick look: COMMIT.json is sound and each file has its size; contents are verified on load.

    Returns: None for a checkpoint of another run.
    """
    step, attempt = parse_folder_name(folder.name) or (0, 0)
    bound, bound_from_step, is_good = None, 1, False
    missing = (FileNotFoundError, NotADirectoryError)
    with storage_errors(f"looking at {folder}"), contextlib.suppress(CheckpointIntegrityError, *missing):
        try:
            commit = load_commit(folder)
        except UsageError:  # a newer megamask's checkpoint is not ours to judge
            is_good = True
        else:
            if commit.run_id != run_id:
                return None
            bound, bound_from_step = commit.bound, commit.bound_from_step
            is_good = all((folder / name).stat().st_size == entry.num_bytes for name, entry in commit.files.items())
    return Candidate(
        name=folder.name,
        step=step,
        attempt=attempt,
        is_good=is_good and not is_known_damaged,
        is_pinned=is_pinned(folder),
        bound=bound,
        bound_from_step=bound_from_step,
    )


def remove_committed(folder: Path) -> None:
    """Make a checkpoint invisible, durably, and only then frees its space."""
    with storage_errors(f"removing {folder}"):
        (folder / COMMIT_NAME).unlink(missing_ok=True)
        reached("prune.commit_removed")
        fsync_directory(folder)
        reached("prune.invisible")
        shutil.rmtree(folder, ignore_errors=True)  # invisible now: files still held open are swept by a later attempt
        reached("prune.content_removed")
        unmark_damaged(folder)
        fsync_directory(folder.parent)
        reached("prune.removed")


def sweep(run_dir: Path, attempt: int) -> list[str]:
    """Remove what older attempts left without a COMMIT.json: saves and removals that did not finish.

    Called by the newest claimed attempt, on one rank, before it saves. A folder of this attempt or a newer one is never
    touched. A folder is renamed away before its content goes: a writer of an older attempt that is still alive then
    finds no folder to commit into, and if it committed just before the rename, the folder is put back.

    Returns: the names of the removed folders.
    Raises: StorageError: the storage refused.
    """
    root = checkpoints_folder(run_dir)
    swept = []
    with storage_errors(f"sweeping {root}"):
        if not root.is_dir():
            return []
        for folder in sorted(root.iterdir()):
            original = _original_name(folder.name)
            place = parse_folder_name(original)
            if place is None or place[1] >= attempt or folder.is_symlink() or not folder.is_dir():
                continue
            if original == folder.name and has_commit(folder):
                continue
            if _remove_uncommitted(folder, root / original):
                swept.append(original)
        _remove_lost_marks(root, attempt)
        if swept:
            fsync_directory(root)
            reached("sweep.flushed")
    return swept


def _remove_lost_marks(root: Path, attempt: int) -> None:
    """The marks of damaged checkpoints whose removal was killed before it came to the mark."""
    for mark in sorted(root.glob(f"*{DAMAGED_SUFFIX}")):
        place = parse_folder_name(mark.name.removesuffix(DAMAGED_SUFFIX))
        if place is not None and place[1] < attempt and not os.path.lexists(mark.with_suffix("")):
            mark.unlink(missing_ok=True)


def _original_name(name: str) -> str:
    return name.removeprefix(TRASH_PREFIX).rsplit(".", 1)[0] if name.startswith(TRASH_PREFIX) else name


def _remove_uncommitted(folder: Path, original: Path) -> bool:
    trash = original.with_name(f"{TRASH_PREFIX}{original.name}.{secrets.token_hex(4)}")
    folder.rename(trash)
    reached("sweep.renamed")
    if has_commit(trash):
        with contextlib.suppress(OSError):  # a new checkpoint already uses the name
            trash.rename(original)
        return False
    shutil.rmtree(trash, ignore_errors=True)
    reached("sweep.content_removed")
    return True
