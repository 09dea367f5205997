"""Which exit code a whole job ends with, from what its ranks left behind."""

from __future__ import annotations

from collections.abc import Iterable

from megamask.errors import ExitCode

# Most specific first; 75 is not in the list: it holds only when every rank agreed and the save committed.
PRECEDENCE = (66, 65, 64, 2, 93, 74, 70, 17, 16, 71, 1)


def combine(rank_codes: Iterable[int]) -> int:
    """The job's exit code: the most specific code that any rank left.

    Args:
        rank_codes: a process's own exit code or a code read from its rank file; a negative value or one above 128
            is a death by signal and counts as 1.
    """
    codes = {ExitCode.INTERRUPTED_TWICE if code == 130 else _as_contract(code) for code in rank_codes}
    for code in PRECEDENCE:
        if code in codes:
            return code
    for code in (ExitCode.INTERRUPTED_TWICE, ExitCode.PREEMPTED):
        if code in codes:
            return int(code)
    return 0


def _as_contract(code: int) -> int:
    known = {int(member) for member in ExitCode}
    return code if code in known else 1
