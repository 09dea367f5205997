"""A signal after the end of the work does not change the exit code: schedulers send it when one process has left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.command import environment

# The interpreter's own end takes as long as a sleeping handler of it.
_PROGRAM = """
import atexit, pathlib, sys, time
atexit.register(time.sleep, 1)
atexit.register(pathlib.Path(sys.argv.pop(1)).touch)
from megamask_pipelines.cli.main import main
sys.exit(main())
"""


@pytest.mark.multiprocess
@pytest.mark.promise("A late signal does not change an exit code that is decided")
@pytest.mark.parametrize(("arguments", "code"), [(["explain", "run.seed"], 0), (["explain", "run.sed"], 2)])
def test_signal_after_the_work_does_not_change_the_code(tmp_path: Path, arguments: list[str], code: int) -> None:
    mark = tmp_path / "ending"
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(mark), *arguments], stdout=subprocess.DEVNULL, env=environment()
    )
    try:
        deadline = time.monotonic() + 60
        while not mark.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == code
    finally:
        process.kill()
