"""`python -m support.faulty_main ARGUMENTS`: the command line with one fault armed in the rank that FAULT names.

FAULT is JSON: `point` (of megamask.storage.fault_points), `nth` (which time it is reached), `rank` (null: every rank),
`folder`, and `action`: "hold" leaves a file `held-PID` there and waits for a file `go`; "fail" writes the number of
journalled steps into a file `failed` and raises ENOSPC; "kill" ends the process by SIGKILL; "list" writes every point
that is reached into `points-PID`. `poison` multiplies the gradients of every batch with one of `samples` by `factor`,
on the rank that `poisoned_rank` names (null: every one).
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
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


def _poison(poison: dict[str, Any]) -> None:
    """Spoil the gradients of some samples, as damaged data or a broken device would."""
    from megamask.data.loader import Loader
    from megamask.engine.optimizer import ShardedAdamW
    from megamask.engine.parameters import named_parameters

    plain_batch, plain_norm, samples = Loader.batch, ShardedAdamW.squared_gradient_norm, set(poison["samples"])
    is_due = [False]

    def batch(self: Loader, position: int, size: int, members: Any) -> Any:
        is_due[0] = any(samples & set(each) for each in self.skipped.segments(position, size))
        return plain_batch(self, position, size, members)

    def squared_gradient_norm(self: ShardedAdamW) -> Any:  # a tensor; this module must not load torch by itself
        if is_due[0] and poison["rank"] in (None, int(os.environ.get("RANK", "0"))):
            for _, parameter in named_parameters([chunk.module for chunk in self._chunks]):
                parameter.main_grad.mul_(poison["factor"])
        return plain_norm(self)

    Loader.batch, ShardedAdamW.squared_gradient_norm = batch, squared_gradient_norm  # type: ignore[method-assign]


def _arm(fault: dict[str, Any]) -> None:
    if fault["action"] == "list":
        path = Path(fault["folder"]) / f"points-{os.getpid()}"
        reached = set[str]()
        fault_points.follow(lambda point: (reached.add(point), path.write_text("\n".join(sorted(reached)))))
        return
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
        elif fault["action"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            (folder / "failed").write_text(str(max(step_lines(Path(fault["run_dir"])), default=0)))
            raise OSError(errno.ENOSPC, "No space left on device")

    fault_points.arm(fault["point"], act)


if __name__ == "__main__":
    fault = json.loads(os.environ["FAULT"])
    if "poison" in fault:
        _poison(fault["poison"])
    if "point" in fault and (fault["rank"] is None or os.environ.get("RANK") == str(fault["rank"])):
        _arm(fault)
    local_ranks.run_local_ranks = functools.partial(run_local_ranks, module="support.faulty_main")
    sys.exit(main(sys.argv[1:]))
