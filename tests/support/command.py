"""Runs the real command line, as a user does, and reads what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "run" / "tiny.yaml"
# What may differ between two runs of one config (docs/formats.md, "Journal").
VOLATILE = {"time", "prev", "seq", "seconds", "tokens_per_second", "mfu", "peak_memory_bytes"}


@dataclass(frozen=True)
class Result:
    """End of a command."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The JSON object of the last line of stdout."""
        answer: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return answer


def environment() -> dict[str, str]:
    """The environment of a user's shell: no launcher's variables, one thread per process."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    return {**kept, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def command(*arguments: object) -> list[str]:
    """`megamask ARGUMENTS` as an argument list."""
    return [sys.executable, "-m", "megamask_pipelines.cli.main", *map(str, arguments)]


def megamask(*arguments: object, cwd: Path | None = None, timeout: float = 240) -> Result:
    """Runs `megamask ARGUMENTS` to its end."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, env=environment(), cwd=cwd, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def start(*arguments: object) -> subprocess.Popen[str]:
    """Starts `megamask ARGUMENTS` and returns the process."""
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def tiny(corpus: Path, output_dir: Path, name: str, *overrides: str) -> list[str]:
    """Arguments of `train` for the tiny run on a test's corpus, without MLflow unless an override asks for it."""
    return [
        str(TINY),
        f"data.corpora.main={corpus}",
        f"run.output_dir={output_dir}",
        f"run.name={name}",
        "training.sequence_length=64",
        "tracking.mlflow.enabled=false",
        *overrides,
    ]


def journal(run_dir: Path) -> list[dict[str, Any]]:
    """All journal records of a run, in order."""
    files = sorted((run_dir / "journal").glob("attempt-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def step_lines(run_dir: Path) -> dict[int, dict[str, Any]]:
    """For each step the record of the highest attempt, without what may differ between two runs."""
    steps = {record["step"]: record for record in journal(run_dir) if record["kind"] == "step"}
    return {step: {k: v for k, v in record.items() if k not in VOLATILE} for step, record in steps.items()}


def checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoint folders, oldest first."""
    return sorted(commit.parent for commit in (run_dir / "checkpoints").glob("*/COMMIT.json"))
