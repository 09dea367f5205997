"""A folder that is made beside its final name, so that an interrupted conversion can continue and none is half seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from megamask.errors import UsageError
from megamask.storage.durable import fsync_directory, storage_errors, write_atomic

PARTIAL_SUFFIX = ".partial"
_PLAN_NAME = "plan.sha256"


def refuse_existing(target: Path) -> None:
    """Refuse a target that exists.

    Raises:
        UsageError: it does; it is not touched.
    """
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists already. Nothing was written.", hint="name a folder that does not exist")


def partial_folder(target: Path, digest: str) -> Path:
    """Return the folder to write into: that of an interrupted conversion of the same plan, or an empty one.

    Args:
        digest: of everything that decides the files.

    Raises:
        UsageError: a folder of that name was not made by an interrupted conversion.
        StorageError: the storage refused.
    """
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    with storage_errors(f"making {partial}"):
        mark = partial / _PLAN_NAME
        if partial.exists():
            if not mark.is_file():
                raise UsageError(
                    f"{partial} exists and was not made by an interrupted conversion. Nothing was written.",
                    hint="move it away",
                )
            if mark.read_text() == digest:
                return partial
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        write_atomic(mark, digest.encode())
    return partial


def show(partial: Path, target: Path) -> None:
    """Give a complete folder its name."""
    with storage_errors(f"renaming {partial}"):
        (partial / _PLAN_NAME).unlink()
        partial.rename(target)
        fsync_directory(target.parent)


class Progress:
    """Bytes done of all bytes, reported after each tensor."""

    def __init__(self, total: int, report: Callable[[int, int], None]) -> None:
        self._done, self._total, self._report = 0, total, report

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._report(self._done, self._total)
