"""Versions of the code and of the libraries that made a file."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

_LIBRARIES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "numpy",
    "tokenizers",
    "tiktoken",
    "pyarrow",
    "crc32c",
    "mlflow",
)
_GIT_TIMEOUT_S = 10


@cache
def code_version() -> str:
    """The version of this code: `git describe` of its source tree, or the package's version where there is none.

    Uncommitted changes end it with "-dirty": such a version does not name the code that ran.
    """
    root = source_tree()
    described = _describe(root) if root is not None else None
    return described or f"megamask-{_version('megamask') or 'unknown'}"


def source_tree() -> Path | None:
    """The checkout that this package runs from, or None when it was installed."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    return root if (root / ".git").exists() and root / "platform" / "megamask" == package else None


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a result; those that are not installed are left out."""
    found = {name: _version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def num_processors() -> int:
    """Processors that this process may use; all processors where the system has no such limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _describe(root: Path) -> str | None:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags", "--abbrev=12"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # never write to a checkout in use
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, env=environment, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or a checkout that is not ours to read
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
