"""Watching a training process from outside: memory, threads, descriptors and files while its steps go by."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from megamask.tracking.journal.seek import last_step
from support.command import command, environment


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Resources of a process and its run directory at a moment; the journal's files, which grow, are not counted."""

    step: int
    resident_kib: int
    num_threads: int
    num_descriptors: int
    num_files: int


def train_watched(
    arguments: list[str], run_dir: Path, log: Path, *, every_s: float, timeout_s: float
) -> tuple[int, list[Sample]]:
    """Runs `megamask train`, looking at it every so often from its first step on.

    Returns: the exit code and the samples.
    """
    samples: list[Sample] = []
    deadline = time.monotonic() + timeout_s
    with log.open("wb") as output:
        process = subprocess.Popen(command("train", *arguments), stdout=output, stderr=output, env=environment())
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done in {timeout_s} s, at step {samples[-1].step if samples else 0}")
                if (sample := look(process.pid, run_dir)) is not None:
                    samples.append(sample)
                time.sleep(every_s)
        finally:
            process.kill()
            process.wait()
    return process.returncode, samples


def look(pid: int, run_dir: Path) -> Sample | None:
    """A sample, or None before the first step and when the process ends meanwhile."""
    line = last_step(run_dir)
    if line is None:
        return None
    try:
        status = Path("/proc", str(pid), "status").read_text(encoding="ascii")
        num_descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208  the links are not followed
    except OSError:
        return None
    facts = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, flags=re.M))
    if "VmRSS" not in facts:  # it has ended and is not yet waited for
        return None
    return Sample(
        step=line["step"],
        resident_kib=int(facts["VmRSS"]),
        num_threads=int(facts["Threads"]),
        num_descriptors=num_descriptors,
        num_files=sum(len(files) for folder, _, files in os.walk(run_dir) if Path(folder).name != "journal"),
    )


def between(samples: list[Sample], first: float, last: float) -> list[Sample]:
    """The samples taken in steps first to last."""
    return [sample for sample in samples if first <= sample.step <= last]
