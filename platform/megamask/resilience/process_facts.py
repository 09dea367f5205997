"""Identity of a process, by which another one decides later whether it still runs."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class ProcessFacts:
    """Facts that distinguish a process from every other, over reboots, containers and reused process ids.

    Facts that the system does not give are None.

    Args:
        host: node name.
        boot_id: changes with every boot of the machine.
        pid_namespace: process ids of different namespaces (containers) are unrelated.
        pid: process id inside that namespace.
        process_start_time: clock ticks after boot; detects a reused process id.
    """

    host: str
    boot_id: str | None
    pid_namespace: str | None
    pid: int
    process_start_time: int | None

    def is_running_here(self) -> bool:
        """Return whether exactly this process runs on this host, in this pid namespace; zombies do not run."""
        here = facts_of(self.pid)
        return here is not None and here == self


def node_name() -> str:
    """This node as its scheduler calls it: NODE_NAME (set in pods), SLURMD_NODENAME, or the host name."""
    return os.environ.get("NODE_NAME") or os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def own_facts() -> ProcessFacts:
    """The facts of the calling process."""
    facts = facts_of(os.getpid())
    if facts is None:  # /proc without the own process is a broken system
        raise RuntimeError("the system does not show this process to itself; is /proc mounted for another namespace?")
    return facts


def own_age() -> float:
    """Seconds since the calling process was started, as exact as the system's clock ticks (10 ms); 0 where unknown."""
    facts = own_facts()
    if facts.process_start_time is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    started = facts.process_start_time / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def facts_of(pid: int) -> ProcessFacts | None:
    """The facts of a process of this host and namespace, or None if it does not run (a zombie does not)."""
    start_time: int | None = None
    if (_PROC / "self" / "stat").exists():
        try:
            stat = (_PROC / str(pid) / "stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, start_time = _parse_stat(stat)
        if state in ("Z", "X", "x"):
            return None
    elif not _answers(pid):
        return None
    return ProcessFacts(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        pid=pid,
        process_start_time=start_time,
    )


def _parse_stat(stat: bytes) -> tuple[str, int]:
    """State and start time; the command name is in parentheses and may itself contain spaces and parentheses."""
    fields = stat[stat.rindex(b")") + 2 :].split()
    return fields[0].decode(), int(fields[19])  # fields 3 and 22 of proc(5)


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot_id() -> str | None:
    with contextlib.suppress(OSError):
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return None


def _pid_namespace() -> str | None:
    with contextlib.suppress(OSError):
        return str((_PROC / "self/ns/pid").readlink())
    return None
