"""Exit code of a job, from the codes of its ranks."""

from __future__ import annotations

from collections.abc import Iterable

from megamask.errors import ExitCode

# Most specific first; 75 is not in the list: it holds only when every rank agreed and the save committed.
PRECEDENCE = (66, 65, 64, 2, 93, 74, 70, 17, 16, 71, 1)
_CONTRACT = frozenset(int(code) for code in ExitCode)


def combine(rank_codes: Iterable[int]) -> int:
    """The job's exit code: the most specific code that any rank left.

    Args:
        rank_codes: a process's own exit code or a code read from its rank file. A negative value, or one above 128
            that is not 130, is a death by signal; it counts as 1 where no other rank left a code. A code outside
            the contract counts as 1.
    """
    codes = list(rank_codes)
    left = {code if code in _CONTRACT else 1 for code in codes if not _is_signal_death(code)}
    for code in (*PRECEDENCE, ExitCode.INTERRUPTED_TWICE):
        if code in left:
            return int(code)
    if any(_is_signal_death(code) for code in codes):  # 75 beside a rank that died is a crash
        return int(ExitCode.BUG)
    return int(ExitCode.PREEMPTED) if ExitCode.PREEMPTED in left else int(ExitCode.DONE)


def _is_signal_death(code: int) -> bool:
    return code < 0 or (code > 128 and code != ExitCode.INTERRUPTED_TWICE)
