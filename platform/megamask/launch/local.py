"""Starts one process per rank on this machine and tells how they ended.

Used by `megamask train` when the layout needs several processes and no launcher's environment is present. Under
torchrun or a scheduler this module does nothing: the process joins what is there.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamask.errors import ExitCode, MegamaskError, error_with_code
from megamask.resilience.exit_codes import combine
from megamask.resilience.signals import STOP_SIGNALS, StopRequest

# After a rank has failed, the others get this long to notice, to write their rank files and to send what is journalled.
FAILURE_GRACE_S = 30.0
# Rank 0 opens the run before anybody trains: when it refuses, the others have nothing to tell.
REFUSAL_GRACE_S = 3.0
# Ends that all ranks agreed on: each leaves in its own time.
_AGREED = (0, ExitCode.PREEMPTED, ExitCode.DO_NOT_REQUEUE)
_POLL_S = 0.05
_REPORT_VARIABLE = "MEGAMASK_RANK_REPORT"


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """How one rank ended.

    Args:
        pid: of its process, as its claim names it.
        returncode: as the operating system tells it; negative for a signal.
        place_of_end: 0 for the rank that ended first.
        was_stopped: it did not end by itself after another rank had failed.
        report: the error that the rank left for the launcher, or None.
        stderr_tail: the end of what a rank other than 0 wrote to stderr.
    """

    rank: int
    pid: int
    returncode: int
    place_of_end: int
    was_stopped: bool
    report: MegamaskError | None
    stderr_tail: str


def is_launched() -> bool:
    """Whether a launcher (torchrun, srun, or this module) has already placed this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def leave_report(error: MegamaskError) -> bool:
    """Hands an error to the process that started this rank, which prints it once for all ranks.

    Returns: False when nobody asked for a report, or it could not be written; the caller prints the error itself.
    """
    path = os.environ.get(_REPORT_VARIABLE)
    if path is None:
        return False
    report = {"message": error.message, "hint": error.hint, "exit_code": int(error.exit_code)}
    try:
        Path(path).write_text(json.dumps(report), encoding="utf-8")
    except OSError:
        return False
    return True


def run_local_ranks(
    arguments: Sequence[str],
    world_size: int,
    *,
    module: str = "megamask_pipelines.cli.main",
    signals: StopRequest | None = None,
    on_killed: Callable[[int, int, int], None] | None = None,
) -> list[RankExit]:
    """Runs `python -m MODULE ARGUMENTS` once per rank and waits for all of them.

    Rank 0 keeps this process's stdin and stderr; the other ranks' stderr is kept aside. Nobody keeps stdout: the caller
    tells the result. Signals of STOP_SIGNALS go to every rank. The ranks die with this process.

    Args:
        on_killed: called with (pid of rank 0, rank, number of the signal) as soon as a rank was killed by a signal,
            though not by this launcher.

    Returns: one RankExit per rank, in rank order.
    """
    with _listening_socket() as listener, tempfile.TemporaryDirectory(prefix="megamask-ranks-") as folder:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            with _forwarding_signals(processes):
                for rank in range(world_size):
                    processes.append(_start([module, *arguments], rank, world_size, listener, Path(folder)))
                if signals is not None and signals.last_word is not None:
                    for process in processes:
                        process.send_signal(signals.last_word)
                ended, stopped = _wait(processes, on_killed)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return [
            RankExit(
                rank=rank,
                pid=process.pid,
                returncode=process.returncode,
                place_of_end=ended.index(rank),
                was_stopped=rank in stopped,
                report=_report(Path(folder), rank),
                stderr_tail=_stderr_tail(Path(folder), rank),
            )
            for rank, process in enumerate(processes)
        ]


