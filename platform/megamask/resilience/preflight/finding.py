"""A check, and its answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer of one check.

    Args:
        outcome: "fail" means that no run can work here, "warn" that one works worse, "skip" that nothing was looked at.
        message: what was found, with units; for anything but "pass" also what to do.
        values: the figures, for --json.
    """

    outcome: Outcome
    message: str
    values: Mapping[str, float | int | str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A named question about a machine.

    Args:
        run: answers it; may raise OSError, which counts as a failure.
        limit_s: a check that takes longer has failed, as one on a storage that is gone.
    """

    name: str
    run: Callable[[], Finding]
    limit_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A check's finding, and how long it took.

    Args:
        error: what the check raised; None where it answered.
        is_overdue: it took longer than its limit.
    """

    name: str
    finding: Finding
    seconds: float
    error: Exception | None = None
    is_overdue: bool = False


def answers(checks: Iterable[Check]) -> list[Answer]:
    """Run checks one after the other, so that no measurement disturbs another."""
    return [_answer(check) for check in checks]


def _answer(check: Check) -> Answer:
    found: list[Finding] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            found.append(check.run())
        except OSError as error:
            raised.append(error)
            reason = error.strerror or str(error)
            found.append(
                Finding(outcome="fail", message=reason if error.filename is None else f"{error.filename}: {reason}")
            )
        except Exception as error:  # noqa: BLE001  one broken check must not hide the others
            raised.append(error)
            found.append(Finding(outcome="fail", message=f"{type(error).__name__}: {error}"))

    started = time.monotonic()
    thread = threading.Thread(target=run, name=f"check {check.name}", daemon=True)
    thread.start()
    thread.join(check.limit_s)
    if is_overdue := not found:
        found.append(Finding(outcome="fail", message=f"no answer within {check.limit_s:g} s"))
    return Answer(
        name=check.name,
        finding=found[0],
        seconds=time.monotonic() - started,
        error=raised[0] if raised and not is_overdue else None,
        is_overdue=is_overdue,
    )
