"""Start the ranks of one node and report how each of them ended.

The laptop (`local.py`) and a node of a cluster (`node.py`) use the same code; `watch.py` watches the processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megamask.config.schema.watchdog import WatchdogConfig
from megamask.launch.failures import RankExit
from megamask.launch.rank_folder import RankFolder, rank_folder
from megamask.launch.watch import Observer, StopGrace, Watch
from megamask.resilience.signals import STOP_SIGNALS, StopRequest
from megamask.storage.fault_points import reached


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
    grace: StopGrace | None = None,
    watchdog: WatchdogConfig | None = None,
    observer: Observer | None = None,
) -> list[RankExit]:
    """Run `python -P -m MODULE ARGUMENTS` once per rank of the node and wait for all of them.

    The first rank keeps this process's stdin and stderr. No rank keeps stdout: the caller prints the result. Signals of
    STOP_SIGNALS go to every rank once; ranks that do not end in time (`grace`) are killed, and so are all of them when
    one exceeds the watchdog's limits; without a watchdog none is watched. The ranks die with this process.

    Returns: one RankExit per rank, in rank order.
    """
    observer = observer or Observer()
    with rank_folder() as folder:
        watch = Watch(gang.ranks, folder, grace or StopGrace(), watchdog or WatchdogConfig(enabled=False), observer)
        try:
            with watch.forwarding():
                for rank in gang.ranks:
                    watch.processes.append(_start([module, *arguments], gang, rank, folder))
                    reached("launch.rank_started")
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
                was_hung=rank in watch.hung,
                closed_step=folder.closed_step(rank),
                report=watch.hang if rank in watch.hung else folder.report(rank),
                stderr_tail=folder.stderr_tail(rank),
            )
            for rank, process in zip(gang.ranks, watch.processes, strict=True)
        ]


def rank_environment(gang: Gang, rank: int) -> dict[str, str]:
    """Return the environment of a rank: this process's own, and the rank's place."""
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


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block STOP_SIGNALS, so that a process that is started here cannot be killed before its handlers are there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(arguments: Sequence[str], gang: Gang, rank: int, folder: RankFolder) -> subprocess.Popen[bytes]:
    environment = {**rank_environment(gang, rank), **folder.prepare(rank)}
    is_first = rank == gang.first_rank
    inherited = (gang.listener.fileno(),) if rank == 0 and gang.listener is not None else ()
    with folder.stderr(rank).open("wb") as log, signals_blocked():
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
