"""Check of a node's GPUs, in a process of its own: the node wrapper loads no torch and holds no memory of a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megamask.resilience.preflight.finding import Check, Finding

LIMIT_S = 14.0
_PROBE = ("-P", "-m", "megamask.engine.device_probe")
_HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that show none; Slurm's is the last


def gpu_checks(
    *, are_there: Callable[[], bool] | None = None, probe: Sequence[str] = _PROBE, limit_s: float = LIMIT_S
) -> list[Check]:
    """The check of the node's GPUs; no check where none is visible to this process.

    Args:
        are_there: whether GPUs are visible; None looks for the driver's device files.
        probe: arguments of the Python that asks them.
        limit_s: for the probe, its imports included.
    """
    if not (visible if are_there is None else are_there)():
        return []
    return [Check(name="GPUs", run=lambda: gpus(probe, limit_s), limit_s=limit_s + 1)]


def visible(devices: Path = Path("/dev")) -> bool:
    """Return whether this process may use a GPU of NVIDIA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in _HIDDEN:
        return False
    return any(path.name[6:].isdecimal() for path in devices.glob("nvidia*"))


def gpus(probe: Sequence[str] = _PROBE, limit_s: float = LIMIT_S) -> Finding:
    """Ask each GPU for a product whose every bit is known.

    Returns: "fail" only for what a GPU or its driver answered. A probe that does not end in time or cannot be started
        is a warning: slow storage for libraries is no fault of a GPU.
    """
    try:
        done = subprocess.run(
            [sys.executable, *probe],
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Finding(outcome="warn", message=f"the GPUs were not asked: torch did not load within {limit_s:g} s")
    try:
        answers = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding(outcome="warn", message=f"the GPUs were not asked: {last}")
    wrong = [f"{answer['device']}: {answer['message']}" for answer in answers if answer["outcome"] == "fail"]
    values = {"gpus": len(answers), "wrong": len(wrong)}
    if wrong:
        return Finding(outcome="fail", message="; ".join(wrong), values=values)
    if not answers:
        return Finding(outcome="skip", message="this torch is a build without CUDA", values=values)
    return Finding(outcome="pass", message=f"{len(answers)} GPUs: products are exact", values=values)
