"""Exit codes and the typed errors that carry them.

The command line is the only place that formats an error and ends the process; everything else raises one of these.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of a process, read by its scheduler; the table is in docs/architecture.md, law 10."""

    DONE = 0
    BUG = 1
    USAGE = 2
    MEGATRON_RERUN_RESUME = 16
    MEGATRON_RERUN_FAILED = 17
    DATA_INTEGRITY = 64
    CHECKPOINT_INTEGRITY = 65
    NUMERICS = 66
    HARDWARE = 70
    HANG = 71
    STORAGE = 74
    PREEMPTED = 75
    DO_NOT_REQUEUE = 93
    INTERRUPTED_TWICE = 130


class MegamaskError(Exception):
    """An error with one clear message for a person and an exit code for a scheduler.

    Args:
        message: what was given, what is allowed, what did not happen.
        hint: how to continue (which key or file to change); shown on a line of its own.

    `details` holds further fields of the verb's --json answer.
    """

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details: dict[str, object] = {}

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class UsageError(MegamaskError):
    """Invalid config, argument or layout; nothing was started."""

    exit_code = ExitCode.USAGE


class DataIntegrityError(MegamaskError):
    """A corpus or an input is damaged; no sample of the damaged part was used."""

    exit_code = ExitCode.DATA_INTEGRITY


class CheckpointIntegrityError(MegamaskError):
    """No checkpoint verifies, or the named one does not."""

    exit_code = ExitCode.CHECKPOINT_INTEGRITY


class NumericsError(MegamaskError):
    """A loss or a gradient is not finite; nothing was saved over a good checkpoint."""

    exit_code = ExitCode.NUMERICS


class StorageError(MegamaskError):
    """A disk is full, read-only or unavailable; nothing was published and the last commit is intact."""

    exit_code = ExitCode.STORAGE


class SupersededError(MegamaskError):
    """A newer attempt has claimed the run; this one stops without writing."""

    exit_code = ExitCode.DO_NOT_REQUEUE


_KINDS = (
    UsageError,
    DataIntegrityError,
    CheckpointIntegrityError,
    NumericsError,
    StorageError,
    SupersededError,
)


def error_with_code(exit_code: int, message: str, *, hint: str | None = None) -> MegamaskError:
    """Return the error that another process ended with.

    Its type is the one with this exit code, or MegamaskError if no type has it.
    """
    kind = next((kind for kind in _KINDS if kind.exit_code == exit_code), MegamaskError)
    error = kind(message, hint=hint)
    error.exit_code = ExitCode(exit_code)
    return error
