"""A run directory and its corpus as version 0.1.0 wrote them, unpacked."""

from __future__ import annotations

import tarfile
from pathlib import Path

STORED = Path(__file__).parents[1] / "golden" / "run_of_0.1.0.tgz"
RUN_ID = "3e7cddb9b9dece314e9d89c051820b7e"


def unpack(folder: Path) -> Path:
    """Unpack `run` and `corpus` into a folder; return the run directory."""
    with tarfile.open(STORED) as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"
