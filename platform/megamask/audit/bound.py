"""A bound that was recorded, compared with the same bound measured again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from megamask.audit.report import Report
from megamask.checkpoint.commit import Commit
from megamask.checkpoint.integrity import verify_folder
from megamask.checkpoint.reader import candidates
from megamask.errors import CheckpointIntegrityError
from megamask.provenance.record import code_version, library_versions
from megamask.resilience.process_facts import node_name
from megamask.tracking.records import AttemptStarted

# Largest relative difference between machines, by precision.compute: sums in another order.
_ROUNDING = {"fp32": 1e-4}
_ROUNDING_OF_HALF = 1e-2


@dataclass(frozen=True, kw_only=True)
class Remeasurement:
    """Request to the ranks.

    Args:
        run_dir: of the run, absolute.
        checkpoint: name of the folder in it.
        step: of the checkpoint.
        config: stored config of the attempt that committed it.
        corpora: absolute folder or URL by name.
        num_threads: of each rank, None for torch's own choice.
        answer: file for rank 0's answer: nelbo_nats_per_token and device.
    """

    run_dir: str
    checkpoint: str
    step: int
    config: str
    corpora: dict[str, str]
    num_threads: int | None
    answer: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write the request for the ranks."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def newest_with_bound(run_dir: Path, report: Report) -> Commit | None:
    """Return the newest commit with a bound; None, with a line in the report, if there is none or it is damaged."""
    for folder in candidates(run_dir):
        try:
            commit = verify_folder(folder)
        except CheckpointIntegrityError:
            report.not_covered.append(f"the bound (checkpoint {folder.name} is damaged)")
            return None
        if commit.bound is not None:
            return commit
    report.not_covered.append("the bound (no checkpoint of the run names one)")
    return None


def compare(commit: Commit, measured: float, compute: str, other: list[str], report: Report) -> None:
    """Report whether a bound measured again is that of the commit.

    Args:
        compute: precision.compute of the run.
        other: what differs from where the bound was recorded; empty where it must repeat exactly.
    """
    name, bound = commit.folder.name, commit.bound
    tolerance = _ROUNDING.get(compute, _ROUNDING_OF_HALF) if other else 0.0
    if bound is None or not math.isclose(measured, bound, rel_tol=tolerance):
        report.find(
            f"checkpoints/{name}/COMMIT.json", f"nelbo_nats_per_token is {bound}; measured again it is {measured}"
        )
    how = f"to within {tolerance:g} (it was recorded with another {', '.join(other)})" if other else "exactly"
    report.covered.append(f"the bound of {name}, measured again and compared {how}")


def differences(started: AttemptStarted | None, *, device: str) -> list[str]:
    """Return what differs from the machine and program that recorded a bound, as words."""
    if started is None:
        return ["machine, which is not recorded"]
    facts = {
        "host": (started.host, node_name()),
        "device": (started.device, device),
        "code": (started.code_version, code_version()),
        "libraries": (started.libraries, dict(library_versions())),
        "number of threads, which is not recorded": (started.num_threads is not None, True),
    }
    return [name for name, (recorded, present) in facts.items() if recorded != present]
