"""Checks of a host that need no device: storage, clock, memory, limits, network names."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from megamask.resilience.preflight.finding import Check, Finding
from megamask.storage.durable import create_exclusive

_WRITES = 5
_PROBE_BYTES = 16 << 20
_MIN_SHARED_MEMORY = 64 << 20  # torch's data exchange between processes of a node
_MIN_OPEN_FILES = 4096
_MAX_CLOCK_SKEW_S = 30.0
_SLOW_FLUSH_S = 0.5


def host_checks(folder: Path, *, needed_bytes: int = 1 << 30, port: int | None = None) -> list[Check]:
    """The checks of a host.

    Args:
        folder: where runs are kept; it or its nearest existing parent is tried.
        needed_bytes: free space that a run needs.
        port: that rank 0 will listen on; None means any free one.
    """
    return [
        Check(name="storage", run=lambda: storage(folder), limit_s=20.0),
        Check(name="free space", run=lambda: free_space(folder, needed_bytes)),
        Check(name="clock", run=lambda: clock(folder)),
        Check(name="temporary folder", run=temporary_folder),
        Check(name="shared memory", run=shared_memory),
        Check(name="memory", run=memory),
        Check(name="open files", run=open_files),
        Check(name="network name", run=network_name),
        Check(name="port", run=lambda: free_port(port)),
    ]


def storage(folder: Path) -> Finding:
    """Write, flush and remove small files as a commit does, and one of 16 MiB for the rate."""
    with _probe_folder(folder) as probe:
        flushes = []
        for number in range(_WRITES):
            started = time.perf_counter()
            create_exclusive(probe / f"{number}", b"x" * 4096)
            flushes.append(time.perf_counter() - started)
        rate = _write_rate(probe / "large")
        try:
            create_exclusive(probe / "0", b"")
        except FileExistsError:
            pass
        else:
            message = f"{folder} let two processes create the same file, so commits would not be safe there"
            return Finding(outcome="fail", message=message)
    median = statistics.median(flushes)
    values = {"flush_s": median, "write_bytes_per_s": rate}
    message = f"{folder}: a small file is durable in {median * 1e3:.1f} ms, {rate / 1e6:,.0f} MB/s"
    if median > _SLOW_FLUSH_S:
        return Finding(outcome="warn", message=f"{message}; commits will be slow", values=values)
    return Finding(outcome="pass", message=message, values=values)


def free_space(folder: Path, needed_bytes: int) -> Finding:
    """Compare the free space with what a run needs."""
    free = shutil.disk_usage(_existing(folder)).free
    values = {"free_bytes": free, "needed_bytes": needed_bytes}
    message = f"{free / 1e9:,.1f} GB free, {needed_bytes / 1e9:,.1f} GB needed"
    return Finding(outcome="pass" if free >= needed_bytes else "fail", message=message, values=values)


def clock(folder: Path) -> Finding:
    """Compare the host's clock with the one that the storage stamps files with."""
    with _probe_folder(folder) as probe:
        before = time.time()
        create_exclusive(probe / "now", b"")
        after = time.time()
        written = (probe / "now").stat().st_mtime
    skew = max(before - written, written - after, 0.0)
    values = {"skew_s": skew}
    if skew > _MAX_CLOCK_SKEW_S:
        message = (
            f"the clock of this host and that of {folder} differ by {skew:.0f} s; allowed: {_MAX_CLOCK_SKEW_S:.0f} s"
        )
        return Finding(outcome="fail", message=message, values=values)
    return Finding(outcome="pass", message=f"{skew:.1f} s from the storage's", values=values)


def temporary_folder() -> Finding:
    """Find a folder for temporary files and write to it."""
    folder = Path(tempfile.gettempdir())
    with _probe_folder(folder):
        free = shutil.disk_usage(folder).free
    return Finding(outcome="pass", message=f"{folder}, {free / 1e9:,.1f} GB free", values={"free_bytes": free})


def shared_memory() -> Finding:
    """Look at the size of /dev/shm, which containers often get 64 MB of."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding(outcome="skip", message="this system has no /dev/shm")
    free = shutil.disk_usage(path).free
    values = {"free_bytes": free}
    if free < _MIN_SHARED_MEMORY:
        message = f"/dev/shm has {free / 1e6:.0f} MB free; allowed: 64 MB or more (in a pod: a volume of medium Memory)"
        return Finding(outcome="fail", message=message, values=values)
    return Finding(outcome="pass", message=f"{free / 1e9:,.2f} GB free", values=values)


def memory() -> Finding:
    """Read the host's memory and the limit of the control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _control_group_limit()
    values = {"total_bytes": total, "limit_bytes": limit, "cpus": len(os.sched_getaffinity(0))}
    shown = f", of which this process may use {limit / 1e9:,.1f} GB" if limit is not None and limit < total else ""
    message = f"{total / 1e9:,.1f} GB{shown}; {values['cpus']} CPUs"
    return Finding(outcome="pass", message=message, values=values)


def open_files() -> Finding:
    """Compare the hard limit of open files with what a rank may need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    values = {"soft": soft, "hard": hard}
    if hard != resource.RLIM_INFINITY and hard < _MIN_OPEN_FILES:
        message = f"at most {hard}; {_MIN_OPEN_FILES} or more are advised (ulimit -Hn)"
        return Finding(outcome="warn", message=message, values=values)
    return Finding(outcome="pass", message=f"{soft}, raised to {hard} where needed", values=values)


def network_name() -> Finding:
    """Resolve the host's own name and that of the loopback device."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo("localhost", None)
    except OSError:
        return Finding(
            outcome="fail", message="localhost does not resolve; add it to /etc/hosts", values={"name": name}
        )
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        message = f"{name} does not resolve to an address; jobs of several nodes need names that do"
        return Finding(outcome="warn", message=message, values={"name": name})
    return Finding(outcome="pass", message=name, values={"name": name})


def free_port(port: int | None) -> Finding:
    """Listen at a port of every interface."""
    with socket.socket() as listener:
        try:
            listener.bind(("", port or 0))
            listener.listen(1)
        except OSError as error:
            return Finding(outcome="fail", message=f"port {port}: {error.strerror}", values={"port": port})
        found = listener.getsockname()[1]
    return Finding(outcome="pass", message=f"port {found} can be listened at", values={"port": found})


def _control_group_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _existing(folder: Path) -> Path:
    """The folder or its nearest parent that exists: nothing is created for a question."""
    folder = folder.expanduser().absolute()
    return next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))


@contextlib.contextmanager
def _probe_folder(folder: Path) -> Iterator[Path]:
    """A folder for probe files inside the nearest existing parent; removed with them."""
    probe = _existing(folder) / f".megamask-preflight-{uuid.uuid4().hex}"
    probe.mkdir()
    try:
        yield probe
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _write_rate(path: Path) -> float:
    """Bytes per second of a flushed file that does not compress."""
    data = os.urandom(_PROBE_BYTES)
    started = time.perf_counter()
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return _PROBE_BYTES / (time.perf_counter() - started)
