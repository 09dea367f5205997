"""Errors of a verb as messages and exit codes."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import IO

from megamask.errors import ExitCode, MegamaskError, UsageError
from megamask.provenance.redaction import redact, redacted
from megamask.resilience import surroundings
from megamask_pipelines.verb_answer import print_json, print_line


def guarded(action: Callable[[], int], name: str, json_answer: IO[str] | None) -> int:
    """Run an action; return its exit code, or that of the error that it ends with, which is printed."""
    try:
        return action()
    except MegamaskError as error:
        return _report(error, json_answer)
    except OSError as error:
        refusal = surroundings.explained(error) or _path_refusal(error) or _storage_refusal(error, name)
        return _report_bug(error, json_answer) if refusal is None else _report(refusal, json_answer)
    except KeyboardInterrupt:
        interrupted = MegamaskError("interrupted")
        interrupted.exit_code = ExitCode.INTERRUPTED_TWICE
        return _report(interrupted, json_answer)
    except SystemExit as end:  # argparse's --help; a rank that has left its report to the launcher
        if isinstance(end.code, int):
            return end.code
        return int(ExitCode.DONE if end.code is None else ExitCode.BUG)
    except Exception as error:  # noqa: BLE001  the outermost frame: prints the traceback
        cause = surroundings.explained(error)
        return _report_bug(error, json_answer) if cause is None else _report(cause, json_answer)


def _report(error: MegamaskError, json_answer: IO[str] | None) -> int:
    error = redacted(error)
    print_line(f"error: {error.message}", sys.stderr)
    if error.hint is not None:
        print_line(f"hint: {error.hint}", sys.stderr)
    if json_answer is not None:
        described = {**error.details, "error": error.message, "hint": error.hint, "exit_code": int(error.exit_code)}
        print_json(described, json_answer)
    return int(error.exit_code)


def _report_bug(error: Exception, json_answer: IO[str] | None) -> int:
    import traceback

    print_line(redact("".join(traceback.format_exception(error)).rstrip()), sys.stderr)
    described = MegamaskError(f"{type(error).__name__}: {error}", hint="this is a bug in megamask; the trace is above")
    return _report(described, json_answer)


def _path_refusal(error: OSError) -> MegamaskError | None:
    """Return the error of a path that no file system accepts, from any verb, key or option; None for other causes."""
    if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
        return None
    return UsageError(f"{error.filename} cannot be a path: {error.strerror}. Nothing was started.", hint="shorten it")


def _storage_refusal(error: OSError, name: str) -> MegamaskError | None:
    """The error of a full, read-only or failing disk that no room has named, or None where storage is not to blame."""
    from megamask.errors import StorageError
    from megamask.storage.durable import storage_errors

    try:
        with storage_errors(f"megamask {name}"):
            raise error
    except StorageError as refusal:
        return refusal
    except OSError:
        return None
