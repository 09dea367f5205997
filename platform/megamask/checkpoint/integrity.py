"""Verification of a checkpoint's files against the digests that were committed."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from megamask.checkpoint.commit import Commit, FileDigest, load_commit
from megamask.errors import CheckpointIntegrityError
from megamask.storage.durable import read_errors, storage_errors

_READ_BYTES = 1 << 20


def digest_and_flush(folder: Path, name: str, gate: Callable[[], None] = lambda: None) -> FileDigest:
    """Flush a file that this process wrote; return its size and sha256.

    Args:
        gate: called before each MiB is hashed; what it raises ends the reading.

    Raises:
        StorageError: the storage refused; the file may not be durable.
    """
    with storage_errors(f"flushing {folder / name}"):
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(descriptor)
            return _digest(descriptor, gate)
        finally:
            os.close(descriptor)


def _digest(descriptor: int, gate: Callable[[], None] = lambda: None) -> FileDigest:
    digest = hashlib.sha256()
    num_bytes = 0
    while piece := os.read(descriptor, _READ_BYTES):
        gate()
        digest.update(piece)
        num_bytes += len(piece)
    return FileDigest(num_bytes=num_bytes, sha256=digest.hexdigest())


def share(commit: Commit, rank: int, world_size: int) -> list[str]:
    """Return the files that one rank verifies: dealt round robin from the largest down, so that shares weigh alike."""
    names = sorted(commit.files, key=lambda name: (-commit.files[name].num_bytes, name))
    return names[rank::world_size]


def problems(commit: Commit, names: Iterable[str]) -> list[str]:
    """Return a sentence for each damaged file; empty if all are intact.

    Raises:
        StorageError: the storage refuses to read a file, which is not damage.
    """
    found = (_problem(commit.folder, name, commit.files[name]) for name in names)
    return [problem for problem in found if problem is not None]


def link_problems(folder: Path) -> list[str]:
    """Name every symbolic link below a checkpoint folder: a link may lead outside it, so none is followed."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=False):
        for name in (*folders, *files):
            path = Path(parent) / name
            if path.is_symlink():
                found.append(f"{path.relative_to(folder)} is a link")
    return found


def _problem(folder: Path, name: str, expected: FileDigest) -> str | None:
    with read_errors(folder / name):
        return _difference(folder, name, expected)


def _difference(folder: Path, name: str, expected: FileDigest) -> str | None:
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{name} cannot be opened: {error.strerror}"
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise
        return f"{name} cannot be opened: {error.strerror}"
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is not a plain file"
        if status.st_size != expected.num_bytes:
            return f"{name} has {status.st_size} bytes, COMMIT.json has {expected.num_bytes}"
        actual = _digest(descriptor)
    finally:
        os.close(descriptor)
    if actual != expected:
        return f"{name} has sha256 {actual.sha256[:12]}..., COMMIT.json has {expected.sha256[:12]}..."
    return None


def verify_folder(folder: Path) -> Commit:
    """Read every byte of a checkpoint and return its commit.

    Raises:
        CheckpointIntegrityError: a file is missing, damaged or a link; the message names it.
        UsageError: a newer megamask wrote it.
    """
    commit = load_commit(folder)
    found = link_problems(folder) or problems(commit, sorted(commit.files))
    if found:
        raise damaged(folder, found)
    return commit


def damaged(folder: Path, found: list[str]) -> CheckpointIntegrityError:
    """The error for a checkpoint with these problems; the first three are named."""
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return CheckpointIntegrityError(
        f"{folder} is damaged: {'; '.join(found[:3])}{more}. Nothing was loaded from it.",
        hint="restore the folder from a copy, or use another checkpoint",
    )
