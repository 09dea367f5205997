"""`python -m support.faulty_main ARGUMENTS`: the command line with one fault armed in the rank that FAULT names.

FAULT is JSON: `point` (of megamask.storage.fault_points), `nth` (which time it is reached), `rank` (null: every rank),
`folder`, and `action`: "hold" leaves a file `held-PID` there and waits for a file `go`; "fail" writes the number of
journalled steps into a file `failed` and raises ENOSPC.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megamask.launch.local import run_local_ranks
from megamask.storage import fault_points
from megamask_pipelines import local_ranks
from megamask_pipelines.cli.main import main
from support.command import environment, step_lines


def start_with_fault(arguments: list[str], fault: dict[str, Any]) -> subprocess.Popen[str]:
    """Starts `megamask ARGUMENTS` with the fault."""
    return subprocess.Popen(
        [sys.executable, "-m", "support.faulty_main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), "FAULT": json.dumps(fault), "PYTHONPATH": str(Path(__file__).parents[1])},
    )


def _arm(fault: dict[str, Any]) -> None:
    seen: list[str] = []
    folder = Path(fault["folder"])

    def act() -> None:
        seen.append(fault["point"])
        if len(seen) != fault["nth"]:
            return
        if fault["action"] == "hold":
            (folder / f"held-{os.getpid()}").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        else:
            (folder / "failed").write_text(str(max(step_lines(Path(fault["run_dir"])), default=0)))
            raise OSError(errno.ENOSPC, "No space left on device")

    fault_points.arm(fault["point"], act)


if __name__ == "__main__":
    told = json.loads(os.environ["FAULT"])
    if told["rank"] is None or os.environ.get("RANK") == str(told["rank"]):
        _arm(told)
    local_ranks.run_local_ranks = functools.partial(run_local_ranks, module="support.faulty_main")
    sys.exit(main(sys.argv[1:]))
