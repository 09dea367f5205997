"""Small files that survive a crash: written, flushed, then made visible by one atomic act.

Safe on local disks and on NFS (link and rename are atomic there; O_APPEND is not relied upon). Every function takes
plain paths.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from megamask.errors import StorageError
from megamask.storage.fault_points import reached

_STORAGE_ERRNOS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the device reports an input/output error",
    errno.EFBIG: "the file-size limit is reached",
    errno.ESTALE: "the file handle is stale (network file system)",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ETIMEDOUT: "the storage does not answer",
}


@contextlib.contextmanager
def storage_errors(
    action: str,
    *,
    outcome: str = "Nothing was published.",
    hint: str = "free space or choose another folder, then run again",
) -> Iterator[None]:
    """Turn an OSError that the storage is to blame for into a StorageError that names the action.

    Args:
        action: what was being done, as "writing PATH"; it opens the message.
        outcome: what did not happen; it closes the message.
    """
    try:
        yield
    except OSError as error:
        reason = _STORAGE_ERRNOS.get(error.errno or 0)
        if reason is None:
            raise
        where = f" ({error.filename})" if error.filename and str(error.filename) not in action else ""
        raise StorageError(
            f"{action}: {reason}{where}. {outcome}",
            hint=hint,
        ) from error


def read_errors(path: Path) -> contextlib.AbstractContextManager[None]:
    """Apply `storage_errors` to reading a file: a refusal of the storage is not damage of the file.

    An OSError about the file itself (missing, not a file) is left as it is.
    """
    return storage_errors(
        f"reading {path}", outcome="Nothing was loaded.", hint="make the storage readable, then run again"
    )


def fsync_directory(path: Path) -> None:
    """Flush a folder's entries, so that names created in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, each flushed into its parent: what is in it can be found.

    Raises:
        OSError: one cannot be made; FileExistsError and NotADirectoryError where a file is in the way.
    """
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)  # another process may have made it meanwhile
        with contextlib.suppress(PermissionError):  # a parent that may be written but not read cannot be flushed
            fsync_directory(folder.parent)


def fsync_file(path: Path) -> None:
    """Flush a file that other code wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_temporary(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            reached(f"{path.name}.created")
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        reached(f"{path.name}.written")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file by a complete, flushed one; a reader sees the old or the new content, never a mixture.

    Raises:
        StorageError: the storage refused; the old file is intact.
    """
    with storage_errors(f"writing {path}"):
        temporary = _write_temporary(path, data)
        try:
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        reached(f"{path.name}.replaced")
        fsync_directory(path.parent)
        reached(f"{path.name}.flushed")


def create_exclusive(path: Path, data: bytes) -> None:
    """Create a file with complete, flushed content, or fail if the name exists; exactly one of many callers wins.

    Raises:
        FileExistsError: the name exists; its content is not touched.
        StorageError: the storage refused; the name does not exist, unless only the last flush failed.
    """
    with storage_errors(f"creating {path}"):
        temporary = _write_temporary(path, data)
        try:
            os.link(temporary, path)  # atomic and exclusive, on NFS too
            reached(f"{path.name}.linked")
        finally:
            temporary.unlink(missing_ok=True)
        reached(f"{path.name}.temporary_removed")
        fsync_directory(path.parent)
        reached(f"{path.name}.flushed")
