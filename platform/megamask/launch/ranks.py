"""Start and watch the ranks of one node, hand signals on, and report how each rank ended.

The laptop (`local.py`) and a node of a cluster (`node.py`) use the same code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamask.errors import ExitCode, MegamaskError, error_with_code
from megamask.resilience.exit_codes import combine
from megamask.resilience.heartbeat import VARIABLE as HEARTBEAT_VARIABLE
from megamask.resilience.heartbeat import make_file, read_mark
from megamask.resilience.signals import STOP_SIGNALS, StopRequest, is_ignored

# After a rank has failed, the others get this long to notice, to write their rank files and to send what is journalled.
FAILURE_GRACE_S = 30.0
# Rank 0 opens the run before any rank trains: when it refuses, the others have nothing to report.
REFUSAL_GRACE_S = 3.0
# From the first signal to SIGKILL, where the caller names no other time. It fits Slurm's KillWait and Kubernetes'
# grace period, both 30 s unless a site changes them.
STOP_GRACE_S = 25.0
SAVE_BUDGET_S = 60.0
# A rank ends itself when its grace is over; one that cannot (it is stopped, or stuck in a driver) is killed.
_KILL_MARGIN_S = 2.0
# Ends that all ranks agreed on: each leaves in its own time.
AGREED = (0, ExitCode.PREEMPTED, ExitCode.DO_NOT_REQUEUE)
REPORT_VARIABLE = "MEGAMASK_RANK_REPORT"
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """How one rank ended.

    Args:
        pid: of its process, as its claim names it.
        returncode: of the process; negative for a signal.
        place_of_end: 0 for the rank that ended first.
        was_stopped: the launcher killed it after another rank had failed.
        was_overdue: the launcher killed it because it had not ended within the grace period after a signal.
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


@dataclass(frozen=True, kw_only=True)
class Gang:
    """The ranks of one node and how they meet the others.

    Args:
        first_rank: global number of the node's first rank.
        num_ranks: ranks of this node.
        world_size: ranks of the job.
        address, port: where rank 0 listens.
        listener: the listening socket that rank 0 inherits; None on the other nodes.
        interface: network interface of gloo, or None for torch's own choice.
        environment: further variables for every rank.
        keeps_stderr: the stderr of all ranks but the first is kept aside and shown with a failure.
    """

    first_rank: int = 0
    num_ranks: int
    world_size: int
    address: str
    port: int
    listener: socket.socket | None = None
    interface: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    keeps_stderr: bool = True

    @property
    def ranks(self) -> range:
        """Global numbers of the node's ranks."""
        return range(self.first_rank, self.first_rank + self.num_ranks)


def run_ranks(
    arguments: Sequence[str],
    gang: Gang,
    *,
    module: str = "megamask_pipelines.cli.main",
    signals: StopRequest | None = None,
    stop_grace_s: float = STOP_GRACE_S,
    save_budget_s: float = SAVE_BUDGET_S,
    on_killed: Callable[[int, int, int], None] | None = None,
    has_ended_elsewhere: Callable[[], bool] | None = None,
) -> list[RankExit]:
    """Runs `python -P -m MODULE ARGUMENTS` once per rank of the node and waits for all of them.

    The first rank keeps this process's stdin and stderr. No rank keeps stdout: the caller prints the result. Signals of
    STOP_SIGNALS go to every rank once; ranks that have not ended `stop_grace_s` later are killed, those that are saving
    `save_budget_s` after that. The ranks die with this process.

    Args:
        on_killed: called with (pid of the first rank, rank, number of the signal) as soon as a rank was killed by a
            signal that this launcher did not send.
        has_ended_elsewhere: whether another node of the job has failed; the ranks then get FAILURE_GRACE_S.

    Returns: one RankExit per rank, in rank order.
    """
    with _temporary_folder() as folder:
        watch = _Watch(gang, folder, (stop_grace_s, save_budget_s), on_killed, has_ended_elsewhere)
        try:
            with watch.forwarding():
                for rank in gang.ranks:
                    watch.processes.append(_start([module, *arguments], gang, rank, folder))
                if signals is not None and signals.strongest is not None:
                    watch.forward(signals.strongest)
                watch.wait()
        finally:
            for process in watch.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return [
            RankExit(
                rank=rank,
                pid=process.pid,
                returncode=process.returncode,
                place_of_end=watch.ended.index(rank),
                was_stopped=rank in watch.stopped,
                was_overdue=rank in watch.overdue,
                report=_report(folder, rank),
                stderr_tail=_stderr_tail(folder, rank),
            )
            for rank, process in zip(gang.ranks, watch.processes, strict=True)
        ]


