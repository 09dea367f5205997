"""Faults of the process's surroundings that Python reports as something else: shadowed modules, used-up descriptors."""

from __future__ import annotations

import errno
import os
import resource
import sys
import sysconfig
from pathlib import Path

from megamask.errors import ExitCode, MegamaskError, UsageError, error_with_code

# Fewer descriptors than this do not suffice for one rank with its journal, shards, sockets and threads.
_FEWEST_DESCRIPTORS = 128
_IMPORT_ERRORS = (ImportError, AttributeError, SyntaxError, TypeError, NameError)


def raise_descriptor_limit() -> None:
    """Raise this process's limit of open files to what the system allows.

    Raises:
        UsageError: the system allows too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = 65536 if hard == unlimited else min(65536, hard)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft != unlimited and soft < _FEWEST_DESCRIPTORS:
        raise UsageError(
            f"this process may open {soft} files and connections at a time; training needs {_FEWEST_DESCRIPTORS} or "
            "more. Nothing was started.",
            hint="raise the limit before starting: `ulimit -n 4096`, or LimitNOFILE of the service",
        )


def explained(error: BaseException) -> MegamaskError | None:
    """The error with its cause in the process's surroundings, or None where that is not to blame."""
    if _has_no_descriptors(error):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return error_with_code(
            ExitCode.STORAGE,
            f"this process may open {limit} files and connections at a time, and needs more.",
            hint="raise the limit before starting: `ulimit -n 4096`, or LimitNOFILE of the service",
        )
    if isinstance(error, _IMPORT_ERRORS) and (shadow := _shadowing_module()) is not None:
        name, path = shadow
        return UsageError(
            f"{path} takes the place of the module {name!r} that megamask or one of its libraries needs "
            f"({type(error).__name__}: {error}). Nothing was started.",
            hint="rename that file, start in another folder, or take its folder off PYTHONPATH",
        )
    return None


def _has_no_descriptors(error: BaseException) -> bool:
    """Return whether the process has used up its descriptors; C libraries report it only as text."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return True
        if isinstance(cause, ImportError | RuntimeError) and os.strerror(errno.EMFILE) in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _shadowing_module() -> tuple[str, Path] | None:
    """A loaded module of the working folder or of PYTHONPATH that has the name of a library's module."""
    paths = sysconfig.get_paths()
    homes = {Path(paths[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    places = [Path.cwd(), *map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))]
    folders = {place.resolve() for place in places} - homes
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if "." in name or not isinstance(file, str) or name.startswith("megamask"):
            continue
        if name not in sys.stdlib_module_names and not any(_has_module(home, name) for home in homes):
            continue
        path = Path(file).resolve()
        if {path.parent, path.parent.parent} & folders and not any(path.is_relative_to(home) for home in homes):
            return name, path
    return None


def _has_module(home: Path, name: str) -> bool:
    return (home / name).is_dir() or (home / f"{name}.py").is_file()
