"""The bound of a run's newest checkpoint, measured again by the engine under the layout that recorded it.

On the machine that recorded it the bound repeats exactly: same weights, masks, passes and order of sums. Elsewhere, or
under other libraries, it is compared to within the rounding of such sums, and the report says so.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megamask.audit.corpora import corpus_folders
from megamask.audit.report import Report
from megamask.checkpoint.commit import Commit
from megamask.checkpoint.integrity import verify_folder
from megamask.checkpoint.reader import candidates
from megamask.config.load import load_stored_config
from megamask.config.schema.roots import TrainConfig
from megamask.data.manifest import MANIFEST_NAME
from megamask.errors import CheckpointIntegrityError
from megamask.launch.failures import failure_of
from megamask.launch.local import run_local_ranks
from megamask.provenance.record import code_version, library_versions
from megamask.resilience.process_facts import node_name
from megamask.runs.layout import config_path
from megamask.storage.ranges import is_remote
from megamask.tracking.journal.seek import newest_start
from megamask.tracking.records import AttemptStarted

_RANK = "megamask_pipelines.remeasure_rank"
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


def remeasure(run_dir: Path, corpora: Mapping[str, str], report: Report) -> None:
    """Evaluate the newest checkpoint that has a bound, and compare; a finding if the two differ.

    What cannot be measured (no bound, a damaged checkpoint, a corpus that is away) is reported as not covered.

    Raises:
        MegamaskError: the layout does not fit this machine, a corpus is damaged, or a rank failed.
    """
    commit = _newest_with_bound(run_dir, report)
    if commit is None:
        return
    stored = config_path(run_dir, commit.attempt)
    config = load_stored_config(stored)
    given = corpus_folders(run_dir, config, corpora)
    folders = {name: given.get(name) for name in config.data.corpora}
    if away := [name for name, folder in folders.items() if folder is None or not _is_reachable(folder)]:
        report.not_covered.append(f"the bound (corpus {away[0]} is not reachable; --corpus {away[0]}=FOLDER)")
        return
    started = newest_start(run_dir, before=commit.attempt + 1)
    if started is not None and started.attempt != commit.attempt:
        started = None
    with tempfile.TemporaryDirectory(prefix="megamask-remeasure-") as folder:
        request = Remeasurement(
            run_dir=str(run_dir.resolve()),
            checkpoint=commit.folder.name,
            step=commit.step,
            config=str(stored.resolve()),
            corpora={name: str(place) for name, place in folders.items()},
            num_threads=None if started is None else started.num_threads,
            answer=str(Path(folder, "answer.json")),
        )
        measured = _run(request, config, Path(folder))
    other = differences(started, device=measured["device"])
    compare(commit, measured["nelbo_nats_per_token"], config.precision.compute, other, report)


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


def _newest_with_bound(run_dir: Path, report: Report) -> Commit | None:
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


def _is_reachable(folder: str) -> bool:
    return is_remote(folder) or Path(folder, MANIFEST_NAME).exists()


def _run(request: Remeasurement, config: TrainConfig, folder: Path) -> dict[str, Any]:
    path = folder / "request.json"
    request.write(path)
    if (failure := failure_of(run_local_ranks([str(path)], config.layout.num_processes, module=_RANK))) is not None:
        raise failure
    answer: dict[str, Any] = json.loads(Path(request.answer).read_text(encoding="utf-8"))
    return answer
