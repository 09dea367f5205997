"""Every path of a run directory, each in one function.

    run.json                          what the run is
    config/attempt-NNNN.yaml          resolved settings of each attempt
    attempts/NNNN/claim.json          owner of the attempt
    attempts/NNNN/rank-RRRRR.json     failure record of a rank
    attempts/NNNN/stacks-RRRRR.txt    Python stacks of a rank of a job that hung
    status.json                       last known state
    skips.json                        samples that the run leaves out; only after a rewind
    journal/attempt-NNNN-RRR.jsonl    record of the run
    checkpoints/                      commits
    tracking/                         state of the MLflow reader

docs/formats.md describes the files.
"""

from __future__ import annotations

from pathlib import Path

RUN_RECORD = "run.json"
CHECKPOINTS = "checkpoints"
# A folder with one of these and without run.json is a run that has lost its record.
FOLDERS_OF_A_RUN = frozenset({"attempts", CHECKPOINTS, "journal"})


def run_path(output_dir: str, name: str) -> Path:
    """Return the run directory of run.output_dir and run.name."""
    return Path(output_dir) / name


def record_path(run_dir: Path) -> Path:
    """Return the path of run.json."""
    return run_dir / RUN_RECORD


def status_path(run_dir: Path) -> Path:
    """Return the path of status.json."""
    return run_dir / "status.json"


def skips_path(run_dir: Path) -> Path:
    """Return the path of skips.json, which a run without rewinds does not have."""
    return run_dir / "skips.json"


def configs_folder(run_dir: Path) -> Path:
    """Return the folder of the attempts' resolved configs."""
    return run_dir / "config"


def config_path(run_dir: Path, attempt: int) -> Path:
    """Return the path of an attempt's resolved config."""
    return configs_folder(run_dir) / f"attempt-{attempt:04d}.yaml"


def attempts_folder(run_dir: Path) -> Path:
    """Return the folder that holds a folder for each attempt."""
    return run_dir / "attempts"


def attempt_folder(run_dir: Path, attempt: int) -> Path:
    """Return the folder of an attempt's claim and its ranks' failure records."""
    return attempts_folder(run_dir) / f"{attempt:04d}"


def claim_path(run_dir: Path, attempt: int) -> Path:
    """Return the path of an attempt's claim."""
    return attempt_folder(run_dir, attempt) / "claim.json"


def rank_path(run_dir: Path, attempt: int, rank: int) -> Path:
    """Return the path of a rank's failure record."""
    return attempt_folder(run_dir, attempt) / f"rank-{rank:05d}.json"


def stacks_path(run_dir: Path, attempt: int, rank: int) -> Path:
    """Return the path of a rank's stacks."""
    return attempt_folder(run_dir, attempt) / f"stacks-{rank:05d}.txt"


def journal_folder(run_dir: Path) -> Path:
    """Return the folder of the journal's files."""
    return run_dir / "journal"


def journal_path(run_dir: Path, attempt: int, rotation: int) -> Path:
    """Return the path of one file of the journal."""
    return journal_folder(run_dir) / f"attempt-{attempt:04d}-{rotation:03d}.jsonl"


def checkpoints_folder(run_dir: Path) -> Path:
    """Return the folder of the commits."""
    return run_dir / CHECKPOINTS


def mlflow_state_path(run_dir: Path) -> Path:
    """Return the path of the MLflow reader's state."""
    return run_dir / "tracking" / "mlflow.json"
