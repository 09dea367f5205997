"""Python stacks of a process that does not answer, asked for by another one.

The handler of `faulthandler` is written in C and runs at once, also while the main thread waits inside a C++ library;
the process goes on afterwards.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import time
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

VARIABLE = "MEGAMASK_STACKS"
SIGNAL = signal.SIGUSR2
# Files whose functions wait for other ranks.
_WAITS = (
    "/torch/distributed/",
    "/megatron/core/distributed/",
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megamask/engine/collectives.py",
)
# A wait may lie below a few frames of wrappers.
_INNERMOST = 4
_POLL_S = 0.05
_SETTLED_S = 1.0
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')
_kept_open: list[FileIO] = []


def offer_stacks() -> None:
    """Let the launcher that named a file in MEGAMASK_STACKS ask this process for its stacks, by SIGUSR2."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    with contextlib.suppress(OSError):  # a launcher that has gone away takes its folder along
        file = FileIO(name, "w")
        _kept_open.append(file)
        faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The innermost place of a thread: file, line and function."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        parts = Path(self.file).parts
        return f"{self.function} ({'/'.join(parts[-3:])}:{self.line})"


def innermost_frames(stacks: str) -> list[Frame]:
    """Return the innermost frames of the main thread: of the one that took the signal, else the one listed last."""
    threads: list[list[Frame]] = []
    current: list[Frame] | None = None
    for line in stacks.splitlines():
        if line.startswith(("Thread ", "Current thread ")):
            threads.append([])
            if line.startswith("Current"):
                current = threads[-1]
        elif threads and (found := _FRAME.match(line)):
            threads[-1].append(Frame(file=found["file"], line=int(found["line"]), function=found["function"]))
    chosen = current or next((frames for frames in reversed(threads) if frames), [])
    return chosen[:_INNERMOST]


def waits_for_others(frames: list[Frame]) -> bool:
    """Return whether a thread is in a function that waits for other ranks."""
    return any(part in frame.file for frame in frames for part in _WAITS)


def ask_for_stacks(pid: int) -> None:
    """Ask a process for its stacks; one that is stopped answers when it goes on."""
    if _takes_signal(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGNAL)


def wait_for_stacks(path: Path, seconds: float) -> str:
    """Return the stacks in a file as soon as it is complete; empty if the process does not answer in time."""
    now = time.monotonic()
    deadline, size, changed = now + seconds, 0, now
    # complete when nothing was added for a while: the end of stacks carries no mark
    while now < deadline and not (size and now - changed > _SETTLED_S and _ends_a_line(path)):
        time.sleep(_POLL_S)
        now, found = time.monotonic(), _size_of(path)
        if found != size:
            size, changed = found, now
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _size_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _ends_a_line(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.read_bytes()[-1:] == b"\n"
    return False


def process_state(pid: int) -> str:
    """Return the state of a process as proc(5) names it, as "T (stopped)"; "gone" where there is none."""
    return _status(pid).get("State", "gone").replace("\t", " ")


def kernel_wait(pid: int) -> str:
    """Return the kernel function that a process waits in, for one that gives no stacks; "-" where it is unknown."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/wchan").read_text(encoding="ascii").strip() or "-"
    return "-"


def _takes_signal(pid: int) -> bool:
    """Return whether the process has a handler: without one the signal would end it."""
    return bool(int(_status(pid).get("SigCgt", "0"), 16) >> (SIGNAL - 1) & 1)


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
