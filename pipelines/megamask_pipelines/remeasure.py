"""The bound of a run's newest checkpoint, measured again by the engine under the layout that recorded it.

On the machine that recorded it the bound repeats exactly: same weights, masks, passes and order of sums. Elsewhere, or
under other libraries, it is compared to within the rounding of such sums, and the report says so.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.audit.bound import Remeasurement, compare, differences, newest_with_bound
from megamask.audit.corpora import corpus_folders
from megamask.audit.report import Report
from megamask.config.load import load_stored_config
from megamask.config.schema.roots import TrainConfig
from megamask.data.manifest import MANIFEST_NAME
from megamask.launch.failures import failure_of
from megamask.launch.local import run_local_ranks
from megamask.runs.layout import config_path
from megamask.storage.ranges import is_remote
from megamask.tracking.journal.seek import newest_start

_RANK = "megamask_pipelines.remeasure_rank"


def remeasure(run_dir: Path, corpora: Mapping[str, str], report: Report) -> None:
    """Evaluate the newest checkpoint that has a bound, and compare; a finding if the two differ.

    What cannot be measured (no bound, a damaged checkpoint, a corpus that is away) is reported as not covered.

    Raises:
        MegamaskError: the layout does not fit this machine, a corpus is damaged, or a rank failed.
    """
    commit = newest_with_bound(run_dir, report)
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


def _is_reachable(folder: str) -> bool:
    return is_remote(folder) or Path(folder, MANIFEST_NAME).exists()


def _run(request: Remeasurement, config: TrainConfig, folder: Path) -> dict[str, Any]:
    path = folder / "request.json"
    request.write(path)
    if (failure := failure_of(run_local_ranks([str(path)], config.layout.num_processes, module=_RANK))) is not None:
        raise failure
    answer: dict[str, Any] = json.loads(Path(request.answer).read_text(encoding="utf-8"))
    return answer