def rank_environment(gang: Gang, rank: int) -> dict[str, str]:
    """The environment of a rank: this process's own, and the rank's place."""
    local_rank = rank - gang.first_rank
    environment = {
        **os.environ,
        **gang.environment,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(gang.world_size),
        "LOCAL_WORLD_SIZE": str(gang.num_ranks),
        "MASTER_ADDR": gang.address,
        "MASTER_PORT": str(gang.port),
        "MEGAMASK_PARENT_PID": str(os.getpid()),
        # no reverse DNS, no IPv6: torch's C++ code warns of each on every rank
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // gang.num_ranks)))
    if gang.interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", gang.interface)
    # where rank 0's launcher holds the port, all ranks meet in the same way; only rank 0 inherits the socket
    environment["MEGAMASK_STORE_FD"] = str(gang.listener.fileno() if gang.listener is not None else -1)
    return environment


def failure_of(exits: Sequence[RankExit]) -> MegamaskError | None:
    """The one error to show for a group of ranks, or None if all ended well or as agreed.

    The exit code is the most specific one of all ranks that ended by themselves. The message is that of a rank that
    reported it; if none did, of the rank that failed first: the others only lost their peer.
    """
    own = [rank_exit for rank_exit in exits if not rank_exit.was_stopped and not rank_exit.was_overdue]
    overdue = [rank_exit for rank_exit in exits if rank_exit.was_overdue]
    code = combine([*(rank_exit.returncode for rank_exit in own), *(ExitCode.HANG for _ in overdue)])
    if code in AGREED and not any(rank_exit.report for rank_exit in exits):
        return None
    for rank_exit in own if code != ExitCode.BUG else ():  # of bugs and deaths the first caused the others
        if rank_exit.report is not None and rank_exit.report.exit_code == code:
            return rank_exit.report
    if code == ExitCode.HANG and overdue:
        return error_with_code(code, _hang(overdue), hint="start the run again; committed checkpoints are intact")
    failed = sorted((e for e in own if e.returncode not in AGREED), key=lambda e: e.place_of_end)
    if not failed:
        return None
    return failed[0].report or error_with_code(code, _without_report(failed[0]))


def killed_by(number: int) -> str:
    """How a process ended that a signal killed, and the usual cause of that signal."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "a signal"
    cause = "; the kernel's OOM killer is the usual cause" if number == signal.SIGKILL else ""
    return f"killed by {name} ({number}){cause}"


def leave_report(error: MegamaskError) -> bool:
    """Leaves an error for the process that started this rank, which prints it once for all ranks.

    Returns: False when no launcher asked for a report, or it could not be written; the caller prints the error itself.
    """
    path = os.environ.get(REPORT_VARIABLE)
    if path is None:
        return False
    report = {"message": error.message, "hint": error.hint, "exit_code": int(error.exit_code)}
    try:
        Path(path).write_text(json.dumps(report), encoding="utf-8")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks STOP_SIGNALS, so that a process that is started here cannot be killed before its handlers are there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Watch:
    """Processes of a gang, and who ended when."""

    def __init__(
        self,
        gang: Gang,
        folder: Path,
        graces: tuple[float, float],
        on_killed: Callable[[int, int, int], None] | None,
        has_ended_elsewhere: Callable[[], bool] | None,
    ) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ended: list[int] = []
        self.stopped: set[int] = set()
        self.overdue: set[int] = set()
        self._first = gang.first_rank
        self._ranks = gang.ranks
        self._folder = folder
        self._grace, self._save_budget = graces
        self._on_killed = on_killed
        self._has_ended_elsewhere = has_ended_elsewhere
        self._asked_at: float | None = None
        self._deadline: float | None = None

    def forward(self, number: int, _frame: object = None) -> None:
        """Hands a signal to every rank that runs; the grace period begins with the first one."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """Signals to this process go to the ranks."""
        numbers = [number for number in STOP_SIGNALS if not is_ignored(number)]
        previous = {number: signal.signal(number, self.forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def wait(self) -> None:
        """Returns when all have ended; once one has failed, the rest end by themselves or are killed."""
        while len(self.ended) < len(self.processes):
            codes = [process.poll() for process in self.processes]
            self._note_ends(codes)
            self._set_deadline(codes)
            now = time.monotonic()
            if self._deadline is not None and now > self._deadline:
                self._kill(codes, self.stopped)
            elif self._asked_at is not None and now > self._asked_at + self._grace + _KILL_MARGIN_S:
                over = now > self._asked_at + self._grace + self._save_budget + _KILL_MARGIN_S
                self._kill(codes, self.overdue, spared=set() if over else self._saving())
            time.sleep(_POLL_S)

    def _note_ends(self, codes: Sequence[int | None]) -> None:
        for rank, code in enumerate(codes, start=self._first):
            if code is None or rank in self.ended:
                continue
            self.ended.append(rank)
            is_killed_here = rank in self.stopped or rank in self.overdue
            if code < 0 and not is_killed_here and self._on_killed is not None:
                self._on_killed(self.processes[0].pid, rank, -code)

    def _set_deadline(self, codes: Sequence[int | None]) -> None:
        if self._deadline is not None:
            return
        if any(code not in (None, *AGREED) for code in codes):
            refused = self._first == 0 and codes[0] in (ExitCode.USAGE, ExitCode.DATA_INTEGRITY)
            self._deadline = time.monotonic() + (REFUSAL_GRACE_S if refused else FAILURE_GRACE_S)
        elif self._has_ended_elsewhere is not None and self._has_ended_elsewhere():
            self._deadline = time.monotonic() + FAILURE_GRACE_S

    def _saving(self) -> set[int]:
        marks = {rank: read_mark(_heartbeat(self._folder, rank)) for rank in self._ranks}
        return {rank for rank, mark in marks.items() if mark is not None and mark.section == "save"}

    def _kill(self, codes: Sequence[int | None], killed: set[int], *, spared: Collection[int] = ()) -> None:
        for rank, code in enumerate(codes, start=self._first):
            if code is None and rank not in spared:
                killed.add(rank)
                self.processes[rank - self._first].kill()


def _start(arguments: Sequence[str], gang: Gang, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    make_file(_heartbeat(folder, rank))
    environment = {
        **rank_environment(gang, rank),
        REPORT_VARIABLE: str(folder / f"report-{rank}.json"),
        HEARTBEAT_VARIABLE: str(_heartbeat(folder, rank)),
    }
    is_first = rank == gang.first_rank
    inherited = (gang.listener.fileno(),) if rank == 0 and gang.listener is not None else ()
    with (folder / f"stderr-{rank}").open("wb") as log, signals_blocked():
        return subprocess.Popen(
            [sys.executable, "-P", "-m", *arguments],  # -P: no module of the working folder takes a library's place
            env=environment,
            pass_fds=inherited,
            stdin=None if is_first else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if is_first or not gang.keeps_stderr else log,
            # its own session: a terminal's Ctrl-C reaches the ranks once, through the forwarding
            start_new_session=True,
        )


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="megamask-ranks-", ignore_cleanup_errors=True)
    except FileNotFoundError as error:  # tempfile's: not one of its places can be written
        raise error_with_code(
            ExitCode.STORAGE,
            "no folder for temporary files can be written: neither $TMPDIR nor /tmp, /var/tmp, /usr/tmp, nor the "
            "working folder. Nothing was started.",
            hint="set TMPDIR to a folder that this user may write; in a pod with a read-only root, mount an emptyDir "
            "at /tmp",
        ) from error
    with folder as name:
        yield Path(name)


def _hang(overdue: Sequence[RankExit]) -> str:
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


def _heartbeat(folder: Path, rank: int) -> Path:
    return folder / f"heartbeat-{rank}"


def _report(folder: Path, rank: int) -> MegamaskError | None:
    try:
        stored = json.loads((folder / f"report-{rank}.json").read_text(encoding="utf-8"))
        return error_with_code(stored["exit_code"], stored["message"], hint=stored["hint"])
    except (FileNotFoundError, ValueError):  # none was left, or the rank died while writing it
        return None


def _stderr_tail(folder: Path, rank: int) -> str:
    return (folder / f"stderr-{rank}").read_bytes()[-8192:].decode(errors="replace").strip()