def failure_of(exits: Sequence[RankExit]) -> MegamaskError | None:
    """The one error to show for a group of ranks, or None if all ended well or as agreed.

    The exit code is the most specific one of all ranks that ended by themselves. The message is that of a rank that
    reported it; if none did, of the rank that failed first: the others only lost their peer.
    """
    own = [rank_exit for rank_exit in exits if not rank_exit.was_stopped]
    code = combine([rank_exit.returncode for rank_exit in own])
    if code in _AGREED and not any(rank_exit.report for rank_exit in exits):
        return None
    for rank_exit in own if code != ExitCode.BUG else ():  # of bugs and deaths the first caused the others
        if rank_exit.report is not None and rank_exit.report.exit_code == code:
            return rank_exit.report
    failed = sorted((e for e in own if e.returncode not in _AGREED), key=lambda e: e.place_of_end)
    if not failed:
        return None
    return failed[0].report or error_with_code(code, _without_report(failed[0]))


def killed_by(number: int) -> str:
    """How a process ended that a signal killed, and what usually sends it."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "a signal"
    cause = "; the kernel's OOM killer is the usual cause" if number == signal.SIGKILL else ""
    return f"killed by {name} ({number}){cause}"


def _without_report(rank_exit: RankExit) -> str:
    code = rank_exit.returncode
    how = f"was {killed_by(-code)}" if code < 0 else f"ended with exit code {code}"
    tail = f"\n{rank_exit.stderr_tail}" if rank_exit.stderr_tail else ""
    return f"rank {rank_exit.rank} {how}.{tail}"


@contextlib.contextmanager
def _listening_socket() -> Iterator[socket.socket]:
    """A socket whose port nobody else can take between choosing it and serving on it; rank 0 inherits it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        yield listener


def _start(
    arguments: Sequence[str], rank: int, world_size: int, listener: socket.socket, folder: Path
) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(listener.getsockname()[1]),
        MEGAMASK_PARENT_PID=str(os.getpid()),
    )
    environment[_REPORT_VARIABLE] = str(folder / f"report-{rank}.json")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world_size)))
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    environment["MEGAMASK_STORE_FD"] = str(listener.fileno())  # tells every rank how they meet; rank 0 inherits it
    with (folder / f"stderr-{rank}").open("wb") as log, _held_back():
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=environment,
            pass_fds=(listener.fileno(),) if rank == 0 else (),
            stdin=None if rank == 0 else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if rank == 0 else log,
            # its own session: a terminal's Ctrl-C reaches the ranks once, through the forwarding
            start_new_session=True,
        )


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """A process that is started here begins with these signals blocked: none can kill it before it has its handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _forwarding_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int, _frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], on_killed: Callable[[int, int, int], None] | None
) -> tuple[list[int], set[int]]:
    """Returns when all have ended; once one has failed, the rest end by themselves or are stopped.

    Returns: the ranks in the order in which they ended, and those that had to be stopped.
    """
    deadline: float | None = None
    ended: list[int] = []
    stopped: set[int] = set()
    while len(ended) < len(processes):
        codes = [process.poll() for process in processes]  # of every rank, whoever else still lives
        news = [(rank, code) for rank, code in enumerate(codes) if code is not None and rank not in ended]
        ended += [rank for rank, _ in news]
        for rank, code in news:
            if code < 0 and rank not in stopped and on_killed is not None:
                on_killed(processes[0].pid, rank, -code)
        if deadline is None and any(code not in (None, *_AGREED) for code in codes):
            refused = codes[0] in (ExitCode.USAGE, ExitCode.DATA_INTEGRITY)
            deadline = time.monotonic() + (REFUSAL_GRACE_S if refused else FAILURE_GRACE_S)
        if deadline is not None and time.monotonic() > deadline:
            for rank in (rank for rank, code in enumerate(codes) if code is None):
                processes[rank].kill()
                stopped.add(rank)
        time.sleep(_POLL_S)
    return ended, stopped


def _report(folder: Path, rank: int) -> MegamaskError | None:
    try:
        stored = json.loads((folder / f"report-{rank}.json").read_text(encoding="utf-8"))
        return error_with_code(stored["exit_code"], stored["message"], hint=stored["hint"])
    except (FileNotFoundError, ValueError):  # none was left, or the rank died while writing it
        return None


def _stderr_tail(folder: Path, rank: int) -> str:
    return (folder / f"stderr-{rank}").read_bytes()[-8192:].decode(errors="replace").strip()
