"""End of a command's process with the exit code that was decided."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from megamask.resilience import daemon_threads
from megamask_pipelines import standard_streams


def settle(code: int) -> None:
    """Flush the streams, ignore late signals, and leave at once where the interpreter's own end is not safe."""
    _ignore_late_signals()
    standard_streams.settle()
    if daemon_threads.any_alive():
        _leave_at_once(code)
    if "torch" in sys.modules:
        atexit._run_exitfuncs()
        _leave_at_once(code)


def _ignore_late_signals() -> None:
    """Keep the exit code, which is decided: a scheduler ends a job's other processes as soon as the first has left."""
    import signal

    from megamask.resilience.signals import PREEMPTION_SIGNALS

    signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)


def _leave_at_once(code: int) -> NoReturn:
    """End the process without the interpreter's farewell, which may turn into SIGABRT.

    A thread inside a write does that, and sometimes a C++ thread of torch's that is still there when its objects are
    destroyed ("terminate called without an active exception").
    """
    import logging

    logging.shutdown()
    standard_streams.settle()
    os._exit(code)
