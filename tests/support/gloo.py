"""Starts N processes that meet over gloo without anybody choosing a port, and collects what each of them returns."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_RUNNER = """
import importlib.util, json, sys
from megamask.engine.backend import select_backend
from megamask.engine.process_group import destroy_process_group, init_process_group
specification = importlib.util.spec_from_file_location("worker", sys.argv[1])
worker = importlib.util.module_from_spec(specification)
sys.modules["worker"] = worker
specification.loader.exec_module(worker)
init_process_group(select_backend())
answer = getattr(worker, sys.argv[2])(**json.loads(sys.argv[3]))
with open(sys.argv[4], "w") as file:
    json.dump(answer, file)
destroy_process_group()
"""


def run_gloo(
    num_processes: int,
    script: str | Path,
    function: str,
    *,
    timeout_s: float = 280,
    on_devices: bool = False,
    **arguments: Any,
) -> list:
    """Calls a function of a script in each of N processes with an initialised process group.

    With on_devices each process has a GPU of its own and the group is NCCL's; libraries may write to the log then.

    Arguments and answers travel as JSON. Returns the answers in rank order. If a process fails, all are ended and the
    error of each that printed something is raised, the first to fail first.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        listening.set_inheritable(True)
        processes = [
            _start(
                rank, num_processes, listening, Path(folder), [str(script), function, json.dumps(arguments)], on_devices
            )
            for rank in range(num_processes)
        ]
        try:
            _wait(processes, Path(folder), timeout_s, is_silent=not on_devices)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_processes)]


def _start(
    rank: int, num_processes: int, listening: socket.socket, folder: Path, arguments: list[str], on_devices: bool
) -> subprocess.Popen:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listening.getsockname()[1]),
        "MEGAMASK_STORE_FD": str(listening.fileno()),
        "OMP_NUM_THREADS": "1",
        **({} if on_devices else {"CUDA_VISIBLE_DEVICES": ""}),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _RUNNER, *arguments, str(folder / f"{rank}.json")],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[listening.fileno()] if rank == 0 else [],
        )


def _wait(processes: list[subprocess.Popen], folder: Path, timeout_s: float, *, is_silent: bool) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            time.sleep(1 if failed else 0)  # the others print in a moment what they make of it
            raise AssertionError(_report(processes, folder, failed, timeout_s))
        time.sleep(0.05)
    if failed := [rank for rank, process in enumerate(processes) if process.returncode != 0]:
        raise AssertionError(_report(processes, folder, failed, timeout_s))
    if is_silent and any((folder / f"{rank}.log").stat().st_size for rank in range(len(processes))):
        raise AssertionError(_report(processes, folder, [], timeout_s))


def _report(processes: list[subprocess.Popen], folder: Path, failed: list[int], timeout_s: float) -> str:
    is_over = all(process.poll() is not None for process in processes)
    parts = [f"ranks {failed} failed" if failed else "it was not silent" if is_over else f"not done in {timeout_s} s"]
    for rank in failed + [rank for rank in range(len(processes)) if rank not in failed]:
        if text := (folder / f"{rank}.log").read_text(errors="replace").strip():
            parts.append(f"--- rank {rank}, exit code {processes[rank].poll()} ---\n{text[-6000:]}")
    return "\n".join(parts)
