"""Watch the processes of a node's ranks: signals, grace periods, failures and hangs."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megamask.config.schema.watchdog import WatchdogConfig
from megamask.errors import ExitCode, MegamaskError
from megamask.launch.failures import AGREED
from megamask.launch.hang import Standing, examine, hang_error
from megamask.launch.rank_folder import RankFolder
from megamask.resilience.heartbeat import BEFORE_TRAINING, Mark
from megamask.resilience.signals import STOP_SIGNALS, is_ignored
from megamask.resilience.stacks import ask_for_stacks, wait_for_stacks
from megamask.resilience.watchdog import Watchdog

# After a rank has failed, the others get this long to notice, to write their rank files and to send what is journalled.
FAILURE_GRACE_S = 30.0
# Rank 0 opens the run before any rank trains: when it refuses, the others have nothing to report.
REFUSAL_GRACE_S = 3.0
# A rank ends itself when its grace is over; one that cannot (it is stopped, or stuck in a driver) is killed.
_KILL_MARGIN_S = 2.0
_POLL_S = 0.05
_LOOK_S = 0.25
_STACKS_S = 5.0


@dataclass(frozen=True, kw_only=True)
class StopGrace:
    """The time that ranks get after a signal.

    Args:
        grace_s: from the first signal to SIGKILL. The default fits Slurm's KillWait and Kubernetes' grace period, both
            30 s unless a site changes them.
        save_budget_s: further seconds for a rank that is saving when the grace is over.
    """

    grace_s: float = 25.0
    save_budget_s: float = 60.0


class Observer:
    """A launcher's part in what happens to its ranks. This one records nothing and knows no other node.

    Args:
        first_pid: process id of the node's first rank, set when it was started.
    """

    first_pid: int = 0

    def looked(self, marks: Mapping[int, Mark | None]) -> None:
        """Take in the progress marks of the running ranks, several times a second; None is one that has not begun."""

    def killed(self, rank: int, number: int) -> None:
        """Record a rank that was killed by a signal (`number`) which this launcher did not send."""

    def has_ended_elsewhere(self) -> bool:
        """Return whether another node of the job has failed; the ranks then get FAILURE_GRACE_S."""
        return False

    def is_unfit_elsewhere(self) -> bool:
        """Return whether another node starts no ranks; those of this one get REFUSAL_GRACE_S."""
        return False

    def is_hung_elsewhere(self) -> bool:
        """Return whether another node of the job has found a hang."""
        return False

    def hung(self, standings: Sequence[Standing], stacks: dict[int, str]) -> MegamaskError:
        """Record a hang, while the ranks are still there, and return the error to show."""
        self.keep_stacks(stacks)
        return hang_error(standings, None)

    def keep_stacks(self, stacks: dict[int, str]) -> None:
        """Keep the stacks of ranks that hang."""


class Watch:
    """Processes of a node's ranks, and who ended when.

    Args:
        ranks: global numbers of the ranks; `processes` gets one process for each, in their order.
    """

    def __init__(
        self, ranks: range, folder: RankFolder, grace: StopGrace, watchdog: WatchdogConfig, observer: Observer
    ) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ended: list[int] = []
        self.stopped: set[int] = set()
        self.overdue: set[int] = set()
        self.hung: set[int] = set()
        self.hang: MegamaskError | None = None
        self._ranks = ranks
        self._folder = folder
        self._grace = grace
        self._watchdog = Watchdog(watchdog)
        self._observer = observer
        self._asked_at: float | None = None
        self._deadline: float | None = None
        self._looked_at = 0.0

    def forward(self, number: int, _frame: object = None) -> None:
        """Hand a signal to every rank that runs; the grace period begins with the first one."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """Forward signals to this process to the ranks."""
        numbers = [number for number in STOP_SIGNALS if not is_ignored(number)]
        previous = {number: signal.signal(number, self.forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def wait(self) -> None:
        """Return when all have ended; once one has failed, the rest end by themselves or are killed."""
        self._observer.first_pid = self.processes[0].pid
        while len(self.ended) < len(self.processes):
            codes = [process.poll() for process in self.processes]
            self._note_ends(codes)
            self._set_deadline(codes)
            now = time.monotonic()
            if self._deadline is not None and now > self._deadline:
                self._kill(self.stopped)
            elif self._asked_at is not None and now > self._asked_at + self._grace.grace_s + _KILL_MARGIN_S:
                over = now > self._asked_at + self._grace.grace_s + self._grace.save_budget_s + _KILL_MARGIN_S
                self._kill(self.overdue, spared=set() if over else self._saving())
            elif self.hang is None and now > self._looked_at + _LOOK_S:
                self._looked_at = now
                self._look()
            time.sleep(_POLL_S)

    def _note_ends(self, codes: Sequence[int | None]) -> None:
        for rank, code in zip(self._ranks, codes, strict=True):
            if code is None or rank in self.ended:
                continue
            self.ended.append(rank)
            is_killed_here = rank in self.stopped or rank in self.overdue or rank in self.hung
            if code < 0 and not is_killed_here:
                self._observer.killed(rank, -code)

    def _set_deadline(self, codes: Sequence[int | None]) -> None:
        if self._deadline is not None:
            return
        if any(code not in (None, *AGREED) for code in codes):
            refused = self._ranks.start == 0 and codes[0] in (ExitCode.USAGE, ExitCode.DATA_INTEGRITY)
            self._deadline = time.monotonic() + (REFUSAL_GRACE_S if refused else FAILURE_GRACE_S)
        elif (self._asked_at is None and self._has_left_too_early(codes)) or self._observer.is_unfit_elsewhere():
            self._deadline = time.monotonic() + REFUSAL_GRACE_S
        elif self._observer.has_ended_elsewhere():
            self._deadline = time.monotonic() + FAILURE_GRACE_S

    def _has_left_too_early(self, codes: Sequence[int | None]) -> bool:
        """True if a rank has ended as agreed while another still waits to meet it: only one of them got a signal."""
        if not any(code in (ExitCode.PREEMPTED, ExitCode.DO_NOT_REQUEUE) for code in codes):
            return False
        marks = [self._folder.mark(rank) for rank in self._running()]
        return any(mark is None or mark.section in BEFORE_TRAINING for mark in marks)

    def _saving(self) -> set[int]:
        marks = {rank: self._folder.mark(rank) for rank in self._ranks}
        return {rank for rank, mark in marks.items() if mark is not None and mark.section == "save"}

    def _look(self) -> None:
        """End all ranks if one of this node exceeds its limit, or another node found a hang."""
        if not (pids := self._running()):
            return
        marks = {rank: self._folder.mark(rank) for rank in pids}
        self._observer.looked(marks)
        stillness = self._watchdog.look(marks)
        if not self._watchdog.is_hung(stillness) and not self._observer.is_hung_elsewhere():
            return
        standings, stacks = examine(pids, stillness, self._folder)
        self.hang = self._observer.hung(standings, stacks)
        stopped = [standing.rank for standing in standings if standing.is_stopped]
        self._kill(self.hung, spared=stopped)
        # A stopped process gives its stacks when it goes on; the others are gone, so it cannot train.
        for rank in stopped:
            ask_for_stacks(pids[rank])
            with contextlib.suppress(ProcessLookupError):
                self._process(rank).send_signal(signal.SIGCONT)
            self._observer.keep_stacks({rank: wait_for_stacks(self._folder.stacks(rank), _STACKS_S)})
        self._kill(self.hung)

    def _running(self) -> dict[int, int]:
        return {rank: self._process(rank).pid for rank in self._ranks if self._process(rank).poll() is None}

    def _process(self, rank: int) -> subprocess.Popen[bytes]:
        return self.processes[rank - self._ranks.start]

    def _kill(self, killed: set[int], *, spared: Collection[int] = ()) -> None:
        for rank in self._running():
            if rank not in spared:
                killed.add(rank)
                self._process(rank).kill()
