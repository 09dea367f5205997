"""Atomic publication of a folder: built under a hidden name, flushed, then renamed.

One process at a time builds a target: a lock file beside it is held with flock, which ends with the process that holds
it. What an interrupted build left behind is swept by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from megamask.errors import UsageError
from megamask.storage.durable import fsync_directory


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the lock on building `target`; create its parent folders, and remove them again after a failure.

    Raises:
        UsageError: another live process builds the same target.
        OSError: the storage refused.
    """
    created = [folder for folder in target.parents if not folder.exists()]
    try:
        _make_parents(target.parent, created)
        descriptor = _lock(target)
        try:
            yield
        finally:
            _lock_path(target).unlink(missing_ok=True)
            os.close(descriptor)
    except BaseException:
        for folder in created:
            with contextlib.suppress(OSError):  # another process uses it by now
                folder.rmdir()
        raise


@contextlib.contextmanager
def folder_being_built(target: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `target`, which becomes `target` if the block ends without an error.

    The caller holds `exclusive(target)` and flushes the files it writes; folders are flushed here.

    Raises:
        UsageError: `target` was taken in the meantime.
        OSError: the storage refused; `target` does not exist.
    """
    folder = target.with_name(f".{target.name}.building")
    _remove(folder)
    try:
        folder.mkdir()
        yield folder
        _publish(folder, target)
    except BaseException:
        _remove(folder)
        raise


def _make_parents(parent: Path, missing: Sequence[Path]) -> None:
    """Create a folder and its missing parents, and flush their names."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            fsync_directory(folder.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"corpus.output_dir lies below {error.filename}, which is not a folder. Nothing was written.",
            hint="choose another corpus.output_dir",
        ) from error


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _lock(target: Path) -> int:
    path = _lock_path(target)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the name between our open and our lock: then it guards nothing.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"another process is preparing {target} now. Nothing was written.",
                hint="wait for it, or choose another corpus.output_dir",
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _publish(folder: Path, target: Path) -> None:
    for path in (*sorted(path for path in folder.rglob("*") if path.is_dir()), folder):
        fsync_directory(path)
    try:
        folder.rename(target)  # replaces an empty folder, and nothing else
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UsageError(
            f"corpus.output_dir {target} is no longer free. It was not touched.", hint="choose another folder"
        ) from error
    fsync_directory(target.parent)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
