"""Two nodes of a job as processes of this machine."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from support.command import checkpoints, command, environment


def node(
    arguments: list[str], number: int, token: str, port: int = 0, *, num_nodes: int = 2, prefix: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start `megamask launch node ARGUMENTS` as one of two nodes.

    Args:
        prefix: words before the command, of a program that starts it elsewhere.
    """
    place = {
        "MEGAMASK_NODE_RANK": str(number),
        "MEGAMASK_NUM_NODES": str(num_nodes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MEGAMASK_LAUNCH_TOKEN": token,
        "GLOO_SOCKET_IFNAME": "lo",
        "NODE_NAME": f"host-{number}",
    }
    return subprocess.Popen(
        [*prefix, *command("launch", "node", *arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **place},
    )


def ends(nodes: list[subprocess.Popen[str]], seconds: float = 400) -> tuple[list[int], str]:
    """Wait for the nodes; return their exit codes and stderr."""
    try:
        errors = "\n".join(process.communicate(timeout=seconds)[1] for process in nodes)
    finally:
        for process in nodes:
            process.kill()
    return [process.returncode for process in nodes], errors


def wait_for_commit(run_dir: Path) -> None:
    """Wait until a run has a checkpoint."""
    deadline = time.monotonic() + 400
    while not (run_dir.is_dir() and checkpoints(run_dir)):
        assert time.monotonic() < deadline, "no commit within 400 s"
        time.sleep(0.05)


def wait_for_attempt(run_dir: Path, attempt: int) -> None:
    """Wait until status.json is that of an attempt."""
    deadline = time.monotonic() + 400
    while json.loads((run_dir / "status.json").read_text())["attempt"] != attempt:
        assert time.monotonic() < deadline, f"attempt {attempt} did not open status.json within 400 s"
        time.sleep(0.05)


def ranks(launcher: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of a launcher's ranks."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
