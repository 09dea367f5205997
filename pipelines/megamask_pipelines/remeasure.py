"""The bound of a run's newest checkpoint, measured again with the settings of the training that recorded it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from megamask.audit.corpora import corpus_folders
from megamask.audit.report import Report
from megamask.checkpoint.commit import load_commit
from megamask.checkpoint.reader import candidates
from megamask.evaluation.request import EvaluationRequest
from megamask.runs.configs import newest_config
from megamask_pipelines.evaluate import evaluate

# The reference network sums in another order than the engine; both are float32.
_SAME_BOUND = 1e-4


def remeasure(run_dir: Path, corpora: Mapping[str, str], report: Report) -> None:
    """Evaluate the newest checkpoint that has a bound, and compare; a finding if the two differ.

    Raises:
        MegamaskError: as `evaluate`.
    """
    config = newest_config(run_dir)
    commit = next((found for found in map(load_commit, candidates(run_dir)) if found.bound is not None), None)
    if config is None or commit is None or commit.bound is None:
        report.not_covered.append("the bound (no checkpoint of the run names one)")
        return
    evaluation = config.evaluation
    [folder, *_] = corpus_folders(run_dir, config, corpora).values()
    request = EvaluationRequest(
        corpus=folder,
        rows=evaluation.rows,
        draws=evaluation.draws,
        replicates=evaluation.replicates,
        seed=evaluation.seed,
    )
    measured = float(evaluate(commit.folder, request)["nelbo_nats_per_token"])
    if not math.isclose(measured, commit.bound, rel_tol=_SAME_BOUND):
        name = f"checkpoints/{commit.folder.name}/COMMIT.json"
        report.find(name, f"nelbo_nats_per_token is {commit.bound}; measured again it is {measured}")
    report.covered.append(f"the bound of {commit.folder.name}, measured again")
