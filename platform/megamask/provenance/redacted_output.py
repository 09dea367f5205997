"""Redacted output outside the command line: log records, warnings, and the traces of threads and finalizers.

Errors and their traces are redacted where the command line prints them.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from megamask.provenance.redaction import redact, register_environment


def install() -> None:
    """Redact everything that a library may log or warn of in this process; a second call changes nothing.

    Log records are redacted when they are made, so that every handler, a library's own included, gets them so.
    """
    register_environment()
    factory = logging.getLogRecordFactory()
    if not isinstance(factory, _RedactingFactory):
        logging.setLogRecordFactory(_RedactingFactory(factory))
    if not isinstance(warnings.formatwarning, _RedactedText):
        warnings.formatwarning = _RedactedText(warnings.formatwarning)
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _print_thread_error
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _print_unraisable


class _RedactedText:
    """A function that returns text, with that text redacted."""

    def __init__(self, function: Callable[..., str]) -> None:
        self._function = function

    def __call__(self, *arguments: Any, **options: Any) -> str:
        return redact(self._function(*arguments, **options))


class _RedactingFactory:
    """Makes log records whose message and trace are final and redacted."""

    def __init__(self, factory: Callable[..., logging.LogRecord]) -> None:
        self._factory = factory

    def __call__(self, *arguments: Any, **options: Any) -> logging.LogRecord:
        record = self._factory(*arguments, **options)
        try:
            message = record.getMessage()
        except Exception as error:  # noqa: BLE001  arguments that do not fit, or an object whose text raises
            # any error: logging itself would print what it can and continue, and no log call may end training
            message = _as_given(record, error)
        record.msg, record.args = redact(message), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        return record


def _as_given(record: logging.LogRecord, error: Exception) -> str:
    """Return a substitute for a message that cannot be formatted."""
    try:
        return f"{record.msg} {record.args!r}"
    except Exception:  # noqa: BLE001  an argument without a text raises here again
        return f"a log message of {record.name} without a text ({type(error).__name__})"


def _print_thread_error(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is SystemExit:
        return
    name = arguments.thread.name if arguments.thread is not None else "?"
    trace = traceback.format_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
    _write(f"Exception in thread {name}:\n{''.join(trace)}")


def _print_unraisable(unraisable: Any) -> None:
    trace = traceback.format_exception(unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback)
    _write(f"{unraisable.err_msg or 'Exception ignored in'}: {unraisable.object!r}\n{''.join(trace)}")


def _write(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(redact(text))
