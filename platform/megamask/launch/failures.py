"""End of a node's ranks, and the one error to show for all of them."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from megamask.errors import ExitCode, MegamaskError, error_with_code
from megamask.resilience.exit_codes import combine

# Ends that all ranks agreed on: each leaves in its own time.
AGREED = (0, ExitCode.PREEMPTED, ExitCode.DO_NOT_REQUEUE)


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """End of one rank.

    Args:
        pid: of its process, as its claim names it.
        returncode: of the process; negative for a signal.
        place_of_end: 0 for the rank that ended first.
        was_stopped: the launcher killed it after another rank had failed.
        was_overdue: the launcher killed it because it had not ended within the grace period after a signal.
        was_hung: the launcher killed it because the job made no progress; `report` is the hang.
        closed_step: completed updates of a rank whose attempt came to its agreed end; None for another one.
        report: the error that the rank left for the launcher, or None.
        stderr_tail: the end of its stderr, where that was kept aside.
    """

    rank: int
    pid: int
    returncode: int
    place_of_end: int
    was_stopped: bool
    report: MegamaskError | None
    stderr_tail: str
    was_overdue: bool = False
    was_hung: bool = False
    closed_step: int | None = None


def failure_of(exits: Sequence[RankExit]) -> MegamaskError | None:
    """Return the one error to show for a group of ranks, or None if all ended well or as agreed.

    The exit code is the most specific one of all ranks that ended by themselves. The message is that of a rank that
    reported it; if none did, of the rank that failed first: the others only lost their peer.
    """
    killed = [rank_exit for rank_exit in exits if rank_exit.was_overdue or rank_exit.was_hung]
    own = [rank_exit for rank_exit in exits if not rank_exit.was_stopped and rank_exit not in killed]
    code = combine([*(rank_exit.returncode for rank_exit in own), *(ExitCode.HANG for _ in killed)])
    if code in AGREED and not any(rank_exit.report for rank_exit in exits):
        return None
    # of bugs and deaths the first caused the others
    reporters = [rank_exit for rank_exit in exits if rank_exit.was_hung] + own if code != ExitCode.BUG else []
    for rank_exit in reporters:
        if rank_exit.report is not None and rank_exit.report.exit_code == code:
            return rank_exit.report
    if code == ExitCode.HANG and killed:
        return error_with_code(code, _overdue(killed), hint="start the run again; committed checkpoints are intact")
    failed = sorted((e for e in own if e.returncode not in AGREED), key=lambda e: e.place_of_end)
    if not failed:
        return None
    return failed[0].report or error_with_code(code, _without_report(failed[0]))


def killed_by(number: int) -> str:
    """Return the end of a process that a signal killed in words, with the usual cause of that signal."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "a signal"
    cause = "; the kernel's OOM killer is the usual cause" if number == signal.SIGKILL else ""
    return f"killed by {name} ({number}){cause}"


def _overdue(overdue: Sequence[RankExit]) -> str:
    names = ", ".join(str(rank_exit.rank) for rank_exit in overdue)
    return (
        f"after a signal asked for an end, rank {names} did not end within the grace period and was killed: it was "
        "stopped, or stuck in a call. What it had not saved is lost."
    )


def _without_report(rank_exit: RankExit) -> str:
    code = rank_exit.returncode
    how = f"was {killed_by(-code)}" if code < 0 else f"ended with exit code {code}"
    tail = f"\n{rank_exit.stderr_tail}" if rank_exit.stderr_tail else ""
    return f"rank {rank_exit.rank} {how}.{tail}"
