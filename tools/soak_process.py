"""Processes of a soak: real ones, forked from this program, which has imported torch and megatron-core already.

A fork costs milliseconds where a fresh interpreter needs seconds for its imports, so hundreds of restarts are
affordable. Everything else is the product's: the command line, the launcher, its signals, the ranks' environment. Only
`subprocess.Popen` of `megamask.launch.ranks` is replaced by a fork that takes the same arguments.

This program must stay without threads, or a fork would inherit their locks.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

# What an attempt imports.
_ATTEMPT = (
    "megamask.engine.engine",
    "megamask.engine.process_group",
    "megamask.evaluation.on_engine",
    "megamask.launch.local",
    "megamask.training.build",
    "megamask.training.loop",
    "megamask_pipelines.cli.train",
    "megamask_pipelines.pretrain",
)
CLONE_NEWNET = 0x40000000
_POLL_S = 0.005


def import_everything() -> None:
    """Import what an attempt needs, once."""
    for name in _ATTEMPT:
        importlib.import_module(name)


class ForkedProcess:
    """A forked child with the methods of `subprocess.Popen` that the launcher uses."""

    def __init__(self, run: Callable[[], int]) -> None:
        """Fork; the child returns the exit code of `run`."""
        if threading.active_count() > 1:
            raise RuntimeError(f"a fork needs a program without threads, this one has {threading.enumerate()}")
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run_and_leave(run)

    def poll(self) -> int | None:
        """The return code, negative for a signal; None while it runs."""
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it lives longer.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fork", timeout or 0.0)
            time.sleep(_POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def command(arguments: Sequence[str], environment: Mapping[str, str], log: Path, *prepare: Callable[[], object]) -> int:
    """Become `megamask ARGUMENTS`, in a child: a session, an environment and standard streams of its own.

    Args:
        prepare: called last before the command, e.g. to arm a fault.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _streams(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
    os.environ.clear()
    os.environ.update(environment)
    for action in prepare:
        action()
    return _command_line(arguments)


def replace_launch(in_rank: Callable[[int], object]) -> None:
    """Let the launcher of this process fork its ranks.

    Args:
        in_rank: called in each rank with its number, before its command.
    """
    from megamask.launch import ranks

    def popen(arguments: Sequence[str], **options: Any) -> ForkedProcess:
        return ForkedProcess(lambda: _rank(arguments[arguments.index("-m") + 2 :], in_rank, **options))

    ranks.subprocess = SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment,attr-defined]


def enter_namespace(name: str) -> None:
    """Move this process into a network namespace that `ip netns add` made."""
    descriptor = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"entering the network namespace {name}")
    os.close(descriptor)


def _rank(arguments: Sequence[str], in_rank: Callable[[int], object], **options: Any) -> int:
    """Become a rank as a fresh interpreter would: its environment and streams, nothing of the launcher's."""
    if options.get("start_new_session"):
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    log = options.get("stderr")
    errors = os.dup(2 if log is None else log.fileno())
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.dup2(errors, 2)
    kept = sorted({0, 1, 2, *options.get("pass_fds", ())})
    for low, high in zip(kept, [*kept[1:], 1 << 16], strict=True):
        os.closerange(low + 1, high)
    _python_streams()
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # the launcher's temporary folder is the launcher's to remove
    environment = options["env"]
    os.environ.clear()
    os.environ.update(environment)
    in_rank(int(environment["RANK"]))
    return _command_line(arguments)


def _command_line(arguments: Sequence[str]) -> int:
    from megamask_pipelines.cli.main import main

    sys.argv = ["megamask", *arguments]
    return main()


def _streams(log: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _python_streams()


def _python_streams() -> None:
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  until the process ends
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _run_and_leave(run: Callable[[], int]) -> NoReturn:
    code = 1
    try:
        code = run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  the outermost frame of the child
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
