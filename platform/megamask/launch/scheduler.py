"""Submission of a rendered job to the command of a scheduler, on the machine where that command is."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from megamask.errors import UsageError
from megamask.launch.job import Job

_ANSWER_S = 120.0
SUBMIT = {"slurm": ("sbatch", "--parsable"), "kubernetes": ("kubectl", "create", "--filename=-")}
TEST = {"slurm": ("sbatch", "--test-only"), "kubernetes": ("kubectl", "create", "--dry-run=server", "--filename=-")}


def refuse_missing_secrets(job: Job) -> None:
    """A variable that is not set here would end the job at its start, perhaps hours from now."""
    for name, entry in sorted(job.secrets.items()):
        if entry is None and not os.environ.get(name):
            raise UsageError(
                f"launch.secrets.{name} is env:{name}, but the environment variable {name} is not set. Nothing was "
                "submitted.",
                hint=f"export {name}=...",
            )


def ask(command: Sequence[str], text: str, *, required: bool) -> str | None:
    """Hand a job to a scheduler's command; return its answer, or None where the command is missing."""
    if shutil.which(command[0]) is None:
        if required:
            raise UsageError(
                f"{command[0]} is not on this machine. Nothing was submitted.",
                hint="run this on a login node, or write the job with --output FILE and submit it there",
            )
        return None
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{command[0]} did not answer within {_ANSWER_S:.0f} s. It may have taken the job.") from error
    reply = "\n".join(filter(None, (done.stdout.strip(), done.stderr.strip())))
    if done.returncode != 0:
        raise UsageError(
            f"{' '.join(command)} refuses the job (exit code {done.returncode}): {reply}. Nothing was submitted.",
            hint="change the keys of launch that it names; `megamask explain launch` shows them",
        )
    return reply
